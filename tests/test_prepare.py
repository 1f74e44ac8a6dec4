"""From text to bins: against the sources themselves, and the tokenizers library."""

import argparse
import ast
import dataclasses
import functools
import gzip
import inspect
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
from conftest import Run, command, ends_well, fails, made_documents, options, works, write_jsonl

import prepare
from prepare import (
    SPLITS,
    Data,
    Document,
    InputError,
    Keys,
    LeftOut,
    Tokenizer,
    documents_in,
    domain_named,
    hash_of,
    read,
    split_of,
    without_long_words,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def prepared(out: Path, sources: dict, **more) -> Data:
    """A data set with a small vocabulary and enough documents in every split."""
    return prepare.prepare(out, sources, "train:300", val_fraction=0.2, test_fraction=0.2, **more)


def arguments(out: Path, *sources, **changes) -> list[str]:
    """The same, as words of a command line: arguments(folder, "a=a.jsonl", max_bad=3)."""
    given = {"out": out, "tokenizer": "train:300", "val_fraction": 0.2, "test_fraction": 0.2}
    return [*map(str, sources), *options(**given | {"workers": 1} | changes)]


@pytest.fixture
def run(script):
    """Runs prepare.py in this process: run(folder, "a=a.jsonl", max_bad=3)."""
    return lambda *given, **changes: script("prepare", *arguments(*given, **changes))


def texts_of(data: Data, domain: str, split: str) -> list[str]:
    """The documents in a bin, decoded by the tokenizers library."""
    tokenizer = tokenizers.Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    tokens = np.fromfile(data.folder / f"{domain}.{split}.bin", dtype="<u2")
    *documents, rest = np.split(tokens, np.flatnonzero(tokens == 0) + 1)
    assert len(rest) == 0  # every document ends with the end-of-text id
    batch = [document[:-1].tolist() for document in documents]
    return tokenizer.decode_batch(batch, skip_special_tokens=False)


def all_texts(data: Data, domain: str) -> list[str]:
    return sorted(text for split in SPLITS for text in texts_of(data, domain, split))


TEXTS = [text[:60] for text in made_documents("sums", 5, seed=1)]
TEXTS += ["naïve e\u0301 日本 🙂\0\r\n  <|endoftext|>", " " * 40 + "x\t"]


# ---- bins and splits ----


def test_every_document_stands_in_one_bin_whole_and_in_order(data):
    """As the tokens that the tokenizers library encodes."""
    oracle = tokenizers.Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    for domain in data.domains:
        source = made_documents(domain, 120)
        assert all_texts(data, domain) == sorted(source)
        for split in SPLITS:
            texts = texts_of(data, domain, split)
            assert texts == [text for text in source if text in texts]
            size = data.size(domain, split)
            assert size["documents"] == len(texts)
            assert size["bytes"] == len("".join(texts).encode())
            found = oracle.encode_batch(texts, add_special_tokens=False)
            assert data.tokens(domain, split).tolist() == [i for x in found for i in [*x.ids, 0]]
            assert size["tokens"] == len(data.tokens(domain, split))


def test_the_split_depends_on_the_text_alone(tmp_path, data):
    """In another domain, among other documents and with another tokenizer, it is the same."""
    texts = made_documents("sums", 50, seed=9) + made_documents("prose", 120)
    other = prepared(tmp_path / "d", {"mixed": [write_jsonl(tmp_path / "m.jsonl", texts)]})
    for split in SPLITS:
        assert set(texts_of(data, "prose", split)) <= set(texts_of(other, "mixed", split))


def test_the_split_of_a_text_never_changes():
    assert hash_of("a text") == 3555231153270761061
    fractions = {"val": 0.3, "test": 0.1}
    shares = [0, 0.099, 0.101, 0.399, 0.401, 0.999]
    splits = [split_of(int(x * 2**64), fractions) for x in shares]
    assert splits == ["test", "test", "val", "val", "train", "train"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_token_of_any_split_changes_the_identity(data, tmp_path, split):
    other = Path(shutil.copytree(data.folder, tmp_path / "d"))
    known = data.size("sums", split)["sha256"]
    text = (other / "meta.json").read_text()
    (other / "meta.json").write_text(text.replace(known, known[::-1]))
    assert Data(other).identity != data.identity


def test_a_tenth_of_the_sample_and_a_twentieth_of_other_text_is_held_out(tmp_path):
    for is_sample, share in ((True, 0.1), (False, 0.05)):
        found = prepare.fractions_of(tmp_path / "d", False, None, None, is_sample)
        assert found == {"val": share, "test": share}


def test_empty_documents_and_duplicates_are_left_out_of_each_domain(tmp_path):
    texts = made_documents("sums", 80) + TEXTS
    more = ["", " \n\t", "\u3000", texts[3], texts[70], texts[3]]
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n")
    a = [write_jsonl(tmp_path / "a.jsonl", texts + more), blank]
    made = prepared(tmp_path / "d", {"a": a, "b": [write_jsonl(tmp_path / "b.jsonl", texts)]})
    assert made.meta["left_out"] == {"empty": 4, "duplicate": 3}
    assert all_texts(made, "a") == all_texts(made, "b") == sorted(texts)


def placed(documents: list[Document], by_record: bool, data: Data) -> list:
    encoded = prepare.Encoder(Keys(), data.folder / "tokenizer.json").encode(documents)
    return list(prepare.place(encoded, {"val": 0.1, "test": 0.1}, by_record))


def test_duplicates_of_a_domain_that_records_name_are_left_out(data):
    first, again = placed([Document("Free Text", "a")] * 2, True, data)
    assert first.domain == "free_text"
    assert again == LeftOut("free_text", "duplicate")


def test_what_is_left_out_adds_up(tmp_path):
    for d in "ab":
        texts = made_documents(d, 60)
        write_jsonl(tmp_path / f"{d}.jsonl", [*texts, texts[0]])
    prepared(tmp_path / "d", {"a": [tmp_path / "a.jsonl"]})
    prepare.prepare(tmp_path / "d", {"b": [tmp_path / "b.jsonl"]}, add=True)
    assert Data(tmp_path / "d").meta["left_out"] == {"duplicate": 2}


def test_a_limit_hides_what_comes_after_it_whatever_the_number_of_workers(tmp_path, monkeypatch):
    """A domain ends with the document that reaches it. A bad line or damage after that, read ahead
    of time for other workers, is no error."""
    monkeypatch.setattr("prepare.BLOCK", 4096)
    sources = {}
    for domain in ("prose", "sums"):
        path = write_jsonl(tmp_path / f"{domain}.jsonl", made_documents(domain, 80))
        path.write_text(path.read_text() + "{bad")
        sources[domain] = [path]
    cut = tmp_path / "cut.jsonl.gz"
    long = write_jsonl(tmp_path / "long.jsonl", made_documents("prose", 2000))
    cut.write_bytes(gzip.compress(long.read_bytes())[:-9])
    sources["cut"] = [cut]
    made = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        made.append(prepared(out, sources, limit_tokens=3000, workers=workers))
    assert made[0].meta == made[1].meta
    for domain in sources:
        assert 3000 <= sum(made[0].size(domain, split)["tokens"] for split in SPLITS) < 3400
    with pytest.raises(InputError, match=":81: JSONDecodeError"):
        prepared(tmp_path / "all", sources, workers=2)


def test_a_limit_hides_a_text_that_the_tokenizer_does_not_know(tmp_path):
    spec = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}}
    words = ["<|endoftext|>", "<|", "|>", "a", "b", "endoftext", *map(str, range(200))]
    not_so = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [{"id": 0, "content": words[0], "special": True, **not_so}]
    vocab = {word: i for i, word in enumerate(words)}
    spec["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "none"}
    (tmp_path / "t.json").write_text(json.dumps(spec))
    # Of four tokens each, 25 reach the limit; what comes next is in the same batch.
    texts = [*(f"a b {i}" for i in range(25)), "unknown"]
    source = tmp_path / "a.jsonl"
    records = [{"text": text, "set": "Free Text"} for text in texts]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    how = {"tokenizer": str(tmp_path / "t.json"), "val_fraction": 0.3, "test_fraction": 0.3}
    for sources, key in (({"free_text": [source]}, None), ({None: [source]}, "set")):
        for workers in (1, 2):
            same = how | {"domain_key": key, "workers": workers}
            made = prepare.prepare(tmp_path / f"{key}{workers}", sources, limit_tokens=100, **same)
            assert made.domains == ["free_text"]
            with pytest.raises(InputError, match="WordLevel error.*; take a tokenizer that knows"):
                prepare.prepare(tmp_path / "all", sources, **same)


def test_duplicates_are_the_same_ones_whatever_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare.BLOCK", 4096)
    texts = made_documents("prose", 80)
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[::-1], " ", *texts])
    made = [prepared(tmp_path / str(n), {"a": [source]}, workers=n) for n in (1, 3)]
    assert made[0].meta == made[1].meta
    assert made[0].meta["left_out"] == {"duplicate": 160, "empty": 1}


