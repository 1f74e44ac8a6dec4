"""Text in, token bins out: one raw uint16 file per domain and split, and the classes that read them back.

    python prepare.py                                    # data/sample, from text that pip has already installed; seconds
    python prepare.py --out data/mine arxiv=papers/*.jsonl.gz web=crawl/ --tokenizer train:4096
    python prepare.py --out data/pile pile.jsonl --domain-key meta.pile_set_name --tokenizer pythia-70m

A folder of bins is described by its meta.json, which is there only when every bin is. Imports neither torch nor a file of ours.
"""
import argparse
import ast
import contextlib
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np

FORMAT = 1  # of meta.json and the bins beside it
SPLITS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
SAMPLE = "data/sample"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")


# ---------------------------------------------------------------- shared by all scripts

class InputError(Exception):
    """What the user gave cannot be used; the message is one line: what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise InputError(f"{message} (python {self.prog} --help lists the options)")


def cli(main) -> None:
    """Run a script's main function; bad input ends in one line on stderr and exit status 2."""
    try:
        main()
    except InputError as e:
        message = str(e)
    except OSError as e:
        if e.filename is None:  # not about a file: a defect of ours, so show where
            raise
        message = f"{e.filename}: {e.strerror}"
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume continues a run", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print("error:", message, file=sys.stderr)
    sys.exit(2)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, whatever happens meanwhile."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def new_folder(path: Path):
    """A folder to fill that becomes `path`, in the place of what was there, only when the block ends well."""
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    for leftover in (partial, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load_json(path: Path) -> dict:
    """The JSON object in a file; anything else is an InputError."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def hub_file(name: str, filename: str) -> Path | None:
    """A file of a model on the hub (`pythia-70m`, `ORG/NAME`, `ORG/NAME@REVISION`), from the cache if it is there; None if the model has no such file."""
    repo, _, revision = name.partition("@")
    if "/" not in repo:
        if repo.removesuffix("-deduped") not in {f"pythia-{size}" for size in PYTHIA_SIZES}:
            raise InputError(f"{name}: neither a folder nor a Pythia size (pythia-{', pythia-'.join(PYTHIA_SIZES)}); "
                             "a hub name is ORG/NAME")
        repo = f"EleutherAI/{repo}"
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision or None))
    except LocalEntryNotFoundError:
        raise InputError(f"{name}: {filename} is not in the cache and the hub cannot be reached") from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        raise InputError(f"{name}: cannot be had from the hub ({str(e).splitlines()[0]})") from None


# ---------------------------------------------------------------- tokens

class Tokenizer:
    """A tokenizer.json: text to uint16 ids and back. Special tokens that occur in the text are plain text.

    file_or_name: a tokenizer.json, a folder that holds one, or a model's name on the hub. Raises InputError.
    """

    def __init__(self, file_or_name: str | Path):
        import tokenizers
        path = Path(file_or_name)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            if path.suffix == ".json":
                raise InputError(f"{path}: no such tokenizer file")
            path = hub_file(str(file_or_name), "tokenizer.json")
            if path is None:
                raise InputError(f"{file_or_name}: has no tokenizer.json")
        self.json = path.read_text(encoding="utf-8", errors="replace")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the library's Rust panics are not Exceptions
            raise InputError(f"{path}: not a tokenizer.json ({str(e).splitlines()[0]})") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.sha256 = hashlib.sha256(self.json.encode()).hexdigest()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=0)
        self.end_of_text = self._tokenizer.token_to_id(END_OF_TEXT)
        if self.end_of_text is None:
            raise InputError(f"{path}: has no {END_OF_TEXT} token, which ends every document")
        if self.vocab_size > 2**16:
            raise InputError(f"{path}: {self.vocab_size:,} tokens do not fit the bins' uint16; use a tokenizer of at most 65,536")

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint16) for e in encodings]

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def train_tokenizer(texts, vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE on an iterator of texts and write its tokenizer.json; end-of-text is id 0."""
    from tokenizers import Tokenizer as Trainable, decoders, models, pre_tokenizers, trainers
    if not 257 <= vocab_size <= 2**16:
        raise InputError(f"--tokenizer train:{vocab_size}: the vocabulary must have 257 to 65,536 tokens")
    tokenizer = Trainable(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty()))
    tokenizer.save(str(path))


