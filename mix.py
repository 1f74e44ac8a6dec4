"""Find the mixture of domains that a model is missing: train on a mixture, measure every domain, move it, repeat.

    python mix.py                                                    # the whole method on a laptop, in minutes
    python mix.py --data data/pile --model pythia-70m --sequences 2000 --out out/pile
    python mix.py --rule share --out out/share                       # another reading of the rule

Ends with the table that counts: untouched, uniform and reweighted, on the test split, trained on as many sequences.
"""
import contextlib
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch

from eval import (barrier, compare, evaluate, fill, finish, mean_loss, model_card, rank_and_world, results, say,
                  signed, start, stoppable, table)
from model import GPTNeoX, load_json, replacing, write_text
from prepare import SAMPLE, ArgumentParser, Data, InputError, cli, hold, prepare
from train import (RESUME_HINT, Mixture, add_options, claim, defaults, keep, open_run, parse_mixture, passes_of,
                   rescale, sha256, this_pass, times_seen, train)

RATES = {"multiplicative": 1.0, "additive": 400.0, "share": 0.25}  # found by trying; README.md has the evidence


def update(quantities: np.ndarray, losses: np.ndarray, rate: float, rule: str = "multiplicative") -> np.ndarray:
    """One step of the seed's `A=A+sm(LA×r`, which lost at least a bracket, by one of its three readings.

    quantities: (K,). losses: (K,), nats per token. rate: r; for `additive` a number of sequences, else a share.
    Returns the new (K,) quantities. Raises InputError for an unknown rule.
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


def lopsided(data: Data, sequences: int) -> dict[str, int]:
    """A mixture that leaves something missing: by the size of each domain, halved for every domain that is larger."""
    sizes = {d: data.size(d, "train")["tokens"] for d in data.domains}
    ranked = sorted(sizes, key=lambda d: (-sizes[d], d))
    return rescale({d: sizes[d] / 2**i for i, d in enumerate(ranked)}, sequences)


def pretrain(model: GPTNeoX, data: Data, hyper: dict, args) -> Path:
    """Pretrain random weights briefly, in place, on a lopsided mixture; one of the same data and settings is reused."""
    hyper = hyper | {"lr": args.base_lr or defaults(model)["base_lr"], "warmup": 0.1}
    counts = lopsided(data, args.base_sequences)
    settings = {key: str(value) for key, value in hyper.items() if key != "micro_batch_size"}
    record = {"settings": {"model": args.model, **settings}, "passes": [this_pass(data, hyper, counts)]}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(args.out).parent / f"base-{args.model.partition(':')[2]}-{digest}"
    say(f"base    {folder}, lr {hyper['lr']:g}, sequences: " + ", ".join(f"{d} {n:,}" for d, n in counts.items()))
    with contextlib.ExitStack() as stack:
        if rank_and_world()[0] == 0 and not (folder / "model.safetensors").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(folder / ".lock", folder))  # which other runs may want, too
        trained(model, data, counts, hyper, folder, "pretrain", args, record=record)
    return folder


def trained(model: GPTNeoX, data: Data, counts: dict[str, int], hyper: dict, folder: Path, title: str, args,
            seen: dict | None = None, record: dict | None = None) -> None:
    """Train the model, in place, and keep it as a folder; where that was done before, load it from there instead, if
    its sha256 is still the same."""
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    if rank_and_world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if weights.is_file() and manifest.is_file() and load_json(manifest).get(weights.name) != sha256(weights):
            say(f"{weights} is damaged, and made anew")
            weights.unlink(), manifest.unlink()
    barrier()
    if weights.is_file():
        fill(model, folder)
    else:
        train(model, data, counts, **hyper, seen=seen, save_every=args.save_every, out=folder, title=title)
        if rank_and_world()[0] == 0 and record:
            write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    keep(model, data, folder)
    if rank_and_world()[0] == 0 and not manifest.is_file():
        write_text(manifest, json.dumps({weights.name: sha256(weights)}, indent=1) + "\n")


def search(model: GPTNeoX, base: str, data: Data, first: dict[str, int], hyper: dict, seen: dict, args) -> list[dict]:
    """The rounds. Each starts from the weights of base, on as many sequences; they differ in nothing but the mixture.

    Returns a dict a round, round 0 being the untouched model. Rounds that history.jsonl holds already are not redone.
    """
    out, T, domains = Path(args.out), hyper["seq_len"], data.domains
    path = out / "history.jsonl"
    try:
        history = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if any(set(line) != {"round", "quantities", "counts", "mean", "losses"} for line in history):
            raise ValueError
    except (ValueError, TypeError):
        raise InputError(f"{path}: damaged; remove it, and the rounds are measured anew") from None
    A = np.array([first.get(d, 0) for d in domains], dtype=np.float64)
    say("", "share of the mixture and validation loss, nats per token",
        f"{'round':>5}{'mean':>9}" + "".join(f"{d[:16]:>18}" for d in domains))
    for number in range(args.rounds + 1):
        if number > 2 and number - 1 - best_round(history[:number])["round"] >= 2:
            say("stopped: the mean validation loss has not improved for two rounds")
            break
        if number == len(history):
            counts = None
            if number > 0:
                counts = rescale(dict(zip(domains, A.tolist())), round(A.sum()) if args.grow else args.sequences)
                trained(model, data, counts, hyper, out / f"round-{number}", f"round {number}", args, seen)
            losses = evaluate(model, data, "val", T, hyper["dtype"], args.eval_sequences)
            history.append({"round": number, "quantities": A.tolist(), "counts": counts, "mean": mean_loss(losses),
                            "losses": {d: float(values.mean()) for d, values in losses.items()}})
            if number > 0:
                fill(model, base)
            if rank_and_world()[0] == 0:
                write_text(path, "".join(json.dumps(line) + "\n" for line in history))
        if rank_and_world()[0] == 0:
            for line in history[2:]:  # of weights, the first round's and the best one's are needed again
                if line["round"] != best_round(history)["round"]:
                    (out / f"round-{line['round']}" / "model.safetensors").unlink(missing_ok=True)
        line = history[number]
        shares = {d: f"{n / sum(line['counts'].values()):.1%}" for d, n in (line["counts"] or {}).items()}
        cells = [f"{shares.get(d, ''):>10}{line['losses'][d]:>8.4f}" for d in domains]
        repeats = Mixture(data, line["counts"], T).repeats() if line["counts"] else {}
        repeated = [f"  {d} {times:.1f} times" for d, times in repeats.items() if times > 1]
        say(f"{number:>5}{line['mean']:>9.4f}" + "".join(cells + repeated))
        if number > 0:
            A = update(line["quantities"], [line["losses"][d] for d in domains], args.rate, args.rule)
    return history


def best_round(history: list[dict]) -> dict:
    """The round with the lowest mean validation loss; the earlier one of equals."""
    return min(history[1:], key=lambda line: line["mean"])


def comparison(model: GPTNeoX, base: str, data: Data, history: list[dict], hyper: dict, seen: dict, args) -> dict:
    """Untouched, uniform with as many sequences, and the best round on the test split; the model ends as the last."""
    out, T, best = Path(args.out), hyper["seq_len"], best_round(history)
    losses = {"untouched": evaluate(model, data, "test", T, hyper["dtype"])}
    uniform = parse_mixture("uniform", data, sum(best["counts"].values()), T)
    folder = out / ("round-1" if history[1]["counts"] == uniform else "uniform")
    trained(model, data, uniform, hyper, folder, "uniform", args, seen)
    losses["uniform"] = evaluate(model, data, "test", T, hyper["dtype"])
    fill(model, base)
    trained(model, data, best["counts"], hyper, out / f"round-{best['round']}", "best round", args, seen)
    losses["reweighted"] = evaluate(model, data, "test", T, hyper["dtype"])
    result = results(losses, data, "test", T)
    return result | {"reweighted - uniform": compare(losses["uniform"], losses["reweighted"], data, "test", T)}


def verdict(result: dict) -> str:
    """What the table says of reweighted and uniform, in words."""
    difference = result["reweighted - uniform"]
    low, high = difference["mean"]["interval"]
    words = "better than" if high < 0 else "worse than" if low > 0 else "not distinguishable from"
    if low == high == 0:
        return "reweighted is uniform: no later round had a lower mean validation loss"
    return (f"reweighted - uniform: {signed(difference['mean'])} nats, better in {difference['improved']} of "
            f"{len(result['domains'])} domains: {words} uniform, by this seed")


def picture(history: list[dict], domains: list[str], path: Path) -> None:
    """Two panels by round: the mixture, and how far each domain's validation loss is from the untouched model's."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    numbers = [line["round"] for line in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for k, d in enumerate(domains):
        style = {"color": f"C{k % 10}", "marker": "os^Dv"[k // 10 % 5], "label": d}
        shares = [100 * line["counts"].get(d, 0) / sum(line["counts"].values()) for line in history[1:]]
        left.plot(numbers[1:], shares, **style)
        right.plot(numbers, [line["losses"][d] - history[0]["losses"][d] for line in history], **style)
    right.plot(numbers, [line["mean"] - history[0]["mean"] for line in history], "k--", linewidth=2, label="mean")
    right.axhline(0, color="0.7", linewidth=1, zorder=0)
    left.set(title="The mixture", xlabel="round", ylabel="share of the sequences (%)", xticks=numbers[1:])
    left.set_ylim(bottom=0)
    right.set(title="Validation loss", xlabel="round (0: untouched)", ylabel="change in nats per token", xticks=numbers)
    for axes in (left, right):
        axes.axvline(best_round(history)["round"], color="0.88", linewidth=10, zorder=0, label="best round")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)), frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def write_results(data: Data, history: list[dict], result: dict, hyper: dict, passes: list[dict], args) -> None:
    """The mixture, the table's numbers, the picture and the model's card."""
    out, best = Path(args.out), best_round(history)
    settings = {name: vars(args)[name] for name in ("method", "rule", "rate", "seed", "data", "model")}
    mixture = {"counts": best["counts"], "unit": "sequences", "seq_len": hyper["seq_len"], "round": best["round"]}
    write_text(out / "mix.json", json.dumps(mixture | settings, indent=1) + "\n")
    write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    picture(history, data.domains, out / "mix.png")
    record = load_json(out / "run.json") | {"passes": passes + [this_pass(data, hyper, best["counts"])]}
    write_text(out / "run.json", json.dumps(record, indent=1) + "\n")
    card = model_card(out.name, args.model, data, best["counts"], hyper, result, passes)
    write_text(out / "README.md", card)


