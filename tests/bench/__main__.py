"""How fast the scripts are here, beside transformers and beside the machine's own matrix products.

    python -m tests.bench                 # tiny, 14m, 70m, 12 minutes; on a GPU 70m, 160m, 410m, 1b
    python -m tests.bench --models pythia-1.4b --sequences 8 --sides reweight --tasks train

A side is a process of its own, with random weights and the allocator that its users have, and
compiles with an empty cache. The sides take turns, a matrix product of 4096 x 4096 x 4096 among
them, so that a machine that slows down slows all of them; printed are medians over the turns.
`peak` is the share of what that product reaches in the same dtype, counted in model FLOPs; `ratio`
is to transformers eager; nan is what ran out of memory, has nothing beside it, or is not measured
(how litgpt generates). Evaluation and training are in autocast, generation (one sequence, greedy,
from 32 tokens on) in fp32. Without --sides these are all that are installed.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model import SHAPES, autocast, autocast_dtype, can_compile, load, save, start
from prepare import ArgumentParser, Data, cli
from train import Hyperparameters, Mixture, make_optimizer, micro_batches, sequences_of_step

ROOT = Path(__file__).parents[2]
EAGER = "transformers eager"
LITGPT = "litgpt compiled"
SIDES = ("reweight", EAGER, "transformers compiled", LITGPT)
TASKS = ("train", "evaluate", "generate")
PROMPT = 32  # tokens
NEW = 64  # tokens
ROWS = {"tiny": 16, "pythia-14m": 2, "pythia-70m": 1}  # sequences in a step on a CPU
GPU_ROWS = {"pythia-70m": 8, "pythia-160m": 8, "pythia-410m": 8, "pythia-1b": 4}


# ---- processes that take turns ----


class Failed(Exception):
    """A process has ended where an answer was due; the message says why."""


class Worker:
    """The driver's end of a process that answers lines with lines of JSON."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, *command]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)

    def tell(self, task: str) -> None:
        # One that has ended hears nothing.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(task + "\n")
            self.process.stdin.flush()

    def answer(self, limit: float = 3600) -> dict:
        """What it says next. Raises Failed if that is an error, or nothing for so many seconds."""
        late = threading.Timer(limit, self.process.kill)
        late.daemon = True
        late.start()
        line = self.process.stdout.readline()
        late.cancel()
        answer = {"error": f"it ended, or was ended after {limit:g} s"}
        if line:
            answer = json.loads(line)
        if "error" in answer:
            self.close()
            raise Failed(answer["error"])
        return answer

    def do(self, task: str) -> dict:
        self.tell(task)
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def answer_channel():
    """A worker's end: a file for its answers. Whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def timed(device: torch.device, task) -> tuple[float, object]:
    """The seconds that a call takes, until the device is done, and what it returns."""
    began = time.perf_counter()
    result = task()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process had at a time, on the GPU if it uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- a side's process ----


def reweight(folder: str):
    """The model, its mean loss of inputs and targets, and what follows a prompt (1, T)."""
    device = start()
    model = load(folder, device)
    if can_compile(device)[0]:
        model.compile_parts()

    def mean_loss(inputs, targets):
        return model(inputs, targets).mean()

    def generate(prompt):
        # As model.py speaks: every token has a new shape, for which nothing is compiled.
        with torch.compiler.set_stance("force_eager"):
            return list(model.generate(prompt, NEW))

    return model, mean_loss, generate


def transformers(folder: str, compiled: bool):
    """Likewise."""
    from transformers import GPTNeoXForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    words = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    if compiled:
        model.compile(dynamic=False)
        words["cache_implementation"] = "static"

    def mean_loss(inputs, targets):
        return model(inputs, labels=targets, shift_labels=targets).loss

    def generate(prompt):
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **words)
        return tokens[0, PROMPT:].tolist()

    return model, mean_loss, generate


def litgpt(folder: str):
    """Likewise, with its loss in the same graph; how it generates is not measured."""
    from litgpt import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox

    shape = load(folder, "meta").config
    # By name, for what all Pythias have in common.
    model = GPT.from_name(
        "pythia-70m",
        n_layer=shape.num_hidden_layers,
        n_embd=shape.hidden_size,
        n_head=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        block_size=shape.max_position_embeddings,
        padded_vocab_size=shape.vocab_size,
    )
    weights = {}
    copy_weights_gpt_neox(model.config, weights, load_file(Path(folder) / "model.safetensors"))
    model.load_state_dict(weights)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.compile(dynamic=False)
    def mean_loss(inputs, targets):
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    return model, mean_loss, None


def work(side: str, folder: str, rows: int) -> None:
    """Read names of tasks, do each once, and answer with its seconds, value and memory."""
    answers = answer_channel()
    if side == "reweight":
        model, mean_loss, continued = reweight(folder)
    elif side == LITGPT:
        model, mean_loss, continued = litgpt(folder)
    else:
        model, mean_loss, continued = transformers(folder, side != EAGER)
    device = next(model.parameters()).device
    dtype = autocast_dtype(None, device)
    config = load(folder, "meta").config
    hyper = Hyperparameters(config.max_position_embeddings, rows, learning_rate=0.0)
    optimizer = make_optimizer(model, hyper)
    shape = (rows, config.max_position_embeddings + 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    inputs = tokens[:, :-1].contiguous()
    targets = tokens[:, 1:].contiguous()

    def train() -> float:
        with autocast(device, dtype):
            loss = mean_loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.inference_mode()
    def evaluate() -> float:
        with autocast(device, dtype):
            return mean_loss(inputs, targets).item()

    @torch.inference_mode()
    def generate() -> int:
        return len(continued(inputs[:1, :PROMPT]))

    tasks = {"train": train, "evaluate": evaluate, "generate": generate}
    for line in sys.stdin:
        answer = {"value": math.nan, "seconds": math.nan}
        if continued is None and line.strip() == "generate":
            print(json.dumps(answer), file=answers)
            continue
        with contextlib.suppress(torch.OutOfMemoryError):
            seconds, value = timed(device, tasks[line.strip()])
            answer = {"value": value, "seconds": seconds}
        answer["memory"] = peak_memory(device)
        print(json.dumps(answer), file=answers)


# ---- the models ----


class Side(Worker):
    """A side that has taken its first steps."""

    def __init__(self, name: str, folder: str, rows: int, tasks: list[str]):
        cache = tempfile.mkdtemp(dir=folder)
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        began = time.perf_counter()
        super().__init__(["-m", "tests.bench", "--work", name, folder, str(rows)], env)
        self.loss = self.do("train")["value"]
        self.started = time.perf_counter() - began
        self.do("train")
        self.memory = self.do("train")["memory"]
        for task in tasks * 2:
            self.do(task)
        self.seconds: dict[str, list[float]] = {task: [] for task in TASKS}  # by turn

    def take_turn(self, task: str, times: int) -> None:
        seconds = [self.do(task)["seconds"] for _ in range(times)]
        self.seconds[task].append(statistics.mean(seconds))


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of three products of 4096 x 4096 matrices."""
    a, b = torch.randn(2, 4096, 4096, device=device).to(dtype)
    timed(device, lambda: None)  # until the matrices are there
    return 2 * 4096**3 / min(timed(device, lambda: a @ b)[0] for _ in range(3))


