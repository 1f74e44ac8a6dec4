"""Which method finds the better mixture, and at what cost, from one checkpoint on one budget.

    python tests/bench/scoreboard.py                     # the sample; 45 minutes on 2 CPU cores
    python tests/bench/scoreboard.py --data data/mine --out out/scoreboard-mine
    python tests/bench/scoreboard.py --transfer experts  # what it found, on a larger model
    python tests/bench/scoreboard.py --rows experts doremi --runs 0    # these, without a reference

A method searches once for every seed. What it found is then trained with a seed that no search had,
beside uniform, and compared on the test split. The reference, which the others are measured by, is
the minimum of a log-linear fit to many trained runs of one seed, with and without Olmix's pull to
uniform; the better of the two counts. All is kept in --out, under names that say what determined
it: the same command goes on where it was stopped, or prints again. After a change of a method, or
of eval.py, take another --out.
"""

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from eval import Losses, compare, domain_means, evaluate, parse_objective, signed
from excess import EXCESS
from merge import MERGE, stand_in
from mix import (
    METHODS,
    RULES,
    SOFT,
    History,
    Law,
    Method,
    Runs,
    begin_history,
    losses_of_experts,
    pretrain,
)
from model import SHAPES, GPTNeoX, say, shape, start
from prepare import (
    SAMPLE,
    ArgumentParser,
    Data,
    InputError,
    cli,
    load_json,
    prepare,
    replacing,
    write_json,
)
from returns import RETURNS
from train import (
    Hyperparameters,
    add_options,
    defaults,
    fill,
    load_to_train,
    name_of,
    passes_of,
    rescale,
    set_up,
    settings_of,
    times_seen,
    train,
)

ROWS = {
    "uniform": {"method": "uniform"},
    "natural": {"method": "natural"},
    "reweight multiplicative": {"method": "reweight", "rule": "multiplicative"},
    "reweight additive": {"method": "reweight", "rule": "additive"},
    "reweight share": {"method": "reweight", "rule": "share"},
    "reweight, excess": {"method": "excess"},
    "doremi": {"method": "doremi"},
    "merge": {"method": "merge"},
    "returns": {"method": "returns"},
    "experts": {"method": "experts"},
    "experts worst": {"method": "experts", "objective": "worst"},
}
SHAPES["larger"] = shape(7, 256, 8, 4096, 256)  # four times tiny's parameters
REFERENCE = {"log-linear fit": 0.0, "log-linear fit, pull": 0.05}  # to uniform; 0.05 is Olmix's


def methods() -> dict[str, Method]:
    """Those of mix.py, and those that stand beside this file."""
    return METHODS | {"excess": EXCESS, "merge": MERGE, "returns": RETURNS}


def all_rows() -> dict[str, dict]:
    """{row: what it chooses}: those above, and one for every method that none of them names."""
    named = [choice["method"] for choice in ROWS.values()]
    return ROWS | {name: {"method": name} for name in methods() if name not in named}


# ---- the bench ----