def main():
    parser = ArgumentParser(__doc__)
    add_options(parser, "out/mix")
    add = parser.add_argument
    add("--method", default="reweight", choices=("reweight",), help="(default: %(default)s)")
    add("--rule", default="multiplicative", choices=tuple(RATES), help="reading of the formula (default: %(default)s)")
    add("--rate", type=float, metavar="R", help=f"r (default: {', '.join(f'{k} {r:g}' for k, r in RATES.items())})")
    add("--rounds", type=int, default=4, metavar="N", help="at most (default: %(default)s)")
    add("--grow", action="store_true", help="train on the growing quantities, not on --sequences in their proportions")
    add("--start", default="uniform", help="the first mixture, like train.py's --mix (default: %(default)s)")
    add("--base-sequences", type=int, default=6400, metavar="N", help="to pretrain scratch on (default: %(default)s)")
    add("--base-lr", type=float, help="peak learning rate of that (default: the model's)")
    parser.set_defaults(sequences=1600)
    args = parser.parse_args()
    args.rate = RATES[args.rule] if args.rate is None else args.rate
    for name in ("rounds", "rate", "base_sequences", "base_lr"):
        if vars(args)[name] is not None and not 0 < vars(args)[name] < 1e9:
            raise InputError(f"--{name.replace('_', '-')} {vars(args)[name]}: expected more than 0")
    out, stages = Path(args.out), {}

    @contextlib.contextmanager
    def stage(name: str):
        began = time.perf_counter()
        yield
        stages[name] = time.perf_counter() - began

    start(args.device)
    with stage("sample"):
        if args.data == SAMPLE and not Path(args.data).exists() and rank_and_world()[0] == 0:
            prepare(args.data)
        barrier()
    data, model, hyper = open_run(args)
    first = parse_mixture(args.start, data, args.sequences, hyper["seq_len"])
    own = ("method", "rule", "rate", "rounds", "grow", "sequences", "eval_sequences", "base_sequences", "base_lr")
    more = {"start": first, **{name: vars(args)[name] for name in own}}
    with claim(out, args, data, hyper, more, []), stoppable():
        with stage("base"):
            base = pretrain(model, data, hyper, args) if args.model.startswith("scratch:") else Path(args.model)
        passes = passes_of(base)
        if not (out / "model.safetensors").is_file():
            seen = times_seen(data, hyper["seq_len"], passes)
            with stage("rounds"):
                history = search(model, str(base), data, first, hyper, seen, args)
            with stage("comparison"):
                result = comparison(model, str(base), data, history, hyper, seen, args)
            if rank_and_world()[0] == 0:
                write_results(data, history, result, hyper, passes, args)
        keep(model, data, out, getattr(torch, args.save_dtype))  # last: it makes the run a finished one
    if rank_and_world()[0] == 0:
        result = load_json(out / "result.json")
        say("", f"test split, {result['seq_len']} tokens a sequence", table(result), verdict(result), "",
            f"{out} holds the mixture (mix.json), the picture (mix.png) and the model",
            "wall time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages.items())
            + f", all {sum(stages.values()):.0f} s")
    finish()


if __name__ == "__main__":
    cli(main, RESUME_HINT)
