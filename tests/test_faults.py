"""Killed, stopped, poisoned, damaged, full, twice at once: nothing is lost, and nothing is silently wrong."""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, Run, made_documents, write_jsonl
from safetensors.torch import load_file
from test_errors import fails
from test_train import log_of, same_weights

import eval
import prepare
from model import load
from prepare import Data, InputError
from train import Mixture, train


def argv(data, small, out, *more):
    """50 steps of a few milliseconds each, with 24 checkpoints."""
    base = [
        "--data",
        data.folder,
        "--model",
        small,
        "--out",
        out,
        "--mix",
        "uniform",
        "--sequences",
        400,
    ]
    return [
        *base,
        "--batch-size",
        8,
        "--lr",
        1e-3,
        "--eval-sequences",
        8,
        "--save-every",
        2,
        *SMALL,
        *more,
    ]


@pytest.fixture(scope="module")
def whole(data, small, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    status, _, err = Run(folder, "train", *argv(data, small, folder / "run")).end()
    assert status == 0, err
    return folder / "run"


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same_log(a, b) -> bool:
    a, b = ([{**line, "tokens_per_second": 0} for line in log_of(folder)] for folder in (a, b))
    return a == b


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


def test_train_killed_at_twenty_moments_ends_with_the_same_weights(data, small, tmp_path):
    """Some steps after it began; before a change of the disk, often in the writing of a checkpoint; and at the end."""
    rng, out, more = random.Random(1), tmp_path / "run", ("--sequences", 1200)
    assert Run(tmp_path, "train", *argv(data, small, tmp_path / "whole", *more)).end()[0] == 0
    reached = []
    for life in range(20):
        done = lines(out / "log.jsonl")
        kill_at, further = (rng.randint(1, 60), 1000) if life % 2 else (0, rng.randint(1, 12))
        target = 150 if life > 17 else done + further
        run = Run(
            tmp_path,
            "train",
            *argv(data, small, out, *more, "--resume"),
            kill_at=kill_at if life < 18 else 0,
        )
        run.wait_for(lambda: lines(out / "log.jsonl") >= target)
        time.sleep(rng.uniform(0, 0.02))
        run.process.kill()
        run.end()
        found = sorted(out.glob("checkpoint-*"))
        assert all(
            (checkpoint / "manifest.json").exists() for checkpoint in found[1:]
        )  # the oldest may be half removed
        reached += [int(found[-1].name[-8:])] if found else []
    assert len(set(reached)) >= 10 and reached == sorted(reached), reached
    status, _, err = Run(tmp_path, "train", *argv(data, small, out, *more, "--resume")).end()
    assert status == 0, err
    assert same_weights(out, tmp_path / "whole") and same_log(out, tmp_path / "whole")
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }  # no leftovers


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4, 5, 86, 88, 95])
def test_train_killed_as_it_begins_or_ends_leaves_nothing_behind(data, small, tmp_path, kill_at):
    """Before there is a record of the run; after the model is there, but its checkpoints still are, too."""
    more = ("--sequences", 64, "--save-every", 2)
    assert Run(tmp_path, "train", *argv(data, small, tmp_path / "whole", *more)).end()[0] == 0
    run = Run(tmp_path, "train", *argv(data, small, tmp_path / "run", *more), kill_at=kill_at)
    assert run.end()[0] == -signal.SIGKILL
    status, _, err = Run(
        tmp_path, "train", *argv(data, small, tmp_path / "run", *more, "--resume")
    ).end()
    assert status == 0, err
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    names = [
        {path.relative_to(top) for path in top.rglob("*")}
        for top in (tmp_path / "run", tmp_path / "whole")
    ]
    assert names[0] == names[1]


