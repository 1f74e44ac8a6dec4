"""Bad input ends with exit status 2 and one line that says what, where and what to do; what was there stays."""

import json
import shutil
import struct

import pytest
from conftest import SMALL, command, made_documents, write_jsonl

def fails(result, *words) -> None:
    status, err = (
        (result.returncode, result.stderr) if hasattr(result, "stderr") else (result[0], result[2])
    )
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err, err


@pytest.mark.parametrize("name", ["train", "mix"])
@pytest.mark.parametrize(
    "argv, words",
    [
        (["--data", "missing"], ["missing", "prepare.py"]),
        (["--model", "scratch:huge"], ["scratch:huge", "pythia-70m"]),
        (["--model", "pythia-99m"], ["pythia-99m"]),
        (["--model", "missing/folder/of/mine"], ["missing/folder/of/mine"]),
        (["--seq-len", "33"], ["33", "32"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--lr", "nan"], ["--lr"]),
        (["--device", "abacus"], ["abacus"]),
        (["--dtype", "float8"], ["float8"]),
        (["--sequences", "0"], ["--sequences 0"]),
        (["--sequences", "many"], ["--sequences", "many"]),
        (["--seed", "9" * 20], ["--seed"]),
    ],
)
def test_training_options(script, data, small, tmp_path, name, argv, words):
    base = [
        "--data",
        data.folder,
        "--model",
        small,
        "--out",
        tmp_path / "run",
        "--sequences",
        8,
        *SMALL,
    ]
    fails(script(name, *base, *argv), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "mixture, words",
    [
        ("web=3", ["'web'", "code, prose, sums"]),
        ("code=-3", ["-3"]),
        ("code=0,sums=0", ["zero"]),
        ("code", ["--mix code"]),
        ("missing.json", ["missing.json"]),
        ("horizon", ["'arxiv'"]),
    ],
)
def test_mixtures(script, data, small, tmp_path, mixture, words):
    base = ["--data", data.folder, "--model", small, "--out", tmp_path / "run", *SMALL]
    fails(script("train", *base, "--mix", mixture), *words)
    fails(script("mix", *base, "--start", mixture), *words)
    assert not (tmp_path / "run").exists()


def test_a_mixture_by_name_needs_a_length(script, data, small, tmp_path):
    fails(
        script("train", "--data", data.folder, "--model", small, "--out", tmp_path / "run", *SMALL),
        "--sequences",
    )


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"code": "x"}', '{"counts": 3}', '{"counts": {"code": 2.5}}']
)
def test_mixture_files(script, data, small, tmp_path, content):
    (tmp_path / "mix.json").write_text(content)
    fails(
        script(
            "train",
            "--data",
            data.folder,
            "--model",
            small,
            "--out",
            tmp_path / "run",
            "--mix",
            tmp_path / "mix.json",
            *SMALL,
        )
    )


def test_a_split_shorter_than_a_sequence(script, tmp_path, small):
    sources = [
        f"{d}={write_jsonl(tmp_path / f'{d}.jsonl', made_documents(d, n))}"
        for d, n in (("sums", 60), ("prose", 200))
    ]
    write_jsonl(tmp_path / "sums.jsonl", [f"{i}" for i in range(40)])
    assert (
        script(
            "prepare",
            "--out",
            tmp_path / "d",
            *sources,
            "--tokenizer",
            f"{small}/tokenizer.json",
            "--val-fraction",
            0.2,
            "--test-fraction",
            0.2,
        )[0]
        == 0
    )
    fails(
        script(
            "train",
            "--data",
            tmp_path / "d",
            "--model",
            small,
            "--out",
            tmp_path / "run",
            "--sequences",
            4,
            *SMALL,
        ),
        "--seq-len 32",
        "sums",
    )


