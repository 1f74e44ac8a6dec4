"""OP-Mix (2605.15220) by gradient: merged experts stand in for trained mixtures; in one process.

Of merged weights the loss costs one evaluation at any mixture, and its slope one backward pass.
The scoreboard has a row for this method, and says how well the stand-in ranks trained mixtures.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector

from eval import domain_means, evaluate, evaluated_windows
from mix import History, Method, Runs
from model import autocast, enough_memory, sequences_at_once
from returns import descend, emphasis
from train import fill


class StandIn:
    """θ(w) = θ_0 + Σ_k w_k τ_k in the model's place. base: θ_0 (P,). experts: τ (K, P)."""

    def __init__(self, runs: Runs, base: torch.Tensor, experts: torch.Tensor):
        self.runs = runs
        self.base = base
        self.experts = experts

    def place(self, w: np.ndarray) -> None:
        """Make the model θ(w). w: shares (K,)."""
        merged = self.base + torch.from_numpy(w).to(self.base) @ self.experts
        parameters = list(self.runs.model.parameters())
        parts = merged.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.detach().copy_(part.view_as(p))

    def losses(self, weights: np.ndarray, part: int, parts: int) -> np.ndarray:
        """The model's loss (K,) on every parts-th validation window, from `part` on.

        Leaves the gradient of Σ_d weights_d L_d in the parameters.
        """
        runs = self.runs
        T = runs.hyper.seq_len
        runs.model.zero_grad()
        losses = []
        for weight, domain in zip(weights, runs.domains, strict=True):
            windows = evaluated_windows(runs.data, domain, "val", T, runs.eval_sequences)
            windows = part_of(windows, part, parts)
            total = 0.0
            for tokens, counted in batches(runs, domain, windows):
                what = f"{len(tokens)} sequences of {T} tokens"
                remedy = "try --activation-checkpointing"
                with autocast(tokens.device, runs.hyper.dtype), enough_memory(what, remedy):
                    of_rows = runs.model(tokens[:, :-1], tokens[:, 1:])[:counted]
                    loss = of_rows.sum() / (len(windows) * T)
                    (loss * weight).backward()
                total += loss.item()
            losses.append(total)
            runs.tokens["trained"] += len(windows) * T  # they have a backward pass, too
        return np.array(losses)

    def slopes(self) -> np.ndarray:
        """∂L/∂w_k = ⟨∇L(θ(w)), τ_k⟩ (K,), L being what `losses` left the gradient of."""
        gradient = parameters_to_vector(p.grad for p in self.runs.model.parameters())
        return (self.experts @ gradient).double().cpu().numpy()


def part_of(values: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Every parts-th one, from `part` on; at least one."""
    return values[part % len(values) :: parts]


def batches(runs: Runs, domain: str, windows: np.ndarray) -> Iterator[tuple[torch.Tensor, int]]:
    """Validation windows as tokens (B, T + 1), and how many of the rows count."""
    T = runs.hyper.seq_len
    device = next(runs.model.parameters()).device
    fits = sequences_at_once(runs.model, T, runs.hyper.dtype, device, training=True)
    B = min(runs.hyper.batch_size, fits)
    for i in range(0, len(windows), B):
        counted = windows[i : i + B]
        full = np.resize(counted, B)  # always B rows, so that a compiled model sees one shape
        rows = [runs.data.window(domain, "val", T, number) for number in full]
        yield torch.from_numpy(np.stack(rows).astype(np.int64)).to(device), len(counted)


def stand_in(runs: Runs, history: History, start: dict[str, int]) -> StandIn:
    """Train the experts: τ_k is s times how far 1/K of a pass on domain k goes from the base.

    s brings θ(start) as near as can be to a run on the start, which is noted.
    """
    fill(runs.model, runs.base)
    base = parameters_to_vector(runs.model.parameters()).detach()

    def way(counts: dict[str, int]) -> torch.Tensor:
        runs.train(counts)
        return parameters_to_vector(runs.model.parameters()).detach() - base

    target = way(start)
    measured = runs.evaluate()
    runs.tokens["evaluated"] += sum(map(len, measured.values())) * runs.hyper.seq_len
    losses = domain_means(measured)
    one = max(1, runs.sequences // len(runs.domains))
    experts = torch.stack([way({d: one}) for d in runs.domains])
    merged = torch.from_numpy(runs.shares(start)).to(base) @ experts
    scale = (target @ merged / (merged @ merged)).item()
    history.add(start, losses, scale=scale)
    return StandIn(runs, base, scale * experts)


def merge(runs: Runs, history: History, start: dict[str, int], args) -> dict[str, int]:
    """Descend on the stand-in's loss; every step takes another part of the validation windows.

    With Olmix's pull to the start, and its cap on repeats (2602.12237).
    """
    steps = 12
    pull = 0.05
    hyper = runs.hyper
    fill(runs.model, runs.base)
    limit = runs.eval_sequences
    untouched = evaluate(runs.model, runs.data, "val", hyper.seq_len, hyper.dtype, limit)
    stand = stand_in(runs, history, start)
    first = runs.shares(start)
    changes = np.array(list(history.lines[-1]["losses"].values())) - history.untouched
    numbers = iter(range(steps))

    def slopes(w: np.ndarray) -> np.ndarray:
        nonlocal changes
        step = next(numbers)
        stand.place(w)
        losses = stand.losses(emphasis(changes, history.objective), step, steps)
        before = [part_of(values, step, steps).mean() for values in untouched.values()]
        changes = losses - before
        return stand.slopes() + pull * np.log(w / first)

    path = descend(slopes, first, np.full(len(first), 1e-4), runs.cap, steps)
    for w in path[1:]:
        history.add(runs.counts(w))
    runs.model.zero_grad()
    return runs.counts(path[-1])


MERGE = Method(merge, "3 passes")
