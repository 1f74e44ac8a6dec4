"""The benchmark of the methods: its fit, its verdicts, and a small run of all of it, which the second time only prints."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL

from eval import evaluate
from model import load
from train import parse_mixture, train


@pytest.fixture(scope="module")
def scoreboard():
    spec = importlib.util.spec_from_file_location(
        "scoreboard", ROOT / "tests" / "bench" / "scoreboard.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fit_recovers_its_own_law(scoreboard):
    rng = np.random.default_rng(0)
    c, t = np.log([2.0, 3.0, 1.0]), rng.normal(-1, 1, (3, 3)) - np.eye(3)
    shares = rng.dirichlet(np.ones(3), 40)
    losses = np.exp(c) + np.exp(shares @ t.T)
    fitted = scoreboard.log_linear(shares[:30], losses[:30])
    assert fitted(shares[30:]) == pytest.approx(losses[30:], abs=2e-3)
    spoilt = losses[:30].copy()
    spoilt[3] += 5  # an outlier counts little
    assert scoreboard.log_linear(shares[:30], spoilt)(shares[30:]) == pytest.approx(
        losses[30:], abs=0.05
    )


def test_the_minimum_and_its_pull(scoreboard):
    def bowl(p):
        return ((p - np.array([0.6, 0.3, 0.1])) ** 2).sum(-1, keepdims=True) * np.ones(3)

    assert scoreboard.minimum(bowl, 3, pull=0) == pytest.approx([0.6, 0.3, 0.1], abs=0.01)
    assert scoreboard.minimum(bowl, 3, pull=100) == pytest.approx([1 / 3] * 3, abs=0.01)


def test_rank_correlation(scoreboard):
    """1 - 6 Σ d^2 / (n (n^2 - 1)), the textbook's form."""
    a, b = np.array([3.0, 1.0, 2.0, 5.0, 4.0]), np.array([10.0, 20.0, 30.0, 50.0, 40.0])
    assert scoreboard.rank_correlation(a, b) == pytest.approx(
        1 - 6 * (4 + 1 + 1 + 0 + 0) / (5 * 24)
    )
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
def test_a_gain_counts_where_it_exceeds_the_spread(scoreboard, mean, spread, seeds, words):
    assert scoreboard.verdict({"mean": mean, "spread": spread, "seeds": [None] * seeds}) == words


def test_a_small_scoreboard(scoreboard, data, small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    options = {
        "data": data.folder,
        "model": small,
        "out": out,
        "seq-len": 32,
        "batch-size": 8,
        "sequences": 24,
    }
    options |= {"rounds": 2, "eval-sequences": 10, "runs": 6, "seeds": 2, "lr": 1e-2}
    argv = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["scoreboard.py", *argv, *SMALL])
    scoreboard.main()
    text = capsys.readouterr().out
    result = json.loads((out / "scoreboard.json").read_text())
    rows = result["rows"]
    assert set(rows) == {*scoreboard.ROWS, *scoreboard.REFERENCE} and list(rows) == sorted(
        rows, key=lambda r: rows[r]["mean"]
    )
    assert rows["uniform"]["mean"] == 0 == rows["uniform"]["spread"]
    best = min(rows[name]["mean"] for name in scoreboard.REFERENCE)
    assert (
        len(result["reference"]["losses"]) == 6
        and set(result["proxies"])
        and "merged experts" in text
    )
    for name, row in rows.items():
        changes = [one["uniform"]["change"] for one in row["seeds"]]
        assert row["mean"] == pytest.approx(np.mean(changes)) and row["spread"] == pytest.approx(
            np.ptp(changes)
        )
        assert (
            row["captured"] == (pytest.approx(row["mean"] / best) if best < 0 else None)
            and name in text
        )
        assert sum(row["share"]) == pytest.approx(1)
    reference = 32 * 24 * 6  # tokens trained on
    for name in scoreboard.REFERENCE:
        assert rows[name]["tokens"]["trained"] == reference and rows[name]["cost"] == 1
    assert (
        rows["returns"]["tokens"]["trained"] == 32 * 24 * 7
        and rows["doremi"]["tokens"]["trained"] == 32 * 24 * 3
    )

    mean = {}
    for mixture in ("natural", "uniform"):  # the second seed's final runs, by hand
        hyper = {"seq_len": 32, "batch_size": 8, "lr": 1e-2, "seed": 1001}
        model = train(load(small), data, parse_mixture(mixture, data, 24, 32), **hyper)
        mean[mixture] = np.mean(
            [values.mean() for values in evaluate(model, data, "test", 32).values()]
        )
    assert rows["natural"]["seeds"][1]["uniform"]["change"] == pytest.approx(
        mean["natural"] - mean["uniform"], abs=1e-6
    )
    for name in ("scoreboard.png", "paths.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"

    def fails(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(scoreboard, "train", fails)
    monkeypatch.setattr(sys.modules["mix"], "train", fails)
    scoreboard.main()
    assert capsys.readouterr().out[-1000:] == text[-1000:]
