"""Killed, stopped, poisoned, damaged, full, twice at once: nothing is lost or silently wrong."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial, reduce
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    Run,
    ends_well,
    fails,
    log_of,
    made_documents,
    options,
    ranks,
    run_script,
    same_tensors,
    same_weights,
    train_options,
    write_jsonl,
)
from safetensors.torch import load_file

import model
import train
from model import load, save
from prepare import Data
from train import Hyperparameters, Mixture

HYPER = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-3)
COUNTS = {"code": 27, "prose": 27, "sums": 26}  # ten steps of HYPER


def long_run(data, model, out, **changes) -> list[str]:
    """50 steps of a few milliseconds each, with 24 checkpoints."""
    return train_options(data, model, out, **{"sequences": 400, "save_every": 2} | changes)


def endless_run(data, model, out, **changes) -> list[str]:
    """5000 steps, for what is ended early."""
    return train_options(data, model, out, **{"sequences": 40_000} | changes)


@pytest.fixture(scope="module")
def whole(data, small, tmp_path_factory):
    """The folder of a long run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    ends_well(Run(folder, "train", *long_run(data, small, folder / "run")))
    return folder / "run"


def is_same(a: Path, b: Path) -> bool:
    return same_weights(a, b) and log_of(a) == log_of(b)


