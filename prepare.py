"""Text in, token bins out: one raw uint16 file per domain and split, and the classes that read them back.

    python prepare.py                                      # data/sample, from text that pip already installed; seconds
    python prepare.py --out data/mine arxiv=papers/ web='crawl/*.jsonl.gz' --tokenizer train:4096
    python prepare.py --out data/pile pile/val.jsonl.zst --domain-key meta.pile_set_name --tokenizer pythia-70m
"""
import argparse
import ast
import contextlib
import fcntl
import functools
import glob
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import unicodedata
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np

FORMAT, CHUNK = 1, 2**24  # of meta.json and the bins beside it; bytes of a bin that have a hash of their own there
SPLITS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
TXT = (".txt", ".txt.gz", ".txt.zst")  # a file of these is one document
SAMPLE = "data/sample"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BLOCK, LONGEST, RECENT = 2**20, 2**24, 2**18  # bytes of text a worker gets at a time; of a document; hashes in a set


class InputError(Exception):
    """What the user gave cannot be used; the message is one line: what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):  # with one-line errors
    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise InputError(f"{message} (python {self.prog} --help lists the options)")


def cli(main, way_on: str = "") -> None:
    """Run a script's main function; bad input ends in one line on stderr and exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"\ninterrupted{way_on}", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError, UnicodeError, BrokenExecutor) as e:
        message = f"{e}{way_on * isinstance(e, OSError)}"
        message = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else message
        print("error:", " ".join(message.split()), file=sys.stderr)  # one line, whatever a library said
        sys.exit(2)


def hold(lock: Path, folder: Path):
    """Open and lock a file: no other process works in `folder` until it is closed or this one ends, however it does."""
    file = open(lock, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is at work there; let it end, or choose another --out") from None
    return file


def hub_folder(name: str, patterns: list[str], kind: str = "model") -> Path:
    """The folder of the hub's cache, named by the commit, with the files of `pythia-70m` or `ORG/NAME@REVISION` that
    match. Raises InputError, for an unknown size of Pythia without asking a network."""
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r".*/.*|pythia-(14m|31m|70m|160m|410m|1b|1\.4b|2\.8b|6\.9b|12b)(-deduped)?", repo):
        raise InputError(f"{name}: no such folder, and no such model; a name on the hub is ORG/NAME or pythia-70m")
    repo = repo if "/" in repo else f"EleutherAI/{repo}"
    from huggingface_hub import logging, snapshot_download
    logging.set_verbosity_error()
    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision or None, allow_patterns=patterns))
    except Exception as e:  # of several libraries: a connection cut, a name that is none, a disk that is full
        raise InputError(f"{name}: no such folder, and not to be had from the hub ({str(e)[:200]})") from None


