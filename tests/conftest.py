"""What the tests share: text made on the spot, a small model, and ways of running a script."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model import Config, GPTNeoX, save
from prepare import Data, cli, prepare
from train import RESUME_HINT

ROOT = Path(__file__).parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network; the hub's serve one on loopback
# What torch says of Python 3.13.0 is no fault of ours.
os.environ["PYTHONWARNINGS"] = "ignore:Guards may run slower:RuntimeWarning"
torch.set_num_threads(1)  # the models are so small that threads only wait for each other
# macOS gives a process so many open files. What needs more of them as data grows fails here.
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

SMALL = ["--device", "cpu", "--dtype", "float32", "--no-compile"]


def pytest_configure(config):
    config.option.reportchars += "s"  # the summary says what was skipped, and why


# ---- data and models ----

WORDS = "the a small large red old river stone house bird walks sees finds under over near and then"


def made_documents(domain: str, n: int, seed: int = 0) -> list[str]:
    """Documents of a kind that a small model can learn: sentences, sums, or code, by domain."""
    rng = random.Random(f"{domain}{seed}")
    words = WORDS.split()
    made = []
    for i in range(n):
        lines = []
        for _ in range(rng.randint(4, 12)):
            if domain == "prose":
                lines.append(" ".join(rng.choices(words, k=rng.randint(5, 12))).capitalize() + ".")
            elif domain == "sums":
                a = rng.randint(0, 999)
                b = rng.randint(0, 999)
                lines.append(f"{a} + {b} = {a + b}")
            else:
                name = f"{rng.choice(words)}_{rng.randint(0, 99)}"
                lines.append(f"def {name}(x):\n    return x * {rng.randint(0, 999)}\n")
        made.append(f"{domain} {i}\n" + "\n".join(lines) + "\n")
    return made


def write_jsonl(path: Path, documents: list[str]) -> Path:
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def made_data(folder: Path) -> Data:
    """Three made domains in folder/data, split 60/20/20, with a tokenizer of 400."""
    sources = {}
    for d in ("code", "prose", "sums"):
        sources[d] = [write_jsonl(folder / f"{d}.jsonl", made_documents(d, 120))]
    return prepare(folder / "data", sources, "train:400", val_fraction=0.2, test_fraction=0.2)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Data:
    return made_data(tmp_path_factory.mktemp("made"))


def small_model(folder: Path, data: Data, **changes) -> Path:
    """A small random model with the vocabulary of `made_data` and a context of 32."""
    torch.manual_seed(0)
    save(GPTNeoX(Config(512, 32, 2, 4, 64, 32, **changes)), folder, data.folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory, data) -> Path:
    return small_model(tmp_path_factory.mktemp("small"), data)


@pytest.fixture
def copy_of_small(tmp_path, small) -> Path:
    """One to damage."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