def measure(size: str, rows: int, args, device: torch.device, dtype: torch.dtype) -> None:
    """Print one model's lines."""
    shape = load(f"scratch:{size}")
    T = shape.config.max_position_embeddings
    tokens = {"train": rows * T, "evaluate": rows * T, "generate": NEW}
    flops = {"train": shape.flops_per_token(T), "evaluate": shape.flops_per_token(T) / 3}
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        save(shape, folder)
        sides = {name: Side(name, folder, rows, args.tasks) for name in args.sides}
        for _ in range(args.turns):
            peaks.append(product_flops(device, dtype))
            for task in args.tasks:
                for side in sides.values():
                    side.take_turn(task, 1 if task == "generate" else args.steps)
        for side in sides.values():
            side.close()
    peak = statistics.median(peaks)
    for name, side in sides.items():
        line = f"{size:<12}{f'{rows} x {T}':>9}  {name:<22}"
        for task in TASKS:
            seconds = np.array(side.seconds[task] or [math.nan])
            rate = tokens[task] / np.median(seconds)
            ratio = math.nan
            if EAGER in sides:
                ratio = np.median(np.array(sides[EAGER].seconds[task] or [math.nan]) / seconds)
            line += f"{rate:>10,.0f}{ratio:>6.2f}"
            if task in flops:
                line += f"{rate * flops[task] / peak:>6.0%}"
        print(f"{line}{side.memory / 1e9:>8.2f}{side.started:>10.1f}{side.loss:>9.4f}", flush=True)
    print(f"{'':<23}matrix product: {peak / 1e12:.2f} TFLOP/s", flush=True)


