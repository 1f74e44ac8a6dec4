"""Bad input ends in one line that says what, where and what to do, with status 2, and changes
nothing; and what no script does."""

import json
import re
import resource
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    Run,
    bins,
    command,
    fails,
    made_data,
    options,
    run_script,
    train_options,
    works,
)

from model import Config, GPTNeoX, is_out_of_memory, save
from prepare import Data, InputError, check_place, make_sample

both = pytest.mark.parametrize("name", ["train", "mix"])
short_run = partial(train_options, mix=False, sequences=8)  # of either


# ---- options ----


OPTIONS = [  # and what is said of them
    ({"data": "missing"}, ["missing", "prepare.py"]),
    ({"model": "scratch:huge"}, ["scratch:huge", "pythia-70m"]),
    ({"model": "pythia-99m"}, ["pythia-99m"]),
    ({"model": "missing/folder/of/mine"}, ["missing/folder/of/mine: no such folder; on the hub"]),
    ({"model": "/missing"}, ["/missing: no such folder; on the hub"]),
    ({"seq_len": 33}, ["33", "32"]),
    ({"batch_size": 0}, ["--batch-size 0"]),
    ({"lr": "nan"}, ["--lr"]),
    ({"device": "abacus"}, ["abacus"]),
    ({"dtype": "float8"}, ["float8"]),
    ({"sequences": 0}, ["--sequences 0"]),
    ({"sequences": "many"}, ["--sequences", "many"]),
    ({"sequences": 9_000_000_000}, ["--sequences 9000000000", "1 to 100,000,000"]),
    ({"seed": "9" * 20}, ["--seed"]),
    ({"mixture": "web=3"}, ["'web'", "code, prose, sums"]),
    ({"mixture": "code=-3"}, ["-3"]),
    ({"mixture": "code=0,sums=0"}, ["zero"]),
    ({"mixture": "code=3,sums=1,code=2"}, ["named twice"]),
    ({"mixture": f"code={'9' * 5000}"}, ["expected uniform"]),
    ({"device": "meta"}, ["--device meta: expected cpu, cuda"]),
    ({"mixture": "code"}, [" code: expected uniform"]),
    ({"mixture": "missing.json"}, ["missing.json"]),
    ({"mixture": "horizon"}, ["'arxiv'"]),
    ({"fsdp": True}, ["torchrun --nproc_per_node"]),
]


def test_ranks_do_not_share_a_gpu(script, data, small, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = short_run(data, small, tmp_path / "run", device="cuda:0")
    fails(script("train", *words), "cuda:0 is one device for all ranks; give --device cuda")


@both
@pytest.mark.parametrize("option, words", OPTIONS)
def test_an_option_that_cannot_be(script, data, small, tmp_path, name, option, words):
    if "mixture" in option:
        option = {"mix" if name == "train" else "start": option["mixture"]}
    fails(script(name, *short_run(data, small, tmp_path / "run"), *options(**option)), *words)
    assert not (tmp_path / "run").exists()


def test_a_split_shorter_than_a_sequence(script, tmp_path):
    """The domain's first split has enough tokens; the others have 100."""
    data = bins(tmp_path / "d", {"sums": 1000})
    words = short_run(data, "scratch:tiny", tmp_path / "run", seq_len=100)
    fails(script("train", *words), "--seq-len 100", "sums's val split", "100 tokens")


def test_a_real_process_says_it_the_same_way(tmp_path):
    words = options(model="scratch:huge", data=tmp_path, out=tmp_path / "run")
    fails(command("mix.py", *words), "not a data set")


# ---- the run's folder ----


@both
@pytest.mark.parametrize(
    "files", [["thesis.txt"], ["model.safetensors", "checkpoint-00000005/x", "runs/notes.txt"]]
)
@pytest.mark.parametrize("way", [{}, {"resume": True}, {"overwrite": True}])
def test_an_out_that_is_no_run_is_left_alone(script, data, small, tmp_path, name, files, way):
    out = tmp_path / "mine"
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("years of work")
    fails(script(name, *short_run(data, small, out, **way)), out, "choose another --out")
    left = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    assert left.keys() == {*files}
    assert {path.read_text() for path in left.values()} == {"years of work"}


@both
def test_a_run_does_not_overwrite_what_it_starts_from(
    script, data, small, tmp_path, monkeypatch, name
):
    out = tmp_path / "run"
    assert script("train", *short_run(data, small, out))[0] == 0
    shutil.copytree(small, out / "within")
    for model in (out, out / "within"):
        words = short_run(data, model, out, overwrite=True)
        fails(script(name, *words), "would remove", model)
        assert (model / "model.safetensors").exists()
    # Nor a mixture; but what lies beside it, and what is no file at all, may be where it is.
    (out / "mix.json").write_text('{"code": 4}')
    option = {"train": "--mix", "mix": "--start"}[name]
    words = [*short_run(data, small, out, overwrite=True), option, out / "mix.json"]
    fails(script(name, *words), "would remove", out / "mix.json")
    monkeypatch.chdir(out)
    words = short_run(data, "scratch:tiny", ".", overwrite=True, seq_len=32, dry_run=True)
    assert "would remove" not in script(name, *words)[2]


@both
def test_an_out_that_cannot_be_written(script, data, small, tmp_path, name):
    (tmp_path / "file").write_text("")
    fails(script(name, *short_run(data, small, tmp_path / "file/run")), tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    fails(script(name, *short_run(data, small, tmp_path / "link")), "link: a broken link")


# ---- data and models ----


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b + b"\0\0", None])
def test_a_bin_of_another_length(script, data, small, tmp_path, damage):
    path = Path(shutil.copytree(data.folder, tmp_path / "d")) / "sums.train.bin"
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    fails(script("eval", small, *options(data=tmp_path / "d"), *SMALL), path)


