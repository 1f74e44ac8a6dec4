"""Models, tokenizers and data sets by name, from a hub that the tests serve on loopback; no other network is there."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, made_documents, write_jsonl
from transformers import AutoModelForCausalLM

from prepare import Data


def commit_of(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}/{revision}".encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories as {"models/ORG/NAME": {revision: folder}}. Files of 10 kB or more are served as large files are: by
    a redirect to another origin, named by their sha256; smaller ones are named by git's hash."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.requests, self.resumed, self.damaged, self.cut = {}, [], [], set(), {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def find(self, repo: str, revision: str) -> tuple[str, Path | None]:
        for name, folder in self.repos[repo].items():
            if revision in (name, commit_of(repo, name)):
                return commit_of(repo, name), folder
        return "", None


def named_by(content: bytes) -> str:
    if len(content) >= 10_000:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/api/agent-harnesses":  # a question of the client's own, once a day
            return self.reply(200, b"{}")
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":  # /api/models/ORG/NAME/revision/REV and /api/models/ORG/NAME/tree/REV
            kind, repo, what, revision = parts[1], "/".join(parts[2:4]), *(parts[4:] + ["", ""])[:2]
        else:  # /ORG/NAME/resolve/REV/FILE and /datasets/ORG/NAME/resolve/REV/FILE
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[kind == "datasets" :]
            repo, what, revision = "/".join(parts[:2]), "/".join(parts[4:]), parts[3]
        repo = f"{kind}/{repo}"
        if repo not in self.server.repos:
            return self.reply(404, code="RepoNotFound")
        commit, folder = self.server.find(repo, revision)
        if folder is None:
            return self.reply(404, code="RevisionNotFound")
        if parts[0] == "api" and what == "revision":
            return self.reply(200, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode())
        if parts[0] == "api":
            return self.reply(
                200,
                json.dumps(
                    [self.entry(folder, path) for path in sorted(folder.rglob("*.*"))]
                ).encode(),
            )
        if not (folder / what).is_file():
            return self.reply(404, code="EntryNotFound", commit=commit)
        content = (folder / what).read_bytes()
        if len(content) >= 10_000 and "localhost" not in self.headers["Host"]:
            location = f"http://localhost:{self.server.server_port}{self.path}"
            headers = {
                "Location": location,
                "X-Linked-ETag": named_by(content),
                "X-Linked-Size": len(content),
            }
            return self.reply(302, commit=commit, **headers)
        etag = named_by(content)
        if what in self.server.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        cut = self.server.cut.pop(what, None) if self.command == "GET" else None
        self.reply(200, content, commit=commit, etag=etag, cut=cut)

    do_HEAD = do_GET

    def entry(self, folder: Path, path: Path) -> dict:
        content = path.read_bytes()
        lfs = (
            {"lfs": {"oid": named_by(content), "size": len(content), "pointerSize": 130}}
            if len(content) >= 10_000
            else {}
        )
        return {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
            **lfs,
        }

    def reply(self, status, content=b"", code=None, commit=None, etag=None, cut=None, **headers):
        start = 0
        if (wanted := self.headers.get("Range")) and content:
            self.server.resumed.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            status, headers["Content-Range"] = (
                206,
                f"bytes {start}-{len(content) - 1}/{len(content)}",
            )
        self.send_response(status)
        headers |= {
            "X-Error-Code": code,
            "X-Repo-Commit": commit,
            "ETag": etag and f'"{etag}"',
            "Accept-Ranges": "bytes",
        }
        for name, value in {**headers, "Content-Length": len(content) - start}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start : start + cut if cut else None])
            if cut:
                self.wfile.flush()
                self.connection.close()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(small, tmp_path):
    """The small model as EleutherAI/pythia-14m, whose revision step143000 has only a .bin, and in shards as ORG/shards."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((small / "config.json").read_bytes())
    (old / "pytorch_model.bin").write_bytes(b"not to be read" * 1000)
    AutoModelForCausalLM.from_pretrained(small).save_pretrained(
        tmp_path / "shards", max_shard_size="60KB"
    )
    (tmp_path / "shards" / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    server = Hub()
    server.repos["models/EleutherAI/pythia-14m"] = {"main": small, "step143000": old}
    server.repos["models/ORG/shards"] = {"main": tmp_path / "shards"}
    yield server
    server.shutdown()


@pytest.fixture
def run(hub, tmp_path):
    """Run a script against the hub, with a cache of its own: run("eval.py", …, NAME=environment)."""

    def run(script, *argv, **env):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            **env,
        }
        command = [sys.executable, ROOT / script, *map(str, argv)]
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)

    return run


