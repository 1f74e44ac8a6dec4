"""What a fuzzer draws: any pass keeps its promises; any damaged file is read, or is refused in one line, with nothing
left behind and in little memory. FUZZ=100 in the environment draws a hundred times as many examples."""

import contextlib
import gzip
import io
import json
import os
import resource
import shutil
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
import torch
import zstandard
from conftest import bins, made_documents, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.torch import save_file
from test_mixture import T, drawn

import train
from model import Config, GPTNeoX, load, save
from prepare import SPLITS, cli, prepare
from train import Mixture, micro_batches, times_seen

TEXTS = [text[:50] for text in made_documents("sums", 5)]
TEXTS += ["naïve e\u0301 日本 🙂\0\r\n  <|endoftext|>", " " * 40 + "x\t"]
LINES = "".join(
    json.dumps({"text": text, "n": [1, {}]}, ensure_ascii=False) + "\n" for text in TEXTS
).encode()
pyarrow.parquet.write_table(
    pyarrow.table({"text": TEXTS * 3}), parquet := pyarrow.BufferOutputStream()
)
SOURCES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES[:300], mtime=0) + gzip.compress(LINES[300:], mtime=0),
    "a.jsonl.zst": zstandard.compress(LINES[:300]) + zstandard.compress(LINES[300:]),
    "a.txt": TEXTS[-2].encode() * 3,
    "a.parquet": parquet.getvalue().to_pybytes(),
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PIECES = b'" \\ { } [ ] : , \0 \xff \xef\xbb\xbf \xed\xa0\x80 \\ud800 null true -1 0 1e999 NaN {} ""'.split()
PIECES += [b"\n", b"\r\n", b"9" * 400, b"9" * 5000, b"[" * 100_000]
ODD = [
    None,
    True,
    False,
    0,
    -1,
    3,
    2**64,
    10**400,
    0.5,
    float("inf"),
    float("nan"),
    "",
    "7",
    "I32",
    "a\nb",
    "\ud800",
]
VALUES = st.sampled_from([*ODD, [], {}]) | st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=4),
    lambda values: (
        st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=2), values, max_size=2)
    ),
    max_leaves=3,
)


