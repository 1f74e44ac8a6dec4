"""Killed, stopped, poisoned, damaged, full, twice at once: nothing is lost or silently wrong."""

import itertools
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
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
from conftest import Run, content_of, ends_well, fails, log_of, options, ranks, train_options, works
from safetensors.torch import load_file

import model
import prepare
import train
from model import load, save
from prepare import Data, InputError, sha256_of
from train import Hyperparameters, Mixture, check_finite

LONG = {"sequences": 400, "save_every": 2}  # 50 steps of a few milliseconds, 24 checkpoints
ENDLESS = {"sequences": 40_000}  # 5000 steps, for what is ended early
TEN_STEPS = {"mix": "code=27,prose=27,sums=26", "sequences": 80, "save_every": 1}
COUNTS = {"code": 27, "prose": 27, "sums": 26}
HYPER = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-3)
SEARCH = {"seq_len": 32, "base_sequences": 64, "batch_size": 8, "sequences": 48}
DDP_AND_FSDP = pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP"])


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def argv(data, small, out):
    """Words for train.py, of a run in `out`: argv(**LONG, resume=True)."""
    return lambda model=small, data=data, **changes: train_options(data, model, out, **changes)


@pytest.fixture(scope="module")
def whole(data, small, tmp_path_factory) -> Path:
    """The folder of a long run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    ends_well(Run(folder, "train", *train_options(data, small, folder / "run", **LONG)))
    return folder / "run"


def sound(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, all of which must be what their manifests say."""
    steps = []
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        hashes = json.loads((checkpoint / "manifest.json").read_text())
        assert set(hashes) == {"model.safetensors", "optimizer.safetensors", "state.json"}
        for name, known in hashes.items():
            assert sha256_of(checkpoint / name) == known
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


MOMENTS = {
    "train": "mkdir .*/run, open .*/.lock, rename .*/run.json, rename .*/log.jsonl, "
    "open .*00002.partial/.optimizer, open .*00004.partial/.manifest, "
    "rename .*/checkpoint-00000006, rmdir .*/checkpoint-00000002, remove state.json, "
    "rename .*/result.json, rename .*/README.md, rename .*/run/model.safetensors, "
    "rmdir .*/checkpoint-00000046, remove manif",
    "mix": "rename .*/base-[^/]*/checkpoint-00000004, rename .*/base-[^/]*/model.safetensors, "
    "rename .*/base-[^/]*/run.json, rename .*/base-[^/]*/run.json, "
    "rename .*/history.jsonl, rename .*/runs/[^/]*/run.json, "
    "open .*/runs/.*00004.partial/.manifest, rename .*/runs/[^/]*/model.safetensors, "
    "rename .*/runs/[^/]*/run.json, rename .*/sequences-[0-9]*.npz, rename .*/result.json, "
    "rename .*/run/model.safetensors, rename .*/mix.png",
    "prepare": "mkdir, open .*tokenizer.json, open .*a.val.bin, open .*meta, rename .*/run",
}


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_at_every_kind_of_moment_it_ends_the_same(data, small, tmp_path, name):
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    ends_well(Run(tmp_path, name, *conftest.job(name, data, small, whole / "run")))
    words = conftest.job(name, data, small, broken / "run")
    killed_in_turn(tmp_path, name, words, MOMENTS[name].split(", "))
    ends_well(Run(tmp_path, name, *words))
    assert content_of(broken) == content_of(whole)


def test_resume_alone_goes_on_with_the_options_of_the_run(argv, out, whole, tmp_path, script):
    killed_in_turn(tmp_path, "train", argv(**LONG), ["rename .*/checkpoint-00000006"])
    alone = options(out=out, device="cpu", resume=True)
    fails(script("train", *alone, "--seed", 1), "seed was 0, is 1")
    works(script("train", *alone))
    assert content_of(out) == content_of(whole)