def test_workers_keep_the_order_and_few_batches_wait_for_them(data):
    texts = [[f"{i} {j}" for j in range(3)] for i in range(20)]
    batches = [[Document("a", text) for text in batch] for batch in texts]
    batches[7].append(LeftOut("a", "unreadable", "damaged"))
    path = data.folder / "tokenizer.json"
    taken = []
    found = []

    def as_they_are_taken():
        for batch in batches:
            taken.append(batch)
            yield batch

    for item in prepare.encode_all(as_they_are_taken(), Keys(), 2, path):
        found.append(item)
        assert len(taken) <= len(found) // 3 + 7
    assert found == list(prepare.encode_all(batches, Keys(), 1, path))
    assert found.pop(24) == batches[7][-1]
    assert [item.key for item in found] == [hash_of(text) for batch in texts for text in batch]


def test_batches_are_bounded_where_documents_hold_nothing(tmp_path):
    """A small file may have millions of them."""
    for item in (prepare.Line(b"{}", tmp_path, 1, "a"), Document("a", ""), LeftOut("a", "bad")):
        sizes = [len(batch) for batch in prepare.in_batches([item] * 30_000)]
        assert sum(sizes) == 30_000 and max(sizes) < 3000


def test_duplicates_are_not_tokenized(data, monkeypatch):
    tokenized = []
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda own, text: tokenized.append(text) or encode(own, text)
    )
    texts = ["one", "two", "one", " ", "two", " "]
    found = placed([Document(domain, text) for text in texts for domain in "ab"], False, data)
    assert tokenized == ["one", "one", "two", "two"]
    assert [item.reason for item in found if isinstance(item, LeftOut)] == [
        *["duplicate"] * 2,
        *["empty"] * 2,
        *["duplicate"] * 2,
        *["empty"] * 2,
    ]


