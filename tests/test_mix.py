"""The search: its rules by hand, its rounds, its interruption, and python mix.py as a user runs it."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, command
from test_train import same_weights

from eval import can_compile
from mix import lopsided, update, verdict
from prepare import InputError

LN = np.log


@pytest.mark.parametrize(
    "rule, rate, expected",
    [
        ("multiplicative", 2.0, [100 + 100 * 0.5, 100 + 100 * 1.0, 100 + 100 * 0.5]),
        ("additive", 100.0, [125, 150, 125]),
        ("share", 1.0, [100 + 75, 100 + 150, 100 + 75]),
    ],
)
def test_rules_by_hand(rule, rate, expected):
    """Losses ln 1, ln 2, ln 1: their softmax is 1/4, 1/2, 1/4."""
    assert update(
        np.array([100.0, 100, 100]), np.array([LN(1), LN(2), LN(1)]), rate, rule
    ) == pytest.approx(expected)


def test_rules_by_hand_from_an_uneven_mixture():
    """Losses 0, ln 3: softmax 1/4, 3/4."""
    A, L = np.array([300.0, 20.0]), np.array([0, LN(3)])
    assert update(A, L, 4.0, "multiplicative") == pytest.approx([600, 80])
    assert update(A, L, 4.0, "additive") == pytest.approx([301, 23])
    assert update(A, L, 0.5, "share") == pytest.approx([340, 140])
    assert update(A, L + 800, 4.0) == pytest.approx(
        [600, 80]
    )  # only differences count, and nothing overflows


def test_share_and_additive_settle_on_softmax_of_the_losses():
    A = B = np.array([1000.0, 10, 10])
    for _ in range(200):
        A, B = (
            update(A, [0, LN(2), LN(1)], 0.5, "share"),
            update(B, [0, LN(2), LN(1)], 5000, "additive"),
        )
    assert A / A.sum() == pytest.approx(
        [0.25, 0.5, 0.25], abs=1e-6
    ) and B / B.sum() == pytest.approx([0.25, 0.5, 0.25], abs=1e-2)


def test_an_unknown_rule_is_refused():
    with pytest.raises(InputError, match="multiplicative, additive, share"):
        update([1], [1], 1, "exotic")


def test_the_lopsided_mixture_prefers_larger_domains(data):
    counts = lopsided(data, 1000)
    ranked = sorted(data.domains, key=lambda d: data.size(d, "train")["tokens"])
    assert sum(counts.values()) == 1000 and sorted(counts, key=counts.get) == ranked
    assert counts[ranked[0]] < 1000 / 7 < 1000 / 2 < counts[ranked[2]]


def argv(data, out, *more):
    return [
        "--data",
        data.folder,
        "--out",
        out,
        "--model",
        "scratch:tiny",
        "--seq-len",
        32,
        "--base-sequences",
        128,
        "--batch-size",
        8,
        "--sequences",
        48,
        "--rounds",
        3,
        "--eval-sequences",
        20,
        *SMALL,
        *more,
    ]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """One undisturbed run."""
    out = tmp_path_factory.mktemp("mix") / "whole"
    done = command("mix.py", *argv(data, out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def history_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def best_round(history: list[dict]) -> dict:
    return min(history[1:], key=lambda line: np.mean(list(line["losses"].values())))


def test_the_main_job_writes_what_it_promises(whole, data):
    out, text = whole
    card = (out / "README.md").read_text()
    assert "Losses on the test split" in card and "untouched" in card and "reweighted" in card
    history, mixture, result = (
        history_of(out),
        json.loads((out / "mix.json").read_text()),
        json.loads((out / "result.json").read_text()),
    )
    assert [line["round"] for line in history] == list(range(len(history))) and 3 <= len(
        history
    ) <= 4
    assert history[1]["counts"] == {"code": 16, "prose": 16, "sums": 16} and all(
        sum(line["counts"].values()) == 48 for line in history[1:]
    )
    assert (
        mixture["counts"] == best_round(history)["counts"]
        and mixture["unit"] == "sequences"
        and mixture["seq_len"] == 32
    )
    assert (mixture["rule"], mixture["seed"], mixture["data"]) == (
        "multiplicative",
        0,
        str(data.folder),
    )
    assert (
        list(result["models"]) == ["untouched", "uniform", "reweighted"] and verdict(result) in text
    )
    assert result["models"]["reweighted"]["difference"]["mean"]["change"] < 0
    assert "wall time: sample" in text and "base" in text and "comparison" in text
    picture = (out / "mix.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(picture[16:20], "big") == 1200


def test_every_round_moves_the_mixture_by_the_rule(whole):
    history = history_of(whole[0])
    for before, after in zip(history[1:], history[2:]):
        losses = np.array(list(before["losses"].values()))
        softmax = np.exp(losses) / np.exp(losses).sum()
        expected = np.array(before["quantities"]) * (1 + 1.0 * softmax)
        assert after["quantities"] == pytest.approx(expected)
        share = np.array([after["counts"].get(d, 0) for d in before["losses"]]) / 48
        assert share == pytest.approx(expected / expected.sum(), abs=1 / 48)


def test_the_result_is_a_mixture_for_train_and_a_model_for_eval(whole, data, tmp_path, script):
    out, _ = whole
    base = next(out.parent.glob("base-tiny-*"))
    argv = [
        "--data",
        data.folder,
        "--batch-size",
        8,
        "--seq-len",
        32,
        "--eval-sequences",
        20,
        *SMALL,
    ]
    assert (
        script(
            "train", "--mix", out / "mix.json", "--model", base, "--out", tmp_path / "again", *argv
        )[0]
        == 0
    )
    assert same_weights(tmp_path / "again", out)  # the best round, trained once more
    status, text, _ = script(
        "eval",
        base,
        out,
        "--data",
        data.folder,
        "--seq-len",
        32,
        "--device",
        "cpu",
        "--no-compile",
        "--dtype",
        "float32",
    )
    assert status == 0 and "domains better" in text


def test_killed_between_rounds_and_resumed_ends_the_same(whole, data, tmp_path):
    out = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, ROOT / "mix.py", *map(str, argv(data, out))], stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (
        (out / "history.jsonl").exists() and len(history_of(out)) >= 2
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model.safetensors").exists()
    resumed = command("mix.py", *argv(data, out, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert history_of(out) == history_of(whole[0]) and same_weights(out, whole[0])
    assert json.loads((out / "result.json").read_text()) == json.loads(
        (whole[0] / "result.json").read_text()
    )
    printed = command("mix.py", *argv(data, out, "--resume"))  # finished: prints its result again
    assert (
        printed.returncode == 0
        and verdict(json.loads((out / "result.json").read_text())) in printed.stdout
    )


def test_the_base_is_reused(whole, data, script):
    out, _ = whole
    bases = list(out.parent.glob("base-tiny-*"))
    stamp = (bases[0] / "model.safetensors").stat().st_mtime_ns
    status, _, err = script("mix", *argv(data, out.parent / "second", "--rounds", 1))
    assert status == 0, err
    assert (
        list(out.parent.glob("base-tiny-*")) == bases
        and (bases[0] / "model.safetensors").stat().st_mtime_ns == stamp
    )


def test_grow_trains_on_the_growing_quantities_and_compares_at_equal_length(data, script, whole):
    out = whole[0].parent / "grow"
    status, _, err = script(
        "mix", *argv(data, out, "--grow", "--rule", "additive", "--rate", 480, "--rounds", 2)
    )
    assert status == 0, err
    history = history_of(out)
    assert [sum(line["counts"].values()) for line in history[1:]] == [48, 528]
    assert best_round(history)["round"] == 2  # eleven times as long, so better
    log = (out / "uniform" / "log.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["sequences"] for line in log) == 528


def test_it_stops_when_two_rounds_bring_nothing(data, whole, script):
    """With everything in one domain after a round, the mean can only get worse."""
    out = whole[0].parent / "stop"
    status, text, err = script("mix", *argv(data, out, "--rate", 1e6, "--rounds", 9, "--lr", 0.02))
    assert status == 0, err
    history = history_of(out)
    assert (
        "has not improved for two rounds" in text
        and len(history) - 1 == best_round(history)["round"] + 2 < 9
    )


@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_two_processes_search_like_one(whole, data, tmp_path, more):
    """The same rounds and the same table, with every rank at work in every run."""
    done = command("mix.py", *argv(data, tmp_path / "ranks", *more), ranks=2)
    assert done.returncode == 0 and "on cpu x 2," in done.stdout, done.stderr
    for a, b in zip(history_of(tmp_path / "ranks"), history_of(whole[0]), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], abs=1e-5) and a["counts"] == b["counts"]
    a, b = (
        json.loads((out / "result.json").read_text())["models"]
        for out in (tmp_path / "ranks", whole[0])
    )
    for name in b:
        assert a[name]["nats"] == pytest.approx(b[name]["nats"], abs=1e-5)


@pytest.mark.skipif(
    not can_compile(torch.device("cpu"))[0], reason=can_compile(torch.device("cpu"))[1]
)
def test_a_whole_search_compiles_each_shape_once(data, tmp_path, script):
    """A layer and the losses, each with a gradient and without: four graphs for the base, all rounds and the table."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = [word for word in argv(data, tmp_path / "run") if word != "--no-compile"]
    status, text, err = script("mix", *compiled)
    assert status == 0 and "torch.compile (" in text, err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
