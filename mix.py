"""Find the mixture of domains that a model is missing: train on a mixture, measure every domain, move it, repeat.

    python mix.py                                                    # the whole method on a laptop, in minutes
    python mix.py --data data/pile --model pythia-70m --sequences 2000 --out out/pile
    python mix.py --method merge --out out/merge                     # another method; README.md says which to take

A method is a function of a Search, which trains and measures mixtures; it returns the mixture that it found. All end
with the table that counts: untouched, uniform and the mixture found, on the test split, on as many sequences.
"""
import contextlib
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector

from eval import (FEW_DOCUMENTS, autocast, barrier, compare, enough_memory, evaluate, fill, finish, model_card,
                  rank_and_world, results, rows_in_training, say, signed, start, stoppable, table, window_count,
                  windows_of)
from model import GPTNeoX, load_json, replacing, write_text
from prepare import SAMPLE, ArgumentParser, Data, InputError, cli, hold, prepare
from train import (RESUME_HINT, Mixture, add_options, claim, defaults, keep, open_run, parse_mixture, passes_of,
                   rescale, sha256, this_pass, times_seen, train)

RATES = {"multiplicative": 1.0, "additive": 400.0, "share": 0.25}  # found by trying; README.md has the evidence
CHOICES = ("method", "objective", "signal", "rule", "rate")


def update(quantities: np.ndarray, losses: np.ndarray, rate: float, rule: str = "multiplicative") -> np.ndarray:
    """One step of the seed's `A=A+sm(LA×r`, which lost at least a bracket, by one of its three readings.

    quantities: (K,). losses: (K,), nats per token. rate: r; for `additive` a number of sequences, else a share.
    Returns the new (K,) quantities. Raises InputError for an unknown rule.
    """
    A, L, r = np.asarray(quantities, dtype=np.float64), np.asarray(losses, dtype=np.float64), rate
    softmax = np.exp(L - L.max()) / np.exp(L - L.max()).sum()
    steps = {"multiplicative": softmax * A * r, "additive": softmax * r, "share": softmax * A.sum() * r}
    if rule not in steps:
        raise InputError(f"--rule {rule}: choose {', '.join(steps)}")
    return A + steps[rule]


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
        if rank_and_world()[0] == 0 and not (folder / "model.safetensors").is_file():  # other runs may want it, too
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(folder / ".lock", folder))
        trained(model, data, counts, hyper, folder, "pretrain", args, record=record)
    return folder


def trained(model: GPTNeoX, data: Data, counts: dict[str, int], hyper: dict, folder: Path, title: str, args,
            seen: dict | None = None, record: dict | None = None) -> None:
    """Train the model, in place, and keep it as a folder; if that was done before, load it, if its sha256 is right."""
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


