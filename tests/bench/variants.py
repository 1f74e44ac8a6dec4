"""Changes of the training step that may pay: how fast each is, and how far from the present code.

    python tests/bench/variants.py                       # pythia-1b, micro-batches of 8 sequences
    python tests/bench/variants.py --only "cast once" "update queued + cast once"    # one, and both
    python tests/bench/variants.py --profile             # where the time of the present step goes

Every side is a process of its own, with the same random weights and tokens. The present code takes
turns with one variant after another, and both keep their weights on the device: --alone, where
these do not fit. `ratio` is to the present code, the median over the turns; `of peak` is the share
of the data sheet, counted in model FLOPs; `loss` and `gradient` are the largest relative
differences from the present code in the first step, of every parameter's gradient by up to 65,536
of its numbers. What fails, or takes longer than --limit, says so in one line.
"""

import argparse
import contextlib
import functools
import gc
import json
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from model import SHAPES, Config, GPTNeoX, Layer, autocast_dtype, peak_flops, start
from prepare import ArgumentParser, cli
from tests.bench.__main__ import Failed, Worker, answer_channel, peak_memory, timed, where
from train import Hyperparameters, add_gradients, clip_gradients, make_optimizer, micro_batches


class Training:
    """train.py's step of random weights on random tokens, in parts that a variant can replace."""

    def __init__(self, config: Config, device: torch.device, hyper: Hyperparameters):
        torch.manual_seed(0)
        with torch.device(device):
            self.model = GPTNeoX(config)
        self.device = device
        self.hyper = hyper
        self.optimizer = make_optimizer(self.model, hyper)
        size = (hyper.batch_size, hyper.seq_len + 1)
        self.tokens = np.random.default_rng(0).integers(config.vocab_size, size=size)
        self.compile = self.model.compile_parts

    def row(self, i: int) -> np.ndarray:
        """What micro_batches asks of a Mixture."""
        return self.tokens[i]

    def read(self) -> list:
        batch = range(self.hyper.batch_size)
        return list(micro_batches(self, batch, self.hyper.micro_batch_size))

    def gradients(self) -> Tensor:
        sequences = self.hyper.batch_size
        return add_gradients(self.model, self.read(), 0, sequences, self.hyper, None)

    def update(self, loss: Tensor) -> float:
        sums = torch.stack((loss, torch.zeros_like(loss)))
        norm = clip_gradients(self.model)
        loss, _, grad_norm = torch.cat((sums, norm[None])).tolist()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.update(self.gradients())


# ---- the variants ----


class NarrowLayer(Layer):
    def forward(self, x, cos, sin, cache=None):
        return Layer.forward(self, x.to(torch.bfloat16), cos, sin, cache)


class CopiedLinear(nn.Linear):
    def forward(self, x):
        # As model.Linear does.
        if x.is_cuda or self.bias is None:
            return F.linear(x, self.narrow, self.bias)
        y = F.linear(x, self.narrow)
        return y + self.bias.to(y.dtype)


def present(training: Training) -> None:
    """The step as it is."""


def bf16_residual(training: Training) -> None:
    # x is fp32 between the layers: in bf16 its reads and writes, and its gradient's, are half. A
    # norm still computes in fp32 (autocast), which inductor fuses with what it reads and writes.
    for layer in training.model.gpt_neox.layers:
        layer.__class__ = NarrowLayer


def whole_model(training: Training) -> None:
    # One graph: a layer's last sum can be fused with the next one's norms, which saves reading x,
    # and Python is entered once, not once a layer.
    training.compile = lambda: training.model.compile(dynamic=False)