class Data:
    """A folder that prepare.py wrote. Raises InputError if it is not one, or a bin is missing or has another length."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise InputError(f"{self.folder}: not a data set (no meta.json); python prepare.py --out {self.folder} name=path … makes one")
        self.meta = load_json(self.folder / "meta.json")
        if self.meta.get("format") != FORMAT:
            raise InputError(f"{self.folder}/meta.json: format {self.meta.get('format')}, this program reads {FORMAT}; prepare the data again")
        for name, file in self.meta["files"].items():
            path = self.folder / f"{name}.bin"
            if not path.is_file() or path.stat().st_size != 2 * file["tokens"]:
                raise InputError(f"{path}: missing or not of the {2 * file['tokens']:,} bytes that meta.json says; prepare the data again")

    @property
    def domains(self) -> list[str]:
        return sorted({name.rpartition(".")[0] for name in self.meta["files"]})

    @property
    def vocab_size(self) -> int:
        return self.meta["tokenizer"]["vocab_size"]

    @property
    def identity(self) -> str:
        """16 hex digits that change when any token of any domain does."""
        hashes = {name: file["sha256"] for name, file in self.meta["files"].items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]

    def tokens(self, domain: str, split: str) -> np.memmap:
        """The domain's documents one after the other, each ended by the end-of-text id: (n,) uint16, read-only."""
        return np.memmap(self.folder / f"{domain}.{split}.bin", dtype="<u2", mode="r")

    def size(self, domain: str, split: str) -> dict:
        """The split's number of documents, tokens and UTF-8 bytes of text, and its sha256."""
        return self.meta["files"][f"{domain}.{split}"]


# ---------------------------------------------------------------- text

def source_files(source: str) -> list[Path]:
    """The files behind a path, a folder (everything readable below it) or a glob, sorted."""
    if Path(source).is_dir():
        files = [p for p in sorted(Path(source).rglob("*")) if p.name.endswith(SUFFIXES) and p.is_file()]
    else:
        files = [Path(p) for p in sorted(glob.glob(source, recursive=True))] or [Path(source)]
    for path in files:
        if not path.is_file():
            raise InputError(f"{source}: no such file, folder or glob")
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: unknown format; these are read: {', '.join(SUFFIXES)}")
    if not files:
        raise InputError(f"{source}: no {', '.join(SUFFIXES)} file in this folder")
    return files


def read_records(path: Path):
    """Yield (where, record) for every document of a file; where is file:line. A .txt file is one document."""
    try:
        if path.name.endswith(".txt"):
            yield str(path), {"text": path.read_bytes().decode("utf-8-sig")}
            return
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                if line.strip():
                    yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as e:
        raise InputError(f"{where if 'where' in locals() else path}: not UTF-8 (byte {e.start}); convert it first") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not a JSON record ({str(e)[:100]})") from None
    except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as e:
        raise InputError(f"{path}: not a whole gzip file ({e}); get it again") from None


def lookup(record, key: str, where: str) -> str:
    """The string at a dotted key of a record."""
    value = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise InputError(f"{where}: no string at {key!r} (--text-key and --domain-key name the keys)")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {key!r} holds a lone surrogate, which is not text; mend the record") from None
    return value


def read_sources(sources: dict[str, list[Path]], text_key: str, domain_key: str | None):
    """Yield (domain, text) for every document of every source, in order."""
    from tqdm import tqdm
    for domain, files in sources.items():
        for path in tqdm(files, desc=f"read {domain or ''}", unit="file", disable=None, leave=False):
            for where, record in read_records(path):
                if domain_key is not None:
                    domain = re.sub(r"[^a-z0-9]+", "_", lookup(record, domain_key, where).lower()).strip("_")
                yield domain, lookup(record, text_key if not path.name.endswith(".txt") else "text", where)


# ---------------------------------------------------------------- the sample

def pieces(text: str, limit: int = 4096):
    """Cut a text at blank lines followed by an unindented line, so that a large file is many documents of about `limit` characters."""
    piece = ""
    for block in re.split(r"(?<=\n)\n+(?=\S)", text):
        if piece and len(piece) + len(block) > limit:
            yield piece
            piece = ""
        piece += ("\n" if piece else "") + block
    yield piece


