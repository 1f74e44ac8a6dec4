"""Which method finds the better mixture, and at what cost: every method of mix.py from one checkpoint, on one budget.

    python tests/bench/scoreboard.py                          # the sample; about 45 minutes on 2 CPU cores
    python tests/bench/scoreboard.py --data data/mine --out out/scoreboard-mine
    python tests/bench/scoreboard.py --transfer returns       # the mixture that it found, on a model 4 times as large

A method searches once for every seed. What it found is then trained with a seed that no search had, beside uniform,
and compared on the test split. The reference, which the others are measured by, is the minimum of a log-linear fit to
many trained runs of one seed, with and without Olmix's pull to uniform; the better of the two counts. All is kept in
--out: the same command goes on where it was stopped, or prints again. After a change of the code take another --out.
"""

import contextlib
import copy
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from eval import compare, evaluate, fill, mean_loss, say, signed  # noqa: E402
from mix import METHODS, RATES, Search, pretrain, stand_in  # noqa: E402
from model import SHAPES, load_json, replacing, shape, write_text  # noqa: E402
from prepare import SAMPLE, ArgumentParser, cli, prepare  # noqa: E402
from train import add_options, open_run, passes_of, rescale, times_seen, train  # noqa: E402

ROWS = {
    "uniform": {"method": "uniform"},
    "natural": {"method": "natural"},
    "reweight multiplicative": {"method": "reweight", "rule": "multiplicative"},
    "reweight additive": {"method": "reweight", "rule": "additive"},
    "reweight share": {"method": "reweight", "rule": "share"},
    "reweight excess": {"method": "reweight", "signal": "excess"},
    "doremi": {"method": "doremi"},
    "merge": {"method": "merge"},
    "returns": {"method": "returns"},
    "returns worst": {"method": "returns", "objective": "worst"},
}
REFERENCE = {"log-linear fit": 0.0, "log-linear fit, pull": 0.05}  # to uniform; 0.05 is Olmix's


class Cached(Search):
    """A search that shares its runs with all others of its seed: one folder for each mixture."""

    def folder(self, counts: dict[str, int], name: str) -> Path:
        key = json.dumps([self.hyper["seed"], sorted((d, n) for d, n in counts.items() if n)])
        return self.args.runs / hashlib.sha256(key.encode()).hexdigest()[:16]