class Bench:
    """One checkpoint, what the methods find from it, and what comes of that."""

    def __init__(
        self,
        args,
        data: Data,
        model: GPTNeoX,
        hyper: Hyperparameters,
        base: str | Path,
        base_name: str,
    ):
        self.args = args
        self.data = data
        self.domains = data.domains
        self.model = model
        self.hyper = hyper
        self.base = base
        self.base_name = base_name
        self.folder = Path(args.out) / "kept"

    def settings(self, seed: int) -> dict:
        """What determines a search, but for the method."""
        settings = {"base": self.base_name, "data": self.data.identity}
        settings |= {name: vars(self.args)[name] for name in ("sequences", "eval_sequences")}
        return settings | replace(self.hyper, seed=seed).record()

    def runs(self, seed: int, eval_sequences: int | None = None) -> Runs:
        """The runs of a seed, which all its searches share."""
        return Runs(
            self.model,
            self.base,
            self.base_name,
            self.data,
            replace(self.hyper, seed=seed),
            self.folder / "runs",
            sequences=self.args.sequences,
            eval_sequences=eval_sequences or self.args.eval_sequences,
        )

    @contextlib.contextmanager
    def history(self, runs: Runs, title: str, objective: str = "mean") -> Iterator[History]:
        """A search's history; what is printed in this block goes to log.txt."""
        say(title)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            say("", title)
            judged_by = parse_objective(objective, self.domains)
            yield begin_history(runs, self.folder / "history.jsonl", judged_by)

    def found(self, row: str, seed: int) -> dict:
        """What a method finds: {"counts", "history", "tokens", "seconds"}.

        Runs that another row has measured before take it no seconds; its tokens have them all.
        """
        choice = {"rounds": self.args.rounds, "objective": "mean"} | all_rows()[row]
        choice["sequences"] = self.args.sequences
        method = methods()[choice["method"]]
        args = options_of(method, choice)
        key = name_of(self.settings(seed) | vars(args))
        path = self.folder / f"found-{row.replace(' ', '-')}-{seed}-{key}.json"
        if not path.is_file():
            runs = self.runs(seed)
            uniform = runs.counts(np.ones(len(self.domains)))
            with self.history(runs, f"seed {seed}: {row}", args.objective) as history:
                began = time.perf_counter()
                counts = method.find(runs, history, uniform, args)
            found = {"counts": counts, "history": history.lines, "tokens": runs.tokens}
            found["seconds"] = time.perf_counter() - began
            write_json(path, found)
        return load_json(path)

    def final(self, counts: dict[str, int] | None, seed: int) -> Losses:
        """Losses on the test split, trained on the mixture with a seed that no search has had.

        counts: None is the untouched model.
        """
        hyper = replace(self.hyper, seed=1000 + seed)
        path = self.folder / f"final-{name_of(self.settings(hyper.seed) | {'counts': counts})}.npz"
        if not path.is_file():
            fill(self.model, self.base)
            if counts:
                seen = times_seen(self.data, hyper.seq_len, passes_of(self.base))
                title = f"final, seed {hyper.seed}"
                train(self.model, self.data, counts, hyper, seen=seen, title=title)
            losses = evaluate(self.model, self.data, "test", hyper.seq_len, hyper.dtype)
            with replacing(path) as partial, open(partial, "wb") as file:
                np.savez(file, **losses)
        return dict(np.load(path))

    def reference(self, number: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Trained mixtures of seed 0: their shares and losses (n, K), and what tokens they took.

        Two thirds are spread over the whole simplex by a Sobol sequence; the others are half as far
        from the best mixture by then, with Olmix's pull.
        """
        K = len(self.domains)
        sobol = torch.quasirandom.SobolEngine(K, scramble=True, seed=0)
        points = sobol.draw(number, dtype=torch.float64).numpy()
        points = -np.log(points.clip(1e-9, 1 - 1e-9))
        points /= points.sum(1, keepdims=True)
        runs = self.runs(0)
        shares = []
        losses = []
        with self.history(runs, f"reference: {number} runs") as history:
            for i, point in enumerate(points):
                if i == number * 2 // 3:
                    center = minimum(log_linear(np.array(shares), np.array(losses)), K, 0.05)
                if i >= number * 2 // 3:
                    point = (point + center) / 2
                counts = runs.counts(point)
                losses.append(runs.measure(counts))
                shares.append(runs.shares(counts))
                history.add(counts, losses[-1])
        return np.array(shares), np.array(losses), runs.tokens

    def compared(self, counts: dict[str, int], seed: int) -> dict:
        """The mixture - uniform, and - untouched, on the test split with the final seed."""
        T = self.hyper.seq_len
        uniform = rescale(dict.fromkeys(self.domains, 1), sum(counts.values()))
        losses = self.final(counts, seed)
        to_uniform = compare(self.final(uniform, seed), losses, self.data, "test", T)
        to_untouched = compare(self.final(None, 0), losses, self.data, "test", T)
        return {
            "loss": float(domain_means(losses).mean()),
            "uniform": to_uniform["mean"],
            "worst domain": max(self.domains, key=lambda d: to_untouched[d]["change"]),
            "improved": to_untouched["improved"],
            "worst": to_untouched["worst"],
        }


def open_bench(args) -> Bench:
    """With the model that the options name, which is pretrained where it is scratch:SIZE."""
    device = start(args.device)
    own = copy.copy(args)
    own.out = Path(args.out) / "run"  # which there is never: what is in --out is no hindrance
    data, hyper = set_up(own)
    model = load_to_train(own, data, hyper.dtype, device)
    if args.model.startswith("scratch:"):
        base = pretrain(model, data, hyper, args)
        return Bench(args, data, model, hyper, base, base.name)
    base_name = str(settings_of(own, data, hyper)["model's files"] or own.model)
    return Bench(args, data, model, hyper, own.model, base_name)


def options_of(method: Method, choice: dict):
    """What a method is given as `args`: its options' defaults, and what is chosen of them."""
    parser = ArgumentParser("")
    for option, settings in method.options.items():
        parser.add_argument(option, **settings)
    args = parser.parse_args([])
    own = set(vars(args)) | {"method", "objective", "sequences"}
    vars(args).update({name: value for name, value in choice.items() if name in own})
    if "rule" in own and args.rate is None:
        args.rate = RULES[args.rule][1]
    return args


# ---- the fit, and how well it ranks ----


def log_linear(shares: np.ndarray, losses: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Olmix's law (2602.12237), L_i(p) = exp(c_i) + exp(t_i · p), by Huber's loss.

    shares and losses: (n, K). Returns p (…, K) -> L (…, K).
    """
    P = torch.from_numpy(shares)
    L = torch.from_numpy(losses)
    c = (0.7 * L.min(0).values).log().requires_grad_()
    t = (L.mean(0) - c.detach().exp()).log()[:, None].repeat(1, P.shape[1]).requires_grad_()
    search = {"line_search_fn": "strong_wolfe", "max_iter": 2000, "history_size": 50}
    tolerances = {"tolerance_grad": 1e-10, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS([c, t], **search, **tolerances)

    def closure():
        optimizer.zero_grad()
        fitted = c.exp() + (P @ t.T).exp()
        loss = torch.nn.functional.huber_loss(fitted, L, delta=0.02, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)
    constant = np.exp(c.detach().numpy())
    slopes = t.detach().numpy().T
    return lambda p: constant + np.exp(np.asarray(p) @ slopes)


def minimum(predict: Callable[[np.ndarray], np.ndarray], K: int, pull: float) -> np.ndarray:
    """The shares of the lowest predicted mean loss + pull · KL(p ‖ uniform)."""

    def value(p):
        divergence = (p * np.log(np.maximum(p, 1e-12) * K)).sum(-1)
        return predict(p).mean(-1) + pull * divergence

    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.dirichlet(np.full(K, a), 100_000) for a in (1.0, 5.0, 20.0)])
    p = drawn[value(drawn).argmin()]
    # With sixteen domains the best of these has three quarters of what there is to gain. The rest
    # is found by exponentiated gradient, at each step with the best of several rates.
    rates = np.logspace(-3, 2, 11)[:, None]
    for _ in range(1000):
        slope = (value(p + 1e-6 * np.eye(K)) - value(p)) / 1e-6
        steps = p * np.exp(-rates * (slope - slope.min()))
        steps /= steps.sum(1, keepdims=True)
        p = min((p, *steps), key=value)
    return p


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def proxies(bench: Bench, shares: np.ndarray, losses: np.ndarray) -> dict[str, dict]:
    """How well what stands in for training ranks the reference runs, by their mean loss.

    {proxy: {"all", "near", "by domain", "pick"}}. near: the half of them nearer to uniform. pick:
    loss of the run ranked first - the lowest one.
    """
    runs = bench.runs(0, eval_sequences=64)
    uniform = runs.counts(np.ones(len(bench.domains)))
    merged = []
    with bench.history(runs, "merged experts") as history:
        stand = stand_in(runs, history, uniform)
        for p in shares:
            stand.place(p)
            merged.append(domain_means(runs.evaluate()))

    with bench.history(runs, "law of experts") as history:
        experts = losses_of_experts(runs, uniform)
    start = runs.shares(uniform)
    law = Law(experts, start, np.zeros(len(start)))
    by_experts = []
    for p in shares:  # of those that are farther than an expert, the nearest
        w = (p - (1 - SOFT) * start).clip(0)
        by_experts.append(law.losses(w / w.sum()))

    history = bench.found("returns", 0)["history"]
    measured = sum(line["losses"] is not None for line in history[1:])
    logs = np.log(shares.clip(0.5 / bench.args.sequences))
    by_returns = np.array(history[-1]["a"]) - logs @ np.array(history[-1]["B"])

    folds = np.arange(len(shares)) % 4
    fitted = np.empty_like(losses)
    for fold in range(4):
        others = folds != fold
        fit = log_linear(shares[others], losses[others])
        fitted[~others] = fit(shares[~others])

    predicted = {"merged experts": np.array(merged)}
    predicted["soft experts' predictions, mixed"] = np.array(by_experts)
    predicted[f"the law of returns, {measured} runs"] = by_returns
    predicted["log-linear fit, 3/4 of the runs"] = fitted
    distance = np.abs(shares - 1 / shares.shape[1]).sum(1)
    near = distance <= np.median(distance)
    return {name: ranked(L, losses, near) for name, L in predicted.items()}


def ranked(predicted: np.ndarray, losses: np.ndarray, near: np.ndarray) -> dict:
    """A proxy's losses beside those of the runs, both (n, K). near: (n,), which of them are."""
    proxy = predicted.mean(1)
    mean = losses.mean(1)
    return {
        "all": rank_correlation(proxy, mean),
        "near": rank_correlation(proxy[near], mean[near]),
        "by domain": [rank_correlation(a, b) for a, b in zip(predicted.T, losses.T, strict=True)],
        "pick": float(mean[proxy.argmin()] - mean.min()),
    }


# ---- the rows ----


def verdict(row: dict) -> str:
    """In words; a gain counts where it exceeds the spread between the seeds."""
    if abs(row["mean"]) <= row["spread"] or len(row["seeds"]) < 2:
        return "not distinguishable from uniform"
    return "better than uniform" if row["mean"] < 0 else "worse than uniform"


def row_of(bench: Bench, of_seeds: list[dict]) -> dict:
    """A row's numbers. of_seeds: what was found, {"counts", "tokens"}, with every seed."""
    seeds = [bench.compared(one["counts"], seed) for seed, one in enumerate(of_seeds)]
    changes = [one["uniform"]["change"] for one in seeds]
    counts = np.array([[one["counts"].get(d, 0) for d in bench.domains] for one in of_seeds])
    uses = ("trained", "evaluated")
    tokens = {use: int(np.mean([one["tokens"][use] for one in of_seeds])) for use in uses}
    return {
        "loss": float(np.mean([one["loss"] for one in seeds])),
        "mean": float(np.mean(changes)),
        "spread": max(changes) - min(changes),
        "seeds": seeds,
        "tokens": tokens,
        "passes": tokens["trained"] / (bench.args.sequences * bench.hyper.seq_len),
        "seconds": float(np.mean([one.get("seconds", np.nan) for one in of_seeds])),
        "share": (counts / counts.sum(1, keepdims=True)).mean(0).tolist(),
    }


def scoreboard(bench: Bench, found: dict[str, list[dict]], cost: int | None) -> dict[str, dict]:
    """{row: numbers}, the best first. found: {row: of_seeds}. cost: of the reference, in tokens."""
    rows = {name: row_of(bench, of_seeds) for name, of_seeds in found.items()}
    best = min((rows[name]["mean"] for name in REFERENCE if name in rows), default=0.0)
    for row in rows.values():
        row["captured"] = None
        row["cost"] = None
        row["verdict"] = verdict(row)
        if best < 0:
            row["captured"] = row["mean"] / best + 0.0  # no -0
        if cost:
            row["cost"] = sum(row["tokens"].values()) / cost
    return dict(sorted(rows.items(), key=lambda item: item[1]["mean"]))


def table(bench: Bench, rows: dict[str, dict]) -> str:
    """Two blocks of lines: what the mixtures are worth; what they are, and what they cost."""
    width = max(map(len, rows)) + 2
    seeds = range(len(next(iter(rows.values()))["seeds"]))
    head = f"{'':<{width}}{'test loss':>9}  {'- uniform':>9}  {'spread':>6}  {'captured':>8}  "
    head += "".join(f"{f'seed {seed} [95%]':<29}" for seed in seeds)
    lines = [f"{head}better*  worst*"]
    for name, row in rows.items():
        captured = ""
        if row["captured"] is not None:
            captured = f"{row['captured']:.0%}" if row["captured"] >= 0 else "< 0"
        line = f"{name:<{width}}{row['loss']:>9.4f}  {row['mean']:>+9.4f}  {row['spread']:>6.4f}  "
        line += f"{captured:>8}  "
        line += "".join(f"{signed(one['uniform']):<29}" for one in row["seeds"])
        worst = max(row["seeds"], key=lambda one: one["worst"])
        improved = "/".join(sorted({str(one["improved"]) for one in row["seeds"]}))
        lines.append(f"{line}{improved:>7}  {worst['worst domain']} {worst['worst']:+.4f}")

    head = f"{'':<{width}}" + "".join(f"{d[:12]:>13}" for d in bench.domains)
    cost = f"{'passes':>8}{'trained':>10}{'evaluated':>11}{'of reference':>14}{'seconds':>9}"
    lines += ["", head + cost]
    for name, row in rows.items():
        line = f"{name:<{width}}" + "".join(f"{share:>13.1%}" for share in row["share"])
        trained, evaluated = (f"{row['tokens'][use] / 1e6:.1f} M" for use in row["tokens"])
        cost = f"{row['cost']:.0%}" if row["cost"] is not None else ""
        words = row["verdict"] if name != "uniform" else ""
        line += f"{row['passes']:>8.2f}{trained:>10}{evaluated:>11}{cost:>14}"
        if not math.isnan(row["seconds"]):
            line += f"{row['seconds']:>9.0f}"
        lines.append(f"{line}  {words}".rstrip())
    better = "* domains better than in the untouched model"
    lines.append(f"{better}; the one that is worst off beside it, of all seeds")
    return "\n".join(lines)


def proxy_table(domains: list[str], checks: dict[str, dict]) -> str:
    lines = [f"{'':<34}{'all':>8}{'near*':>8}{'pick*':>9}  by domain"]
    for name, check in checks.items():
        correlations = zip(domains, check["by domain"], strict=True)
        by_domain = " ".join(f"{d} {rho:.2f}" for d, rho in correlations)
        numbers = f"{check['all']:>8.2f}{check['near']:>8.2f}{check['pick']:>+9.4f}"
        lines.append(f"{name:<34}{numbers}  {by_domain}")
    pick = "loss of the mixture ranked first - the lowest (merged: on 64 windows a domain)"
    lines.append(f"* the half nearer to uniform; {pick}")
    return "\n".join(lines)


# ---- pictures ----


def figure_of(path: Path, draw: Callable, figsize: tuple[float, float], **layout) -> None:
    """draw(figure, axes) fills it; axes: (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize, layout="constrained")
    draw(figure, figure.subplots(**layout, squeeze=False))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def dot_plot(rows: dict[str, dict], path: Path) -> None:
    """Difference from uniform: for each seed a dot and a 95% interval, for their mean a bar."""
    seeds = len(next(iter(rows.values()))["seeds"])

    def draw(figure, axes):
        axes = axes[0, 0]
        for y, (name, row) in enumerate(reversed(rows.items())):
            axes.plot([row["mean"]] * 2, [y - 0.3, y + 0.3], color="k", linewidth=2, zorder=3)
            for i, one in enumerate(row["seeds"]):
                height = y + (seeds - 1) / 2 * 0.2 - 0.2 * i
                color = f"C{i}"
                label = f"seed {i}" if y == 0 else None
                dot = {"color": color, "markersize": 5, "label": label}
                axes.plot(one["uniform"]["interval"], [height] * 2, color=color, alpha=0.6)
                axes.plot(one["uniform"]["change"], height, "o", **dot)
            words = row["verdict"].replace(" from uniform", "").replace(" than uniform", "")
            if row["cost"]:
                words += f", {row['cost']:.0%} of the reference's tokens"
            if name == "uniform":
                words = ""
            beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
            axes.annotate(words, (1.01, y), **beside)
        axes.axvline(0, color="0.7", zorder=0)
        axes.set_xscale("symlog", linthresh=0.01, linscale=1.5)
        low, high = axes.get_xlim()
        ticks = [-0.1, -0.03, -0.01, -0.005, 0, 0.005, 0.01, 0.03, 0.1, 0.3]
        ticks = [x for x in ticks if low <= x <= high]
        axes.set_xticks(ticks, [f"{x:+g}" if x else "0" for x in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(rows)), list(rows)[::-1])
        scale = "95% intervals (linear up to 0.01, then logarithmic)"
        axes.set_xlabel(f"test loss - uniform's, nats per token, {scale}")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside upper center", ncols=seeds, fontsize=8)

    figure_of(path, draw, figsize=(10, 0.45 * len(rows) + 1.4))


def draw_path(axes, domains: list[str], found: dict, best: list[float]) -> None:
    """The mixtures of a search by round. best: the shares that dotted lines show."""
    lines = found["history"][1:]
    rounds = np.arange(1, len(lines) + 1)
    # Where the method predicts, most mixtures are tried, and only those that it expects are steps.
    steps = np.array([line["round"] == 1 or "predicted" in line for line in lines])
    if steps.sum() == 1:
        steps[:] = True
    for k, d in enumerate(domains):
        color = f"C{k % 10}"
        counts = [line["counts"] for line in lines] + [found["counts"]]
        shares = 100 * np.array([mixture.get(d, 0) / sum(mixture.values()) for mixture in counts])
        axes.plot(rounds, shares[:-1], ".", color=color, alpha=0.4, markersize=4)
        axes.plot(rounds[steps], shares[:-1][steps], color=color, marker=".", label=d)
        axes.plot(len(lines) + 1, shares[-1], "D", color=color)
        axes.axhline(100 * best[k], color=color, linestyle=":", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def paths(bench: Bench, found: dict[str, list[dict]], best: list[float], path: Path) -> None:
    """The mixture of every search by round, for seed 0; dotted: the reference's."""
    shown = {name: one[0] for name, one in found.items() if len(one[0].get("history", [])) > 2}

    def draw(figure, axes):
        for panel, (name, one) in zip(axes.flat, shown.items(), strict=False):
            draw_path(panel, bench.domains, one, best)
            panel.set_title(name, fontsize=9)
        for panel in axes.flat[len(shown) :]:
            panel.set_visible(False)
        for panel in axes[:, 0]:
            panel.set_ylabel("share (%)")
        words = "round; diamond: the mixture found; dotted: the log-linear fit's"
        figure.supxlabel(words, fontsize=9)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)

    figure_of(path, draw, nrows=2, ncols=math.ceil(len(shown) / 2), figsize=(11, 5.5))


# ---- main ----


def transfer(small: Bench, found: dict[str, list[dict]]) -> tuple[Bench, dict[str, list[dict]]]:
    """The larger model's bench; and there uniform, the small model's mixtures, and its own.

    It searches once, with seed 0.
    """
    args = copy.copy(small.args)
    args.model = f"scratch:{args.larger}"
    # As many tokens a step and in all, so as many repeats; rates as the width has them.
    wider = SHAPES[args.larger].hidden_size / small.model.config.hidden_size
    args.lr = small.hyper.learning_rate / wider
    own = defaults(small.args.model, small.model.config)
    base_lr = small.args.base_lr or own["base_learning_rate"]
    args.base_lr = base_lr / wider
    args.batch_size = small.hyper.batch_size
    args.seq_len = small.hyper.seq_len
    bench = open_bench(args)
    row = args.transfer
    there = {"uniform": [bench.found("uniform", seed) for seed in range(args.seeds)]}
    there[f"{row} of the small model"] = found[row]
    there[f"{row} of its own"] = [bench.found(row, 0)] * args.seeds
    return bench, there


def parse_args():
    parser = ArgumentParser(__doc__)
    add_options(parser, "out/scoreboard")
    add = parser.add_argument
    add("--rounds", type=int, default=4, metavar="N", help="of reweight, at most")
    pretraining = "to pretrain scratch:SIZE on"
    add("--base-sequences", type=int, default=6400, metavar="N", help=pretraining)
    add("--base-lr", type=float, help="peak learning rate of that; default: the model's")
    add("--seeds", type=int, default=3, metavar="N", help="searches of a method")
    add("--runs", type=int, default=48, metavar="N", help="of the reference")
    taken = "take this method's mixtures to a larger model, too"
    add("--transfer", choices=all_rows(), metavar="ROW", help=taken)
    add("--larger", choices=SHAPES, default="larger", metavar="SIZE", help="that model")
    few = "uniform and these alone"
    add("--rows", choices=all_rows(), nargs="+", default=[*all_rows()], metavar="ROW", help=few)
    parser.set_defaults(sequences=1600)
    args = parser.parse_args()
    for name in ("dry_run", "resume", "overwrite"):
        if vars(args)[name]:
            option = name.replace("_", "-")
            raise InputError(f"--{option}: what is in --out is used again by itself; leave it out")
    return args


def main():
    args = parse_args()
    out = Path(args.out)
    if args.data == SAMPLE and not Path(args.data).exists():
        prepare(args.data)
    bench = open_bench(args)
    if args.runs:
        shares, losses, cost = bench.reference(args.runs)
    names = [row for row in all_rows() if row in {"uniform", args.transfer, *args.rows}]
    found = {row: [bench.found(row, seed) for seed in range(args.seeds)] for row in names}
    if args.runs:
        fit = log_linear(shares, losses)
        for name, pull in REFERENCE.items():
            best = minimum(fit, len(bench.domains), pull)
            weights = dict(zip(bench.domains, best.tolist(), strict=True))
            counts = rescale(weights, args.sequences)
            found[name] = [{"counts": counts, "tokens": cost}] * args.seeds
    rows = scoreboard(bench, found, sum(cost.values()) if args.runs else None)

    T = bench.hyper.seq_len
    size = f"{args.sequences:,} sequences of {T} tokens from {bench.base}"
    say("", f"{args.data}: {size}, test split, nats per token", table(bench, rows))
    result = {"data": bench.data.identity, "base": str(bench.base), "sequences": args.sequences}
    result |= {"domains": bench.domains, "rows": rows, "found": found}
    dot_plot(rows, out / "scoreboard.png")
    if args.runs:
        checks = proxies(bench, shares, losses)
        say("", f"rank correlation with {args.runs} trained mixtures, seed 0, validation split")
        say(proxy_table(bench.domains, checks))
        result |= {"proxies": checks}
        result |= {"reference": {"shares": shares.tolist(), "losses": losses.tolist()}}
        best = min((rows[name] for name in REFERENCE), key=lambda row: row["mean"])["share"]
        paths(bench, found, best, out / "paths.png")
    if args.transfer:
        larger, there = transfer(bench, found)
        rows = scoreboard(larger, there, None)
        parameters = larger.model.parameter_count()
        say("", f"transfer to {parameters:,} parameters", table(larger, rows))
        result["transfer"] = rows
    write_json(out / "scoreboard.json", result)
    say("", f"{out} holds the numbers (scoreboard.json) and pictures")


if __name__ == "__main__":
    cli(main)