class Search:
    """What a method works with: a base to train from, the validation split to measure on, a record of what was tried.

    baseline: the base's loss on every window that is measured, {domain: (n,)}. untouched: their means (K,), by
    data.domains. first: --start. cap: shares (K,) of 4 repeats (2305.16264). tokens: what the search cost.
    """

    def __init__(self, model: GPTNeoX, base: Path | str, data: Data, hyper: dict, passes: list[dict], args):
        self.model, self.base, self.data, self.hyper, self.passes, self.args = model, base, data, hyper, passes, args
        self.out, self.history, self.names, self.tokens = Path(args.out), [], {}, {"trained": 0, "evaluated": 0}
        T, self.windows = hyper["seq_len"], {d: window_count(data, d, "train", hyper["seq_len"]) for d in data.domains}
        self.seen, self.first = times_seen(data, T, passes), parse_mixture(args.start, data, args.sequences, T)
        self.cap, self.baseline = 4 * np.array([*self.windows.values()]) / args.sequences, self.evaluate()
        for d, n in results({"untouched": self.baseline}, data, "val", T)["domains"].items():
            if n["documents"] < FEW_DOCUMENTS:
                say(f"warning: only {n['documents']} documents of {d} are measured; prepare more, or --eval-sequences")
        say("", "share of the mixture and validation loss, nats per token",
            f"{'round':>5}{args.objective:>9}" + "".join(f"{d[:16]:>18}" for d in data.domains))
        self.untouched = np.array([values.mean() for values in self.baseline.values()])
        self.record(None, self.untouched)

    def counts(self, shares) -> dict[str, int]:
        """Shares (K,), in any unit, as a mixture of --sequences."""
        return rescale(dict(zip(self.data.domains, map(float, shares))), self.args.sequences)

    def shares(self, counts: dict[str, int]) -> np.ndarray:
        return np.array([counts.get(d, 0) for d in self.data.domains]) / sum(counts.values())

    def folder(self, counts: dict[str, int], name: str) -> Path:
        """Where the run on a mixture is kept: under the name that it was first asked for with."""
        return self.out / self.names.setdefault(str(sorted((d, n) for d, n in counts.items() if n)), name)

    def train(self, counts: dict[str, int], name: str) -> None:
        """Make the model the base trained on the mixture, which is loaded if that was done before."""
        fill(self.model, self.base)
        trained(self.model, self.data, counts, self.hyper, self.folder(counts, name), name, self.args, self.seen)
        self.tokens["trained"] += sum(counts.values()) * self.hyper["seq_len"]

    def evaluate(self) -> dict[str, np.ndarray]:
        """The model's loss on the validation split, on --eval-sequences windows of a domain at most: {domain: (n,)}."""
        hyper, limit = self.hyper, self.args.eval_sequences
        losses = evaluate(self.model, self.data, "val", hyper["seq_len"], hyper["dtype"], limit)
        self.tokens["evaluated"] += sum(map(len, losses.values())) * hyper["seq_len"]
        return losses

    def measure(self, counts: dict[str, int], name: str, keep: bool = True) -> np.ndarray:
        """Train on the mixture, keep its weights or not, and return its losses (K,), read if that was done before."""
        path, T = self.folder(counts, name) / "val.json", self.hyper["seq_len"]
        if path.is_file():
            losses = load_json(path)
            if sorted(losses) != self.data.domains or not all(type(loss) is float for loss in losses.values()):
                raise InputError(f"{path}: damaged; remove it, and it is measured anew")
            self.tokens["trained"] += sum(counts.values()) * T
            self.tokens["evaluated"] += sum(map(len, self.baseline.values())) * T
        else:
            self.train(counts, name)
            losses = {d: float(values.mean()) for d, values in self.evaluate().items()}
            if rank_and_world()[0] == 0:
                write_text(path, json.dumps(losses, indent=1) + "\n")
            barrier()
        if not keep:
            self.forget(counts)
        return np.array([losses[d] for d in self.data.domains])

    def forget(self, counts: dict[str, int]) -> None:
        """Remove a mixture's weights; its losses stay."""
        for file in ("model.safetensors", "manifest.json") if rank_and_world()[0] == 0 else ():
            (self.folder(counts, "") / file).unlink(missing_ok=True)

    def record(self, counts: dict[str, int] | None, losses: np.ndarray | None = None, **more) -> None:
        """Note a mixture, and its validation losses (K,) if they were measured, in history.jsonl, and print them."""
        domains, known = self.data.domains, losses is not None
        line = {"round": len(self.history), "counts": counts, "mean": float(losses.mean()) if known else None,
                "worst": float((losses - self.untouched).max()) if known else None,
                "losses": dict(zip(domains, losses.tolist())) if known else None, **more}
        self.history.append(line)
        if rank_and_world()[0] == 0:
            write_text(self.out / "history.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        shares = [f"{share:.1%}" for share in self.shares(counts)] if counts else [""] * len(domains)
        values = [f"{loss:.4f}" for loss in losses] if known else [""] * len(domains)
        cells = [f"{share:>10}{value:>8}" for share, value in zip(shares, values)]
        cells += [f"  {d} {n / self.windows[d]:.1f} times" for d, n in (counts or {}).items() if n > self.windows[d]]
        objective = f"{line[self.args.objective]:>9.4f}" if known else " " * 9
        say(f"{line['round']:>5}{objective}{''.join(cells)}".rstrip())

    def best(self) -> dict:
        """The recorded mixture with the lowest objective; the earlier one of equals."""
        return min((line for line in self.history[1:] if line["losses"]), key=lambda line: line[self.args.objective])


def fixed(search: Search) -> dict[str, int]:
    """`uniform`, p = 1/K, and `natural`, p ∝ the tokens that there are: no search."""
    return parse_mixture(search.args.method, search.data, search.args.sequences, search.hyper["seq_len"])


def reweight(search: Search) -> dict[str, int]:
    """The seed's rounds: train on A, measure L, A ← update(A, L); the best round's mixture is the result.
    With --signal excess the rule sees (L - L_ref) / τ, what can still be learnt (2305.10429, section 2): L_ref is the
    loss that the whole budget buys where the domain gets it alone, τ the standard deviation of the excesses."""
    args, domains = search.args, search.data.domains
    A = np.array([search.first.get(d, 0) for d in domains], dtype=np.float64)
    if args.signal == "excess":
        alone = np.array([search.measure({d: args.sequences}, f"only-{d}", False)[k] for k, d in enumerate(domains)])
    for number in range(1, args.rounds + 1):
        if number > 2 and number - 1 - search.best()["round"] >= 2:
            say(f"stopped: the {args.objective} has not improved for two rounds")
            break
        counts = rescale(dict(zip(domains, A.tolist())), round(A.sum()) if args.grow else args.sequences)
        L, more = search.measure(counts, f"round-{number}"), {}
        if args.signal == "excess":
            more = {"excess": (L - alone).tolist(), "temperature": float((L - alone).std())}
        search.record(counts, L, quantities=A.tolist(), **more)
        for line in search.history[2:]:  # of weights, the first round's and the best one's are needed again
            if line["round"] != search.best()["round"]:
                search.forget(line["counts"])
        A = update(A, (L - alone) / max(more["temperature"], 1e-9) if more else L, args.rate, args.rule)
    return search.best()["counts"]


def doremi(search: Search, rate: float = 1.0, smoothing: float = 1e-3) -> dict[str, int]:
    """DoReMi (2305.10429, algorithm 1): the reference is the base tuned on uniform, the proxy the base tuned on other
    windows of it, where a domain has as many, with the loss of domain d weighted by α_d. Every step, λ_d = the mean of
    max(ℓ_proxy - ℓ_ref, 0) over the domain's tokens, α ← softmax(log α + η λ), α ← (1 - c) α + c / K, for the next
    step; the mixture is the mean α. rate: η. smoothing: c. Both are the paper's."""
    data, hyper, domains = search.data, search.hyper, search.data.domains
    K, uniform = len(domains), search.counts([1] * len(domains))
    seen = times_seen(data, hyper["seq_len"], search.passes + [this_pass(data, hyper, uniform)])
    mixture = Mixture(data, uniform, hyper["seq_len"], hyper["seed"], seen)
    domain = np.array([domains.index(mixture.row(i)[0]) for i in range(len(mixture))])
    reference, sampled = torch.zeros(len(mixture), hyper["seq_len"]), search.shares(uniform)
    alpha, scores, sums, path = np.full(K, 1 / K), np.zeros(K), np.zeros((2, K)), []

    def note(step, rows, losses, weights):
        reference[rows] = losses.float().cpu()
        return weights

    def move():
        total = torch.from_numpy(sums)
        if dist.is_initialized():
            dist.all_reduce(total := total.to(next(search.model.parameters()).device))
        excess, tokens = total.cpu().numpy()
        scores[tokens > 0] = excess[tokens > 0] / tokens[tokens > 0]  # a domain that the batch lacks keeps its last one
        raised = alpha * np.exp(rate * (scores - scores.max()))
        alpha[:] = (1 - smoothing) * raised / raised.sum() + smoothing / K
        path.append(alpha.copy())
        sums[:] = 0

    def weigh(step, rows, losses, weights):
        if step > len(path):
            move()
        excess = (losses.float().cpu() - reference[rows]).nan_to_num(0, 0).clamp(min=0).sum(1)
        for k, value, counted in zip(domain[rows], excess.tolist(), weights[:, 0].tolist()):
            sums[:, k] += counted * value, counted * losses.shape[1]
        return weights * torch.from_numpy((alpha / sampled)[domain[rows], None]).to(weights)

    search.train(uniform, "uniform")
    train(search.model, data, uniform, **hyper | {"lr": 0.0}, seen=seen, title="reference", weigh=note)  # only looks
    fill(search.model, search.base)
    train(search.model, data, uniform, **hyper, seen=seen, title="proxy", weigh=weigh)
    move()
    search.tokens["trained"] += 2 * len(mixture) * hyper["seq_len"]
    means = np.cumsum(path, axis=0) / np.arange(1, len(path) + 1)[:, None]
    for i in np.unique(np.linspace(0, len(path) - 1, 10).astype(int)):
        search.record(search.counts(means[i]), step=int(i) + 1)
    return search.counts(means[-1])


def emphasis(changes: np.ndarray, objective: str) -> np.ndarray:
    """∂ objective / ∂ losses, (K,): of their mean, or of the largest change, which is smoothed over 0.01 nats."""
    if objective == "mean":
        return np.full(len(changes), 1 / len(changes))
    return torch.softmax(torch.from_numpy(changes / 0.01), 0).numpy()


def descend(slopes, start: np.ndarray, low, high, steps: int, pull: float = 0.0) -> list[np.ndarray]:
    """Minimise F(w) + pull · KL(w ‖ start) over shares, low <= w <= high, by exponentiated gradient (Kivinen & Warmuth
    1997, section 3): w ← w ⊙ exp(-η (∇F + pull · log(w / start))), normalised, η = 1 / √step. Returns the path of w.
    slopes(w, step): ∇F. All are (K,)."""
    path = [start]
    for step in range(steps):
        slope = slopes(path[-1], step) + pull * np.log(path[-1] / start)
        w = path[-1] * np.exp(np.clip((slope.mean() - slope) / np.sqrt(step + 1), -1, 1))
        for _ in range(50):  # until both hold
            w = np.clip(w / w.sum(), low, high)
        path.append(w / w.sum())
    return path


def stand_in(search: Search):
    """Merged experts in place of trained mixtures: θ(w) = θ_0 + s Σ_k w_k τ_k. τ_k is how far a short run on domain k
    alone, 1/K of a pass, goes from the base θ_0, and s brings θ(start) as near as can be to a run on the start.
    Returns that run's losses (K,), a function that makes the model θ(w), and s τ (K, parameters)."""
    model, start = search.model, search.shares(search.first)
    fill(model, search.base)
    base = parameters_to_vector(model.parameters()).detach()

    def way(counts: dict[str, int], name: str) -> torch.Tensor:
        search.train(counts, name)
        return parameters_to_vector(model.parameters()).detach() - base

    def place(w: np.ndarray) -> None:
        theta = base + torch.from_numpy(w).to(base) @ experts
        for p, part in zip(model.parameters(), theta.split([p.numel() for p in model.parameters()])):
            p.detach().copy_(part.view_as(p))

    target = way(search.first, "round-1")
    losses = np.array([values.mean() for values in search.evaluate().values()])
    one = max(1, search.args.sequences // len(start))
    experts = torch.stack([way({d: one}, f"only-{d}") for d in search.data.domains])
    merged = torch.from_numpy(start).to(base) @ experts
    s = (target @ merged / (merged @ merged)).item()
    experts *= s
    search.record(search.first, losses, scale=s)
    return losses, place, experts


def gradient(search: Search, weights: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Leave the gradient of Σ_d weights_d L_d in the model's parameters and return how far each L_d (K,) is from the
    untouched model's; L_d is the domain's loss on every parts-th measured window, from `part` on."""
    data, model, T, changes = search.data, search.model, search.hyper["seq_len"], []
    device, dtype = next(model.parameters()).device, search.hyper["dtype"]
    B = min(search.hyper["batch_size"], rows_in_training(model, T, dtype, device))  # always B rows, for the compiler
    model.zero_grad()
    for weight, (d, untouched) in zip(weights, search.baseline.items()):
        taken, loss = slice(part % len(untouched), None, parts), 0.0
        windows = windows_of(data, d, "val", T, len(untouched))[taken]
        for i in range(0, len(windows), B):
            rows = [data.tokens(d, "val")[c * T:(c + 1) * T + 1] for c in windows[i:i + B]]
            batch = torch.from_numpy(np.stack(rows + rows[:1] * (B - len(rows))).astype(np.int64)).to(device)
            with autocast(device, dtype), enough_memory(f"{B} sequences of {T}", "try --activation-checkpointing"):
                mean = model(batch[:, :-1], batch[:, 1:])[:len(rows)].sum() / (len(windows) * T)
                (mean * weight).backward()
            loss += mean.item()
        changes.append(loss - untouched[taken].mean())
        search.tokens["trained"] += len(windows) * T  # which have a backward pass, too
    return np.array(changes)


def merge(search: Search, steps: int = 12, pull: float = 0.05) -> dict[str, int]:
    """OP-Mix (2605.15220) by gradient: ∂L/∂w_k = ⟨∇L(θ(w)), s τ_k⟩ is exact for the stand-in, on the validation split,
    of which every step takes another part; with Olmix's pull to the start and its cap on repeats (2602.12237)."""
    losses, place, experts = stand_in(search)
    changes = losses - search.untouched

    def slopes(w: np.ndarray, step: int) -> np.ndarray:
        nonlocal changes
        place(w)
        changes = gradient(search, emphasis(changes, search.args.objective), step, steps)
        found = experts @ parameters_to_vector(p.grad for p in search.model.parameters())
        if dist.is_initialized():
            dist.broadcast(found, 0)  # for all ranks to take the same path
        return found.double().cpu().numpy()

    path = descend(slopes, search.shares(search.first), 1e-4, search.cap, steps, pull)
    for w in path[1:]:
        search.record(search.counts(w))
    search.model.zero_grad()
    return search.counts(path[-1])


def returns(search: Search, rounds: int = 2) -> dict[str, int]:
    """Diminishing returns: L_i(p) = a_i - Σ_k B_ki ln p_k, by least squares through trained runs. Its mean is least
    where p_k ∝ Σ_i B_ki: a domain's share is what it gives, like the exponents of Cobb & Douglas (1928). The runs are
    the start p and, for each domain k, (3 p + e_k) / 4; then K more around the minimum. No share is below start / 4."""
    start, domains, args, logs, losses = search.shares(search.first), search.data.domains, search.args, [], []
    p, runs = start, {"round-1": search.first}
    for number in range(1, rounds + 1):
        runs |= {f"more-{d}-{number}": search.counts(3 * p + only) for d, only in zip(domains, np.eye(len(p)))}
        for name, counts in list(runs.items())[len(losses):]:
            losses.append(search.measure(counts, name, keep=name == "round-1"))
            logs.append([1, *np.log(search.shares(counts).clip(0.5 / args.sequences))])
            search.record(counts, losses[-1])
        a, *B = np.linalg.lstsq(np.array(logs), np.array(losses), rcond=None)[0]
        B = -np.array(B)

        def slopes(p: np.ndarray, step: int) -> np.ndarray:
            return -B @ emphasis(a - np.log(p) @ B - search.untouched, args.objective) / p

        p = descend(slopes, start, start / 4, search.cap, 1000)[-1]
        search.record(search.counts(p), predicted=(a - np.log(p) @ B).tolist(), a=a.tolist(), B=B.tolist())
    return search.counts(p)


METHODS = {"uniform": fixed, "natural": fixed} | {f.__name__: f for f in (reweight, doremi, merge, returns)}


def comparison(search: Search, counts: dict[str, int]) -> dict:
    """Untouched, uniform with as many sequences, and the mixture found, on the test split; ends with the last model."""
    data, T, losses = search.data, search.hyper["seq_len"], {}
    name = "reweighted" if search.args.method == "reweight" else search.args.method
    mixtures = {"untouched": None, "uniform": parse_mixture("uniform", data, sum(counts.values()), T), name: counts}
    for title, mixture in mixtures.items():
        search.train(mixture, title) if mixture else fill(search.model, search.base)
        losses[title] = evaluate(search.model, data, "test", T, search.hyper["dtype"])
    return results(losses, data, "test", T) | {"difference": compare(losses["uniform"], losses[name], data, "test", T)}


def verdict(result: dict) -> str:
    """What the table says of the mixture found and of uniform, in words."""
    difference, name = result["difference"], list(result["models"])[-1]
    low, high = difference["mean"]["interval"]
    if low == high == 0:
        return f"{name} is uniform" + ": no other mixture was better" * (name != "uniform")
    words = "better than" if high < 0 else "worse than" if low > 0 else "not distinguishable from"
    return (f"{name} - uniform: {signed(difference['mean'])} nats, better in {difference['improved']} of "
            f"{len(result['domains'])} domains: {words} uniform, by this seed")


def picture(search: Search, found: int, path: Path) -> None:
    """Two panels by round: the mixture, and how far each domain's validation loss is from the untouched model's."""
    from matplotlib.figure import Figure
    mixtures, measured = search.history[1:], [line for line in search.history if line["losses"]]
    shares = np.array([search.shares(line["counts"]) for line in mixtures])
    changes = np.array([list(line["losses"].values()) for line in measured]) - search.untouched
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = "" if search.args.method == "returns" else "-"  # of its mixtures none is a step from the last one
    for k, d in enumerate(search.data.domains):
        style = {"color": f"C{k % 10}", "marker": "os^Dv"[k // 10 % 5], "linestyle": lines, "label": d}
        left.plot([line["round"] for line in mixtures], 100 * shares[:, k], **style)
        right.plot([line["round"] for line in measured], changes[:, k], **style)
    right.plot([line["round"] for line in measured], changes.mean(1), f"k{'--' if lines else '_'}", lw=2, label="mean")
    right.axhline(0, color="0.7", linewidth=1, zorder=0)
    left.set(title="The mixture", xlabel="round", ylabel="share of the sequences (%)", ylim=(0, None))
    right.set(title="Validation loss", xlabel="round (0: untouched)", ylabel="change in nats per token")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.axvline(found, color="0.88", linewidth=10, zorder=0, label="mixture found")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def write_results(search: Search, counts: dict[str, int], cost: dict[str, int], result: dict) -> None:
    """The mixture, the table's numbers, the picture and the model's card."""
    out, args, data, hyper, passes = search.out, search.args, search.data, search.hyper, search.passes
    found = next(line["round"] for line in search.history if line["counts"] == counts and line["losses"])
    mixture = {"counts": counts, "unit": "sequences", "seq_len": hyper["seq_len"], "round": found}
    mixture |= {"tokens": cost} | {name: vars(args)[name] for name in (*CHOICES, "seed", "data", "model")}
    write_text(out / "mix.json", json.dumps(mixture, indent=1) + "\n")
    write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    picture(search, found, out / "mix.png")
    record = load_json(out / "run.json") | {"passes": passes + [this_pass(data, hyper, counts)]}
    write_text(out / "run.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "README.md", model_card(out.name, args.model, data, counts, hyper, result, passes))


def main():
    parser = ArgumentParser(__doc__)
    add_options(parser, "out/mix")
    add = parser.add_argument
    add("--method", default="reweight", choices=tuple(METHODS), help="(default: %(default)s)")
    add("--objective", default="mean", choices=("mean", "worst"), help="what the search lowers: the mean loss of all "
        "domains, or the largest change of any from the untouched model (default: %(default)s)")
    add("--start", default="uniform", help="the first mixture, like train.py's --mix (default: %(default)s)")
    add("--base-sequences", type=int, default=6400, metavar="N", help="to pretrain scratch on (default: %(default)s)")
    add("--base-lr", type=float, help="peak learning rate of that (default: the model's)")
    add = parser.add_argument_group("of --method reweight").add_argument
    add("--rule", default="multiplicative", choices=tuple(RATES), help="reading of the formula (default: %(default)s)")
    add("--rate", type=float, metavar="R", help=f"r (default: {', '.join(f'{k} {r:g}' for k, r in RATES.items())})")
    add("--signal", default="loss", choices=("loss", "excess"), help="what the rule sees (default: %(default)s)")
    add("--rounds", type=int, default=4, metavar="N", help="at most (default: %(default)s)")
    add("--grow", action="store_true", help="train on the growing quantities, not on --sequences in their proportions")
    parser.set_defaults(sequences=1600)
    args = parser.parse_args()
    args.rate = RATES[args.rule] if args.rate is None else args.rate
    for name in ("rounds", "rate", "base_sequences", "base_lr"):
        if vars(args)[name] is not None and not 0 < vars(args)[name] < 1e9:
            raise InputError(f"--{name.replace('_', '-')} {vars(args)[name]}: expected more than 0")
    out, clock = Path(args.out), [time.perf_counter()]
    start(args.device)
    if args.data == SAMPLE and not Path(args.data).exists() and rank_and_world()[0] == 0:
        prepare(args.data)
    barrier()
    clock.append(time.perf_counter())
    data, model, hyper = open_run(args)
    first = parse_mixture(args.start, data, args.sequences, hyper["seq_len"])
    if args.method == "merge" and args.fsdp:
        raise InputError("--method merge adds whole models up: it does not go with --fsdp")
    if args.method in ("merge", "returns") and not all(first.get(d) for d in data.domains):
        raise InputError(f"--start {args.start}: --method {args.method} needs every domain in it; try more --sequences")
    own = (*CHOICES, "rounds", "grow", "sequences", "eval_sequences", "base_sequences", "base_lr")
    more = {"start": first} | {name: vars(args)[name] for name in own}
    with claim(out, args, data, hyper, more, []), stoppable():
        base = pretrain(model, data, hyper, args) if args.model.startswith("scratch:") else args.model
        clock.append(time.perf_counter())
        if not (out / "model.safetensors").is_file():
            search = Search(model, base, data, hyper, passes_of(base), args)
            counts, cost = METHODS[args.method](search), dict(search.tokens)
            if not any(line["counts"] == counts and line["losses"] for line in search.history):
                search.record(counts, search.measure(counts, "found"))
            clock.append(time.perf_counter())
            result = comparison(search, counts)
            if rank_and_world()[0] == 0:
                write_results(search, counts, cost, result)
            clock.append(time.perf_counter())
        keep(model, data, out, getattr(torch, args.save_dtype))  # last: it makes the run a finished one
    if rank_and_world()[0] == 0:
        result, times = load_json(out / "result.json"), zip(("sample", "base", "search", "comparison"), np.diff(clock))
        say("", f"test split, {result['seq_len']} tokens a sequence", table(result), verdict(result), "",
            f"{out} holds the mixture (mix.json), the picture (mix.png) and the model",
            "wall time: " + "".join(f"{name} {t:.0f} s, " for name, t in times) + f"all {clock[-1] - clock[0]:.0f} s")
    finish()


if __name__ == "__main__":
    cli(main, RESUME_HINT)
