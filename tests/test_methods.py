"""The methods: each one's equation against numbers worked out by hand or a loop of its own, and each as a user runs it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, command
from test_train import same_weights

import mix
from eval import evaluate
from mix import METHODS, Search, descend, emphasis, gradient, stand_in
from model import load
from train import Mixture, times_seen, train

HYPER = {
    "seq_len": 32,
    "batch_size": 8,
    "lr": 1e-2,
    "micro_batch_size": None,
    "warmup": 0.2,
    "seed": 0,
}
HYPER["dtype"] = torch.float32
CHOICE = {
    "method": "reweight",
    "objective": "mean",
    "signal": "loss",
    "rule": "multiplicative",
    "rate": 1.0,
}


def search_of(data, small, out, **choice) -> Search:
    out.mkdir(exist_ok=True)
    more = {
        "out": out,
        "sequences": 48,
        "eval_sequences": 20,
        "start": "uniform",
        "rounds": 3,
        "grow": False,
    }
    args = SimpleNamespace(**{**CHOICE, **more, "save_every": 0, **choice})
    return Search(load(small), small, data, HYPER, [], args)


def argv(data, small, out, *more) -> list:
    options = {
        "data": data.folder,
        "model": small,
        "out": out,
        "seq-len": 32,
        "batch-size": 8,
        "sequences": 48,
    }
    options |= {"rounds": 3, "eval-sequences": 20, "lr": 1e-2}
    return (
        [word for name, value in options.items() for word in (f"--{name}", value)]
        + SMALL
        + list(more)
    )


def lines_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_the_objectives_and_their_gradients():
    changes = np.array([-0.3, 0.02, 0.01])
    assert emphasis(changes, "mean") == pytest.approx([1 / 3] * 3)
    weights = emphasis(changes, "worst")  # e^0 and e^-1 are left
    assert weights == pytest.approx(
        [0, 1 / (1 + np.exp(-1)), np.exp(-1) / (1 + np.exp(-1))], abs=1e-9
    )


def test_descent_finds_minima_that_are_known():
    u, ones = np.full(4, 0.25), np.ones(4)
    beta = np.array([0.4, 0.3, 0.2, 0.1])
    path = descend(lambda w, step: -beta / w, u, 0 * u, ones, 500)
    assert path[0] is u and path[-1] == pytest.approx(beta, abs=1e-4)  # of -Σ beta log w
    slope = np.array([0.1, 0.0, -0.1, 0.0])
    pulled = (
        u * np.exp(-slope / 0.05) / (u * np.exp(-slope / 0.05)).sum()
    )  # of slope · w + 0.05 KL(w ‖ u)
    assert descend(lambda w, step: slope, u, 0 * u, ones, 4000, pull=0.05)[-1] == pytest.approx(
        pulled, abs=1e-3
    )
    bounded = descend(
        lambda w, step: -beta / w, u, np.full(4, 0.15), np.array([0.3, 1, 1, 1]), 500
    )[-1]
    assert bounded == pytest.approx(
        [0.3, 0.33, 0.22, 0.15], abs=1e-3
    )  # what is left is shared as 3 : 2
    assert all(abs(w.sum() - 1) < 1e-9 for w in path)


def law_search(a, B, untouched, objective="mean", start=(400, 400, 400), windows=(999, 999, 999)):
    """A search whose training follows L = a - ln p · B exactly."""
    domains, recorded, asked = ["x", "y", "z"], [], []

    def measure(counts, name, keep=True):
        p = np.array([counts[d] for d in domains]) / sum(counts.values())
        asked.append(counts)
        return a - np.log(p) @ B

    found = SimpleNamespace(
        first=dict(zip(domains, start)),
        data=SimpleNamespace(domains=domains),
        cap=4 * np.array(windows) / 1200,
        args=SimpleNamespace(objective=objective, sequences=1200),
        untouched=np.array(untouched),
        measure=measure,
        record=lambda counts, losses=None, **more: recorded.append(more),
        shares=lambda counts: np.array([counts.get(d, 0) for d in domains]) / sum(counts.values()),
        counts=lambda shares: mix.rescale(dict(zip(domains, map(float, shares))), 1200),
    )
    return found, recorded, asked


def test_returns_is_exact_where_the_law_holds():
    a, B = (
        np.array([3.0, 2.0, 4.0]),
        np.array([[0.20, 0.01, 0.02], [0.03, 0.10, 0.01], [0.00, 0.02, 0.30]]),
    )
    search, recorded, asked = law_search(a, B, a)
    counts = mix.returns(search)
    beta = B.sum(1)  # what a domain gives to all
    x = (
        1200 * beta[0] / beta.sum()
    )  # its share of the minimum, which is known after the first four runs
    expected = [
        400,
        600,
        300,
        300,
        0.75 * x + 300,
        0.75 * x,
        0.75 * x,
    ]  # the start; with a quarter more; with less
    assert [c["x"] for c in asked] == pytest.approx(expected, abs=2)
    assert search.shares(counts) == pytest.approx(beta / beta.sum(), abs=2e-3)
    assert recorded[-1]["B"] == pytest.approx(B, abs=1e-9) and recorded[-1]["a"] == pytest.approx(a)


def test_returns_keeps_to_what_was_tried_and_to_the_repeats():
    B = np.diag([0.3, 0.3, 0.003])
    search, _, _ = law_search(np.ones(3), B, np.ones(3))
    assert search.shares(mix.returns(search))[2] == pytest.approx(
        1 / 12, abs=2e-3
    )  # a quarter of its start
    search, _, _ = law_search(np.ones(3), B, np.ones(3), windows=(90, 999, 999))
    assert search.shares(mix.returns(search))[0] == pytest.approx(
        0.3, abs=2e-3
    )  # four times through 90 windows


def test_returns_for_the_worst_domain_levels_the_changes():
    """Without influence on one another, the largest change is least where all changes are equal."""
    a, B = np.array([3.0, 2.0, 4.0]), np.diag([0.2, 0.1, 0.3])
    search, recorded, _ = law_search(a, B, a + np.array([0.3, 0.15, 0.4]), "worst")
    mix.returns(search)
    changes = np.array(recorded[-1]["predicted"]) - search.untouched
    assert changes.max() - changes.min() < 0.015


def test_doremi_by_hand(data, small, tmp_path, monkeypatch):
    """Training replaced by a step that shows three sequences, their losses known; the last domain only at step 0."""
    search = search_of(data, small, tmp_path / "run", sequences=6)
    calls, weights = [], []
    order = [
        "code",
        "prose",
        "sums",
        "code",
        "prose",
        "code",
    ]  # the domain of every sequence of the pass
    losses = {
        0: {0: 3.0, 1: 1.0, 2: 2.5},
        1: {3: 1.5, 4: 4.0},
    }  # by step and sequence; the reference's are 2

    class Pass(Mixture):
        def row(self, i):
            return order[i], super().row(i)[1]

    def fake_train(model, data, counts, *, lr, weigh=None, title="", **rest):
        calls.append((title, lr, counts))
        if title == "reference":
            weigh(0, list(range(6)), torch.full((6, 32), 2.0), torch.ones(6, 1))
        elif title == "proxy":
            for step, by_row in losses.items():
                rows = list(by_row) + [
                    next(iter(by_row))
                ]  # the last one only fills the micro-batch up
                values = torch.tensor([by_row[i] for i in rows])[:, None].repeat(1, 32)
                values[:, ::2] -= 10  # tokens better than the reference's count as 0, not as less
                values[:, 0], values[:, 2] = torch.inf, torch.nan  # like those that are not finite
                counted = torch.tensor([1.0] * len(by_row) + [0.0])[:, None]
                weights.append(weigh(step, rows, values, counted)[:, 0].numpy())

    monkeypatch.setattr(mix, "train", fake_train)
    monkeypatch.setattr(mix, "Mixture", Pass)
    monkeypatch.setattr(search, "train", lambda counts, name: calls.append((name, None, counts)))
    monkeypatch.setattr(
        search,
        "counts",
        lambda shares: dict(zip(data.domains, np.asarray(shares, dtype=float) * 2)),
    )
    monkeypatch.setattr(search, "record", lambda counts, **more: None)
    monkeypatch.setattr(mix, "times_seen", lambda *args: None)
    monkeypatch.setattr(Pass, "__init__", lambda self, *args: None)
    monkeypatch.setattr(Pass, "__len__", lambda self: 6)
    monkeypatch.setattr(Pass, "row", lambda self, i: (order[i], None))
    found = mix.doremi(search)
    assert [(title, lr) for title, lr, _ in calls] == [
        ("uniform", None),
        ("reference", 0.0),
        ("proxy", 1e-2),
    ]

    def moved(alpha, scores):
        raised = alpha * np.exp(scores)
        return 0.999 * raised / raised.sum() + 0.001 / 3

    first = moved(
        np.full(3, 1 / 3), np.array([0.5, 0.0, 0.25])
    )  # half of the tokens have max(1, 0), max(-1, 0), …
    second = moved(
        first, np.array([0.0, 1.0, 0.25])
    )  # sums was not in the batch: it keeps its score
    assert weights[0] == pytest.approx([1, 1, 1, 0], abs=1e-6)  # α / share, α uniform
    assert weights[1] == pytest.approx([first[0] * 3, first[1] * 3, 0], abs=1e-6)
    assert np.array(list(found.values())) / 2 == pytest.approx((first + second) / 2)


def test_weights_of_sequences_scale_the_loss_they_are_trained_on(data, small, tmp_path):
    """Domain `code` counts three times: the first loss in the log is the weighted mean of the model's own losses, and
    weights of one leave the run bitwise as it is."""
    mixture, counts = Mixture(data, {"code": 8, "sums": 8}, 32), {"code": 8, "sums": 8}
    options = {"seq_len": 32, "batch_size": 8, "lr": 1e-2, "micro_batch_size": 3}
    seen = []

    def triple(step, rows, losses, weights):
        seen.extend(
            (step, i, loss, w)
            for i, loss, w in zip(rows, losses.mean(1).tolist(), weights[:, 0].tolist())
        )
        return weights * torch.tensor([[3.0 if mixture[i][0] == "code" else 1.0] for i in rows])

    (tmp_path / "run").mkdir()
    train(load(small), data, counts, **options, out=tmp_path / "run", weigh=triple)
    assert sorted(i for _, i, _, w in seen if w) == list(range(16)) and len(seen) == 18
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    batch = torch.tensor(np.stack([mixture.row(i)[1] for i in range(8)]).astype(np.int64))
    own = load(small)(batch[:, :-1], batch[:, 1:]).mean(1)
    expected = sum(own[i].item() * (3 if mixture[i][0] == "code" else 1) for i in range(8)) / 8
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    plain = train(load(small), data, counts, **options)
    same = train(
        load(small), data, counts, **options, weigh=lambda step, rows, losses, weights: weights
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters()))


def test_the_gradient_of_merged_experts_is_the_slope_of_their_loss(data, small, tmp_path):
    """Against central differences of the loss itself, on the same windows, and for uneven weights of the domains."""
    search = search_of(data, small, tmp_path / "run", method="merge")
    losses, place, experts = stand_in(search)
    w, weights, step = np.array([0.5, 0.2, 0.3]), np.array([0.6, 0.3, 0.1]), 1e-2

    def changes(w):
        place(w)
        return gradient(search, np.zeros(3), 1, 3)

    found = []
    for e in np.eye(3):
        found.append(weights @ (changes(w + step * e) - changes(w - step * e)) / (2 * step))
    place(w)
    at_w = gradient(search, weights, 1, 3)
    exact = experts @ torch.cat([p.grad.flatten() for p in search.model.parameters()])
    assert exact.tolist() == pytest.approx(found, rel=2e-2, abs=1e-4)
    limited = evaluate(search.model, data, "val", 32, limit=20)
    expected = [limited[d][1::3].mean() - search.baseline[d][1::3].mean() for d in data.domains]
    assert at_w == pytest.approx(expected, abs=1e-5)
    assert losses == pytest.approx(
        [v.mean() for v in trained_on_uniform(data, small).values()], abs=1e-6
    )


def test_a_search_warns_where_few_documents_are_measured(data, small, tmp_path, capsys):
    search_of(data, small, tmp_path / "run", eval_sequences=5)
    out = capsys.readouterr().out
    assert all(f"documents of {d} are measured" in out for d in data.domains)
    search_of(data, small, tmp_path / "more", eval_sequences=10**6)
    few = [d for d in data.domains if data.size(d, "val")["documents"] < 10]
    assert capsys.readouterr().out.count("warning:") == len(few) < 3


def trained_on_uniform(data, small):
    model = train(
        load(small),
        data,
        {"code": 16, "prose": 16, "sums": 16},
        **HYPER,
        seen=times_seen(data, 32, []),
    )
    return evaluate(model, data, "val", 32, limit=20)


def test_the_scale_of_the_experts_is_a_projection(data, small, tmp_path):
    search = search_of(data, small, tmp_path / "run", method="merge")
    _, place, experts = stand_in(search)
    base, run = (
        torch.cat([p.flatten() for p in load(name).parameters()])
        for name in (small, tmp_path / "run/round-1")
    )
    place(np.full(3, 1 / 3))
    merged = torch.cat([p.detach().flatten() for p in search.model.parameters()])
    assert (
        torch.dot(run - merged, merged - base).abs()
        < 1e-4 * (merged - base).norm() * (run - base).norm()
    )
    only = torch.cat([p.flatten() for p in load(tmp_path / "run/only-code").parameters()]) - base
    assert torch.allclose(experts[0], search.history[-1]["scale"] * only, atol=1e-6)


def test_excess_is_what_the_whole_budget_would_buy(data, small, tmp_path, script):
    out = tmp_path / "run"
    status, _, err = script(
        "mix", *argv(data, small, out, "--signal", "excess", "--rule", "share", "--rate", 0.5)
    )
    assert status == 0, err
    alone = np.array(
        [json.loads((out / f"only-{d}" / "val.json").read_text())[d] for d in data.domains]
    )
    history = lines_of(out)
    for before, after in zip(history[1:], history[2:]):
        excess = np.array(list(before["losses"].values())) - alone
        assert before["excess"] == pytest.approx(excess) and before["temperature"] == pytest.approx(
            excess.std()
        )
        softmax = np.exp(excess / excess.std()) / np.exp(excess / excess.std()).sum()
        A = np.array(before["quantities"])
        assert after["quantities"] == pytest.approx(A + softmax * A.sum() * 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_as_a_user_runs_it(method, data, small, tmp_path, script):
    """From start to end; then once more from the middle, to the same files; and the tokens are counted the same."""
    out = tmp_path / "run"
    status, text, err = script("mix", *argv(data, small, out, "--method", method))
    assert status == 0, err
    found, result = (
        json.loads((out / "mix.json").read_text()),
        json.loads((out / "result.json").read_text()),
    )
    name = "reweighted" if method == "reweight" else method
    assert found["method"] == method and sum(found["counts"].values()) == 48
    assert (
        list(result["models"]) == list(dict.fromkeys(["untouched", "uniform", name]))
        and mix.verdict(result) in text
    )
    history = lines_of(out)
    assert history[0]["counts"] is None and history[found["round"]]["counts"] == found["counts"]
    assert (out / "mix.png").read_bytes()[:4] == b"\x89PNG"
    val = {d: min(20, len(v)) for d, v in evaluate(load(small), data, "val", 32).items()}
    runs = {
        "uniform": 0,
        "natural": 0,
        "reweight": len(history) - 1,
        "doremi": 3,
        "returns": 7,
        "merge": 2,
    }[method]
    steps = sum(val.values()) if method == "merge" else 0  # which share the validation windows
    evaluations = {"reweight": len(history), "returns": 8, "merge": 2}.get(method, 1)
    assert found["tokens"] == {
        "trained": 32 * (48 * runs + steps),
        "evaluated": 32 * sum(val.values()) * evaluations,
    }
    assert not [*out.glob("more-*/model.safetensors")]  # probes are measured, and no more
    shutil.copytree(out, tmp_path / "again")
    for gone in (
        "model.safetensors",
        "result.json",
        "mix.json",
        "history.jsonl",
        "found",
        "only-code",
        "more-code-1",
    ):
        path = tmp_path / "again" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    status, _, err = script(
        "mix", *argv(data, small, tmp_path / "again", "--method", method, "--resume")
    )
    assert status == 0, err
    assert same_weights(out, tmp_path / "again") and lines_of(tmp_path / "again") == history
    for name in ("mix.json", "result.json"):
        assert (tmp_path / "again" / name).read_text() == (out / name).read_text()


@pytest.mark.parametrize("method", ["doremi", "merge", "returns"])
def test_two_processes_find_the_same(method, data, small, tmp_path, script):
    assert script("mix", *argv(data, small, tmp_path / "one", "--method", method))[0] == 0
    done = command("mix.py", *argv(data, small, tmp_path / "two", "--method", method), ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (
        {k: v for k, v in lines_of(tmp_path / name)[-1]["counts"].items()}
        for name in ("one", "two")
    )
    assert all(abs(one[d] - two[d]) <= 1 for d in data.domains)


def test_the_objective_chooses_the_round(data, small, tmp_path, script):
    """A large rate soon spoils one domain: the best mean and the least harm are then different rounds, or the same."""
    for objective in ("mean", "worst"):
        out = tmp_path / objective
        options = ("--objective", objective, "--start", "code=40,prose=4,sums=4", "--rate", 8)
        status, text, err = script("mix", *argv(data, small, out, *options))
        assert status == 0 and f"round{objective:>9}" in text, err
        history = lines_of(out)
        untouched = np.array(list(history[0]["losses"].values()))
        for line in history:
            losses = np.array(list(line["losses"].values()))
            assert line["mean"] == pytest.approx(losses.mean())
            assert line["worst"] == pytest.approx((losses - untouched).max())
        best = min(history[1:], key=lambda line: line[objective])["counts"]
        assert json.loads((out / "mix.json").read_text())["counts"] == best


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ["--method", "returns", "--start", "code=3,sums=3"],
            "--start code=3,sums=3: --method returns needs every",
        ),
        (["--method", "merge", "--start", "code=3"], "needs every domain in it"),
        (["--method", "magic"], "invalid choice"),
        (["--objective", "best"], "invalid choice"),
    ],
)
def test_what_a_method_cannot_do_is_said_at_once(more, message, data, small, tmp_path, script):
    status, _, err = script("mix", *argv(data, small, tmp_path / "run", *more))
    assert (
        status == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()
    )


def test_merging_needs_whole_models(data, small, tmp_path):
    done = command(
        "mix.py", *argv(data, small, tmp_path / "run", "--method", "merge", "--fsdp"), ranks=2
    )
    assert done.returncode != 0 and "it does not go with --fsdp" in done.stderr


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"code": 1.0, "prose": 1.0, "sums": "x"}'])
def test_a_damaged_measurement_is_named(content, data, small, tmp_path, script):
    out = tmp_path / "run"
    assert script("mix", *argv(data, small, out, "--rounds", 1))[0] == 0
    (out / "model.safetensors").unlink()
    (out / "round-1" / "val.json").write_text(content)
    status, _, err = script("mix", *argv(data, small, out, "--rounds", 1, "--resume"))
    assert status == 2 and "round-1/val.json" in err and err.count("\n") == 1