class Tokenizer:
    """A tokenizer.json (a file, in a model's folder, or of a model on the hub): text to uint16 ids and back. Special
    tokens that occur in the text are plain text. Raises InputError, and OSError where there is no such file."""

    def __init__(self, file_or_name: str | Path):
        import tokenizers
        path, named = Path(file_or_name), not str(file_or_name).endswith(".json")
        path = path if path.exists() or not named else hub_folder(str(file_or_name), ["tokenizer.json"])
        path = path / "tokenizer.json" if path.is_dir() else path
        self.json = path.read_text(encoding="utf-8", errors="replace")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except BaseException as e:  # a panic of the library's Rust is not an Exception
            raise InputError(f"{path}: not a tokenizer.json ({str(e)[:100]})") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocab = self._tokenizer.get_vocab()
        vocab_size, self.end_of_text = 1 + max(vocab.values(), default=0), vocab.get(END_OF_TEXT)
        if self.end_of_text is None or vocab_size > 2**16:
            raise InputError(f"{path}: {vocab_size:,} tokens; expected {END_OF_TEXT}, and at most 65,536 to fit uint16")
        sha256 = hashlib.sha256(self.json.encode()).hexdigest()
        self.meta = {"sha256": sha256, "vocab_size": vocab_size, "end_of_text": self.end_of_text}

    def encode(self, text: str) -> np.ndarray:
        """(n,) uint16, without an end-of-text id. Raises UnicodeEncodeError for a lone surrogate, which is not text."""
        text.encode()
        if not hasattr(self, "_fast"):  # made when it is needed, for it takes a moment
            self._fast = rank_encoding(json.loads(self.json), self._tokenizer)
        if self._fast is None or len(text) > 10**5 and re.search(r"\s{100000}", text):  # on which tiktoken panics
            return np.array(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint16)
        if self._tokenizer.normalizer and not unicodedata.is_normalized("NFC", text):
            text = self._tokenizer.normalizer.normalize_str(text)
        encode = self._fast.encode_ordinary if len(text) < 10**6 else self._fast.encode_to_numpy  # faster; smaller
        return np.array(encode(text), dtype=np.uint16)

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def rank_encoding(spec: dict, tokenizer):
    """The tiktoken encoder with the same ids as a byte-level BPE, of the tokenizer.json `spec`; None for all others.

    tiktoken joins the neighbours that make the token of lowest id; `tokenizers` those whose merge comes first. It is
    the same if ids are in the order of merges, each making a new token of older ones, and every token encodes to
    itself: two neighbours that could make it are then those of its merge, for alone it has no other last step.
    """
    import tiktoken
    from tokenizers.pre_tokenizers import ByteLevel
    try:
        vocab, merges, pre = spec["model"].pop("vocab"), spec["model"].pop("merges"), spec["pre_tokenizer"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        made = [vocab[a + b] for a, b in merges]
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        runs = [token["content"] * token["normalized"] for token in spec["added_tokens"] if not token["special"]]
        alphabet = sorted(ByteLevel.alphabet())  # printable bytes as themselves, then the others from U+0100 on
        printable = [ord(c) for c in alphabet if ord(c) < 256]
        byte = dict(zip(alphabet, printable + sorted(set(range(256)) - set(printable))))
        ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items() if token not in special}
        ranks |= {run.encode(): tokenizer.token_to_id(run) for run in runs}
        known = (
            {key: value for key, value in spec["model"].items() if value} == {"type": "BPE"}
            and spec["normalizer"] in (None, {"type": "NFC"})
            and (pre["type"], pre["add_prefix_space"], pre.get("use_regex", True)) == ("ByteLevel", False, True)
            and sorted(runs) == [" " * n for n in range(2, len(runs) + 2)] and len({*ranks.values()}) == len(ranks)
            and not any(token[key] for token in spec["added_tokens"] for key in ("lstrip", "rstrip", "single_word"))
            and all(older < newer for older, newer in zip(made, made[1:]))
            and all(max(vocab[a], vocab[b]) < vocab[a + b] for a, b in merges)
            and all(bytes([b]) in ranks for b in (*range(0xC0), *range(0xC2, 0xF5)))  # all that UTF-8 uses
            and all(([t.id for t in tokenizer.model.tokenize(token)] == [i]) != (token in special)
                    for token, i in vocab.items()))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    space = r"(?:[^\S ]| (?! ))" if runs else r"\s"  # runs of spaces are tokens of their own
    pattern = (rf" {{2,{len(runs) + 1}}}|" if runs else "") + (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|" rf"{space}+(?!\S)|{space}+")
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}) if known else None


class Data:
    """A folder that prepare.py wrote. Raises InputError if it is not one, or a bin is missing or has another length."""

    def __init__(self, folder: str | Path):
        self.folder, path = Path(folder), Path(folder, "meta.json")
        if not path.is_file():
            raise InputError(f"{folder}: not a data set (no meta.json); prepare.py --out {folder} makes one")
        try:
            self.meta = json.loads(path.read_bytes())
            files = self.meta["files"] if self.meta["format"] == FORMAT else None  # which has no items
            self.vocab_size = int(self.meta["tokenizer"]["vocab_size"])
            self.domains = sorted({name.rpartition(".")[0] for name in files})
            hashes = [(n, files[n]["sha256"]) for n in sorted(f"{d}.{s}" for d in self.domains for s in SPLITS)]
            sizes = {self.folder / f"{name}.bin": 2 * int(file["tokens"]) for name, file in files.items()}
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
            raise InputError(f"{path}: damaged, or not of format {FORMAT}; prepare the data again") from None
        for path, size in sizes.items():
            if not path.is_file() or path.stat().st_size != size:
                raise InputError(f"{path}: missing, or not of {size:,} bytes; prepare the data again")
        self.identity = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]  # changes when any token does

    def tokens(self, domain: str, split: str) -> np.memmap:
        """The domain's documents one after the other, each ended by the end-of-text id: (n,) uint16, read-only."""
        return np.memmap(self.folder / f"{domain}.{split}.bin", dtype="<u2", mode="r")

    def size(self, domain: str, split: str) -> dict:
        """The split's number of documents, tokens and UTF-8 bytes of text, and its sha256."""
        return self.meta["files"][f"{domain}.{split}"]


