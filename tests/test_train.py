"""The training loop: exact under resuming and under ranks, and the same step that plain PyTorch takes."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import can_compile, evaluate, mean_loss, rows_in_training
from model import SHAPES, GPTNeoX, load
from prepare import Data, Tokenizer
from train import Mixture, learning_rate, train


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(a, b) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_training(found, expected, atol):
    """Weights agree, but for key biases: their gradient is zero, and Adam makes whole steps of its rounding."""
    for name, weight in found.items():
        difference = (weight - expected[name]).detach()
        if name.endswith("query_key_value.bias"):
            difference.view(4, 3, 8)[:, 1] = 0  # heads, (query, key, value), head dimension
        assert difference.abs().max() <= atol, name


def argv(data, small, out, *more):
    return [
        "--data",
        data.folder,
        "--model",
        small,
        "--out",
        out,
        "--mix",
        "uniform",
        "--sequences",
        44,
        "--batch-size",
        8,
        "--lr",
        1e-3,
        "--eval-sequences",
        8,
        *SMALL,
        *more,
    ]


def test_a_run_equals_a_loop_written_with_transformers(data, small):
    """The oracle: transformers' model and gradients, AdamW and clipping by hand, one sequence at a time."""
    counts, lr = {"code": 5, "sums": 6}, 1e-2
    model = train(load(small), data, counts, seq_len=32, batch_size=4, lr=lr, micro_batch_size=3)
    oracle, mixture = AutoModelForCausalLM.from_pretrained(small), Mixture(data, counts, 32)
    state = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in oracle.parameters()}
    for step, batch in enumerate((range(0, 4), range(4, 8), range(8, 11))):
        for i in batch:
            _, inputs, targets = mixture[i]
            logits = oracle(torch.tensor(inputs.astype("int64"))[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets.astype("int64")))
            (loss / len(batch)).backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in oracle.parameters()))
        x = (step + 0.5) / 3
        rate = lr * x / 0.2 if x < 0.2 else lr * (1 + math.cos(math.pi * (x - 0.2) / 0.8)) / 2
        with torch.no_grad():
            for p, (m, v) in state.items():
                g = p.grad * min(1, 1 / (norm + 1e-6))
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                p.mul_(1 - rate * 0.1 * (p.dim() == 2))
                p -= (
                    rate
                    * (m / (1 - 0.9 ** (step + 1)))
                    / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
                )
                p.grad = None
    expected = {name.replace("lm_head", "embed_out"): p for name, p in oracle.named_parameters()}
    assert_same_training(dict(model.named_parameters()), expected, atol=5e-5)


def test_schedule_rises_from_zero_and_falls_to_zero():
    rates = [learning_rate(s, 1000, 1.0, 0.2) for s in range(1000)]
    assert max(rates) == pytest.approx(1, abs=0.01) and 195 <= rates.index(max(rates)) <= 205
    assert 0 < rates[0] < 0.01 and 0 < rates[-1] < 0.01
    assert rates[:199] == sorted(rates[:199]) and rates[201:] == sorted(rates[201:], reverse=True)
    assert learning_rate(0, 1, 1.0, 0.0) > 0


def test_training_helps_the_domain_it_is_given(data, small):
    model = load(small)
    before = evaluate(model, data, "val", 32)
    after = evaluate(
        train(model, data, {"sums": 128}, seq_len=32, batch_size=8, lr=1e-2), data, "val", 32
    )
    change = {d: after[d].mean() - before[d].mean() for d in data.domains}
    assert min(change, key=change.get) == "sums" and change["sums"] < -0.5


def test_micro_batch_size_changes_nothing_but_rounding(data, small):
    weights = [
        train(
            load(small),
            data,
            {"code": 5, "sums": 6},
            seq_len=32,
            batch_size=4,
            lr=1e-2,
            micro_batch_size=m,
        ).state_dict()
        for m in (1, 3, 4)
    ]
    for other in weights[1:]:
        assert_same_training(other, weights[0], atol=5e-5)


