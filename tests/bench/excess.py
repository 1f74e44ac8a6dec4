"""The post's rounds on what can still be learnt: the excess of each loss over one of reference.

The scoreboard has a row for this method, which costs K passes more than the rounds themselves.
"""

import numpy as np

from mix import History, Method, Runs, update


def excess(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """What can still be learnt (2305.10429, section 2): L - L_ref, in units of its deviation.

    Both are (K,). Excesses are some hundredths of a nat, of which a softmax makes nothing.
    """
    difference = losses - reference
    return difference / max(difference.std(), 1e-9)


def reweight_excess(runs: Runs, history: History, start: dict[str, int], args) -> dict[str, int]:
    """Four rounds of the multiplicative rule. L_ref is the loss that the budget buys a domain where
    it gets all of it. Returns the counts of the best round."""
    alone = []
    for k, only in enumerate(np.eye(len(runs.domains))):
        alone.append(runs.measure(runs.counts(only), f"{runs.domains[k]} alone")[k])
    A = np.array([start[d] for d in runs.domains], dtype=np.float64)
    for number in range(1, 5):
        counts = runs.counts(A)
        losses = runs.measure(counts, f"round {number}")
        history.add(counts, losses)
        A = update(A, excess(losses, np.array(alone)), rate=1.0)
    return history.best()["counts"]


EXCESS = Method(reweight_excess, "a pass a domain, and 4")