def fuzz(examples: int):
    examples *= int(os.environ.get("FUZZ", 1))
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module", autouse=True)
def two_gigabytes_more(tmp_path_factory):
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))  # it keeps more than a database
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    taken = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (taken + 2 * 10**9, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextlib.contextmanager
def new_folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def outcome(call):
    """What the call returns; None if it ends as a script does on bad input, with status 2 and one line."""
    result, err = [], io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            cli(lambda: result.append(call()))
    except SystemExit as e:
        line, *more = err.getvalue().splitlines()
        assert e.code == 2 and line.startswith("error: ") and len(line.split()) > 3 and not more, (
            err.getvalue()
        )
        return None
    return result[0]


@st.composite
def edited(draw, content: bytes, head: int = 0) -> bytes:
    """The content after some edits: bits flipped, bytes replaced, put in, left out, copied from elsewhere, cut off."""
    for _ in range(draw(st.integers(0, 3))):
        n = len(content)
        at, start = (
            draw(st.integers(0, min(head or n, n)) | st.integers(0, n) | st.just(0)),
            draw(st.integers(0, n)),
        )
        end = draw(st.sampled_from([at, at, at + 1, at + 1, at + 8, at + 100, n]))
        flipped = st.integers(0, 7).map(lambda bit: bytes(b ^ 1 << bit for b in content[at:end]))
        copied = st.integers(0, 200).map(lambda size: content[start : start + size])
        piece = draw(
            st.just(b"") | flipped | copied | st.sampled_from(PIECES) | st.binary(max_size=8)
        )
        content = content[:at] + piece + content[end:]
    return content


@st.composite
def altered(draw, content: bytes) -> bytes:
    """A JSON text with other values, or none, at a place or two: one near the root is the likelier one."""
    tree = [json.loads(content)]
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        at, key = tree, 0
        while at[key] and isinstance(at[key], (list, dict)) and draw(st.integers(0, 6)):
            at = at[key]
            key = draw(st.sampled_from([*at] if isinstance(at, dict) else range(len(at))))
        alike = [
            odd for odd in ODD if isinstance(odd, (int, float)) == isinstance(at[key], (int, float))
        ]
        if at is tree or draw(st.integers(0, 5)):
            at[key] = draw(st.sampled_from(alike) if draw(st.booleans()) else VALUES)
        else:
            del at[key]
    return json.dumps(tree[0]).encode()


def damaged(content: bytes, name: str):
    """A file damaged in its bytes, in its JSON's values or, if of safetensors, in its 8 bytes of length or its header."""
    end = 8 + int.from_bytes(content[:8], "little")
    if name.endswith("json"):
        return altered(content) | edited(content, head=100) | altered(content)
    if name.endswith("safetensors"):
        header = altered(content[8:end]).map(
            lambda header: len(header).to_bytes(8, "little") + header + content[end:]
        )
        return header | edited(content, head=8) | edited(content, head=end)
    if name.endswith("jsonl"):
        more = st.lists(st.sampled_from(content.splitlines()).flatmap(altered), max_size=3)
        return edited(content) | more.map(lambda lines: content + b"\n".join(lines))
    return edited(content)


@st.composite
def passes(draw):
    """{domain: tokens}, counts for some of the domains, others that are no smaller, and a seed."""
    lengths = draw(
        st.dictionaries(st.sampled_from("abcde"), st.integers(T + 1, 30 * T), min_size=1)
    )
    some = st.dictionaries(st.sampled_from(sorted(lengths)), st.integers(0, 50)).filter(
        lambda c: any(c.values())
    )
    small, more = draw(some), draw(some)
    return (
        lengths,
        small,
        {d: small.get(d, 0) + more.get(d, 0) for d in small | more},
        draw(st.integers(0, 2**40)),
    )


@fuzz(150)
@given(passes(), st.lists(st.integers(0, 9), max_size=3))
def test_any_pass_has_its_counts_whole_epochs_the_least_seen_first_and_even_prefixes(
    drawing, seeds
):
    lengths, small, large, seed = drawing
    with new_folder() as folder:
        data, records = bins(folder / "data", lengths), []
        seen = {d: np.zeros((n - 1) // T, dtype=int) for d, n in lengths.items()}
        for counts, other in zip((small, large, small), seeds):
            for d, window in drawn(Mixture(data, counts, T, other, seen)):
                seen[d][window] += 1
            records.append({"data": data.identity, "seq_len": T, "seed": other, "counts": counts})
        assert {d: [*n] for d, n in times_seen(data, T, records).items()} == {
            d: [*n] for d, n in seen.items()
        }
        order = drawn(Mixture(data, large, T, seed, seen))
        assert Counter(drawn(Mixture(data, small, T, seed, seen))) <= Counter(order)
    assert Counter(d for d, _ in order) == {d: n for d, n in large.items() if n}
    for d, n in ((d, len(seen[d])) for d in large):
        windows = [window for domain, window in order if domain == d]
        for epoch in (windows[i : i + n] for i in range(0, len(windows), n)):
            assert (
                len({*epoch}) == len(epoch)
                and [seen[d][w] for w in epoch] == sorted(seen[d])[: len(epoch)]
            )
    shares = {d: Fraction(n, len(order)) for d, n in large.items() if n}
    bound, so_far = max(Fraction(1, 2), Fraction(len(shares) - 1, 2)), Counter()
    for length, (d, _) in enumerate(order, 1):
        so_far[d] += 1
        assert all(abs(so_far[d] - length * share) <= bound for d, share in shares.items())


@fuzz(150)
@given(passes(), st.integers(1, 9), st.integers(1, 20), st.integers(1, 8), st.integers(0, 9))
def test_any_world_reads_the_same_batches_from_any_step_on(
    drawing, world, batch_size, micro, first
):
    lengths, _, counts, seed = drawing
    with new_folder() as folder, pytest.MonkeyPatch.context() as patch:
        data = bins(folder / "data", lengths)
        whole, *ranks = [Mixture(data, counts, T, seed) for _ in range(1 + world)]
        rows = [tuple(whole.row(i)[1]) for i in range(len(whole))]
        for step in range(first, -(-len(rows) // batch_size)):
            found, shapes = [], set()
            for rank, mixture in enumerate(ranks):
                patch.setattr(train, "rank_and_world", lambda: (rank, world))
                parts = list(micro_batches(mixture, step, batch_size, micro))
                shapes.add(tuple(tokens.shape for tokens, _, _ in parts))
                found += [
                    tuple(row)
                    for part in parts
                    for row, weight in zip(part[0].tolist(), part[1])
                    if weight
                ]
            assert sorted(found) == sorted(rows[step * batch_size : (step + 1) * batch_size])
            assert len(shapes) == 1 and {*shapes.pop()} == {(micro, T + 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A data set, less what differs from run to run in its meta.json, with its source."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_jsonl(folder / "whole.jsonl", made_documents("prose", 12))
    made = prepare(
        folder / "data", {"a": [source]}, "train:300", val_fraction=0.3, test_fraction=0.3
    )
    meta = json.dumps(made.meta | {"sources": {"a": ["whole.jsonl"]}}, indent=1)
    (folder / "data" / "meta.json").write_text(meta)
    return folder


@pytest.mark.parametrize("name", SOURCES)
@fuzz(150)
@given(st.data())
def test_a_damaged_source_is_read_for_what_it_holds_or_refused_in_one_line(whole, name, d):
    content, allowed = d.draw(damaged(SOURCES[name], name)), d.draw(st.sampled_from([0, 1, 1000]))
    with new_folder() as folder:
        (folder / name).write_bytes(content)
        sources, tokenizer = (
            {"a": [whole / "whole.jsonl", folder / name]},
            str(whole / "data" / "tokenizer.json"),
        )
        options = {"val_fraction": 0.3, "test_fraction": 0.3, "max_bad": allowed}
        decode = tokenizers.Tokenizer.from_file(tokenizer).decode
        made = outcome(lambda: prepare(folder / "out", sources, tokenizer, **options))
        assert made or (
            content != SOURCES[name] and [path.name for path in folder.iterdir()] == [name]
        )
        if made and name in ("a.jsonl", "a.jsonl.gz"):
            lines, texts, found = (
                (gzip.decompress(content) if "gz" in name else content).split(b"\n"),
                [],
                [],
            )
            for i, line in enumerate(lines):
                with contextlib.suppress(Exception):
                    texts.append(
                        json.loads(line.decode("utf-8" if i else "utf-8-sig"))["text"]
                        .encode()
                        .decode()
                    )
            for tokens in (made.tokens("a", split) for split in SPLITS):
                parts = np.split(tokens, np.flatnonzero(tokens == 0) + 1)[:-1]
                found += [decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]
            assert sorted(found) == sorted({*texts, *made_documents("prose", 12)} - {""})
            bad = sum(bool(line.strip()) for line in lines) - len(texts)
            assert made.meta["left_out"].get("bad", 0) == bad <= allowed


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a small model, whole and in two shards."""
    folder, small = tmp_path_factory.mktemp("models"), GPTNeoX(Config(12, 8, 1, 2, 12, 8, 1.0))
    save(small, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000,
        "partial_rotary_factor": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights, weight_map = small.state_dict(), {}
    for name, part in ((SHARDS[0], [*weights][::2]), (SHARDS[1], [*weights][1::2])):
        save_file({key: weights[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
@fuzz(250)
@given(st.data())
def test_a_damaged_model_has_the_shapes_of_its_config_or_is_refused_in_one_line(models, name, d):
    good = (models / name).read_bytes()
    content = d.draw(damaged(good, name))
    with new_folder() as folder:
        shutil.copytree(models, folder, dirs_exist_ok=True)
        if "index" in name:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)
        model = outcome(lambda: load(folder))
        assert model or content != good
        if model:
            config = json.loads((folder / "config.json").read_bytes())
            v, h, m = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
            layers = [layer.mlp.dense_h_to_4h.weight.shape for layer in model.gpt_neox.layers]
            assert layers == [(m, h)] * config[
                "num_hidden_layers"
            ] and model.gpt_neox.embed_in.weight.shape == (v, h)
            assert model(torch.zeros(1, 1, dtype=torch.int64)).shape == (
                1,
                1,
                v,
            )  # what fits these has its shape too
