"""Bins, splits and tokenizers, against the tokenizers library and against the sources themselves."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from conftest import ROOT, command, made_documents, write_jsonl

import prepare as prepare_module
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
    return [
        tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces[:-1]
    ]


def test_every_document_stands_in_one_bin_whole_and_in_order(data):
    for domain in data.domains:
        found = {split: documents_of(data, domain, split) for split in SPLITS}
        source = made_documents(domain, 120)
        assert sorted(text for texts in found.values() for text in texts) == sorted(source)
        for split, texts in found.items():
            assert texts == [text for text in source if text in texts]
            size = data.size(domain, split)
            assert size["documents"] == len(texts) and size["bytes"] == sum(
                len(t.encode()) for t in texts
            )
            assert size["tokens"] == len(data.tokens(domain, split))


def test_bins_equal_what_the_tokenizers_library_encodes(data):
    oracle = tokenizers.Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    ids = [
        i
        for text in documents_of(data, "code", "val")
        for i in [*oracle.encode(text, add_special_tokens=False).ids, 0]
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
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (
        tmp_path / "2" / "tokenizer.json"
    ).read_bytes()


def test_formats_folders_and_globs_read_the_same_documents(tmp_path):
    texts = made_documents("prose", 90)
    plain, packed, folder = (
        write_jsonl(tmp_path / "p.jsonl", texts),
        tmp_path / "z.jsonl.gz",
        tmp_path / "texts",
    )
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
    records = [
        {"body": {"text": t}, "meta": {"set": name}}
        for d, name in names.items()
        for t in made_documents(d, 80)
    ]
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
    sources = {
        d: [write_jsonl(tmp_path / f"{d}.jsonl", made_documents(d, 200))] for d in ("prose", "sums")
    }
    made = prepared(tmp_path / "d", sources, limit_tokens=3000)
    for d in made.domains:
        assert 3000 <= sum(made.size(d, s)["tokens"] for s in SPLITS) < 3400


def test_a_failed_run_leaves_what_was_there(tmp_path, script):
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 80))
    argv = ["prepare", "--out", tmp_path / "d", "--workers", 1]
    fractions = ["--val-fraction", 0.2, "--test-fraction", 0.2]
    assert script(*argv, f"a={source}", "--tokenizer", "train:300", *fractions)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    assert script(*argv, f"a={source}", "--tokenizer", "train:300")[0] == 2  # exists
    source.write_text(source.read_text() + "{broken\n")
    status, _, err = script(*argv, "--add", f"b={source}")
    assert status == 2 and f"{source}:81" in err
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "d"]


def test_a_limit_hides_what_comes_after_it_whatever_the_number_of_workers(tmp_path):
    """A bad line beyond the limit, read ahead of time by many workers, is no error."""
    lines = [
        json.dumps({"text": f"{i} {t}" * 20})
        for i in range(12)
        for t in made_documents("prose", 100, i)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{bad"]))
    for workers in ("1", "2", "3"):
        argv = [f"a={tmp_path / 'a.jsonl'}", "--limit-tokens", 300_000, "--workers", workers]
        done = prepare_command(tmp_path / workers, *argv)
        assert done.returncode == 0, done.stderr
    assert Data(tmp_path / "1").meta == Data(tmp_path / "2").meta == Data(tmp_path / "3").meta


def test_batches_are_bounded_where_documents_hold_nothing():
    """A small file may have millions of empty documents and of duplicates."""
    documents = [("a", ""), ("a", "the same")] * 100_000
    batches = list(prepare_module.place(documents, {"val": 0.1, "test": 0.1}, None))
    assert sum(map(len, batches)) == 200_000 and max(map(len, batches)) < 20_000


def test_a_name_with_txt_in_the_middle_is_no_text_file(tmp_path):
    texts = made_documents("prose", 90)
    made = [
        prepared(tmp_path / f"{i}", {"a": [write_jsonl(tmp_path / name, texts)]})
        for i, name in enumerate(("a.jsonl", "a.txt.jsonl"))
    ]
    assert made[0].meta["files"] == made[1].meta["files"]


def test_reading_prepared_data_does_not_import_torch():
    code = "import sys, prepare; assert not {'torch', 'model', 'tokenizers', 'tqdm', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_sample_is_real_text_in_five_domains_with_little_overlap(tmp_path):
    made = subprocess.run(
        [sys.executable, ROOT / "prepare.py", "--out", tmp_path / "sample"],
        check=True,
        capture_output=True,
        text=True,
    )
    sample = Data(tmp_path / "sample")
    assert (
        sample.domains == ["cpp", "docstrings", "manual", "python", "stubs"]
        and sample.vocab_size == 4096
    )
    assert "13-grams" in made.stdout and max(sample.meta["overlap"].values()) < 0.2
    total = {d: sum(sample.size(d, s)["bytes"] for s in SPLITS) for d in sample.domains}
    assert (
        min(total[d] for d in ("cpp", "docstrings", "python", "stubs")) > 1_000_000
        and total["manual"] > 300_000
    )
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


def prepare_command(out, *argv, **kwargs):
    """prepare.py as a user runs it, with enough documents in every split."""
    fractions = ["--val-fraction", 0.2, "--test-fraction", 0.2]
    tokenizer = [] if "--add" in argv or "--tokenizer" in argv else ["--tokenizer", "train:300"]
    return command(
        "prepare.py",
        "--out",
        out,
        *tokenizer,
        *([] if "--add" in argv else fractions),
        *argv,
        **kwargs,
    )


def made_of(text: str, pack: str) -> bytes:
    """Text as bytes, packed in one of the ways that files are; twice: in two members or frames."""
    half = len(text) // 2
    parts = [text[:half].encode(), text[half:].encode()]
    if pack == "gz":
        return b"".join(map(gzip.compress, parts))
    if pack == "zst":
        packer = zstandard.ZstdCompressor().compressobj()  # a frame that does not tell its size
        return (
            zstandard.ZstdCompressor().compress(parts[0])
            + packer.compress(parts[1])
            + packer.flush()
        )
    return text.encode()


@pytest.mark.parametrize("pack", ["gz", "zst"])
def test_packed_files_hold_the_same_documents(tmp_path, pack):
    plain = write_jsonl(tmp_path / "p.jsonl", made_documents("prose", 90))
    (tmp_path / f"p.jsonl.{pack}").write_bytes(made_of(plain.read_text(), pack))
    want = prepared(tmp_path / "1", {"a": [plain]}).meta["files"]
    assert prepared(tmp_path / "2", {"a": [tmp_path / f"p.jsonl.{pack}"]}).meta["files"] == want


def test_parquet_holds_the_same_documents(tmp_path):
    texts = {d: made_documents(d, 150) for d in ("prose", "sums")}
    plain = [write_jsonl(tmp_path / f"{d}.jsonl", texts[d]) for d in texts]
    rows = [
        {"text": t, "meta": {"set": d, "n": i}, "more": b"x"}
        for d in texts
        for i, t in enumerate(texts[d])
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "all.parquet", row_group_size=100
    )
    want = prepared(tmp_path / "1", {"prose": [plain[0]], "sums": [plain[1]]})
    made = prepared(tmp_path / "2", {None: [tmp_path / "all.parquet"]}, domain_key="meta.set")
    assert made.meta["files"] == want.meta["files"]


@pytest.mark.parametrize("name, missing", [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_format_whose_library_is_missing_names_it(script, tmp_path, monkeypatch, name, missing):
    if missing == "zstandard" and sys.version_info >= (3, 14):
        pytest.skip("this Python unpacks .zst by itself")
    (tmp_path / name).write_bytes(b"x")
    for module in list(sys.modules):
        if module.partition(".")[0] == missing:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    argv = [
        "--out",
        tmp_path / "d",
        f"a={tmp_path / name}",
        "--tokenizer",
        "train:300",
        "--workers",
        1,
    ]
    status, _, err = script("prepare", *argv)
    assert status == 2 and f"pip install {missing}" in err and name in err, err


def test_names_of_domains_that_would_be_the_same_file_are_an_error(script, tmp_path):
    records = [
        {"text": t, "set": d}
        for d in ("Stack Exchange", "stack/exchange")
        for t in made_documents(d, 60)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    argv = [
        "--out",
        tmp_path / "d",
        tmp_path / "a.jsonl",
        "--domain-key",
        "set",
        "--tokenizer",
        "train:300",
    ]
    status, _, err = script("prepare", *argv)
    assert (
        status == 2
        and "'Stack Exchange'" in err
        and "'stack/exchange'" in err
        and not (tmp_path / "d").exists()
    )


def test_bad_lines_are_counted_where_some_are_allowed(tmp_path):
    texts = made_documents("sums", 100)
    lines = [json.dumps({"text": t}) for t in texts]
    for at, bad in (
        (3, "{"),
        (50, '{"text": null}'),
        (60, '"just a string"'),
        (90, '{"text": "\\ud800"}'),
    ):
        lines.insert(at, bad)
    (tmp_path / "a.jsonl").write_text(
        "\n".join([*lines, json.dumps({"text": texts[5]}), '{"text": ""}'])
    )
    source = f"a={tmp_path / 'a.jsonl'}"
    assert prepare_command(tmp_path / "d", source, "--max-bad", 3).returncode == 2
    done = prepare_command(tmp_path / "d", source, "--max-bad", 4)
    assert (
        done.returncode == 0
        and "4 bad" in done.stdout
        and "1 duplicate" in done.stdout
        and "1 empty" in done.stdout
    )
    made = Data(tmp_path / "d")
    assert made.meta["left_out"] == {"bad": 4, "duplicate": 1, "empty": 1}
    assert sorted(t for s in SPLITS for t in documents_of(made, "a", s)) == sorted(texts)


def test_a_domain_is_added_as_if_it_had_been_there_from_the_start(tmp_path, script):
    for d in ("code", "prose", "sums"):
        write_jsonl(tmp_path / f"{d}.jsonl", made_documents(d, 120))
    sources = {d: f"{d}={tmp_path / d}.jsonl" for d in ("code", "prose", "sums")}
    assert prepare_command(tmp_path / "two", sources["code"], sources["sums"]).returncode == 0
    at_once = prepare_command(
        tmp_path / "three", *sources.values(), "--tokenizer", tmp_path / "two" / "tokenizer.json"
    )
    assert at_once.returncode == 0, at_once.stderr
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "two").iterdir()}
    done = prepare_command(tmp_path / "two", "--add", sources["prose"])
    assert done.returncode == 0, done.stderr
    two, three = Data(tmp_path / "two"), Data(tmp_path / "three")
    assert two.meta == three.meta and two.identity == three.identity
    changed = [
        p.name for p in (tmp_path / "two").iterdir() if before.get(p.name) != p.stat().st_mtime_ns
    ]
    assert sorted(changed) == ["meta.json", "prose.test.bin", "prose.train.bin", "prose.val.bin"]
    for argv in (
        ["--add", sources["prose"]],
        ["--add", sources["prose"], "--tokenizer", "train:300"],
    ):
        assert prepare_command(tmp_path / "two", *argv).returncode == 2
    assert Data(tmp_path / "two").meta == three.meta and not list(tmp_path.glob(".*"))


def test_two_processes_may_add_at_the_same_time(tmp_path):
    for d in ("code", "prose", "sums"):
        write_jsonl(tmp_path / f"{d}.jsonl", made_documents(d, 300))
    assert prepare_command(tmp_path / "d", f"code={tmp_path}/code.jsonl").returncode == 0
    argv = [sys.executable, ROOT / "prepare.py", "--out", tmp_path / "d", "--add", "--workers", "1"]
    running = [subprocess.Popen([*argv, f"{d}={tmp_path}/{d}.jsonl"]) for d in ("prose", "sums")]
    assert [process.wait() for process in running] == [0, 0]
    assert Data(tmp_path / "d").domains == ["code", "prose", "sums"]


def test_killed_half_way_nothing_looks_like_data_and_a_second_run_succeeds(tmp_path):
    source = write_jsonl(
        tmp_path / "a.jsonl",
        [f"{i} {t}" for i in range(300) for t in made_documents("code", 60, i)],
    )
    (tmp_path / "t").mkdir()
    first = prepare_command(tmp_path / "t" / "d", f"a={source}", "--limit-tokens", 20_000)
    assert first.returncode == 0, first.stderr
    tokenizer = (tmp_path / "t" / "d" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    shutil.rmtree(tmp_path / "t")
    argv = [sys.executable, ROOT / "prepare.py", "--out", tmp_path / "t" / "d", f"a={source}"]
    argv += ["--tokenizer", tokenizer, "--workers", "2"]
    process = subprocess.Popen(argv)
    while not (bins := list(tmp_path.glob("t/.*/a.train.bin"))) or not bins[0].stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    process.kill()
    process.wait()
    with pytest.raises(InputError):
        Data(tmp_path / "t" / "d")
    assert not list(tmp_path.glob("t/.*/meta.json"))
    for _ in range(100):  # the workers end, too
        if not any(os.path.exists(f"/proc/{pid}/fd/0") for pid in children.stdout.split()):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("workers outlive the process that started them")
    subprocess.run(argv, check=True, capture_output=True)
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["d"] and Data(
        tmp_path / "t" / "d"
    ).domains == ["a"]


MEASURE = """
import resource, sys
sys.path.insert(0, {root!r})
import prepare
sys.argv = ["prepare.py", *sys.argv[1:]]
if __name__ == "__main__":
    prepare.cli(prepare.main)
    assert "torch" not in sys.modules
    own = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(tmp_path, *argv) -> list[int]:
    """MB at most, of the process and of the largest of its workers."""
    (tmp_path / "measure.py").write_text(MEASURE.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, tmp_path / "measure.py", *map(str, argv)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [int(kb) // 1024 for kb in done.stdout.splitlines()[-1].split()]


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="memory is measured as Linux tells it"
)
def test_memory_does_not_grow_with_the_input(tmp_path):
    """Eight times as much text takes about as much memory; torch is not imported."""
    peaks = []
    for n in (5, 40):  # about 1 MB each
        with open(tmp_path / f"{n}.jsonl", "w") as f:
            for i in range(n):
                f.writelines(
                    json.dumps({"text": f"{i} {t}" * 20}) + "\n"
                    for t in made_documents("prose", 120, i)
                )
        argv = [
            "--out",
            tmp_path / str(n),
            f"a={tmp_path / f'{n}.jsonl'}",
            "--tokenizer",
            "train:400",
        ]
        peaks.append(peak_memory(tmp_path, *argv, "--workers", 2))
    assert (tmp_path / "40.jsonl").stat().st_size > 35e6
    assert max(peaks[1]) < 300 and max(peaks[1]) < max(peaks[0]) + 60, peaks


def test_a_document_takes_eight_bytes_of_what_is_remembered(monkeypatch):
    """Hashes go from a set of bounded size into an array, and duplicates are told by both."""
    monkeypatch.setattr(prepare_module, "RECENT", 100)
    rng = random.Random(0)
    texts = [f"document {rng.randrange(5000)}" for _ in range(9000)]
    stop = [("a", "x" * prepare_module.BLOCK)]
    placed = prepare_module.place(
        iter([("a", t) for t in texts] + stop), {"val": 0.1, "test": 0.1}, None
    )
    kept = [text for _, split, text in next(placed) if split in SPLITS]
    assert kept[:-1] == list(dict.fromkeys(texts))
    ((recent, older),) = placed.gi_frame.f_locals["seen"].values()
    assert len(recent) < 100 and older.dtype.itemsize == 8
    assert len(kept) - 100 <= len(older) <= len(kept)
