"""Breaks runs of train.py, mix.py and prepare.py at random for N minutes, resumes them, and counts
what they survived.

    python tests/bench/soak.py --minutes 10

A run that reaches its end must hold, byte for byte, what one that nobody disturbed does; if not,
it stops there.
"""

import argparse
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

SCRIPTS = ("train", "mix", "prepare")
KILL = "SIGKILL at some moment"
KILL_BEFORE_CHANGE = "SIGKILL before a change of the disk"
FULL_DISK = "full disk"
DAMAGE = "damage"
FAULTS = (KILL, KILL_BEFORE_CHANGE, "SIGTERM", "SIGINT", FULL_DISK, DAMAGE)
DAMAGES = ("a bit flipped", "a file cut short", "a file removed")


def damage(folder: Path, rng: random.Random) -> str:
    """Damage the newest checkpoint there is; returns how, or "nothing"."""
    checkpoints = sorted(folder.rglob("checkpoint-????????"), key=lambda path: path.stat().st_mtime)
    files = []
    if checkpoints:
        files = sorted(path for path in checkpoints[-1].iterdir() if path.stat().st_size)
    if not files:
        return "nothing"
    path = rng.choice(files)
    kind = rng.choice(DAMAGES)
    text = bytearray(path.read_bytes())
    if kind == "a file removed":
        path.unlink()
    elif kind == "a file cut short":
        path.write_bytes(text[: rng.randrange(len(text))])
    else:
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        path.write_bytes(text)
    return kind


def one_life(top: Path, line: list[str], fault: str, took: float, rng: random.Random) -> int:
    """Run a script under a fault; returns its exit status, which must be one of a good end."""
    settings = {}
    if fault == KILL_BEFORE_CHANGE:
        settings["kill_at"] = rng.randint(1, 60)
    if fault == FULL_DISK:
        settings["largest"] = rng.randint(1000, 1_000_000)
    run = Run(top, *line, **settings)
    if fault in (KILL, "SIGTERM", "SIGINT"):
        time.sleep(rng.uniform(0, 0.7 * took))
        if run.process.is_alive():
            run.send(getattr(signal, fault.split()[0]))
    status, _, err = run.end(600)
    before_it_began = fault == "SIGINT" and status == 1 and not err
    expected = [0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130, 143]
    if fault == FULL_DISK:
        expected.append(2)
    assert "Traceback" not in err, (line, fault, err)
    assert status in expected or before_it_began, (line, fault, status, err)
    return status


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
        expected[script] = content_of(top / script)

    survived = Counter()
    finished = Counter()
    script = "train"
    folder = top / "broken"
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        print(f"\r{survived.total()} faults survived", end="", file=sys.stderr)
        folder.mkdir(exist_ok=True)
        fault = rng.choice(FAULTS)
        if fault == DAMAGE:
            fault = damage(folder, rng)
        line = [script, *job(script, data, model, folder / "run")]
        status = one_life(top, line, fault, took[script], rng)
        if status != 0 or fault in DAMAGES:
            survived[fault] += 1
        if status == 0:
            assert content_of(folder) == expected[script], f"{script} did not end as undisturbed"
            finished[script] += 1
            shutil.rmtree(folder)
            script = rng.choice(SCRIPTS)
        for output in top.glob("output-*"):
            output.unlink()
    return survived, finished


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
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
    main()