def files_of(domain: str, **changes) -> dict:
    """What a meta.json says of a domain's files."""
    file = {"documents": 1, "tokens": 3, "bytes": 1, "sha256": ""} | changes
    return {"files": {f"{domain}.{split}": file for split in ("train", "val", "test")}}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"files": []},
        {"files": {}},
        {"files": {"a.train": files_of("a")["files"]["a.train"]}},
        files_of("a", tokens=0),
        files_of("a", tokens="x"),
        files_of("a", sha256=None),
        files_of("../../x"),
        {"tokenizer": None},
        {"tokenizer": {"vocab_size": "x"}},
        {"fractions": {"val": "x", "test": 0.1}},
    ],
)
def test_a_meta_json_that_is_none(data, tmp_path, change):
    meta = json.loads((data.folder / "meta.json").read_text()) | change
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"meta\.json: damaged, or not of format 1"):
        Data(tmp_path)


def test_damaged_models(script, data, tmp_path, copy_of_small):
    words = [*options(data=data.folder), *SMALL]
    fails(script("eval", tmp_path / "none", *words), tmp_path / "none")
    weights = copy_of_small / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(script("eval", copy_of_small, *words), weights)
    weights.unlink()
    fails(script("eval", copy_of_small, *words), "model.safetensors")
    (copy_of_small / "config.json").write_text("{")
    fails(script("eval", copy_of_small, *words), "config.json")
    fails(script("model", copy_of_small, "hello", "--device", "cpu"), "config.json")


def test_a_model_without_a_tokenizer_and_one_that_is_not_finished(
    script, data, small, copy_of_small
):
    (copy_of_small / "tokenizer.json").unlink()
    words = [copy_of_small, "hello", "--device", "cpu"]
    fails(script("model", *words), copy_of_small / "tokenizer.json", "copy the tokenizer.json")
    # What is not finished has no weights yet and, where none stood there before, no config either.
    (copy_of_small / "model.safetensors").unlink()
    fails(script("model", *words), "has no model.safetensors")
    (copy_of_small / "run.json").write_text("{}")
    unfinished = f"{copy_of_small}: holds a run that has not ended; --resume goes on with it"
    fails(script("model", small, *words), unfinished)
    (copy_of_small / "config.json").unlink()
    status, out, err = script("eval", small, copy_of_small, *options(data=data.folder), *SMALL)
    assert unfinished in err and "nats per token" not in out  # it is said first
    (copy_of_small / "run.json").unlink()
    fails(script("model", *words), "not a model (no config.json)")


