"""On a GPU: the whole loop, the same numbers as on a CPU, and running out of its memory."""

import json

import pytest
import torch
from conftest import command, fails, log_of, options, train_options

from mix import verdict
from model import load
from train import Hyperparameters, train

reason = "no CUDA GPU on this machine: the GPU path is not tested here"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)


def test_the_whole_loop_runs_compiled_in_bf16_learns_and_resumes(data, tmp_path):
    sizes = {"seq_len": 64, "base_sequences": 256, "sequences": 96, "rounds": 2}
    words = options(data=data.folder, out=tmp_path / "mix", **sizes)
    done = command("mix.py", *words)
    assert done.returncode == 0, done.stderr
    assert "on cuda x 1, bfloat16, torch.compile" in done.stdout
    result = json.loads((tmp_path / "mix" / "result.json").read_text())
    assert result["models"]["reweighted"]["difference"]["mean"]["change"] < 0
    again = command("mix.py", *words, "--resume")
    assert again.returncode == 0, again.stderr
    assert verdict(result) in again.stdout


def test_losses_equal_those_of_the_cpu_in_fp32_and_nearly_in_bf16(small):
    tokens = torch.randint(400, (2, 33))
    gpu = load(small, "cuda")
    expected = load(small)(tokens[:, :-1], tokens[:, 1:])

    def losses():
        return gpu(tokens[:, :-1].cuda(), tokens[:, 1:].cuda()).cpu()

    torch.testing.assert_close(losses(), expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        torch.testing.assert_close(losses(), expected, atol=3e-2, rtol=3e-2)


@pytest.fixture(scope="module")
def on_cpu(data, small, tmp_path_factory):
    """The folder of a run in fp32."""
    out = tmp_path_factory.mktemp("cpu") / "run"
    assert command("train.py", *train_options(data, small, out)).returncode == 0
    return out


def after(folder) -> dict[str, float]:
    return json.loads((folder / "result.json").read_text())["models"]["after"]["nats"]


WAYS = [{}, {"fsdp": True}, {"activation_checkpointing": True}, {"fsdp": True, "no_compile": True}]


@pytest.mark.parametrize("ranks, ways", [(0, {}), *((1, ways) for ways in WAYS)])
def test_every_step_has_the_loss_that_it_has_on_the_cpu(data, small, tmp_path, on_cpu, ranks, ways):
    """So that it sees the same sequences, and learns the same from them; under torchrun, too."""
    out = tmp_path / "run"
    words = train_options(data, small, out, **{"device": "cuda", "no_compile": False} | ways)
    done = command("train.py", *words, ranks=ranks)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in log_of(out)]
    assert losses == pytest.approx([line["loss"] for line in log_of(on_cpu)], abs=5e-3)
    assert after(out) == pytest.approx(after(on_cpu), abs=5e-3)


def test_a_run_that_was_interrupted_goes_on_with_the_state_of_its_optimizer(data, small, tmp_path):
    hyper = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2)

    def run(name, validate=None):
        how = {"out": tmp_path / name, "save_every": 2, "validate": validate}
        train(load(small, "cuda"), data, {"code": 30, "sums": 34}, hyper, **how)

    def interrupt(done):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("interrupted", interrupt)
    run("interrupted")
    run("whole")
    losses = [
        [line["loss"] for line in log_of(tmp_path / name)] for name in ("interrupted", "whole")
    ]
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_training_that_runs_out_of_memory_names_a_smaller_micro_batch(data, tmp_path):
    """Half a million tokens at a time, of a model that keeps about a megabyte for each."""
    sizes = {"seq_len": 64, "sequences": 8192, "batch_size": 8192, "micro_batch_size": 8192}
    settings = {"device": "cuda", "dtype": "bfloat16", **sizes}
    words = train_options(data, "scratch:pythia-410m", tmp_path / "run", **settings)
    what = "training on 8192 sequences of 64 tokens"
    fails(command("train.py", *words), "out of memory: ", what, "try --micro-batch-size 4096")
