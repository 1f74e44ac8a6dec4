"""Diminishing returns: a law of each domain's loss, fitted to 2K + 1 trained runs.

The scoreboard has a row for this method, which `experts` does without most of its runs.
"""

from collections.abc import Callable

import numpy as np

from eval import Objective
from mix import History, Method, Runs
from model import say


def emphasis(changes: np.ndarray, objective: Objective) -> np.ndarray:
    """∂ objective / ∂ losses, (K,). changes: (K,), from the untouched model's losses.

    The largest change, for `worst`, is smoothed over 0.01 nats.
    """
    if objective.weights is not None:
        return objective.weights
    raised = np.exp((changes - changes.max()) / 0.01)
    return raised / raised.sum()


def descend(
    slopes: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    steps: int,
) -> list[np.ndarray]:
    """Minimise a function of shares, low <= w <= high, by exponentiated gradient.

    w ← w ⊙ exp(-η ∇F), normalised, η = 1 / √step (Kivinen & Warmuth 1997, section 3). slopes(w):
    ∇F. All are (K,). Returns the path of w.
    """
    path = [start]
    for step in range(steps):
        slope = slopes(path[-1])
        w = path[-1] * np.exp(np.clip((slope.mean() - slope) / np.sqrt(step + 1), -1, 1))
        for _ in range(50):  # until both hold
            before = w
            w = np.clip(w / w.sum(), low, high)
            if (w == before).all():
                break
        path.append(w / w.sum())
    return path


def returns(runs: Runs, history: History, start: dict[str, int], args) -> dict[str, int]:
    """Diminishing returns: L_i(p) = a_i - Σ_k B_ki ln p_k, by least squares through trained runs.

    The mean loss is least where p_k ∝ Σ_i B_ki: a domain's share is what it gives, like the
    exponents of Cobb & Douglas (1928). The runs are the start p and, for each domain k,
    (3 p + e_k) / 4; then K more around the minimum. No share falls below a quarter of its start.
    """
    first = runs.shares(start)
    p = first
    mixtures = [start]
    notes = ["the start"]
    logs = []
    losses = []
    for _ in range(2):
        # A quarter more of one domain, for each, around what is the best by now.
        mixtures += [runs.counts(3 * p + only) for only in np.eye(len(p))]
        notes += [f"probe: more {domain}" for domain in runs.domains]
        for counts, note in list(zip(mixtures, notes, strict=True))[len(losses) :]:
            losses.append(runs.measure(counts, note))
            shares = runs.shares(counts).clip(0.5 / args.sequences)
            logs.append([1, *np.log(shares)])
            history.add(counts, losses[-1], note=note)
        # One least-squares problem a domain, all with the same runs.
        fitted = np.linalg.lstsq(np.array(logs), np.array(losses), rcond=None)[0]
        a = fitted[0]
        B = -fitted[1:]
        slopes = returns_slopes(a - history.untouched, B, history.objective)
        p = descend(slopes, first, first / 4, runs.cap, 1000)[-1]
        predicted = a - np.log(p) @ B
        note = f"the law's minimum: mean {predicted.mean():.4f} predicted"
        law = {"predicted": predicted.tolist(), "a": a.tolist(), "B": B.tolist()}
        history.add(runs.counts(p), note=note, **law)
    error = np.abs(np.array(logs) @ fitted - np.array(losses)).mean()
    say(f"the law fits {len(losses)} runs to {error:.4f} nats; its minimum is taken, not the best")
    say("run, whose lead may be its seed's")
    return runs.counts(p)


def returns_slopes(a: np.ndarray, B: np.ndarray, objective: Objective):
    """∇ of the objective by the law of `returns`, a (K,) being less the untouched losses."""

    def slopes(p: np.ndarray) -> np.ndarray:
        return -B @ emphasis(a - np.log(p) @ B, objective) / p

    return slopes


RETURNS = Method(returns, "two passes a domain, and one", is_path=False)
