"""What a fuzzer draws: any pass keeps its promises; any damaged file is read for what it holds, or
refused in one line, in little memory.

FUZZ=100 in the environment draws a hundred times as many examples.
"""

import contextlib
import gzip
import io
import json
import os
import resource
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_rank, bins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.torch import save_file
from test_mixture import T, drawn
from test_prepare import SOURCES, TEXTS, documents_of, zstd

from model import Config, GPTNeoX, load, save
from prepare import Document, cli, parse_sources, prepare
from train import Mixture, micro_batches, sequences_of_step, times_seen


def fuzz(examples: int):
    examples *= int(os.environ.get("FUZZ", 1))
    patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    return settings(max_examples=examples, derandomize=True, database=None, **patient)


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


def outcome(call, said: list[str] | None = None):
    """What the call returns; None if it ends as a script does on bad input, which said is told."""
    result = []
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            cli(lambda: result.append(call()))
    except SystemExit as e:
        line, *more = err.getvalue().splitlines()
        assert e.code == 2 and line.startswith("error: ") and len(line.split()) > 3, line
        assert not more
        if said is not None:
            said.append(line)
        return None
    return result[0]


# ---- what is drawn ----


@st.composite
def passes(draw):
    """{domain: tokens}, counts for some of the domains, others that are no smaller, and a seed."""
    domains = st.sampled_from("abcde")
    lengths = draw(st.dictionaries(domains, st.integers(T + 1, 30 * T), min_size=1))
    counts = st.dictionaries(st.sampled_from(sorted(lengths)), st.integers(0, 50))
    some = counts.filter(lambda c: any(c.values()))
    small = draw(some)
    large = dict(Counter(small) + Counter(draw(some)))
    return lengths, small, large, draw(st.integers(0, 2**40))


PIECES = b'" \\ { } [ ] : , \0 \xff \xef\xbb\xbf \xed\xa0\x80 \\ud800 null true -1 0 NaN'.split()
PIECES += [b"{}", b'""', b"\n", b"\r\n", b"1e999", b"9" * 400, b"9" * 5000, b"[" * 100_000]
ODD = [None, True, False, 0, -1, 3, 2**64, 10**400, 0.5, float("inf"), float("nan")]
ODD += ["", "7", "I32", "a\nb", "\ud800"]
NESTED = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=4),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=2), values),
    max_leaves=3,
)
VALUES = st.sampled_from([*ODD, [], {}]) | NESTED


@st.composite
def edited(draw, content: bytes, head: int = 0) -> bytes:
    """The content after some edits: bits flipped, bytes put in, left out or copied, or cut off.

    head: the first bytes, if they are the likelier ones to be edited.
    """
    for _ in range(draw(st.integers(0, 3))):
        n = len(content)
        at = draw(st.integers(0, min(head or n, n)) | st.integers(0, n) | st.just(0))
        end = draw(st.sampled_from([at, at, at + 1, at + 1, at + 8, at + 100, n]))
        start = draw(st.integers(0, n))
        gone = content[at:end]
        flipped = st.integers(0, 7).map(lambda bit, gone=gone: bytes(b ^ 1 << bit for b in gone))
        copied = st.integers(0, 200).map(lambda n, rest=content[start:]: rest[:n])
        new = st.just(b"") | flipped | copied | st.sampled_from(PIECES) | st.binary(max_size=8)
        content = content[:at] + draw(new) + content[end:]
    return content


@st.composite
def altered(draw, content: bytes) -> bytes:
    """A JSON text with other values, or none, at a place or two, the likelier near its root."""
    tree = [json.loads(content)]
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        at = tree
        key = 0
        while at[key] and isinstance(at[key], (list, dict)) and draw(st.integers(0, 6)):
            at = at[key]
            key = draw(st.sampled_from([*at] if isinstance(at, dict) else range(len(at))))
        is_number = isinstance(at[key], (int, float))
        alike = [odd for odd in ODD if isinstance(odd, (int, float)) == is_number]
        if at is tree or draw(st.integers(0, 5)):
            at[key] = draw(st.sampled_from(alike) if draw(st.booleans()) else VALUES)
        else:
            del at[key]
    return json.dumps(tree[0]).encode()