def update_queued(training: Training) -> None:
    # The CPU waits for loss and norm only when the update is on its way, and the next batch is read
    # and copied: the fused AdamW clips, and leaves the update out, by numbers on the device
    # (GradScaler's way).
    read = training.read
    optimizer = training.optimizer
    ready = []

    def fetch() -> list:
        return [(t.to(training.device), w.to(training.device), i) for t, w, i in read()]

    def update(loss: Tensor) -> float:
        norm = nn.utils.get_total_norm([p.grad for p in training.model.parameters()])
        optimizer.grad_scale = (norm + 1e-6).clamp(min=1.0)
        optimizer.found_inf = 1 - (loss.isfinite() & norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ready.append(fetch())
        return loss.item()

    training.read = lambda: ready.pop() if ready else fetch()
    training.update = update


def cast_once(training: Training) -> None:
    # Autocast casts every matrix to bf16 in every micro-batch, and its gradient to fp32 before it
    # is added. Here the copies are made once a step; a gradient is added as it comes, in bf16 to
    # the fp32 sum.
    pairs = []

    def add(weight: Tensor):
        def hook(copy: Tensor) -> None:
            if weight.grad is None:
                weight.grad = copy.grad.to(weight.dtype)
            else:
                weight.grad += copy.grad
            copy.grad = None

        return hook

    for module in training.model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = CopiedLinear
            module.narrow = module.weight.detach().to(training.hyper.dtype).requires_grad_()
            module.narrow.register_post_accumulate_grad_hook(add(module.weight))
            pairs.append((module.narrow, module.weight))
    read = training.read

    def read_and_cast() -> list:
        with torch.no_grad():
            copies, weights = zip(*pairs, strict=True)
            torch._foreach_copy_(copies, weights)
        return read()

    training.read = read_and_cast


VARIANTS = {
    "present": present,
    "update queued": update_queued,
    "bf16 residual": bf16_residual,
    "cast once": cast_once,
    "whole model": whole_model,
}


# ---- a side's process ----


def changed(name: str, args, layers: int, device: torch.device) -> Training:
    """A training, of so many layers at most, with the variants that a name joins by " + "."""
    config = SHAPES[args.model]
    config = replace(config, num_hidden_layers=min(layers, config.num_hidden_layers))
    hyper = Hyperparameters(
        seq_len=config.max_position_embeddings,
        batch_size=args.sequences * args.micro_batches,
        learning_rate=1e-4,
        dtype=autocast_dtype(None, device),
        micro_batch_size=args.sequences,
    )
    training = Training(config, device, hyper)
    for part in name.split(" + "):
        VARIANTS[part](training)
    training.compile()
    return training


def give_back(device: torch.device) -> None:
    """Let go of memory that no tensor has, for the other sides."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_step(training: Training) -> dict[str, Tensor]:
    """Take it; its loss, and of every parameter's gradient up to 65,536 numbers."""
    loss = training.gradients()
    found = {"loss": loss.cpu()}
    for name, p in training.model.named_parameters():
        found[name] = p.grad.flatten()[:: math.ceil(p.numel() / 2**16)].cpu().contiguous()
    training.update(loss)
    return found


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of the loss and, the largest, of a parameter's gradient, relative to its Euclidean norm."""
    relative = {name: ((found[name] - x).norm() / x.norm()).item() for name, x in expected.items()}
    return {"loss": relative.pop("loss"), "gradient": max(relative.values())}


def work(name: str, args) -> None:
    """Answer every line on stdin, the name of a task, with what came of it."""
    channel = answer_channel()
    device = start()
    try:
        for task in sys.stdin:
            answer = {}
            if task == "compile\n":
                # With two layers, whose compilation all share: then several sides find the memory.
                changed(name, args, 2, device).steps(1)
            elif task == "load\n":
                training = changed(name, args, 10**6, device)
                found = first_step(training)
                if name == "present":
                    save_file(found, args.first)
                answer = differences(found, load_file(args.first))
            else:
                # Memory that was given back is taken again by a step that does not count.
                training.steps(1)
                seconds, _ = timed(device, functools.partial(training.steps, args.steps))
                answer = {"seconds": seconds / args.steps, "memory": peak_memory(device)}
            give_back(device)
            print(json.dumps(answer), file=channel)
    except Exception as e:
        print(json.dumps({"error": " ".join(repr(e).split())}), file=channel)


# ---- the sides in turn ----


class Side(Worker):
    """A side's process, and how long its steps took, by turn."""

    def __init__(self, name: str, first: str):
        super().__init__([__file__, *sys.argv[1:], "--work", name, "--first", first])
        self.name = name
        self.seconds = []

    def load(self, limit: float) -> None:
        self.tell("load")
        self.difference = self.answer(limit)

    def take_turn(self, limit: float) -> None:
        self.tell("turn")
        answer = self.answer(limit)
        self.seconds.append(answer["seconds"])
        self.memory = answer["memory"]


@contextlib.contextmanager
def telling_failure(side: Side) -> Iterator[None]:
    try:
        yield
    except Failed as e:
        print(f"{side.name}: {e}"[:100], flush=True)


def say_line(side: Side, present: Side, args, device: torch.device) -> None:
    T = SHAPES[args.model].max_position_embeddings
    with torch.device("meta"):
        flops = GPTNeoX(SHAPES[args.model]).flops_per_token(T)
    rate = args.sequences * args.micro_batches * T / statistics.median(side.seconds)
    peak = peak_flops(device, autocast_dtype(None, device)) or math.nan
    # The present code's last turns were between this side's.
    pairs = zip(present.seconds[-args.turns :], side.seconds, strict=True)
    ratio = statistics.median(before / after for before, after in pairs)
    line = f"{side.name:<32}{rate:>10,.0f}{ratio:>8.3f}{rate * flops / peak:>9.1%}"
    far = f"{side.difference['loss']:>10.1e}{side.difference['gradient']:>10.1e}"
    print(f"{line}{side.memory / 1e9:>8.2f}{far}", flush=True)


def compare(names: list[str], args, device: torch.device) -> None:
    """Print the table, line by line; the first of the names is the present code."""
    head = f"{'tokens/s':>10}{'ratio':>8}{'of peak':>9}{'GB':>8}{'loss':>10}{'gradient':>10}"
    print(f"{'':<32}{head}", flush=True)
    present = None
    with tempfile.TemporaryDirectory() as folder:
        for i in range(0, len(names), args.at_once):
            group = [Side(name, f"{folder}/first") for name in names[i : i + args.at_once]]
            present = present or group[0]
            for side in group:
                side.tell("compile")
            # No side compiles while another one is measured.
            compiled = []
            for side in group:
                with telling_failure(side):
                    side.answer(args.limit)
                    compiled.append(side)
            for side in compiled:
                with telling_failure(side):
                    side.load(args.limit)
                    for _ in range(args.turns):
                        if side is not present and not args.alone:
                            present.take_turn(args.limit)
                        side.take_turn(args.limit)
                    say_line(side, present, args, device)
                # Without it there is nothing to compare with.
                if present.process.poll() is not None and not args.alone:
                    return
                # Its memory is the next one's.
                if side is not present or args.alone:
                    side.close()
        present.close()


# ---- where the time goes ----


# By name; the first that fits counts.
GROUPS = {
    "inductor's own": "^triton_|CompiledFxGraph",
    "attention": "sdpa|fmha|flash|attention|bmm",
    "matrix products": "gemm|nvjet|cutlass|xmma|cublas|::mm|addmm|mkldnn",
    "AdamW": "adam",
    "the rest": "",
}


def profile(args, device: torch.device, steps: int = 3) -> None:
    """Print a step's kernels (on a CPU its operations) by group, and the 40 that take longest."""
    training = changed(args.profile, args, 10**6, device)
    training.steps(3)
    on_gpu = device.type == "cuda"
    kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        seconds, _ = timed(device, functools.partial(training.steps, steps))
    groups = dict.fromkeys(GROUPS, 0.0)
    lines = {}
    for event in profiler.key_averages():
        spent = event.self_cpu_time_total
        if on_gpu:
            spent = event.self_device_time_total
            # What starts a kernel, or spans several, has none of its own.
            if event.device_type != DeviceType.CUDA or event.is_user_annotation:
                continue
        ms = spent / 1000 / steps
        group = next(group for group, words in GROUPS.items() if re.search(words, event.key, re.I))
        groups[group] += ms
        line = f"{ms:>9.3f} ms {event.count / steps:>6.1f} x  {group:<16} {event.key[:58]}"
        lines[line] = ms
    print(f"a step, {args.profile}: {1000 * seconds / steps:.1f} ms while it is profiled")
    for group, ms in groups.items():
        print(f"{ms:>9.3f} ms  {group}")
    print("\n".join(sorted(lines, key=lines.get, reverse=True)[:40]))


# ---- main ----


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", default="pythia-1b", choices=SHAPES, metavar="SIZE")
    add("--sequences", type=int, default=8, help="in a micro-batch")
    add("--micro-batches", type=int, default=1, help="in a step")
    add("--turns", type=int, default=5)
    add("--steps", type=int, default=3, help="a turn")
    add("--only", nargs="+", default=list(VARIANTS), metavar="NAME", help="or 'NAME + NAME'")
    add("--alone", action="store_true", help="one side after another, not in turns")
    add("--at-once", type=int, default=4, help="how many sides compile at a time")
    add("--limit", type=float, default=150, help="seconds for a side to answer in")
    words = "where its step's time goes (default: the present code's), and no table"
    add("--profile", nargs="?", const="present", metavar="NAME", help=words)
    add("--work", help=argparse.SUPPRESS)
    add("--first", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = [*args.only, args.profile or "present"]
    unknown = {part for name in names for part in name.split(" + ")} - {*VARIANTS}
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; the variants are {', '.join(VARIANTS)}")
    if args.work:
        return work(args.work, args)
    device = start()
    T = SHAPES[args.model].max_position_embeddings
    size = f"{args.model}, {args.micro_batches} x {args.sequences} x {T}"
    precision = str(autocast_dtype(None, device)).removeprefix("torch.")
    print(f"torch {torch.__version__}, {where(device)}, {precision}, {size}", flush=True)
    if args.profile:
        return profile(args, device)
    compare(["present", *(name for name in args.only if name != "present")], args, device)


if __name__ == "__main__":
    cli(main)
