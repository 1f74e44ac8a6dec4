"""How the defaults of `tiny` were found: learning rates, and the rate of every rule, on the sample's validation split.

    python prepare.py && python tests/bench/settings.py        # about 12 minutes on 2 CPU cores

One thing is varied at a time; the rest is mix.py's default. Losses are means over the domains, in nats per token.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from eval import autocast_dtype, can_compile, evaluate, start  # noqa: E402
from mix import RATES, lopsided, update  # noqa: E402
from model import load  # noqa: E402
from prepare import SAMPLE, Data  # noqa: E402
from train import defaults, rescale, times_seen, train  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=SAMPLE)
    parser.add_argument("--base-sequences", type=int, default=6400)
    parser.add_argument("--sequences", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data, device = Data(args.data), start()
    model = load("scratch:tiny", device, vocab_size=data.vocab_size, seed=args.seed)
    own = defaults(model)
    T = own["seq_len"]
    hyper = {
        "seq_len": T,
        "batch_size": own["batch_size"],
        "seed": args.seed,
        "dtype": autocast_dtype(None, device),
    }
    if can_compile(device)[0]:
        model.compile_parts()

    def state():
        return {name: weight.clone() for name, weight in model.state_dict().items()}

    def losses():
        return np.array(
            [
                values.mean()
                for values in evaluate(model, data, "val", T, hyper["dtype"], 512).values()
            ]
        )

    scratch, base = state(), None
    counts = lopsided(data, args.base_sequences)
    for lr in (own["base_lr"] / 3, own["base_lr"], own["base_lr"] * 3):
        model.load_state_dict(scratch)
        train(model, data, counts, **hyper, lr=lr, warmup=0.1, title=f"base {lr:.0e}")
        print(
            f"base, {args.base_sequences} sequences, learning rate {lr:.1e}: {losses().mean():.4f}",
            flush=True,
        )
        base = state() if lr == own["base_lr"] else base
    seen = times_seen(
        data, T, [{"data": data.identity, "seq_len": T, "seed": args.seed, "counts": counts}]
    )

    def tuned(counts, lr):
        model.load_state_dict(base)
        train(model, data, counts, **hyper, lr=lr, seen=seen)
        return losses()

    uniform = rescale({d: 1 for d in data.domains}, args.sequences)
    known = {}
    for lr in (own["lr"] / 4, own["lr"] / 2, own["lr"], own["lr"] * 2):
        known[lr] = tuned(uniform, lr)
        print(
            f"uniform, {args.sequences} sequences, learning rate {lr:.1e}: {known[lr].mean():.4f}",
            flush=True,
        )
    print(f"mean loss by round, from uniform, {args.sequences} sequences a round")
    for rule, default in RATES.items():
        for rate in (default / 2, default, default * 2):
            A, L, means = (
                np.full(len(data.domains), args.sequences / len(data.domains)),
                known[own["lr"]],
                [],
            )
            for _ in range(args.rounds):
                means.append(L.mean())
                A = update(A, L, rate, rule)
                L = (
                    tuned(rescale(dict(zip(data.domains, A.tolist())), args.sequences), own["lr"])
                    if len(means) < args.rounds
                    else L
                )
            print(f"{rule:<16}rate {rate:<8g}" + "  ".join(f"{m:.4f}" for m in means), flush=True)


if __name__ == "__main__":
    main()
