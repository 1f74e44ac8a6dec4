"""The training loop and a run's folder: the step that plain PyTorch takes, and what is kept."""

import json
import math
import os
import re
import runpy
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_training, fails, log_of, same_weights, train_options, works
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from eval import domain_means, evaluate
from model import SHAPES, load
from prepare import Data, InputError
from train import Hyperparameters, Mixture, name_of

STEPS_OF_4 = Hyperparameters(seq_len=32, batch_size=4, learning_rate=1e-2)
STEPS_OF_8 = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-3)  # train_options' own


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_a_run_equals_a_loop_written_with_transformers(data, small, micro_batch_size):
    """Of transformers' model, AdamW and clipping by hand, one sequence at a time."""
    counts = {"code": 5, "sums": 6}
    hyper = replace(STEPS_OF_4, micro_batch_size=micro_batch_size)
    model = train.train(load(small), data, counts, hyper)
    oracle = AutoModelForCausalLM.from_pretrained(small)
    mixture = Mixture(data, counts, 32)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in oracle.parameters()}
    for step, batch in enumerate((range(0, 4), range(4, 8), range(8, 11))):
        for i in batch:
            _, inputs, targets = mixture[i]
            logits = oracle(torch.tensor(inputs.astype("int64"))[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets.astype("int64")))
            (loss / len(batch)).backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in oracle.parameters()))
        rate = (8.333333e-3, 6.913417e-3, 1.033233e-3)[step]  # worked out by hand
        with torch.no_grad():
            for p, (m, v) in moments.items():
                gradient = p.grad * min(1, 1 / (norm + 1e-6))
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.95).add_(0.05 * gradient**2)
                p.mul_(1 - rate * 0.1 * (p.dim() == 2))
                size = (v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                p -= rate * m / (1 - 0.9 ** (step + 1)) / size
                p.grad = None
    expected = {name.replace("lm_head", "embed_out"): p for name, p in oracle.named_parameters()}
    assert_same_training(dict(model.named_parameters()), expected, atol=5e-5)


def test_the_schedule_rises_from_zero_and_falls_to_zero():
    rates = [train.learning_rate_at(step, 1000, 1.0, 0.2) for step in range(1000)]
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert 195 <= rates.index(max(rates)) <= 205
    assert 0 < rates[0] < 0.01
    assert 0 < rates[-1] < 0.01
    assert rates[:199] == sorted(rates[:199])
    assert rates[201:] == sorted(rates[201:], reverse=True)
    assert train.learning_rate_at(0, 1, 1.0, 0.0) > 0


def test_the_warmup_that_was_asked_for(data, small, tmp_path, script):
    """Half of six steps: the first one's middle is a sixth of the way up."""
    works(script("train", *train_options(data, small, tmp_path / "run", warmup=0.5)))
    assert log_of(tmp_path / "run")[0]["lr"] == pytest.approx(1e-3 / 6)


def test_training_helps_the_domain_it_is_given(data, small):
    model = load(small)
    before = domain_means(evaluate(model, data, "val", 32))
    train.train(model, data, {"sums": 128}, replace(STEPS_OF_4, batch_size=8))
    change = domain_means(evaluate(model, data, "val", 32)) - before
    assert data.domains[change.argmin()] == "sums"
    assert change.min() < -0.5


@pytest.mark.parametrize(
    "rows, fit, size", [(64, 10, 8), (64, 13, 13), (61, 10, 9), (16, 32, 16), (7, 4, 4), (5, 1, 1)]
)
def test_no_more_rows_than_must_be_only_fill_a_micro_batch_up(rows, fit, size, monkeypatch):
    monkeypatch.setattr("train.sequences_at_once", lambda *setting, training: fit)
    hyper = replace(STEPS_OF_4, batch_size=rows)
    assert train.micro_batch_size(None, hyper, torch.device("cpu"), 999) == size


@pytest.mark.parametrize(
    "eval_every, evaluation, steps",
    [(2, 2, 2), (2, 4, 6), (0, 2, 6)],
    ids=["after two steps", "after the last", "the last alone"],
)
def test_a_signal_in_an_evaluation_stops_it_and_nothing_is_lost(
    data, small, tmp_path, script, monkeypatch, eval_every, evaluation, steps
):
    """Before the first step, of the run, and of the one that goes on; the last ends like one that
    nobody stopped."""
    stop_in = 0
    begun = 0

    def four(*args, **kwargs):
        nonlocal begun
        begun += 1
        if begun == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return 4

    # Asked once by every evaluation, of which the first is that of the untrained model.
    monkeypatch.setattr("eval.sequences_at_once", four)
    whole = tmp_path / "whole"
    works(script("train", *train_options(data, small, whole, eval_every=eval_every)))
    out = tmp_path / "run"
    words = train_options(data, small, out, eval_every=eval_every, resume=True)
    for stop_in, done, message in (
        (1, 0, "stopped; go on with: python train.py"),
        (evaluation, steps, f"stopped and saved after step {steps} of 6; go on with"),
        (2, steps, "stopped; go on with"),
    ):
        begun = 0
        status, _, err = script("train", *words)
        assert (status, begun) == (143, stop_in)
        assert message in err
        saved = [path.name for path in out.glob("checkpoint-*")]
        assert saved == [f"checkpoint-{steps:08d}"][:done]
        assert len(log_of(out)) == done
        assert not any("val" in line for line in log_of(out)[-1:])
    stop_in = 0
    works(script("train", *words))
    assert same_weights(out, whole)
    assert log_of(out) == log_of(whole)
    assert (out / "result.json").read_bytes() == (whole / "result.json").read_bytes()


# ---- a run's folder ----


def test_a_run_leaves_a_hugging_face_folder_with_a_log(data, small, tmp_path, script):
    out = tmp_path / "run"
    words = train_options(data, small, out, eval_every=4, save_every=2, resume=True)
    text = works(script("train", *words))
    assert text.startswith(f"{out} holds no run to go on with: this is a new one\n")
    assert "pass    44 sequences of 32 tokens (1,408 in all), 8 a step, lr 0.001" in text
    assert "domains better" in text
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(6))
    assert [line["sequences"] for line in log] == [8, 8, 8, 8, 8, 4]
    assert [line["step"] for line in log if "val" in line] == [3, 5]  # the last is there, too
    assert log[3]["val"].keys() == {*data.domains, "mean"}
    losses = evaluate(load(out), data, "val", 32, limit=8)
    assert log[-1]["val"]["mean"] == pytest.approx(domain_means(losses).mean(), abs=1e-5)
    assert not list(out.glob("checkpoint-*"))
    tokens = torch.randint(400, (1, 32))
    theirs = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
    torch.testing.assert_close(theirs, load(out)(tokens))
    assert (out / "tokenizer.json").read_bytes() == (data.folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_is_saved_in_the_type_that_was_asked_for(data, small, tmp_path, script, dtype):
    words = train_options(data, small, tmp_path / "run", save_dtype=dtype)
    works(script("train", *words))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert str(theirs.dtype) == f"torch.{dtype}"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["torch_dtype"] == dtype
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}


