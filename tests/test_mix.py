"""The search as a user runs it: its rules, its rounds, what it leaves, and how it goes on."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    Run,
    ends_well,
    fails,
    made_documents,
    options,
    ranks,
    run_script,
    same_weights,
    small_model,
    train_options,
    write_jsonl,
)

from eval import evaluate
from mix import METHODS, RULES, Method, Runs, lopsided, update, verdict
from model import can_compile, load
from prepare import InputError, prepare
from train import Hyperparameters

LN = np.log


# ---- the rules ----


@pytest.mark.parametrize(
    "A, losses, rule, rate, expected",
    [
        # Losses ln 1, ln 2, ln 1: their softmax is 1/4, 1/2, 1/4.
        ([100, 100, 100], LN([1, 2, 1]), "multiplicative", 2, [150, 200, 150]),
        ([100, 100, 100], LN([1, 2, 1]), "additive", 100, [125, 150, 125]),
        ([100, 100, 100], LN([1, 2, 1]), "share", 1, [175, 250, 175]),
        # Losses 0, ln 3: 1/4, 3/4; only differences count, and nothing overflows.
        ([300, 20], 800 + LN([1, 3]), "multiplicative", 4, [600, 80]),
        ([300, 20], LN([1, 3]), "additive", 4, [301, 23]),
        ([300, 20], LN([1, 3]), "share", 0.5, [340, 140]),
    ],
)
def test_rules_by_hand(A, losses, rule, rate, expected):
    assert update(np.array(A), losses, rate, rule) == pytest.approx(expected)


@pytest.mark.parametrize("rule, rate, within", [("share", 0.5, 1e-6), ("additive", 5000, 1e-2)])
def test_these_rules_settle_on_the_softmax_of_the_losses(rule, rate, within):
    A = np.array([1000.0, 10, 10])
    for _ in range(200):
        A = update(A, LN([1, 2, 1]), rate, rule)
    assert A / A.sum() == pytest.approx([0.25, 0.5, 0.25], abs=within)


def test_an_unknown_rule_is_refused():
    with pytest.raises(InputError, match="multiplicative, additive, share"):
        update([1], [1], 1, "exotic")


def test_the_lopsided_mixture_prefers_larger_domains(data):
    counts = lopsided(data, 1000)
    ranked = sorted(data.domains, key=lambda d: data.size(d, "train")["tokens"])
    assert sum(counts.values()) == 1000
    assert sorted(counts, key=counts.get) == ranked
    assert counts[ranked[0]] < 1000 / 7 < 1000 / 2 < counts[ranked[2]]


# ---- searches that many tests look at ----


def mix_options(data, model, out, **changes) -> list[str]:
    """Of mix.py: at most three rounds of six steps of eight sequences, and what is changed."""
    words = {"sequences": 48, "rounds": 3, "seq_len": 32, "eval_sequences": 20, "lr": 1e-2}
    return train_options(data, model, out, mix=False, **words | changes)


def compiled(argv: list[str]) -> None:
    """A search, and how many graphs it compiled."""
    run_script("mix", argv)
    print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture(scope="session")
def searches(data, small, tmp_path_factory):
    """Undisturbed searches: by every method on the small model; and "whole", compiled, on one that
    it pretrains itself. searches(name): waits for it; its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("searches")
    words = {name: mix_options(data, small, folder / name, method=name) for name in METHODS}
    runs = {name: Run(folder, "mix", *argv) for name, argv in words.items()}
    tiny = {"base_sequences": 128, "lr": 4e-3, "no_compile": False}
    argv = mix_options(data, "scratch:tiny", folder / "whole", **tiny)
    runs["whole"] = Run(folder, compiled, argv)
    printed = {}

    def ended(name: str):
        if name not in printed:
            [printed[name]] = ends_well(runs[name])
        return folder / name, printed[name]

    yield ended
    for run in runs.values():
        run.kill()


def read(path) -> dict:
    return json.loads(path.read_text())


def history_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def with_weights(out) -> set[str]:
    return {path.parent.name for path in out.glob("runs/*/model.safetensors")}