def sample_texts(domain: str):
    """Yield the raw documents of one sample domain, from files that every installation of the requirements has."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    library = {name: Path(importlib.util.find_spec(name).origin).parent for name in ("torch", "numpy", "matplotlib")}  # imports none of them

    def files(folder, pattern):  # in an order that mixes the folders, and is the same everywhere
        paths = [p for p in folder.rglob(pattern) if "site-packages" not in p.relative_to(folder).parts]
        return sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(folder).as_posix().encode()).digest())

    def read(paths):
        for path in paths:
            yield from pieces(path.read_text(encoding="utf-8", errors="ignore"))

    if domain == "python":
        yield from read(files(stdlib, "*.py"))
    elif domain == "cpp":
        yield from read(files(library["torch"] / "include", "*.h"))
    elif domain == "stubs":
        for folder in library.values():
            yield from read(files(folder, "*.pyi"))
    elif domain == "manual":
        from pydoc_data.topics import topics
        for name in sorted(topics):
            yield from pieces(topics[name])
    elif domain == "docstrings":
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for path in files(library["numpy"], "*.py") + files(library["torch"], "*.py"):
            with contextlib.suppress(SyntaxError):  # a test file for a newer Python
                nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore")))
                yield from filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, kinds)))


def ngrams(text: str, n: int = 13) -> set[int]:
    words = re.findall(r"\w+", text)
    return {hash(tuple(words[i:i + n])) for i in range(len(words) - n + 1)}


def without_near_duplicates(texts, most_shared: float, max_bytes: int):
    """Keep a document if at most this share of its 13-grams of words stood in those kept before it; stop at max_bytes."""
    seen, size = set(), 0
    for text in texts:
        grams = ngrams(text)
        if len(text) >= 200 and len(grams & seen) <= most_shared * len(grams):
            seen |= grams
            size += len(text.encode())
            yield text
            if size > max_bytes:
                return


def sample_documents(max_bytes: int = 4_000_000) -> list[tuple[str, str]]:
    """The sample's (domain, text) pairs."""
    from tqdm import tqdm
    domains = ("cpp", "docstrings", "manual", "python", "stubs")
    return [(domain, text) for domain in tqdm(domains, desc="read the sample", unit="domain", disable=None, leave=False)
            for text in without_near_duplicates(sample_texts(domain), 0.2, max_bytes)]


def overlap(documents, split_of) -> dict[str, float]:
    """For each domain, the share of its test split's distinct 13-grams of words that its train split has too."""
    grams: dict = {}
    for domain, text in documents:
        grams.setdefault(domain, {split: set() for split in SPLITS})[split_of(text)].update(ngrams(text))
    return {d: len(g["test"] & g["train"]) / max(1, len(g["test"])) for d, g in grams.items()}


# ---------------------------------------------------------------- bins