def names_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def sound(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, all of which must be what their manifests say."""
    steps = []
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        hashes = json.loads((checkpoint / "manifest.json").read_text())
        assert set(hashes) == {"model.safetensors", "optimizer.safetensors", "state.json"}
        for name, known in hashes.items():
            assert sha256((checkpoint / name).read_bytes()).hexdigest() == known
        assert all(p.isfinite().all() for p in load_file(checkpoint / "model.safetensors").values())
        steps.append(json.loads((checkpoint / "state.json").read_text())["step"])
    return steps


def ten_steps(model, data, out=None, **more) -> dict[str, torch.Tensor]:
    """The weights after a pass of ten steps in this process."""
    return train.train(load(model), data, COUNTS, HYPER, out=out, **more).state_dict()


def interrupted(model, data, out, step: int) -> None:
    """The first steps of it, with a checkpoint after every second one."""

    def interrupt(done):
        if done == step:
            raise KeyboardInterrupt

    out.mkdir(exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        ten_steps(model, data, out, save_every=2, validate=interrupt)


@pytest.fixture(scope="module")
def undisturbed(data, small):
    return ten_steps(small, data)


# ---- killed ----


def killed_in_turn(tmp_path: Path, name: str, words: list, moments: list[str]) -> None:
    """Lives of one run, each of which ends just before one of these changes of the disk."""
    for moment in moments:
        ended = Run(tmp_path, name, *words, kill_at=moment).end()
        assert ended[0] == -signal.SIGKILL, (moment, ended)


def test_train_killed_at_every_kind_of_moment_ends_with_the_same_weights(
    data, small, whole, tmp_path
):
    out = tmp_path / "run"
    moments = ["mkdir .*/run", "open .*/.lock", "rename .*/run.json", "rename .*/log.jsonl"]
    moments += ["open .*00002.partial/.optimizer", "open .*00004.partial/.manifest"]
    moments += ["rename .*/checkpoint-00000006", "rmdir .*/checkpoint-00000002"]
    moments += ["remove state.json", "rename .*/result.json", "rename .*/README.md"]
    moments += ["rename .*/run/model.safetensors", "rmdir .*/checkpoint-00000046", "remove manif"]
    words = long_run(data, small, out, resume=True)
    killed_in_turn(tmp_path, "train", words, moments)
    ends_well(Run(tmp_path, "train", *words))
    assert is_same(out, whole)
    assert names_in(out) == names_in(whole)


def test_resume_alone_goes_on_with_the_options_of_the_run(data, small, whole, tmp_path, script):
    words = long_run(data, small, tmp_path / "run")
    killed_in_turn(tmp_path, "train", words, ["rename .*/checkpoint-00000006"])
    alone = options(out=tmp_path / "run", device="cpu", resume=True)
    fails(script("train", *alone, "--seed", 1), "seed was 0, is 1")
    assert script("train", *alone)[0] == 0
    assert is_same(tmp_path / "run", whole)


def train_with(optimizer, settings: dict, words: list) -> None:
    """What an edit of make_optimizer does, and of nothing else."""
    train.make_optimizer = lambda model, device: optimizer(model.parameters(), **settings)
    run_script("train", words)


@pytest.mark.parametrize(
    "optimizer, settings, state",
    [
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer"}),
        (torch.optim.SGD, {}, set()),
        (torch.optim.NAdam, {}, {"exp_avg", "exp_avg_sq", "mu_product", "step"}),
        (torch.optim.Adagrad, {}, {"sum", "step"}),
    ],
)
def test_another_optimizer_is_killed_and_resumed_to_the_same_weights(
    data, small, tmp_path, optimizer, settings, state
):
    def run(name: str, **more) -> Run:
        words = train_options(data, small, tmp_path / name, save_every=2, resume=True, lr=0.1)
        return Run(tmp_path, train_with, optimizer, settings, words, **more)

    ends_well(run("whole"))
    assert run("run", kill_at="rename .*/checkpoint-00000004").end()[0] == -signal.SIGKILL
    saved = load_file(tmp_path / "run" / "checkpoint-00000002" / "optimizer.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == state
    (printed,) = ends_well(run("run"))
    assert "going on from" in printed
    assert is_same(tmp_path / "run", tmp_path / "whole")


def train_compiled(folder: Path, data: Path, out: Path) -> None:
    model.start("cpu")
    network = load(folder)
    network.compile_parts()
    out.mkdir(exist_ok=True)
    train.train(network, Data(data), {"sums": 32}, HYPER, out=out, save_every=1)
    save(network, out)


def test_a_compiled_run_is_killed_and_resumed_to_the_same_weights(data, small, tmp_path):
    """On two threads, which may not add gradients up in the order in which they arrive."""
    compiles, why = model.can_compile(torch.device("cpu"))
    if not compiles:
        pytest.skip(why)
    run = partial(Run, tmp_path, train_compiled, small, data.folder, threads=2)
    run(tmp_path / "whole").end()
    assert run(tmp_path / "run", kill_at="rename .*/checkpoint-00000002").end()[0] < 0
    status, out, err = run(tmp_path / "run").end()
    assert status == 0, err
    assert "checkpoint-00000001" in out
    assert is_same(tmp_path / "run", tmp_path / "whole")


def test_mix_killed_at_every_kind_of_moment_ends_the_same(data, tmp_path):
    def words(folder: str) -> list[str]:
        size = {"seq_len": 32, "base_sequences": 64, "batch_size": 8, "sequences": 48}
        rest = {"rounds": 3, "eval_sequences": 20, "save_every": 2, "resume": True}
        return options(data=data.folder, out=tmp_path / folder / "run", **size, **rest) + SMALL

    moments = ["rename .*/base-[^/]*/run.json", "rename .*/base-[^/]*/checkpoint-00000004"]
    moments += ["rename .*/base-[^/]*/model.safetensors", "rename .*/base-[^/]*/run.json"]
    moments += ["rename .*/history.jsonl", "open .*/runs/.*00004.partial/.manifest"]
    moments += ["rename .*/runs/[^/]*/run.json", "rename .*/val.json"]
    moments += ["remove .*/runs/[^/]*/model.safetensors", "rename .*/result.json"]
    moments += ["rename .*/mix.png", "rename .*/run/model.safetensors"]
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    ends_well(Run(tmp_path, "mix", *words("whole")))
    killed_in_turn(tmp_path, "mix", words("broken"), moments)
    ends_well(Run(tmp_path, "mix", *words("broken")))
    assert names_in(tmp_path / "broken") == names_in(tmp_path / "whole")
    for path in (tmp_path / "whole").rglob("*"):
        other = tmp_path / "broken" / path.relative_to(tmp_path / "whole")
        if path.name == "log.jsonl":  # which has speeds
            assert log_of(path.parent) == log_of(other.parent)
        elif path.is_file():
            assert path.read_bytes() == other.read_bytes(), path


def test_prepare_killed_at_every_kind_of_moment_makes_the_same_files(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("code", 60))
    words = [f"a={source}", *options(tokenizer="train:400", workers=1)]
    ends_well(Run(tmp_path, "prepare", *words, "--out", tmp_path / "whole"))
    moments = ["mkdir", "open .*tokenizer.json", "open .*a.val.bin", "open .*meta", "rename .*/d"]
    killed_in_turn(tmp_path, "prepare", [*words, "--out", tmp_path / "d"], moments)
    assert not (tmp_path / "d").exists()
    ends_well(Run(tmp_path, "prepare", *words, "--out", tmp_path / "d"))
    assert not list(tmp_path.glob(".*"))
    assert names_in(tmp_path / "d") == names_in(tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "d" / path.name).read_bytes()


# ---- damaged, or changed ----


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "optimizer.safetensors": flip_a_bit,
    "model.safetensors": lambda path: os.truncate(path, 1000),
    "state.json": Path.unlink,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    data, small, undisturbed, tmp_path, capsys, name
):
    interrupted(small, data, tmp_path, 7)
    assert sound(tmp_path) == [4, 6]
    newer = tmp_path / "checkpoint-00000006"
    DAMAGES[name](newer / name)
    assert same_tensors(ten_steps(small, data, tmp_path), undisturbed)
    text = capsys.readouterr().out
    assert re.search(f"{newer} is damaged and passed over: .*{name}", text)
    assert f"going on from {tmp_path / 'checkpoint-00000004'}" in text


@pytest.mark.parametrize("manifest", ["{", "{}", "[]", '{"model.safetensors": 3}'])
def test_with_every_checkpoint_damaged_the_run_is_done_anew_and_keeps_what_it_saves(
    data, small, undisturbed, tmp_path, capsys, manifest
):
    interrupted(small, data, tmp_path, 9)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "manifest.json").write_text(manifest)
    interrupted(small, data, tmp_path, 3)
    text = capsys.readouterr().out
    assert text.count("is damaged and passed over: ") == 2
    assert "going on from" not in text
    assert same_tensors(ten_steps(small, data, tmp_path), undisturbed)
    assert f"going on from {tmp_path / 'checkpoint-00000002'}" in capsys.readouterr().out


def test_files_have_the_mode_that_the_umask_says(data, small, tmp_path):
    old = os.umask(0o027)
    try:
        hyper = Hyperparameters(seq_len=32, batch_size=4, learning_rate=1e-3)
        train.train(load(small), data, {"sums": 16}, hyper, save_every=1, out=tmp_path)
    finally:
        os.umask(old)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    files = ["log.jsonl", "state.json", "manifest.json"]
    files += ["model.safetensors", "optimizer.safetensors"]
    folders = ["checkpoint-00000002", "checkpoint-00000003"]
    assert modes == dict.fromkeys(files, "0o640") | dict.fromkeys(folders, "0o750")


@pytest.fixture(scope="module")
def begun(data, small, tmp_path_factory):
    """Copies of the data and of the model, in a folder with a run of them."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(data.folder, folder / "data")
    shutil.copytree(small, folder / "model")
    words = train_options(Data(folder / "data"), folder / "model", folder / "run")
    ends_well(Run(folder, "train", *words))
    return folder


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, ["seed was 0, is 1"]),
        ({"lr": 0.5, "batch_size": 4}, ["learning_rate was 0.001, is 0.5", "batch_size was 8, is"]),
        ({"sequences": 300}, ["counts was"]),
        ({"mix": "natural"}, ["counts was"]),
        ({"warmup": 0.3}, ["warmup was 0.2, is 0.3"]),
        ({"seq_len": 16}, ["seq_len was 32, is 16"]),
        ({"dtype": "bfloat16"}, ["dtype was float32, is bfloat16"]),
        (("sums.train.bin", "files", "sums.train"), ["data was"]),
        (("tokenizer.json", "tokenizer"), ["tokenizer was"]),
        ("model", ["model's files was"]),
    ],
)
def test_what_changed_before_a_resume_is_named(begun, tmp_path, script, change, words):
    """An option, a file of the data and its hash, or the model. That folders moved is no change."""
    folder = shutil.copytree(begun, tmp_path / "moved")
    options = {"resume": True}

    def resume():
        places = (folder / "model", folder / "run")
        return script("train", *train_options(Data(folder / "data"), *places, **options))

    assert resume()[0] == 0
    before = {path: path.read_bytes() for path in (folder / "run").iterdir()}
    if isinstance(change, dict):
        options |= change
    elif change == "model":
        flip_a_bit(folder / "model" / "model.safetensors")
    else:
        path, *keys = change
        flip_a_bit(folder / "data" / path)
        meta = json.loads((folder / "data" / "meta.json").read_text())
        content = (folder / "data" / path).read_bytes()
        reduce(dict.get, keys, meta)["sha256"] = sha256(content).hexdigest()
        (folder / "data" / "meta.json").write_text(json.dumps(meta))
    fails(resume(), "--resume with other settings", *words)
    assert {path: path.read_bytes() for path in (folder / "run").iterdir()} == before