class Odd(torch.optim.Optimizer):
    """Its state: numbers, tensors in a list and a dict, what the fourth step brings, a group's."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.0, "taken": 0, "share": (1.0, None)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] += 1
            group["share"] = (0.9 * group["share"][0], None)
            for p in group["params"]:
                state = self.state[p]
                state["size"] = 1.01 * state.get("size", 1.0)
                state["own"] = {"tensor": p.grad.clone()}
                first, second = state.get("last", [torch.zeros_like(p), torch.zeros_like(p)])
                state["last"] = [second, p.grad.clone()]
                if group["taken"] >= 4:
                    state["late"] = torch.stack([first, second], -1)[..., 0]  # a view
                step = group["share"][0] * state["size"] * (first + second + p.grad)
                p -= group["lr"] / group["taken"] * (step + state.get("late", 0))


MOMENTUM = partial(torch.optim.SGD, momentum=0.9)
OTHERS = [torch.optim.SGD, MOMENTUM, torch.optim.NAdam, torch.optim.Adagrad, torch.optim.Adafactor]


@pytest.mark.parametrize("made", [*OTHERS, Odd])
@pytest.mark.parametrize("steps", [4, 7])
def test_another_optimizer_is_resumed(data, small, tmp_path, monkeypatch, capsys, made, steps):
    """To the same weights."""
    monkeypatch.setattr(train, "make_optimizer", lambda model, hyper: made(model.parameters()))
    interrupted(small, data, tmp_path, steps)
    assert conftest.same_tensors(ten_steps(small, data, tmp_path), ten_steps(small, data))
    assert "going on from" in capsys.readouterr().out


def train_compiled(folder: Path, data: Path, out: Path) -> None:
    """On two threads, which may not add gradients up in the order in which they arrive."""
    torch.set_num_threads(2)
    model.start("cpu")
    network = load(folder)
    network.compile_parts()
    train.train(network, Data(data), {"sums": 32}, HYPER, out=out, save_every=1)
    save(network, out)


def test_a_compiled_run_is_killed_and_resumed_to_the_same_weights(data, small, tmp_path):
    compiles, why = model.can_compile(torch.device("cpu"))
    if not compiles:
        pytest.skip(why)
    run = partial(Run, tmp_path, train_compiled, small, data.folder)
    run(tmp_path / "whole").end()
    assert run(tmp_path / "run", kill_at="rename .*/checkpoint-00000002").end()[0] < 0
    [text] = ends_well(run(tmp_path / "run"))
    assert "checkpoint-00000001" in text
    assert content_of(tmp_path / "run") == content_of(tmp_path / "whole")


# ---- damaged, or changed ----


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGES = {"optimizer.safetensors": flip_a_bit, "state.json": Path.unlink}
DAMAGES["model.safetensors"] = partial(os.truncate, length=1000)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(data, small, undisturbed, tmp_path, capsys, name):
    interrupted(small, data, tmp_path, 7)
    assert sound(tmp_path) == [4, 6]
    newer = tmp_path / "checkpoint-00000006"
    DAMAGES[name](newer / name)
    assert conftest.same_tensors(ten_steps(small, data, tmp_path), undisturbed)
    text = capsys.readouterr().out
    assert re.search(f"{newer} is damaged and passed over: .*{name}", text)
    assert f"going on from {tmp_path / 'checkpoint-00000004'}" in text


@pytest.mark.parametrize("manifest", ["{", "{}", "[]", '{"model.safetensors": 3}'])
def test_where_all_are_damaged_it_starts_anew(data, small, undisturbed, tmp_path, capsys, manifest):
    """And keeps what it saves."""
    interrupted(small, data, tmp_path, 5)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "manifest.json").write_text(manifest)
    interrupted(small, data, tmp_path, 3)
    text = capsys.readouterr().out
    assert text.count("is damaged and passed over: ") == 2
    assert "going on from" not in text
    assert conftest.same_tensors(ten_steps(small, data, tmp_path), undisturbed)
    assert f"going on from {tmp_path / 'checkpoint-00000002'}" in capsys.readouterr().out


def test_files_have_the_mode_that_the_umask_says(data, small, tmp_path):
    old = os.umask(0o027)
    try:
        interrupted(small, data, tmp_path, 3)
    finally:
        os.umask(old)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    files = ["log.jsonl", "state.json", "manifest.json"]
    files += ["model.safetensors", "optimizer.safetensors"]
    assert modes == dict.fromkeys(files, "0o640") | {"checkpoint-00000002": "0o750"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, ["seed was 0, is 1"]),
        ({"lr": 0.5, "batch_size": 4}, ["learning_rate was 0.001, is 0.5", "batch_size was 8, is"]),
        ({"sequences": 300}, ["counts was"]),
        ({"warmup": 0.3}, ["warmup was 0.2, is 0.3"]),
        ({"seq_len": 16}, ["seq_len was 32, is 16"]),
        ({"dtype": "bfloat16"}, ["dtype was float32, is bfloat16"]),
        ("data/sums.train.bin", ["data was"]),
        ("data/tokenizer.json", ["tokenizer was"]),
        ("model/model.safetensors", ["model's files was"]),
    ],
)
def test_what_changed_is_named(data, small, whole, argv, out, tmp_path, script, change, words):
    """Before a resume: an option, a file of the data and its hash, the model. Folders may move."""
    shutil.copytree(small, tmp_path / "model")
    shutil.copytree(data.folder, tmp_path / "data")
    shutil.copytree(whole, out)
    changes = LONG | {"resume": True}

    def resume():
        return script("train", *argv(tmp_path / "model", Data(tmp_path / "data"), **changes))

    works(resume())
    before = content_of(out)
    if isinstance(change, dict):
        changes |= change
    else:
        path = tmp_path / change
        known = sha256_of(path)
        flip_a_bit(path)
        meta = tmp_path / "data" / "meta.json"
        meta.write_text(meta.read_text().replace(known, sha256_of(path)))
    fails(resume(), "--resume with other settings", *words)
    assert content_of(out) == before


def test_code_that_changed_before_a_resume_is_said(whole, argv, out, script):
    shutil.copytree(whole, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"code": "another"}))
    text = works(script("train", *argv(**LONG, resume=True)))
    assert f"warning: the code is not what it was when the run in {out} began" in text


@pytest.mark.parametrize(
    "option, value", [("seed", [3]), ("lr", {}), ("save_dtype", "float99"), ("no_compile", "yes")]
)
def test_a_recorded_option_that_is_none_is_refused_as_on_the_command_line(
    whole, out, script, option, value
):
    shutil.copytree(whole, out)
    record = json.loads((out / "run.json").read_text())
    record["options"][option] = value
    (out / "run.json").write_text(json.dumps(record))
    words = [
        "run.json is damaged: ",
        value if value == "yes" else f"--{option.replace('_', '-')}: ",
    ]
    fails(script("train", "--resume", "--out", out), *words)


@pytest.mark.parametrize("split", ["train", "val"])
def test_tokens_beyond_the_vocabulary_are_named(data, argv, tmp_path, script, split):
    copy = Data(shutil.copytree(data.folder, tmp_path / "d"))
    path = copy.folder / f"sums.{split}.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    fails(script("train", *argv(data=copy)), "a bin is damaged", "--check-data tells which")


@pytest.fixture(scope="module")
def search(data, tmp_path_factory):
    """A folder with a search and its base, and the options of it, but for --out."""
    folder = tmp_path_factory.mktemp("search")
    words = options(data=data.folder, **SEARCH, rounds=2, eval_sequences=20) + conftest.SMALL
    ends_well(Run(folder, "mix", *words, "--out", folder / "run"))
    return folder, words


@pytest.mark.parametrize("damaged", ["run/runs/*", "base-*"])
@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "run.json"])
def test_a_damaged_model_of_an_earlier_run_is_made_anew(search, tmp_path, script, damaged, part):
    folder, words = search
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "run"
    expected = content_of(out)
    for name in ("model.safetensors", "history.jsonl", "result.json"):  # as if it had been killed
        (out / name).unlink()
    weights = next(tmp_path.glob(f"{damaged}/model.safetensors"))
    if part == "model.safetensors":
        flip_a_bit(weights)
    elif part == "config.json":
        weights.with_name(part).unlink()
    else:
        weights.with_name(part).write_text("{")
    text = works(script("mix", *words, "--out", out, "--resume"))
    assert (f"{weights} is damaged, and made anew" in text) == (part != "run.json")
    assert content_of(out) == expected


def test_data_that_is_damaged_is_named(data, small, argv, tmp_path, script):
    """What has the right size only where that is asked for, for it takes as long as to read it."""
    copy = Data(shutil.copytree(data.folder, tmp_path / "d"))
    trains = argv(data=copy, check_data=True)
    evaluates = [small, *options(data=copy.folder, device="cpu", check_data=True)]
    for name in ("sums.train.bin", "prose.test.bin", "tokenizer.json"):
        path = copy.folder / name
        before = path.read_bytes()
        flip_a_bit(path)
        fails(script("train", *trains), path, "damaged")
        fails(script("eval", *evaluates), path, "damaged")
        path.write_bytes(before)
    works(script("train", *trains))
    (copy.folder / "tokenizer.json").unlink()  # that is noticed in any case
    fails(script("train", *argv(data=copy, overwrite=True)), "tokenizer.json", "missing")


# ---- stopped by a signal ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_says_how_to_go_on(argv, out, whole, tmp_path, script, number):
    """It comes as a checkpoint is written, and again as the last one is."""
    at = {"kill_at": "rename .*/checkpoint-0000001", "number": number}
    status, _, err = Run(tmp_path, "train", *argv(**LONG, overwrite=True), **at).end()
    assert status == 128 + number, err
    assert len(log_of(out)) == 11
    assert sound(out) == [10, 11]
    assert "stopped and saved after step 11 of 50; go on with: python train.py" in err
    line = shlex.split(err.partition("go on with: ")[2])
    assert line[-1] == "--resume"
    assert "--overwrite" not in line
    works(script("train", *line[2:]))
    assert content_of(out) == content_of(whole)


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
    assert conftest.same_tensors(ten_steps(small, data, tmp_path), undisturbed)
    assert [line["step"] for line in log_of(tmp_path)] == list(range(10))


@DDP_AND_FSDP
def test_a_signal_to_one_rank_stops_all_at_the_same_step(argv, out, tmp_path, fsdp):
    both = ranks(tmp_path, 2, "train", *argv(**ENDLESS, fsdp=fsdp))
    both[0].wait_for(lambda: len(log_of(out)) > 3)
    both[1].send(signal.SIGTERM)
    ended = [run.end() for run in both]
    assert [status for status, _, _ in ended] == [143, 143], ended
    done = len(log_of(out))
    assert sound(out) == [done]
    way_on = "go on with: torchrun --nproc_per_node=2 train.py"
    assert f"saved after step {done} of 5000; {way_on}" in ended[0][2]


def test_torchrun_passes_a_signal_on_and_what_goes_on_has_its_options(argv, out):
    words = ["--standalone", "--nproc_per_node=2", train.__file__, *argv(**ENDLESS)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", *words]
    agent = subprocess.Popen(torchrun, env=env, **pipes)
    while agent.poll() is None and len(log_of(out)) < 4:
        time.sleep(0.01)
    agent.terminate()
    _, err = agent.communicate(timeout=60)
    done = len(log_of(out))
    way_on = re.search(f"stopped and saved after step {done} of 5000; go on with: (.*)", err)[1]
    assert shlex.split(way_on) == ["torchrun", *words, "--resume"]
    assert sound(out) == [done]


# ---- poisoned ----


@pytest.fixture
def poisoned(data, tmp_path):
    """Copies the data; the sequences of some steps then hold a token that nothing else does."""

    def make(*steps: int) -> Data:
        folder = shutil.copytree(data.folder, tmp_path / "poisoned")
        mixture = Mixture(data, COUNTS, 32)
        for i in (8 * step + row for step in steps for row in range(8)):
            path = folder / f"{mixture.domain(i)}.train.bin"
            row = mixture.row(i)
            changed = row.copy()
            changed[5] = 511
            path.write_bytes(path.read_bytes().replace(row.tobytes(), changed.tobytes()))
        return Data(folder)

    return make


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


def test_a_poisoned_batch_is_skipped(data, poisoned, fragile, tmp_path, monkeypatch, capsys):
    """And named; in a run that was interrupted before there was any update, and later."""
    steps = (0, 1, 5, 8)
    poison = poisoned(*steps)
    out = tmp_path / "run"
    interrupted(fragile, poison, out, 3)
    saved = out / "checkpoint-00000002"
    assert not load_file(saved / "optimizer.safetensors")
    known = {"step": 2, "skipped": 2, "optimizer": {}}
    assert json.loads((saved / "state.json").read_text()) == known
    interrupted(fragile, poison, out, 7)
    found = ten_steps(fragile, poison, out)
    text = capsys.readouterr().out
    for step in steps:
        first = 8 * step
        assert f"step {step}: loss nan" in text
        assert f"no update from sequences {first} to {first + 7}" in text
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(10))
    skipped = {line["step"]: line.get("skipped") for line in log if line["loss"] is None}
    assert skipped == {step: list(range(8 * step, 8 * step + 8)) for step in steps}

    # It ends as a run on sound data does in which AdamW leaves out these steps.
    number = itertools.count()
    plain = torch.optim.AdamW.step

    def step_or_not(optimizer, closure=None):
        if next(number) not in steps:
            plain(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_or_not)
    assert conftest.same_tensors(found, ten_steps(fragile, data))
    assert next(number) == 10


def test_three_poisoned_batches_in_a_row_end_it(poisoned, fragile, argv, out, script):
    """The last good checkpoint stays."""
    run = partial(argv, fragile, poisoned(1, 4, 5, 6), **TEN_STEPS)
    words = ["not finite in steps 4 to 6", "sequences 32 to 55"]
    words += ["--overwrite with a lower --lr (of a base: --base-lr), now 0.001"]
    fails(script("train", *run()), *words)
    assert sound(out) == [5, 6]
    assert not (out / "model.safetensors").exists()
    # Resumed at the third, it ends there as well.
    fails(script("train", *run(resume=True)), *words)
    older, newer = (load_file(out / f"checkpoint-0000000{n}/model.safetensors") for n in (5, 6))
    assert conftest.same_tensors(older, newer)
    assert [line["step"] for line in log_of(out) if "skipped" in line] == [1, 4, 5, 6]


@DDP_AND_FSDP
def test_ranks_skip_a_poisoned_batch(poisoned, fragile, argv, out, tmp_path, script, fsdp):
    """Together; and go on from before the first update, when there are gradients but no state."""
    run = partial(argv, fragile, poisoned(0, 4), **TEN_STEPS)
    words = run(resume=True, fsdp=fsdp)
    both = ranks(tmp_path, 2, "train", *words, kill_at="rename .*/checkpoint-00000002")
    assert both[0].end()[0] == -signal.SIGKILL
    for rank in both:
        rank.kill()
    assert sound(out) == [1]
    ends_well(*ranks(tmp_path, 2, "train", *words))
    found = [line["loss"] for line in log_of(out)]
    assert [step for step, loss in enumerate(found) if loss is None] == [0, 4]
    works(script("train", *run(overwrite=True)))
    expected = [line["loss"] for line in log_of(out)]
    assert [x or 0 for x in found] == pytest.approx([x or 0 for x in expected], abs=1e-4)


def test_a_model_that_is_not_finite_where_it_is_used_is_refused(data, with_embedding, argv, script):
    bad = with_embedding(math.nan, slice(None))
    fails(script("train", *argv(bad)), "code's val split", "is not finite")
    result = script("eval", bad, *options(data=data.folder, device="cpu", no_compile=True))
    fails(result, "test split", "is not finite")


def test_weights_that_are_not_finite_are_not_saved(with_embedding, argv, out, script):
    words = argv(with_embedding(math.inf), save_every=2)
    fails(script("train", *words), "gpt_neox.embed_in.weight is not finite")
    assert not (out / "model.safetensors").exists() and not sound(out)


def test_weights_too_large_for_float16_are_kept_in_another(with_embedding, argv, out, script):
    """float16 ends at 65,504. What the error advises goes on from the checkpoint, and ends well."""
    large = with_embedding(1e6)
    words = argv(large, lr=0.0, save_every=2)
    said = ["gpt_neox.embed_in.weight is not finite", "--resume with --save-dtype float32"]
    fails(script("train", *words, "--save-dtype", "float16"), *said)
    assert not (out / "model.safetensors").exists() and sound(out) == [2, 4]
    works(script("train", *words, "--resume", "--save-dtype", "float32"))
    assert conftest.same_weights(out, large)


def test_numbers_whose_sum_is_infinite_are_saved_and_infinite_ones_are_not():
    check_finite({"w": torch.full((9,), 3e38)})
    for bad in ([1, math.nan], [math.inf, -math.inf]):
        with pytest.raises(InputError, match="^w is not finite and not saved"):
            check_finite({"w": torch.tensor(bad)})


# ---- no room ----


def test_a_file_that_cannot_grow_costs_nothing_that_was_there(argv, out, whole, tmp_path, script):
    words = argv(**LONG, resume=True)
    killed_in_turn(tmp_path, "train", words, ["rename .*/checkpoint-00000006"])
    for largest in (1000, 300_000):  # less than the weights; less than the optimizer's state
        result = Run(tmp_path, "train", *words, largest=largest).end()
        fails(result, out, "File too large")
        assert sound(out) == [2, 4]
        assert not list(out.glob(".*.partial"))
    works(script("train", *words))
    assert content_of(out) == content_of(whole)


def test_a_log_that_cannot_grow(argv, out, tmp_path):
    """The only file that is written to in place."""
    run = Run(tmp_path, "train", *argv(sequences=400, save_every=0), largest=2000)
    fails(run.end(), out / "log.jsonl", "File too large")


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


def test_a_full_disk_and_one_that_became_read_only(data, small, whole, disk, script):
    out = disk / "run"
    words = train_options(data, small, out, **LONG, resume=True)
    fails(script("train", *words), out, "No space left on device")
    before = sound(out)
    assert before
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    fails(script("train", *words), out, "cannot be written to")
    assert sound(out) == before
    subprocess.run(["mount", "-o", "remount,rw,size=3m", disk], check=True)
    works(script("train", *words))
    assert content_of(out) == content_of(whole)


def test_prepare_on_a_full_disk_leaves_nothing(tmp_path, disk, script):
    source = conftest.write_jsonl(tmp_path / "a.jsonl", conftest.made_documents("code", 600))
    (disk / "ballast").write_bytes(bytes(900_000))
    words = [f"a={source}", *options(out=disk / "d", tokenizer="train:400", workers=1)]
    fails(script("prepare", *words), "No space left on device")
    assert [path.name for path in disk.iterdir()] == ["ballast"]


# ---- twice at once ----

AT_WORK = "another process is at work there"


@pytest.mark.parametrize("name, mix", [("train", "uniform"), ("mix", False)])
def test_a_second_run_in_a_folder_stops_and_a_killed_one_lets_go(argv, out, tmp_path, name, mix):
    words = argv(**ENDLESS, mix=mix, save_every=2)
    first = Run(tmp_path, name, *words)

    def has_saved() -> bool:
        """A third step follows on a checkpoint, from which the last run goes on."""
        logs = [*out.glob("log.jsonl"), *out.glob("runs/*/log.jsonl")]
        return any(log.read_text().count("\n") > 2 for log in logs)

    first.wait_for(has_saved)
    for way in ("--resume", "--overwrite"):
        fails(Run(tmp_path, name, *words, way).end(), out, AT_WORK)
    assert first.process.is_alive()
    first.kill()
    second = Run(tmp_path, name, *words, "--resume")
    second.wait_for(lambda: "going on" in second.printed())
    second.send(signal.SIGTERM)
    status, _, err = second.end()
    assert status == 143
    assert "go on with" in err


def test_two_searches_do_not_pretrain_one_base_at_the_same_time(data, tmp_path):
    words = options(data=data.folder, **SEARCH | {"base_sequences": 40_000}) + conftest.SMALL
    first = Run(tmp_path, "mix", *words, "--out", tmp_path / "one")
    first.wait_for(lambda: list(tmp_path.glob("base-*/log.jsonl")))
    fails(Run(tmp_path, "mix", *words, "--out", tmp_path / "two").end(), "base-tiny-", AT_WORK)
    assert first.process.is_alive()
    first.kill()


def prepare_slowly(source: Path, words: list[str]) -> None:
    """prepare.py, where text is long in coming."""

    def read(*how):
        Path(source).with_name("reads").touch()
        time.sleep(600)
        yield

    prepare.read = read
    conftest.run_script("prepare", words)


def test_prepare_twice_at_once(tmp_path, script):
    source = conftest.write_jsonl(tmp_path / "a.jsonl", conftest.made_documents("sums", 60))
    words = [f"a={source}", *options(out=tmp_path / "d", tokenizer="train:300", workers=1)]
    first = Run(tmp_path, prepare_slowly, source, words)
    first.wait_for((tmp_path / "reads").exists)
    fails(script("prepare", *words), tmp_path / "d", AT_WORK)
    assert first.process.is_alive()
    assert list(tmp_path.glob(".d-*/tokenizer.json"))
    first.kill()