def text_hash(text: str) -> int:
    """128 bits of the text alone: they decide its split and whether it is an exact duplicate."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def splitter(val_fraction: float, test_fraction: float):
    """A function from text to the name of its split."""
    if val_fraction <= 0 or test_fraction <= 0 or val_fraction + test_fraction >= 1:
        raise InputError(f"--val-fraction {val_fraction} --test-fraction {test_fraction}: each split needs a share above 0")

    def split_of(text: str) -> str:
        u = (text_hash(text) >> 64) / 2**64  # uniform in [0, 1)
        return "test" if u < test_fraction else "val" if u < test_fraction + val_fraction else "train"
    return split_of


def write_bins(folder: Path, documents, tokenizer: Tokenizer, split_of, limit_tokens: int | None) -> dict:
    """Tokenize (domain, text) pairs into folder/DOMAIN.SPLIT.bin; returns what meta.json says of each file."""
    files, seen, used = {}, {}, {}

    def write(batch):
        for (domain, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
            if limit_tokens is not None and used.get(domain, 0) >= limit_tokens:
                continue
            used[domain] = used.get(domain, 0) + len(ids) + 1
            file = files[domain][split_of(text)]
            tokens = np.append(ids, np.uint16(tokenizer.end_of_text)).astype("<u2").tobytes()
            file["handle"].write(tokens)
            file["hash"].update(tokens)
            file["documents"] += 1
            file["tokens"] += len(ids) + 1
            file["bytes"] += len(text.encode())

    with contextlib.ExitStack() as stack:
        batch, characters = [], 0
        for domain, text in documents:
            if domain not in files:
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", domain):
                    raise InputError(f"{domain!r} cannot name a domain's files; use letters, digits, '-' and '_'")
                files[domain] = {split: {"handle": stack.enter_context(open(folder / f"{domain}.{split}.bin", "wb")),
                                         "hash": hashlib.sha256(), "documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
                seen[domain] = set()
            key = text_hash(text)
            if not text or key in seen[domain] or (limit_tokens is not None and used.get(domain, 0) >= limit_tokens):
                continue
            seen[domain].add(key)
            batch.append((domain, text))
            characters += len(text)
            if characters > 1_000_000:
                write(batch)
                batch, characters = [], 0
        write(batch)
    for domain, by_split in files.items():
        for split, file in by_split.items():
            if not file["documents"]:
                raise InputError(f"{domain}: no document fell into its {split} split, it has {sum(f['documents'] for f in by_split.values())} "
                                 "in all; add documents or raise --val-fraction and --test-fraction")
    return {f"{domain}.{split}": {key: file[key] for key in ("documents", "tokens", "bytes")} | {"sha256": file["hash"].hexdigest()}
            for domain, by_split in sorted(files.items()) for split, file in by_split.items()}


def prepare(out: str | Path, sources: dict[str, list[Path]] | None = None, tokenizer: str = "train:4096", text_key: str = "text",
            domain_key: str | None = None, val_fraction: float = 0.05, test_fraction: float = 0.05, limit_tokens: int | None = None) -> Data:
    """Write a data set to the folder `out`, in the place of one that stood there. sources: {domain: files}; None makes the sample.

    With domain_key, the one source's domain is None and each record names its own. Raises InputError.
    """
    split_of = splitter(val_fraction, test_fraction)
    out, shared = Path(out), None
    if sources is None:
        sample = sample_documents()
        shared = overlap(sample, split_of)

    def documents():
        return iter(sample) if sources is None else read_sources(sources, text_key, domain_key)

    with new_folder(out) as folder:
        path = folder / "tokenizer.json"
        if tokenizer.startswith("train:"):
            if not tokenizer[6:].isdecimal():
                raise InputError(f"--tokenizer {tokenizer}: expected train:N, N the size of the vocabulary")
            train_tokenizer((text for _, text in documents() if split_of(text) == "train"), int(tokenizer[6:]), path)
        else:
            path.write_text(Tokenizer(tokenizer).json, encoding="utf-8")
        encoder = Tokenizer(path)
        files = write_bins(folder, documents(), encoder, split_of, limit_tokens)
        if not files:
            raise InputError("the sources hold no documents")
        meta = {"format": FORMAT, "tokenizer": {"sha256": encoder.sha256, "vocab_size": encoder.vocab_size, "end_of_text": encoder.end_of_text},
                "files": files, "fractions": {"val": val_fraction, "test": test_fraction},
                "sources": {d or domain_key: [str(p) for p in paths] for d, paths in sources.items()} if sources else "the installed Python, torch, numpy and matplotlib",
                "test_13gram_overlap": shared}
        write_text(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    return Data(out)


def describe(data: Data) -> str:
    """A table of what a data set holds."""
    lines = [f"{'domain':<16}{'documents':>10}{'train':>13}{'val':>11}{'test':>11}  tokens{'bytes/token':>14}"]
    for domain in data.domains:
        size = {split: data.size(domain, split) for split in SPLITS}
        total = {key: sum(s[key] for s in size.values()) for key in ("documents", "tokens", "bytes")}
        lines.append(f"{domain:<16}{total['documents']:>10,}{size['train']['tokens']:>13,}{size['val']['tokens']:>11,}"
                     f"{size['test']['tokens']:>11,}{total['bytes'] / total['tokens']:>22.2f}")
    if data.meta.get("test_13gram_overlap"):
        shares = ", ".join(f"{d} {s:.0%}" for d, s in sorted(data.meta["test_13gram_overlap"].items()))
        lines.append(f"13-grams of the test split that the train split has too: {shares}")
    return "\n".join(lines)


def make_sample(out: str | Path = SAMPLE) -> Data:
    """The sample data set, with a tenth of it in each of val and test, for its domains are small."""
    return prepare(out, val_fraction=0.1, test_fraction=0.1)


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("sources", nargs="*", metavar="name=source", help="a .txt, .jsonl or .jsonl.gz file, a folder or a glob; nothing: the sample")
    parser.add_argument("--out", default=SAMPLE, help="folder to write (default: %(default)s)")
    parser.add_argument("--tokenizer", help="a Pythia (pythia-70m), a tokenizer.json, or train:N to train a byte-level BPE of N tokens (default: pythia-70m)")
    parser.add_argument("--text-key", default="text", help="dotted key of a record's text (default: %(default)s)")
    parser.add_argument("--domain-key", help="dotted key of a record's domain; the source is then given without a name")
    parser.add_argument("--val-fraction", type=float, default=0.05)
    parser.add_argument("--test-fraction", type=float, default=0.05)
    parser.add_argument("--limit-tokens", type=int, metavar="N", help="stop a domain after N tokens")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that tokenize (default: all cores); the bins do not depend on it")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is already there")
    args = parser.parse_args()
    if args.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(max(1, args.workers))  # read when tokenizers first runs
    if Path(args.out).exists() and not args.overwrite:
        raise InputError(f"{args.out} exists; choose another --out, or --overwrite to replace it")
    if not args.sources:
        print(describe(make_sample(args.out)))
        return
    sources = {}
    for source in args.sources:
        name, equals, path = source.partition("=")
        if args.domain_key is not None:
            name, path = None, source
        elif not equals or not path:
            raise InputError(f"{source}: expected name=path, or --domain-key for records that name their domain")
        sources.setdefault(name, []).extend(source_files(path))
    data = prepare(args.out, sources, args.tokenizer or "pythia-70m", args.text_key, args.domain_key,
                   args.val_fraction, args.test_fraction, args.limit_tokens)
    print(describe(data))


if __name__ == "__main__":
    cli(main)