def run_on(out, counts: dict[str, int]):
    """The folder of the run on a mixture."""
    [folder] = [
        path.parent
        for path in out.glob("runs/*/run.json")
        if read(path)["settings"]["counts"] == counts
    ]
    return folder


def test_the_result_is_a_mixture_for_train_and_a_model_for_eval(
    searches, data, small, tmp_path, script
):
    out, _ = searches("reweight")
    words = {"mix": out / "mix.json", "sequences": False, "lr": 1e-2}
    ends_well(Run(tmp_path, "train", *train_options(data, small, tmp_path / "again", **words)))
    assert same_weights(tmp_path / "again", out)  # the best round, trained once more
    words = options(data=data.folder, device="cpu", no_compile=True)
    status, text, err = script("eval", small, out, *words)
    assert status == 0, err
    assert "3 of 3" in text


# ---- the methods ----


@pytest.mark.parametrize("method", METHODS)
def test_every_method_as_a_user_runs_it(method, searches, data, small):
    out, text = searches(method)
    found = read(out / "mix.json")
    result = read(out / "result.json")
    name = "reweighted" if method == "reweight" else method
    assert found["method"] == method
    assert sum(found["counts"].values()) == 48
    assert list(result["models"]) == list(dict.fromkeys(["untouched", "uniform", name]))
    assert verdict(result) in text
    assert "warning:" not in text
    history = history_of(out)
    assert history[found["round"]]["counts"] == found["counts"]
    assert (out / "mix.png").read_bytes()[:4] == b"\x89PNG"

    measured = evaluate(load(small), data, "val", 32, limit=20)
    windows = sum(map(len, measured.values()))
    rounds = len(history) - 1
    trained = {"uniform": 0, "natural": 0, "reweight": rounds, "doremi": 3, "returns": 7}[method]
    evaluated = {"reweight": rounds + 1, "returns": 8}.get(method, 1)
    assert found["tokens"] == {"trained": 32 * 48 * trained, "evaluated": 32 * windows * evaluated}
    # Probes are measured, and no more: weights are kept of what the table compares.
    compared = {run_on(out, found["counts"]), run_on(out, dict.fromkeys(data.domains, 16))}
    assert with_weights(out) <= {folder.name for folder in compared}


MOMENTS = {
    "uniform": "rename .*result.json",
    "reweight": "remove .*model.safetensors",  # of the second round
    "doremi": "rename .*history.jsonl",
    "returns": "remove .*model.safetensors",  # of the first probe
}


@pytest.mark.parametrize("method", MOMENTS)
def test_killed_and_resumed_it_ends_the_same(method, searches, data, small, tmp_path):
    out = tmp_path / method
    argv = mix_options(data, small, out, method=method)
    assert Run(tmp_path, "mix", *argv, kill_at=MOMENTS[method]).end()[0] == -9
    assert not (out / "model.safetensors").exists()
    ends_well(Run(tmp_path, "mix", *argv, "--resume"))
    whole, _ = searches(method)
    assert same_weights(out, whole)
    assert history_of(out) == history_of(whole)
    for name in ("mix.json", "result.json"):
        assert (out / name).read_text() == (whole / name).read_text()
    assert with_weights(out) == with_weights(whole)


def test_a_finished_search_prints_its_result_again(searches, data, small, script):
    out, text = searches("reweight")
    status, again, err = script("mix", *mix_options(data, small, out, resume=True))
    assert status == 0, err
    assert again.splitlines()[-12:-1] == text.splitlines()[-12:-1]  # but for how long it took


RANKS = [("reweight", {"fsdp": True}), ("doremi", {}), ("returns", {})]


@pytest.mark.parametrize("method, more", RANKS)
def test_two_processes_search_like_one(method, more, searches, data, small, tmp_path):
    """The same mixtures and the same table, with every rank at work in every run."""
    argv = mix_options(data, small, tmp_path / "two", method=method, **more)
    printed = ends_well(*ranks(tmp_path, 2, "mix", *argv))
    assert sum("on cpu x 2," in text for text in printed) == 1
    one, _ = searches(method)
    for a, b in zip(history_of(tmp_path / "two"), history_of(one), strict=True):
        assert a["counts"] == b["counts"]
        assert a["losses"] == (b["losses"] and pytest.approx(b["losses"], abs=1e-5))
    models = [read(out / "result.json")["models"] for out in (tmp_path / "two", one)]
    for name, model in models[1].items():
        assert models[0][name]["nats"] == pytest.approx(model["nats"], abs=1e-5)