def bins(folder: Path, lengths: dict[str, int]) -> Data:
    """Counted-up tokens, without prepare.py: train splits of these lengths, val and test of 100."""
    folder.mkdir()
    files = {}
    for domain, length in lengths.items():
        for split in ("train", "val", "test"):
            tokens = (np.arange(length if split == "train" else 100) % 50_000).astype("<u2")
            tokens.tofile(folder / f"{domain}.{split}.bin")
            file = {"documents": 1, "tokens": len(tokens), "bytes": len(tokens)}
            file["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
            files[f"{domain}.{split}"] = file
    tokenizer = {"sha256": "", "vocab_size": 50_000, "end_of_text": 0}
    meta = {"format": 1, "tokenizer": tokenizer, "files": files}
    (folder / "meta.json").write_text(json.dumps(meta))
    return Data(folder)


# ---- running a script ----


def options(**given) -> list[str]:
    """Words of a command line: options(seq_len=32, resume=True) -> ["--seq-len", "32", "--resume"].

    What is False is left out.
    """
    words = []
    for name, value in given.items():
        if value is not False:
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words.append(str(value))
    return words


def train_options(data: Data, model: Path, out: Path, **changes) -> list[str]:
    """Of train.py: six steps of eight sequences, the last of four, and what is changed of that."""
    words = {"data": data.folder, "model": model, "out": out, "mix": "uniform", "sequences": 44}
    words |= {"batch_size": 8, "lr": 1e-3, "eval_sequences": 8}
    words |= {"device": "cpu", "dtype": "float32", "no_compile": True}
    return options(**words | changes)


def job(name: str, data: Data, model: str | Path, out: Path) -> list[str]:
    """Words for a small job of train, mix or prepare, which goes on where another run ended."""
    if name == "prepare":
        source = data.folder.parent / "code.jsonl"
        return [f"a={source}", *options(out=out, tokenizer="train:400", workers=1)]
    if name == "train":  # 50 steps of a few milliseconds
        return train_options(data, model, out, sequences=400, save_every=2, resume=True)
    sizes = {"seq_len": 32, "base_sequences": 64, "batch_size": 8, "sequences": 48, "rounds": 3}
    words = options(data=data.folder, out=out, **sizes, eval_sequences=20)
    return [*words, "--save-every", "2", "--resume", *SMALL]


def run_script(name: str, argv: list) -> None:
    """As a user does, in this process."""
    sys.argv = [f"{name}.py", *map(str, argv)]
    cli(__import__(name).main, RESUME_HINT)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script in this process: script("train", …) -> (exit status, stdout, stderr)."""

    def run(name: str, *argv) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [])  # which is put back
        capsys.readouterr()
        status = 0
        try:
            run_script(name, argv)
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return run


def command(script, *argv, ranks: int = 0, memory: float = 0) -> subprocess.CompletedProcess:
    """Run a script as a user does: command("train.py", …).

    ranks: as many processes, under torchrun. memory: how many bytes a process may have.
    """
    words = [sys.executable]
    if ranks:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [ROOT / script, *map(str, argv)]
    how = {"text": True, "timeout": 600, "capture_output": True}
    if memory:
        limits = (int(memory), int(memory))
        how["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_DATA, limits)
    return subprocess.run(words, **how)


# A server that has imported everything once: its children start at once.
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
processes = multiprocessing.get_context("forkserver")
imported = ["conftest", "mix", "matplotlib.figure", "torch._dynamo", "torch.distributed.fsdp"]
processes.set_forkserver_preload(imported)
# What Python does to a disk, as its audit calls it.
DISK = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def kill_before(moment: str | int, number: int) -> None:
    """Send this process a signal just before changes of the disk.

    Before the n-th, or before each whose word and path, "rename /…/x", a pattern is found in.
    """
    changes = 0

    def watch(event, args):
        nonlocal changes
        if event not in DISK or event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        changes += 1
        path = args[1] if event == "os.rename" else args[0]
        words = f"{event.removeprefix('os.')} {path}"
        if changes == moment or isinstance(moment, str) and re.search(moment, words):
            os.kill(os.getpid(), number)

    sys.addaudithook(watch)


def child(what, args, output, kill_at=0, number=signal.SIGKILL, largest=0, env=None) -> None:
    for stream in (1, 2):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(env or {})
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if kill_at:
        kill_before(kill_at, number)
    if isinstance(what, str):
        run_script(what, args)
    else:
        what(*args)


class Run:
    """A script, or a function of a test's file, in a process that has started when this returns.

    settings: kill_at, a moment, and number, for kill_before; largest, which no file may exceed, in
    bytes; env, what is added to the environment.
    """

    def __init__(self, tmp_path: Path, what, *args, **settings):
        self.output = str(tmp_path / f"output-{random.randrange(10**9)}")
        words = (what, args, self.output)
        self.process = processes.Process(target=child, args=words, kwargs=settings)
        self.process.start()

    def end(self, seconds: float = 300) -> tuple[int, str, str]:
        """Waits for it; returns (exit status, stdout, stderr), as the `script` fixture does."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode, self.printed(1), self.printed(2)

    def printed(self, stream: int = 1) -> str:
        """So far, on stdout or stderr."""
        path = Path(f"{self.output}.{stream}")
        return path.read_text() if path.exists() else ""

    def wait_for(self, condition) -> None:
        while self.process.is_alive() and not condition():
            time.sleep(0.002)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def rank_environments(number: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many ranks."""
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": 1}
    group |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "OMP_NUM_THREADS": 1}
    ranks = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(number)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def ranks(tmp_path: Path, number: int, what, *args, **settings) -> list[Run]:
    """So many ranks as torchrun starts them, but without it."""
    return [Run(tmp_path, what, *args, env=env, **settings) for env in rank_environments(number)]


def as_rank(rank: int, world_size: int):
    """A block in which train.py passes for one of several ranks, though there are no others."""
    return mock.patch.multiple("train", rank=lambda: rank, world_size=lambda: world_size)


# ---- what came of it ----


def ends_well(*runs: Run) -> list[str]:
    """Waits for processes, none of which may fail or complain; what they printed."""
    ended = [run.end() for run in runs]
    assert all(status == 0 and not err for status, _, err in ended), ended
    return [out for _, out, _ in ended]


def works(result: tuple[int, str, str]) -> str:
    """The end is a good one; what was printed."""
    status, out, err = result
    assert status == 0, err
    return out


def fails(result, *words) -> None:
    """The end is as bad input's must be: status 2, and one line on stderr that has these words."""
    if isinstance(result, subprocess.CompletedProcess):
        result = (result.returncode, result.stdout, result.stderr)
    status, _, err = result
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err, err


def log_of(folder: Path) -> list[dict]:
    """The lines of a run's log, but for how fast it was."""
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{**line, "tokens_per_second": 0} for line in lines]


def content_of(folder: Path) -> dict[str, str]:
    """What is in a folder, by path, as hashes; of a log, as log_of reads it."""
    hashes = {}
    for path in folder.rglob("*"):
        content = b""
        if path.name == "log.jsonl":
            content = repr(log_of(path.parent)).encode()
        elif path.is_file():
            content = path.read_bytes()
        hashes[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return hashes


def same_tensors(found: dict, expected: dict) -> bool:
    same_names = found.keys() == expected.keys()
    return same_names and all(torch.equal(found[name], expected[name]) for name in found)


def same_weights(a: Path, b: Path) -> bool:
    """Of two models' folders."""
    return same_tensors(*(load_file(folder / "model.safetensors") for folder in (a, b)))


def assert_same_training(found: dict, expected: dict, atol: float) -> None:
    """Weights agree, but for key biases: their gradient is zero, and Adam makes whole steps of its
    rounding."""
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        difference = (weight - expected[name]).detach()
        if name.endswith("query_key_value.bias"):
            difference.view(4, 3, 8)[:, 1] = 0  # heads, (query, key, value), head dimension
        assert difference.abs().max() <= atol, name