def test_mix_killed_at_twenty_moments_ends_the_same(data, tmp_path):
    def options(out, *more):
        return ["--data", data.folder, "--out", out, "--seq-len", 32, "--base-sequences", 128, "--batch-size", 8,
                "--sequences", 48, "--rounds", 3, "--eval-sequences", 20, "--save-every", 2, *SMALL, *more]  # fmt: skip

    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    began = time.perf_counter()
    status, _, err = Run(tmp_path, "mix", *options(tmp_path / "whole" / "run")).end()
    assert status == 0, err
    out, took = tmp_path / "broken" / "run", time.perf_counter() - began
    stages = set()
    rng = random.Random(2)
    rounds = lines(tmp_path / "whole" / "run" / "history.jsonl")
    for life in range(
        20
    ):  # at some moment; before some change of the disk; after the last round, in the comparison
        run = Run(
            tmp_path,
            "mix",
            *options(out, "--resume"),
            kill_at=rng.randint(1, 120) if life % 3 == 1 and life < 17 else 0,
        )
        if life > 16:
            run.wait_for(lambda: lines(out / "history.jsonl") == rounds)
            time.sleep(rng.uniform(0, 0.1))
        else:
            run.process.join(60 if life % 3 == 1 else rng.uniform(0.2, took))
        run.process.kill()
        run.end()
        stages |= {path.parent.name for path in (tmp_path / "broken").rglob("log.jsonl")}
    assert any(stage.startswith("base-") for stage in stages) and "round-2" in stages
    status, _, err = Run(tmp_path, "mix", *options(out, "--resume")).end()
    assert status == 0, err
    files = [
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert files[0].keys() == files[1].keys()
    differ = {path.name for path in files[0] if files[0][path] != files[1][path]}
    assert differ <= {"log.jsonl"}, differ  # which has speeds
    for log in (tmp_path / "whole").rglob("log.jsonl"):
        assert same_log(
            log.parent, tmp_path / "broken" / log.parent.relative_to(tmp_path / "whole")
        )


def test_prepare_killed_at_twenty_moments_makes_the_same_files(tmp_path):
    source = write_jsonl(
        tmp_path / "a.jsonl", [f"{i} {t}" for i in range(40) for t in made_documents("code", 60, i)]
    )
    base = [f"a={source}", "--tokenizer", "train:400", "--workers", 1]
    began = time.perf_counter()
    assert Run(tmp_path, "prepare", "--out", tmp_path / "whole", *base).end()[0] == 0
    took = time.perf_counter() - began
    rng = random.Random(3)
    for _ in range(20):
        run = Run(
            tmp_path,
            "prepare",
            "--out",
            tmp_path / "d",
            *base,
            kill_at=rng.choice([0, rng.randint(1, 9)]),
        )
        run.process.join(rng.uniform(0, took))
        run.process.kill()
        run.end()
        if (tmp_path / "d").exists():  # whole, then, and made once more
            shutil.rmtree(tmp_path / "d")
    assert Run(tmp_path, "prepare", "--out", tmp_path / "d", *base).end()[0] == 0
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "d")
    ]
    assert files[0] == files[1]
    assert not list(tmp_path.glob(".*")) and Data(tmp_path / "d").domains == ["a"]


def test_a_damaged_checkpoint_is_passed_over_and_named(data, small, whole, tmp_path):
    out = tmp_path / "run"
    run = Run(tmp_path, "train", *argv(data, small, out))
    run.wait_for(
        lambda: len(list(out.glob("checkpoint-*"))) == 2 and list(out.glob("checkpoint-0000001*"))
    )
    run.process.kill()
    run.end()
    older, newer = sorted(out.glob("checkpoint-*"))[-2:]
    damaged = bytearray((newer / "optimizer.safetensors").read_bytes())
    damaged[-100] ^= 1
    (newer / "optimizer.safetensors").write_bytes(damaged)
    status, text, err = Run(tmp_path, "train", *argv(data, small, out, "--resume")).end()
    assert status == 0, err
    assert (
        f"{newer} is damaged and passed over: optimizer.safetensors" in text
        and f"going on from {older}" in text
    )
    assert same_weights(out, whole) and same_log(out, whole)