def test_the_model_card_says_what_the_model_is_made_of(data, small, tmp_path, script):
    """Base, mixture, hyperparameters, data and every domain's losses; no path of this machine."""
    assert script("train", *argv(data, small, tmp_path / "run"))[0] == 0
    card = (tmp_path / "run" / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert front == "library_name: transformers\n"
    run, result = (
        json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("run", "result")
    )
    for d, count in run["settings"]["counts"].items():
        assert re.search(rf"^{d} +{count} ", text, re.M)
    for key in ("batch_size", "lr", "warmup", "seed"):
        assert f"{key} {run['settings'][key]}" in text
    for d in data.domains:
        assert (
            re.search(rf"^{d}\*? .*{result['models']['after']['nats'][d]:.4f}", text, re.M)
            and f"{d}.jsonl" in text
        )
    assert data.identity in text and data.meta["tokenizer"]["sha256"] in text
    assert str(data.folder.parent) not in text


def test_the_run_folder_is_a_hugging_face_folder_with_a_log(data, small, tmp_path, script):
    status, out, err = script(
        "train", *argv(data, small, tmp_path / "run", "--eval-every", 2, "--save-every", 2)
    )
    assert status == 0, err
    assert "times through" in out and "domains better" in out
    log = log_of(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(6)) and [
        line["sequences"] for line in log
    ] == [8] * 5 + [4]
    assert [line["step"] for line in log if "val" in line] == [1, 3, 5] and {*log[1]["val"]} == {
        *data.domains,
        "mean",
    }
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    tokens = torch.randint(400, (1, 32))
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "run")(tokens).logits,
        load(tmp_path / "run")(tokens),
    )
    theirs, text = (
        AutoTokenizer.from_pretrained(tmp_path / "run"),
        "The stone house.\n    return x * 7  # naïve",
    )
    assert theirs(text)["input_ids"] == Tokenizer(data.folder).encode(text).tolist()
    losses = evaluate(load(tmp_path / "run"), data, "val", 32, limit=8)
    assert log[-1]["val"]["mean"] == pytest.approx(mean_loss(losses), abs=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_killed_and_resumed_ends_with_the_same_weights(data, small, tmp_path, compiled):
    if compiled and not can_compile(torch.device("cpu"))[0]:
        pytest.skip(can_compile(torch.device("cpu"))[1])
    base = [
        x
        for x in argv(data, small, "OUT", "--save-every", 2, "--sequences", 400)
        if not (compiled and x == "--no-compile")
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command("train.py", *[whole if x == "OUT" else x for x in base]).returncode == 0
    mine = [broken if x == "OUT" else x for x in base]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, mine)], stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not list(broken.glob("checkpoint-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(broken.glob("checkpoint-*")) and not (broken / "model.safetensors").exists()
    assert command("train.py", *mine).returncode == 2  # neither --resume nor --overwrite
    resumed = command("train.py", *mine, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(whole, broken)
    drop = ("tokens_per_second",)
    assert [{k: v for k, v in line.items() if k not in drop} for line in log_of(broken)] == [
        {k: v for k, v in line.items() if k not in drop} for line in log_of(whole)
    ]


def test_resume_of_nothing_starts_and_of_a_finished_run_prints_its_result(
    data, small, tmp_path, script
):
    first = script("train", *argv(data, small, tmp_path / "run", "--resume"))
    stamp = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    again = script("train", *argv(data, small, tmp_path / "run", "--resume"))
    assert first[0] == again[0] == 0
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == stamp
    assert first[1].splitlines()[-8:] == again[1].splitlines()[-8:]
    status, _, err = script(
        "train", *argv(data, small, tmp_path / "run", "--resume", "--seed", 1, "--warmup", 0.1)
    )
    assert status == 2 and "seed was 0, is 1" in err and "warmup was 0.2, is 0.1" in err


def test_overwrite_starts_anew(data, small, tmp_path, script):
    assert script("train", *argv(data, small, tmp_path / "run"))[0] == 0
    assert script("train", *argv(data, small, tmp_path / "run", "--seed", 1, "--overwrite"))[0] == 0
    assert script("train", *argv(data, small, tmp_path / "other", "--seed", 1))[0] == 0
    assert same_weights(tmp_path / "run", tmp_path / "other")


def test_a_tuned_model_remembers_its_passes(data, small, tmp_path, script):
    """Training on from it draws windows that it has not seen, as long as there are some."""
    assert (
        script("train", *argv(data, small, tmp_path / "one", "--mix", "sums=1", "--sequences", 20))[
            0
        ]
        == 0
    )
    assert (
        script(
            "train",
            *argv(data, tmp_path / "one", tmp_path / "two", "--mix", "sums=1", "--sequences", 15),
        )[0]
        == 0
    )
    passes = json.loads((tmp_path / "two" / "run.json").read_text())["passes"]
    assert [p["counts"] for p in passes] == [{"sums": 20}, {"sums": 15}] and passes[0][
        "data"
    ] == Data(data.folder).identity


def test_a_gpu_gets_as_many_sequences_as_its_memory_holds(monkeypatch):
    """Worked out by hand for pythia-1b on 24 and 40 GiB: 18 x 1,011,781,632 bytes, then 3.3 GB a sequence."""
    with torch.device("meta"):
        model = GPTNeoX(SHAPES["pythia-1b"])
    memory = SimpleNamespace(total_memory=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    found = {}
    for gib in (16, 24, 40, 80):
        memory.total_memory = gib * 2**30
        found[gib] = rows_in_training(model, 2048, torch.bfloat16, torch.device("cuda"))
    assert found == {16: 1, 24: 1, 40: 6, 80: 10}
    model.checkpointing, memory.total_memory = True, 24 * 2**30
    assert rows_in_training(model, 2048, torch.bfloat16, torch.device("cuda")) == 5
