"""Bins, splits and tokenizers, against the tokenizers library and against the sources themselves."""

import gzip
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from conftest import ROOT, made_documents, write_jsonl

from prepare import SPLITS, Data, InputError, Tokenizer, prepare, source_files


def prepared(out, sources, **options) -> Data:
    """A small data set with enough documents in every split."""
    return prepare(out, sources, "train:300", val_fraction=0.2, test_fraction=0.2, **options)


def documents_of(data: Data, domain: str, split: str) -> list[str]:
    """The texts in a bin, decoded by the tokenizers library."""
    tokenizer = tokenizers.Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    tokens = np.fromfile(data.folder / f"{domain}.{split}.bin", dtype="<u2")
    pieces = np.split(tokens, np.flatnonzero(tokens == 0) + 1)
    assert len(pieces[-1]) == 0  # every document ends with the end-of-text id
    return [tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces[:-1]]


def test_every_document_stands_in_one_bin_whole_and_in_order(data):
    for domain in data.domains:
        found = {split: documents_of(data, domain, split) for split in SPLITS}
        source = made_documents(domain, 120)
        assert sorted(text for texts in found.values() for text in texts) == sorted(source)
        for split, texts in found.items():
            assert texts == [text for text in source if text in texts]
            size = data.size(domain, split)
            assert size["documents"] == len(texts) and size["bytes"] == sum(len(t.encode()) for t in texts)
            assert size["tokens"] == len(data.tokens(domain, split))


def test_bins_equal_what_the_tokenizers_library_encodes(data):
    oracle = tokenizers.Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    ids = [
        i for text in documents_of(data, "code", "val") for i in [*oracle.encode(text, add_special_tokens=False).ids, 0]
    ]
    assert data.tokens("code", "val").tolist() == ids


def test_split_depends_on_the_text_alone(tmp_path, data):
    """In another domain, among other documents and with another tokenizer, a text falls into the same split."""
    texts = made_documents("prose", 120) + made_documents("sums", 50, seed=9)
    other = prepared(tmp_path / "d", {"mixed": [write_jsonl(tmp_path / "m.jsonl", texts)]})
    for split in SPLITS:
        assert set(documents_of(data, "prose", split)) <= set(documents_of(other, "mixed", split))


def test_exact_duplicates_and_empty_documents_are_dropped_within_a_domain(tmp_path):
    texts = made_documents("sums", 80)
    sources = {
        "a": [write_jsonl(tmp_path / "a.jsonl", texts + ["", texts[3], texts[70]])],
        "b": [write_jsonl(tmp_path / "b.jsonl", texts)],
    }
    made = prepared(tmp_path / "d", sources)
    for split in SPLITS:
        assert documents_of(made, "a", split) == documents_of(made, "b", split)


def test_special_tokens_in_the_text_are_text(tmp_path):
    texts = [f"a <|endoftext|> b {i}" for i in range(60)]
    made = prepared(tmp_path / "d", {"a": [write_jsonl(tmp_path / "a.jsonl", texts)]})
    assert sorted(t for s in SPLITS for t in documents_of(made, "a", s)) == sorted(texts)
    assert (
        0 not in Tokenizer(made.folder).encode("<|endoftext|>")
        and Tokenizer(made.folder).decode([0]) == "<|endoftext|>"
    )


def test_the_number_of_workers_does_not_change_the_bins(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", made_documents("code", 200))
    for workers in ("1", "2"):
        subprocess.run(
            [
                sys.executable,
                ROOT / "prepare.py",
                "--out",
                tmp_path / workers,
                f"a={tmp_path / 'a.jsonl'}",
                "--tokenizer",
                "train:500",
                "--workers",
                workers,
            ],
            check=True,
            capture_output=True,
        )
    assert Data(tmp_path / "1").meta["files"] == Data(tmp_path / "2").meta["files"]
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "2" / "tokenizer.json").read_bytes()


def test_formats_folders_and_globs_read_the_same_documents(tmp_path):
    texts = made_documents("prose", 90)
    plain, packed, folder = write_jsonl(tmp_path / "p.jsonl", texts), tmp_path / "z.jsonl.gz", tmp_path / "texts"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    meta = [
        prepared(tmp_path / name, {"a": source_files(str(source))}).meta["files"]
        for name, source in (("1", plain), ("2", packed), ("3", folder), ("4", folder / "*.txt"))
    ]
    assert meta[0] == meta[1] == meta[2] == meta[3]


def test_domain_key_splits_one_source_into_domains(tmp_path, script):
    names = {"prose": "Free Text", "sums": "Sums/2"}
    records = [{"body": {"text": t}, "meta": {"set": name}} for d, name in names.items() for t in made_documents(d, 80)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    status, out, err = script(
        "prepare",
        "--out",
        tmp_path / "d",
        tmp_path / "mixed.jsonl",
        "--domain-key",
        "meta.set",
        "--text-key",
        "body.text",
        "--tokenizer",
        "train:300",
        "--val-fraction",
        0.2,
        "--test-fraction",
        0.2,
    )
    assert status == 0, err
    assert Data(tmp_path / "d").domains == ["free_text", "sums_2"] and "free_text" in out


def test_limit_tokens_stops_each_domain_at_a_whole_document(tmp_path):
    sources = {d: [write_jsonl(tmp_path / f"{d}.jsonl", made_documents(d, 200))] for d in ("prose", "sums")}
    made = prepared(tmp_path / "d", sources, limit_tokens=3000)
    for d in made.domains:
        assert 3000 <= sum(made.size(d, s)["tokens"] for s in SPLITS) < 3400


def test_a_failed_run_leaves_what_was_there(tmp_path, script, data):
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 80))
    argv = [
        "prepare",
        "--out",
        tmp_path / "d",
        f"a={source}",
        "--tokenizer",
        "train:300",
        "--val-fraction",
        0.2,
        "--test-fraction",
        0.2,
    ]
    assert script(*argv)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    assert script(*argv)[0] == 2  # exists
    source.write_text(source.read_text() + "{broken\n")
    status, _, err = script(*argv, "--overwrite")
    assert status == 2 and f"{source}:81" in err
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "d"]


def test_reading_prepared_data_does_not_import_torch():
    code = "import sys, prepare; assert not {'torch', 'model', 'tokenizers', 'tqdm', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'])
def test_what_is_not_a_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match="t.json"):
        Tokenizer(tmp_path / "t.json")


def test_the_sample_is_real_text_in_five_domains_with_little_overlap(tmp_path):
    made = subprocess.run(
        [sys.executable, ROOT / "prepare.py", "--out", tmp_path / "sample"], check=True, capture_output=True, text=True
    )
    sample = Data(tmp_path / "sample")
    assert sample.domains == ["cpp", "docstrings", "manual", "python", "stubs"] and sample.vocab_size == 4096
    assert "13-grams" in made.stdout and max(sample.meta["overlap"].values()) < 0.2
    total = {d: sum(sample.size(d, s)["bytes"] for s in SPLITS) for d in sample.domains}
    assert min(total[d] for d in ("cpp", "docstrings", "python", "stubs")) > 1_000_000 and total["manual"] > 300_000
    grams = {
        s: {
            tuple(w[i : i + 13])
            for text in documents_of(sample, "cpp", s)
            for w in [re.findall(r"\w+", text)]
            for i in range(len(w) - 12)
        }
        for s in ("train", "test")
    }
    assert len(grams["test"] & grams["train"]) / len(grams["test"]) == pytest.approx(
        sample.meta["overlap"]["cpp"], abs=1e-9
    )
