"""Breaks runs of train.py, mix.py and prepare.py at random for N minutes, resumes them, and counts what they survived.

    python tests/bench/soak.py --minutes 10

A run that reaches its end must hold, byte for byte, what one that nobody disturbed does; if not, it stops there.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from conftest import SMALL, Run, made_documents, write_jsonl  # noqa: E402
from tqdm import tqdm  # noqa: E402

import prepare  # noqa: E402

SCRIPTS = ("train", "mix", "prepare")
FAULTS = (
    "SIGKILL at some moment",
    "SIGKILL before a change of the disk",
    "SIGTERM",
    "SIGINT",
    "full disk",
    "damage",
)


def options(script: str, folder: Path, data: Path) -> list:
    if script == "prepare":
        return [
            "--out",
            folder / "run",
            f"a={data.parent / 'code.jsonl'}",
            "--tokenizer",
            "train:400",
            "--workers",
            1,
        ]
    base = [
        "--data",
        data,
        "--out",
        folder / "run",
        "--model",
        "scratch:tiny",
        "--seq-len",
        32,
        "--batch-size",
        8,
    ]
    base += ["--eval-sequences", 8, "--save-every", 3, *SMALL]
    return base + (["--mix", "uniform", "--sequences", 240] if script == "train" else ["--base-sequences", 96, "--sequences", 48])  # fmt: skip


def content(folder: Path) -> dict:
    """The hash of every file, logs without the speeds in them."""
    hashes = {}
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            if path.name == "log.jsonl":
                text = repr(
                    [{**json.loads(line), "tokens_per_second": 0} for line in text.splitlines()]
                ).encode()
            hashes[str(path.relative_to(folder))] = sha256(text).hexdigest()
    return hashes


def damage(folder: Path, rng: random.Random) -> str | None:
    """Flip a bit, cut a file short or remove one, in the newest checkpoint there is."""
    checkpoints = sorted(folder.rglob("checkpoint-????????"), key=lambda path: path.stat().st_mtime)
    files = (
        [path for path in checkpoints[-1].iterdir() if path.stat().st_size] if checkpoints else []
    )
    if not files:
        return None
    path, kind = (
        rng.choice(sorted(files)),
        rng.choice(("a bit flipped", "a file cut short", "a file removed")),
    )
    text = bytearray(path.read_bytes())
    if kind == "a file removed":
        path.unlink()
    elif kind == "a file cut short":
        path.write_bytes(text[: rng.randrange(len(text))])
    else:
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        path.write_bytes(text)
    return kind


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, survived, finished = random.Random(args.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as top:
        top = Path(top)
        for d in ("code", "prose", "sums"):
            write_jsonl(top / f"{d}.jsonl", made_documents(d, 120))
        sources = {d: [top / f"{d}.jsonl"] for d in ("code", "prose", "sums")}
        data = prepare.prepare(
            top / "data", sources, "train:400", val_fraction=0.2, test_fraction=0.2
        ).folder
        expected, took = {}, {}
        for script in SCRIPTS:
            (top / script).mkdir()
            began = time.perf_counter()
            status, _, err = Run(top, script, *options(script, top / script, data)).end()
            assert status == 0, err
            expected[script], took[script] = content(top / script), time.perf_counter() - began
        began, script, folder = time.monotonic(), "train", top / "broken"
        bar = tqdm(total=60 * args.minutes, bar_format="{l_bar}{bar}| {elapsed}, {postfix}")
        while bar.n < bar.total:
            bar.set_postfix_str(f"{survived.total()} faults survived", refresh=False)
            bar.update(min(bar.total, time.monotonic() - began) - bar.n)
            folder.mkdir(exist_ok=True)
            resume = ["--resume"] if script != "prepare" else []
            fault = rng.choice(FAULTS)
            if fault == "damage":
                fault = damage(folder, rng) or "nothing"
            kill_at = rng.randint(1, 60) if fault == FAULTS[1] else 0
            largest = rng.randint(1000, 8_000_000) if fault == "full disk" else 0
            run = Run(
                top,
                script,
                *options(script, folder, data),
                *resume,
                kill_at=kill_at,
                largest=largest,
            )
            if fault.startswith("SIG") and not kill_at:
                time.sleep(rng.uniform(0, 0.7 * took[script]))
                if run.process.is_alive():
                    run.send(getattr(signal, fault.split()[0]))
            status, _, err = run.end(600)
            if fault == "SIGINT" and status == 1 and not err:
                continue  # it came before the script began
            assert "Traceback" not in err and status in (0, 2, -9, 130, 143, -15, -2), (
                script,
                fault,
                status,
                err,
            )
            assert status != 2 or fault == "full disk", (script, fault, err)
            survived[fault] += status != 0 or fault.startswith("a ")
            if status == 0:
                assert content(folder) == expected[script], (
                    f"{script} did not end as it does undisturbed"
                )
                finished[script] += 1
                shutil.rmtree(folder)
                script = rng.choice(SCRIPTS)
            for output in top.glob("output-*"):
                output.unlink()
        bar.close()
    for fault, n in sorted(survived.items()):
        if n:
            print(f"{fault:<40}{n:>6}")
    print(f"{'faults survived':<40}{survived.total():>6}")
    print(
        "runs that ended as if nothing had happened:",
        ", ".join(f"{s} {n}" for s, n in sorted(finished.items())),
    )


if __name__ == "__main__":
    main()
