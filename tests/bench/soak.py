"""Breaks runs of train.py, mix.py and prepare.py at random for N minutes, resumes them, and counts
what they survived.

    python tests/bench/soak.py --minutes 10

A run that reaches its end must hold, byte for byte, what one that nobody disturbed does; if not,
it stops there.
"""

import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from conftest import Run, content_of, ends_well, job, made_data, small_model

from prepare import ArgumentParser, cli

SCRIPTS = ("train", "mix", "prepare")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
DAMAGES = ("a bit flipped", "a file cut short", "a file removed")
FAULTS = (*SIGNALS, *DAMAGES, "SIGKILL before a change of the disk", "full disk")


def damage(folder: Path, fault: str, rng: random.Random) -> bool:
    """Damage a file of the newest checkpoint; returns whether there was one."""
    files = [path for path in folder.rglob("checkpoint-????????/*") if path.stat().st_size]
    if not files:
        return False
    newest = max(files, key=lambda path: path.stat().st_mtime).parent
    path = rng.choice(sorted(path for path in files if path.parent == newest))
    content = bytearray(path.read_bytes())
    if fault == "a file removed":
        path.unlink()
    elif fault == "a file cut short":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return True


def one_life(top: Path, line: list[str], fault: str, took: float, rng: random.Random) -> int:
    """Run a script under a fault; returns its exit status, which must be one of a good end."""
    settings = {}
    if fault == "SIGKILL before a change of the disk":
        settings["kill_at"] = rng.randint(1, 60)
    if fault == "full disk":
        settings["largest"] = rng.randint(1000, 1_000_000)
    run = Run(top, *line, **settings)
    if fault in SIGNALS:
        time.sleep(rng.uniform(0, 0.7 * took))
        if run.process.is_alive():
            run.send(getattr(signal, fault))
    status, _, err = run.end(600)
    if fault == "SIGINT" and status == 1 and ", in cli" not in err:  # it came before the script
        return status
    expected = [0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130, 143]
    if fault == "full disk":
        expected.append(2)
    assert "Traceback" not in err, (line, fault, err)
    assert status in expected, (line, fault, status, err)
    return status


def result_of(folder: Path) -> dict[str, str]:
    """What must not depend on faults: all but what a stop leaves of a search's rounds, beside their
    losses."""
    content = content_of(folder)
    return {path: x for path, x in content.items() if "/runs/" not in path or ".npz" in path}


def soak(top: Path, minutes: float, rng: random.Random) -> tuple[Counter, Counter]:
    """Returns how many of each fault runs survived, and how many runs of each script ended."""
    data = made_data(top)
    model = small_model(top / "model", data)
    expected = {}
    took = {}
    for script in SCRIPTS:
        (top / script).mkdir()
        began = time.perf_counter()
        ends_well(Run(top, script, *job(script, data, model, top / script / "run")))
        took[script] = time.perf_counter() - began
        expected[script] = result_of(top / script)

    survived = Counter()
    finished = Counter()
    script = "train"
    folder = top / "broken"
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        print(f"\r{survived.total()} faults survived", end="", file=sys.stderr)
        folder.mkdir(exist_ok=True)
        fault = rng.choice(FAULTS)
        damaged = fault in DAMAGES and damage(folder, fault, rng)
        line = [script, *job(script, data, model, folder / "run")]
        status = one_life(top, line, fault, took[script], rng)
        if damaged or status != 0:
            survived[fault] += 1
        # A data set that was published before the signal came is not made again.
        if status == 0 or (folder / "run" / "meta.json").is_file():
            assert result_of(folder) == expected[script], f"{script} did not end as undisturbed"
            finished[script] += 1
            shutil.rmtree(folder)
            script = rng.choice(SCRIPTS)
        for output in top.glob("output-*"):
            output.unlink()
    return survived, finished


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as top:
        survived, finished = soak(Path(top), args.minutes, random.Random(args.seed))
    print()
    for fault, n in sorted(survived.items()):
        print(f"{fault:<40}{n:>6}")
    print(f"{'faults survived':<40}{survived.total():>6}")
    counts = ", ".join(f"{script} {n}" for script, n in sorted(finished.items()))
    print("runs that ended as if nothing had happened:", counts)


if __name__ == "__main__":
    cli(main)
