"""Several processes, on one node and on two: what one process does, in parts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT, Run, ends_well, fails, log_of, options, ranks, train_options, works
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import model
import train
from prepare import Data
from train import Hyperparameters


@pytest.fixture(scope="module")
def one(data, small, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one")
    ends_well(Run(folder, "train", *train_options(data, small, folder / "run")))
    return folder / "run"


def assert_same_log(out: Path, one: Path, loss: float = 1e-5) -> None:
    found = log_of(out)
    assert [line["sequences"] for line in found] == [8, 8, 8, 8, 8, 4]
    for line, expected in zip(found, log_of(one), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=loss)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], abs=10 * loss)


def assert_same_run(out: Path, one: Path) -> None:
    assert_same_log(out, one)
    weights = [load_file(folder / "model.safetensors") for folder in (out, one)]
    conftest.assert_same_training(*weights, atol=1e-5)


@pytest.mark.parametrize(
    "number, changes",
    [
        (2, {"micro_batch_size": 3}),
        (4, {"activation_checkpointing": True}),
        (3, {"fsdp": True, "micro_batch_size": 2, "activation_checkpointing": True}),
    ],
)
def test_ranks_train_like_one_process_without_warnings(data, small, one, tmp_path, number, changes):
    """A batch has 8 rows, the last one 4: some ranks, and some micro-batches, are not full."""
    words = train_options(data, small, tmp_path / "run", **changes)
    printed = ends_well(*ranks(tmp_path, number, "train", *words))
    assert f"on cpu x {number}," in printed[0]
    assert not any(printed[1:])
    assert_same_run(tmp_path / "run", one)


def test_ranks_evaluate_like_one_process(data, small, one, tmp_path):
    """Three of them, which have not all as many windows."""
    words = [small, one, *options(data=data.folder, device="cpu", no_compile=True)]
    ends_well(Run(tmp_path, "eval", *words, "--json", tmp_path / "1.json"))
    ends_well(*ranks(tmp_path, 3, "eval", *words, "--json", tmp_path / "3.json"))
    alone, shared = (json.loads((tmp_path / f"{n}.json").read_text())["models"] for n in (1, 3))
    assert alone.keys() == shared.keys() == {str(small), str(one)}
    for name, losses in alone.items():
        assert shared[name]["nats"] == pytest.approx(losses["nats"], abs=1e-6)


def test_two_nodes_meet_and_train_like_one_process(data, small, one, tmp_path):
    words = options(nnodes=2, nproc_per_node=1, local_addr="localhost", rdzv_id=1)
    words += options(rdzv_backend="c10d", rdzv_endpoint=f"localhost:{conftest.free_port()}")
    script = [ROOT / "train.py", *train_options(data, small, tmp_path / "run")]
    nodes = []
    for node in ("0", "1"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", *words, "--node_rank", node]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen([*torchrun, *script], env=env, **pipes))
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum("on cpu x 2," in out for out, _ in outputs) == 1
    assert_same_run(tmp_path / "run", one)


@pytest.mark.parametrize(
    "told, start", [({}, "python"), ({"LOCAL_WORLD_SIZE": "8"}, "torchrun --nproc_per_node=8")]
)
def test_where_torchrun_cannot_be_seen_the_command_has_what_it_told(monkeypatch, told, start):
    """This process has another parent."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train.py", "--resume", "--out", "my run"])
    assert train.resume_command() == f"{start} train.py --out 'my run' --resume"


# A run that was begun with --fsdp goes on with it, unless it is told otherwise.
ALONE = (1, {"no_fsdp": True})
DDP = (2, {"no_fsdp": True})
FSDP = (2, {"fsdp": True})


