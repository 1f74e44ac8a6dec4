"""What the methods are made of, beside numbers worked out by hand and laws that hold exactly."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import bins, log_of

import mix
from mix import History, Proxy, Runs, descend, doremi_step, emphasis
from model import load
from train import Hyperparameters, Mixture, train

LN = np.log


class Known(Runs):
    """Runs on bins of counted-up tokens whose losses a law gives, without training: shares -> (K,).

    windows: how many each domain, by name, has to train on. asked: the mixtures, in their order.
    """

    def __init__(self, folder: Path, law, sequences: int, **windows: int):
        data = bins(folder / "bins", {d: n + 1 for d, n in windows.items()})
        hyper = Hyperparameters(seq_len=1, batch_size=8, learning_rate=1e-2)
        measured = {"sequences": sequences, "eval_sequences": 1}
        super().__init__(None, folder, "", data, hyper, folder / "runs", **measured)
        self.law = law
        self.asked = []

    def measure(self, counts, title="run"):
        self.asked.append(list(counts.values()))
        return self.law(self.shares(counts))

    def search(self, find, start, untouched, **args) -> tuple[dict[str, int], History]:
        """What a method finds, and its history."""
        args = {"objective": "mean", "sequences": self.sequences} | args
        place = (self.folder.parent / "history.jsonl", self.domains, self.windows)
        history = History(*place, np.array(untouched), args["objective"])
        history.begin()
        start = dict(zip(self.domains, start, strict=True))
        return find(self, history, start, SimpleNamespace(**args)), history


# ---- reweight ----


REWEIGHT = {"signal": "loss", "rounds": 9, "grow": False, "rate": 1.0, "rule": "multiplicative"}


@pytest.mark.parametrize(
    "more, asked",
    [
        # The softmax of ln 1, ln 2, ln 1 is 1/4, 1/2, 1/4: quantities grow by 5/4, 3/2, 5/4.
        ({}, [[100, 100, 100], [94, 112, 94], [87, 126, 87]]),
        ({"grow": True}, [[100, 100, 100], [125, 150, 125], [157, 225, 156]]),
        ({"rule": "additive", "rate": 60}, [[100, 100, 100], [96, 108, 96], [93, 114, 93]]),
    ],
)
def test_rounds_go_on_until_two_of_them_bring_nothing(more, asked, tmp_path, capsys):
    """As the losses stay what they are, the first round is the best; it stops at the third."""
    runs = Known(tmp_path, lambda p: LN([1, 2, 1]), 300, x=99, y=99, z=99)
    counts, history = runs.search(mix.reweight, [100] * 3, [9] * 3, **REWEIGHT | more)
    assert runs.asked == asked
    assert counts == history.best()["counts"] == {"x": 100, "y": 100, "z": 100}
    assert "the mean has not improved for two rounds" in capsys.readouterr().out


def test_the_excess_is_what_the_whole_budget_would_buy(tmp_path):
    """y's loss falls from 4 to 2, alone in the mixture: half way there is 1 too much, x's nothing.

    In units of their deviation, 1/2, these are 0 and 2, whose softmax is 0.1192, 0.8808.
    """
    runs = Known(tmp_path, lambda p: np.array([2, 4 - 2 * p[1]]), 200, x=999, y=999)
    more = {"signal": "excess", "rule": "share", "rate": 0.5, "rounds": 2}
    _, history = runs.search(mix.reweight, [100, 100], [9, 9], **REWEIGHT | more)
    assert runs.asked == [[200, 0], [0, 200], [100, 100], [75, 125]]
    assert history.lines[2]["quantities"] == pytest.approx([111.92, 188.08], abs=0.01)


# ---- DoReMi ----


def test_a_step_of_doremi_by_hand():
    """Means of ln 2, 0 and the last score ln 4 raise 1/2, 1/4, 1/4 to 1, 1/4, 1: 4/9, 1/9, 4/9."""
    excess = np.array([4 * LN(2), 0, 0])
    tokens = np.array([4, 2, 0])  # the batch lacks the last domain
    alpha, scores = doremi_step(np.array([0.5, 0.25, 0.25]), LN([3, 3, 4]), excess, tokens)
    assert scores == pytest.approx(LN([2, 1, 4]))
    assert alpha == pytest.approx([0.4443333, 0.1113333, 0.4443333])  # smoothed by a thousandth


def test_the_proxy_weighs_domains_by_hand():
    """Tokens better than the reference's count as equal, those that are not finite as none."""
    proxy = Proxy(torch.ones(3, 4), np.array([0, 1, 0]), np.array([2 / 3, 1 / 3]))
    far = 1 + LN(3)
    losses = torch.tensor([[-9, 1, np.inf, np.nan], [far] * 4, [1, 1, 1, 1], [99] * 4])
    weights = torch.tensor([[1.0], [1], [1], [0]])  # the last row only fills a micro-batch up
    weighed = proxy.weigh(0, [0, 1, 2, 0], losses, weights)
    assert weighed[:, 0].tolist() == pytest.approx([0.75, 1.5, 0.75, 0])  # 1/2 over its share
    weighed = proxy.weigh(1, [0, 2], torch.full((2, 4), far), torch.ones(2, 1))
    # Scores 0 and ln 3 made 1/4 and 3/4 of the halves, and a thousandth of the way back.
    assert weighed[:, 0].tolist() == pytest.approx([0.25025 * 1.5] * 2)
    proxy.end_step(torch.device("cpu"))  # ln 3 for both, the second's from the step before
    assert np.array(proxy.path) == pytest.approx(
        np.array([[0.25025, 0.74975], [0.2504997, 0.7495003]])
    )