class Bench:
    """One checkpoint, what the methods find from it, and what comes of that."""

    def __init__(self, args):
        self.args, out = args, Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        self.data, self.model, self.hyper = open_run(args)
        scratch = args.model.startswith("scratch:")
        self.base = (
            pretrain(self.model, self.data, self.hyper, args) if scratch else Path(args.model)
        )
        self.passes, self.domains, self.T = (
            passes_of(self.base),
            self.data.domains,
            self.hyper["seq_len"],
        )
        self.seen = times_seen(self.data, self.T, self.passes)
        own = {name: str(value) for name, value in self.hyper.items() if name != "seed"}
        settings = [
            own,
            self.data.identity,
            self.base.name,
            args.sequences,
            args.rounds,
            args.eval_sequences,
        ]
        self.folder = out / f"runs-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
        self.folder.mkdir(exist_ok=True)

    def search(self, seed: int, **choice) -> Cached:
        args = copy.copy(self.args)
        own = {
            "method": "reweight",
            "rule": "multiplicative",
            "signal": "loss",
            "objective": "mean",
            **choice,
        }
        own |= {
            "runs": self.folder,
            "out": self.folder / "search",
            "start": "uniform",
            "grow": False,
            "save_every": 0,
        }
        vars(args).update(own, rate=RATES[own["rule"]])
        args.out.mkdir(exist_ok=True)
        fill(self.model, self.base)
        return Cached(
            self.model, self.base, self.data, self.hyper | {"seed": seed}, self.passes, args
        )

    def found(self, row: str, seed: int) -> dict:
        """What a method finds: {"counts", "history", "tokens"}."""
        path = self.folder / f"found-{row.replace(' ', '-')}-{seed}.json"
        if not path.is_file():
            say(f"seed {seed}: {row}")
            with open(self.folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
                print(f"\nseed {seed}: {row}")
                search = self.search(seed, **ROWS[row])
                counts = METHODS[search.args.method](search)
            write_text(
                path,
                json.dumps({"counts": counts, "history": search.history, "tokens": search.tokens})
                + "\n",
            )
        return load_json(path)

    def final(self, counts: dict[str, int] | None, seed: int) -> dict[str, np.ndarray]:
        """Losses on the test split, trained on the mixture with a seed that no search has had; None: untouched."""
        key = json.dumps([seed, sorted(counts.items()) if counts else None])
        path = self.folder / f"final-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if not path.is_file():
            fill(self.model, self.base)
            if counts:
                hyper = self.hyper | {"seed": 1000 + seed}
                train(
                    self.model,
                    self.data,
                    counts,
                    **hyper,
                    seen=self.seen,
                    title=f"final, seed {1000 + seed}",
                )
            losses = evaluate(self.model, self.data, "test", self.T, self.hyper["dtype"])
            with replacing(path) as partial, open(partial, "wb") as file:
                np.savez(file, **losses)
        return dict(np.load(path))

    def reference(self, runs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Trained mixtures: two thirds of them spread over the whole simplex by a Sobol sequence, the last third half
        as far from the best mixture by then, with Olmix's pull. Returns their shares and validation losses, (n, K)."""
        say(f"reference: {runs} runs")
        K = len(self.domains)
        points = (
            torch.quasirandom.SobolEngine(K, scramble=True, seed=0)
            .draw(runs, dtype=torch.float64)
            .numpy()
        )
        points = -np.log(points.clip(1e-9, 1 - 1e-9))
        points /= points.sum(1, keepdims=True)
        with open(self.folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            search, shares, losses = self.search(seed), [], []
            for i, point in enumerate(points):
                if i == runs * 2 // 3:
                    center = minimum(log_linear(np.array(shares), np.array(losses)), K, 0.05)
                counts = search.counts(point if i < runs * 2 // 3 else (point + center) / 2)
                losses.append(search.measure(counts, ""))
                search.record(counts, losses[-1])
                (search.folder(counts, "") / "model.safetensors").unlink(missing_ok=True)
                shares.append([counts[d] / self.args.sequences for d in self.domains])
            self.cost = search.tokens
        return np.array(shares), np.array(losses)

    def compared(self, counts: dict[str, int], seed: int) -> dict:
        """The mixture - uniform, and - untouched, on the test split with the final seed."""
        uniform = rescale(dict.fromkeys(self.domains, 1), sum(counts.values()))
        losses, against = (
            self.final(counts, seed),
            {"uniform": self.final(uniform, seed), "untouched": self.final(None, 0)},
        )
        result = {
            name: compare(other, losses, self.data, "test", self.T)
            for name, other in against.items()
        }
        worst = max(self.domains, key=lambda d: result["untouched"][d]["change"])
        return {
            "loss": mean_loss(losses),
            "uniform": result["uniform"]["mean"],
            "worst domain": worst,
            "improved": result["untouched"]["improved"],
            "worst": result["untouched"]["worst"],
        }


def log_linear(shares: np.ndarray, losses: np.ndarray, delta: float = 0.02):
    """Olmix's law (2602.12237), L_i(p) = exp(c_i) + exp(t_i · p), by Huber's loss. Returns p (…, K) -> L (…, K)."""
    P, L = torch.from_numpy(shares), torch.from_numpy(losses)
    c = (0.7 * L.min(0).values).log().requires_grad_()
    t = (L.mean(0) - c.detach().exp()).log()[:, None].repeat(1, P.shape[1]).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [c, t],
        max_iter=2000,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
    )

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.huber_loss(
            c.exp() + (P @ t.T).exp(), L, delta=delta, reduction="sum"
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    c, t = c.detach().numpy(), t.detach().numpy()
    return lambda p: np.exp(c) + np.exp(np.asarray(p) @ t.T)


def minimum(predict, K: int, pull: float) -> np.ndarray:
    """The shares with the lowest predicted mean loss + pull · KL(p ‖ uniform), of many drawn ones."""
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.dirichlet(np.full(K, a), 100_000) for a in (1.0, 5.0, 20.0)])
    entropy = (drawn * np.log(np.maximum(drawn, 1e-12) * K)).sum(1)
    return drawn[(predict(drawn).mean(1) + pull * entropy).argmin()]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def proxies(bench: Bench, shares: np.ndarray, losses: np.ndarray) -> dict:
    """How well what stands in for training ranks the reference runs, by their mean loss: {proxy: {"all", "near", "by
    domain", "pick"}}. near: the half of them nearer to uniform. pick: loss of the run ranked first - the lowest one."""
    with open(bench.folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        search = bench.search(0, method="merge", eval_sequences=64)
        _, place, _ = stand_in(search)
        merged = []
        for p in shares:
            place(p)
            merged.append([values.mean() for values in search.evaluate().values()])
    history = bench.found("returns", 0)["history"]
    law, runs = history[-1], len([line for line in history[1:] if line["losses"]])
    folds = np.arange(len(shares)) % 4
    fitted = np.empty_like(losses)
    for fold in range(4):
        fitted[folds == fold] = log_linear(shares[folds != fold], losses[folds != fold])(
            shares[folds == fold]
        )
    logs = np.log(shares.clip(0.5 / bench.args.sequences))
    predicted = {"merged experts": np.array(merged), f"the law of returns, {runs} runs": law["a"] - logs @ law["B"],
                 "log-linear fit, 3/4 of the runs": fitted}  # fmt: skip
    distance = np.abs(shares - 1 / shares.shape[1]).sum(1)
    near, mean = distance <= np.median(distance), losses.mean(1)
    return {
        name: {
            "all": rank_correlation(L.mean(1), mean),
            "near": rank_correlation(L.mean(1)[near], mean[near]),
            "by domain": [rank_correlation(a, b) for a, b in zip(L.T, losses.T)],
            "pick": float(mean[L.mean(1).argmin()] - mean.min()),
        }
        for name, L in predicted.items()
    }


def verdict(row: dict) -> str:
    """In words; a gain counts where it exceeds the spread between the seeds."""
    if abs(row["mean"]) <= row["spread"] or len(row["seeds"]) < 2:
        return "not distinguishable from uniform"
    return "better than uniform" if row["mean"] < 0 else "worse than uniform"


def scoreboard(bench: Bench, found: dict[str, list[dict]], cost: int | None) -> dict[str, dict]:
    """{row: numbers}, sorted. found: {row: one {"counts", "tokens"} a seed}. cost: tokens of the reference, if any."""
    rows = {}
    for name, of_seeds in found.items():
        seeds = [bench.compared(one["counts"], seed) for seed, one in enumerate(of_seeds)]
        changes = [one["uniform"]["change"] for one in seeds]
        counts = np.array([[one["counts"].get(d, 0) for d in bench.domains] for one in of_seeds])
        tokens = {
            use: int(np.mean([one["tokens"][use] for one in of_seeds]))
            for use in ("trained", "evaluated")
        }
        rows[name] = {
            "loss": float(np.mean([one["loss"] for one in seeds])),
            "mean": float(np.mean(changes)),
            "spread": max(changes) - min(changes),
            "seeds": seeds,
            "tokens": tokens,
            "share": (counts / counts.sum(1, keepdims=True)).mean(0).tolist(),
        }
    best = min((rows[name]["mean"] for name in REFERENCE if name in rows), default=0.0)
    for row in rows.values():
        row |= {
            "captured": row["mean"] / best + 0.0 if best < 0 else None,
            "verdict": verdict(row),
            "cost": sum(row["tokens"].values()) / cost if cost else None,
        }
    return dict(sorted(rows.items(), key=lambda item: item[1]["mean"]))


def table(bench: Bench, rows: dict[str, dict]) -> str:
    width, n = max(map(len, rows)) + 2, len(next(iter(rows.values()))["seeds"])
    each = "".join(f"{f'seed {seed} [95%]':<29}" for seed in range(n))
    lines = [
        f"{'':<{width}}{'test loss':>9}  {'- uniform':>9}  {'spread':>6}  {'captured':>8}  {each}better*  worst*"
    ]
    for name, row in rows.items():
        captured = (
            ""
            if row["captured"] is None
            else "< 0"
            if row["captured"] < 0
            else f"{row['captured']:.0%}"
        )
        line = f"{name:<{width}}{row['loss']:>9.4f}  {row['mean']:>+9.4f}  {row['spread']:>6.4f}  {captured:>8}  "
        line += "".join(f"{signed(one['uniform']):<29}" for one in row["seeds"])
        worst = max(row["seeds"], key=lambda one: one["worst"])
        improved = "/".join(sorted({str(one["improved"]) for one in row["seeds"]}))
        lines.append(f"{line}{improved:>7}  {worst['worst domain']} {worst['worst']:+.4f}")
    lines += [
        "",
        f"{'':<{width}}"
        + "".join(f"{d[:12]:>13}" for d in bench.domains)
        + f"{'trained':>10}{'evaluated':>11}{'of reference':>14}",
    ]
    for name, row in rows.items():
        tokens = [f"{row['tokens'][use] / 1e6:.1f} M" for use in ("trained", "evaluated")]
        cost = f"{row['cost']:.0%}" if row["cost"] is not None else ""
        line = f"{name:<{width}}" + "".join(f"{share:>13.1%}" for share in row["share"])
        lines.append(
            f"{line}{tokens[0]:>10}{tokens[1]:>11}{cost:>14}  {row['verdict'] if name != 'uniform' else ''}".rstrip()
        )
    lines += [
        "* domains better than in the untouched model; the one that is worst off beside it, of all seeds"
    ]
    return "\n".join(lines)


def share_of(counts: dict[str, int], domain: str) -> float:
    return counts.get(domain, 0) / sum(counts.values())


def figure_of(path: Path, draw, figsize: tuple[float, float], **layout) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize, layout="constrained")
    draw(figure, figure.subplots(**layout, squeeze=False))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def dot_plot(rows: dict[str, dict], path: Path) -> None:
    """Difference from uniform of every method: a dot and a 95% interval for each seed, a bar for the mean."""

    def draw(figure, axes):
        axes, names = axes[0, 0], list(rows)[::-1]
        seeds = len(rows[names[0]]["seeds"])
        for y, name in enumerate(names):
            row = rows[name]
            axes.plot([row["mean"]] * 2, [y - 0.3, y + 0.3], color="k", linewidth=2, zorder=3)
            for i, one in enumerate(row["seeds"]):
                height = y + (seeds - 1) / 2 * 0.2 - 0.2 * i
                axes.plot(one["uniform"]["interval"], [height] * 2, color=f"C{i}", alpha=0.6)
                label = f"seed {i}" if y == 0 else None
                axes.plot(
                    one["uniform"]["change"], height, "o", color=f"C{i}", markersize=5, label=label
                )
            words = row["verdict"].replace(" from uniform", "").replace(" than uniform", "")
            cost = f", {row['cost']:.0%} of the reference's tokens" if row["cost"] else ""
            axes.annotate(f"{words}{cost}" if name != "uniform" else "", (1.01, y), va="center", fontsize=8,
                          xycoords=("axes fraction", "data"))  # fmt: skip
        axes.axvline(0, color="0.7", zorder=0)
        axes.set_xscale("symlog", linthresh=0.01, linscale=1.5)
        ticks = [-0.1, -0.03, -0.01, -0.005, 0, 0.005, 0.01, 0.03, 0.1, 0.3]
        low, high = axes.get_xlim()
        axes.set_xticks(
            [x for x in ticks if low <= x <= high],
            [f"{x:+g}" if x else "0" for x in ticks if low <= x <= high],
        )
        axes.minorticks_off()
        axes.set(yticks=range(len(names)), yticklabels=names)
        axes.set_xlabel(
            "test loss - uniform's, nats per token, 95% intervals (linear up to 0.01, then logarithmic)"
        )
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside upper center", ncols=seeds, fontsize=8)

    figure_of(path, draw, figsize=(10, 0.45 * len(rows) + 1.4))


def paths(bench: Bench, found: dict[str, list[dict]], best: list[float], path: Path) -> None:
    """The mixture of every search by round, for seed 0; dotted: the reference's."""
    shown = {name: one[0] for name, one in found.items() if len(one[0].get("history", [])) > 2}

    def draw(figure, axes):
        for panel, (name, one) in zip(axes.flat, shown.items()):
            lines = one["history"][1:]
            probes = any(
                "predicted" in line for line in lines
            )  # then most mixtures are tried, not steps
            for k, d in enumerate(bench.domains):
                color = f"C{k % 10}"
                shares = {i + 1: 100 * share_of(line["counts"], d) for i, line in enumerate(lines)}
                steps = [i for i in shares if not probes or i == 1 or "predicted" in lines[i - 1]]
                panel.plot(
                    list(shares), list(shares.values()), ".", color=color, alpha=0.4, markersize=4
                )
                panel.plot(steps, [shares[i] for i in steps], color=color, marker=".", label=d)
                panel.plot(len(lines) + 1, 100 * share_of(one["counts"], d), "D", color=color)
                panel.axhline(100 * best[k], color=color, linestyle=":", linewidth=1)
            panel.set_title(name, fontsize=9)
            panel.set_ylim(bottom=0)
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.spines[["top", "right"]].set_visible(False)
        for panel in axes.flat[len(shown) :]:
            panel.set_visible(False)
        for panel in axes[:, 0]:
            panel.set_ylabel("share (%)")
        figure.supxlabel(
            "round; diamond: the mixture found; dotted: the log-linear fit's", fontsize=9
        )
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)

    figure_of(path, draw, nrows=2, ncols=-(-len(shown) // 2), figsize=(11, 5.5))


def transfer(args, found: dict[str, list[dict]]) -> tuple[Bench, dict[str, list[dict]]]:
    """The larger model's bench, and there: uniform, the small model's mixtures, and that of its own search (seed 0)."""
    larger = copy.copy(args)
    SHAPES["larger"] = shape(7, 256, 8, 4096, 256)
    larger.model, larger.lr, larger.base_lr = (
        "scratch:larger",
        2e-3,
        5e-3,
    )  # half of tiny's, as it is twice as wide
    larger.batch_size, larger.seq_len = 16, 256  # tiny's; as many sequences, so as many repeats
    bench, row = Bench(larger), args.transfer
    own = [bench.found(row, 0)] * args.seeds
    return bench, {"uniform": [bench.found("uniform", seed) for seed in range(args.seeds)],
                   f"{row} of the small model": found[row], f"{row} of its own": own}  # fmt: skip


def main():
    parser = ArgumentParser(__doc__)
    add_options(parser, "out/scoreboard")
    add = parser.add_argument
    add(
        "--rounds",
        type=int,
        default=4,
        metavar="N",
        help="of reweight, at most (default: %(default)s)",
    )
    add(
        "--base-sequences",
        type=int,
        default=6400,
        metavar="N",
        help="to pretrain scratch on (default: %(default)s)",
    )
    add("--base-lr", type=float, help="peak learning rate of that (default: the model's)")
    add("--seeds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add("--runs", type=int, default=48, metavar="N", help="of the reference (default: %(default)s)")
    add(
        "--transfer", choices=tuple(ROWS), help="take this method's mixtures to a larger model, too"
    )
    parser.set_defaults(sequences=1600)
    args = parser.parse_args()
    if args.data == SAMPLE and not Path(args.data).exists():
        prepare(args.data)
    bench, out = Bench(args), Path(args.out)
    shares, losses = bench.reference(args.runs)
    fit = log_linear(shares, losses)
    found = {row: [bench.found(row, seed) for seed in range(args.seeds)] for row in ROWS}
    for name, pull in REFERENCE.items():
        best = dict(zip(bench.domains, minimum(fit, len(bench.domains), pull).tolist()))
        found[name] = [{"counts": rescale(best, args.sequences), "tokens": bench.cost}] * args.seeds
    rows = scoreboard(bench, found, sum(bench.cost.values()))
    best = min((rows[name] for name in REFERENCE), key=lambda row: row["mean"])["share"]
    checks = proxies(bench, shares, losses)
    say(
        "",
        f"{args.data}: {args.sequences:,} sequences of {bench.T} tokens from {bench.base}, test split, nats per token",
    )
    say(
        table(bench, rows),
        "",
        f"rank correlation with {args.runs} trained mixtures, seed 0, validation split",
    )
    say(f"{'':<34}{'all':>8}{'near*':>8}{'pick*':>9}  by domain")
    for name, check in checks.items():
        by_domain = " ".join(f"{d} {rho:.2f}" for d, rho in zip(bench.domains, check["by domain"]))
        say(
            f"{name:<34}{check['all']:>8.2f}{check['near']:>8.2f}{check['pick']:>+9.4f}  {by_domain}"
        )
    say(
        "* the half nearer to uniform; loss of the mixture ranked first - the lowest (merged: on 64 windows a domain)"
    )
    result = {"data": bench.data.identity, "base": str(bench.base), "sequences": args.sequences}
    result |= {"domains": bench.domains, "rows": rows, "proxies": checks, "found": found}
    result |= {"reference": {"shares": shares.tolist(), "losses": losses.tolist()}}
    dot_plot(rows, out / "scoreboard.png")
    paths(bench, found, best, out / "paths.png")
    if args.transfer:
        larger, found = transfer(args, found)
        rows = scoreboard(larger, found, None)
        say(
            "",
            f"transfer to {sum(p.numel() for p in larger.model.parameters()):,} parameters",
            table(larger, rows),
        )
        result["transfer"] = rows
    write_text(out / "scoreboard.json", json.dumps(result, indent=1) + "\n")
    say(
        "",
        f"{out} holds the numbers (scoreboard.json) and the pictures (scoreboard.png, paths.png)",
    )


if __name__ == "__main__":
    cli(main)