@pytest.mark.parametrize(
    "tied, before, after",
    [(False, DDP, DDP), (False, FSDP, ALONE), (True, FSDP, DDP), (True, ALONE, FSDP)],
    ids=["DDP to DDP", "FSDP to one process", "tied, FSDP to DDP", "tied, one process to FSDP"],
)
def test_a_killed_run_goes_on_with_any_ranks(data, tmp_path, script, tied, before, after):
    """Its checkpoints hold whole tensors, each once; the sequences of a step stay what they are."""
    model = conftest.small_model(tmp_path / "model", data, tie_word_embeddings=tied)
    out = tmp_path / "run"

    def start(folder: Path, world, **settings) -> list[Run]:
        number, changes = world
        words = train_options(data, model, folder, save_every=2, resume=True, **changes)
        if number == 1:
            return [Run(tmp_path, "train", *words, **settings)]
        return ranks(tmp_path, number, "train", *words, **settings)

    ends_well(*start(tmp_path / "whole", ALONE))
    killed = start(out, before, kill_at="rename .*checkpoint-00000004")
    assert killed[0].end()[0] == -signal.SIGKILL
    for run in killed:
        run.kill()
    if before == FSDP:
        fails(script("train", "--resume", "--out", out), "--fsdp needs torchrun", "or --no-fsdp")
    printed = ends_well(*start(out, after))
    assert f"going on from {out / 'checkpoint-00000002'}" in printed[0]
    if after == ALONE:  # as it was told last
        works(script("train", "--resume", "--out", out))
    assert_same_log(out, tmp_path / "whole", loss=1e-4)


def test_bfloat16_parameters_learn_what_float32_ones_do(data, small, one, tmp_path):
    words = train_options(data, small, tmp_path / "run", fsdp=True, dtype="bfloat16")
    ends_well(*ranks(tmp_path, 2, "train", *words))
    for line, expected in zip(log_of(tmp_path / "run"), log_of(one), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=5e-3)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def fill_shards(folder: Path) -> None:
    read = []
    read_weights = model.read_weights

    def counted(files, *rest):
        read.extend(files)
        read_weights(files, *rest)

    model.read_weights = counted
    device = model.start("cpu")
    network = model.load(folder, "meta")
    train.shard(network, torch.bfloat16, device)
    train.fill(network, folder)
    assert len(read) == (1 if model.rank() == 0 else 0)
    expected = model.load(folder).state_dict()
    for name, p in network.state_dict().items():
        assert p.to_local().dtype == torch.float32
        assert p.to_local().numel() == p.numel() / 2
        assert torch.equal(p.full_tensor(), expected[name]), name
    model.finish()


def test_only_the_first_rank_reads_the_weights_and_every_rank_keeps_its_share(small, tmp_path):
    ends_well(*ranks(tmp_path, 2, fill_shards, small))


def train_counting(folder: Path, data: Path) -> None:
    """Two steps of four micro-batches."""
    added = []

    def counting(state, bucket):
        added.append(bucket.index())
        return allreduce_hook(None, bucket)

    class Counting(train.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, counting)

    train.DistributedDataParallel = Counting
    model.start("cpu")
    hyper = Hyperparameters(32, 8, 1e-3, micro_batch_size=1)
    train.train(model.load(folder), Data(data), {"sums": 16}, hyper)
    assert added.count(0) == 2, added
    model.finish()


def test_gradients_are_added_up_once_a_step(data, small, tmp_path):
    ends_well(*ranks(tmp_path, 2, train_counting, small, data.folder))


def test_the_share_of_the_peak_is_of_all_gpus(monkeypatch):
    tiny = model.load("scratch:tiny", "meta")
    monkeypatch.setattr("train.peak_flops", lambda *of: 1000 * tiny.flops_per_token(32))
    hyper = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2)
    with conftest.as_rank(0, 2):
        assert train.speed_words(tiny, hyper, 1000) == "1,000 tok/s, MFU 50%"


ENDING = """
import sys, torch
import torch.distributed as dist
from model import finish, start

start("cpu")
kept = dist.group.WORLD  # as FSDP keeps it: the group's threads outlive it
sys.setswitchinterval(5)  # seconds for which a thread keeps the interpreter from others
for _ in range(20):
    dist.all_reduce(torch.ones(4000))
finish()
"""


def test_a_process_ends_well_while_threads_of_its_group_live():
    """Of an interpreter of its own, for it is as that shuts down that they can abort it."""
    processes = []
    for environment in conftest.rank_environments(2):
        words = [sys.executable, "-c", ENDING]
        processes.append(subprocess.Popen(words, env=os.environ | environment))
    assert [process.wait(60) for process in processes] == [0, 0]