class Shown(Runs):
    """Runs that, instead of training, show `weigh` two steps' losses of the first sequences."""

    calls: list[tuple]

    def train(self, counts, title="train"):
        self.calls = [(title, counts, None)]

    def train_further(self, counts, seen, title, weigh, **changes):
        self.calls.append((title, counts, changes))
        T = self.hyper.seq_len
        if title == "reference":
            weigh(0, [0, 1, 2, 3, 4], torch.full((5, T), 2.0), torch.ones(5, 1))
            return
        for step, losses in enumerate([{0: 2 + LN(2), 1: 2, 2: 1}, {3: 2, 4: 2 + LN(2)}]):
            shown = torch.tensor(list(losses.values()))[:, None].repeat(1, T)
            weigh(step, list(losses), shown, torch.ones(len(losses), 1))


def test_doremi_is_the_mean_of_the_proxys_weights(data, small, tmp_path):
    """Of code, prose and sums the first step raises code by 2, the second prose, which leaves
    1/2, 1/4, 1/4 and 2/5, 2/5, 1/5, but for the smoothing; the base is the proxy's start."""
    model = load(small)
    hyper = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2)
    measured = {"sequences": 6000, "eval_sequences": 20}
    runs = Shown(model, small, "small", data, hyper, tmp_path / "runs", **measured)
    untouched = np.zeros(3)
    history = History(tmp_path / "history.jsonl", data.domains, runs.windows, untouched, "mean")
    counts = mix.doremi(runs, history, {}, None)
    uniform = dict.fromkeys(data.domains, 2000)
    further = [("reference", uniform, {"learning_rate": 0.0}), ("proxy", uniform, {})]
    assert runs.calls == [("train", uniform, None), *further]
    assert list(counts.values()) == pytest.approx([2700, 1950, 1350], abs=3)
    assert [line["step"] for line in history.lines] == [1, 2]


