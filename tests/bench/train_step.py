"""A training step of ours, compiled, beside transformers' GPTNeoXForCausalLM on the same weights and batch.

    python tests/bench/train_step.py                                  # tiny and pythia-14m
    python tests/bench/train_step.py --models pythia-70m pythia-1b    # on a GPU
    python tests/bench/train_step.py --compile-theirs                 # transformers with torch.compile too

The sides take turns, so that a machine that slows down slows all of them; printed are medians over the turns.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPTNeoXForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from eval import autocast, autocast_dtype, start  # noqa: E402
from model import load, save  # noqa: E402
from train import make_optimizer, peak_flops  # noqa: E402

SEQUENCES = {"tiny": 16}  # in a step; the others take 2


def stepper(model, loss_of, tokens, device, dtype):
    """A function that does one whole training step and returns its seconds."""
    optimizer = make_optimizer(model, device)

    def step() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with autocast(device, dtype):
            loss = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def ours(model, tokens):
    return model(tokens[:, :-1], tokens[:, 1:]).mean()


def theirs(model, tokens):
    # labels are shifted inside; the extra token makes both predict the same T targets
    return model(tokens, labels=tokens).loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "pythia-14m"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--sequences", type=int, help="sequences a step")
    parser.add_argument("--dtype")
    parser.add_argument("--compile-theirs", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = start()
    dtype = autocast_dtype(args.dtype, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    turns = f"medians of {args.turns} turns of {args.steps} steps"
    print(f"torch {torch.__version__}, {where}, {str(dtype).removeprefix('torch.')}, {turns}")
    print(f"{'model':<12}{'B x T':>10}  {'side':<22}{'tokens/s':>10}{'ratio':>7}{'loss':>8}{'MFU':>6}")
    for name in args.models:
        mine = load(f"scratch:{name}", device)
        with tempfile.TemporaryDirectory() as folder:
            save(mine, folder)
            other = {"transformers eager": GPTNeoXForCausalLM.from_pretrained(folder).to(device)}
            if args.compile_theirs:
                other["transformers compiled"] = GPTNeoXForCausalLM.from_pretrained(folder).to(device)
                other["transformers compiled"].compile(dynamic=False)
        mine.compile(dynamic=False)
        T, B = mine.config.max_position_embeddings, args.sequences or SEQUENCES.get(name, 2)
        torch.manual_seed(0)
        tokens = torch.randint(mine.config.vocab_size, (B, T + 1), device=device)
        with torch.no_grad(), autocast(device, dtype):
            losses = {
                "reweight compiled": ours(mine, tokens).item(),
                **{side: theirs(m, tokens).item() for side, m in other.items()},
            }
        steps = {
            "reweight compiled": stepper(mine, ours, tokens, device, dtype),
            **{side: stepper(m, theirs, tokens, device, dtype) for side, m in other.items()},
        }
        for step in steps.values():  # compile, warm up
            step(), step()
        seconds = {side: [] for side in steps}
        for _ in range(args.turns):
            for side, step in steps.items():
                seconds[side].append(statistics.mean(step() for _ in range(args.steps)))
        rate = {side: B * T / statistics.median(s) for side, s in seconds.items()}
        peak = peak_flops(device, dtype)
        for side in rate:
            ratio = statistics.median(a / b for a, b in zip(seconds["transformers eager"], seconds[side]))
            mfu = f"{rate[side] * mine.flops_per_token(T) / peak:.0%}" if peak else "-"
            row = f"{name:<12}{f'{B} x {T}':>10}  {side:<22}{rate[side]:>10,.0f}{ratio:>7.2f}"
            print(f"{row}{losses[side]:>8.4f}{mfu:>6}", flush=True)


if __name__ == "__main__":
    main()