@pytest.mark.parametrize("manifest", ["{", "{}", "[]", '{"model.safetensors": 3}'])
def test_with_every_checkpoint_damaged_the_run_is_done_anew_and_keeps_what_it_saves(
    data, small, whole, tmp_path, manifest
):
    out = tmp_path / "run"
    run = Run(tmp_path, "train", *argv(data, small, out))
    run.wait_for(lambda: list(out.glob("checkpoint-0000001?")))
    run.process.kill()
    run.end()
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / "manifest.json").write_text(manifest)
    run = Run(tmp_path, "train", *argv(data, small, out, "--resume"))
    run.wait_for(lambda: list(out.glob("checkpoint-0000000[24]")))
    run.send(signal.SIGTERM)
    status, text, err = run.end()
    assert status == 143 and text.count("is damaged and passed over: ") in (2, 3), text + err
    status, text, err = Run(tmp_path, "train", *argv(data, small, out, "--resume")).end()
    assert status == 0 and "going on from" in text, err
    assert same_weights(out, whole) and same_log(out, whole)


def test_files_have_the_mode_that_the_umask_says(data, small, tmp_path):
    old = os.umask(0o027)
    try:
        train(
            load(small),
            data,
            {"sums": 16},
            seq_len=32,
            batch_size=4,
            lr=1e-3,
            save_every=1,
            out=tmp_path,
        )
    finally:
        os.umask(old)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    files = (
        "log.jsonl",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    )
    folders = ("checkpoint-00000002", "checkpoint-00000003")
    assert modes == dict.fromkeys(files, "0o640") | dict.fromkeys(folders, "0o750")


@pytest.mark.parametrize(
    "change, words",
    [
        (["--seed", 1], ["seed was 0, is 1"]),
        (["--lr", 0.5, "--batch-size", 4], ["lr was 0.001, is 0.5", "batch_size was 8, is 4"]),
        (["--sequences", 300], ["counts was"]),
        (["--mix", "natural"], ["counts was"]),
        (["--warmup", 0.3], ["warmup was 0.2, is 0.3"]),
        (["--seq-len", 16], ["seq_len was 32, is 16"]),
        ("data", ["data was"]),
        ("tokenizer", ["tokenizer was"]),
        ("model", ["model's files was"]),
    ],
)
def test_what_changed_before_a_resume_is_named(data, small, tmp_path, script, change, words):
    folder, model = (
        shutil.copytree(source, tmp_path / name)
        for source, name in ((data.folder, "d"), (small, "m"))
    )
    argv = [
        "--data",
        folder,
        "--model",
        model,
        "--out",
        tmp_path / "run",
        "--mix",
        "uniform",
        "--sequences",
        24,
    ]
    argv += ["--batch-size", 8, "--lr", 1e-3, *SMALL, "--resume"]
    assert script("train", *argv)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    meta = json.loads((folder / "meta.json").read_text())
    if change == "data":
        content = np.memmap(folder / "sums.train.bin", np.uint8, "r+")
        content[:2] = content[2:4]
        meta["files"]["sums.train"] |= {"sha256": sha256(content).hexdigest(), "chunks": []}
    elif change == "tokenizer":
        text = (folder / "tokenizer.json").read_text() + "\n"
        (folder / "tokenizer.json").write_text(text)
        meta["tokenizer"]["sha256"] = sha256(text.encode()).hexdigest()
    elif change == "model":
        content = np.memmap(model / "model.safetensors", np.uint8, "r+")
        content[-7] ^= 1
        content.flush()
    (folder / "meta.json").write_text(json.dumps(meta))
    fails(
        script("train", *argv, *([] if isinstance(change, str) else change)),
        "--resume with other settings",
        *words,
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(data, small, whole, tmp_path, number):
    out = tmp_path / "run"
    run = Run(tmp_path, "train", *argv(data, small, out, "--save-every", 0, "--overwrite"))
    run.wait_for(lambda: (out / "log.jsonl").exists() and len(log_of(out)) > 3)
    run.send(number)
    run.send(number)  # torchrun passes on what a scheduler also sends itself
    status, _, err = run.end()
    assert status == 128 + number, err
    done = len(log_of(out))
    assert (
        sound(out) == [done]
        and f"stopped and saved after step {done} of 50; go on with: python train.py" in err
    )
    command = shlex.split(err.partition("go on with: ")[2])
    assert command[-1] == "--resume" and "--overwrite" not in command
    status, _, err = Run(tmp_path, "train", *command[2:]).end()
    assert status == 0 and same_weights(out, whole) and same_log(out, whole), err


def test_a_signal_in_the_last_step_saves_it(data, small, tmp_path):
    """A long one, so that nothing else is left to do but the evaluation."""
    more = ("--batch-size", 4000, "--sequences", 4000, "--micro-batch-size", 8, "--save-every", 0)
    run = Run(tmp_path, "train", *argv(data, small, tmp_path / "run", *more))
    run.wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists())
    run.send(signal.SIGTERM)
    status, _, err = run.end()
    assert status == 143 and sound(tmp_path / "run") == [1] and "after step 1 of 1" in err
    assert (
        Run(tmp_path, "train", *argv(data, small, tmp_path / "run", *more, "--resume")).end()[0]
        == 0
    )
    assert lines(tmp_path / "run" / "log.jsonl") == 1