def fails(done, *words):
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    ), done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def downloads(hub, file: str) -> list[str]:
    return [
        request
        for request in hub.requests
        if request.startswith("GET") and request.endswith(f"/{file}")
    ]


def test_a_size_is_fetched_once_and_then_works_offline(hub, run, data):
    argv = ["eval.py", "pythia-14m", "--data", data.folder, "--device", "cpu", "--no-compile"]
    first = run(*argv)
    assert first.returncode == 0, first.stderr
    assert len(downloads(hub, "model.safetensors")) == 1
    count = len(hub.requests)
    again = run(*argv, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == first.stdout and len(hub.requests) == count, (
        again.stderr
    )


def test_a_cached_commit_needs_no_network(hub, run, data):
    name = f"EleutherAI/pythia-14m@{commit_of('models/EleutherAI/pythia-14m', 'main')}"
    argv = ["eval.py", name, "--data", data.folder, "--device", "cpu", "--no-compile"]
    assert run(*argv).returncode == 0
    count = len(hub.requests)
    assert run(*argv).returncode == 0 and not hub.requests[count:], hub.requests[count:]


def test_shards_work_and_work_offline(hub, run, data, small):
    argv = ["eval.py", "ORG/shards", "--data", data.folder, "--device", "cpu", "--no-compile"]
    first = run(*argv)
    assert first.returncode == 0, first.stderr
    assert len({request for request in hub.requests if "/model-0000" in request}) > 1
    again = run(*argv, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == first.stdout, again.stderr
    whole = run("eval.py", small, "--data", data.folder, "--device", "cpu", "--no-compile")
    assert whole.stdout.splitlines()[2:] == first.stdout.splitlines()[2:]


def test_a_run_records_the_commit_and_goes_on_with_it(hub, run, data, small, tmp_path):
    """The branch moves on while the run stands still; the folder says which commit it was, and the model is that one."""
    out, revisions = tmp_path / "run", hub.repos["models/EleutherAI/pythia-14m"]
    commit = commit_of("models/EleutherAI/pythia-14m", "main")
    argv = ["--data", data.folder, "--out", out, "--mix", "sums=16", "--batch-size", 8, *SMALL]
    done = run("train.py", "--model", "pythia-14m", *argv)
    assert done.returncode == 0, done.stderr
    name = f"EleutherAI/pythia-14m@{commit}"
    assert json.loads((out / "run.json").read_text())["settings"]["model"] == name
    card = (out / "README.md").read_text()
    assert "base_model: EleutherAI/pythia-14m\n" in card and commit in card
    assert (out / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    revisions.clear()
    hub.find = lambda repo, revision: ("f" * 40, small)  # what main is now
    fails(run("train.py", "--model", "pythia-14m", *argv, "--resume"), commit, "f" * 40)
    again = run("train.py", "--model", name, *argv, "--resume")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    "name",
    [
        "EleutherAI/nothing",
        "EleutherAI/pythia-14m@step7",
        "not a name/at all",
        "EleutherAI/pythia-14m@" + "0" * 40,
    ],
)
def test_what_the_hub_does_not_have_is_one_line(run, data, name):
    fails(run("eval.py", name, "--data", data.folder), name)


def test_an_unknown_size_asks_no_network(hub, run, data, tmp_path):
    fails(run("eval.py", "pythia-99m", "--data", data.folder), "pythia-99m")
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 60))
    fails(
        run("prepare.py", "--out", tmp_path / "d", f"a={source}", "--tokenizer", "pythia-99m"),
        "pythia-99m",
    )
    assert not hub.requests