# ---- sources ----


RECORDS = [{"text": text, "n": [1, {}]} for text in TEXTS]
LINES = b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in RECORDS)


def long_window(content: bytes) -> bytes:
    """Packed for a window of 256 MB, which only who asks for it unpacks."""
    parameter = zstd.CompressionParameter
    wide = {parameter.window_log: 28, parameter.enable_long_distance_matching: 1}
    file = io.BytesIO()
    with zstd.ZstdFile(file, "w", options=wide) as stream:
        stream.write(content)
    with pytest.raises(zstd.ZstdError):
        zstd.decompress(file.getvalue())
    return file.getvalue()


def parquet(texts: list[str], column: str = "text") -> bytes:
    buffer = pyarrow.BufferOutputStream()
    rows = {"n": [b"x"] * len(texts), column: texts}
    pyarrow.parquet.write_table(pyarrow.table(rows), buffer, row_group_size=3)
    return buffer.getvalue().to_pybytes()


# Files with these documents. Those that are packed have two members or frames.
SOURCES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES[:-1],
    "a.json": b"\n \n" + LINES.replace(b"\n", b"\n\n"),
    "a.txt.jsonl": LINES,
    "A.JSONL": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "a[0].jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES[:300], mtime=0) + gzip.compress(LINES[300:], mtime=0),
    "a.JSON.GZ": gzip.compress(LINES),
    "a.jsonl.zst": zstd.compress(LINES[:300]) + zstd.compress(LINES[300:]),
    "wide.ndjson.Zst": long_window(LINES),
    "a.parquet": parquet(TEXTS),
}


def documents_of(sources: dict, *keys: str) -> list[Document | LeftOut]:
    return list(documents_in(read(sources, Keys(*keys)), Keys(*keys)))


def read_texts(source: Path) -> list[str]:
    documents = documents_of({"a": prepare.source_files(str(source))})
    assert {type(document) for document in documents} == {Document}
    return [document.text for document in documents]


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_file_holds_the_same_documents(tmp_path, name):
    (tmp_path / name).write_bytes(SOURCES[name])
    assert read_texts(tmp_path / name) == TEXTS


def test_text_files_of_a_folder_or_a_glob_are_a_document_each(tmp_path, run):
    (tmp_path / "more").mkdir()
    texts = [*made_documents("prose", 2), TEXTS[-2]]
    for i, name in enumerate(("a.txt", "b.TXT", "more/c.txt")):
        (tmp_path / name).write_text(texts[i], ("utf-8", "utf-8-sig")[i % 2], newline="")
    for name in ("notes.md", ".hidden.txt"):
        (tmp_path / name).write_text("other")
    assert read_texts(tmp_path) == texts
    assert read_texts(tmp_path / "**" / "*") == texts
    assert read_texts(tmp_path / "[ab].*") == texts[:2]
    (tmp_path / "z.txt").symlink_to("a.txt")  # of what is read there is nothing to say
    assert "not read: 1 .txt, 1 .md (hidden, or" in run(tmp_path / "d", f"a={tmp_path}")[1]
    # A file is read once, also where links lead back to its folder (two make endless paths).
    (tmp_path / "more" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path)
    assert read_texts(tmp_path) == texts
    # A folder that only a link leads to is read, but no hidden one.
    other = tmp_path / "d" / "other"
    (other / ".git").mkdir(parents=True)
    for path in (other / "d.txt", other / ".git" / "e.txt"):
        path.write_text("elsewhere")
    (tmp_path / "more" / "z").symlink_to(other)
    assert read_texts(tmp_path / "more") == [texts[2], *texts[:2], "elsewhere"]


def test_one_source_becomes_many_domains_by_a_key(tmp_path, run):
    names = {"prose": "Free Text", "sums": "Sums/2", "code": "../x"}
    records = []
    for domain, name in names.items():
        for text in made_documents(domain, 80):
            records.append({"body": {"text": text}, "meta": {"set": name}})
    records += [{"body.text": f"{i}", "meta.set": "flat"} for i in range(80)]
    source = tmp_path / "mixed.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "out" / "d"
    keys = {"domain_key": "meta.set", "text_key": "body.text"}
    assert "free_text.train" in works(run(out, source, **keys))
    made = Data(out)
    assert made.domains == ["flat", "free_text", "sums_2", "x"]
    assert all_texts(made, "x") == sorted(made_documents("code", 80))
    assert {path.parent for path in tmp_path.rglob("*.bin")} == {out}


def test_of_a_row_only_the_text_goes_to_another_process(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS, "body"))
    items = list(read({"a": [tmp_path / "a.parquet"]}, Keys("body")))
    assert items == [Document("a", text) for text in TEXTS]


def test_a_parquet_becomes_many_domains_by_a_key(tmp_path):
    rows = [{"text": f"{d} {i}", "meta": {"set": d}} for d in ("a", "b") for i in range(80)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "all.parquet")
    made = prepared(tmp_path / "d", {None: [tmp_path / "all.parquet"]}, domain_key="meta.set")
    assert all_texts(made, "b") == sorted(f"b {i}" for i in range(80))
    bad, *_ = documents_of({None: [tmp_path / "all.parquet"]}, "text", "meta.nope")
    assert "no string under 'meta.nope'; there are 'text', 'meta.set'; --text-key" in bad.message