@pytest.mark.parametrize("damaged", ["run/runs/*", "base-*"])
def test_a_damaged_model_of_an_earlier_run_is_made_anew(data, tmp_path, script, damaged):
    out = tmp_path / "run"
    size = {"seq_len": 32, "base_sequences": 64, "batch_size": 8, "sequences": 48}
    words = options(data=data.folder, out=out, **size, rounds=2, eval_sequences=20) + SMALL
    assert script("mix", *words)[0] == 0
    shutil.copytree(out, tmp_path / "expected")
    for name in ("model.safetensors", "history.jsonl", "result.json"):  # as if it had been killed
        (out / name).unlink()
    weights = next(tmp_path.glob(f"{damaged}/model.safetensors"))
    flip_a_bit(weights)
    status, text, err = script("mix", *words, "--resume")
    assert status == 0, err
    assert f"{weights} is damaged, and made anew" in text
    assert same_weights(out, tmp_path / "expected")
    for name in ("result.json", "history.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_data_that_is_missing_or_damaged_is_named(data, small, tmp_path, script):
    """What has the right size only where that is asked for, for it takes as long as to read it."""
    copy = Data(shutil.copytree(data.folder, tmp_path / "d"))
    train_words = train_options(copy, small, tmp_path / "run", check_data=True)
    eval_words = [small, *options(data=copy.folder, device="cpu", check_data=True)]
    for name in ("sums.train.bin", "prose.test.bin", "tokenizer.json"):
        path = copy.folder / name
        sound = path.read_bytes()
        flip_a_bit(path)
        fails(script("train", *train_words), path, "damaged")
        fails(script("eval", *eval_words), path, "damaged")
        path.write_bytes(sound)
    for name in ("sums.val.bin", "tokenizer.json"):  # noticed in any case
        path = copy.folder / name
        path.rename(tmp_path / "away")
        fails(script("train", *train_options(copy, small, tmp_path / "run")), path, "missing")
        (tmp_path / "away").rename(path)
    assert script("train", *train_words)[0] == 0


# ---- stopped by a signal ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    data, small, whole, tmp_path, script, number
):
    """It comes as a checkpoint is written, and again as the last one is."""
    out = tmp_path / "run"
    words = long_run(data, small, out, overwrite=True)
    at = {"kill_at": "rename .*/checkpoint-0000001", "number": number}
    status, _, err = Run(tmp_path, "train", *words, **at).end()
    assert status == 128 + number, err
    assert len(log_of(out)) == 11
    assert sound(out) == [10, 11]
    assert "stopped and saved after step 11 of 50; go on with: python train.py" in err
    line = shlex.split(err.partition("go on with: ")[2])
    assert line[-1] == "--resume"
    assert "--overwrite" not in line
    assert script("train", *line[2:])[0] == 0
    assert is_same(out, whole)