def source_files(source: str) -> list[Path]:
    """The files behind a path, a folder (all that is readable below it), a glob or hf://datasets/ORG/NAME/GLOB@REV."""
    place = f"{glob.escape(source)}/**" if Path(source).is_dir() else source
    if hub := re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)/([^@]+)(@[^@]+)?", source):
        place = f"{glob.escape(str(hub_folder(hub[1] + (hub[3] or ''), [hub[2]], 'dataset')))}/{hub[2]}"
    readable = re.compile(r".*(\.(txt|jsonl?)(\.gz|\.zst)?|\.parquet)", re.DOTALL)
    files = sorted(map(Path, filter(readable.fullmatch, glob.glob(place, recursive=True))))
    if not files:
        raise InputError(f"{source}: no file there that ends in .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
    return files


def unpack(file):
    """Yield what an open .zst holds, a BLOCK at a time. Raises EOFError if it is cut short."""
    from zstandard import ZstdDecompressor
    stream, packed, buffer = ZstdDecompressor().decompressobj(), b"", bytearray()
    while packed := packed or file.read(2**9):  # little at a time, for zstd packs up to 2^15 to one
        stream = ZstdDecompressor().decompressobj() if stream.eof else stream
        buffer += stream.decompress(packed)
        packed = stream.unused_data if stream.eof else b""
        while len(buffer) >= BLOCK:
            yield bytes(buffer[:BLOCK])
            del buffer[:BLOCK]
    if not stream.eof:
        raise EOFError("it is cut short")
    yield bytes(buffer)


def records(path: Path, file, keys: list[str]):
    """Yield the lines of an open file, of which a .txt has one, as bytes, and the rows of a .parquet as dicts."""
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile
            for batch in ParquetFile(file).iter_batches(16, columns=keys):
                yield from batch.to_pylist()
            return
        file, rest = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file, b""
        for piece in unpack(file) if path.suffix == ".zst" else iter(lambda: file.read(BLOCK), b""):
            *lines, rest = [rest + piece] if path.name.endswith(TXT) else (rest + piece).split(b"\n")
            yield from lines
            rest = rest[:LONGEST + 1]  # more of it makes no document
        yield rest
    except Exception as e:  # of many libraries
        way_out = f"pip install {e.name}" if isinstance(e, ImportError) else "get it again"
        raise InputError(f"{path}: cannot be read to its end: {str(e)[:200]}; {way_out}") from None


def read(sources: dict[str | None, list[Path]], text_key: str, domain_key: str | None, full=()):
    """Yield (domain, text) for every document of {domain: files}, or of {None: files} with a domain_key, while a bar
    counts bytes; for a line without one (domain, InputError). Domains in `full` are read no further."""
    from tqdm import tqdm, utils
    files = [(domain, path) for domain, paths in sources.items() for path in paths]
    keys, size = [text_key, *filter(None, [domain_key])], sum(path.stat().st_size for _, path in files)
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for domain, path in files:
            with open(path, "rb") as file:
                lines = enumerate(records(path, utils.CallbackIOWrapper(bar.update, file, "read"), keys), 1)
                for number, line in itertools.takewhile(lambda _: domain not in full, lines):
                    if isinstance(line, bytes) and not line.strip():
                        continue
                    try:
                        if len(line) > LONGEST:
                            raise ValueError(f"longer than {LONGEST:,} bytes")
                        if isinstance(line, bytes):
                            line = line.decode("utf-8-sig" if number == 1 else "utf-8")
                            line = {text_key: line} if path.name.endswith(TXT) else json.loads(line)
                        found = [line.get(key) or functools.reduce(dict.get, key.split("."), line) for key in keys]
                        "".join(found).encode()  # fails if they are no strings, or hold a lone surrogate
                        yield found[1] if domain_key else domain, found[0]
                    except (ValueError, TypeError, AttributeError, RecursionError) as e:
                        what = f"no text under {' or domain under '.join(map(repr, keys))} ({type(e).__name__}: {e})"
                        yield domain, InputError(f"{path}:{number}: {what[:300]}; --max-bad N lets N such lines pass")


def hash_and_split(text: str, val: float, test: float) -> tuple[int, str]:
    """64 bits of the text alone, which tell exact duplicates, and the split that they put it in."""
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[8:], "little")
    return key, "test" if key / 2**64 < test else "val" if key / 2**64 < test + val else "train"


