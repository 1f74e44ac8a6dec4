"""The benchmark of the methods: merged experts, the fit, the verdicts, and a small run of all."""

import json
import sys

import numpy as np
import pytest
import scoreboard
import torch
from conftest import train_options

import merge
import mix
from eval import domain_means, evaluate, parse_objective
from mix import Method, Runs, begin_history
from model import SHAPES, load, shape
from train import Hyperparameters, parse_mixture, train

HYPER = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2)


@pytest.fixture(scope="module")
def stand(data, small, tmp_path_factory):
    """Experts of the small model, and the line of their history."""
    folder = tmp_path_factory.mktemp("merge")
    measured = {"sequences": 48, "eval_sequences": 20}
    runs = Runs(load(small), small, "small", data, HYPER, folder / "runs", **measured)
    mean = parse_objective("mean", data.domains)
    history = begin_history(runs, folder / "history.jsonl", mean)
    stand = merge.stand_in(runs, history, dict.fromkeys(data.domains, 16))
    return stand, history.lines[-1]


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_slopes_of_merged_experts_are_those_of_their_loss(stand, data):
    """Beside central differences of the loss itself, on the same third of the windows, and for
    uneven weights of the domains."""
    stand, _ = stand
    w = np.array([0.5, 0.2, 0.3])
    weights = np.array([0.6, 0.3, 0.1])
    step = 1e-2
    found = []
    for e in step * np.eye(3):
        losses = []
        for moved in (w + e, w - e):
            stand.place(moved)
            losses.append(weights @ stand.losses(weights, 1, 3))
        found.append((losses[0] - losses[1]) / (2 * step))
    stand.place(w)
    losses = stand.losses(weights, 1, 3)
    assert stand.slopes() == pytest.approx(found, rel=2e-2, abs=1e-4)
    limited = evaluate(stand.runs.model, data, "val", 32, limit=20)
    assert losses == pytest.approx([limited[d][1::3].mean() for d in data.domains], abs=1e-5)


def test_the_scale_of_the_experts_is_a_projection(stand, data, small):
    """From θ(start), the way to a run on the start is at right angles to the way from the base."""
    stand, line = stand
    base = flat(load(small))
    uniform = dict.fromkeys(data.domains, 16)
    run = train(load(small), data, uniform, HYPER)
    losses = domain_means(evaluate(run, data, "val", 32, limit=20))
    assert list(line["losses"].values()) == pytest.approx(losses, abs=1e-6)
    stand.place(np.full(3, 1 / 3))
    merged = flat(stand.runs.model)
    dot = torch.dot(flat(run) - merged, merged - base).abs()
    assert dot < 1e-4 * (merged - base).norm() * (flat(run) - base).norm()
    only = flat(train(load(small), data, {"code": 16}, HYPER)) - base
    assert torch.allclose(stand.experts[0], line["scale"] * only, atol=1e-6)


def test_the_fit_recovers_its_own_law():
    rng = np.random.default_rng(0)
    t = rng.normal(-1, 1, (3, 3)) - np.eye(3)
    shares = rng.dirichlet(np.ones(3), 40)
    losses = np.array([2.0, 3.0, 1.0]) + np.exp(shares @ t.T)
    fitted = scoreboard.log_linear(shares[:30], losses[:30])
    assert fitted(shares[30:]) == pytest.approx(losses[30:], abs=2e-3)
    losses[3] += 5  # an outlier counts little
    fitted = scoreboard.log_linear(shares[:30], losses[:30])
    assert fitted(shares[30:]) == pytest.approx(losses[30:], abs=0.05)


@pytest.mark.parametrize("pull, least", [(0, [0.6, 0.3, 0.1]), (100, [1 / 3] * 3)])
def test_the_minimum_and_its_pull(pull, least):
    def bowl(p):
        return ((p - np.array([0.6, 0.3, 0.1])) ** 2).sum(-1, keepdims=True) * np.ones(3)

    assert scoreboard.minimum(bowl, 3, pull) == pytest.approx(least, abs=0.01)


def test_the_minimum_of_a_law_of_sixteen_domains():
    """The law is convex: at its minimum every domain that has a share has the same slope, and no
    other a lower one."""
    t = np.random.default_rng(1).normal(-0.3, 0.3, (16, 16)) - np.eye(16)
    p = scoreboard.minimum(lambda p: np.exp(p @ t.T), 16, 0)
    slopes = (t * np.exp(p @ t.T)[:, None]).mean(0)
    assert slopes[p > 1e-3] == pytest.approx(slopes.min(), abs=1e-4)


def test_rank_correlation_by_hand():
    """1 - 6 Σ d² / (n (n² - 1)), the textbook's form; the ranks differ by 2, 1, 1, 0 and 0."""
    a = np.array([3, 1, 2, 5, 4])
    b = np.array([10, 20, 30, 50, 40])
    assert scoreboard.rank_correlation(a, b) == pytest.approx(1 - 6 * 6 / (5 * 24))
    assert scoreboard.rank_correlation(a, -a) == pytest.approx(-1)


