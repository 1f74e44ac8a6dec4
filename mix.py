"""Find the mixture of domains that a model is missing: train on one, measure, move it, repeat.

    python mix.py                                    # the whole method on a laptop, in minutes
    python mix.py --data data/pile --model pythia-70m --sequences 2000 --out out/pile
    python mix.py --method experts --out out/experts # another method; README.md says which to take

All methods end with the table that counts: untouched, uniform and the mixture found, on the test
split, trained on as many sequences.
"""

import contextlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import prepare
import train
from eval import (
    RESULT,
    WORST,
    Losses,
    Objective,
    compare,
    domain_means,
    evaluate,
    judge,
    parse_objective,
    results,
    signed,
    table,
)
from model import GPTNeoX, add_up, barrier, finish, on_all_ranks, rank, say, start, world_size
from prepare import FEW_DOCUMENTS, Data, InputError
from train import Hyperparameters, Mixture, rescale

# ---- the method ----


def softmax(x: np.ndarray) -> np.ndarray:
    raised = np.exp(x - x.max())
    return raised / raised.sum()


# The post's `A=A+sm(LA×r` lost at least one bracket. For each of three readings: what is added to
# the quantities A, given the losses L and a rate r; and the default rate, found by trying.
RULES = {
    "multiplicative": (lambda A, L, r: softmax(L) * A * r, 1.0),
    "additive": (lambda A, L, r: softmax(L) * r, 400.0),
    "share": (lambda A, L, r: softmax(L) * A.sum() * r, 0.25),
}


def update(
    quantities: np.ndarray, losses: np.ndarray, rate: float, rule: str = "multiplicative"
) -> np.ndarray:
    """One step of the post's equation, by one of its readings.

    quantities A and losses L (nats per token): (K,). rate r: for `additive` a number of sequences,
    else a share. Returns the new quantities (K,). Raises InputError for an unknown rule.
    """
    if rule not in RULES:
        raise InputError(f"--rule {rule}: choose {', '.join(RULES)}")
    A = np.asarray(quantities, dtype=np.float64)
    L = np.asarray(losses, dtype=np.float64)
    added, _ = RULES[rule]
    return A + added(A, L, rate)


def reweight(runs: "Runs", history: "History", start: dict[str, int], args) -> dict[str, int]:
    """The post's loop: train on A, measure L, move A, until it stops helping.

    Returns the counts of the best round.
    """
    A = np.array([start.get(d, 0) for d in runs.train_on], dtype=np.float64)
    # A resumed search replays its rounds; losses measured before are read from its files.
    for number in range(1, args.rounds + 1):
        sequences = args.sequences
        if args.grow:
            sequences = round(A.sum())
        counts = runs.counts(A, sequences)
        # Trained on A from the base: the validation loss of each domain.
        L = runs.measure(counts, f"round {number}")
        history.add(counts, L, quantities=A.tolist())
        if number - history.best()["round"] == 2:
            say(f"stopped: the {history.objective.name} has not improved for two rounds")
            break
        A = update(A, L[runs.trained], args.rate, args.rule)  # L of domains that may have a share
    return history.best()["counts"]


# ---- soft experts ----


SOFT = 0.5  # λ: the share of an expert's sequences that are its own domain's
STEPS = 25  # that an expert takes at least, in smaller batches if need be
WINDOWS = 25  # of each domain that an expert is measured on, at least
MEASURED = 2**20  # tokens, over all domains, that are enough for that; each takes 4 bytes


class Law:
    """The losses of mixed experts: L_i(w) = -mean over i's tokens of ln Σ_k w_k exp(-ℓ_k).

    losses: every expert's loss ℓ_k of every token, {domain: (n, T)}, nats, of all D domains that
    are measured. Each of the K experts stands for a domain that may have a share; w (K,), of sum 1,
    mixes what they predict (2502.15950, section 3). known: the losses (D,) that a run has measured
    where the weights are `start`.
    """

    def __init__(self, losses: list[Losses], start: np.ndarray, known: np.ndarray):
        # By domain, (K, tokens): each expert's probability of a token, divided by the best one's;
        # the divisor does not depend on w.
        self.odds = []
        for domain in losses[0]:
            of_experts = np.stack([one[domain].ravel() for one in losses])
            self.odds.append(np.exp(of_experts.min(0) - of_experts))
        self.known = known
        self.scale = np.ones(len(known))
        self.gains_at_start = self.gains(start)

    def gains(self, w: np.ndarray) -> np.ndarray:
        """The mean log of the probability that w gives a token, over the best expert's: (D,)."""
        return np.array([np.log(w.astype(np.float32) @ odds).mean() for odds in self.odds])

    def losses(self, w: np.ndarray) -> np.ndarray:
        """Of every domain that is measured: (D,), nats per token."""
        return self.known - self.scale * (self.gains(w) - self.gains_at_start)

    def correct(self, w: np.ndarray, measured: np.ndarray) -> None:
        """Learn from a run how far losses move: short experts tell the direction, but too small a
        distance. The factor is from 1 to 5."""
        by_law = self.losses(w) - self.known
        # Two seeds differ by 0.01 nats, so smaller changes tell nothing: hence the ridge.
        ridge = 0.01**2
        scale = (by_law * (measured - self.known) + ridge) / (by_law**2 + ridge)
        self.scale = scale.clip(1, 5)

    def accounts(self, w: np.ndarray) -> np.ndarray:
        """The share of each domain's tokens that each expert accounts for: (D, K)."""
        rows = []
        for odds in self.odds:
            mixed = w.astype(np.float32) @ odds
            rows.append(w * (odds @ (1 / mixed)) / len(mixed))
        # A domain whose loss really moves `scale` times as far as predicted counts `scale` times.
        return self.scale[:, None] * np.array(rows)