def sample_texts(domain: str):
    """Yield the documents of a sample domain, from files that every installation of the requirements has; files are
    cut, at blank lines before unindented ones, into pieces of about 4096 characters."""
    if domain == "manual":
        from pydoc_data.topics import topics
        texts = [topics[name] for name in sorted(topics)]
    else:
        folders, pattern = {"cpp": ("torch/include", "*.h"), "docstrings": ("numpy torch", "*.py"),
                            "python": ("argparse", "*.py"), "stubs": ("numpy torch matplotlib", "*.pyi")}[domain]
        folders = [Path(find_spec(f.partition("/")[0]).origin).parent / f.partition("/")[2] for f in folders.split()]
        files = [(n, path.relative_to(f).as_posix()) for n, f in enumerate(folders) for path in f.rglob(pattern)]
        files.sort(key=lambda file: (file[0], hashlib.sha256(file[1].encode()).digest()))  # mixed, everywhere alike
        texts = ((folders[n] / name).read_text(encoding="utf-8", errors="ignore") for n, name in files
                 if not re.match("site-packages|pydoc_data", name))  # not the library's own; the manual once more
    for text in texts:
        if domain == "docstrings":
            with contextlib.suppress(SyntaxError):  # of a newer Python
                documented = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
                yield from filter(None, map(ast.get_docstring, documented))
            continue
        piece = ""
        for block in re.split(r"(?<=\n)\n+(?=\S)", text):
            if piece and len(piece) + len(block) > 4096:
                yield piece
                piece = ""
            piece += ("\n" if piece else "") + block
        yield piece


def make_sample(fractions: dict[str, float], max_bytes: int = 4_000_000) -> tuple[list, dict[str, float]]:
    """The sample's (domain, text) pairs, less near-duplicates, half of whose 13-grams of words or more stood in earlier
    texts; and for each domain the share of its test split's distinct 13-grams that its train split has too."""
    from tqdm import tqdm
    documents, overlap = [], {}
    for domain in tqdm(("cpp", "docstrings", "manual", "python", "stubs"), "sample", disable=None, leave=False):
        seen, in_split, size = set(), {split: set() for split in SPLITS}, 0
        for text in sample_texts(domain):
            words = re.findall(r"\w+", text)
            grams = {hash(tuple(words[i:i + 13])) for i in range(len(words) - 12)}
            if len(text) >= 200 and len(grams & seen) <= len(grams) / 2:
                seen |= grams
                in_split[hash_and_split(text, **fractions)[1]] |= grams
                documents.append((domain, text))
                size += len(text.encode())
                if size > max_bytes:
                    break
        overlap[domain] = len(in_split["test"] & in_split["train"]) / max(1, len(in_split["test"]))
    return documents, overlap


def place(documents, fractions: dict[str, float], domain_key: str | None):
    """Yield lists, about a BLOCK of text each, of (domain, split, text) for all (label, text). A bad or empty document
    and an exact duplicate in a domain has that word for its split. Of each, 8 bytes are remembered."""
    batch, size, labels, seen = [], 0, {}, {}
    for label, text in documents:
        if isinstance(text, InputError):
            domain, split, text = label, "bad", str(text)
        else:
            domain = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_") if domain_key else label
            if not re.fullmatch(r"(?!(mean|improved|worst)$)[A-Za-z0-9][A-Za-z0-9_-]{0,99}", domain):
                raise InputError(f"{label[:100]!r} cannot be a domain; use A-Z a-z 0-9 - _ (not mean, improved, worst)")
            if labels.setdefault(domain, label) != label:
                raise InputError(f"{labels[domain]!r} and {label!r} would both be called {domain}; rename one of them")
            key, split = hash_and_split(text, **fractions)
            recent, older = seen.setdefault(domain, (set(), np.empty(0, dtype=np.uint64)))
            at = np.searchsorted(older, np.uint64(key))
            if not text or key in recent or key in older[at:at + 1]:
                split, text = "duplicate" if text else "empty", ""
            recent.add(key)
            if len(recent) >= RECENT:
                seen[domain] = set(), np.union1d(older, np.fromiter(recent, dtype=np.uint64))
        batch.append((domain, split, text))
        size += len(text) + 100  # for an empty one takes memory too
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def encode(batch: list[tuple[str, str, str]]) -> list[tuple]:
    """(domain, split, text as it is or, of one that goes into a bin, its number of bytes and its tokens)."""
    end = np.uint16(encode.tokenizer.end_of_text)
    return [(domain, split, len(text.encode()), np.append(encode.tokenizer.encode(text), end).astype("<u2").tobytes())
            if split in SPLITS else (domain, split, text, b"") for domain, split, text in batch]