def test_a_second_signal_ends_it_at_once(data, small, tmp_path):
    """In a step that takes minutes."""
    more = ("--batch-size", 400_000, "--sequences", 800_000, "--micro-batch-size", 8)
    run = Run(tmp_path, "train", *argv(data, small, tmp_path / "run", *more))
    run.wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists())
    run.send(signal.SIGTERM)
    time.sleep(1.5)
    assert run.process.is_alive()
    run.send(signal.SIGTERM)
    status, _, err = run.end(5)
    assert (
        status == 143
        and "another signal stops at once" in err
        and not list((tmp_path / "run").glob("checkpoint-*"))
    )


def ranks(tmp_path, *argv) -> list[Run]:
    """Two ranks as torchrun starts them, but without it."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    rendezvous = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    rendezvous |= {"TORCHELASTIC_RUN_ID": "1", "OMP_NUM_THREADS": "1"}
    return [
        Run(tmp_path, "train", *argv, rank=rendezvous | {"RANK": r, "LOCAL_RANK": r}) for r in "01"
    ]


@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(data, small, tmp_path, more):
    out = tmp_path / "run"
    both = ranks(tmp_path, *argv(data, small, out, "--save-every", 0, *more))
    both[0].wait_for(lambda: (out / "log.jsonl").exists() and len(log_of(out)) > 3)
    both[1].send(signal.SIGTERM)
    ended = [run.end() for run in both]
    assert [status for status, _, _ in ended] == [143, 143], ended
    done = len(log_of(out))
    assert (
        sound(out) == [done]
        and f"saved after step {done} of 50; go on with: torchrun --nproc_per_node=2" in ended[0][2]
    )


def test_torchrun_passes_a_signal_on_and_any_number_of_ranks_goes_on(data, small, whole, tmp_path):
    """With another world size and micro-batch: the same sequences, so the same losses but for rounding."""
    out = tmp_path / "run"
    base = [str(word) for word in argv(data, small, out)]
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "train.py",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(
        [*program, *base], stderr=subprocess.PIPE, text=True, env=env, stdout=subprocess.DEVNULL
    )
    while agent.poll() is None and not ((out / "log.jsonl").exists() and len(log_of(out)) > 3):
        time.sleep(0.005)
    agent.terminate()
    _, err = agent.communicate(timeout=60)
    done = len(log_of(out))
    assert (
        f"stopped and saved after step {done} of 50; go on with: torchrun" in err
        and sound(out)[-1] == done < 50
    )
    status, _, err = Run(tmp_path, "train", *base, "--resume", "--micro-batch-size", 3).end()
    assert status == 0, err
    for a, b in zip(log_of(out), log_of(whole), strict=True):
        assert (a["step"], a["sequences"]) == (b["step"], b["sequences"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def poisoned(data, folder, steps, batch_size=8) -> Data:
    """A copy of the data in which the sequences of these steps hold a token that nothing else does."""
    shutil.copytree(data.folder, folder)
    mixture = Mixture(data, {"code": 27, "prose": 27, "sums": 26}, 32)
    meta = json.loads((folder / "meta.json").read_text())
    for i in (i for step in steps for i in range(step * batch_size, (step + 1) * batch_size)):
        d, row = mixture.row(i)
        tokens = np.memmap(folder / f"{d}.train.bin", "<u2", "r+")
        at = next(k for k in range(0, len(tokens), 32) if np.array_equal(tokens[k : k + 33], row))
        tokens[at + 5] = 511
        tokens.flush()
    for name, file in meta["files"].items():
        file |= {"sha256": sha256((folder / f"{name}.bin").read_bytes()).hexdigest(), "chunks": []}
    (folder / "meta.json").write_text(json.dumps(meta))
    return Data(folder)


@pytest.fixture
def fragile(small, tmp_path) -> Path:
    """A model with finite weights whose loss on a certain token is not finite."""
    from model import save

    model = load(small)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[511] = 1e30
    save(model, tmp_path / "fragile", small / "tokenizer.json")
    return tmp_path / "fragile"


def poison_argv(data, fragile, out, *more):
    return [
        *argv(data, fragile, out),
        "--mix",
        "code=27,prose=27,sums=26",
        "--sequences",
        80,
        *more,
    ]


@pytest.mark.parametrize("step", [0, 4])
def test_a_poisoned_batch_is_skipped_and_named(data, fragile, tmp_path, script, step):
    poison = poisoned(data, tmp_path / "d", [step])
    status, text, err = script(
        "train", *poison_argv(poison, fragile, tmp_path / "run", "--save-every", 1)
    )
    assert status == 0, err
    assert (
        f"step {step}: loss nan" in text
        and f"no update from sequences {8 * step} to {8 * step + 7}" in text
    )
    log = log_of(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(10))
    assert {line["step"]: line.get("skipped") for line in log if line["loss"] is None} == {
        step: list(range(8 * step, 8 * step + 8))
    }
    assert all(
        p.isfinite().all() for p in load_file(tmp_path / "run" / "model.safetensors").values()
    )
    # the oracle: the same steps, less that one, by a loop of its own
    model, mixture = load(fragile), Mixture(poison, {"code": 27, "prose": 27, "sums": 26}, 32)
    groups = [
        [p for p in model.parameters() if (p.dim() == 2) == matrices] for matrices in (True, False)
    ]
    groups = [
        {"params": groups[0], "weight_decay": 0.1},
        {"params": groups[1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for line in log:
        if line["step"] == step:
            continue
        batch = [mixture[i] for i in range(8 * line["step"], 8 * line["step"] + 8)]
        inputs, targets = (
            torch.tensor(np.stack([row[k] for row in batch]).astype("int64")) for k in (1, 2)
        )
        model(inputs, targets).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.step()
        optimizer.zero_grad()
    for name, p in load_file(tmp_path / "run" / "model.safetensors").items():
        torch.testing.assert_close(p, model.state_dict()[name], atol=2e-4, rtol=0)


def test_a_run_with_a_skipped_step_resumes_to_the_same_weights(data, fragile, tmp_path, script):
    poison = poisoned(data, tmp_path / "d", [0, 4])
    assert Run(tmp_path, "train", *poison_argv(poison, fragile, tmp_path / "whole")).end()[0] == 0
    out = tmp_path / "run"
    for kill_at in (
        16,
        30,
        45,
    ):  # before and after the checkpoint of a run without an update, and later
        Run(
            tmp_path,
            "train",
            *poison_argv(poison, fragile, out, "--save-every", 1, "--resume"),
            kill_at=kill_at,
        ).end()
    assert (
        Run(
            tmp_path, "train", *poison_argv(poison, fragile, out, "--save-every", 1, "--resume")
        ).end()[0]
        == 0
    )
    assert same_weights(out, tmp_path / "whole") and same_log(out, tmp_path / "whole")


def test_three_poisoned_batches_in_a_row_end_it_with_the_last_good_checkpoint(
    data, fragile, tmp_path, script
):
    poison = poisoned(data, tmp_path / "d", [1, 4, 5, 6])
    result = script("train", *poison_argv(poison, fragile, tmp_path / "run", "--save-every", 1))
    fails(
        (result[0], "", result[2]),
        "not finite in steps 4 to 6",
        "sequences 32 to 55",
        "lower --lr, now 0.001",
    )
    assert (
        sound(tmp_path / "run") == [5, 6] and not (tmp_path / "run" / "model.safetensors").exists()
    )
    again = script(
        "train", *poison_argv(poison, fragile, tmp_path / "run", "--save-every", 1, "--resume")
    )
    fails(
        (again[0], "", again[2]), "not finite in steps 4 to 6"
    )  # resumed at the third, it ends there as well
    a, b = (
        load_file(tmp_path / "run" / f"checkpoint-0000000{step}" / "model.safetensors")
        for step in (5, 6)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [line["step"] for line in log_of(tmp_path / "run") if "skipped" in line] == [1, 4, 5, 6]


def test_ranks_skip_a_poisoned_batch_together(data, fragile, tmp_path, script):
    """The poison is in one rank's rows."""
    poison = poisoned(data, tmp_path / "d", [4])
    both = ranks(tmp_path, *poison_argv(poison, fragile, tmp_path / "run"))
    ended = [run.end() for run in both]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert script("train", *poison_argv(poison, fragile, tmp_path / "one"))[0] == 0
    for a, b in zip(log_of(tmp_path / "run"), log_of(tmp_path / "one"), strict=True):
        assert a["loss"] == b["loss"] == None or a["loss"] == pytest.approx(b["loss"], abs=1e-4)  # noqa: E711


