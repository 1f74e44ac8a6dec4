"""Text to bins with prepare.py, end to end, beside the tokenizers library, which only encodes text
that lies in memory. Where fastokens is installed, prepare.py runs with it and without it.

    python tests/bench/prepare.py --tokenizer pythia-70m texts/*.jsonl
    python tests/bench/prepare.py         # the sample's tokenizer, on the standard library; seconds

The sides take turns; the table shows the median of each. MB are 10^6 bytes of text in UTF-8.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from prepare import ArgumentParser, Tokenizer, cli, prepare

ENCODE = """
import json, sys, time
import tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for path in sys.argv[2:] for line in open(path, "rb")]
began = time.perf_counter()
for i in range(0, len(texts), 1000):
    tokenizer.encode_batch(texts[i:i + 1000], add_special_tokens=False)
print(time.perf_counter() - began)
"""


def encode_batch(tokenizer: Path, files: list[Path], cores: int) -> float:
    env = {**os.environ, "RAYON_NUM_THREADS": str(cores)}
    command = [sys.executable, "-c", ENCODE, tokenizer, *files]
    return float(subprocess.check_output(command, env=env))


def end_to_end(tokenizer: Path, files: list[Path], cores: int, hidden: str = "") -> float:
    """hidden: the name of a module that is as if it were not installed."""
    with tempfile.TemporaryDirectory(dir=tokenizer.parent) as out:
        if hidden:
            Path(out, f"{hidden}.py").write_text("raise ImportError")
        env = {**os.environ, "PYTHONPATH": out}
        command = [sys.executable, ROOT / "prepare.py", "--out", f"{out}/data"]
        command += ["--tokenizer", tokenizer, "--workers", str(cores)]
        command += [f"d{i}={path}" for i, path in enumerate(files)]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=env)
        return time.perf_counter() - began


LIBRARY = "tokenizers encode_batch"
SIDES = {
    LIBRARY: encode_batch,
    "prepare.py end to end": functools.partial(end_to_end, hidden="fastokens"),
}
if find_spec("fastokens"):
    SIDES["prepare.py with fastokens"] = end_to_end


def standard_library(path: Path) -> Path:
    """4000 files of Python's standard library and what is installed there, as records."""
    with open(path, "w", encoding="utf-8") as file:
        for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:4000]:
            text = source.read_text(encoding="utf-8", errors="ignore")
            file.write(json.dumps({"text": text}) + "\n")
    return path


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("files", nargs="*", type=Path, help=".jsonl with a text in every record")
    parser.add_argument("--tokenizer", help="a tokenizer.json or a model")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    every = os.sched_getaffinity(0)
    cores = {1: {min(every)}, len(every): every}
    seconds = {(n, name): [] for n in cores for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = args.files or [standard_library(folder / "code.jsonl")]
        tokenizer = folder / "tokenizer.json"
        loaded = Tokenizer(args.tokenizer or prepare(folder / "sample").folder)
        tokenizer.write_text(loaded.json, encoding="utf-8")
        for _ in range(args.turns):
            for (n, name), taken in seconds.items():
                os.sched_setaffinity(0, cores[n])  # of the side's processes, too
                taken.append(SIDES[name](tokenizer, files, n))
        lines = [line for path in files for line in path.read_bytes().splitlines()]
        size = sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6
    which = args.tokenizer or "the tokenizer of the sample"
    print(f"{size:.1f} MB of text in {len(files)} files, {which}, medians of {args.turns} turns")
    print(f"{'side':<26}{'cores':>6}{'seconds':>9}{'MB/s':>8}{'ratio':>7}")
    for (n, name), taken in seconds.items():
        median = statistics.median(taken)
        ratio = statistics.median(seconds[n, LIBRARY]) / median
        print(f"{name:<26}{n:>6}{median:>9.2f}{size / median:>8.1f}{ratio:>7.2f}")


if __name__ == "__main__":
    cli(main)
