"""How fast the scripts are on this machine, beside transformers and beside the machine's own matrix products.

    python -m tests.bench                             # tiny, 14m, 70m, 12 minutes; on a GPU 70m, 160m, 410m, 1b
    python -m tests.bench --models pythia-1b --sequences 8

A side is a process of its own, with random weights and the allocator that its users have, and compiles with an empty
cache. The sides take turns, a matrix product of 4096 x 4096 x 4096 among them, so that a machine that slows down slows
all of them; printed are medians over the turns. `peak` is the share of what that product reaches in the same dtype,
counted in model FLOPs; `ratio` is to transformers eager. Evaluation and training are in autocast, generation (one
sequence, greedy, from 32 tokens on) in fp32.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from eval import autocast, autocast_dtype, can_compile, start  # noqa: E402
from model import SHAPES, load, save  # noqa: E402
from prepare import Data  # noqa: E402
from train import Mixture, flops_per_token, make_optimizer, micro_batches  # noqa: E402

SIDES = ("reweight", "transformers eager", "transformers compiled")
TASKS = ("train", "evaluate", "generate")
PROMPT, NEW = 32, 64  # tokens
ROWS = {"tiny": 16, "pythia-14m": 2, "pythia-70m": 1}  # sequences in a step on a CPU


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The best of three products of 4096 x 4096 matrices."""
    a, b = torch.randn(2, 4096, 4096, device=device).to(dtype)
    seconds = []
    for _ in range(3):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def work(side: str, folder: str, B: int) -> None:
    """A side's process: reads names of tasks, does each once and answers with its seconds."""
    if side == "reweight":
        device = start()
        model = load(folder, device)
        if can_compile(device)[0]:
            model.compile_parts()
    else:
        from transformers import GPTNeoXForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        if side == "transformers compiled":
            model.compile(dynamic=False)
    dtype, optimizer = autocast_dtype(None, device), make_optimizer(model, device)
    T = model.config.max_position_embeddings
    tokens = torch.randint(
        model.config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)

    def mean_loss():
        with autocast(device, dtype):
            if side == "reweight":
                return model(tokens[:, :-1], tokens[:, 1:]).mean()
            return model(tokens, labels=tokens).loss  # shifted inside: the same T targets

    def train():
        loss = mean_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.inference_mode()
    def evaluate():
        return mean_loss().item()

    @torch.inference_mode()
    def generate():
        if side == "reweight":
            return model.generate(tokens[:1, :PROMPT], NEW).size(1)
        fixed = {"cache_implementation": "static"} if side == "transformers compiled" else {}
        more = {
            "min_new_tokens": NEW,
            "max_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 0,
            **fixed,
        }
        return model.generate(
            tokens[:1, :PROMPT], attention_mask=torch.ones_like(tokens[:1, :PROMPT]), **more
        ).size(1)

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    for line in sys.stdin:
        answer = {}
        synchronize(device)
        began = time.perf_counter()
        with contextlib.suppress(torch.OutOfMemoryError):
            answer = {
                "value": {"train": train, "evaluate": evaluate, "generate": generate}[
                    line.strip()
                ]()
            }
            synchronize(device)
            answer["seconds"] = time.perf_counter() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer["memory"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """The driver's end of a side's process."""

    def __init__(self, side: str, folder: str, B: int, cache: str):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-m", "tests.bench", "--work", side, folder, str(B)]
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def do(self, task: str) -> dict:
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(
    size: str, B: int, turns: int, steps: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Print one model's lines."""
    shape = load(f"scratch:{size}")
    T, flops = (
        shape.config.max_position_embeddings,
        flops_per_token(shape, shape.config.max_position_embeddings),
    )
    count = {"train": B * T, "evaluate": B * T, "generate": NEW}
    cost = {"train": flops, "evaluate": flops / 3}
    with tempfile.TemporaryDirectory() as folder:
        save(shape, folder)
        sides, first, seconds, memory = {}, {}, {}, {}
        for side in SIDES:
            sides[side] = Side(side, folder, B, f"{folder}/cache-{len(sides)}")
            first[side] = sides[side].do("train") | {
                "started": time.perf_counter() - sides[side].began
            }
            memory[side] = max(sides[side].do("train")["memory"] for _ in range(2)) / 1e9
            for task in TASKS[1:] * 2:
                sides[side].do(task)
        peak = []
        for _ in range(turns):
            peak.append(2 * 4096**3 / matmul_seconds(device, dtype))
            for task in TASKS:
                for side in SIDES:
                    done = [
                        sides[side].do(task).get("seconds")
                        for _ in range(steps if task != "generate" else 1)
                    ]
                    if all(done):
                        seconds.setdefault((task, side), []).append(statistics.mean(done))
        for side in sides.values():
            side.close()
    peak = statistics.median(peak)
    for side in SIDES:
        line = f"{size:<12}{f'{B} x {T}':>9}  {side:<22}"
        for task in TASKS:
            mine, eager = seconds.get((task, side)), seconds.get((task, "transformers eager"))
            rate = count[task] / statistics.median(mine) if mine else 0  # 0: it ran out of memory
            ratio = statistics.median(a / b for a, b in zip(eager, mine)) if mine and eager else 0
            line += f"{rate:>10,.0f}{ratio:>6.2f}" + (
                f"{rate * cost[task] / peak:>6.0%}" if task in cost else ""
            )
        value = first[side].get("value", 0)
        print(f"{line}{memory[side]:>8.2f}{first[side]['started']:>10.1f}{value:>9.4f}", flush=True)
    print(f"{'':<12}{'':>9}  matrix product: {peak / 1e12:.2f} TFLOP/s", flush=True)


def attention(device: torch.device, dtype: torch.dtype) -> None:
    """Milliseconds of SDPA, forward and backward, by backend and head dimension, on one layer of a Pythia."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    print(
        "\nSDPA, ms",
        " " * 18,
        "".join(f"{b.name.lower().replace('_attention', ''):>12}" for b in backends),
    )
    B = 8 if device.type == "cuda" else 1
    for size in ("pythia-70m", "pythia-1.4b", "pythia-1b"):
        c = SHAPES[size]
        shape = (B, c.num_attention_heads, 2048, c.head_dim)
        line = f"{size:<12}{' x '.join(map(str, shape)):>15}"
        for backend in backends:
            q, k, v = (
                torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
            )
            seconds = []
            try:
                for _ in range(8):
                    synchronize(device)
                    began = time.perf_counter()
                    with sdpa_kernel(backend):
                        out = torch.nn.functional.scaled_dot_product_attention(
                            q, k, v, is_causal=True
                        )
                    out.backward(out)
                    synchronize(device)
                    seconds.append(time.perf_counter() - began)
                line += f"{1e3 * statistics.median(seconds[3:]):>12.2f}"
            except RuntimeError:
                line += f"{'-':>12}"
        print(line, flush=True)


def data_path() -> None:
    """Opening a data set of 10^7 sequences, and reading a pass over it."""
    T, K = 256, 5
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name in (f"{d}.{split}" for d in "abcde"[:K] for split in ("train", "val", "test")):
            tokens = (10**7 // K if name.endswith("train") else 10) * T + 1
            with open(Path(folder) / f"{name}.bin", "wb") as file:
                file.truncate(2 * tokens)  # zeros that take no room
            files[name] = {"documents": 1, "tokens": tokens, "bytes": tokens, "sha256": ""}
        meta = {
            "format": 1,
            "tokenizer": {"sha256": "", "vocab_size": 4096, "end_of_text": 0},
            "files": files,
        }
        (Path(folder) / "meta.json").write_text(json.dumps(meta))
        began = time.perf_counter()
        data = Data(folder)
        mixture = Mixture(data, dict.fromkeys(data.domains, 10**7 // K), T)
        opened = time.perf_counter() - began
        began = time.perf_counter()
        for _ in micro_batches(mixture, 0, 16, 16):  # hashes and sorts the windows of every domain
            pass
        print(
            f"\ndata of {len(mixture):,} sequences: open {opened:.2f} s, first batch {time.perf_counter() - began:.2f} s"
        )
        for words in ("first read", "read again"):
            began, tokens = time.perf_counter(), 0
            for step in range(1, 1001):
                tokens += sum(16 * T for _ in micro_batches(mixture, step, 16, 16))
            print(
                f"batches of 16 x {T}, {words}: {tokens / (time.perf_counter() - began):,.0f} tokens/s"
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, metavar="SIZE")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="a turn")
    parser.add_argument("--sequences", type=int, help="in a step")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], args.work[1], int(args.work[2]))
    device = start()
    dtype, cuda = autocast_dtype(None, device), device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    print(
        f"torch {torch.__version__}, {where}, {str(dtype).removeprefix('torch.')}, {args.turns} turns of {args.steps}"
    )
    print(
        f"{'':<45}{'train':>10}{'':>12}{'evaluate':>10}{'':>12}{'generate':>10}{'':>6}{'memory':>8}{'1st step':>10}"
    )
    print(
        f"{'model':<12}{'B x T':>9}  {'side':<22}" + f"{'tokens/s':>10}{'ratio':>6}{'peak':>6}" * 2,
        end="",
    )
    print(f"{'tokens/s':>10}{'ratio':>6}{'GB':>8}{'s':>10}{'loss':>9}")
    default = ["pythia-70m", "pythia-160m", "pythia-410m", "pythia-1b"] if cuda else list(ROWS)
    for size in args.models or default:
        rows = args.sequences or ((4 if size == "pythia-1b" else 8) if cuda else ROWS.get(size, 1))
        measure(size, rows, args.turns, args.steps, device, dtype)
    if cuda:
        attention(device, dtype)
    data_path()


if __name__ == "__main__":
    main()
