"""What the methods are made of, beside numbers worked out by hand and laws that hold exactly."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import bins, log_of, same_tensors

import mix
from eval import WORST, parse_objective
from excess import EXCESS
from mix import History, Law, Proxy, Runs, best_weights, doremi_step
from model import load
from returns import RETURNS, descend, emphasis
from train import Hyperparameters, Mixture, train

LN = np.log


class Known(Runs):
    """Runs on bins of counted-up tokens whose losses a law gives, without training: shares -> (K,).

    windows: how many each domain, by name, has to train on. asked: the mixtures, in their order.
    """

    def __init__(self, folder: Path, law, sequences: int, train_on=None, **windows: int):
        data = bins(folder / "bins", {d: n + 1 for d, n in windows.items()})
        hyper = Hyperparameters(seq_len=1, batch_size=8, learning_rate=1e-2)
        measured = {"sequences": sequences, "eval_sequences": 1, "train_on": train_on}
        super().__init__(None, folder, "", data, hyper, folder / "runs", **measured)
        self.law = law
        self.asked = []

    def measure(self, counts, title="run", keep=False):
        self.asked.append(list(counts.values()))
        return self.law(self.shares(counts))

    def search(self, find, start, untouched, objective="mean", **args):
        """What a method finds, and its history."""
        args = {"sequences": self.sequences} | args
        objective = parse_objective(objective, self.domains)
        windows = dict(zip(self.train_on, self.windows.tolist(), strict=True))
        untouched = dict(zip(self.domains, untouched, strict=True))
        history = History(self.folder.parent / "history.jsonl", windows, untouched, objective)
        history.begin()
        start = dict(zip(self.train_on, start, strict=True))
        return find(self, history, start, SimpleNamespace(**args)), history


# ---- reweight ----


REWEIGHT = {"rounds": 9, "grow": False, "rate": 1.0, "rule": "multiplicative"}


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


def test_rounds_move_the_domains_that_are_trained_on_by_their_own_losses(tmp_path):
    """y's and z's, ln 1 and ln 2, add 1/3 and 2/3; x has none of it, whatever its loss."""
    runs = Known(tmp_path, lambda p: LN([9, 1, 2]), 300, ["y", "z"], x=99, y=99, z=99)
    runs.search(mix.reweight, [150, 150], [9] * 3, **REWEIGHT)
    assert runs.asked[:2] == [[150, 150], [133, 167]]


def test_the_excess_is_what_the_whole_budget_would_buy(tmp_path):
    """y's loss falls from 4 to 2, alone in the mixture: half way there is 1 too much, x's nothing.

    In units of their deviation, 1/2, these are 0 and 2, whose softmax is 0.1192, 0.8808.
    """
    runs = Known(tmp_path, lambda p: np.array([2, 4 - 2 * p[1]]), 200, x=999, y=999)
    runs.search(EXCESS.find, [100, 100], [9, 9])
    assert runs.asked[:3] == [[200, 0], [0, 200], [100, 100]]
    assert runs.asked[3] == [75, 125]  # 111.92 and 188.08 of 300 quantities


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
    expected = np.array([[0.25025, 0.74975], [0.2504997, 0.7495003]])
    assert np.array(proxy.path) == pytest.approx(expected)


def test_a_domain_of_which_the_pass_has_nothing_divides_by_no_zero():
    proxy = Proxy(torch.ones(2, 4), np.array([0, 0]), np.array([1.0, 0.0]))
    with np.errstate(all="raise"):
        weighed = proxy.weigh(0, [0, 1], torch.full((2, 4), 3.0), torch.ones(2, 1))
    assert weighed[:, 0].tolist() == [0.5, 0.5]


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
    mean = parse_objective("mean", data.domains)
    untouched = dict.fromkeys(data.domains, 0.0)
    history = History(tmp_path / "history.jsonl", {}, untouched, mean)
    counts = mix.doremi(runs, history, {}, None)
    uniform = dict.fromkeys(data.domains, 2000)
    further = [("reference", uniform, {"learning_rate": 0.0}), ("proxy", uniform, {})]
    assert runs.calls == [("train", uniform, None), *further]
    assert list(counts.values()) == pytest.approx([2700, 1950, 1350], abs=3)
    assert [line["step"] for line in history.lines] == [1, 2]


class Seeing(Shown):
    def train_further(self, counts, seen, title, weigh, **changes):
        self.seen = {d: int(n.sum()) for d, n in seen.items()}
        super().train_further(counts, seen, title, weigh, **changes)


def test_doremis_proxy_comes_after_the_windows_of_the_reference(data, small, tmp_path):
    hyper = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2)
    runs = Seeing(load(small), small, "small", data, hyper, tmp_path / "runs", 6000, 20)
    untouched = dict.fromkeys(data.domains, 0.0)
    mean = parse_objective("mean", data.domains)
    mix.doremi(runs, History(tmp_path / "history.jsonl", {}, untouched, mean), {}, None)
    assert runs.seen == dict.fromkeys(data.domains, 2000)


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

    train(load(small), data, counts, hyper, out=tmp_path / "run", weigh=triple)
    assert seen == list(range(16))
    batch = torch.tensor(np.stack([mixture.row(i) for i in range(8)]).astype(np.int64))
    own = load(small)(batch[:, :-1], batch[:, 1:]).mean(1)
    factors = torch.tensor([3.0 if mixture.domain(i) == "code" else 1.0 for i in range(8)])
    first = log_of(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx((own * factors).mean().item(), rel=1e-5)

    plain = train(load(small), data, counts, hyper)
    same = train(load(small), data, counts, hyper, weigh=lambda *given: given[-1])
    assert same_tensors(same.state_dict(), plain.state_dict())


# ---- soft experts ----


def test_what_mixed_experts_lose_by_hand():
    """Probabilities 1/2, 1/4 of a token and 1/8, 1/2 of another, mixed half and half."""
    only = np.array([1.0, 0])
    law = Law([{"x": LN([[2, 8]])}, {"x": LN([[4, 2]])}], only, np.array([3.0]))
    assert law.losses(only) == [3]
    w = np.array([0.5, 0.5])
    less = np.mean(LN([1 / 2, 1 / 8]) - LN([3 / 8, 5 / 16]))
    assert law.losses(w) == pytest.approx([3 + less])
    # Of the first token the experts account for 2/3 and 1/3, of the second for 1/5 and 4/5.
    assert law.accounts(w) == pytest.approx(np.array([[13 / 30, 17 / 30]]))
    law.correct(w, np.array([3 + 3 * less]))
    assert law.losses(w) - 3 == pytest.approx([3 * less], rel=1e-2)
    assert law.losses(only) == [3]


@pytest.mark.parametrize("by_law, measured, scale", [(-0.1, -0.2, 2), (-0.1, -0.05, 1)])
@pytest.mark.parametrize("noise", [-0.02, 0.02])
def test_a_law_learns_how_far_from_what_is_more_than_noise(by_law, measured, scale, noise):
    """The other domain's loss hardly changes by the law: whatever is measured tells little."""
    few = LN([[2.0]])
    odds = np.exp(np.array([by_law, -0.002]))  # of the second expert's tokens
    second = {d: few + LN(1 / odds[i]) * -1 for i, d in enumerate("ab")}
    law = Law([{"a": few, "b": few}, second], np.array([1.0, 0]), np.array([3.0, 3.0]))
    w = np.array([0.0, 1])
    assert law.losses(w) - 3 == pytest.approx([by_law, -0.002], abs=1e-6)
    law.correct(w, 3 + np.array([measured, noise]))
    assert law.scale[0] == pytest.approx(scale, rel=0.02)
    assert 1 <= law.scale[1] < 1.5