def test_a_revision_with_only_bin_files_names_one_that_has_safetensors(hub, run, data):
    fails(
        run("eval.py", "pythia-14m@step143000", "--data", data.folder),
        "step143000",
        "EleutherAI/pythia-14m@main",
    )
    assert not downloads(hub, "pytorch_model.bin")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_damaged_on_its_way_is_found_out(hub, run, data, tmp_path, file):
    """One bit is wrong and the size is right, which the client does not see."""
    argv = ["eval.py", "pythia-14m", "--data", data.folder, "--device", "cpu", "--no-compile"]
    hub.damaged.add(file)
    done = run(*argv)
    fails(done, file, "damaged", "remove")
    hub.damaged.clear()
    fails(run(*argv), "damaged")
    os.remove(done.stderr.partition("remove ")[2].partition(",")[0])  # as it says
    assert run(*argv).returncode == 0


def test_a_connection_cut_in_mid_file_is_taken_up_where_it_was_cut(hub, run, tmp_path):
    """The client keeps what it has in pieces of 10 MB, and asks for the rest."""
    (tmp_path / "shelf").mkdir()
    texts = [f"{i} {text}" * 400 for i, text in enumerate(made_documents("sums", 250))]
    source = write_jsonl(tmp_path / "shelf" / "a.jsonl", texts)
    assert source.stat().st_size > 12_000_000
    hub.repos["datasets/ORG/large"] = {"main": tmp_path / "shelf"}
    hub.cut["a.jsonl"] = 11_000_000
    tokenizer = [
        "--tokenizer",
        "train:300",
        "--limit-tokens",
        50_000_000,
        "--val-fraction",
        0.2,
        "--test-fraction",
        0.2,
    ]
    done = run(
        "prepare.py", "--out", tmp_path / "d", "a=hf://datasets/ORG/large/a.jsonl", *tokenizer
    )
    assert done.returncode == 0 and not hub.cut, done.stderr
    assert hub.resumed == [f"bytes={10 * 1024**2}-"]
    local = run("prepare.py", "--out", tmp_path / "e", f"a={source}", *tokenizer)
    assert local.returncode == 0 and Data(tmp_path / "d").identity == Data(tmp_path / "e").identity


def test_a_hub_that_cannot_be_reached(run, data):
    fails(
        run("eval.py", "pythia-14m", "--data", data.folder, HF_ENDPOINT="http://127.0.0.1:9"),
        "pythia-14m",
    )
    fails(run("eval.py", "pythia-14m", "--data", data.folder, HF_HUB_OFFLINE="1"), "pythia-14m")


def test_a_data_set_on_the_hub(hub, run, tmp_path):
    """A glob picks the files; the commit is recorded; a second run needs no download; the tokenizer is a model's."""
    shelf = tmp_path / "shelf"
    (shelf / "data").mkdir(parents=True)
    texts = made_documents("prose", 200)
    write_jsonl(shelf / "data" / "a-0.jsonl", texts[:90])
    write_jsonl(shelf / "data" / "a-1.jsonl", texts[90:])
    write_jsonl(shelf / "data" / "other.jsonl", made_documents("sums", 50))
    hub.repos["datasets/ORG/texts"] = {"main": shelf, "v1": tmp_path / "none"}
    argv = [
        "a=hf://datasets/ORG/texts/data/a-*.jsonl",
        "--tokenizer",
        "pythia-14m",
        "--val-fraction",
        0.2,
    ]
    done = run("prepare.py", "--out", tmp_path / "d", *argv, "--test-fraction", 0.2)
    assert done.returncode == 0, done.stderr
    made = Data(tmp_path / "d")
    assert sum(made.size("a", split)["documents"] for split in ("train", "val", "test")) == 200
    paths = made.meta["sources"]["a"]
    assert len(paths) == 2 and all(
        commit_of("datasets/ORG/texts", "main") in path for path in paths
    )
    assert not downloads(hub, "data/other.jsonl")
    again = run(
        "prepare.py", "--out", tmp_path / "e", *argv, "--test-fraction", 0.2, HF_HUB_OFFLINE="1"
    )
    assert again.returncode == 0 and Data(tmp_path / "e").identity == made.identity, again.stderr
    argv[0] = "a=hf://datasets/ORG/texts/data/b-*.jsonl"
    fails(run("prepare.py", "--out", tmp_path / "f", *argv), "b-*.jsonl", "no file there")
    argv[0] = "a=hf://datasets/ORG/texts/data/a-*.jsonl@v9"
    fails(run("prepare.py", "--out", tmp_path / "f", *argv), "v9")