def start_worker(tokenizer: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, whose end ends it
    encode.tokenizer = Tokenizer(tokenizer)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def encode_all(batches, workers: int, tokenizer: Path):
    """map(encode, batches) by several processes, of which each has a few waiting, so that memory stays bounded."""
    if workers <= 1:
        yield from map(encode, batches)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (tokenizer,)) as pool:
        waiting = deque(pool.submit(encode, batch) for batch in itertools.islice(batches, 3 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(encode, batch) for batch in itertools.islice(batches, 1))


def write_bins(folder: Path, encoded, named: list[str], limit_tokens: int | None, max_bad: int, full: set) -> tuple:
    """Write documents to folder/DOMAIN.SPLIT.bin; returns what meta.json says of each file, and how many were left out
    and why. A domain that has its limit_tokens goes into `full`. Raises InputError if a file stays empty."""
    files, bins, left_out = {}, {}, Counter()
    with contextlib.ExitStack() as stack:
        for domain, split, size, tokens in itertools.chain.from_iterable(encoded):
            if domain in full or split not in SPLITS:
                left_out[split] += domain not in full
                if left_out["bad"] > max_bad:
                    raise InputError(size)
                continue
            if f"{domain}.{split}" not in files:
                for name in (f"{domain}.{s}" for s in SPLITS):
                    files[name] = Counter()
                    bins[name] = stack.enter_context(open(folder / f"{name}.bin", "wb"))
            bins[f"{domain}.{split}"].write(tokens)
            files[f"{domain}.{split}"].update(documents=1, tokens=len(tokens) // 2, bytes=size)
            if limit_tokens and sum(files[f"{domain}.{s}"]["tokens"] for s in SPLITS) >= limit_tokens:
                full.add(domain)
    for name in [*files, *(f"{domain}.train" for domain in named)] or ["every split"]:
        if name not in files or not files[name]["documents"]:
            n = sum(files[other]["documents"] for other in files if other.rpartition(".")[0] == name.rpartition(".")[0])
            raise InputError(f"{name} is left empty, of {n} documents; add some, or raise --val- and --test-fraction")
    for name, file in files.items():
        content = np.memmap(folder / f"{name}.bin", np.uint8, "r")
        file["sha256"] = hashlib.sha256(content).hexdigest()
        file["chunks"] = [hashlib.sha256(content[i:i + CHUNK]).hexdigest()[:16] for i in range(0, len(content), CHUNK)]
    return files, +left_out


def prepare(out: str | Path, sources: dict[str | None, list[Path]] | None = None, tokenizer: str = "train:4096",
            text_key: str = "text", domain_key: str | None = None, val_fraction: float | None = None,
            test_fraction: float | None = None, limit_tokens: int | None = None, max_bad: int = 0, workers: int = 1,
            add: bool = False) -> Data:
    """Write a data set to the folder `out`, or add domains to the one there. Raises InputError. sources: {domain:
    files}, or {None: files} with a domain_key, under which each record names its domain; None is the sample."""
    out, full, share = Path(out).resolve(), set(), 0.05 if sources else 0.1  # the sample is small
    if out.exists() != add:
        raise InputError(f"{out} {'is not there to add to' if add else 'exists; choose another --out, or --add to it'}")
    fractions = {s: share if f is None else f for s, f in (("val", val_fraction), ("test", test_fraction))}
    fractions = Data(out).meta.get("fractions", fractions) if add else fractions
    vocabulary = re.fullmatch(r"train:(\d{1,9})", tokenizer) if not add else None
    if vocabulary and not 257 <= int(vocabulary[1]) <= 2**16:
        raise InputError(f"--tokenizer {tokenizer}: the vocabulary must have 257 to 65,536 tokens")
    if min(fractions.values()) <= 0 or sum(fractions.values()) >= 1:
        raise InputError(f"--val-fraction {val_fraction} --test-fraction {test_fraction}: every split needs a share")
    sample, overlap = ([], {}) if sources else make_sample(fractions)
    stage = out.with_name(f".{out.name}-{hashlib.sha256(repr((sources, domain_key)).encode()).hexdigest()[:8]}.partial")
    stage.mkdir(parents=True, exist_ok=True)
    with hold(path := stage / "tokenizer.json", out), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, stage, ignore_errors=True)
        if vocabulary:
            from tokenizers import ByteLevelBPETokenizer
            documents = read(sources, text_key, domain_key) if sources else sample
            every = 1 + sum(path.stat().st_size for paths in (sources or {}).values() for path in paths) // 2**27
            keys = ((text, *hash_and_split(text, **fractions)) for _, text in documents if isinstance(text, str))
            texts = (text for text, key, split in keys if split == "train" and key % every == 0)  # of much text, a part
            new = ByteLevelBPETokenizer()
            new.train_from_iterator(texts, int(vocabulary[1]), 0, sys.stderr.isatty(), [END_OF_TEXT])
            new.save(str(path))
        encode.tokenizer = Tokenizer(out if add else path if vocabulary else tokenizer)
        path.write_text(encode.tokenizer.json, encoding="utf-8")
        documents = read(sources, text_key, domain_key, full) if sources else sample
        encoded = encode_all(place(documents, fractions, domain_key), workers, path)
        files, left_out = write_bins(stage, encoded, [*filter(None, sources or [])], limit_tokens, max_bad, full)
        if add:  # another process may do that, too
            fcntl.flock(stack.enter_context(open(out / path.name, "rb+")), fcntl.LOCK_EX)
        old = {"overlap": overlap, "sources": {}, "left_out": {}, "files": {}} | (Data(out).meta if add else {})
        if twice := old["files"].keys() & files.keys():
            raise InputError(f"{out} has {min(twice)} already; --add is for other domains")
        old["sources"] |= {str(d or domain_key): [*map(str, paths)] for d, paths in (sources or {}).items()}
        meta = {"format": FORMAT, "tokenizer": encode.tokenizer.meta, "fractions": fractions, **old}
        meta["left_out"] = left_out + Counter(old["left_out"])
        meta["files"] = dict(sorted((old["files"] | files).items()))
        (stage / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        os.sync()  # all that is written is on the disk before it has its name
        for name in [*(f"{name}.bin" for name in files), "meta.json"] if add else [""]:  # the folder itself
            os.rename(stage / name, out / name)
    return Data(out)


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("sources", nargs="*", metavar="name=source", help="file, folder, glob or hf://datasets/…; none: the sample")
    add("--out", default=SAMPLE, help="folder to write (default: %(default)s)")
    add("--add", action="store_true", help="add domains to the data set in --out, with its tokenizer and fractions")
    add("--tokenizer", help="a model, a tokenizer.json, or train:N to train one (the sample: train:4096)")
    add("--text-key", default="text", help="dotted key of a record's text (default: %(default)s)")
    add("--domain-key", help="dotted key of a record's domain; sources are then given without a name")
    add("--val-fraction", type=float, help="(default: 0.05; the sample: 0.1)")
    add("--test-fraction", type=float, help="likewise")
    add("--limit-tokens", type=int, metavar="N", help="stop a domain after N tokens")
    add("--max-bad", type=int, default=0, metavar="N", help="lines without a document to skip (default: %(default)s)")
    add("--workers", type=int, default=CORES, metavar="N", help="processes that tokenize (default: all cores)")
    args = parser.parse_args()
    if args.add and not args.sources or args.sources and args.add == bool(args.tokenizer):
        raise InputError("name sources, and --tokenizer (pythia-70m is Pythia's, train:4096 trains one) or --add")
    sources = {}
    for source in args.sources:
        name, equals, path = (None, "=", source) if args.domain_key else source.partition("=")
        if not equals or not path:
            raise InputError(f"{source}: expected name=path, or --domain-key for records that name their domain")
        sources.setdefault(name, []).extend(source_files(path))
    data = prepare(args.out, sources or None, args.tokenizer or "train:4096", args.text_key, args.domain_key,
                   args.val_fraction, args.test_fraction, args.limit_tokens, args.max_bad, args.workers, args.add)
    print(f"{'':<24}{'documents':>12}{'tokens':>16}{'bytes/token':>13}")
    for name, file in data.meta["files"].items():
        print(f"{name:<24}{file['documents']:>12,}{file['tokens']:>16,}{file['bytes'] / file['tokens']:>13.2f}")
    print("left out:", ", ".join(f"{n:,} {kind}" for kind, n in data.meta["left_out"].items()) or "nothing")
    if shares := ", ".join(f"{domain} {share:.0%}" for domain, share in data.meta["overlap"].items()):
        print(f"13-grams of the test split that the train split has too: {shares}")


if __name__ == "__main__":
    cli(main, "; nothing of it is kept")
