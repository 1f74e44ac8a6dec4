"""Find the mixture of domains that a model is missing: train on a mixture, measure every domain, move the mixture, repeat.

    python mix.py                                                          # the whole method on a laptop, in minutes
    python mix.py --data data/pile --model pythia-70m --sequences 2000 --rounds 5 --out out/pile
    python mix.py --rule share --rate 1 --out out/share                    # another reading of the rule

Ends with the table that counts: untouched, uniform and reweighted, trained on equally many sequences, on the test split.
"""
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch

from eval import compare, evaluate, finish, mean_loss, rank_and_world, results, signed, table
from model import GPTNeoX, save
from prepare import SAMPLE, ArgumentParser, Data, InputError, cli, load_json, make_sample, write_text
from train import (add_options, claim, load_weights, open_run, parse_mixture, passes_of, rescale, say, this_pass, times_seen, train)

RATES = {"multiplicative": 5.0, "additive": 500.0, "share": 1.0}  # found by trying; README.md has the evidence


def update(quantities: np.ndarray, losses: np.ndarray, rate: float, rule: str = "multiplicative") -> np.ndarray:
    """One step of the seed's `A=A+sm(LA×r`, whose closing bracket is lost, by one of its three readings.

    quantities: (K,) of each domain. losses: (K,) nats per token. rate: r; a share for multiplicative and share, a number of
    sequences for additive. Returns the new (K,) quantities. Raises InputError for an unknown rule.
    """
    A, L, r = np.asarray(quantities, dtype=np.float64), np.asarray(losses, dtype=np.float64), rate
    softmax = np.exp(L - L.max()) / np.exp(L - L.max()).sum()
    if rule == "multiplicative":
        return A + softmax * A * r
    if rule == "additive":
        return A + softmax * r
    if rule == "share":
        return A + softmax * A.sum() * r
    raise InputError(f"--rule {rule}: choose {', '.join(RATES)}")


# ---------------------------------------------------------------- the base

def lopsided(data: Data, sequences: int) -> dict[str, int]:
    """A mixture that leaves something missing: each domain, by name, half as much as the one before it."""
    return rescale({d: 0.5**i for i, d in enumerate(data.domains)}, sequences)


def pretrain(model: GPTNeoX, data: Data, args, hyper: dict) -> Path:
    """Pretrain random weights briefly, in place, on a lopsided mixture; reuses the folder of an earlier time."""
    hyper = hyper | {"lr": args.base_lr, "warmup": 0.1}
    counts = lopsided(data, args.base_sequences)
    record = {"settings": {"model": args.model, **hyper, "dtype": str(hyper["dtype"])}, "passes": [this_pass(data, hyper, counts)]}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(args.out).parent / f"base-{args.model.partition(':')[2]}-{digest}"
    if (folder / "model.safetensors").is_file():
        load_weights(model, folder)
        say(f"base    {folder}, pretrained before")
        return folder
    say(f"base    {folder}: pretraining on {sum(counts.values()):,} sequences, " + ", ".join(f"{d} {n:,}" for d, n in counts.items()))
    if rank_and_world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
    train(model, data, counts, **hyper, save_every=args.save_every, out=folder, title="pretrain")
    if rank_and_world()[0] == 0:
        write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
        save(model, folder, data.folder / "tokenizer.json")
    return folder


# ---------------------------------------------------------------- the search

def search(model: GPTNeoX, data: Data, args, hyper: dict, seen: dict) -> list[dict]:
    """The rounds: every one starts from the same weights and differs in nothing but the mixture. Returns the history."""
    out, T = Path(args.out), hyper["seq_len"]
    path = out / "history.jsonl"
    history = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    weights = {name: w.clone() for name, w in model.state_dict().items()}

    def measure(counts, quantities):
        losses = evaluate(model, data, "val", T, hyper["dtype"], args.eval_sequences)
        history.append({"round": len(history), "counts": counts, "quantities": quantities,
                        "losses": {d: float(v.mean()) for d, v in losses.items()}, "mean": mean_loss(losses)})
        if rank_and_world()[0] == 0:
            write_text(path, "".join(json.dumps(line) + "\n" for line in history))
        report(history[-1], data)

    report(None, data)
    for line in history:
        report(line, data)
    if not history:
        measure(None, None)
    start = parse_mixture(args.start, data, args.sequences, T)
    while len(history) <= args.rounds and not settled(history):
        last = history[-1]
        quantities = {d: float(start.get(d, 0)) for d in data.domains}
        if last["quantities"]:
            moved = update(*(np.array([last[key][d] for d in data.domains]) for key in ("quantities", "losses")), args.rate, args.rule)
            quantities = dict(zip(data.domains, moved.tolist()))
        counts = rescale(quantities, round(sum(quantities.values())) if args.grow else args.sequences)
        model.load_state_dict(weights)
        number = len(history)
        run(model, data, counts, hyper, seen, out / f"round-{number}", f"round {number}", args)
        measure(counts, quantities)
    return history