@pytest.mark.parametrize("name", ["train", "mix"])
def test_an_out_that_holds_something_is_left_alone(script, data, small, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    fails(
        script(
            name,
            "--data",
            data.folder,
            "--model",
            small,
            "--out",
            tmp_path / "run",
            "--sequences",
            8,
            *SMALL,
        ),
        "--resume",
        "--overwrite",
    )
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["train", "mix"])
def test_resume_and_overwrite_do_not_touch_what_is_no_run(script, data, small, tmp_path, name):
    for file in ("model.safetensors", "checkpoint-5/x", "uniform/notes.txt"):
        (tmp_path / "mine" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / file).write_text("mine")
    argv = [
        "--data",
        data.folder,
        "--model",
        small,
        "--out",
        tmp_path / "mine",
        "--sequences",
        8,
        *SMALL,
    ]
    for way in ("--resume", "--overwrite"):
        fails(script(name, *argv, way), tmp_path / "mine", "not empty")
    assert sum(p.is_file() for p in (tmp_path / "mine").rglob("*")) == 3


@pytest.mark.parametrize("name", ["train", "mix"])
def test_a_run_does_not_overwrite_the_model_that_it_starts_from(
    script, data, small, tmp_path, name
):
    base = ["--data", data.folder, "--sequences", 8, "--batch-size", 8, *SMALL]
    out = tmp_path / "run"
    assert script("train", *base, "--model", small, "--out", out)[0] == 0
    shutil.copytree(small, out / "round-1")
    for model in (out, out / "round-1"):
        fails(
            script(name, *base, "--model", model, "--out", out, "--overwrite"),
            "would remove",
            model,
        )
        assert (model / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["train", "mix"])
def test_an_out_that_cannot_be_written(script, data, small, tmp_path, name):
    (tmp_path / "file").write_text("")
    fails(
        script(
            name,
            "--data",
            data.folder,
            "--model",
            small,
            "--out",
            tmp_path / "file" / "run",
            "--sequences",
            8,
            *SMALL,
        ),
        tmp_path / "file",
    )


@pytest.mark.parametrize("damage", ["truncate", "missing", "format"])
def test_damaged_data(script, data, small, tmp_path, damage):
    shutil.copytree(data.folder, tmp_path / "d")
    path, meta = tmp_path / "d" / "sums.train.bin", tmp_path / "d" / "meta.json"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "missing":
        path.unlink()
    else:
        meta.write_text(meta.read_text().replace('"format": 1', '"format": 99'))
    fails(
        script("eval", small, "--data", tmp_path / "d", "--device", "cpu"),
        "format 1" if damage == "format" else path,
    )


