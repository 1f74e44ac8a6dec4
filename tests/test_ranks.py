"""Several processes, on one node and on two: what one process does, in parts."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command
from safetensors.torch import load_file
from test_train import argv, assert_same_training, log_of


@pytest.fixture(scope="module")
def one(data, small, tmp_path_factory):
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    done = command("train.py", *argv(data, small, out))
    assert done.returncode == 0, done.stderr
    return out


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def assert_same_run(out, one, loss=1e-5):
    a, b = log_of(out), log_of(one)
    assert [line["sequences"] for line in a] == [line["sequences"] for line in b] == [8] * 5 + [4]
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], abs=loss)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], abs=10 * loss)
    assert_same_training(
        load_file(out / "model.safetensors"), load_file(one / "model.safetensors"), atol=loss
    )


@pytest.mark.parametrize(
    "ranks, more",
    [
        (2, ["--micro-batch-size", 3]),
        (4, ["--activation-checkpointing"]),
        (2, ["--fsdp", "--micro-batch-size", 3]),
        (4, ["--fsdp", "--activation-checkpointing"]),
    ],
)
def test_processes_train_like_one(data, small, one, tmp_path, ranks, more):
    """Batches of 8, the last of 4: three rows at a time on two ranks leave every step uneven, four ranks the last."""
    done = command("train.py", *argv(data, small, tmp_path / "run", *more), ranks=ranks)
    assert done.returncode == 0 and f"on cpu x {ranks}," in done.stdout, done.stderr
    assert_same_run(tmp_path / "run", one)


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_evaluate_like_one(data, small, one, tmp_path, ranks):
    tables = []
    for world in (0, ranks):
        more = ["--data", data.folder, "--device", "cpu", "--dtype", "float32", "--no-compile"]
        done = command(
            "eval.py", small, one, *more, "--json", tmp_path / f"{world}.json", ranks=world
        )
        assert done.returncode == 0, done.stderr
        tables.append(json.loads((tmp_path / f"{world}.json").read_text())["models"])
    for name in tables[0]:
        assert tables[1][name]["nats"] == pytest.approx(tables[0][name]["nats"], abs=1e-6)


def test_two_nodes_meet_and_train_like_one(data, small, one, tmp_path):
    endpoint = f"localhost:{free_port()}"
    agents = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc_per_node=1",
                f"--node_rank={node}",
            ]
            + [
                "--rdzv_backend=c10d",
                f"--rdzv_endpoint={endpoint}",
                "--rdzv_id=1",
                "--local_addr=localhost",
            ]
            + [str(ROOT / "train.py"), *map(str, argv(data, small, tmp_path / "run"))],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    outputs = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("on cpu x 2," in out for out, _ in outputs) == 1
    assert_same_run(tmp_path / "run", one)


def test_a_sharded_run_that_was_killed_goes_on_in_one_process(data, small, tmp_path):
    """Its checkpoints hold whole tensors: world size and sharding may change, the sequences do not."""
    long = ("--sequences", 400, "--save-every", 2)
    done = command("train.py", *argv(data, small, tmp_path / "whole", *long))
    assert done.returncode == 0, done.stderr
    mine = list(map(str, argv(data, small, tmp_path / "run", *long)))
    rendezvous = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "1",
    }
    processes = [  # as torchrun starts them, so that both can be killed
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *mine, "--fsdp"],
            env={
                **os.environ,
                **rendezvous,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]
    while processes[0].poll() is None and not list((tmp_path / "run").glob("checkpoint-*")):
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.wait()
    assert (
        list((tmp_path / "run").glob("checkpoint-*"))
        and not (tmp_path / "run" / "model.safetensors").exists()
    )
    done = command("train.py", *mine, "--resume")
    assert done.returncode == 0, done.stderr
    a, b = log_of(tmp_path / "run"), log_of(tmp_path / "whole")
    assert [line["step"] for line in a] == list(range(50))
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-4)


LOADING = """
import sys, torch
sys.path.insert(0, {root!r})
import model, eval
from eval import fill, finish, rank_and_world, shard, start, whole

read = []
plain = model.read_weights
model.read_weights = lambda files, *rest: (read.extend(files), plain(files, *rest))
device = start("cpu")
rank, world = rank_and_world()
spread = model.load({folder!r}, "meta")
shard(spread, torch.bfloat16, device)
fill(spread, {folder!r})
assert len(read) == (1 if rank == 0 else 0), (rank, read)
expected = model.load({folder!r}).state_dict()
for name, p in spread.state_dict().items():
    assert p.to_local().dtype == torch.float32 and p.to_local().numel() == p.numel() // world, name
    assert torch.equal(whole(p), expected[name]), name
finish()
"""


def test_only_the_first_rank_reads_the_weights_and_every_rank_keeps_its_share(small, tmp_path):
    script = tmp_path / "loading.py"
    script.write_text(LOADING.format(root=str(ROOT), folder=str(small)))
    done = command(script, ranks=2)
    assert done.returncode == 0, done.stderr


ENDING = """
import sys, torch
sys.path.insert(0, {root!r})
import torch.distributed as dist
from eval import finish, start

start("cpu")
kept = dist.group.WORLD  # as FSDP keeps it: the group's threads outlive it
sys.setswitchinterval(5)  # seconds in which no thread takes the interpreter from another that does not give it away
for _ in range(20):
    dist.all_reduce(torch.ones(4000))
finish()
"""


def test_a_process_ends_well_while_threads_of_its_group_live(tmp_path):
    script = tmp_path / "ending.py"
    script.write_text(ENDING.format(root=str(ROOT)))
    done = command(script, ranks=4)
    assert done.returncode == 0, done.stderr


ADDING = """
import sys
sys.path.insert(0, {root!r})
import train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from eval import finish, start
from model import load
from prepare import Data

added = []


class Counting(train.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, lambda state, bucket: added.append(bucket.index()) or allreduce_hook(None, bucket))


train.DistributedDataParallel = Counting
start("cpu")
train.train(load({folder!r}), Data({data!r}), {{"sums": 16}}, seq_len=32, batch_size=8, lr=1e-3, micro_batch_size=1)
assert added.count(0) == 2, added
finish()
"""


def test_gradients_are_added_up_once_a_step(data, small, tmp_path):
    """Two steps of four micro-batches on each of two ranks."""
    script = tmp_path / "adding.py"
    script.write_text(ADDING.format(root=str(ROOT), folder=str(small), data=str(data.folder)))
    done = command(script, ranks=2)
    assert done.returncode == 0, done.stderr


def test_fsdp_alone_says_how_to_start_it(data, small, tmp_path, script):
    status, _, err = script("train", *argv(data, small, tmp_path / "run", "--fsdp"))
    assert status == 2 and "torchrun --nproc_per_node" in err and not (tmp_path / "run").exists()


def test_bfloat16_parameters_learn_what_float32_ones_do(data, small, one, tmp_path):
    done = command(
        "train.py", *argv(data, small, tmp_path / "run", "--fsdp", "--dtype", "bfloat16"), ranks=2
    )
    assert done.returncode == 0, done.stderr
    for x, y in zip(log_of(tmp_path / "run"), log_of(one), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=5e-3)
    assert {t.dtype for t in load_file(tmp_path / "run" / "model.safetensors").values()} == {
        torch.float32
    }