def test_weights_that_are_not_finite_are_neither_used_nor_saved(data, small, tmp_path, script):
    from model import save

    model = load(small)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[500] = float("inf")  # a token that the data does not have
    shutil.copytree(small, tmp_path / "bad")
    save(model, tmp_path / "bad")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="embed_in.weight is not finite"):
        train(
            model,
            data,
            {"sums": 16},
            seq_len=32,
            batch_size=4,
            lr=1e-3,
            save_every=2,
            out=tmp_path / "run",
        )
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[:] = float("nan")
    save(model, tmp_path / "bad")
    fails(
        script("train", *argv(data, tmp_path / "bad", tmp_path / "new")),
        "code's val split",
        "is not finite",
    )
    fails(
        script("eval", tmp_path / "bad", "--data", data.folder, "--device", "cpu"),
        "test split",
        "is not finite",
    )


def test_weights_that_overflow_the_type_they_are_saved_in_are_not_saved(
    data, small, tmp_path, script
):
    from model import save

    model = load(small)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[500] = 1e6
    save(model, tmp_path / "large", small / "tokenizer.json")
    result = script(
        "train", *argv(data, tmp_path / "large", tmp_path / "run", "--save-dtype", "float16")
    )
    fails(result, "gpt_neox.embed_in.weight is not finite")
    assert not (tmp_path / "run" / "model.safetensors").exists() and sound(tmp_path / "run")


