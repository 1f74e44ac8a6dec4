"""What the tests share: text made on the spot, a small model, and two ways of running a script."""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network; the hub's serve one on loopback
# macOS gives a process so many open files. What needs more of them as data grows fails here.
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

from model import Config, GPTNeoX, save  # noqa: E402
from prepare import Data, cli, prepare  # noqa: E402
from train import RESUME_HINT  # noqa: E402

SMALL = ["--device", "cpu", "--dtype", "float32", "--no-compile"]


def pytest_configure(config):
    config.option.reportchars += "s"  # the summary says what was skipped, and why


def made_documents(domain: str, n: int, seed: int = 0) -> list[str]:
    """Documents of a kind that a small model can learn: sentences, sums, or code, by domain."""
    rng = random.Random(f"{domain}{seed}")
    words = "the a small large red old river stone house bird walks sees finds under over near and then".split()
    made = []
    for i in range(n):
        lines = []
        for _ in range(rng.randint(4, 12)):
            if domain == "prose":
                lines.append(" ".join(rng.choices(words, k=rng.randint(5, 12))).capitalize() + ".")
            elif domain == "sums":
                a, b = rng.randint(0, 999), rng.randint(0, 999)
                lines.append(f"{a} + {b} = {a + b}")
            else:
                lines.append(
                    f"def {rng.choice(words)}_{rng.randint(0, 99)}(x):\n    return x * {rng.randint(0, 999)}\n"
                )
        made.append(f"{domain} {i}\n" + "\n".join(lines) + "\n")
    return made


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Data:
    """Three made domains, split 60/20/20, with a tokenizer of 400."""
    folder = tmp_path_factory.mktemp("made")
    sources = {
        d: [write_jsonl(folder / f"{d}.jsonl", made_documents(d, 120))]
        for d in ("code", "prose", "sums")
    }
    return prepare(folder / "data", sources, "train:400", val_fraction=0.2, test_fraction=0.2)


@pytest.fixture(scope="session")
def small(tmp_path_factory, data) -> Path:
    """A folder with a small random model that has the vocabulary of `data` and a context of 32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    save(GPTNeoX(Config(512, 32, 2, 4, 64, 32)), folder, data.folder / "tokenizer.json")
    return folder


def bins(folder: Path, lengths: dict[str, int]) -> Data:
    """Counted-up tokens, written without prepare.py: train splits of these lengths, val and test of 100."""
    folder.mkdir()
    files = {}
    for domain, length in lengths.items():
        for split in ("train", "val", "test"):
            tokens = (np.arange(length if split == "train" else 100) % 50_000).astype("<u2")
            tokens.tofile(folder / f"{domain}.{split}.bin")
            files[f"{domain}.{split}"] = {
                "documents": 1,
                "tokens": len(tokens),
                "bytes": len(tokens),
                "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            }
    tokenizer = {"sha256": "", "vocab_size": 50_000, "end_of_text": 0}
    (folder / "meta.json").write_text(
        json.dumps({"format": 1, "tokenizer": tokenizer, "files": files})
    )
    return Data(folder)


def options(**given) -> list[str]:
    """Words of a command line: options(seq_len=32, resume=True) -> ["--seq-len", "32", "--resume"]."""
    words = []
    for name, value in given.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script in this process: script("train", "--out", …) -> (exit status, stdout, stderr)."""

    def run(name: str, *argv) -> tuple[int, str, str]:
        module = __import__(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        capsys.readouterr()
        try:
            cli(module.main)
            status = 0
        except SystemExit as e:
            status = e.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def command(
    *argv, ranks: int = 0, memory: float | None = None, **kwargs
) -> subprocess.CompletedProcess:
    """Run a script as a user does: command("train.py", …), under torchrun with `ranks` processes if given; each of its
    processes may have so many bytes of memory of its own."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks
        else []
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if ranks else None
    if memory:
        kwargs["preexec_fn"] = lambda: resource.setrlimit(
            resource.RLIMIT_DATA, (int(memory), int(memory))
        )
    return subprocess.run(
        [sys.executable, *torchrun, str(ROOT / argv[0]), *map(str, argv[1:])],
        text=True,
        timeout=600,
        env=env,
        capture_output=True,
        **kwargs,
    )


os.environ["PYTHONPATH"] = str(
    ROOT
)  # for a server that imports the scripts once: its children start at once
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mix"])
DISK = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
)  # what Python does to a disk, as its audit calls it


def child(name: str, argv: list[str], output: str, kill_at: int, largest: int, rank: dict) -> None:
    """Runs a script as a user does, but for: SIGKILL just before its kill_at-th change of the disk; no file may become
    larger than `largest` bytes."""
    for stream in (1, 2):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(rank)
    sys.argv, changes = [f"{name}.py", *argv], 0
    torch.set_num_threads(1)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    def count(event, args):
        nonlocal changes
        if event in DISK and not (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at:
        sys.addaudithook(count)
    cli(__import__(name).main, RESUME_HINT)


class Run:
    """A script in a process of its own, which has started when this returns."""

    def __init__(self, tmp_path, name, *argv, kill_at=0, largest=0, rank=None):
        self.output = str(tmp_path / f"output-{random.randrange(10**9)}")
        arguments = (name, [str(a) for a in argv], self.output, kill_at, largest, rank or {})
        self.process = processes.Process(target=child, args=arguments)
        self.process.start()

    def end(self, seconds: float = 120) -> tuple[int, str, str]:
        """Waits for it; returns (exit status, stdout, stderr), as the `script` fixture does."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "still running"
        files = [Path(f"{self.output}.{stream}") for stream in (1, 2)]
        return self.process.exitcode, *(file.read_text() if file.exists() else "" for file in files)

    def wait_for(self, condition) -> None:
        while self.process.is_alive() and not condition():
            time.sleep(0.002)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)
