"""Text to bins with prepare.py, end to end, beside the tokenizers library, which only encodes text that lies in memory.

    python tests/bench/prepare.py --tokenizer pythia-70m texts/*.jsonl
    python tests/bench/prepare.py                                # the sample's tokenizer, on the standard library; seconds

The sides take turns; the table shows the median of each. MB are 10^6 bytes of text in UTF-8.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from prepare import Tokenizer, prepare  # noqa: E402

ENCODE = """
import json, sys, time
import tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for path in sys.argv[2:] for line in open(path, "rb")]
start = time.perf_counter()
for i in range(0, len(texts), 1000):
    tokenizer.encode_batch(texts[i:i + 1000], add_special_tokens=False)
print(time.perf_counter() - start)
"""


def encode_batch(cores: set[int], tokenizer: Path, files: list[Path], folder: Path) -> float:
    env = {**os.environ, "RAYON_NUM_THREADS": str(len(cores))}
    argv = [sys.executable, "-c", ENCODE, tokenizer, *files]
    pinned = lambda: os.sched_setaffinity(0, cores)  # noqa: E731
    return float(
        subprocess.run(
            argv, check=True, capture_output=True, text=True, env=env, preexec_fn=pinned
        ).stdout
    )


def end_to_end(cores: set[int], tokenizer: Path, files: list[Path], folder: Path) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        argv = [sys.executable, ROOT / "prepare.py", "--out", f"{out}/d", "--tokenizer", tokenizer]
        argv += ["--workers", str(len(cores)), *(f"d{i}={path}" for i, path in enumerate(files))]
        start = time.perf_counter()
        subprocess.run(
            argv, check=True, capture_output=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)
        )
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help=".jsonl with a text in every record")
    parser.add_argument("--tokenizer", help="a tokenizer.json or a model")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder, files, name = Path(folder), args.files, args.tokenizer
        if not files:
            sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
            records = [
                json.dumps({"text": p.read_text(encoding="utf-8", errors="ignore")})
                for p in sources
            ]
            files = [folder / "code.jsonl"]
            files[0].write_text("\n".join(records[:4000]) + "\n")
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(
            Tokenizer(name or prepare(folder / "sample").folder).json, encoding="utf-8"
        )
        size = (
            sum(
                len(json.loads(line)["text"].encode())
                for path in files
                for line in open(path, "rb")
            )
            / 1e6
        )
        every = os.sched_getaffinity(0)
        sides = [
            (what, cores, run)
            for cores in ({min(every)}, every)
            for what, run in (
                ("tokenizers encode_batch", encode_batch),
                ("prepare.py end to end", end_to_end),
            )
        ]
        seconds = [[] for _ in sides]
        for _ in range(args.turns):
            for taken, (_, cores, run) in zip(seconds, sides):
                taken.append(run(cores, tokenizer, files, folder))
    print(
        f"{size:.1f} MB of text in {len(files)} files, {name or 'the tokenizer of the sample'}, "
        f"medians of {args.turns} turns"
    )
    print(f"{'side':<26}{'cores':>6}{'seconds':>9}{'MB/s':>8}{'ratio':>7}")
    medians = list(map(statistics.median, seconds))
    for i, (what, cores, _) in enumerate(sides):
        ratio = medians[i // 2 * 2] / medians[i]  # to the library on as many cores
        print(f"{what:<26}{len(cores):>6}{medians[i]:>9.2f}{size / medians[i]:>8.1f}{ratio:>7.2f}")


if __name__ == "__main__":
    main()