@pytest.mark.parametrize("damaged", ["round-1", "base"])
def test_a_damaged_model_of_an_earlier_round_is_made_anew(data, tmp_path, damaged):
    options = [
        "--data",
        data.folder,
        "--out",
        tmp_path / "run",
        "--seq-len",
        32,
        "--base-sequences",
        64,
    ]
    options += ["--batch-size", 8, "--sequences", 48, "--rounds", 2, "--eval-sequences", 20, *SMALL]
    assert Run(tmp_path, "mix", *options).end()[0] == 0
    expected = (
        load_file(tmp_path / "run" / "model.safetensors"),
        (tmp_path / "run" / "result.json").read_bytes(),
    )
    for name in (
        "model.safetensors",
        "history.jsonl",
        "result.json",
    ):  # as if it had been killed in the first round
        (tmp_path / "run" / name).unlink()
    folder = tmp_path / "run" / "round-1" if damaged == "round-1" else next(tmp_path.glob("base-*"))
    content = np.memmap(folder / "model.safetensors", np.uint8, "r+")
    content[-1000] ^= 8
    content.flush()
    status, text, err = Run(tmp_path, "mix", *options, "--resume").end()
    assert status == 0 and f"{folder / 'model.safetensors'} is damaged, and made anew" in text, err
    found = (
        load_file(tmp_path / "run" / "model.safetensors"),
        (tmp_path / "run" / "result.json").read_bytes(),
    )
    assert found[1] == expected[1] and all(
        torch.equal(found[0][name], expected[0][name]) for name in expected[0]
    )


