"""The whole loop on a GPU: bf16, compiled."""

import json

import pytest
import torch
from conftest import command

from model import load

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA GPU on this machine: the GPU path is not tested here",
)


def test_the_whole_loop_runs_on_the_gpu(data, tmp_path):
    argv = [
        "--data",
        data.folder,
        "--out",
        tmp_path / "mix",
        "--seq-len",
        64,
        "--base-sequences",
        256,
        "--sequences",
        96,
        "--rounds",
        2,
    ]
    done = command("mix.py", *argv)
    assert done.returncode == 0, done.stderr
    assert "on cuda x 1, bfloat16 (the hardware has it), torch.compile" in done.stdout
    result = json.loads((tmp_path / "mix" / "result.json").read_text())
    assert result["models"]["reweighted"]["difference"]["mean"]["change"] < 0
    again = command("mix.py", *argv, "--resume")
    assert again.returncode == 0 and "reweighted - uniform" in again.stdout


def test_losses_on_the_gpu_equal_those_on_the_cpu(small):
    tokens = torch.randint(400, (2, 33))
    cpu, gpu = load(small), load(small, "cuda")
    torch.testing.assert_close(
        gpu(tokens[:, :-1].cuda(), tokens[:, 1:].cuda()).cpu(),
        cpu(tokens[:, :-1], tokens[:, 1:]),
        atol=1e-4,
        rtol=1e-4,
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = gpu(tokens[:, :-1].cuda(), tokens[:, 1:].cuda()).cpu()
    torch.testing.assert_close(half, cpu(tokens[:, :-1], tokens[:, 1:]), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    "more", [[], ["--fsdp"], ["--activation-checkpointing"], ["--fsdp", "--no-compile"]]
)
def test_torchrun_with_one_gpu_trains_like_the_cpu(data, small, tmp_path, more):
    argv = [
        "--data",
        data.folder,
        "--model",
        small,
        "--mix",
        "uniform",
        "--sequences",
        20,
        "--batch-size",
        8,
    ]
    argv += ["--dtype", "float32", "--out"]
    done = command("train.py", *argv, tmp_path / "gpu", *more, ranks=1)
    assert done.returncode == 0, done.stderr
    assert (
        command("train.py", *argv, tmp_path / "cpu", "--device", "cpu", "--no-compile").returncode
        == 0
    )
    a, b = (
        json.loads((tmp_path / out / "result.json").read_text())["models"]["after"]
        for out in ("gpu", "cpu")
    )
    assert a["nats"] == pytest.approx(b["nats"], abs=1e-3)


def test_out_of_memory_on_the_gpu_names_a_smaller_micro_batch(data, tmp_path):
    argv = [
        "--data",
        data.folder,
        "--model",
        "scratch:pythia-1b",
        "--mix",
        "uniform",
        "--seq-len",
        64,
        "--out",
    ]
    argv += [
        tmp_path / "run",
        "--sequences",
        2**18,
        "--batch-size",
        2**18,
        "--micro-batch-size",
        2**18,
        "--no-compile",
    ]
    done = command("train.py", *argv)
    assert done.returncode == 2 and "try --micro-batch-size 131072" in done.stderr, done.stderr


def test_two_runs_on_the_gpu_see_the_same_sequences(data, small, tmp_path):
    argv = [
        "--data",
        data.folder,
        "--model",
        small,
        "--mix",
        "uniform",
        "--sequences",
        80,
        "--batch-size",
        8,
        "--out",
    ]
    for out in ("one", "two"):
        assert command("train.py", *argv, tmp_path / out, "--dtype", "float32").returncode == 0
    one, two = (
        [json.loads(line) for line in open(tmp_path / out / "log.jsonl")] for out in ("one", "two")
    )
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], abs=1e-3)