def test_where_the_numbers_are_to_go_is_looked_at_first(script, data, small, tmp_path):
    words = [small, *options(data=data.folder), *SMALL, "--json"]
    fails(script("eval", *words, tmp_path), f"--json {tmp_path} is a folder")
    works(script("eval", *words, tmp_path / "new" / "numbers.json"))
    assert "models" in json.loads((tmp_path / "new" / "numbers.json").read_text())


def test_a_model_that_reads_less_than_the_others_is_named(script, data, small, tmp_path):
    save(GPTNeoX(Config(data.vocab_size, 16, 1, 2, 32, 16)), tmp_path / "short")
    message = f"{tmp_path / 'short'} reads at most 16 tokens; give --seq-len 16 or less"
    fails(script("eval", small, tmp_path / "short", *options(data=data.folder), *SMALL), message)


def test_a_model_with_another_vocabulary(script, data, tmp_path):
    save(GPTNeoX(Config(128, 16, 1, 2, 32, 32)), tmp_path / "m")
    words = options(data=data.folder, device="cpu")
    fails(script("eval", tmp_path / "m", *words), "tokenizer", "128")


# ---- memory ----


def run_in(more: float, name: str, words: list[str]) -> None:
    """A script, with so many bytes more than this process has."""
    status = Path("/proc/self/status").read_text()
    limit = 1024 * int(re.search(r"VmData:\s+(\d+)", status)[1]) + int(more)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    run_script(name, words)


@pytest.mark.parametrize(
    "more, words",
    [
        (7e8, ["training on 128 sequences of 256 tokens", "try --micro-batch-size 64"]),
        (8e7, ["evaluating ", "sequences of 256 tokens", "try a shorter --seq-len"]),
    ],
)
def test_out_of_memory_names_what_was_asked_for_and_what_to_try(data, tmp_path, more, words):
    """Logits take it: 0.15 GB, and their softmax as much, in evaluation; 1.1 GB in training."""
    save(GPTNeoX(Config(8192, 32, 2, 4, 64, 256)), tmp_path / "m")
    sizes = {"sequences": 128, "batch_size": 128, "micro_batch_size": 128, "eval_sequences": 512}
    run = short_run(data, tmp_path / "m", tmp_path / "run", **sizes)
    done = Run(tmp_path, run_in, more, "train", run).end()
    fails(done, "out of memory: ", *words, "it asked for ", " bytes more")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_out_of_memory_while_a_model_is_loaded(data, tmp_path):
    """Its weights take 0.08 GB, with the vocabulary of this data."""
    words = ["scratch:pythia-70m", *options(data=data.folder, seq_len=32), *SMALL]
    done = Run(tmp_path, run_in, 4e7, "eval", words).end()
    fails(done, "out of memory: loading scratch:pythia-70m", "take a smaller one")


@pytest.mark.parametrize(
    "error, is_one",
    [
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_running_out_of_memory_is_known_by_its_words(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_a_folder_that_is_there_need_not_lie_in_a_writable_one(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    check_place(tmp_path / "there")
    with pytest.raises(InputError, match=f"{tmp_path} cannot be written to"):
        check_place(tmp_path / "new")


# ---- what no script does ----


def test_imports_go_in_one_line():
    """prepare ← model ← eval ← train ← mix."""
    scripts = ["prepare", "model", "eval", "train", "mix"]
    for i, name in enumerate(scripts):
        text = (ROOT / f"{name}.py").read_text()
        imported = {*re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)} & {*scripts}
        assert {*scripts[i - 1 : i]} <= imported <= {*scripts[:i]}


def offline(out: Path) -> None:
    """The sample's text, data from files and a search, in a process that can make no socket."""

    def refuse(event, args):
        if event.startswith("socket.") or event == "urllib.Request":
            raise PermissionError(f"no network: {event}")

    sys.addaudithook(refuse)
    assert len(make_sample({"val": 0.1, "test": 0.1}, max_bytes=10_000)[0]) > 4
    short = {"seq_len": 32, "base_sequences": 16, "rounds": 1, "eval_sequences": 4}
    run_script("mix", short_run(made_data(out.parent), "scratch:tiny", out, **short))


def test_the_main_job_needs_no_network(tmp_path):
    status, _, err = Run(tmp_path, offline, tmp_path / "run").end()
    assert (status, err) == (0, "")
    assert (tmp_path / "run/model.safetensors").exists()