@pytest.mark.parametrize(
    "mean, spread, seeds, words",
    [
        (-0.02, 0.01, 3, "better than uniform"),
        (-0.02, 0.03, 3, "not distinguishable from uniform"),
        (0.02, 0.01, 3, "worse than uniform"),
        (-0.02, 0.0, 1, "not distinguishable from uniform"),  # one seed has no spread
        (0.0, 0.0, 3, "not distinguishable from uniform"),
    ],
)
def test_a_gain_counts_where_it_exceeds_the_spread(mean, spread, seeds, words):
    assert scoreboard.verdict({"mean": mean, "spread": spread, "seeds": [None] * seeds}) == words


def halves(runs, history, start, args):
    """A method: the first domain, and the one that its option names."""
    counts = {runs.domains[0]: args.sequences // 2, args.beside: args.sequences // 2}
    history.add(counts, runs.measure(counts))
    return counts


def test_a_small_scoreboard(data, small, tmp_path, monkeypatch, capsys):
    """Of every method, one added here among them; the second time it only prints."""
    added = Method(halves, options={"--beside": {"default": "sums"}})
    monkeypatch.setitem(mix.METHODS, "halves", added)
    out = tmp_path / "run"
    words = {"sequences": 24, "rounds": 2, "runs": 9, "seeds": 2, "lr": 1e-2, "seq_len": 32}
    argv = train_options(data, small, out, mix=False, **words)
    monkeypatch.setattr(sys, "argv", ["scoreboard.py", *argv])
    scoreboard.main()
    text = capsys.readouterr().out
    result = json.loads((out / "scoreboard.json").read_text())
    rows = result["rows"]
    assert set(rows) == {*scoreboard.ROWS, *scoreboard.REFERENCE, "halves"}
    assert list(rows) == sorted(rows, key=lambda name: rows[name]["mean"])
    assert rows["uniform"]["mean"] == rows["uniform"]["spread"] == 0
    assert rows["halves"]["share"] == [0.5, 0, 0.5]
    assert len(result["reference"]["losses"]) == 9
    assert "merged experts" in result["proxies"]
    best = min(rows[name]["mean"] for name in scoreboard.REFERENCE)
    assert best < 0
    for name, row in rows.items():
        changes = [one["uniform"]["change"] for one in row["seeds"]]
        assert row["mean"] == pytest.approx(np.mean(changes))
        assert row["spread"] == pytest.approx(np.ptp(changes))
        assert row["captured"] == pytest.approx(row["mean"] / best)
        assert sum(row["share"]) == pytest.approx(1)
        assert f"\n{name} " in text
    passes = {"log-linear fit": 9, "returns": 7, "doremi": 3, "experts": 3, "halves": 1}
    passes["uniform"] = 0
    assert {name: rows[name]["tokens"]["trained"] / 32 / 24 for name in passes} == passes
    assert rows["log-linear fit"]["cost"] == 1

    means = {}
    for mixture in ("natural", "uniform"):  # the second seed's final runs
        hyper = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2, seed=1001)
        model = train(load(small), data, parse_mixture(mixture, data, 24, 32), hyper)
        means[mixture] = domain_means(evaluate(model, data, "test", 32)).mean()
    change = rows["natural"]["seeds"][1]["uniform"]["change"]
    assert change == pytest.approx(means["natural"] - means["uniform"], abs=1e-6)
    for name in ("scoreboard.png", "paths.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr("train.make_optimizer", None)  # so that nothing can be trained
    scoreboard.main()
    assert capsys.readouterr().out[-1000:] == text[-1000:]


def test_few_rows_without_a_reference_and_a_larger_model(data, small, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "wider", shape(1, 64, 4, data.vocab_size, 32))
    words = {"sequences": 24, "runs": 0, "seeds": 2, "lr": 1e-2, "seq_len": 32}
    words |= {"base_sequences": 32, "larger": "wider", "transfer": "experts", "rows": "natural"}
    out = tmp_path / "run"
    argv = train_options(data, small, out, mix=False, **words)
    monkeypatch.setattr(sys, "argv", ["scoreboard.py", *argv])
    scoreboard.main()
    result = json.loads((out / "scoreboard.json").read_text())
    assert set(result["rows"]) == {"uniform", "natural", "experts"}
    assert "reference" not in result
    there = result["transfer"]
    assert set(there) == {"uniform", "experts of the small model", "experts of its own"}
    assert there["experts of the small model"]["share"] == result["rows"]["experts"]["share"]
    # It is twice as wide, so it learns at half the rate.
    runs = [json.loads(path.read_text())["settings"] for path in out.glob("kept/runs/*/run.json")]
    rates = {settings["learning_rate"] for settings in runs}
    assert rates == {1e-2, 5e-3}