def test_a_law_is_corrected_by_a_factor_of_five_at_most():
    law = Law([{"x": LN([[2.0]])}, {"x": LN([[2.0]]) - 0.1}], np.array([1.0, 0]), np.array([3.0]))
    law.correct(np.array([0.0, 1]), np.array([1.0]))
    assert law.scale == [5]


def test_what_a_cap_leaves_may_reach_another_cap():
    w = mix.capped(np.array([0.6, 0.3, 0.1]), np.array([0.4, 0.35, 1]))
    assert w == pytest.approx([0.4, 0.35, 0.25])


def soft_experts(K: int, own: float = 0.4, last: float = 2, tokens: int = 400) -> Law:
    """Experts that are each better at a domain of their own, and somewhat so at the next one; what
    the last domain loses is so many times what they say."""
    rng = np.random.default_rng(0)
    losses = []
    plain = rng.gamma(2, 1.5, (K, tokens))
    for k in range(K):
        gain = own * np.eye(K)[k] + 0.2 * np.eye(K)[(k + 1) % K] / (1 + k)
        noise = 0.5 * rng.normal(size=(K, tokens))
        of_domains = plain - gain[:, None] * rng.gamma(1, 1, (K, tokens)) + noise
        losses.append({str(i): values[None] for i, values in enumerate(of_domains)})
    law = Law(losses, np.full(K, 1 / K), np.full(K, 3.0))
    law.scale[-1] = last
    return law