def test_grow_trains_on_the_growing_quantities_and_compares_at_equal_length(
    data, small, tmp_path, script
):
    """Six times as long, the second round is the better one; of few sequences it warns."""
    out = tmp_path / "grow"
    changes = {"sequences": 16, "grow": True, "rule": "additive", "rate": 80, "rounds": 2}
    argv = mix_options(data, small, out, eval_sequences=5, **changes)
    status, text, err = script("mix", *argv)
    assert status == 0, err
    assert [sum(line["counts"].values()) for line in history_of(out)[1:]] == [16, 96]
    assert read(out / "mix.json")["round"] == 2
    assert run_on(out, dict.fromkeys(data.domains, 32)).is_dir()
    assert all(f"documents of {d} are measured" in text for d in data.domains)


def test_the_objective_chooses_the_round(data, small, tmp_path, script):
    """As code is learnt the fastest, half of it has the best mean; less of it spares the others."""
    rounds = {}
    for objective in ("mean", "worst"):
        out = tmp_path / objective
        changes = {"objective": objective, "start": "code=24,prose=12,sums=12", "rate": 2}
        status, text, err = script("mix", *mix_options(data, small, out, **changes))
        assert status == 0, err
        assert f"round{objective:>9}" in text
        history = history_of(out)
        untouched = np.array(list(history[0]["losses"].values()))
        values = []
        for line in history[1:]:
            losses = np.array(list(line["losses"].values()))
            values.append({"mean": losses.mean(), "worst": (losses - untouched).max()}[objective])
            assert line[objective] == pytest.approx(values[-1])
        rounds[objective] = read(out / "mix.json")["round"]
        assert rounds[objective] == 1 + np.argmin(values)
    assert rounds["mean"] != rounds["worst"]


@pytest.mark.parametrize(
    "words, message",
    [
        ({"method": "returns", "start": "code=3,sums=3"}, "--method returns needs every domain"),
        ({"method": "magic"}, "invalid choice"),
        ({"objective": "best"}, "invalid choice"),
        ({"rate": -1}, "--rate -1.0: expected more than 0"),
    ],
)
def test_what_a_method_cannot_do_is_said_at_once(words, message, data, small, tmp_path, script):
    fails(script("mix", *mix_options(data, small, tmp_path / "run", **words)), message)
    assert not (tmp_path / "run").exists()


# ---- runs are named by what they are ----


def interrupted(whole, out) -> None:
    """A copy of a search's folder, as if all were measured but nothing compared."""
    shutil.copytree(whole, out)
    for name in ("model.safetensors", "result.json", "mix.json", "history.jsonl"):
        (out / name).unlink()


def test_after_the_rule_was_edited_no_other_mixtures_losses_come_back(
    searches, data, small, tmp_path, script, monkeypatch
):
    """A search that goes on with another rule finds what one finds that began with it."""
    interrupted(searches("reweight")[0], tmp_path / "edited")
    monkeypatch.setitem(RULES, "multiplicative", (lambda A, S, r: A[::-1] * [9, 2, 0], 1.0))
    for name, resume in (("edited", True), ("fresh", False)):
        argv = mix_options(data, small, tmp_path / name, resume=resume)
        status, _, err = script("mix", *argv)
        assert status == 0, err
    edited = history_of(tmp_path / "edited")
    assert edited[2]["counts"] != history_of(searches("reweight")[0])[2]["counts"]
    for a, b in zip(edited, history_of(tmp_path / "fresh"), strict=True):
        assert a["counts"] == b["counts"]
        assert a["losses"] == pytest.approx(b["losses"], abs=1e-5)


@pytest.fixture
def runs(data, small, tmp_path) -> Runs:
    hyper = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2)
    measured = {"sequences": 8, "eval_sequences": 5}
    return Runs(load(small), small, "small", data, hyper, tmp_path / "runs", **measured)


ONE, TWO, THREE, FOUR = ({"code": n, "sums": 8 - n} for n in (1, 2, 3, 4))