def test_a_signal_in_an_evaluation_stops_and_saves_after_the_next_step(data, small, tmp_path):
    """Or in the step itself, which is much shorter."""
    out = tmp_path / "run"
    words = endless_run(data, small, out, eval_every=1, eval_sequences=1000)
    run = Run(tmp_path, "train", *words)
    run.wait_for(lambda: len(log_of(out)) > 3)
    run.send(signal.SIGTERM)
    status, _, err = run.end()
    assert status == 143, err
    assert sound(out) == [len(log_of(out))]


@pytest.mark.parametrize("step", [0, 4, 9])
def test_a_signal_in_any_step_saves_it(data, small, undisturbed, tmp_path, step):
    def kill(at, rows, losses, weights):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return weights

    with pytest.raises(SystemExit) as ended, train.stoppable():
        ten_steps(small, data, tmp_path, weigh=kill)
    assert ended.value.code == 128 + signal.SIGTERM
    assert sound(tmp_path) == [step + 1]
    assert same_tensors(ten_steps(small, data, tmp_path), undisturbed)
    assert [line["step"] for line in log_of(tmp_path)] == list(range(10))


def test_a_signal_before_the_first_step_ends_it_there(data, small, tmp_path, script, monkeypatch):
    """As the first evaluation begins."""
    plain = train.evaluate

    def evaluate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(train, "evaluate", evaluate)
    words = train_options(data, small, tmp_path / "run")
    status, _, err = script("train", *words)
    assert status == 143
    assert "stopped; go on with: python train.py" in err
    assert names_in(tmp_path / "run") == {Path(".lock"), Path("run.json")}