LOW = np.array([0.0, 0.1, 0.05])  # what the untouched model's losses are above the experts'
BOUNDS = [(1, np.inf), (0.3, np.inf), (1, -0.22), (0.5, -0.2)]  # on a share, and on a change
BEST = [(text, cap, bound, {}, 1e-4) for text in ("mean", "0=3,2=1") for cap, bound in BOUNDS]
BEST += [("worst", cap, np.inf, {}, 1e-4) for cap in (1, 0.3, 0.5)]
UNLIKE = [(0.1, 1), (1.5, 2), (1.0, 4), (2.5, 4)]  # experts, one another
BEST += [("worst", 1, np.inf, {"own": own, "last": last}, 0.01) for own, last in UNLIKE]


@pytest.mark.parametrize("objective, cap, bound, experts, within", BEST)
def test_the_best_weights_are_those_of_a_search_of_all(objective, cap, bound, experts, within):
    """Beside a grid of steps of 1/100 over the simplex; none of three weights is above the cap."""
    law = soft_experts(3, **experts)
    objective = parse_objective(objective, ["0", "1", "2"])
    high = np.array([cap, 1, 1])
    untouched = law.known + 0.2 + LOW

    def changes(w):
        return law.losses(w) - untouched

    w = best_weights(law, objective, untouched, high, bound)
    assert w.sum() == pytest.approx(1)
    assert (w <= high + 1e-9).all()
    assert changes(w).max() <= bound + 1e-4
    grid = [np.array([a, b, 100 - a - b]) / 100 for a in range(101) for b in range(101 - a)]
    allowed = [g for g in grid if (g <= high).all() and changes(g).max() <= bound]
    least = min(objective.of(changes(g)) for g in allowed)
    assert objective.of(changes(w)) <= least + within


class Mixed(Known):
    """Runs of experts, whose losses `told` gives by shares: of tokens by domain, or of one in each.

    Else tokens are worth their shares: the i-th one's loss is -ln(share of the i-th source).
    """

    def told(self, p):
        return [-LN(p)] * len(self.domains)

    def token_losses(self, counts, limit, title, **changes):
        self.asked.append((list(counts.values()), limit, changes))
        found = map(np.atleast_2d, self.told(self.shares(counts)))
        return dict(zip(self.domains, found, strict=True))


def test_experts_share_a_pass_and_each_is_half_its_own_domain(tmp_path):
    runs = Mixed(tmp_path, lambda p: -LN(p + 1), 1600, x=9999, y=9999)
    args = {"expert_sequences": None, "spare": None}
    counts, history = runs.search(mix.experts, [800, 800], [1, 1], **args)
    short = {"batch_size": 8}
    asked = [[800, 800], ([600, 200], 200, short), ([200, 600], 200, short)]
    assert runs.asked == [*asked, [800, 800]]  # what was found, as the two are alike
    assert list(counts.values()) == [800, 800]
    assert history.lines[2]["predicted"] == pytest.approx([-LN(1.5)] * 2)


def test_short_experts_take_smaller_steps_and_25_windows_a_domain(tmp_path):
    domains = dict.fromkeys("abcdefghijklmnop", 9999)
    runs = Mixed(tmp_path, lambda p: -LN(p + 1), 1600, **domains)
    runs.search(mix.experts, [100] * 16, [1] * 16, expert_sequences=None, spare=None)
    experts = runs.asked[1:17]
    assert {max(counts) for counts, _, _ in experts} == {53, 54}  # of 100: half, 1/16 of half
    assert [how for _, *how in experts] == [[25, {"batch_size": 4}]] * 16


def test_no_expert_counts_for_more_than_four_repeats(tmp_path):
    """x has 50 windows, and so at most 200 sequences, though it is the only one that counts."""
    runs = Mixed(tmp_path, lambda p: -LN(p + 1), 400, x=50, y=9999, z=9999)
    runs.told = lambda p: [1 - p[0], 1.0, 1.0]
    args = {"expert_sequences": 10, "spare": None, "objective": "x=1"}
    counts, _ = runs.search(mix.experts, [134, 133, 133], [1, 1, 1], **args)
    assert counts["x"] == 200


@pytest.mark.parametrize("spare", [None, 99])
def test_what_is_measured_counts_more_than_what_experts_promise(tmp_path, spare):
    """By them x is worth the more, the more there is of it; as a run shows, it is not."""
    runs = Mixed(tmp_path, lambda p: 1 + p, 400, x=999, y=999)
    runs.told = lambda p: [2 - p[0]] * 2
    args = {"expert_sequences": 10, "spare": spare, "objective": "x=1"}
    counts, history = runs.search(mix.experts, [200, 200], [1, 1], **args)
    assert history.measured()[1]["counts"] == {"x": 300, "y": 100}
    assert counts == {"x": 200, "y": 200}