def test_a_file_that_cannot_grow_costs_nothing_that_was_there(data, small, whole, tmp_path):
    out = tmp_path / "run"
    run = Run(tmp_path, "train", *argv(data, small, out))
    run.wait_for(lambda: list(out.glob("checkpoint-*")))
    run.process.kill()
    run.end()
    before = sound(out)
    for largest in (1000, 300_000):  # less than the weights; less than the optimizer's state
        fails(
            Run(tmp_path, "train", *argv(data, small, out, "--resume"), largest=largest).end(),
            out,
            "File too large",
        )
        assert sound(out) == before and not list(out.glob(".*.partial"))
    assert Run(tmp_path, "train", *argv(data, small, out, "--resume")).end()[0] == 0
    assert same_weights(out, whole) and same_log(out, whole)


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MB."""
    (tmp_path / "disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "disk"], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a file system")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)


def test_a_full_disk_and_one_that_became_read_only(data, small, whole, tmp_path, disk):
    out = disk / "run"
    fails(Run(tmp_path, "train", *argv(data, small, out)).end(), out, "No space left on device")
    assert not (out / "model.safetensors").exists()
    subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
    run = Run(tmp_path, "train", *argv(data, small, out, "--resume"))
    run.wait_for(lambda: list(out.glob("checkpoint-*")))
    run.process.kill()
    run.end()
    before = sound(out)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    fails(
        Run(tmp_path, "train", *argv(data, small, out, "--resume")).end(),
        out,
        "Read-only file system",
    )
    assert sound(out) == before
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert Run(tmp_path, "train", *argv(data, small, out, "--resume")).end()[0] == 0
    assert same_weights(out, whole) and same_log(out, whole)


def test_prepare_on_a_full_disk_leaves_nothing(tmp_path, disk):
    source = write_jsonl(
        tmp_path / "a.jsonl", [f"{i} {t}" for i in range(40) for t in made_documents("code", 60, i)]
    )
    base = [f"a={source}", "--tokenizer", "train:400", "--workers", 1]
    (disk / "ballast").write_bytes(bytes(800_000))
    fails(Run(tmp_path, "prepare", "--out", disk / "d", *base).end(), "No space left on device")
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_log_that_cannot_grow(data, small, tmp_path):
    """The only file that is written to in place."""
    result = Run(
        tmp_path, "train", *argv(data, small, tmp_path / "run", "--save-every", 0), largest=2000
    ).end()
    fails(result, "File too large", "--resume goes on")


def test_data_that_vanishes_or_rots(data, small, tmp_path, script):
    shutil.copytree(data.folder, tmp_path / "d")
    copy = Data(tmp_path / "d")
    run = Run(tmp_path, "train", *argv(copy, small, tmp_path / "run", "--eval-every", 1))
    run.wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists())
    (tmp_path / "d" / "sums.val.bin").rename(tmp_path / "away")
    fails(run.end(), tmp_path / "d" / "sums.val.bin", "No such file")
    fails(
        script("train", *argv(copy, small, tmp_path / "run", "--resume")),
        tmp_path / "d" / "sums.val.bin",
        "missing",
    )
    (tmp_path / "away").rename(tmp_path / "d" / "sums.val.bin")
    text = (tmp_path / "d" / "tokenizer.json").read_text()
    (tmp_path / "d" / "tokenizer.json").write_text("")
    fails(
        script("eval", small, "--data", tmp_path / "d", "--device", "cpu"),
        "tokenizer.json",
        "damaged",
    )
    (tmp_path / "d" / "tokenizer.json").write_text(text)
    for name in ("sums.train.bin", "prose.test.bin", "tokenizer.json"):
        content = bytearray((tmp_path / "d" / name).read_bytes())
        content[len(content) // 2] ^= 4
        (tmp_path / "d" / name).write_bytes(content)
        for more in ([], ["--check-data"]):
            fails(
                script("train", *argv(copy, small, tmp_path / "run", "--resume", *more)),
                name,
                "damaged",
            )
            fails(
                script("eval", small, "--data", tmp_path / "d", "--device", "cpu", *more),
                name,
                "damaged",
            )
        content[len(content) // 2] ^= 4
        (tmp_path / "d" / name).write_bytes(content)
    assert script("train", *argv(copy, small, tmp_path / "run", "--resume"))[0] == 0


def test_of_much_data_a_sample_is_checked(tmp_path, monkeypatch):
    """Each start looks at other parts: a damaged one is found sooner or later, or at once where all are asked for."""
    for module in (prepare, eval):
        monkeypatch.setattr(module, "CHUNK", 100)
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("code", 100))
    made = prepare.prepare(tmp_path / "d", {"a": [source]}, "train:300")
    assert len(made.meta["files"]["a.train"]["chunks"]) > 100
    for _ in range(50):
        eval.check_data(made)
    content = np.memmap(tmp_path / "d" / "a.train.bin", np.uint8, "r+")
    content[1234] ^= 1
    content.flush()
    with pytest.raises(InputError, match="a.train.bin: damaged"):
        eval.check_data(made, everything=True)
    with pytest.raises(InputError, match="a.train.bin: damaged"):
        for _ in range(2000):
            eval.check_data(made)
    read = []
    monkeypatch.setattr(eval.hashlib, "sha256", lambda part: read.append(len(part)) or sha256(part))
    with contextlib.suppress(InputError):
        eval.check_data(made)
    assert sum(size <= 100 for size in read) <= 16


@pytest.mark.parametrize("name", ["train", "mix"])
def test_a_second_run_in_a_folder_stops_and_a_killed_one_lets_go(data, small, tmp_path, name):
    base = [str(word) for word in argv(data, small, tmp_path / "run", "--sequences", 4000)]
    if name == "mix":
        del base[base.index("--mix") : base.index("--mix") + 2]
    first = Run(tmp_path, name, *base)
    first.wait_for(lambda: list((tmp_path / "run").rglob("log.jsonl")))
    for way in ("--resume", "--overwrite"):
        fails(
            Run(tmp_path, name, *base, way).end(),
            tmp_path / "run",
            "another process is at work there",
        )
    assert first.process.is_alive()
    first.process.kill()
    first.end()
    second = Run(tmp_path, name, *base, "--resume")
    time.sleep(1)
    second.send(signal.SIGTERM)
    status, _, err = second.end()
    assert status == 143 and "go on with" in err


def test_two_searches_do_not_pretrain_one_base_at_the_same_time(data, tmp_path):
    base = [
        "--data",
        data.folder,
        "--seq-len",
        32,
        "--base-sequences",
        8000,
        "--batch-size",
        8,
        *SMALL,
    ]
    first = Run(tmp_path, "mix", *base, "--out", tmp_path / "one")
    first.wait_for(lambda: list(tmp_path.glob("base-*/log.jsonl")))
    fails(
        Run(tmp_path, "mix", *base, "--out", tmp_path / "two").end(),
        "base-tiny-",
        "another process is at work there",
    )
    assert first.process.is_alive()
    first.process.kill()


def test_prepare_twice_at_once(tmp_path):
    """The first one waits for text that comes through a pipe."""
    os.mkfifo(tmp_path / "a.jsonl")
    argv = [
        "--out",
        tmp_path / "d",
        f"a={tmp_path / 'a.jsonl'}",
        "--tokenizer",
        "train:300",
        "--workers",
        1,
    ]
    first = Run(tmp_path, "prepare", *argv)
    first.wait_for(lambda: list(tmp_path.glob(".d-*/tokenizer.json")))
    fails(Run(tmp_path, "prepare", *argv).end(), tmp_path / "d", "another process is at work there")
    assert first.process.is_alive() and list(tmp_path.glob(".d-*/tokenizer.json"))
    first.process.kill()