@pytest.mark.parametrize("changes", [{}, {"fsdp": True}], ids=["DDP", "FSDP"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(data, small, tmp_path, changes):
    out = tmp_path / "run"
    words = endless_run(data, small, out, **changes)
    both = ranks(tmp_path, 2, "train", *words)
    both[0].wait_for(lambda: len(log_of(out)) > 3)
    both[1].send(signal.SIGTERM)
    ended = [run.end() for run in both]
    assert [status for status, _, _ in ended] == [143, 143], ended
    done = len(log_of(out))
    assert sound(out) == [done]
    way_on = "go on with: torchrun --nproc_per_node=2 train.py"
    assert f"saved after step {done} of 5000; {way_on}" in ended[0][2]


def test_torchrun_passes_a_signal_on(data, small, tmp_path):
    out = tmp_path / "run"
    words = endless_run(data, small, out)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node=2", ROOT / "train.py"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen([*torchrun, *words], env=env, **pipes)
    while agent.poll() is None and len(log_of(out)) < 4:
        time.sleep(0.01)
    agent.terminate()
    _, err = agent.communicate(timeout=60)
    done = len(log_of(out))
    assert f"stopped and saved after step {done} of 5000; go on with: torchrun" in err
    assert sound(out) == [done]


# ---- poisoned ----


def poisoned(data: Data, folder: Path, steps: list[int]) -> Data:
    """A copy of the data; the sequences of these steps hold a token that nothing else does."""
    shutil.copytree(data.folder, folder)
    mixture = Mixture(data, COUNTS, 32)
    for step in steps:
        for i in range(8 * step, 8 * step + 8):
            tokens = np.memmap(folder / f"{mixture.domain(i)}.train.bin", "<u2", "r+")
            windows = range(0, len(tokens), 32)
            row = mixture.row(i)
            start = next(k for k in windows if np.array_equal(tokens[k : k + 33], row))
            tokens[start + 5] = 511
            tokens.flush()
    return Data(folder)


@pytest.fixture
def with_embedding(small, tmp_path):
    """The small model, with a number for embeddings: of tokens that the data does not have."""

    def make(number: float, tokens=slice(500, None)) -> Path:
        network = load(small)
        with torch.no_grad():
            network.gpt_neox.embed_in.weight[tokens] = number
        save(network, tmp_path / "changed", small / "tokenizer.json")
        return tmp_path / "changed"

    return make


@pytest.fixture
def fragile(with_embedding) -> Path:
    """A model with finite weights whose loss on a certain token is not finite."""
    return with_embedding(1e30, 511)


def ten_step_run(data, model, out, **changes) -> list[str]:
    mix = ",".join(f"{domain}={count}" for domain, count in COUNTS.items())
    return train_options(data, model, out, mix=mix, sequences=80, save_every=1, **changes)


def test_a_poisoned_batch_is_skipped_and_named(data, fragile, tmp_path, script):
    poison = poisoned(data, tmp_path / "d", [0, 4])
    out = tmp_path / "run"
    status, text, err = script("train", *ten_step_run(poison, fragile, out))
    assert status == 0, err
    assert "step 0: loss nan" in text
    assert "no update from sequences 0 to 7" in text
    assert "no update from sequences 32 to 39" in text
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(10))
    skipped = {line["step"]: line.get("skipped") for line in log if line["loss"] is None}
    assert skipped == {0: list(range(8)), 4: list(range(32, 40))}

    # The oracle: the other steps, by a loop of its own.
    network = load(fragile)
    mixture = Mixture(poison, COUNTS, 32)
    matrices = [p for p in network.parameters() if p.dim() == 2]
    vectors = [p for p in network.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(matrices, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.add_param_group({"params": vectors, "weight_decay": 0.0})
    for line in log:
        if line["step"] in skipped:
            continue
        batch = [mixture[8 * line["step"] + row] for row in range(8)]
        inputs = torch.tensor(np.stack([inputs for _, inputs, _ in batch]).astype("int64"))
        targets = torch.tensor(np.stack([targets for _, _, targets in batch]).astype("int64"))
        network(inputs, targets).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.step()
        optimizer.zero_grad()
    for name, p in load_file(out / "model.safetensors").items():
        assert p.isfinite().all()
        torch.testing.assert_close(p, network.state_dict()[name], atol=2e-4, rtol=0)


def test_a_run_with_skipped_steps_resumes_to_the_same_weights(data, fragile, tmp_path):
    """Interrupted before there was any update, and later."""
    poison = poisoned(data, tmp_path / "d", [0, 1, 5])
    out = tmp_path / "run"
    interrupted(fragile, poison, out, 3)
    saved = out / "checkpoint-00000002"
    assert not load_file(saved / "optimizer.safetensors")
    assert json.loads((saved / "state.json").read_text()) == {"step": 2, "skipped": 2}
    interrupted(fragile, poison, out, 7)
    assert same_tensors(ten_steps(fragile, poison, out), ten_steps(fragile, poison))


def test_three_poisoned_batches_in_a_row_end_it_with_the_last_good_checkpoint(
    data, fragile, tmp_path, script
):
    poison = poisoned(data, tmp_path / "d", [1, 4, 5, 6])
    out = tmp_path / "run"
    words = ["not finite in steps 4 to 6", "sequences 32 to 55", "lower --lr, now 0.001"]
    fails(script("train", *ten_step_run(poison, fragile, out)), *words)
    assert sound(out) == [5, 6]
    assert not (out / "model.safetensors").exists()
    # Resumed at the third, it ends there as well.
    fails(script("train", *ten_step_run(poison, fragile, out, resume=True)), *words)
    older, newer = (load_file(out / f"checkpoint-0000000{n}/model.safetensors") for n in (5, 6))
    assert all(torch.equal(older[name], newer[name]) for name in older)
    assert [line["step"] for line in log_of(out) if "skipped" in line] == [1, 4, 5, 6]


@pytest.mark.parametrize("changes", [{}, {"fsdp": True}], ids=["DDP", "FSDP"])
def test_ranks_skip_a_poisoned_batch_together_and_resume(data, fragile, tmp_path, script, changes):
    """Also from before the first update, when gradients are there but no state of the optimizer."""
    poison = poisoned(data, tmp_path / "d", [0, 4])
    words = ten_step_run(poison, fragile, tmp_path / "run", resume=True, **changes)
    both = ranks(tmp_path, 2, "train", *words, kill_at="rename .*/checkpoint-00000002")
    assert both[0].end()[0] == -signal.SIGKILL
    for run in both:
        run.kill()
    assert sound(tmp_path / "run") == [1]
    ends_well(*ranks(tmp_path, 2, "train", *words))
    assert script("train", *ten_step_run(poison, fragile, tmp_path / "one"))[0] == 0
    found = [line["loss"] for line in log_of(tmp_path / "run")]
    expected = [line["loss"] for line in log_of(tmp_path / "one")]
    assert [step for step, loss in enumerate(found) if loss is None] == [0, 4]
    assert [loss or 0 for loss in found] == pytest.approx(
        [loss or 0 for loss in expected], abs=1e-4
    )


def test_a_model_that_is_not_finite_where_it_is_used_is_refused(
    data, with_embedding, tmp_path, script
):
    bad = with_embedding(math.nan, slice(None))
    result = script("train", *train_options(data, bad, tmp_path / "run"))
    fails(result, "code's val split", "is not finite")
    result = script("eval", bad, *options(data=data.folder, device="cpu", no_compile=True))
    fails(result, "test split", "is not finite")


@pytest.mark.parametrize(
    "number, dtype, saved", [(math.inf, "float32", []), (1e6, "float16", [2, 4])]
)
def test_weights_that_are_not_finite_in_the_type_they_are_saved_in_are_not_saved(
    data, with_embedding, tmp_path, script, number, dtype, saved
):
    bad = with_embedding(number)
    out = tmp_path / "run"
    words = train_options(data, bad, out, save_dtype=dtype, save_every=2)
    fails(script("train", *words), "gpt_neox.embed_in.weight is not finite")
    assert not (out / "model.safetensors").exists()
    assert sound(out) == saved


# ---- no room ----


def test_a_file_that_cannot_grow_costs_nothing_that_was_there(data, small, whole, tmp_path, script):
    out = tmp_path / "run"
    words = long_run(data, small, out, resume=True)
    killed_in_turn(tmp_path, "train", words, ["rename .*/checkpoint-00000006"])
    for largest in (1000, 300_000):  # less than the weights; less than the optimizer's state
        result = Run(tmp_path, "train", *words, largest=largest).end()
        fails(result, out, "File too large")
        assert sound(out) == [2, 4]
        assert not list(out.glob(".*.partial"))
    assert script("train", *words)[0] == 0
    assert is_same(out, whole)


def test_a_log_that_cannot_grow(data, small, tmp_path):
    """The only file that is written to in place."""
    words = long_run(data, small, tmp_path / "run", save_every=0)
    run = Run(tmp_path, "train", *words, largest=2000)
    fails(run.end(), tmp_path / "run" / "log.jsonl", "File too large")


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_and_one_that_became_read_only(data, small, whole, tmp_path, disk, script):
    out = disk / "run"
    words = long_run(data, small, out, resume=True)
    fails(script("train", *words), out, "No space left on device")
    before = sound(out)
    assert before
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    fails(script("train", *words), out, "Read-only file system")
    assert sound(out) == before
    subprocess.run(["mount", "-o", "remount,rw,size=3m", disk], check=True)
    assert script("train", *words)[0] == 0
    assert is_same(out, whole)


def test_prepare_on_a_full_disk_leaves_nothing(tmp_path, disk, script):
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("code", 600))
    (disk / "ballast").write_bytes(bytes(900_000))
    words = [f"a={source}", *options(out=disk / "d", tokenizer="train:400", workers=1)]
    fails(script("prepare", *words), "No space left on device")
    assert [path.name for path in disk.iterdir()] == ["ballast"]


# ---- twice at once ----


@pytest.mark.parametrize("name", ["train", "mix"])
def test_a_second_run_in_a_folder_stops_and_a_killed_one_lets_go(data, small, tmp_path, name):
    words = endless_run(data, small, tmp_path / "run", save_every=2)
    if name == "mix":
        words.remove("--mix")
        words.remove("uniform")
    first = Run(tmp_path, name, *words)
    first.wait_for(lambda: list((tmp_path / "run").rglob("log.jsonl")))
    for way in ("--resume", "--overwrite"):
        result = Run(tmp_path, name, *words, way).end()
        fails(result, tmp_path / "run", "another process is at work there")
    assert first.process.is_alive()
    first.kill()
    second = Run(tmp_path, name, *words, "--resume")
    second.wait_for(lambda: "going on" in second.printed())
    second.send(signal.SIGTERM)
    status, _, err = second.end()
    assert status == 143
    assert "go on with" in err


def test_two_searches_do_not_pretrain_one_base_at_the_same_time(data, tmp_path):
    words = options(data=data.folder, seq_len=32, base_sequences=40_000, batch_size=8) + SMALL
    first = Run(tmp_path, "mix", *words, "--out", tmp_path / "one")
    first.wait_for(lambda: list(tmp_path.glob("base-*/log.jsonl")))
    result = Run(tmp_path, "mix", *words, "--out", tmp_path / "two").end()
    fails(result, "base-tiny-", "another process is at work there")
    assert first.process.is_alive()
    first.kill()


def test_prepare_twice_at_once(tmp_path, script):
    """The first one waits for text that comes through a pipe."""
    os.mkfifo(tmp_path / "a.jsonl")
    source = f"a={tmp_path / 'a.jsonl'}"
    words = [source, *options(out=tmp_path / "d", tokenizer="train:300", workers=1)]
    first = Run(tmp_path, "prepare", *words)
    first.wait_for(lambda: list(tmp_path.glob(".d-*/tokenizer.json")))
    fails(script("prepare", *words), tmp_path / "d", "another process is at work there")
    assert first.process.is_alive()
    assert list(tmp_path.glob(".d-*/tokenizer.json"))
    first.kill()