def test_where_every_share_is_repeated_too_often_nothing_moves(tmp_path):
    runs = Mixed(tmp_path, lambda p: -LN(p + 1), 400, x=3, y=3)
    counts, _ = runs.search(mix.experts, [200, 200], [1, 1], expert_sequences=9, spare=None)
    assert counts == {"x": 200, "y": 200}


def test_a_domain_that_is_not_trained_on_is_a_goal_all_the_same(tmp_path):
    """z is measured alone: what serves it is x, though y has the experts' better mean."""
    runs = Mixed(tmp_path, lambda p: 3 - p[[1, 1, 0]], 400, ["x", "y"], x=999, y=999, z=999)
    runs.told = lambda p: 2 - p[[1, 1, 0]]
    args = {"expert_sequences": 40, "spare": None}
    counts, _ = runs.search(mix.experts, [200, 200], [1, 1, 1], objective="z=1", **args)
    assert [asked[0] for asked in runs.asked[1:3]] == [[30, 10], [10, 30]]
    assert counts == {"x": 300, "y": 100}
    counts, _ = runs.search(mix.experts, [200, 200], [1, 1, 1], objective="mean", **args)
    assert counts == {"x": 100, "y": 300}


def test_what_is_to_be_spared_is_measured(tmp_path):
    """The law says that sparing y helps x, too. Really the start, which holds, is better."""
    slopes = np.array([-1.2, 0.4])  # of x and y, in the share of x, by the experts
    runs = Mixed(tmp_path, lambda p: 1 - slopes * (p[0] - 0.5), 400, x=999, y=999)
    runs.told = lambda p: 2 + slopes * (p[0] - 0.5)
    args = {"expert_sequences": 40, "spare": 0.05}
    counts, history = runs.search(mix.experts, [200, 200], [1, 1], **args)
    assert counts == {"x": 200, "y": 200}
    assert "to hold --spare 0.05" in history.lines[-2]["note"]
    assert history.lines[-1]["losses"] and not history.lines[-2]["losses"]


def test_sparing_holds_the_domain_that_pays(tmp_path, capsys):
    """The best mixture in the mean costs y 0.2 nats, twice what short experts say: with that known,
    to spare all but 0.1 takes half of the way."""
    slopes = np.array([-1.2, 0.4])  # of x and y, in the share of x, by the experts
    runs = Mixed(tmp_path, lambda p: 1 + 2 * slopes * (p[0] - 0.5), 400, x=999, y=999)
    runs.told = lambda p: 2 + slopes * (p[0] - 0.5)
    found = {}
    for spare in (None, 0.3, 0.1, -1):
        args = {"expert_sequences": 40, "spare": spare}
        found[spare], history = runs.search(mix.experts, [200, 200], [1, 1], **args)
    assert found[None] == found[0.3] == {"x": 300, "y": 100}
    assert found[0.1]["x"] == pytest.approx(250, abs=4)
    assert "no mixture is predicted to hold --spare -1" in capsys.readouterr().out
    points = [line for line in history.lines if "bound" in line]
    worst = [history.changes(line).max() for line in points]
    assert worst[0] == pytest.approx(0.2)  # measured; the others are predicted
    assert worst == pytest.approx(np.linspace(0.2, worst[4], 5), abs=1e-3)


# ---- returns ----


def test_the_gradients_of_the_objectives():
    changes = np.array([-0.3, 0.02, 0.01])
    mean = parse_objective("mean", ["x", "y", "z"])
    assert emphasis(changes, mean) == pytest.approx([1 / 3] * 3)
    # Of e^-32, e^0 and e^-1 the last two are left.
    assert emphasis(changes, WORST) == pytest.approx([0, 0.731059, 0.268941], abs=1e-6)


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
    counts, history = runs.search(RETURNS.find, [400, 400, 400], a)
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
    counts, _ = runs.search(RETURNS.find, [400, 400, 400], [1, 1, 1])
    assert counts[domain] == pytest.approx(count, abs=2)


def test_returns_for_the_worst_domain_levels_the_changes(tmp_path):
    """Without influence on one another, the largest change is least where all are equal."""
    runs = Known(tmp_path, law([3, 2, 4], np.diag([0.2, 0.1, 0.3])), 1200, x=999, y=999, z=999)
    untouched = [3.3, 2.15, 4.4]
    _, history = runs.search(RETURNS.find, [400, 400, 400], untouched, objective="worst")
    assert np.ptp(np.array(history.lines[-1]["predicted"]) - untouched) < 0.015
