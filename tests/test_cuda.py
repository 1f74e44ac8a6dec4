"""The whole loop on a GPU: bf16, compiled."""

import json

import pytest
import torch
from conftest import command

from model import load

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU on this machine: the GPU path is not tested here"
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
        gpu(tokens[:, :-1].cuda(), tokens[:, 1:].cuda()).cpu(), cpu(tokens[:, :-1], tokens[:, 1:]), atol=1e-4, rtol=1e-4
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = gpu(tokens[:, :-1].cuda(), tokens[:, 1:].cuda()).cpu()
    torch.testing.assert_close(half, cpu(tokens[:, :-1], tokens[:, 1:]), atol=3e-2, rtol=3e-2)


def test_torchrun_with_one_gpu_trains(data, small, tmp_path):
    done = command(
        "train.py",
        "--data",
        data.folder,
        "--model",
        small,
        "--out",
        tmp_path / "run",
        "--mix",
        "uniform",
        "--sequences",
        20,
        "--batch-size",
        8,
        ranks=1,
    )
    assert done.returncode == 0, done.stderr
