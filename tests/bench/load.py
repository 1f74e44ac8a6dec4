"""Loading a model's fp16 safetensors as fp32: seconds and memory, ours beside transformers.

    python tests/bench/load.py                             # the shape of pythia-410m, from a folder
    python tests/bench/load.py --size pythia-70m --turns 5

The sides take turns, each time in a process of its own; printed are medians. The time is that of
the loading alone, without imports. Memory is what the process holds at most, beyond what it held
before, over the size of the fp32 weights.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model import load, save

MEASURE = """
import sys, time
import torch
{imports}

def held():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(status["VmHWM"].split()[0])

before = held()
began = time.perf_counter()
model = {call}
seconds = time.perf_counter() - began
assert all(p.dtype == torch.float32 for p in model.parameters())
print(seconds, (held() - before) / sum(p.nbytes for p in model.parameters()))
"""
IMPORTS = """
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
"""
FROM_PRETRAINED = "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)"
SIDES = {
    "reweight": MEASURE.format(imports="from model import load", call="load(sys.argv[1])"),
    "transformers": MEASURE.format(imports=IMPORTS, call=FROM_PRETRAINED),
}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--size", default="pythia-410m")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    taken = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        save(load(f"scratch:{args.size}"), folder, dtype=torch.float16)
        size = Path(folder, "model.safetensors").stat().st_size
        for _ in range(args.turns):
            for side, code in SIDES.items():
                command = [sys.executable, "-c", code, folder]
                words = subprocess.check_output(command, cwd=ROOT, text=True).split()
                taken[side].append([float(word) for word in words])
    print(f"{args.size}, {size / 1e6:,.0f} MB of fp16 on disk, medians of {args.turns} turns")
    print(f"{'side':<18}{'seconds':>8}{'memory / weights':>18}")
    for side, values in taken.items():
        seconds, memory = map(statistics.median, zip(*values, strict=True))
        print(f"{side:<18}{seconds:>8.2f}{memory:>18.2f}")


if __name__ == "__main__":
    main()