def change(path, **values) -> None:
    path.write_text(json.dumps(read(path) | values))


DAMAGE = {
    "of another run": lambda mine, other: shutil.copy(other, mine),
    "of fewer windows": lambda mine, other: change(mine, eval_sequences=4, losses={}),
    "of one domain": lambda mine, other: change(mine, losses={"code": 1.0}),
    "no numbers": lambda mine, other: change(mine, losses={"code": "x", "prose": 1, "sums": 1}),
    "not finite": lambda mine, other: change(mine, losses={"code": 1, "prose": 1, "sums": np.nan}),
    "cut": lambda mine, other: mine.write_text("{"),
    "a list": lambda mine, other: mine.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_measurement_that_is_not_this_runs_is_made_anew(damage, runs):
    losses = runs.measure(ONE)
    runs.measure(TWO)
    mine, other = (runs.run(counts).folder / "val.json" for counts in (ONE, TWO))
    before = mine.read_text()
    DAMAGE[damage](mine, other)
    assert runs.measure(ONE).tolist() == losses.tolist()
    assert mine.read_text() == before


def test_a_folder_of_another_run_is_refused(runs):
    runs.measure(ONE)
    folder = runs.run(TWO).folder
    shutil.copytree(runs.run(ONE).folder, folder)
    with pytest.raises(InputError, match=f"{folder}: .* of another run; remove the folder"):
        runs.measure(TWO)


def test_no_weights_go_that_are_wanted(runs, tmp_path):
    """Neither the search's own model nor a run's that was kept goes, whoever measures it again."""
    own = tmp_path / "model.safetensors"
    own.write_text("the search's own")

    def kept() -> list[bool]:
        assert own.is_file()
        folders = [runs.run(counts).folder for counts in (ONE, TWO, THREE, FOUR)]
        return [(folder / "model.safetensors").is_file() for folder in folders]

    runs.measure(ONE, keep=True)
    runs.train(TWO)
    for counts in (ONE, TWO, THREE, FOUR | {"prose": 0}):
        runs.measure(counts)
    assert kept() == [True, True, False, False]
    (runs.run(ONE).folder / "val.json").unlink()
    runs.measure(ONE)  # anew
    assert kept() == [True, True, False, False]
    runs.train(FOUR)
    runs.keep_only(ONE, FOUR)
    assert kept() == [True, False, False, True]
    runs.keep_only()
    assert kept() == [False] * 4


# ---- what others add ----


def test_a_rule_and_a_method_are_added_by_one_entry_each(
    data, small, tmp_path, script, monkeypatch
):
    def lean(runs, history, start, args):
        """Half of the start, the other half one domain, which an option of its own names."""
        k = runs.domains.index(args.towards)
        for counts in (start, runs.counts(runs.shares(start) + np.eye(len(runs.domains))[k])):
            history.add(counts, runs.measure(counts))
        return history.lines[-1]["counts"]

    towards = {"choices": data.domains, "default": "code", "help": "a domain"}
    monkeypatch.setitem(METHODS, "lean", Method(lean, {"--towards": towards}))
    monkeypatch.setitem(RULES, "reversed", (lambda A, S, r: A[::-1] * r, 2.0))
    # From 32, 8, 8 the rule makes 32 + 16, 8 + 16, 8 + 64 of 144: a sixth, a half, a third of 48.
    cases = {
        "lean": ({"method": "lean", "towards": "sums"}, [8, 8, 32]),
        "reversed": ({"rule": "reversed", "start": "code=32,prose=8,sums=8"}, [16, 8, 24]),
    }
    for name, (words, counts) in cases.items():
        out = tmp_path / name
        status, text, err = script("mix", *mix_options(data, small, out, **words))
        assert status == 0, err
        history = history_of(out)
        assert list(history[2]["counts"].values()) == counts
        assert (out / "mix.png").read_bytes()[:4] == b"\x89PNG"
        (out / "model.safetensors").unlink()
        argv = mix_options(data, small, out, resume=True, **words)
        status, again, err = script("mix", *argv)
        assert status == 0, err
        assert again.splitlines()[:-1] == text.splitlines()[:-1]  # but for how long it took
        assert history_of(out) == history
    assert read(tmp_path / "lean" / "mix.json")["towards"] == "sums"
    assert read(tmp_path / "reversed" / "mix.json")["rate"] == 2
    argv = mix_options(data, small, tmp_path / "lean", resume=True, method="lean", towards="prose")
    fails(script("mix", *argv), "towards was sums, is prose")


def test_forty_domains_need_no_more_open_files_than_three(tmp_path):
    """Three splits of each are 120 files; a process here may have 256 open, as on macOS."""
    sources = {}
    for i in range(40):
        documents = made_documents("sums", 24, seed=i)
        sources[f"d{i:02}"] = [write_jsonl(tmp_path / f"{i}.jsonl", documents)]
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2}
    data = prepare(tmp_path / "data", sources, "train:300", **fractions)
    model = small_model(tmp_path / "model", data)
    words = {"sequences": 40, "rounds": 2, "seq_len": 8, "eval_sequences": 2}
    ends_well(Run(tmp_path, "mix", *mix_options(data, model, tmp_path / "run", **words)))
    assert [len(line["losses"]) for line in history_of(tmp_path / "run")] == [40] * 3