def run(model, data, counts, hyper, seen, folder, title, args) -> None:
    """One training, kept as a folder."""
    if rank_and_world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
    train(model, data, counts, **hyper, seen=seen, save_every=args.save_every, out=folder, title=title)
    if rank_and_world()[0] == 0:
        save(model, folder, data.folder / "tokenizer.json")


def settled(history: list[dict]) -> bool:
    """Whether the last two rounds brought no better mean validation loss."""
    return len(history) > 3 and best_round(history)["round"] < history[-1]["round"] - 1


def best_round(history: list[dict]) -> dict:
    return min(history[1:], key=lambda line: line["mean"])


def report(line: dict | None, data: Data) -> None:
    """A row of the table of rounds; None prints its head."""
    width = max(12, *(len(d) + 2 for d in data.domains))
    if line is None:
        say("", f"{'round':<11}" + "".join(f"{d:>{width}}" for d in data.domains) + f"{'mean':>10}   share of the mixture, validation loss in nats")
        return
    if line["counts"]:
        total = sum(line["counts"].values())
        say(f"{line['round']:<3} mixture" + "".join(f"{line['counts'].get(d, 0) / total:>{width}.1%}" for d in data.domains))
    name = "loss" if line["counts"] else "untouched"
    say(f"{'' if line['counts'] else name:<3} {name if line['counts'] else '':<7}"[:11].ljust(11)
        + "".join(f"{line['losses'][d]:>{width}.4f}" for d in data.domains) + f"{line['mean']:>10.4f}")


# ---------------------------------------------------------------- the comparison

def main():
    started = time.perf_counter()
    stages = {}

    def stage(name):
        nonlocal started
        stages[name] = stages.get(name, 0) + time.perf_counter() - started
        started = time.perf_counter()

    parser = ArgumentParser(__doc__)
    add_options(parser, "out/mix")
    parser.add_argument("--method", default="reweight", choices=("reweight",))
    parser.add_argument("--rule", default="multiplicative", choices=tuple(RATES))
    parser.add_argument("--rate", type=float, help="r of the rule (default: the rule's)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--start", default="uniform")
    parser.add_argument("--save-every", type=int, default=100, metavar="N")
    parser.add_argument("--base-sequences", type=int, default=8000)
    parser.add_argument("--base-lr", type=float, default=2e-3)
    args = parser.parse_args()
    args.sequences = args.sequences or 800
    args.rate = RATES[args.rule] if args.rate is None else args.rate
    if args.data == SAMPLE and not Path(args.data, "meta.json").is_file():
        make_sample()
        stage("sample")
    data, model, hyper = open_run(args)
    out = Path(args.out)
    T = hyper["seq_len"]
    stage("load")
    base = pretrain(model, data, args, hyper) if args.model.startswith("scratch:") else args.model
    stage("base")
    passes = passes_of(base)
    claim(out, args, data, hyper, {}, passes)
    seen = times_seen(data, T, passes)
    untouched = {name: w.clone() for name, w in model.state_dict().items()}
    history = search(model, data, args, hyper, seen)
    stage("rounds")
    best = best_round(history)
    losses = {}
    model.load_state_dict(untouched)
    losses["untouched"] = evaluate(model, data, "test", T, hyper["dtype"], args.eval_sequences)
    load_weights(model, out / "round-1")
    losses["uniform"] = evaluate(model, data, "test", T, hyper["dtype"], args.eval_sequences)
    load_weights(model, out / f"round-{best['round']}")
    losses["reweighted"] = evaluate(model, data, "test", T, hyper["dtype"], args.eval_sequences)
    say(table(results(losses, data, "test", T)))
    c = compare(losses['uniform'], losses['reweighted'], data, 'test', T)
    say(*[f"{d} {signed(c[d])}" for d in [*data.domains, 'mean']])
    stage("comparison")
    say(", ".join(f"{k} {v:.0f} s" for k, v in stages.items()))
    finish()


if __name__ == "__main__":
    cli(main)
