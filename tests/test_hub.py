"""Names on the hub, against a hub served on loopback: download, cache, revisions and what is missing."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(small, tmp_path):
    """Serves the small model as EleutherAI/pythia-14m, and in shards as ORG/shards, noting the requests."""
    requests, shards = [], tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(small).save_pretrained(shards, max_shard_size="60KB")
    folders = {"EleutherAI/pythia-14m": small, "ORG/shards": shards}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            _, org, repo, _, revision, file = (self.path.split("/", 5) + [""] * 6)[:6]
            path, code = folders.get(f"{org}/{repo}", small) / file, None
            if f"{org}/{repo}" not in folders:
                code = "RepoNotFound"
            elif revision not in ("main", COMMIT):
                code = "RevisionNotFound"
            elif not path.is_file():
                code = "EntryNotFound"
            body = b"" if code else path.read_bytes()
            self.send_response(404 if code else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.requests = requests
    yield server
    server.shutdown()


def evaluate(hub, data, cache, *argv, **env):
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **env,
    }
    return subprocess.run(
        [sys.executable, ROOT / "eval.py", *argv, "--data", data.folder, "--device", "cpu"],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_a_size_is_fetched_once_and_then_works_offline(hub, data, tmp_path):
    first = evaluate(hub, data, tmp_path, "pythia-14m")
    assert first.returncode == 0, first.stderr
    assert any(path == "/EleutherAI/pythia-14m/resolve/main/model.safetensors" for path in hub.requests)
    count = len(hub.requests)
    again = evaluate(hub, data, tmp_path, "pythia-14m", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == first.stdout and len(hub.requests) == count
    pinned = evaluate(hub, data, tmp_path, f"EleutherAI/pythia-14m@{COMMIT}")
    assert pinned.returncode == 0, pinned.stderr


def test_shards_work_offline_too(hub, data, tmp_path, small):
    first = evaluate(hub, data, tmp_path, "ORG/shards")
    assert first.returncode == 0, first.stderr
    assert len({path for path in hub.requests if "/model-0000" in path}) > 1
    again = evaluate(hub, data, tmp_path, "ORG/shards", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == first.stdout, again.stderr


@pytest.mark.parametrize("name", ["EleutherAI/nothing", "EleutherAI/pythia-14m@step7", "not a name/at all"])
def test_what_the_hub_does_not_have_is_one_line(hub, data, tmp_path, name):
    done = evaluate(hub, data, tmp_path, name)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {name}: ") and done.stderr.count("\n") == 1, (
        done.stderr
    )


def test_an_unknown_size_asks_no_network(hub, data, tmp_path):
    done = evaluate(hub, data, tmp_path, "pythia-99m")
    assert done.returncode == 2 and "pythia-99m" in done.stderr and not hub.requests
