"""How the defaults of `tiny` were found: learning rates, and every rule's rate, by validation loss.

    python prepare.py && python tests/bench/settings.py        # about 12 minutes on 2 CPU cores

One thing is varied at a time; the rest is mix.py's default. Losses are means over the domains, in
nats per token.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from eval import domain_means, evaluate
from mix import RULES, lopsided, update
from model import autocast_dtype, can_compile, load, start
from prepare import SAMPLE, ArgumentParser, Data, cli
from train import Hyperparameters, defaults, rescale, this_pass, times_seen, train

EVALUATED = 512  # sequences of a domain


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--data", default=SAMPLE)
    parser.add_argument("--base-sequences", type=int, default=6400)
    parser.add_argument("--sequences", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = Data(args.data)
    device = start()
    model = load("scratch:tiny", device, vocab_size=data.vocab_size, seed=args.seed)
    own = defaults("scratch:tiny", model.config)
    hyper = Hyperparameters(
        seq_len=own["seq_len"],
        batch_size=own["batch_size"],
        learning_rate=own["learning_rate"],
        seed=args.seed,
        dtype=autocast_dtype(None, device),
    )
    if can_compile(device)[0]:
        model.compile_parts()

    def state() -> dict:
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    def losses() -> np.ndarray:
        return domain_means(evaluate(model, data, "val", hyper.seq_len, hyper.dtype, EVALUATED))

    scratch = state()
    base_counts = lopsided(data, args.base_sequences)
    base_rate = own["base_learning_rate"]
    for rate in (base_rate / 3, base_rate, base_rate * 3):
        model.load_state_dict(scratch)
        pretraining = replace(hyper, learning_rate=rate, warmup=0.1)
        train(model, data, base_counts, pretraining, title=f"base {rate:.0e}")
        size = f"{args.base_sequences} sequences, learning rate {rate:.1e}"
        print(f"base, {size}: {losses().mean():.4f}", flush=True)
        if rate == base_rate:
            base = state()
    seen = times_seen(data, hyper.seq_len, [this_pass(data, hyper, base_counts)])

    def tuned(shares: np.ndarray, rate: float) -> np.ndarray:
        """The losses (K,) of the base trained on a mixture."""
        weights = dict(zip(data.domains, shares.tolist(), strict=True))
        model.load_state_dict(base)
        tuning = replace(hyper, learning_rate=rate)
        train(model, data, rescale(weights, args.sequences), tuning, seen=seen)
        return losses()

    uniform = np.full(len(data.domains), args.sequences / len(data.domains))
    known = {}
    for factor in (0.25, 0.5, 1, 2):
        rate = factor * hyper.learning_rate
        known[factor] = tuned(uniform, rate)
        size = f"{args.sequences} sequences, learning rate {rate:.1e}"
        print(f"uniform, {size}: {known[factor].mean():.4f}", flush=True)

    print(f"mean loss by round, from uniform, {args.sequences} sequences a round")
    for rule, (_, default) in RULES.items():
        for rate in (default / 2, default, default * 2):
            A = uniform
            L = known[1]
            means = [L.mean()]
            for _ in range(args.rounds - 1):
                A = update(A, L, rate, rule)
                L = tuned(A, hyper.learning_rate)
                means.append(L.mean())
            line = "  ".join(f"{mean:.4f}" for mean in means)
            print(f"{rule:<16}rate {rate:<8g}{line}", flush=True)


if __name__ == "__main__":
    cli(main)