def test_weights_of_sequences_scale_the_loss_they_are_trained_on(data, small, tmp_path):
    """Domain `code` counts three times: the first loss in the log is the weighted mean of the
    model's own losses. Weights of one leave the run bitwise as it is."""
    counts = {"code": 8, "sums": 8}
    mixture = Mixture(data, counts, 32)
    hyper = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2, micro_batch_size=3)
    seen = []

    def triple(step, rows, losses, weights):
        seen.extend(row for row, weight in zip(rows, weights, strict=True) if weight)
        return weights * torch.tensor([[1.0 + 2 * (mixture.domain(i) == "code")] for i in rows])

    (tmp_path / "run").mkdir()
    train(load(small), data, counts, hyper, out=tmp_path / "run", weigh=triple)
    assert seen == list(range(16))
    batch = torch.tensor(np.stack([mixture.row(i) for i in range(8)]).astype(np.int64))
    own = load(small)(batch[:, :-1], batch[:, 1:]).mean(1)
    factors = torch.tensor([3.0 if mixture.domain(i) == "code" else 1.0 for i in range(8)])
    first = log_of(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx((own * factors).mean().item(), rel=1e-5)

    plain = train(load(small), data, counts, hyper)
    same = train(
        load(small), data, counts, hyper, weigh=lambda step, rows, losses, weights: weights
    )
    pairs = zip(plain.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---- returns ----


def test_the_gradients_of_the_objectives():
    changes = np.array([-0.3, 0.02, 0.01])
    assert emphasis(changes, "mean") == pytest.approx([1 / 3] * 3)
    # Of e^-32, e^0 and e^-1 the last two are left.
    assert emphasis(changes, "worst") == pytest.approx([0, 0.731059, 0.268941], abs=1e-6)


BETA = np.array([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    "slopes, low, high, least",
    [
        (lambda w: -BETA / w, 0, 1, BETA),  # of -Σ β ln w
        # Within bounds: what 0.3 and 0.15 leave is shared as 3 : 2.
        (lambda w: -BETA / w, 0.15, [0.3, 1, 1, 1], [0.3, 0.33, 0.22, 0.15]),
        # Of 0.1 w_1 + 0.1 KL(w ‖ uniform): the first one's odds are 1 : e to every other's.
        (lambda w: [0.1, 0, 0, 0] + 0.1 * LN(4 * w), 0, 1, [0.109232, *[0.296923] * 3]),
    ],
)
def test_descent_finds_minima_that_are_known(slopes, low, high, least):
    start = np.full(4, 0.25)
    path = descend(slopes, start, np.full(4, low), np.array(high) * np.ones(4), 2000)
    assert path[0] is start
    assert path[-1] == pytest.approx(least, abs=1e-3)
    assert [w.sum() for w in path] == pytest.approx([1] * len(path))


def law(a: list[float], B: list[list[float]]):
    """L = a - ln p · B, of which `returns` is the fit."""
    return lambda p: np.array(a) - LN(p) @ np.array(B)


def test_returns_is_exact_where_its_law_holds(tmp_path):
    """The least mean is at the sums of B's rows, 0.23, 0.14 and 0.32, over 0.69: at 1/3, 0.2029,
    0.4638. It is known after four runs: the start, and each with a quarter more; three are more."""
    a = [3.0, 2.0, 4.0]
    B = [[0.20, 0.01, 0.02], [0.03, 0.10, 0.01], [0.00, 0.02, 0.30]]
    runs = Known(tmp_path, law(a, B), 1200, x=999, y=999, z=999)
    counts, history = runs.search(mix.returns, [400, 400, 400], a)
    assert runs.asked[:4] == [[400, 400, 400], [600, 300, 300], [300, 600, 300], [300, 300, 600]]
    around = np.array([[600, 182.6, 417.4], [300, 482.6, 417.4], [300, 182.6, 717.4]])
    assert np.array(runs.asked[4:]) == pytest.approx(around, abs=2)
    assert list(counts.values()) == pytest.approx([400, 243.5, 556.5], abs=2)
    assert np.array(history.lines[-1]["B"]) == pytest.approx(np.array(B))
    assert history.lines[-1]["a"] == pytest.approx(a)


@pytest.mark.parametrize(
    "z, windows, domain, count",
    [
        (0.003, 999, "z", 100),  # a quarter of its start, though it gives nothing
        (0.3, 90, "x", 360),  # four times through 90 windows, though as good as the others
    ],
)
def test_returns_keeps_to_what_was_tried_and_to_the_repeats(z, windows, domain, count, tmp_path):
    runs = Known(tmp_path, law([1, 1, 1], np.diag([0.3, 0.3, z])), 1200, x=windows, y=999, z=999)
    counts, _ = runs.search(mix.returns, [400, 400, 400], [1, 1, 1])
    assert counts[domain] == pytest.approx(count, abs=2)


def test_returns_for_the_worst_domain_levels_the_changes(tmp_path):
    """Without influence on one another, the largest change is least where all are equal."""
    runs = Known(tmp_path, law([3, 2, 4], np.diag([0.2, 0.1, 0.3])), 1200, x=999, y=999, z=999)
    untouched = [3.3, 2.15, 4.4]
    _, history = runs.search(mix.returns, [400, 400, 400], untouched, objective="worst")
    assert np.ptp(np.array(history.lines[-1]["predicted"]) - untouched) < 0.015