def test_the_model_card_says_what_the_model_is_made_of(data, small, tmp_path, script):
    """Base, mixture, hyperparameters, data and every domain's losses; no path of this machine."""
    out = tmp_path / "run"
    works(script("train", *train_options(data, small, out, mix="code=3,sums=1")))
    card = (out / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert front == "library_name: transformers\n"
    assert f"from `{small.name}`" in text
    assert re.search(r"^code +33 +75.0%$", text, re.M)
    assert re.search(r"^sums +11 +25.0%$", text, re.M)
    for setting in ("batch_size 8", "learning_rate 0.001", "warmup 0.2", "seed 0", "float32"):
        assert setting in text
    assert data.identity in text
    assert data.meta["tokenizer"]["sha256"] in text
    after = json.loads((out / "result.json").read_text())["models"]["after"]
    for d in data.domains:
        change = after["difference"][d]["change"]
        assert re.search(rf"^{d}\*? .* {re.escape(f'{change:+.4f}')} ", text, re.M)
    assert str(data.folder.parent) not in text


def test_a_card_that_cannot_be_made_costs_no_weights(data, small, tmp_path, script, monkeypatch):
    monkeypatch.delattr("train.model_card")
    text = works(script("train", *train_options(data, small, tmp_path / "run")))
    assert f"warning: {tmp_path / 'run' / 'README.md'} could not be made: NameError" in text
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_resume_starts_a_run_and_prints_and_draws_a_finished_one(data, small, tmp_path, script):
    words = train_options(data, small, tmp_path / "run", resume=True, eval_every=2)
    first = works(script("train", *words))
    stamp = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    picture = (tmp_path / "run" / "train.png").read_bytes()
    (tmp_path / "run" / "train.png").unlink()
    again = works(script("train", *words))
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == stamp
    assert first.splitlines()[-8:] == again.splitlines()[-8:]
    assert (tmp_path / "run" / "train.png").read_bytes() == picture


def test_overwrite_starts_anew_and_removes_only_what_a_run_leaves(data, small, tmp_path, script):
    out = tmp_path / "run"
    works(script("train", *train_options(data, small, out)))
    train.train(load(small), data, {"sums": 24}, STEPS_OF_8, out=out, save_every=2)  # checkpoints
    (out / "notes.txt").write_text("my own")
    (out / "plots" / "checkpoint-1").mkdir(parents=True)
    other = train_options(data, small, out, seed=1)
    fails(script("train", *other), f"{out} is not empty", "--resume", "--overwrite")
    assert "going on" not in works(script("train", *other, "--overwrite"))
    works(script("train", *train_options(data, small, tmp_path / "new", seed=1)))
    assert same_weights(out, tmp_path / "new")
    assert log_of(out) == log_of(tmp_path / "new")
    names = {path.relative_to(out) for path in out.rglob("*")}
    new = {path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*")}
    assert names - new == {Path("notes.txt"), Path("plots"), Path("plots/checkpoint-1")}
    assert (out / "notes.txt").read_text() == "my own"


def test_a_mixture_in_a_file_is_not_read_again(data, small, tmp_path, script):
    """A run goes on with the counts that it began with, whatever became of the file."""
    mixture = tmp_path / "mixture.json"
    mixture.write_text('{"code": 30, "sums": 14}')
    out = tmp_path / "run"
    works(script("train", *train_options(data, small, out, mix=mixture)))
    mixture.unlink()
    works(script("train", "--resume", "--out", out))
    changed = train_options(data, small, out, mix="code=14,sums=30")
    fails(script("train", *changed, "--resume"), "counts was {'code': 30, 'sums': 14}, is {'code'")


def test_a_file_that_names_a_domain_twice_is_no_mixture(data, tmp_path):
    mixture = tmp_path / "mixture.json"
    mixture.write_text('{"code": 30, "sums": 14, "code": 3}')
    with pytest.raises(InputError, match="mixture.json: 'code' is named twice; name it once"):
        train.parse_mixture(str(mixture), data, None, 32)


def test_more_than_four_times_through_a_domain_is_warned_of(data, capsys):
    n = {d: data.windows(d, "train", 32) for d in data.domains}
    counts = {"code": n["code"], "prose": 4 * n["prose"], "sums": 4 * n["sums"] + 1}
    train.say_mixture(Mixture(data, counts, 32))
    text = capsys.readouterr().out
    assert "times through a domain: sums 4.0, prose 4.0\n" in text
    assert "warning: more than 4 times through sums;" in text


def test_a_searchs_folder_is_no_mixture_but_holds_one(data, tmp_path):
    (tmp_path / "mix.json").write_text("{}")
    with pytest.raises(InputError, match=f"expected {tmp_path}/mix.json, perhaps"):
        train.parse_mixture(str(tmp_path), data, None, 32)


def test_a_domain_may_be_called_counts(tmp_path, data):
    named = Path(shutil.copytree(data.folder, tmp_path / "d"))
    for file in [*named.glob("sums.*.bin"), named / "meta.json"]:
        content = file.read_bytes().replace(b'"sums.', b'"counts.')
        file.unlink()
        (named / file.name.replace("sums.", "counts.")).write_bytes(content)
    mixture = tmp_path / "mixture.json"
    counts = {"code": 3, "counts": 4}
    for content in (counts, {"counts": counts, "seq_len": 32}):
        mixture.write_text(json.dumps(content))
        assert train.parse_mixture(str(mixture), Data(named), None, 32) == counts


def test_a_search_and_a_run_do_not_take_one_another_for_their_own(data, small, tmp_path, script):
    for name, other in (("train", "mix"), ("mix", "train")):
        out = tmp_path / name
        out.mkdir()
        own = {"method": "uniform"} if name == "mix" else {"mix": "uniform"}
        (out / "run.json").write_text(json.dumps({"settings": own, "options": own}))
        for way in ("--resume", "--overwrite"):
            words = train_options(data, small, out, mix=False)
            fails(script(other, *words, way), f"of {name}.py's; choose another --out")


def test_a_tuned_model_remembers_its_passes(data, small, tmp_path, script):
    """Training on from it draws windows that it has not seen, as long as there are some."""
    first = train_options(data, small, tmp_path / "one", mix="sums=1", sequences=20)
    second = train_options(data, tmp_path / "one", tmp_path / "two", mix="sums=1", sequences=15)
    works(script("train", *first))
    works(script("train", *second))
    passes = json.loads((tmp_path / "two" / "run.json").read_text())["passes"]
    assert [one["counts"] for one in passes] == [{"sums": 20}, {"sums": 15}]
    assert [one["data"] for one in passes] == [data.identity] * 2
    seen = train.times_seen(data, 32, passes[:1])
    expected = train.train(load(tmp_path / "one"), data, {"sums": 15}, STEPS_OF_8, seen=seen)
    found = load(tmp_path / "two").state_dict()
    torch.testing.assert_close(found, expected.state_dict(), rtol=0, atol=0)


def test_passes_of_the_base_that_changed_are_named(data, small, tmp_path, script):
    """What is no part of what the base is may be given anew."""
    base = tmp_path / "base"
    works(script("train", *train_options(data, small, base)))
    words = train_options(data, base, tmp_path / "run", resume=True)
    works(script("train", *words))
    works(script("train", "--resume", "--out", base, "--save-every", 7, "--save-dtype", "float16"))
    works(script("train", *words))
    record = json.loads((base / "run.json").read_text())
    assert record["options"]["save_dtype"] == "float32"
    (base / "run.json").write_text(json.dumps(record | {"passes": []}))
    fails(script("train", *words), "--resume with other settings", "model's files was")


@pytest.mark.parametrize(
    "name, size, batch_size, learning_rate",
    [
        ("pythia-14m", "pythia-14m", 64, 1e-5),  # the post's
        ("scratch:pythia-14m", "pythia-14m", 64, 1e-3),  # at which random weights learn something
        ("scratch:tiny", "tiny", 16, 4e-3),
        ("out/train", "tiny", 16, 4e-3),  # a tiny that was trained
    ],
)
def test_a_model_has_its_own_hyperparameters(name, size, batch_size, learning_rate):
    own = train.defaults(name, SHAPES[size])
    assert (own["batch_size"], own["learning_rate"]) == (batch_size, learning_rate)
    assert own["seq_len"] == SHAPES[size].max_position_embeddings


# ---- what names a run ----


def test_every_setting_but_the_micro_batch_size_names_a_run():
    changes = [{"learning_rate": 2e-2}, {"warmup": 0.1}, {"seed": 1}, {"batch_size": 8}]
    changes += [{"seq_len": 16}, {"dtype": torch.bfloat16}]
    names = {name_of(replace(STEPS_OF_4, **change).record()) for change in ({}, *changes)}
    assert len(names) == 1 + len(changes)
    assert name_of(replace(STEPS_OF_4, micro_batch_size=2).record()) in names


def name_where(folder: Path, edited: str, edits: dict[str, str]) -> str:
    """A run's name by copies of the scripts, in one of which other text stands in some places."""
    for script in ("prepare.py", "model.py", "eval.py", "train.py"):
        text = (ROOT / script).read_text()
        for old, new in edits.items() if script == edited else ():
            assert old in text
            text = text.replace(old, new)
        (folder / script).write_text(text)
    return runpy.run_path(str(folder / "train.py"))["name_of"]({})


@pytest.mark.parametrize(
    "name, old, new, same",
    [
        ("train.py", "betas=(0.9, 0.95)", "betas=(0.9, 0.99)", False),
        ("model.py", "F.gelu(self", "F.relu(self", False),
        ("prepare.py", "start = number * seq_len", "start = number * seq_len + 1", False),
        ("eval.py", "np.arange(n) * count // n", "np.arange(n)", False),
        ("eval.py", '"bits per byte", "",', '"bits a byte", "",', True),
        ("eval.py", "if not finite.all()", "if not finite.any()", False),  # evaluate calls it
        ("train.py", "(hashes, seen)", "(seen, hashes)", False),
        ("model.py", "how many to add", "how many", True),
        ("eval.py", "at most this many sequences of each domain", "the most of a domain", True),
        ("train.py", "Nothing here is random or a float.", "", True),
        ("train.py", "folder of the run", "where to", True),
        ("train.py", "# ---- train ----", "# ---- the loop ----", True),
        ("model.py", "F.gelu(self", "F.gelu(  # exact\n            self", True),
    ],
)
def test_code_names_a_run_but_what_explains_it_does_not(tmp_path, name, old, new, same):
    assert (name_where(tmp_path, name, {old: new}) == name_of({})) is same


def test_code_in_a_file_of_ones_own_names_a_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    edits = {"import prepare\n": "import own\nimport prepare\n"}
    edits["model.parameters(), 1.0)"] = "model.parameters(), own.NORM)"
    names = set()
    for norm in ("1.0", "0.5", "0.5  # half"):
        (tmp_path / "own.py").write_text(f"NORM = {norm}\n")
        names.add(name_where(tmp_path, "train.py", edits))
    assert len(names) == 2