# ---- the data ----


def write_zeros(folder: Path, sequences: int, T: int) -> None:
    """A data set of five domains with so many training sequences, of zeros that take no room."""
    files = {}
    for domain in "abcde":
        for split, windows in {"train": sequences // 5, "val": 10, "test": 10}.items():
            name = f"{domain}.{split}"
            tokens = windows * T + 1
            (folder / f"{name}.bin").touch()
            os.truncate(folder / f"{name}.bin", 2 * tokens)
            files[name] = {"documents": 1, "tokens": tokens, "bytes": tokens, "sha256": ""}
    tokenizer = {"sha256": "", "vocab_size": 4096, "end_of_text": 0}
    meta = {"format": 1, "tokenizer": tokenizer, "files": files}
    (folder / "meta.json").write_text(json.dumps(meta))


def data_path(sequences: int = 10**7, T: int = 256) -> None:
    """Opening a data set of so many sequences, and reading a part of a pass over it."""

    def read(steps: range) -> None:
        for step in steps:
            for _ in micro_batches(mixture, sequences_of_step(step, 16, sequences), 16):
                pass

    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_zeros(Path(folder), sequences, T)
        counts = dict.fromkeys("abcde", sequences // 5)
        opened, mixture = timed(cpu, lambda: Mixture(Data(folder), counts, T))
        first, _ = timed(cpu, lambda: read(range(1)))  # hashes and sorts all windows
        print(f"\ndata of {sequences:,} sequences: open {opened:.2f} s, first batch {first:.2f} s")
        for words in ("first read", "read again"):
            seconds, _ = timed(cpu, lambda: read(range(1, 1001)))
            rate = 1000 * 16 * T / seconds
            print(f"batches of 16 x {T}, {words}: {rate:,.0f} tokens/s")


# ---- main ----


def installed(side: str) -> bool:
    return side == "reweight" or importlib.util.find_spec(side.split()[0]) is not None


def where(device: torch.device) -> str:
    """The GPU's name, or the CPU's threads and what it has for products in bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    found = {}
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
    # x86's names, then ARM's.
    names = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16", "sve_bf16")
    words = [f"{torch.get_num_threads()} CPU threads", *filter(found.get, names)]
    return " ".join(words)


def main():
    parser = ArgumentParser(__doc__)
    parser.prog = "-m tests.bench"
    parser.add_argument("--models", nargs="+", choices=SHAPES, metavar="SIZE")
    sides = [side for side in SIDES if installed(side)]
    parser.add_argument("--sides", nargs="+", default=sides, choices=SIDES, metavar="SIDE")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS, metavar="TASK")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="a turn")
    parser.add_argument("--sequences", type=int, help="in a step")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        side, folder, rows = args.work
        return work(side, folder, int(rows))
    device = start()
    dtype = autocast_dtype(None, device)
    precision = str(dtype).removeprefix("torch.")
    turns = f"{args.turns} turns of {args.steps}"
    print(f"torch {torch.__version__}, {where(device)}, {precision}, {turns}")
    print(f"{'':<45}{'train':>10}{'evaluate':>22}{'generate':>22}{'memory':>14}{'1st step':>10}")
    rates = f"{'tokens/s':>10}{'ratio':>6}{'peak':>6}"
    rest = f"{'tokens/s':>10}{'ratio':>6}{'GB':>8}{'s':>10}{'loss':>9}"
    print(f"{'model':<12}{'B x T':>9}  {'side':<22}{rates}{rates}{rest}", flush=True)
    usual = GPU_ROWS if device.type == "cuda" else ROWS
    for size in args.models or usual:
        measure(size, args.sequences or usual.get(size, 1), args, device, dtype)
    if args.tasks == [*TASKS]:
        data_path()


if __name__ == "__main__":
    cli(main)
