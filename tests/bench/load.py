"""Loading a model's fp16 safetensors as fp32: seconds and memory, ours beside transformers, each in a process of its own.

    python tests/bench/load.py                              # the shape of pythia-410m, from a folder
    python tests/bench/load.py --size pythia-70m --turns 5

The sides take turns; printed are medians. The time is that of the loading alone, without imports. `hashed` is ours from
the hub's cache, where the sha256 of every file is checked first. Memory is what the process holds at most, beyond what it
held before, over the size of the fp32 weights.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

MEASURE = """
import resource, sys, time
sys.path.insert(0, {root!r})
import torch
{imports}
held = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before, start = held(), time.perf_counter()
model = {load}
seconds = time.perf_counter() - start
weights = sum(p.numel() * p.element_size() for p in model.parameters())
assert all(p.dtype == torch.float32 for p in model.parameters())
print(seconds, (held() - before) / weights)
"""
SIDES = {
    "reweight": ("import model", "model.load({folder!r})"),
    "reweight hashed": (
        "import model, prepare",
        "(setattr(model, 'hub_folder', lambda *_: prepare.Path({cache!r})), model.load('EleutherAI/none'))[1]",
    ),
    "transformers": (
        "from transformers import AutoModelForCausalLM",
        "AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)",
    ),
}


def main():
    import torch

    from model import load, save

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="pythia-410m")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    taken = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as tmp:
        folder, cache = Path(tmp, "model"), Path(tmp, "cache")
        save(load(f"scratch:{args.size}"), folder, dtype=torch.float16)
        cache.mkdir()
        for path in (
            folder.iterdir()
        ):  # as the hub's cache has it: links to files that are named by their hash
            blob = Path(tmp, hashlib.file_digest(open(path, "rb"), "sha256").hexdigest())
            blob.hardlink_to(path)
            (cache / path.name).symlink_to(blob)
        size = (folder / "model.safetensors").stat().st_size
        for _ in range(args.turns):
            for side, (imports, call) in SIDES.items():
                code = MEASURE.format(
                    root=str(ROOT),
                    imports=imports,
                    load=call.format(folder=str(folder), cache=str(cache)),
                )
                done = subprocess.run(
                    [sys.executable, "-c", code], check=True, capture_output=True, text=True
                )
                taken[side].append(tuple(map(float, done.stdout.split())))
    print(f"{args.size}, {size / 1e6:,.0f} MB of fp16 on disk, medians of {args.turns} turns")
    print(f"{'side':<18}{'seconds':>8}{'memory / weights':>18}")
    for side, values in taken.items():
        seconds, memory = map(statistics.median, zip(*values))
        print(f"{side:<18}{seconds:>8.2f}{memory:>18.2f}")


if __name__ == "__main__":
    main()