def test_damaged_models(script, data, small, tmp_path):
    argv = ["--data", data.folder, "--device", "cpu"]
    fails(script("eval", tmp_path / "none", *argv), tmp_path / "none")
    shutil.copytree(small, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(script("eval", tmp_path / "m", *argv), weights)
    weights.unlink()
    fails(script("eval", tmp_path / "m", *argv), "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{")
    fails(script("eval", tmp_path / "m", *argv), "config.json")
    fails(script("model", tmp_path / "m", "hello", "--device", "cpu"), "config.json")


def test_a_model_with_another_vocabulary(script, data, tmp_path):
    from model import Config, GPTNeoX, save

    save(GPTNeoX(Config(128, 16, 1, 2, 32, 32)), tmp_path / "m")
    fails(
        script("eval", tmp_path / "m", "--data", data.folder, "--device", "cpu"), "tokenizer", "128"
    )


def test_a_real_process_says_it_the_same_way(tmp_path):
    done = command("train.py", "--model", "scratch:huge", "--data", tmp_path, cwd=tmp_path)
    fails(done, "not a data set")
    help_text = command("mix.py", "--help").stdout
    assert "--rule" in help_text and "python mix.py" in help_text


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**9},
        {"hidden_size": 0},
        {"hidden_size": 2**80},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 2.5},
        {"num_attention_heads": 7},
        {"num_attention_heads": True},
        {"vocab_size": "many"},
        {"vocab_size": 2**40},
        {"max_position_embeddings": 2**20 - 1, "rotary_pct": 1.0, "hidden_size": 2**19},
        {"rotary_pct": 1e308},
        {"rotary_pct": float("nan")},
        {"rotary_emb_base": -1},
        {"layer_norm_eps": float("inf")},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": {"rope_theta": {}}},
        {"model_type": "llama"},
        {"model_type": ["gpt_neox"]},
        {"hidden_act": "swish"},
    ],
)
def test_a_crafted_config(script, data, small, tmp_path, change):
    shutil.copytree(small, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fails(script("eval", tmp_path / "m", "--data", data.folder, "--device", "cpu"), tmp_path / "m")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", "\0" * 50, "{"],
)
def test_a_config_that_is_no_config(script, data, small, tmp_path, content):
    shutil.copytree(small, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(content)
    fails(script("eval", tmp_path / "m", "--data", data.folder, "--device", "cpu"), "config.json")


ODD = (("I64", 8), ("C64", 8), ("BOOL", 1), ("F8_E4M3", 1))  # number types that weights do not have


def crafted(header: dict | bytes, size: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    """A safetensors file with this header, and this for its length."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def tensor(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        crafted({"a": tensor(0, 64, [16]), "b": tensor(32, 64, [8])}),  # overlapping
        crafted({"a": tensor(0, 64, [16]), "b": tensor(0, 64, [16])}),  # twice the same
        crafted({"a": tensor(0, 4, [1]), "b": tensor(8, 64, [14])}),  # a hole
        crafted({"a": tensor(0, 1 << 40, [1 << 38])}),  # past the end
        crafted({"a": tensor(64, 0, [16])}),
        crafted({"a": tensor(-64, 0, [16])}),
        crafted({"a": tensor(0, 64, [2**32, 2**32])}),
        crafted({"a": tensor(0, 64, [-16])}),
        crafted({"a": tensor(0, 64, [16], "F999")}),
        crafted(b"{}", size=2**63),
        crafted(b"{}", size=2**30),
        crafted(b"[" * 100_000),
        crafted(b"\xff" * 100),
        crafted(b'{"a":' * 50_000),
        crafted({"gpt_neox.embed_in.weight": tensor(0, 64, [4, 4])}),  # of another shape
        crafted({"__metadata__": {"a": 3}}),
        *(
            crafted(
                {"gpt_neox.final_layer_norm.bias": tensor(0, 32 * n, [32], d)}, data=b"\0" * 32 * n
            )
            for d, n in ODD
        ),
    ],
)
def test_crafted_safetensors(script, data, small, tmp_path, content):
    shutil.copytree(small, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    fails(
        script("eval", tmp_path / "m", "--data", data.folder, "--device", "cpu"),
        "model.safetensors",
    )


@pytest.mark.parametrize(
    "shard",
    ["../../x", "/etc/passwd", "model-00001-of-00002.bin", 7, None, ["x"], {"a": 1}, "x" * 10**6],
)
def test_an_index_that_names_other_files(script, data, small, tmp_path, shard):
    shutil.copytree(small, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "x")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": shard}})
    )
    fails(script("eval", tmp_path / "m", "--data", data.folder, "--device", "cpu"), "index.json")


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"a.train": {}}},
        {"files": {"a.train": {"tokens": 0, "sha256": "", "documents": 1, "bytes": 1}}},
        {"files": {"a.train": {"tokens": "x", "sha256": ""}}},
        {"files": {"../../x.train": {"tokens": 3, "sha256": "", "documents": 1, "bytes": 1}}},
        {"tokenizer": None},
        {"tokenizer": {"vocab_size": "x"}},
    ],
)
def test_a_crafted_meta_json(script, data, small, tmp_path, change):
    shutil.copytree(data.folder, tmp_path / "d")
    path = tmp_path / "d" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fails(script("eval", small, "--data", tmp_path / "d", "--device", "cpu"), tmp_path / "d")


@pytest.mark.parametrize(
    "memory, words",
    [
        (2e9, ("training on 1024 sequences of 256 tokens", "try --micro-batch-size 512")),
        (6e8, ("evaluating 256 sequences of 256 tokens", "try a shorter --seq-len")),
    ],
)
def test_out_of_memory_names_what_was_asked_for_and_what_to_try(
    data, small, tmp_path, memory, words
):
    shutil.copytree(small, tmp_path / "m")
    config = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    argv = [
        "--data",
        data.folder,
        "--model",
        tmp_path / "m",
        "--out",
        tmp_path / "run",
        "--mix",
        "sums=64",
    ]
    argv += ["--seq-len", 256, "--batch-size", 1024, "--micro-batch-size", 1024, *SMALL]
    fails(
        command("train.py", *argv, memory=memory),
        "out of memory: ",
        *words,
        "it asked for ",
        " bytes more",
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()
