"""Loading a model's fp16 safetensors as fp32: seconds and memory, ours beside transformers.

    python tests/bench/load.py                             # the shape of pythia-410m, from a folder
    python tests/bench/load.py --size pythia-70m --turns 5

The sides take turns, each time in a process of its own; printed are medians. The time is that of
the loading alone, without imports. Memory is what the process holds at most, beyond what it held
before, over the size of the fp32 weights.
"""

import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from model import load, save
from prepare import ArgumentParser, cli

SIDES = ("reweight", "transformers")


def most_held() -> int:
    """By this process, so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def measure(side: str, folder: str) -> tuple[float, float]:
    """Seconds, and memory over that of the weights."""
    call = load
    if side == "transformers":
        from transformers import GPTNeoXForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        call = GPTNeoXForCausalLM.from_pretrained
    before = most_held()
    began = time.perf_counter()
    model = call(folder, dtype=torch.float32)
    seconds = time.perf_counter() - began
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return seconds, (most_held() - before) / sum(p.nbytes for p in model.parameters())


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--size", default="pythia-410m")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    taken = {side: [] for side in SIDES}
    processes = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, processes:
        save(load(f"scratch:{args.size}"), folder, dtype=torch.float16)
        size = Path(folder, "model.safetensors").stat().st_size
        for _ in range(args.turns):
            for side in SIDES:
                taken[side].append(processes.apply(measure, (side, folder)))
    print(f"{args.size}, {size / 1e6:,.0f} MB of fp16 on disk, medians of {args.turns} turns")
    print(f"{'side':<18}{'seconds':>8}{'memory / weights':>18}")
    for side, values in taken.items():
        seconds, memory = map(statistics.median, zip(*values, strict=True))
        print(f"{side:<18}{seconds:>8.2f}{memory:>18.2f}")


if __name__ == "__main__":
    cli(main)