def test_four_hundred_domains_need_no_more_open_files_than_one(tmp_path, run):
    """Here a process may have 256; at the end there are 1200 bins, and a window of each."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 256
    records = [{"text": f"{i} of {d}", "set": f"d{d}"} for i in range(60) for d in range(400)]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    fractions = {"val_fraction": 0.3, "test_fraction": 0.3}
    works(run(tmp_path / "d", source, domain_key="set", **fractions))
    made = Data(tmp_path / "d")
    assert len(made.domains) == 400
    windows = [made.window(d, split, 16, 0) for d in made.domains for split in SPLITS]
    decode = tokenizers.Tokenizer.from_file(str(made.folder / "tokenizer.json")).decode
    for number, window in enumerate(windows):
        assert f"of {made.domains[number // 3][1:]}" in decode(window.tolist())


@pytest.mark.parametrize(
    "name, module, missing",
    [
        ("a.jsonl.zst", zstd.__name__.partition(".")[0], "backports.zstd"),
        ("a.parquet", "pyarrow.parquet", "pyarrow"),
    ],
)
def test_a_library_that_is_missing_is_named(run, tmp_path, monkeypatch, name, module, missing):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    result = run(tmp_path / "d", f"a={tmp_path / name}")
    fails(result, f"pip install {missing}", name)


# ---- bad input ----


GOOD = b'{"text": "some text"}\n'


@pytest.mark.parametrize(
    "name, content, number, why",
    [
        ("a.jsonl", GOOD + b"{broken", 2, "JSONDecodeError"),
        ("a.jsonl", GOOD + GOOD + b'{"text": null}', 3, "no string under 'text'; there are 'text'"),
        ("a.jsonl", b'{"body": "x"}', 1, "no string under 'text'; there are 'body'"),
        ("a.jsonl", b"{}", 1, "no keys"),
        ("a.jsonl", GOOD + b"[1]", 2, "no object; a line is one: jq -c '.[]'"),
        ("a.jsonl", GOOD + b'"a string"', 2, "jq -c '{text: .}'"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}', 2, "surrogate"),
        ("a.jsonl", GOOD + b'{"text": "na\xefve"}', 2, "not UTF-8, which iconv"),
        ("a.jsonl", GOOD + b"\0" * 100, 2, "full of NULs: no text"),
        ("a.txt", "naive".encode("utf-16le"), 1, "full of NULs: no text, or UTF-16 (iconv"),
        ("a.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, 2, "BOM"),
        ("a.jsonl", b"[" * 100_000, 1, "RecursionError"),
        ("a.jsonl", b"9" * 5000, 1, "5000 digits"),
        ("a.json", b'{\n "text": "x"\n}', 1, "JSON over many lines"),
        ("a.json", b'[\n {"text": "x"}]', 1, "of a list, jq -c '.[]'"),
        ("a.parquet", parquet(["x"], "body"), 1, "no string under 'text'; there are 'n', 'body'"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", 1, "git lfs pull"),
        ("a.txt", "naive".encode("utf-16"), 1, "not UTF-8, which iconv -f UTF-16 -t UTF-8 makes"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", 1, "git lfs pull"),
        ("a.txt", b"x" * (2**24 + 1), 1, "longer than"),
    ],
)
def test_a_bad_line_is_named_by_file_number_and_reason(tmp_path, name, content, number, why):
    path = tmp_path / name
    path.write_bytes(content)
    bad = [item for item in documents_of({"a": [path]}) if isinstance(item, LeftOut)]
    assert bad[0][:2] == ("a", "bad")
    assert bad[0].message.startswith(f"{path}:{number}: ") and why in bad[0].message


def test_bad_lines_are_counted_where_some_are_allowed(tmp_path, run):
    texts = made_documents("sums", 100)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    lines = source.read_text().splitlines()
    lines[3:3] = ["{", '{"text": null}', "7", '{"text": "\\ud800"}']
    source.write_text("\n".join(lines))
    fails(run(tmp_path / "d", f"a={source}"), f"{source}:4: ", "--max-bad")
    fails(run(tmp_path / "d", f"a={source}", max_bad=3), f"{source}:7: ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert "left out: 4 bad" in works(run(tmp_path / "d", f"a={source}", max_bad=4))
    assert all_texts(Data(tmp_path / "d"), "a") == sorted(texts)


PACKED = {"gz": gzip.compress, "zst": zstd.compress}


@pytest.mark.parametrize("pack", PACKED)
def test_a_line_of_300_megabytes_in_a_small_file(tmp_path, data, pack):
    """It is a bad one, soon and in little memory; the others are read."""
    good = "".join(json.dumps({"text": text}) + "\n" for text in made_documents("sums", 80))
    more = good.replace("sums", "more").encode()
    parts = [PACKED[pack](good.encode() + b'{"text": "'), PACKED[pack](b"a" * 10**7) * 30]
    source = tmp_path / f"a.jsonl.{pack}"
    source.write_bytes(b"".join([*parts, PACKED[pack](b'"}\n' + more)]))
    assert source.stat().st_size < 400_000
    argv = arguments(tmp_path / "d", f"a={source}", max_bad=1, tokenizer=data.folder)
    done = command("prepare.py", *argv, memory=300e6)
    assert done.returncode == 0 and "1 bad" in done.stdout, done.stderr
    assert len(all_texts(Data(tmp_path / "d"), "a")) == 160
    documents = documents_of({"a": [source]})
    bad = next(item for item in documents if isinstance(item, LeftOut))
    assert bad.message.startswith(f"{source}:81: longer than 16,777,216 bytes;")


def test_a_file_that_takes_more_memory_than_there_is(tmp_path):
    source = tmp_path / "a.jsonl.zst"
    source.write_bytes(long_window(LINES))
    done = command("prepare.py", *arguments(tmp_path / "d", f"a={source}"), memory=200e6)
    fails(done, source, "free some memory")


DAMAGED = {
    "cut.jsonl.gz": gzip.compress(LINES * 99)[:-9],
    "cut.jsonl.zst": zstd.compress(LINES * 99)[:-9],
    "cut.parquet": SOURCES["a.parquet"][:-9],
    "longer.jsonl.gz": gzip.compress(LINES) + b"no such format",
    "changed.jsonl.gz": gzip.compress(LINES, 0).replace(b"sums", b"suns"),
    **{f"other.{kind}": b"\0 no such format" * 10 for kind in ("jsonl.gz", "txt.zst", "parquet")},
    "pointer.jsonl.gz": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_cannot_be_read_to_its_end(run, tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name])
    way_out = "git lfs pull" if "pointer" in name else "get it again"
    result = run(tmp_path / "d", f"a={tmp_path / name}")
    fails(result, f"{tmp_path / name}: cannot be read", way_out)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "label, domain",
    [
        ("Stack Exchange (2024)", "stack_exchange_2024"),
        ("../x", "x"),
        ("/etc/passwd", "etc_passwd"),
        ("a/../../b", "a_b"),
    ],
)
def test_a_domain_that_a_record_names_has_a_name_that_is_fit_for_a_file(label, domain):
    assert domain_named(label, by_record=True) == domain


@pytest.mark.parametrize("label", ["..", "mean", "", "x" * 5000, "\0", "日本"])
def test_what_cannot_be_the_name_of_a_domain(label):
    for by_record in (False, True):
        with pytest.raises(InputError, match="cannot be a domain"):
            domain_named(label, by_record)


@pytest.mark.parametrize("both, by_record", [(("web", "Web"), False), (("a b", "a/b"), True)])
def test_two_domains_whose_files_some_disks_would_take_for_one_are_an_error(data, both, by_record):
    documents = [Document(label, "text") for label in both]
    with pytest.raises(InputError, match=f"'{both[0]}' and '{both[1]}'"):
        placed(documents, by_record, data)


@pytest.mark.parametrize(
    "argv, said",
    [
        ("a=missing.jsonl", ["missing.jsonl: no such file or folder"]),
        ("a=https://x/y.jsonl", ["https://x/y.jsonl: fetch it, and give"]),
        ("a=empty.jsonl", ["of 0 documents; its sources hold no text"]),
        ("a=a.jsonl --out=few.jsonl/d", ["few.jsonl is a file, not a folder"]),
        ("a=a.jsonl b=cut.jsonl.gz --text-key=body", ["a.jsonl:1: no string under 'body'"]),
        ("a=table.csv", [".csv is not read", ".jsonl"]),
        ("a=pipe.jsonl", ["pipe.jsonl: a broken link, or no file"]),
        ("a=links", ["links/gone.jsonl: a broken link"]),
        ("a=source", ["source: no file there", "there are 2 .py, 1 .md (hidden, or of another"]),
        ("a.jsonl", ["name=path"]),
        ("a=", ["name=path"]),
        ("../x=a.jsonl", ["'../x'"]),
        ("a=a.jsonl --tokenizer=missing.json", ["missing.json"]),
        ("a=table.csv.gz", [".csv.gz is not read"]),
        ("a=a.jsonl --tokenizer=train:x", ["train:x", "expected train:N"]),
        ("a=a.jsonl --tokenizer=train:90000", ["90000"]),
        ("a=few.jsonl", ["is left empty, of 2 documents", "--val-"]),
        ("a=few.jsonl b=a.jsonl", ["of 2 documents", "--min-documents 3 leaves the domain out"]),
        ("a=a.jsonl b=a.jsonl --limit-tokens=9", ["is left empty", "raise --limit-tokens"]),
        ("a=a.jsonl b=few.jsonl --min-documents=99", ["of 60 documents", "--min-documents 60"]),
        ("a=a.jsonl --val-fraction=0.9", ["--val-fraction"]),
        ("a=a.jsonl --val-fraction=nan", ["--val-fraction"]),
        ("a=a.jsonl --workers=0", ["--workers 0: expected 1 to 10,000"]),
        ("a=a.jsonl --limit-tokens=0", ["--limit-tokens 0"]),
        ("a=a.jsonl --max-bad=-1", ["--max-bad -1"]),
        ("a=a.jsonl --bogus", ["--bogus", "--help"]),
        ("a=a.jsonl b=empty.jsonl", ["b.train is left empty"]),
        ("empty.jsonl --domain-key=meta.set", ["every split is left empty"]),
        ("a=a.jsonl --add", ["--tokenizer", "--add"]),
        ("a=a.jsonl --add --val-fraction=0", ["--val-fraction", "--add"]),
        ("--domain-key=set --tokenizer=train:300", ["--domain-key: name the sources"]),
        ("a=a.jsonl A=few.jsonl", ["A=few.jsonl: there is a, too"]),
        ("a=a.jsonl --work=1", ["--work=1"]),
        ("a=a.jsonl --domain-key=set", ["a=a.jsonl", "has no name"]),
        ("named.jsonl --domain-key=set", ["named.jsonl:1: '\u65e5\u672c' cannot be", "--max-bad"]),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(script, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 60))
    write_jsonl(tmp_path / "few.jsonl", made_documents("sums", 2))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.jsonl.gz").write_bytes(DAMAGED["cut.jsonl.gz"])
    (tmp_path / "named.jsonl").write_text('{"text": "some", "set": "\u65e5\u672c"}', "utf-8")
    for name in ("table.csv", "table.csv.gz"):
        (tmp_path / name).write_text("a,b")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "source").mkdir()
    for name in ("a.py", "b.py", "c.md"):
        (tmp_path / "source" / name).write_text("x = 1")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "gone.jsonl").symlink_to("nowhere.jsonl")
    write_jsonl(tmp_path / "links" / "a.jsonl", made_documents("sums", 60))
    before = sorted(tmp_path.iterdir())
    fails(script("prepare", *arguments("d"), *argv.split()), *said)
    assert sorted(tmp_path.iterdir()) == before


def test_text_that_is_too_little_for_a_tokenizer_is_told(run, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 60))
    text = works(run(tmp_path / "d", f"a={source}", tokenizer="train:60000"))
    size = Data(tmp_path / "d").vocab_size
    assert f"warning: train:60000: the text is enough for {size:,} tokens only" in text


def test_sources_need_a_tokenizer_and_a_tokenizer_needs_sources(run, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 60))
    out = tmp_path / "d"
    fails(run(out, f"a={source}", tokenizer=False), "--tokenizer", "--add")
    fails(run(out, add=True, tokenizer=False), "--add: name the sources")


def test_small_domains_are_warned_of_or_left_out(run, tmp_path):
    many = write_jsonl(tmp_path / "many.jsonl", made_documents("sums", 160))
    few = write_jsonl(tmp_path / "few.jsonl", made_documents("prose", 15))
    out = works(run(tmp_path / "d", f"many={many}", f"few={few}"))
    files = Data(tmp_path / "d").meta["files"]
    said = ", ".join(f"{name} {files[name]['documents']}" for name in ("few.test", "few.val"))
    assert f"warning: few documents to measure on: {said}; add some, or make it anew" in out
    out = works(run(tmp_path / "e", f"many={many}", f"few={few}", min_documents=16))
    assert "15 in a small domain" in out and "warning" not in out
    assert Data(tmp_path / "e").domains == ["many"]
    assert not list((tmp_path / "e").glob("few*"))


# ---- the folder ----


def test_nothing_that_exists_is_replaced(run, script, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 80))
    for out in (tmp_path, ".", source):
        fails(run(out, f"a={source}"), "exists, and is no data set; choose another --out")
    add = options(out=tmp_path / "none", add=True, workers=1)
    fails(script("prepare", f"a={source}", *add), "not there to add to")
    fails(script("prepare", f"a={source}", *add, "--val-fraction", 0.2), "own fractions are taken")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_domain_is_added_as_if_it_had_been_there_from_the_start(tmp_path, run, script):
    sources = {}
    for domain in ("code", "prose", "sums"):
        sources[domain] = f"{domain}={tmp_path / domain}.jsonl"
        write_jsonl(tmp_path / f"{domain}.jsonl", made_documents(domain, 120))
    two = tmp_path / "two"
    three = tmp_path / "three"
    works(run(two, sources["code"], sources["sums"]))
    works(run(three, *sources.values(), tokenizer=two / "tokenizer.json"))
    before = {path.name: path.stat().st_mtime_ns for path in two.iterdir()}
    add = options(out=two, add=True, workers=1)
    works(script("prepare", sources["prose"], *add))
    assert Data(two).meta == Data(three).meta and Data(two).identity == Data(three).identity
    after = {path.name: path.stat().st_mtime_ns for path in two.iterdir()}
    changed = {name for name, written in after.items() if before.get(name) != written}
    assert changed == {"meta.json", *(f"prose.{split}.bin" for split in SPLITS)}

    fails(run(two, sources["prose"]), "exists", "--add domains to it")
    fails(script("prepare", sources["prose"], *add), "has prose already", "another name")
    (tmp_path / "bad.jsonl").write_text((tmp_path / "code.jsonl").read_text() + "{broken\n")
    # Before anything is read, or where records name their domains, before it is added.
    fails(script("prepare", f"Prose={tmp_path}/bad.jsonl", *add), "has Prose already", "another")
    records = [{"text": text, "in": "PROSE"} for text in made_documents("prose", 120)]
    (tmp_path / "named.jsonl").write_text("\n".join(map(json.dumps, records)))
    named = [tmp_path / "named.jsonl", "--domain-key", "in", *add]
    fails(script("prepare", *named), "has prose already", "another name")
    fails(script("prepare", f"more={tmp_path}/bad.jsonl", *add), "bad.jsonl:121")
    assert Data(two).meta == Data(three).meta
    assert {path.name: path.stat().st_mtime_ns for path in two.iterdir()} == after
    assert not list(tmp_path.glob(".*"))

    # Tokens of another tokenizer would be taken for others.
    (two / "tokenizer.json").write_text((two / "tokenizer.json").read_text() + "\n")
    fails(script("prepare", f"more={tmp_path}/code.jsonl", *add), "tokenizer.json", "damaged")


def test_an_empty_folder_becomes_a_data_set_and_need_not_lie_in_a_writable_one(
    tmp_path, run, script, monkeypatch
):
    """As a disk that is mounted there: what is added to it is written within it."""
    out = tmp_path / "above" / "d"
    out.mkdir(parents=True)
    paths = {d: write_jsonl(tmp_path / f"{d}.jsonl", made_documents(d, 120)) for d in ("a", "b")}
    works(run(out, f"a={paths['a']}"))
    plain = Path.mkdir

    def mkdir(path, *args, **more):
        assert path.is_relative_to(out)
        plain(path, *args, **more)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    works(script("prepare", f"b={paths['b']}", *options(out=out, add=True, workers=1)))
    assert Data(out).domains == ["a", "b"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_word_without_end_does_not_stop_the_training_of_a_tokenizer(tmp_path, run):
    """It took the square of the longest word's length: here minutes, not seconds."""
    documents = [*made_documents("sums", 80), *("acgt"[i] * 3 + "cat" * 400_000 for i in range(4))]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    works(run(tmp_path / "d", f"a={source}"))
    assert without_long_words("some \n words") == "some \n words"
    assert without_long_words("abcdefg hi", 3) == "abc def g hi"