def with_header(content: bytes, header: bytes) -> bytes:
    """A safetensors file with another header."""
    end = 8 + int.from_bytes(content[:8], "little")
    return len(header).to_bytes(8, "little") + header + content[end:]


def damaged(content: bytes, name: str):
    """A file damaged in its bytes, or in the values of its JSON."""
    if name.endswith(".json"):
        return altered(content) | edited(content, head=100) | altered(content)
    if name.endswith(".safetensors"):  # 8 bytes of length, a header, tensors
        end = 8 + int.from_bytes(content[:8], "little")
        header = altered(content[8:end]).map(lambda header: with_header(content, header))
        return header | edited(content, head=8) | edited(content, head=end)
    if name.endswith(".jsonl"):
        more = st.lists(st.sampled_from(content.splitlines()).flatmap(altered), max_size=3)
        return edited(content) | more.map(lambda lines: content + b"\n".join(lines))
    return edited(content)


@fuzz(60)
@given(passes(), st.lists(st.integers(0, 9), max_size=3))
def test_any_pass_has_its_counts_whole_epochs_least_seen_first_and_even_prefixes(drawing, seeds):
    lengths, small, large, seed = drawing
    with new_folder() as folder:
        data = bins(folder / "data", lengths)
        records = []
        seen = {d: np.zeros((n - 1) // T, dtype=int) for d, n in lengths.items()}
        for counts, other in zip((small, large, small), seeds, strict=False):
            for d, window in drawn(Mixture(data, counts, T, other, seen)):
                seen[d][window] += 1
            records.append({"data": data.identity, "seq_len": T, "seed": other, "counts": counts})
        found = times_seen(data, T, records)
        assert {d: [*n] for d, n in found.items()} == {d: [*n] for d, n in seen.items()}
        order = drawn(Mixture(data, large, T, seed, seen))
        assert Counter(drawn(Mixture(data, small, T, seed, seen))) <= Counter(order)

    assert Counter(d for d, _ in order) == {d: n for d, n in large.items() if n}
    for d in large:
        windows = [window for domain, window in order if domain == d]
        for start in range(0, len(windows), len(seen[d])):
            epoch = windows[start : start + len(seen[d])]
            assert len({*epoch}) == len(epoch)
            assert [seen[d][window] for window in epoch] == sorted(seen[d])[: len(epoch)]

    shares = {d: Fraction(n, len(order)) for d, n in large.items() if n}
    bound = max(Fraction(1, 2), Fraction(len(shares) - 1, 2))
    so_far = Counter()
    for length, (d, _) in enumerate(order, 1):
        so_far[d] += 1
        assert all(abs(so_far[d] - length * share) <= bound for d, share in shares.items())


@fuzz(60)
@given(passes(), st.integers(1, 9), st.integers(1, 20), st.integers(1, 8), st.integers(0, 9))
def test_any_world_reads_the_same_batches_from_any_step(drawing, world, batch_size, micro, first):
    lengths, _, counts, seed = drawing
    with new_folder() as folder:
        data = bins(folder / "data", lengths)
        whole, *ranks = [Mixture(data, counts, T, seed) for _ in range(1 + world)]
        rows = [tuple(whole.row(i)) for i in range(len(whole))]
        for step in range(first, -(-len(rows) // batch_size)):
            batch = sequences_of_step(step, batch_size, len(rows))
            found = []
            shapes = set()
            for rank, mixture in enumerate(ranks):
                with as_rank(rank, world):
                    parts = list(micro_batches(mixture, batch, micro))
                shapes.add(tuple(tokens.shape for tokens, _, _ in parts))
                for tokens, weights, _ in parts:
                    found += [tuple(row) for row in tokens[weights[:, 0] > 0].tolist()]
            assert sorted(found) == sorted(rows[step * batch_size : (step + 1) * batch_size])
            assert len(shapes) == 1 and {*shapes.pop()} == {(micro, T + 1)}


# ---- sources ----


WIDE = {zstd.DecompressionParameter.window_log_max: 31}
UNPACK = {
    "a.jsonl": bytes,
    "a.jsonl.gz": gzip.decompress,
    "a.jsonl.zst": lambda content: zstd.decompress(content, options=WIDE),
}


@pytest.mark.parametrize("name", [*UNPACK, "a.parquet"])
@fuzz(80)
@given(st.data())
def test_a_damaged_source_is_read_for_what_it_holds_or_refused_in_one_line(name, d):
    content = d.draw(damaged(SOURCES[name], name))
    with new_folder() as folder:
        (folder / name).write_bytes(content)
        items = outcome(lambda: documents_of({"a": [folder / name]}))
    refused = items is None or "unreadable" in [item[1] for item in items]
    assert not refused or content != SOURCES[name]
    if refused or name not in UNPACK:
        return
    texts = []
    bad = 0
    for i, line in enumerate(UNPACK[name](content).split(b"\n")):
        try:
            text = json.loads(line.decode("utf-8" if i else "utf-8-sig"))["text"]
            texts.append(text.encode().decode())
        except Exception:
            bad += bool(line.strip())
    found = [item.text for item in items if isinstance(item, Document)]
    assert found == texts
    assert [item.reason for item in items if not isinstance(item, Document)] == ["bad"] * bad


@fuzz(100)
@given(st.data())
def test_a_damaged_text_is_itself_or_no_document(d):
    content = d.draw(edited(TEXTS[-2].encode() * 3))
    with new_folder() as folder:
        (folder / "a.txt").write_bytes(content)
        [document] = documents_of({"a": [folder / "a.txt"]})
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        assert str(e) in document.message
        return
    if "\0" in text and document != ("a", text):
        assert "full of NULs" in document.message
        assert text.count("\0") * 5 > len(text)
    else:
        assert document == ("a", text)


GARBAGE = b"no such format"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
LABELS = ["a", "A", "b c", "../b", "mean", "", "\u65e5\u672c", "\ud800", 7, None, ["a"], {"a": 1}]
STEMS = [b"a", b"caf\xe9", "日本 🙂".encode(), b"[0]", b"*", b"a b", b"=", b"a\nb"]
STEMS += [b".a", b"a.", b"-"]
FOLDERS = [b"", b"", b"sub/", b"A.jsonl/", b".hidden/", b"[a]/caf\xe9/"]
KINDS = [b".jsonl", b".JSON", b".ndjson", b".txt", b".Txt", b".jsonl.gz", b".TXT.GZ"]
OTHER_KINDS = [b"", b".md", b".jsonl.bak", b".gz", b".caf\xe9"]


@st.composite
def lines(draw) -> list[bytes]:
    """Lines of which some are records, of the keys "text" and "set", and some nearly are."""
    texts = st.sampled_from(TEXTS) | st.text(max_size=4) | VALUES
    record = st.fixed_dictionaries({}, optional={"text": texts, "set": st.sampled_from(LABELS)})
    pieces = [piece for piece in PIECES if b"\n" not in piece]
    values = (record | record | VALUES).map(lambda value: json.dumps(value).encode())
    return draw(st.lists(values | st.sampled_from([b"", b" ", *pieces]), max_size=6))


@st.composite
def sources(draw) -> tuple[bytes, bytes, int | None]:
    """A file's name, its content, and how many documents it gives: None, if it cannot be read."""
    folder = draw(st.sampled_from(FOLDERS))
    kind = draw(st.sampled_from(KINDS + OTHER_KINDS))
    name = folder + draw(st.sampled_from(STEMS)) + kind
    content = b"\n".join(draw(lines()))
    content = draw(st.sampled_from([content, content, content, b"", POINTER]))
    given = sum(bool(line.strip()) for line in content.split(b"\n"))
    if kind.lower().startswith(b".txt"):
        given = 1
    if kind.lower().endswith(b".gz"):
        packed = gzip.compress(content, mtime=0)
        padded = packed + bytes(9)
        choices = [packed, packed, padded, packed + GARBAGE, GARBAGE, POINTER]
        content = draw(st.sampled_from(choices))
        if content not in (packed, padded):
            given = None
    # What a glob does not find, or has another ending, is not read.
    if kind in OTHER_KINDS or b"/." in b"/" + name:
        given = 0
    return name, content, given


@fuzz(300)
@given(st.lists(sources(), max_size=4), st.booleans(), st.booleans())
def test_any_folder_makes_a_sound_data_set_or_one_line(data, files, by_record, strict):
    """Of all that it holds; the line names its source."""
    good = [{"text": f"{i} is good", "set": "a"} for i in range(60)]
    lines = "".join(json.dumps(record) + "\n" for record in good)
    with new_folder() as folder:
        source = folder / "source"
        source.mkdir()
        (source / "good.jsonl").write_text(lines)
        given = [60]
        paths = [source]
        for name, content, documents in files:
            path = Path(os.fsdecode(os.path.join(os.fsencode(source), name)))
            with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "xb") as file:
                    file.write(content)
                paths.append(path)
                given.append(documents)

        options = {"val_fraction": 0.2, "test_fraction": 0.2, "min_documents": 9}
        options["max_bad"] = 0 if strict else 10**6
        word = str(source) if by_record else f"a={source}"
        options["domain_key"] = "set" if by_record else None
        said = []

        def make():
            found = parse_sources([word], options["domain_key"])
            return prepare(folder / "d", found, str(data.folder), **options)

        made = outcome(make, said)
        if made is None:
            names = [" ".join(str(path).split()) for path in paths]
            both = "would both be called a;" in said[0]  # "a" and "A"
            assert both or any(f"{name}:" in said[0] for name in names), said
            assert [path.name for path in folder.iterdir()] == ["source"]
            assert both or strict or None in given
        else:
            made.check()
            left_out = made.meta["left_out"]
            kept = sum(file["documents"] for file in made.meta["files"].values())
            assert kept + sum(left_out.values()) == sum(given)
            assert not (strict and "bad" in left_out)
            assert sorted(path.name for path in folder.iterdir()) == ["d", "source"]


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a small model, whole and in two shards."""
    folder = tmp_path_factory.mktemp("models")
    small = GPTNeoX(Config(12, 8, 1, 2, 12, 8, 1.0))
    save(small, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 1.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    weights = small.state_dict()
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(weights)}
    for shard in SHARDS:
        part = {name: weights[name] for name in weights if weight_map[name] == shard}
        save_file(part, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
@fuzz(120)
@given(st.data())
def test_a_damaged_model_has_the_shapes_of_its_config_or_is_refused_in_one_line(models, name, d):
    good = (models / name).read_bytes()
    content = d.draw(damaged(good, name))
    unread = "model.safetensors" if "index" in name else ""  # it would be preferred
    with new_folder() as folder:
        for path in models.iterdir():
            if path.name not in (name, unread):
                (folder / path.name).symlink_to(path)
        (folder / name).write_bytes(content)
        model = outcome(lambda: load(folder))
        assert model or content != good
        if model:
            config = json.loads((folder / "config.json").read_bytes())
            V, C, M = (config[f"{key}_size"] for key in ("vocab", "hidden", "intermediate"))
            layers = [layer.mlp.dense_h_to_4h.weight.shape for layer in model.gpt_neox.layers]
            assert layers == [(M, C)] * config["num_hidden_layers"]
            assert model.gpt_neox.embed_in.weight.shape == (V, C)
            # What fits these has its shape, too.
            assert model(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, 1, V)
