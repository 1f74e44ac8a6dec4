"""Models, tokenizers and data sets by name, from a hub that is served on loopback."""

import glob
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import SMALL, Run, ends_well, fails, made_documents, options, write_jsonl
from transformers import AutoModelForCausalLM

from prepare import SPLITS, Data, matches

MODEL = "models/EleutherAI/pythia-14m"


def commit_of(repo: str, revision: str = "main") -> str:
    return hashlib.sha1(f"{repo}/{revision}".encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves repositories, {"models/ORG/NAME": {revision: folder}}, and notes what it is asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {}
        self.requests = []
        self.cut = {}  # {file: after how many bytes the connection breaks, once}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def find(self, repo: str, revision: str) -> tuple[str, Path | None]:
        """The commit and the folder of a revision, which may be a commit itself."""
        for name, folder in self.repos[repo].items():
            if revision in (name, commit_of(repo, name)):
                return commit_of(repo, name), folder
        return "", None

    def downloads(self, file: str) -> list[str]:
        return [r for r in self.requests if r.startswith("GET") and r.endswith(f"/{file}")]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/api/agent-harnesses":  # a question of the client's own, once a day
            return self.reply(200, b"{}")
        self.server.requests.append(f"{self.command} {self.path}")
        # /api/models/ORG/NAME/revision/REV, …/tree/REV, and /ORG/NAME/resolve/REV/FILE
        _, *parts = self.path.partition("?")[0].split("/")
        is_api = parts[0] == "api"
        kind = "models"
        if is_api:
            kind, parts = parts[1], parts[2:]
        elif parts[0] == "datasets":
            kind, parts = parts[0], parts[1:]
        organization, name, what, revision, *file = parts
        repo = f"{kind}/{organization}/{name}"
        if repo not in self.server.repos:
            return self.reply(404, code="RepoNotFound")
        commit, folder = self.server.find(repo, revision)
        if folder is None:
            return self.reply(404, code="RevisionNotFound")
        if what == "revision":
            return self.reply(200, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode())
        if what == "tree":
            listed = [entry(folder, path) for path in sorted(folder.rglob("*.*"))]
            return self.reply(200, json.dumps(listed).encode())
        path = folder.joinpath(*file)
        if not path.is_file():
            return self.reply(404, code="EntryNotFound", commit=commit)
        cut = self.server.cut.pop(path.name, None) if self.command == "GET" else None
        self.reply(200, path.read_bytes(), commit=commit, cut=cut)

    do_HEAD = do_GET

    def reply(self, status, content=b"", code=None, commit=None, cut=None) -> None:
        headers = {"X-Error-Code": code, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        start = 0
        wanted = self.headers.get("Range")
        if wanted and content:
            self.server.requests.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = len(content) - start
        self.send_response(status)
        for name, value in headers.items():
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


def entry(folder: Path, path: Path) -> dict:
    """A file, as a listing of a repository has it."""
    content = path.read_bytes()
    named = {"path": path.relative_to(folder).as_posix(), "oid": hashlib.sha1(content).hexdigest()}
    return {"type": "file", "size": len(content)} | named


@pytest.fixture
def hub(small, tmp_path):
    """Has the small model as EleutherAI/pythia-14m, of which step143000 is only a .bin."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((small / "config.json").read_bytes())
    (old / "pytorch_model.bin").write_bytes(b"not to be read")
    server = Hub()
    server.repos[MODEL] = {"main": small, "step143000": old}
    yield server
    server.shutdown()


@pytest.fixture
def run(hub, tmp_path):
    """Runs a script against the hub, with a cache of its own: run("eval", …, NAME=environment)."""
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    return lambda script, *argv, **more: Run(tmp_path, script, *argv, env=env | more)


@pytest.fixture
def evaluate(run, data):
    """Evaluates a model by its name: evaluate("pythia-14m", NAME=environment)."""
    argv = options(data=data.folder, device="cpu", no_compile=True)
    return lambda name, **env: run("eval", name, *argv, **env)


def test_a_size_is_fetched_once_and_then_works_offline(hub, evaluate):
    [first] = ends_well(evaluate("pythia-14m"))
    assert len(hub.downloads("model.safetensors")) == 1
    count = len(hub.requests)
    assert ends_well(evaluate("pythia-14m", HF_HUB_OFFLINE="1")) == [first]
    # A commit is what it is: when it is in the cache, the hub is not asked.
    ends_well(evaluate(f"EleutherAI/pythia-14m@{commit_of(MODEL)}"))
    assert hub.requests[count:] == []


def test_shards_work_and_work_offline(hub, evaluate, small, tmp_path):
    shards = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(small).save_pretrained(shards, max_shard_size="60KB")
    (shards / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    hub.repos["models/ORG/shards"] = {"main": shards}
    [first] = ends_well(evaluate("ORG/shards"))
    assert len({request for request in hub.requests if "/model-0000" in request}) > 1
    assert ends_well(evaluate("ORG/shards", HF_HUB_OFFLINE="1")) == [first]
    [whole] = ends_well(evaluate(small))
    rows = re.compile(r"^(?:code|prose|sums|mean) .*", re.MULTILINE)
    assert rows.findall(whole) == rows.findall(first) and len(rows.findall(whole)) == 4


def test_a_run_records_the_commit_and_goes_on_with_it(hub, run, data, small, tmp_path):
    """The branch moves on meanwhile; the folder says which commit it was, and that is trained."""
    out = tmp_path / "run"
    argv = [*options(data=data.folder, out=out, mix="sums=16", batch_size=8), *SMALL]
    ends_well(run("train", "--model", "pythia-14m", *argv))
    commit = commit_of(MODEL)
    name = f"EleutherAI/pythia-14m@{commit}"
    assert json.loads((out / "run.json").read_text())["settings"]["model"] == name
    card = (out / "README.md").read_text()
    assert "base_model: EleutherAI/pythia-14m\n" in card and commit in card

    hub.find = lambda repo, revision: ("f" * 40, small)  # what main is now
    moved = run("train", "--model", "pythia-14m", *argv, "--resume")
    fails(moved.end(), commit, "f" * 40)
    ends_well(run("train", "--model", name, *argv, "--resume"))


NOT_THERE = ["EleutherAI/nothing", "EleutherAI/pythia-14m@step7", "not a name/at all"]


@pytest.mark.parametrize("name", [*NOT_THERE, "EleutherAI/pythia-14m@" + "0" * 40])
def test_what_the_hub_does_not_have_is_one_line(evaluate, name):
    fails(evaluate(name).end(), name)


def test_an_unknown_size_asks_no_network(hub, evaluate, run, tmp_path):
    fails(evaluate("pythia-99m").end(), "pythia-99m")
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 60))
    argv = options(out=tmp_path / "d", tokenizer="pythia-99m")
    fails(run("prepare", f"a={source}", *argv).end(), "pythia-99m")
    assert hub.requests == []


def test_a_revision_with_only_bin_files_is_refused_with_what_to_take(hub, evaluate):
    fails(evaluate("pythia-14m@step143000").end(), "step143000", "no model.safetensors", "main")
    assert hub.downloads("pytorch_model.bin") == []


def test_a_hub_that_cannot_be_reached(evaluate):
    fails(evaluate("pythia-14m", HF_ENDPOINT="http://127.0.0.1:9").end(), "pythia-14m")
    fails(evaluate("pythia-14m", HF_HUB_OFFLINE="1").end(), "pythia-14m")


FRACTIONS = options(val_fraction=0.2, test_fraction=0.2, workers=1)


def test_a_connection_cut_in_mid_file_is_taken_up_where_it_was_cut(hub, run, tmp_path):
    """The client keeps what it has in pieces of 10 MB, and asks for the rest."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    blank_lines = (" " * 10**6 + "\n") * 11
    source = write_jsonl(shelf / "a.jsonl", made_documents("sums", 60))
    source.write_text(blank_lines + source.read_text())
    hub.repos["datasets/ORG/large"] = {"main": shelf}
    hub.cut["a.jsonl"] = 10_900_000
    argv = options(tokenizer="train:300", out=tmp_path / "d")
    ends_well(run("prepare", "a=hf://datasets/ORG/large/a.jsonl", *argv, *FRACTIONS))
    assert hub.cut == {} and f"bytes={10 * 1024**2}-" in hub.requests
    made = Data(tmp_path / "d")
    assert sum(made.size("a", split)["documents"] for split in SPLITS) == 60


def test_a_data_set_on_the_hub(hub, run, tmp_path):
    """A glob picks the files; the commit is recorded; then it works offline."""
    shelf = tmp_path / "shelf"
    (shelf / "data").mkdir(parents=True)
    texts = made_documents("prose", 200)
    for name, part in (("a-0", texts[:90]), ("a-1", texts[90:]), ("other", texts)):
        write_jsonl(shelf / "data" / f"{name}.jsonl", part)
    hub.repos["datasets/ORG/texts"] = {"main": shelf}

    def prepare(out: str, glob: str, **env) -> Run:
        argv = options(out=tmp_path / out, tokenizer="pythia-14m")
        source = f"a=hf://datasets/ORG/texts/data/{glob}"
        return run("prepare", source, *argv, *FRACTIONS, **env)

    ends_well(prepare("d", "a-*.jsonl"))
    made = Data(tmp_path / "d")
    assert sum(made.size("a", split)["documents"] for split in SPLITS) == 200
    commit = commit_of("datasets/ORG/texts")
    names = [f"hf://datasets/ORG/texts/data/a-{i}.jsonl@{commit}" for i in (0, 1)]
    assert made.meta["sources"]["a"] == names  # which can be given again
    assert hub.downloads("data/other.jsonl") == []

    ends_well(prepare("e", "a-*.jsonl", HF_HUB_OFFLINE="1"))
    assert Data(tmp_path / "e").identity == made.identity
    there = "there are data/a-0.jsonl, data/a-1.jsonl, data/other.jsonl"
    ends_well(prepare("g", f"a-*.jsonl@{commit}"))
    assert Data(tmp_path / "g").identity == made.identity
    fails(prepare("f", "b-*.jsonl").end(), "b-*.jsonl", "no file there", there)
    fails(prepare("f", "a-*.jsonl@v9").end(), "v9")
    elsewhere = ["a=hf://ORG/texts/data/a-*.jsonl", *options(out=tmp_path / "f", tokenizer="x")]
    fails(run("prepare", *elsewhere).end(), "expected hf://datasets/ORG/NAME/GLOB")


@pytest.fixture
def shelf(hub, tmp_path) -> list[Path]:
    """Three files of ORG/large on the hub, of more text than is read at a time."""
    folder = tmp_path / "shelf" / "data"
    folder.mkdir(parents=True)
    hub.repos["datasets/ORG/large"] = {"main": folder.parent}
    texts = [text * 60 for text in made_documents("prose", 240)]
    return [write_jsonl(folder / f"{i}.jsonl", texts[i::3]) for i in range(3)]


def large(out: Path, tokenizer="pythia-14m", **more) -> list[str]:
    source = "a=hf://datasets/ORG/large/data/*.jsonl"
    return [source, *options(out=out, tokenizer=tokenizer, **more), *FRACTIONS]


def test_files_come_one_after_the_other_and_none_behind_the_limit(hub, run, tmp_path, shelf):
    [printed] = ends_well(run("prepare", *large(tmp_path / "part", limit_tokens=100_000)))
    assert len(hub.downloads("data/0.jsonl")) == 1
    assert not [request for request in hub.requests if request.endswith(("/1.jsonl", "/2.jsonl"))]
    assert printed.count("getting hf://datasets/ORG/large/data/0.jsonl@") == 1
    assert "/1.jsonl" not in printed

    # Without the limit, and to train a tokenizer first, what is in the cache is not fetched again.
    ends_well(run("prepare", *large(tmp_path / "whole", "train:300")))
    assert [len(hub.downloads(f"data/{i}.jsonl")) for i in range(3)] == [1, 1, 1]
    local = [f"a={shelf[0].parent}", *large(tmp_path / "local", "train:300")[1:]]
    ends_well(run("prepare", *local))
    assert Data(tmp_path / "whole").identity == Data(tmp_path / "local").identity


def test_offline_what_is_not_in_the_cache_is_named_and_not_left_out(run, tmp_path, shelf):
    ends_well(run("prepare", *large(tmp_path / "part", limit_tokens=100_000)))
    again = large(tmp_path / "again", limit_tokens=100_000)
    ends_well(run("prepare", *again, HF_HUB_OFFLINE="1"))
    assert Data(tmp_path / "part").meta == Data(tmp_path / "again").meta
    result = run("prepare", *large(tmp_path / "whole"), HF_HUB_OFFLINE="1").end()
    fails(result, "hf://datasets/ORG/large/data/1.jsonl", "HF_HUB_OFFLINE is set; unset it")
    assert not list(tmp_path.glob(".whole*"))
    assert not (tmp_path / "whole").exists()


def test_a_cache_that_cannot_be_written_says_where_else_to_put_it(run, tmp_path, shelf):
    (tmp_path / "file").write_text("")
    result = run("prepare", *large(tmp_path / "d"), HF_HOME=str(tmp_path / "file")).end()
    fails(result, "ORG/large", "HF_HOME")


@pytest.mark.parametrize(
    "pattern, found",
    [
        ("*.jsonl", ["b.jsonl"]),
        ("data/*", ["data/0.jsonl", "data/1.jsonl"]),
        ("data/[1-9].jsonl", ["data/1.jsonl"]),
        ("**/*.jsonl", ["b.jsonl", "data/0.jsonl", "data/1.jsonl", "data/more/0.jsonl"]),
        ("data/**", ["data/0.jsonl", "data/1.jsonl", "data/more/0.jsonl"]),
        ("**/0.jsonl", ["data/0.jsonl", "data/more/0.jsonl"]),
        ("data/?.js*", ["data/0.jsonl", "data/1.jsonl"]),
    ],
)
def test_a_glob_on_the_hub_finds_what_it_finds_on_a_disk(tmp_path, pattern, found):
    names = ["b.jsonl", "data/0.jsonl", "data/1.jsonl", "data/more/0.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    on_disk = glob.glob(pattern, root_dir=tmp_path, recursive=True)
    assert sorted(name for name in on_disk if name.endswith("jsonl")) == found
    assert [name for name in names if matches(name.split("/"), pattern.split("/"))] == found