# ---- the whole search, compiled ----


def test_the_main_job_writes_what_it_promises(searches, data):
    out, text = searches("whole")
    card = (out / "README.md").read_text()
    assert all(word in card for word in ("Losses on the test split", "untouched", "reweighted"))
    history = history_of(out)
    assert [line["round"] for line in history] == list(range(len(history)))
    assert history[0]["counts"] is None
    assert history[1]["counts"] == {"code": 16, "prose": 16, "sums": 16}
    assert {sum(line["counts"].values()) for line in history[1:]} == {48}
    best = min(history[1:], key=lambda line: np.mean(list(line["losses"].values())))
    mixture = read(out / "mix.json")
    assert (mixture["counts"], mixture["round"]) == (best["counts"], best["round"])
    assert (mixture["unit"], mixture["seq_len"], mixture["seed"]) == ("sequences", 32, 0)
    assert (mixture["rule"], mixture["data"]) == ("multiplicative", str(data.folder))
    result = read(out / "result.json")
    assert list(result["models"]) == ["untouched", "uniform", "reweighted"]
    assert result["models"]["reweighted"]["difference"]["mean"]["change"] < 0
    assert verdict(result) in text
    assert all(word in text for word in ("wall time: sample", "base", "comparison"))
    picture = (out / "mix.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20], "big") == 1200  # pixels across


@pytest.mark.parametrize("name", ["whole", "reweight"])
def test_every_round_moves_the_mixture_by_the_rule(name, searches):
    """At rate 1 the growths, in shares of what there was, add up to 1; and the logarithms of two
    of them differ by as much as the losses."""
    history = history_of(searches(name)[0])
    assert len(history) >= 3
    for before, after in zip(history[1:], history[2:], strict=False):
        A = np.array(after["quantities"])
        growth = A / np.array(before["quantities"]) - 1
        losses = np.array(list(before["losses"].values()))
        assert growth.sum() == pytest.approx(1)
        assert np.diff(LN(growth)) == pytest.approx(np.diff(losses))
        counts = np.array(list(after["counts"].values()))
        assert counts == pytest.approx(48 * A / A.sum(), abs=1)


@pytest.mark.skipif(
    not can_compile(torch.device("cpu"))[0], reason=can_compile(torch.device("cpu"))[1]
)
def test_a_whole_search_compiles_each_shape_once(searches):
    """A layer and the losses, each in training, in validation and in the test."""
    text = searches("whole")[1]
    assert "torch.compile (" in text
    assert "graphs: 6\n" in text


def test_the_base_is_used_again(searches, data, script):
    folder = searches("whole")[0].parent
    [base] = folder.glob("base-tiny-*")
    stamp = (base / "model.safetensors").stat().st_mtime_ns
    changes = {"base_sequences": 128, "rounds": 1}
    status, _, err = script("mix", *mix_options(data, "scratch:tiny", folder / "second", **changes))
    assert status == 0, err
    assert [*folder.glob("base-tiny-*")] == [base]
    assert (base / "model.safetensors").stat().st_mtime_ns == stamp