def test_a_tokenizer_learns_from_the_train_split_alone(tmp_path):
    fractions = {"val": 0.2, "test": 0.2}
    texts = [text + " zqzq" * 50 for text in made_documents("sums", 200)]
    held_out = [text for text in texts if split_of(hash_of(text), fractions) != "train"]
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("prose", 200) + held_out)
    prepared(tmp_path / "d", {"a": [source]})
    assert "zq" not in Tokenizer(tmp_path / "d").json


def test_what_is_said_of_long_names_fits_100_columns(data, capsys):
    """Also of a data set that an earlier version made, whose meta.json says less."""
    known = Data(data.folder)
    del known.meta["overlap"]
    known.meta["files"] = {f"a{'z' * 90}{name}": x for name, x in known.meta["files"].items()}
    prepare.describe(known, "d")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert len({line.split()[0] for line in lines if "zzz" in line}) == 9


def test_a_data_set_is_described_in_bytes_a_token(data, capsys):
    prepare.describe(data, "d")
    lines = capsys.readouterr().out
    for name, file in data.meta["files"].items():
        ratio = f"{file['bytes'] / file['tokens']:.2f}"
        assert re.search(rf"(?m)^{name} .* {ratio}$", lines)


def test_a_data_set_is_read_from_wherever_the_process_has_gone(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data.folder.parent)
    relative = Data(data.folder.name)
    monkeypatch.chdir(tmp_path)
    for domain in data.domains:
        assert (relative.tokens(domain, "val") == data.tokens(domain, "val")).all()