def capped(w: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Weights of sum 1, none above `high`, otherwise in the proportions of w.

    If `high` adds up to 1 or less they are in its proportions instead, and may be above it.
    """
    if high.sum() <= 1:
        return (high + 1e-9) / (high + 1e-9).sum()
    w = w / w.sum()
    while (w > high + 1e-12).any():
        full = w >= high
        w = np.where(full, high, w * (1 - high[full].sum()) / w[~full].sum())
    return w


def best_weights(
    law: Law, objective: Objective, untouched: np.ndarray, high: np.ndarray, bound: float = np.inf
) -> np.ndarray:
    """The experts' weights (K,) of the least objective, none above high (K,).

    w_k ← Σ_i v_i · the share of i's tokens that expert k accounts for: expectation-maximisation
    (Dempster, Laird & Rubin 1977, section 4.3) for domains that count v (D,). bound: the most that
    a loss may exceed the untouched model's by.
    """
    v = objective.weights
    is_worst = v is None
    if is_worst:
        v = np.full(len(law.odds), 1 / len(law.odds))
    penalty = np.zeros(len(v))  # added to v for domains above the bound
    steps = 500
    if bound < np.inf:
        steps = 1000  # a bound takes longer to meet, to a thousandth of a nat
    w = capped(np.ones(len(high)), high)
    for step in range(steps):
        w = capped((v + penalty) @ law.accounts(w), high)
        rate = 10 / law.scale.max() / (1 + step / 50)  # falls, so that v and penalty come to rest
        if is_worst:
            # Exponentiated gradient: the more a domain's loss rises, the more it counts.
            change = law.losses(w) - untouched
            v = v * np.exp(rate * (change - change.max()))
            v = v / v.sum()
        elif bound < np.inf:
            # Dual ascent: a domain above the bound counts more and more, until it is below.
            change = law.losses(w) - untouched
            penalty = np.maximum(penalty + rate * (change - bound), 0)
    return w


def experts(runs: "Runs", history: "History", start: dict[str, int], args) -> dict[str, int]:
    """Soft experts (after 2502.15950): a short run for each domain tells every mixture's losses.

    Expert k is the base trained on 1/K of a pass, with a schedule of its own, in the
    proportions (1 - λ) u + λ e_k, u the start's. Weights w of what they predict stand for the
    mixture (1 - λ) u + λ w. The experts tell in which direction losses move between mixtures. A run
    on the start tells their level, and a run on the best mixture by the law how far they really
    move; of these two mixtures the better one is the result.
    """
    u = runs.shares(start)
    begun = runs.measure(start, "the start")
    history.add(start, begun, note="the start")
    law = Law(losses_of_experts(runs, start, args.expert_sequences), u, begun)
    # (1 - λ) u + λ w <= cap, solved for w: no domain is repeated more than four times.
    high = ((runs.cap - (1 - SOFT) * u) / SOFT).clip(0, 1)

    def weights_for(objective: Objective, bound: float = np.inf) -> np.ndarray:
        return best_weights(law, objective, history.untouched, high, bound)

    def mixture_of(w: np.ndarray) -> dict[str, int]:
        return runs.counts((1 - SOFT) * u + SOFT * w)

    # One end of the trade-off, the lowest objective; `free` is the largest change in any domain.
    w = weights_for(history.objective)
    found = mixture_of(w)
    note = "the best by the law"
    history.foretell(found, law.losses(w), note)
    measured = runs.measure(found, note, keep=args.spare is not None)
    free = (measured - history.untouched).max()
    history.add(found, measured, bound=free)
    law.correct(w, measured)

    # The other end, by the corrected law; `tight` is the lowest that this change can be.
    best_for_worst = weights_for(WORST)
    sparing = mixture_of(best_for_worst)
    tight = (law.losses(best_for_worst) - history.untouched).max()
    if history.objective is WORST:
        note = "the best by the law, corrected"
        history.foretell(sparing, law.losses(best_for_worst), note)
        history.add(sparing, runs.measure(sparing, note))
        return history.best()["counts"]

    # The trade-off: from the one mixture to the other.
    for bound in np.linspace(free, tight, 5)[1:]:
        w = weights_for(history.objective, bound)
        note = f"by the law alone, no domain above {bound:+.4f}"
        history.foretell(mixture_of(w), law.losses(w), note, bound=bound)
    allowed = np.inf if args.spare is None else args.spare
    if allowed >= free:
        return history.best(allowed)["counts"]  # which may be the start's
    if allowed < tight:
        say(f"warning: no mixture is predicted to hold --spare {args.spare}; the nearest is taken")
        w = best_for_worst
    else:
        w = weights_for(history.objective, allowed)
    sparing = mixture_of(w)
    note = f"by the law, to hold --spare {args.spare}"
    history.foretell(sparing, law.losses(w), note)
    history.add(sparing, runs.measure(sparing, note, keep=True))
    return history.best(allowed, also=sparing)["counts"]


def losses_of_experts(
    runs: "Runs", start: dict[str, int], sequences: int | None = None
) -> list[Losses]:
    """Train an expert for each domain; returns each one's loss of every token.

    sequences: of each expert's pass; None: the experts share one pass.
    """
    u = runs.shares(start)
    sequences = sequences or max(1, runs.sequences // len(u))
    # A few steps of a large batch would leave the experts too much alike.
    batch_size = min(runs.hyper.batch_size, math.ceil(sequences / STEPS))
    # Measuring an expert on half as many sequences as it trained on takes a sixth of the time.
    D = len(runs.domains)
    enough = MEASURED // (D * runs.hyper.seq_len)
    windows = max(WINDOWS, min(sequences // (2 * D), enough))
    size = f"{sequences} sequences, {batch_size} a step"
    say(f"{len(u)} experts, each of {size}, measured on {windows} windows a domain")
    losses = []
    for domain, only in zip(runs.train_on, np.eye(len(u)), strict=True):
        counts = runs.counts((1 - SOFT) * u + SOFT * only, sequences)
        title = f"expert {domain}"
        losses.append(runs.token_losses(counts, windows, title, batch_size=batch_size))
    return losses


# ---- the other methods ----


def fixed(runs: "Runs", history: "History", start: dict[str, int], args) -> dict[str, int]:
    """`uniform`, p = 1/K, and `natural`, p ∝ the tokens that there are: no search."""
    T = runs.hyper.seq_len
    return train.parse_mixture(args.method, runs.data, args.sequences, T, runs.train_on)


def doremi_step(
    alpha: np.ndarray, scores: np.ndarray, excess: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """α ← softmax(log α + η λ); α ← (1 - c) α + c / K (2305.10429, algorithm 1; its η and c).

    alpha: α. scores: λ of the last step. excess: max(ℓ_proxy - ℓ_ref, 0) summed over a batch's
    tokens; tokens: how many there were. All (K,). Returns the new α and λ.
    """
    rate = 1.0
    smoothing = 1e-3
    scores = scores.copy()
    seen = tokens > 0  # a domain that the batch lacks keeps its last score
    scores[seen] = excess[seen] / tokens[seen]
    raised = alpha * np.exp(rate * (scores - scores.max()))
    return (1 - smoothing) * raised / raised.sum() + smoothing / len(alpha), scores


class Proxy:
    """DoReMi's proxy while it trains: the weights α of the domains' losses, and how they move.

    reference: (n, T), the reference model's loss of every token of the pass. domains: (n,), the
    number of each sequence's domain. sampled: (K,), shares of the pass.
    """

    def __init__(self, reference: torch.Tensor, domains: np.ndarray, sampled: np.ndarray):
        K = len(sampled)
        self.reference = reference
        self.domains = domains
        self.sampled = sampled.clip(1e-9)  # a divisor: not 0 for a domain that does not occur
        self.alpha = np.full(K, 1 / K)
        self.scores = np.zeros(K)
        self.sums = np.zeros((2, K))  # of the step: excess and tokens, by domain
        self.path: list[np.ndarray] = []  # α after every step

    def weigh(
        self, step: int, rows: list[int], losses: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What `train` asks for: the loss of domain d is weighted by α_d over its share."""
        # Called for every micro-batch: with the first of a step, the step before has ended.
        if step > len(self.path):
            self.end_step(losses.device)
        excess = losses.float().cpu() - self.reference[rows]
        excess = excess.nan_to_num(0, 0).clamp(min=0).sum(1)  # clipped token by token
        domains = self.domains[rows]
        counted = weights[:, 0].cpu().numpy()  # 0 where a row only fills a micro-batch up
        for k, value, weight in zip(domains, excess.tolist(), counted, strict=True):
            self.sums[0, k] += weight * value
            self.sums[1, k] += weight * losses.shape[1]
        scale = (self.alpha / self.sampled)[domains, None]
        return weights * torch.from_numpy(scale).to(weights)

    def end_step(self, device: torch.device) -> None:
        sums = torch.from_numpy(self.sums)  # in double precision, which not every device has
        if world_size() > 1:
            sums = add_up(sums.to(device)).cpu()
        self.alpha, self.scores = doremi_step(self.alpha, self.scores, *sums.numpy())
        self.path.append(self.alpha)
        self.sums = np.zeros_like(self.sums)


def doremi(runs: "Runs", history: "History", start: dict[str, int], args) -> dict[str, int]:
    """DoReMi (2305.10429): the mean of the weights that a proxy's loss takes on.

    The reference is the base tuned on uniform. The proxy is the base tuned on uniform, too, but on
    other windows, where a domain has as many; its batch is weighted by the α of the step before.
    """
    uniform = runs.counts(np.ones(len(runs.train_on)))
    passes = [*runs.passes, train.this_pass(runs.data, runs.hyper, uniform)]
    seen = train.times_seen(runs.data, runs.hyper.seq_len, passes)
    mixture = Mixture(runs.data, uniform, runs.hyper.seq_len, runs.hyper.seed, seen)
    domains = [runs.train_on.index(mixture.domain(i)) for i in range(len(mixture))]
    reference = torch.zeros(len(mixture), runs.hyper.seq_len)

    # The reference's loss of every token of the proxy's pass, from a pass without learning.
    def record_reference(step, rows, losses, weights):
        reference[rows] = losses.float().cpu()
        return weights

    runs.train(uniform)
    runs.train_further(uniform, seen, "reference", record_reference, learning_rate=0.0)

    # The proxy: the base again, on the same sequences, with α moving after every step.
    proxy = Proxy(reference, np.array(domains), runs.shares(uniform))
    train.fill(runs.model, runs.base)
    runs.train_further(uniform, seen, "proxy", proxy.weigh)
    proxy.end_step(runs.model.device)

    # The mixture is the mean of α over the pass; ten lines show how that went.
    means = np.cumsum(proxy.path, axis=0) / np.arange(1, len(proxy.path) + 1)[:, None]
    for i in np.unique(np.linspace(0, len(means) - 1, 10).astype(int)):
        history.add(runs.counts(means[i]), step=int(i) + 1)
    return runs.counts(means[-1])


class Method(NamedTuple):
    """A way to find a mixture, and its own options: {option: arguments of add_argument}."""

    find: Callable[["Runs", "History", dict[str, int], object], dict[str, int]]
    cost: str = "not known"  # of training
    options: dict[str, dict] = {}
    is_path: bool = True  # each of its mixtures is a step from the last one
    searches: bool = True  # from --start, for --objective


REWEIGHT_OPTIONS = {
    "--rule": {"choices": RULES, "default": "multiplicative", "help": "reading of the formula"},
    "--rate": {
        "type": float,
        "metavar": "R",
        "help": "r; default: the rule's, found for 5 domains",
    },
    "--rounds": {"type": int, "metavar": "N", "default": 4, "help": "at most"},
    "--grow": {"action": "store_true", "help": "train on the quantities, as they grow"},
}

EXPERTS_OPTIONS = {
    "--expert-sequences": {"type": int, "metavar": "N", "help": "each; default: they share a pass"},
    "--spare": {
        "type": float,
        "metavar": "X",
        "help": "nats that no domain's loss may rise by, over the untouched model's",
    },
}

METHODS = {
    "uniform": Method(fixed, "no pass", searches=False),
    "natural": Method(fixed, "no pass", searches=False),
    "reweight": Method(reweight, "a pass a round, of --rounds at most", REWEIGHT_OPTIONS),
    "doremi": Method(doremi, "3 passes", searches=False),
    "experts": Method(
        experts, "a pass, which experts share, and 2 or 3", EXPERTS_OPTIONS, is_path=False
    ),
}


# ---- what a method works with ----


class Run(NamedTuple):
    """A run of `train` that is kept, in a folder named by a hash of all that determines it."""

    folder: Path
    settings: dict  # all that determines it
    counts: dict[str, int]
    hyper: Hyperparameters
    passes: list[dict]  # that the model had before


def read_run(run: Run) -> dict:
    """A run's record, run.json: empty if there is none, or a damaged one.

    Raises InputError if it is of another run.
    """
    known = {}
    with contextlib.suppress(InputError, FileNotFoundError):
        known = train.read_record(run.folder)
    if known and known["settings"] != run.settings:
        raise InputError(f"{run.folder}: its run.json is of another run; remove the folder")
    return known


def write_run(run: Run, data: Data, **more) -> None:
    passes = [*run.passes, train.this_pass(data, run.hyper, run.counts)]
    record = {"settings": run.settings, "passes": passes} | more
    prepare.write_json(run.folder / "run.json", record)


def remove_damaged(run: Run) -> None:
    """Remove a run's weights if they are not what its record says."""
    weights = run.folder / "model.safetensors"
    sha256 = read_run(run).get("sha256")
    if not weights.is_file():
        return
    # Weights appear whole; those without a hash are of a run that was killed at its very end.
    is_whole = (run.folder / "config.json").is_file()
    if is_whole and sha256:
        is_whole = sha256 == prepare.sha256_of(weights)
    if not is_whole:
        say(f"{weights} is damaged, and made anew")
        weights.unlink()


def train_once(
    model: GPTNeoX, base: str | Path | None, data: Data, run: Run, save_every: int, title: str
) -> None:
    """Turn the model, in place, into the base (None: itself) trained on a run's mixture.

    Weights that keep_run kept are loaded, if they are of this very run (else InputError) and
    undamaged.
    """
    if rank() == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        remove_damaged(run)
    barrier()  # the other ranks look only when damaged weights are gone
    if on_all_ranks((run.folder / "model.safetensors").is_file(), model.device):
        train.fill(model, run.folder)
        return
    if rank() == 0:
        write_run(run, data)
    if base is not None:
        train.fill(model, base)
    seen = train.times_seen(data, run.hyper.seq_len, run.passes)
    more = {"out": run.folder, "save_every": save_every, "title": title}
    train.train(model, data, run.counts, run.hyper, seen=seen, **more)


def keep_run(model: GPTNeoX, data: Data, run: Run) -> None:
    """Keep the model as a run's weights, and their hash in its record."""
    train.keep(model, data, run.folder)
    if rank() == 0 and "sha256" not in read_run(run):
        write_run(run, data, sha256=prepare.sha256_of(run.folder / "model.safetensors"))
    barrier()  # every rank reads a base's record: its passes decide the order of later ones


@dataclass
class Runs:
    """Mixtures to losses: each is trained from the base once, and kept.

    A run's folder is named by a hash of all that determines it (base, data, counts, hyper, code);
    it has that in its run.json, and the losses on the validation split in sequences-N.npz or, of
    every token, in tokens-N.npz, N being the most windows of a domain.
    """

    model: GPTNeoX
    base: str | Path  # a model
    base_name: str  # says which one it is
    data: Data
    hyper: Hyperparameters
    folder: Path
    sequences: int  # of a pass
    eval_sequences: int  # of a domain, at most
    save_every: int = 0
    train_on: list[str] | None = None  # domains that may have a share; None: all
    score: Callable[[np.ndarray], float] = np.mean  # of losses (D,); the lowest one's weights stay

    def __post_init__(self):
        T = self.hyper.seq_len
        self.domains = self.data.domains
        self.train_on = self.train_on or self.domains
        self.trained = [self.domains.index(d) for d in self.train_on]
        self.passes = train.passes_of(self.base)  # that the base was trained on
        self.tokens = {"trained": 0, "evaluated": 0}  # the cost, as if nothing had been kept
        self.lowest = np.inf  # score of a mixture
        self.windows = np.array([self.data.windows(d, "train", T) for d in self.train_on])
        self.cap = 4 * self.windows / self.sequences  # shares (K,) of 4 repeats (2305.16264)

    def counts(self, shares: np.ndarray, sequences: int | None = None) -> dict[str, int]:
        """Shares (K,) of train_on, in any unit, as a mixture of `sequences`; None: of a pass."""
        weights = dict(zip(self.train_on, np.asarray(shares).tolist(), strict=True))
        return rescale(weights, sequences or self.sequences)

    def shares(self, counts: dict[str, int]) -> np.ndarray:
        return np.array([counts.get(d, 0) for d in self.train_on]) / sum(counts.values())

    def run_of(self, counts: dict[str, int], **changes) -> Run:
        """The run on a mixture, whether it took place or not. changes: of hyperparameters."""
        hyper = replace(self.hyper, **changes)
        settings = {
            "base": self.base_name,
            "data": self.data.identity,
            "counts": {d: n for d, n in sorted(counts.items()) if n},
            **hyper.record(),
        }
        folder = self.folder / train.name_of(settings)
        return Run(folder, settings, counts, hyper, self.passes)

    def train(self, counts: dict[str, int], title: str = "train") -> None:
        """Make the model the base trained on the mixture, and keep it."""
        run = self.run_of(counts)
        train_once(self.model, self.base, self.data, run, self.save_every, title)
        keep_run(self.model, self.data, run)
        self.tokens["trained"] += sum(counts.values()) * self.hyper.seq_len

    def train_further(self, counts, seen, title: str, weigh, **changes) -> None:
        """Train the model as it is; nothing is kept. changes: of hyperparameters."""
        hyper = replace(self.hyper, **changes)
        train.train(self.model, self.data, counts, hyper, seen=seen, title=title, weigh=weigh)
        self.tokens["trained"] += sum(counts.values()) * hyper.seq_len

    def stop_if_asked(self) -> None:
        train.stop_if_asked(self.model.device)

    def evaluate(self, limit: int | None = None, per_token: bool = False) -> Losses:
        """The model's losses on the validation split, as `evaluate` of eval.py gives them."""
        how = (self.hyper.dtype, limit or self.eval_sequences, self.stop_if_asked, per_token)
        return evaluate(self.model, self.data, "val", self.hyper.seq_len, *how)

    def losses_of(
        self, run: Run, limit: int, title: str, per_token: bool = False, keep: bool = False
    ) -> Losses:
        """A run's losses on at most `limit` windows a domain, read from its folder or, if they are
        not there yet, trained for, measured and kept. Either way the cost is counted.

        per_token: the loss of every token. Otherwise the weights are kept, too (until keep_only),
        if they are the best so far or `keep` is set.
        """
        T = self.hyper.seq_len
        windows = [min(limit, self.data.windows(d, "val", T)) for d in self.domains]
        self.tokens["trained"] += sum(run.counts.values()) * T
        self.tokens["evaluated"] += sum(windows) * T
        kind = "sequences"
        if per_token:
            kind = "tokens"
        path = run.folder / f"{kind}-{limit}.npz"
        losses = self.kept_losses(path)
        # All ranks do the same, and none writes before all have looked.
        if not on_all_ranks(losses is not None, self.model.device):
            train_once(self.model, self.base, self.data, run, self.save_every, title)
            try:
                losses = self.evaluate(limit, per_token)
            except train.Stopped:
                keep_run(self.model, self.data, run)  # so that no step is done again
                raise
            if not per_token and (keep or self.score(domain_means(losses)) <= self.lowest):
                keep_run(self.model, self.data, run)
            if rank() == 0:
                named = {f"{d}.val": values for d, values in losses.items()}
                with prepare.replacing(path) as partial, open(partial, "wb") as file:
                    np.savez(file, run=run.folder.name, **named)
                for checkpoint in train.checkpoints(run.folder):
                    prepare.remove(checkpoint)
        barrier()
        return losses

    def kept_losses(self, path: Path) -> Losses | None:
        """The losses in a file, if it is there, sound, and of the run in whose folder it lies."""
        # A damaged file may raise anything; such losses are measured again.
        with contextlib.suppress(Exception), np.load(path) as found:
            if found["run"] == path.parent.name:
                return {d: found[f"{d}.val"] for d in self.domains}
        return None

    def measure(self, counts: dict[str, int], title: str = "run", keep: bool = False) -> np.ndarray:
        """The mixture's losses (D,). title: of its bar. keep: keep its weights in any case."""
        losses = self.losses_of(self.run_of(counts), self.eval_sequences, title, keep=keep)
        means = domain_means(losses)
        self.lowest = min(self.lowest, self.score(means))
        return means

    def token_losses(self, counts: dict[str, int], limit: int, title: str, **changes) -> Losses:
        """The mixture's loss of every token. changes: of hyperparameters."""
        return self.losses_of(self.run_of(counts, **changes), limit, title, per_token=True)

    def keep_only(self, *mixtures: dict[str, int]) -> None:
        """Remove the weights and checkpoints of all other mixtures; their losses stay."""
        kept = [self.run_of(counts).folder for counts in mixtures]
        if rank() == 0:
            for pattern in ("*/model.safetensors", "*/checkpoint-*"):
                for path in self.folder.glob(pattern):
                    if path.parent not in kept:
                        prepare.remove(path)


class History:
    """The mixtures that were tried, in their order, as lines of history.jsonl and of the log.

    windows: how many a domain has to train on. untouched: the base's losses (D,), of all domains.
    objective: what a mixture is judged by.
    """

    def __init__(
        self, path: Path, windows: dict[str, int], untouched: dict[str, float], objective: Objective
    ):
        self.path = path
        self.windows = windows
        self.domains = list(untouched)
        self.untouched = np.array(list(untouched.values()))
        self.objective = objective
        self.lines: list[dict] = []

    @classmethod
    def read(cls, path: Path, objective: Objective) -> "History":
        """What a finished search has left."""
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        history = cls(path, {}, lines[0]["losses"], objective)
        history.lines = lines
        return history

    def begin(self) -> None:
        """Say the head of the table, and add the untouched model's line."""
        say("", "share of the mixture and validation loss, nats per token")
        D = len(self.domains)
        width = 17
        if D > 5:
            width = 11
        head = "".join(f"{d:>{width}}" for d in prepare.shortened(self.domains, width - 1).values())
        if D > 8:
            head = "  the largest moves from the first mixture"
        say(f"{'round':>5}{self.objective.name:>7}{head}")
        self.add(None, self.untouched)

    def score(self, losses: np.ndarray) -> float:
        """The objective of losses (D,): a weighted mean, or the largest change."""
        if self.objective.weights is None:
            losses = losses - self.untouched
        return float(self.objective.of(losses))

    def add(self, counts: dict[str, int] | None, losses: np.ndarray | None = None, **more) -> None:
        """Note a mixture, its validation losses (D,) if they were measured, and more."""
        line = {"round": len(self.lines), "counts": counts}
        line |= {"objective": None, "mean": None, "worst": None, "losses": None}
        if losses is not None:
            line["objective"] = self.score(losses)
            line["mean"] = float(losses.mean())
            line["worst"] = float((losses - self.untouched).max())
            line["losses"] = dict(zip(self.domains, losses.tolist(), strict=True))
        line |= more
        self.lines.append(line)
        if rank() == 0:
            prepare.write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        say(self.words(line))

    def foretell(self, counts: dict[str, int], losses: np.ndarray, note: str, **more) -> None:
        """Note a mixture whose losses (D,) are predicted."""
        note = f"{note}: {self.objective.name} {self.score(losses):.4f} predicted"
        self.add(counts, note=note, predicted=losses.tolist(), **more)

    def words(self, line: dict) -> str:
        """A line of the table, within 100 columns, and below it what else there is to say."""
        text = f"{line['round']:>4}{'':>8}"
        if line["losses"]:
            text = f"{line['round']:>4}{line['objective']:>8.4f}"
        counts = line["counts"] or {}
        if len(self.domains) <= 8:
            text += "".join(self.cell(line, d) for d in self.domains)
        elif counts and len(self.lines) > 2:
            text += self.moves(counts)
        below = []
        if "note" in line:
            below.append(line["note"])
        again = self.round_of(counts)
        if again is not None and again < line["round"]:
            below.append(f"as round {again}")
        foretold = [one for one in self.lines if "predicted" in one and one["counts"] == counts]
        if line["losses"] and foretold:
            score = self.score(np.array(foretold[-1]["predicted"]))
            below.append(f"{score:.4f} was predicted")
        times = {d: n / self.windows[d] for d, n in counts.items() if n > self.windows.get(d, n)}
        ranked = sorted(times, key=times.get, reverse=True)
        if times:
            below.append(prepare.first_of([f"{d} {times[d]:.1f} times" for d in ranked]))
        text = text.rstrip()
        if below:
            text += f"\n{'':>12}  {', '.join(below)}"
        return text

    def cell(self, line: dict, domain: str) -> str:
        """A domain's share and loss, as far as they are known; shorter for more than five."""
        share = ""
        loss = ""
        digits = 4
        if len(self.domains) > 5:
            digits = 3
        if line["counts"]:
            part = line["counts"].get(domain, 0) / sum(line["counts"].values())
            share = f"{part:.{digits - 3}%}"
        if line["losses"]:
            loss = f"{line['losses'][domain]:.{digits}f}"
        if digits == 3:
            return f"{share:>5}{loss:>6}"
        return f"{share:>9}{loss:>8}"

    def moves(self, counts: dict[str, int]) -> str:
        """The four domains whose shares are the farthest from the first mixture's."""
        first = self.lines[1]["counts"]
        share = {d: counts.get(d, 0) / sum(counts.values()) for d in self.domains}
        moved = {d: share[d] - first.get(d, 0) / sum(first.values()) for d in self.domains}
        largest = sorted(moved, key=lambda d: -abs(moved[d]))[:4]
        short = prepare.shortened(self.domains, 12)
        return "".join(f"  {short[d]} {share[d]:.1%}" for d in largest)

    def measured(self) -> list[dict]:
        """The lines of mixtures whose losses are known."""
        return [line for line in self.lines if line["counts"] and line["losses"]]

    def changes(self, line: dict) -> np.ndarray:
        """A mixture's changes (D,) from the untouched model's losses: measured, else predicted."""
        losses = line.get("predicted")
        if line["losses"]:
            losses = list(line["losses"].values())
        return np.array(losses) - self.untouched

    def best(self, bound: float = np.inf, also: dict[str, int] | None = None) -> dict:
        """The line with the lowest objective; the earlier one of equals.

        bound: only lines in which no domain's loss rises by more, and those of the mixture `also`.
        """
        lines = [
            line for line in self.measured() if line["worst"] <= bound or line["counts"] == also
        ]
        return min(lines, key=lambda line: line["objective"])

    def round_of(self, counts: dict[str, int]) -> int | None:
        """The first round that measured this mixture."""
        for line in self.measured():
            if line["counts"] == counts:
                return line["round"]
        return None


# ---- the base ----


def lopsided(data: Data, sequences: int) -> dict[str, int]:
    """A mixture that leaves something missing: by size, halved for every domain that is larger."""
    sizes = {d: data.size(d, "train")["tokens"] for d in data.domains}
    ranked = sorted(sizes, key=lambda d: (-sizes[d], d))
    return rescale({d: sizes[d] / 2**i for i, d in enumerate(ranked)}, sequences)


def pretrain(model: GPTNeoX, data: Data, hyper: Hyperparameters, args) -> Path:
    """Pretrain random weights briefly, in place, on a lopsided mixture; returns their folder.

    It is named by a hash of all that determines it, and used again where that is the same.
    """
    peak = args.base_lr or train.defaults(args.model, model.config)["base_learning_rate"]
    hyper = replace(hyper, learning_rate=peak, warmup=0.1)
    counts = lopsided(data, args.base_sequences)
    settings = {"model": args.model, "data": data.identity, "counts": counts, **hyper.record()}
    size = args.model.removeprefix("scratch:")
    folder = Path(args.out).parent / f"base-{size}-{train.name_of(settings)}"
    say(f"base    {folder}, lr {peak:g}, from {args.base_sequences:,} sequences:")
    say(f"        {train.counts_words(counts)}")
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            # Another search may be making it: one that is nearly done is waited for.
            is_near = (folder / "model.safetensors").is_file()
            way_out = "wait until it has pretrained that base"
            stack.enter_context(prepare.locked(folder / ".lock", folder, is_near, way_out))
        run = Run(folder, settings, counts, hyper, passes=[])
        train_once(model, None, data, run, args.save_every, "pretrain")
        keep_run(model, data, run)
    return folder


def base_of(model: GPTNeoX, data: Data, hyper: Hyperparameters, args) -> tuple[str | Path, str]:
    """The model that every run starts from, pretrained if it is scratch; and what identifies it."""
    if args.model.startswith("scratch:"):
        folder = pretrain(model, data, hyper, args)
        return folder, folder.name
    # A folder is identified by its files, whose hashes the first rank has recorded; a model of the
    # hub by its name, which has the commit.
    settings = train.read_record(args.out)["settings"]
    return args.model, str(settings["model's files"] or args.model)


# ---- the comparison ----


def comparison(runs: Runs, counts: dict[str, int], method: str, objective: Objective) -> dict:
    """Untouched, uniform and the mixture found, on the test split; the model ends as the last one.

    Uniform has as many sequences. `difference` is the losses of the mixture found minus uniform's;
    `judged` the same for the objective, `sure` without domains of too few documents.
    """
    data = runs.data
    T = runs.hyper.seq_len
    uniform = runs.counts(np.ones(len(runs.train_on)), sum(counts.values()))
    title = {"reweight": "reweighted"}.get(method, method)
    losses = {}
    for name, mixture in {"untouched": None, "uniform": uniform, title: counts}.items():
        if mixture == uniform and "uniform" in losses:
            losses[name] = losses["uniform"]
            continue
        if mixture is None:
            train.fill(runs.model, runs.base)
        else:
            runs.train(mixture, name)
        dtype = runs.hyper.dtype
        losses[name] = evaluate(runs.model, data, "test", T, dtype, None, runs.stop_if_asked)
    result = results(losses, data, "test", T, objective)
    three = [losses[name] for name in ("untouched", "uniform", title)]
    result["difference"] = compare(three[1], three[2], data, "test", T)
    result["judged"] = judge(*three, data, "test", T, objective) | {"objective": objective.name}
    sure = [d for d, n in result["domains"].items() if n["documents"] >= FEW_DOCUMENTS]
    result["sure"] = None
    if objective.only(runs.domains, sure):
        of_sure = [{d: one[d] for d in sure} for one in three]
        result["sure"] = judge(*of_sure, data, "test", T, objective.only(runs.domains, sure))
    return result


def verdict(result: dict) -> str:
    """How the mixture found compares with uniform, in words."""
    difference = result["difference"]
    name = list(result["models"])[-1]
    low, high = result["judged"]["interval"]
    if name == "uniform":
        return "uniform: nothing was searched"
    if low == high == 0:
        return f"{name} is uniform: no other mixture was better"
    words = "not distinguishable from"
    if high < 0:
        words = "better than"
    if low > 0:
        words = "worse than"
    few = ""
    is_sure = False
    if result["sure"]:
        low, high = result["sure"]["interval"]
        is_sure = high < 0 if words == "better than" else low > 0
    if words != "not distinguishable from" and not is_sure:
        words = "not distinguishable from"
        few = f" (what differs are domains of fewer than {FEW_DOCUMENTS} documents)"
    better = f"better in {difference['improved']} of {len(result['domains'])} domains"
    what = ""
    if result["judged"]["objective"] != "mean":
        what = f" ({result['judged']['objective']})"
    change = signed(result["judged"])
    return f"{name} - uniform{what}: {change} nats, {better}:\n{words} uniform, by this seed{few}"


def draw(out: Path, objective: Objective, is_path: bool) -> None:
    """Draw mix.png of a finished search: by round the mixtures and the changes of loss and, where
    the method predicts losses, the trade-off."""
    from matplotlib.figure import Figure

    history = History.read(out / "history.jsonl", objective)
    found = prepare.load_json(out / "mix.json")["round"]
    spared = [line for line in history.lines if "bound" in line]
    if history.objective is WORST:  # which has no trade-off
        spared = []
    panels = 3 if spared else 2
    # Not by pyplot, which keeps every figure that is not closed.
    figure = Figure(figsize=(5 * panels, 4.2), layout="constrained")
    left, right, *others = figure.subplots(1, panels)
    draw_rounds(history, is_path, left, right)
    for axes in (left, right):
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_xlim(0.5, len(history.lines) - 0.5)
        axes.axvline(found, color="0.88", linewidth=10, zorder=0, label="mixture found")
    if spared:
        right.set_xlabel("round (hollow: predicted)")
        draw_trade_off(history, spared, history.lines[found], others[0])
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    with prepare.replacing(out / "mix.png") as partial:
        figure.savefig(partial, dpi=120, format="png")


def draw_trade_off(history: History, spared: list[dict], taken: dict, axes) -> None:
    """What it costs to spare the domain that pays most; taken: the line of the mixture found."""
    changes = [history.changes(line) for line in spared]
    scores = [history.objective.of(change) for change in changes]
    axes.plot([change.max() for change in changes], scores, "k.-")
    found = history.changes(taken)
    axes.plot(found.max(), history.objective.of(found), "o", color="0.8", markersize=12, zorder=0)
    axes.set_title("From the untouched model")
    axes.set_xlabel("largest change of a domain (measured; else predicted)")
    axes.set_ylabel(f"change of the {history.objective.name}")
    axes.locator_params(axis="x", nbins=6)


def draw_rounds(history: History, is_path: bool, left, right) -> None:
    """Left: the shares of every mixture. Right: changes of loss from the first mixture's.

    Mixtures differ much less from each other than from the untouched model, whose change is only
    told in the title. If only one mixture was measured: changes from the untouched model's.
    """
    mixtures = history.lines[1:]
    measured = history.measured()
    foretold = [line for line in mixtures if "predicted" in line]
    first = np.array(list(measured[0]["losses"].values()))
    counts = measured[0]["counts"].values()
    even = len(counts) == len(history.domains) and max(counts) - min(counts) <= 1
    start = "uniform" if even else "the first mixture"
    title = f"Validation loss (untouched: {(history.untouched - first).mean():+.3f} in the mean)"
    if len(measured) == 1:
        first = history.untouched
        start = "untouched"
        title = "Validation loss"
    changes = np.array([list(line["losses"].values()) for line in measured]) - first
    rounds = [line["round"] for line in measured]
    # A legend has room for 20 names: those of the domains that changed most.
    most = np.argsort(-np.abs(changes).max(0), kind="stable")[:20]
    labels = prepare.shortened(history.domains, 20)
    for k, d in enumerate(history.domains):
        style = {"color": f"C{k % 10}", "marker": "os^Dv"[k // 10 % 5]}
        style["linestyle"] = "-" if is_path else ""
        shares = [100 * m["counts"].get(d, 0) / sum(m["counts"].values()) for m in mixtures]
        left.plot([line["round"] for line in mixtures], shares, **style)
        right.plot(rounds, changes[:, k], label=labels[d] if k in most else None, **style)
        guesses = [line["predicted"][k] - first[k] for line in foretold]
        right.plot([line["round"] for line in foretold], guesses, mfc="none", **style)
    of_mean = "k--" if is_path and len(measured) > 1 else "k_"
    right.plot(rounds, changes.mean(1), of_mean, lw=2, label="mean")
    right.axhline(0, color="0.7", linewidth=1, zorder=0)
    left.set(title="The mixture", ylabel="share of the sequences (%)")
    left.set_ylim(0, 1.1 * left.dataLim.ymax)
    right.set(title=title, ylabel=f"change from {start}, nats per token")


def write_results(
    runs: Runs, history: History, counts: dict[str, int], cost: dict, result: dict, args
) -> None:
    """The mixture, the table's numbers and the model's card."""
    out = Path(args.out)
    mixture = {
        "counts": counts,
        "unit": "sequences",
        "seq_len": runs.hyper.seq_len,
        "round": history.round_of(counts),
        "tokens": cost,
        "method": args.method,
        "objective": args.objective,
        "seed": args.seed,
        "data": args.data,
        "model": args.model,
    }
    law = [line for line in history.lines if "predicted" in line]
    if law:
        mixture["predicted"] = [{key: line[key] for key in ("counts", "predicted")} for line in law]
    prepare.write_json(out / "mix.json", mixture | own_options(args))
    prepare.write_json(out / "result.json", result)
    passes = [*runs.passes, train.this_pass(runs.data, runs.hyper, counts)]
    prepare.write_json(out / "run.json", train.read_record(out) | {"passes": passes})
    how = f"--method {args.method}"
    if METHODS[args.method].searches:
        how += f" --objective {args.objective}"
    found = f", found by `{how}`"
    train.write_card(out, args.model, runs.passes, runs.data, counts, runs.hyper, result, found)


# ---- main ----


def own_options(args) -> dict:
    """The options of the method that was chosen, by their names in Python."""
    return {name: vars(args)[name] for name in map(attribute, METHODS[args.method].options)}


def search_settings(args) -> dict:
    """Options that a resumed search must have in common with the one that was begun."""
    settings = own_options(args)
    for name in ("method", "objective", "sequences", "eval_sequences", "base_sequences", "base_lr"):
        settings[name] = vars(args)[name]
    return settings


def attribute(option: str) -> str:
    """An option's name in Python: of --expert-sequences, expert_sequences."""
    return option[2:].replace("-", "_")


def begin_history(runs: Runs, path: Path, objective: Objective) -> History:
    """A search's history, which begins with the untouched model; that is measured here."""
    train.fill(runs.model, runs.base)
    untouched = runs.evaluate()
    runs.tokens["evaluated"] += sum(map(len, untouched.values())) * runs.hyper.seq_len
    measured = results({"untouched": untouched}, runs.data, "val", runs.hyper.seq_len)["domains"]
    few = [d for d, n in measured.items() if n["documents"] < FEW_DOCUMENTS]
    if few:
        words = f"fewer than {FEW_DOCUMENTS} documents are measured of {prepare.first_of(few)}"
        ways = "prepare with a larger --val-fraction"
        there_are = [runs.data.windows(d, "val", runs.hyper.seq_len) for d in few]
        if max(there_are) > runs.eval_sequences:
            ways += ", or raise --eval-sequences"
        say(f"warning: {words}; {ways}")
    windows = dict(zip(runs.train_on, runs.windows.tolist(), strict=True))
    means = dict(zip(runs.domains, domain_means(untouched).tolist(), strict=True))
    history = History(path, windows, means, objective)
    runs.score = history.score
    history.begin()
    return history


def parse_train_on(text: str | None, data: Data) -> list[str]:
    """--train-on as a list of domains, by default all. Raises InputError."""
    if text is None:
        return data.domains
    domains = sorted({d.strip() for d in text.split(",")})
    for d in domains:
        if d not in data.domains:
            raise InputError(f"--train-on: no domain {d!r}; there are {', '.join(data.domains)}")
    return domains


def parse_start(args, data: Data, seq_len: int, train_on: list[str]) -> dict[str, int]:
    """--start as counts of these domains; a file in args.start becomes them. Raises InputError."""
    how = (args.sequences, seq_len, train_on, "--start")
    first = train.parse_mixture(args.start, data, *how)
    if not any(first.get(d) for d in train_on) or any(first[d] for d in first.keys() - train_on):
        raise InputError(f"--start {args.start}: name no other domains there than --train-on")
    args.start = train.as_option(args.start, first)
    return first


def make_parser() -> prepare.ArgumentParser:
    parser = prepare.ArgumentParser(__doc__)
    train.add_options(parser, "out/mix")
    add = parser.add_argument
    add("--method", choices=METHODS, default="reweight", help="how to find the mixture")
    lowers = "what counts: mean, worst (the largest change) or weights, arxiv=2,web=1; experts "
    lowers += "minimise it, reweight takes its best round by it, the verdict is of it"
    add("--objective", default="mean", help=lowers)
    add("--train-on", metavar="A,B", help="domains that may have a share; all are measured")
    add("--start", default="uniform", help="the first mixture, like train.py's --mix")
    pretraining = "to pretrain scratch:SIZE on"
    add("--base-sequences", type=int, metavar="N", default=6400, help=pretraining)
    add("--base-lr", type=float, help="peak learning rate of that; default: the model's")
    added = set()
    for name, method in METHODS.items():
        new = {option: how for option, how in method.options.items() if option not in added}
        if new:
            group = parser.add_argument_group(f"of --method {name}")
        for option, how in new.items():
            group.add_argument(option, **how)
        added |= new.keys()
    parser.set_defaults(sequences=1600)
    return parser


def parse_args():
    parser = make_parser()
    args = train.parse_args(parser)
    for name, method in METHODS.items():
        for option in method.options.keys() - METHODS[args.method].options.keys():
            if vars(args)[attribute(option)] != parser.get_default(attribute(option)):
                raise InputError(f"{option} is of --method {name}, not of {args.method}")
    if args.start != parser.get_default("start") and not METHODS[args.method].searches:
        able = [name for name, method in METHODS.items() if method.searches]
        raise InputError(f"--start is of --method {' or '.join(able)}, not of {args.method}")
    prepare.check_range(args, ("rounds", "expert_sequences"), 1)
    prepare.check_range(args, ("base_sequences",), 1, 10**8)
    prepare.check_range(args, ("rate", "base_lr"), 1e-9, 10**9)
    prepare.check_range(args, ("spare",), -(10**9), 10**9)
    if args.spare is not None and args.objective == "worst":
        raise InputError("--spare: --objective worst spares as much as it can; give one of them")
    if args.rate is None and "--rate" in METHODS[args.method].options:
        args.rate = RULES[args.rule][1]
    return args


def main():
    args = parse_args()
    out = Path(args.out)
    clock = {"began": time.perf_counter()}
    device = start(args.device)
    is_there = (Path(args.data) / "meta.json").exists()
    if args.data == prepare.SAMPLE and not is_there and rank() == 0:
        prepare.prepare(args.data)
    barrier()
    clock["sample"] = time.perf_counter()

    # All that can be checked, before anything is trained.
    data, hyper = train.set_up(args)
    objective = parse_objective(args.objective, data.domains)
    train_on = parse_train_on(args.train_on, data)
    first = parse_start(args, data, hyper.seq_len, train_on)

    settings = train.settings_of(args, data, hyper)
    settings |= {"start": first, "train_on": train_on} | search_settings(args)
    model = train.load_to_train(args, data, hyper.dtype, device)
    train.say_cost(model, hyper, args.sequences, device)
    say(f"search  {args.method}: {METHODS[args.method].cost}; then up to 2 to compare")
    if args.dry_run:
        finish()
        return
    own_files = (*train.OWN_FILES, "history.jsonl", "mix.json", "mix.png", "runs")
    goes_on = train.is_run(out)
    with train.claim(out, args, settings, [], own_files), train.stoppable():
        if not (out / "model.safetensors").is_file():
            base, base_name = base_of(model, data, hyper, args)
            clock["base"] = time.perf_counter()
            sizes = (args.sequences, args.eval_sequences, args.save_every)
            runs = Runs(model, base, base_name, data, hyper, out / "runs", *sizes, train_on)
            history = begin_history(runs, out / "history.jsonl", objective)
            counts = METHODS[args.method].find(runs, history, first, args)
            cost = dict(runs.tokens)
            if history.round_of(counts) is None:
                history.add(counts, runs.measure(counts, "the mixture found", keep=True))
            # The comparison needs no other mixtures.
            uniform = runs.counts(np.ones(len(train_on)), sum(counts.values()))
            runs.keep_only(uniform, counts)
            clock["search"] = time.perf_counter()
            result = comparison(runs, counts, args.method, objective)
            if rank() == 0:
                write_results(runs, history, counts, cost, result, args)
            clock["comparison"] = time.perf_counter()
        # Last, because the weights make the run a finished one.
        train.keep(model, data, out, getattr(torch, args.save_dtype))
    # Also if the search was finished before.
    if rank() == 0:
        with train.decorating(out / "mix.png"):
            draw(out, objective, METHODS[args.method].is_path)
        result = prepare.load_json(out / "result.json", RESULT)
        say("", f"test split, {result['seq_len']} tokens a sequence", table(result))
        say(verdict(result), *whether_spared(result, args), "")
        say(f"{out} holds the mixture (mix.json), the picture (mix.png) and the model")
        say(wall_time(clock, goes_on and args.resume), *next_steps(args, result))
    finish()


def whether_spared(result: dict, args) -> list[str]:
    """Whether --spare held on the test split."""
    spare = own_options(args).get("spare")
    if spare is None:
        return []
    difference = list(result["models"].values())[-1]["difference"]
    domain = max(result["domains"], key=lambda d: difference[d]["change"])
    held = "did not hold"
    if difference[domain]["change"] <= spare:
        held = "held"
    return [f"--spare {spare} {held} on the test split: {domain} {signed(difference[domain])}"]


def next_steps(args, result: dict) -> list[str]:
    """Commands that are worth a try now."""
    parser = make_parser()
    given = {name: x for name, x in vars(args).items() if x != parser.get_default(name)}
    out = str(Path(args.out))  # without a slash at its end
    steps = [f"next    python {prepare.beside('model.py')} {shlex.quote(out)} 'def main('"]
    if re.match(r"EleutherAI/pythia-\d+m", args.model):
        # Keep those of the search's options that train.py has, too, and that suit a larger model.
        of_train = prepare.ArgumentParser("")
        train.add_options(of_train, "")
        known = vars(of_train.parse_args([]))
        larger = {"data": args.data, "model": "pythia-1b", "mix": f"{out}/mix.json"}
        larger["out"] = f"{out}-larger"
        dropped = {*larger, *train.NOT_KEPT, "sequences", "lr", "micro_batch_size"}
        larger |= {name: x for name, x in given.items() if name in known and name not in dropped}
        words = train.words_of(larger)
        launcher = shlex.join(train.launcher(words))
        steps = [f"next    {launcher} {prepare.beside('train.py')} {shlex.join(words)}"]
    if args.method == "reweight" and "better than" not in verdict(result):
        # docs/scoreboard.md: experts are better than uniform on three data sets. Suggest them, with
        # the options of this search.
        dropped = {"method", *train.NOT_KEPT, *own_options(args)}
        same = {name: x for name, x in given.items() if name not in dropped}
        words = ["--method", "experts", "--out", f"{out}-experts", *train.words_of(same)]
        steps.append(f"better  {shlex.join([*train.launcher(words), sys.argv[0], *words])}")
    return steps


def wall_time(clock: dict[str, float], resumed: bool) -> str:
    """What each stage took, by the times at which they ended; if resumed, since then."""
    ends = list(clock.values())
    stages = zip(list(clock)[1:], np.diff(ends), strict=True)
    # A stage that took no time did not take place.
    parts = "".join(f"{name} {seconds:.0f} s, " for name, seconds in stages if seconds >= 0.5)
    since = ""
    if resumed:
        since = " since it was resumed"
    return f"wall time{since}: {parts}all {ends[-1] - ends[0]:.0f} s"


if __name__ == "__main__":
    prepare.cli(main, train.RESUME_HINT)