def test_two_processes_may_add_at_the_same_time(tmp_path):
    paths = {d: write_jsonl(tmp_path / f"{d}.jsonl", made_documents(d, 300)) for d in ("a", "b")}
    prepared(tmp_path / "d", {"first": [paths["a"]]})
    add = options(out=tmp_path / "d", add=True, workers=1)
    ends_well(*[Run(tmp_path, "prepare", f"{d}={path}", *add) for d, path in paths.items()])
    assert Data(tmp_path / "d").domains == ["a", "b", "first"]


def test_ctrl_c_ends_the_training_of_a_tokenizer_at_once(tmp_path):
    """Which by itself takes many seconds, and hears nothing."""
    source = tmp_path / "a.jsonl"
    line = json.dumps({"text": " ".join(made_documents("prose", 500))}) + "\n"
    source.write_text("".join(line.replace("the", f"t{i}") for i in range(1000)))
    run = Run(tmp_path, "prepare", *arguments(tmp_path / "d", f"a={source}"))
    run.wait_for(lambda: run.printed() == "training the tokenizer\n")
    run.send(signal.SIGINT)
    assert run.end(5)[0] == -signal.SIGINT
    assert not (tmp_path / "d").exists()


def half_way(tmp_path, data) -> tuple[subprocess.Popen, list[str]]:
    """A process with two workers that has begun to write tmp_path/t/d; and its arguments."""
    texts = [f"{i} {text * 9}" for i in range(50) for text in made_documents("code", 100, i)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    argv = arguments(tmp_path / "t" / "d", f"a={source}", tokenizer=data.folder, workers=2)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([sys.executable, prepare.__file__, *argv], **pipe)
    while not any(path.stat().st_size for path in tmp_path.glob("t/.*/a.train.bin")):
        assert process.poll() is None
        time.sleep(0.01)
    return process, argv


def test_two_ctrl_c_end_it_as_one_does(tmp_path, data):
    process, _ = half_way(tmp_path, data)
    try:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 130 and b"nothing of it is kept" in said
        assert not list((tmp_path / "t").iterdir())
    finally:
        process.kill()


def test_killed_half_way_it_leaves_no_data_and_no_process(tmp_path, data, script):
    """And a second run succeeds."""
    process, argv = half_way(tmp_path, data)
    out = tmp_path / "t" / "d"
    process.kill()
    process.communicate(timeout=20)  # workers have the pipe, too: it is read to its end with theirs
    with pytest.raises(InputError, match="not a data set"):
        Data(out)
    assert not list(tmp_path.glob("t/.*/meta.json"))
    works(script("prepare", *argv, "--limit-tokens", 9000))
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["d"]
    assert Data(out).domains == ["a"]


def test_a_kill_while_domains_are_added_leaves_the_data_set_as_it_was(tmp_path, script):
    for d in "ab":
        write_jsonl(tmp_path / f"{d}.jsonl", made_documents(d, 60))
    out = tmp_path / "d"
    prepared(out, {"a": [tmp_path / "a.jsonl"]})
    words = [f"b={tmp_path}/b.jsonl", *options(out=out, add=True, workers=1)]
    for moment in ("rename .*/d/b.test.bin", "rename .*/d/b.train.bin", "rename .*/d/meta.json"):
        assert Run(tmp_path, "prepare", *words, kill_at=moment).end()[0] == -9
        assert Data(out).domains == ["a"]
    works(script("prepare", *words))
    assert Data(out).domains == ["a", "b"]


def test_reading_prepared_data_does_not_import_torch():
    slow = "{'torch', 'model', 'tokenizers', 'tqdm', 'matplotlib'}"
    code = f"import sys, prepare; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(prepare.__file__).parent, check=True)


PEAK = """
import prepare, re, sys
prepare.cli(prepare.main)
assert "torch" not in sys.modules
print(re.search(r"VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it")
def test_memory_does_not_grow_with_the_input(tmp_path, data):
    """Sixteen times as much text, of 14 MB, takes about as much; torch is not imported. fastokens,
    if it is there, takes a fixed amount."""
    (tmp_path / "fastokens.py").write_text("raise ImportError")
    without = os.environ | {"PYTHONPATH": str(tmp_path)}
    peaks = []
    for n, env in ((1, without), (16, without), (16, os.environ)):
        texts = [f"{i} {text * 20}" for i in range(n) for text in made_documents("prose", 120, i)]
        source = write_jsonl(tmp_path / f"{n}.jsonl", texts)
        argv = arguments(tmp_path / f"{len(peaks)}", f"a={source}", tokenizer=data.folder)
        words = [sys.executable, "-c", PEAK, *argv]
        done = subprocess.run(words, check=True, capture_output=True, text=True, env=env)
        peaks.append(int(done.stdout.split()[-1]) / 1000)
    assert source.stat().st_size > 14e6
    assert peaks[1] < peaks[0] + 12 and max(peaks) < 200, peaks


# ---- the sample ----


def test_the_sample_is_real_text_in_five_domains_with_little_overlap(tmp_path, script, monkeypatch):
    smaller = functools.partial(prepare.make_sample, max_bytes=250_000)
    monkeypatch.setattr("prepare.make_sample", smaller)
    words = options(out=tmp_path / "sample", workers=1)
    assert "13-grams" in works(script("prepare", *words))
    sample = Data(tmp_path / "sample")
    assert sample.domains == ["cpp", "docstrings", "manual", "python", "stubs"]
    assert sample.vocab_size == 4096
    for domain in sample.domains:
        assert sum(sample.size(domain, split)["bytes"] for split in SPLITS) > 250_000
        grams = {"train": set(), "test": set()}
        for split, found in grams.items():
            for text in texts_of(sample, domain, split):
                parts = re.findall(r"\w+", text)
                found |= {tuple(parts[i : i + 13]) for i in range(len(parts) - 12)}
        share = len(grams["train"] & grams["test"]) / len(grams["test"])
        assert sample.meta["overlap"][domain] == pytest.approx(share, abs=1e-9)
        assert share < 0.2


# Its string would be cut where a line begins as a function does.
CODE_IN_A_STRING = '''
class Outer:
    """The outer one,
    of two lines."""

    try:
        pass
    except ValueError:
        def deep():
            """In a handler,
            of two lines."""
    else:
        def other():
            """Of one line."""

TEMPLATE = """
def looks_like_one():
    'but
    is text'
"""

def last():
    """The last one,
    of two lines."""
'''


@pytest.mark.parametrize(
    "module, shortest", [(argparse, 40), (dataclasses, 40), (np.ma.core, 200), (None, 20)]
)
def test_docstrings_in_triple_quotes_are_those_of_a_whole_syntax_tree(
    module, shortest, monkeypatch
):
    monkeypatch.setattr("prepare.SHORTEST", shortest)
    text = inspect.getsource(module) if module else CODE_IN_A_STRING
    definitions = (ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, definitions)]
    docstrings = [ast.get_docstring(node) or "" for node in nodes]
    # What stands in other quotes has one line.
    expected = [doc for doc in docstrings if "\n" in doc and len(doc) >= shortest]
    assert len(expected) >= 3
    found = prepare.docstrings_of(text)
    assert [doc for doc in found if "\n" in doc and len(doc) >= shortest] == expected
