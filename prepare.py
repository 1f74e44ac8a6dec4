"""Text in, token bins out: one raw uint16 file per domain and split, and the classes that read them back.

    python prepare.py                                      # data/sample, from text that pip already installed; seconds
    python prepare.py --out data/mine arxiv=papers/ web='crawl/*.jsonl.gz' --tokenizer train:4096
    python prepare.py --out data/pile pile.jsonl --domain-key meta.pile_set_name --tokenizer pythia-70m
"""
import argparse
import ast
import contextlib
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

FORMAT = 1  # of meta.json and the bins beside it
SPLITS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
SAMPLE, SAMPLE_FRACTION = "data/sample", 0.1  # of its text, for val and as much for test; it is small
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")


class InputError(Exception):
    """What the user gave cannot be used; the message is one line: what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors."""

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
    except (InputError, OSError) as e:
        message = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
        print("error:", " ".join(message.split()), file=sys.stderr)  # one line, whatever a library said
        sys.exit(2)


def publish(partial: Path, path: Path) -> None:
    """Put a finished file in its place, which holds the old one or the new one, whatever happens."""
    with open(partial, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    publish(partial, path)


@contextlib.contextmanager
def new_folder(path: Path):
    """A folder to fill that becomes `path`, in the place of what was there, only when the block ends well."""
    path = path.resolve()
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():  # killed between the two renames below
        os.rename(old, path)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def load_json(path: Path) -> dict:
    """The JSON object in a file; anything else is an InputError."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; it is damaged, or not what it should be")
    return value


def hub_file(name: str, filename: str) -> Path | None:
    """A file of a model on the hub (`pythia-70m`, `ORG/NAME@REVISION`) or in its cache; None if it is not there."""
    from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download, try_to_load_from_cache
    repo, _, revision = name.partition("@")
    if "/" not in repo:
        if not re.fullmatch(f"pythia-({'|'.join(map(re.escape, PYTHIA_SIZES))})(-deduped)?", repo):
            raise InputError(f"{name}: no such folder or model; on the hub ORG/NAME or pythia-{'|'.join(PYTHIA_SIZES)}")
        repo = f"EleutherAI/{repo}"
    try:
        return Path(hf_hub_download(repo, filename, revision=revision or None))
    except errors.RemoteEntryNotFoundError:
        return None
    except Exception as e:  # of several libraries: a connection cut, a name that is none, a disk that is full
        offline = isinstance(e, errors.LocalEntryNotFoundError)
        if offline and try_to_load_from_cache(repo, filename, revision=revision or None) is _CACHED_NO_EXIST:
            return None
        raise InputError(f"{name}: no such folder, and no {filename} from the hub ({str(e)[:200]})") from None


class Tokenizer:
    """A tokenizer.json (a file, in a model's folder, or of a model on the hub): text to uint16 ids and back. Special
    tokens that occur in the text are plain text. Raises InputError."""

    def __init__(self, file_or_name: str | Path):
        import tokenizers
        path = Path(file_or_name)
        if path.is_dir():
            path /= "tokenizer.json"
        elif not path.exists() and path.suffix != ".json":
            path = hub_file(str(file_or_name), "tokenizer.json")
        if path is None or not path.is_file():
            raise InputError(f"{path or file_or_name}: not a tokenizer.json, a model or train:N")
        self.json = path.read_text(encoding="utf-8", errors="replace")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of the library's Rust is not an Exception
            raise InputError(f"{path}: not a tokenizer.json ({str(e)[:100]})") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.end_of_text = self._tokenizer.token_to_id(END_OF_TEXT)
        vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=0)
        if self.end_of_text is None:
            raise InputError(f"{path}: has no {END_OF_TEXT} token, which ends every document")
        if vocab_size > 2**16:
            raise InputError(f"{path}: its {vocab_size:,} tokens do not fit uint16; the most is 65,536")
        sha256 = hashlib.sha256(self.json.encode()).hexdigest()
        self.meta = {"sha256": sha256, "vocab_size": vocab_size, "end_of_text": self.end_of_text}

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
            raise InputError(f"{self.folder}: not a data set (no meta.json); prepare.py --out {self.folder} makes one")
        self.meta = load_json(self.folder / "meta.json")
        if self.meta.get("format") != FORMAT:
            raise InputError(f"{self.folder}: its format is {self.meta.get('format')}, not {FORMAT}; prepare it again")
        try:
            self.vocab_size = self.meta["tokenizer"]["vocab_size"]
            sizes = {name: 2 * file["tokens"] for name, file in self.meta["files"].items()}
            hashes = sorted((name, file["sha256"]) for name, file in self.meta["files"].items())
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{self.folder}/meta.json: damaged; prepare the data again") from None
        for name, size in sizes.items():
            path = self.folder / f"{name}.bin"
            if not path.is_file() or path.stat().st_size != size:
                raise InputError(f"{path}: missing, or not of {size:,} bytes; prepare the data again")
        self.domains = sorted({name.rpartition(".")[0] for name in sizes})
        self.identity = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]  # changes when any token does

    def tokens(self, domain: str, split: str) -> np.memmap:
        """The domain's documents one after the other, each ended by the end-of-text id: (n,) uint16, read-only."""
        return np.memmap(self.folder / f"{domain}.{split}.bin", dtype="<u2", mode="r")

    def size(self, domain: str, split: str) -> dict:
        """The split's number of documents, tokens and UTF-8 bytes of text, and its sha256."""
        return self.meta["files"][f"{domain}.{split}"]


def source_files(source: str) -> list[Path]:
    """The files behind a path, a folder (everything readable below it) or a glob, sorted."""
    found = Path(source).rglob("*") if Path(source).is_dir() else map(Path, glob.glob(source, recursive=True))
    files = sorted(path for path in found if path.name.endswith(SUFFIXES))
    if not files:
        raise InputError(f"{source}: no file there that ends in {', '.join(SUFFIXES)}")
    return files


def read_records(path: Path):
    """Yield (where, record) for every document of a file; where is file:line. A .txt file is one document."""
    where = str(path)
    try:
        if path.name.endswith(".txt"):
            yield where, {"text": path.read_bytes().decode("utf-8-sig")}
            return
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                if line.strip():
                    yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise InputError(f"{path}: not a whole gzip file ({e}); get it again") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: not UTF-8 (byte {e.start}); mend or remove it") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not a JSON record ({str(e)[:100]}); mend or remove it") from None


def lookup(record, key: str, where: str) -> str:
    """The string at a dotted key of a record."""
    value = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise InputError(f"{where}: no string under {key!r}; --text-key and --domain-key say where to look")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{where}: {key!r} holds a lone surrogate, which is not text; mend the record")
    return value


def read_sources(sources: dict[str, list[Path]], text_key: str, domain_key: str | None):
    """Yield (domain, text) for every document of every source, in order."""
    from tqdm import tqdm
    for domain, files in sources.items():
        for path in files:
            for where, record in tqdm(read_records(path), path.name, unit=" documents", disable=None, leave=False):
                if domain_key is not None:
                    domain = re.sub(r"[^a-z0-9]+", "_", lookup(record, domain_key, where).lower()).strip("_")
                yield domain, lookup(record, text_key if not path.name.endswith(".txt") else "text", where)


def pieces(text: str, limit: int = 4096):
    """Cut a large file into documents of about `limit` characters, but only at blank lines before an unindented one."""
    piece = ""
    for block in re.split(r"(?<=\n)\n+(?=\S)", text):
        if piece and len(piece) + len(block) > limit:
            yield piece
            piece = ""
        piece += ("\n" if piece else "") + block
    yield piece


def sample_texts(domain: str):
    """Yield the raw documents of one sample domain, from files that every installation of the requirements has."""
    if domain == "manual":
        from pydoc_data.topics import topics
        yield from (piece for name in sorted(topics) for piece in pieces(topics[name]))
        return
    numpy, torch, matplotlib = (Path(find_spec(p).origin).parent for p in ("numpy", "torch", "matplotlib"))
    folders, pattern = {"cpp": ([torch / "include"], "*.h"), "docstrings": ([numpy, torch], "*.py"),
                        "python": ([Path(sysconfig.get_path("stdlib"))], "*.py"),
                        "stubs": ([numpy, torch, matplotlib], "*.pyi")}[domain]
    for folder in folders:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob(pattern)]
        for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):  # mixed, everywhere alike
            if re.match("site-packages|pydoc_data", name):  # not the library's own; the manual once more
                continue
            text = (folder / name).read_text(encoding="utf-8", errors="ignore")
            if domain != "docstrings":
                yield from pieces(text)
                continue
            with contextlib.suppress(SyntaxError):  # of a newer Python
                documented = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
                yield from filter(None, map(ast.get_docstring, documented))


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
                in_split[split_of(text, **fractions)] |= grams
                documents.append((domain, text))
                size += len(text.encode())
                if size > max_bytes:
                    break
        overlap[domain] = len(in_split["test"] & in_split["train"]) / len(in_split["test"])
    return documents, overlap


def text_hash(text: str) -> int:
    """128 bits of the text alone: they decide its split and whether it is an exact duplicate."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def split_of(text: str, val: float, test: float) -> str:
    """The split of a text, given the fractions of val and test: a function of the text alone."""
    u = (text_hash(text) >> 64) / 2**64  # uniform in [0, 1)
    return "test" if u < test else "val" if u < test + val else "train"


def write_bins(folder: Path, documents, tokenizer: Tokenizer, fractions: dict, limit_tokens: int | None) -> dict:
    """Tokenize (domain, text) pairs into folder/DOMAIN.SPLIT.bin; returns what meta.json says of each file."""
    files, bins, seen, used = {}, {}, {}, {}

    def write(batch) -> None:
        for (domain, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
            if used[domain] < limit:
                name = f"{domain}.{split_of(text, **fractions)}"
                np.append(ids, np.uint16(tokenizer.end_of_text)).astype("<u2").tofile(bins[name])
                for key, n in (("documents", 1), ("tokens", len(ids) + 1), ("bytes", len(text.encode()))):
                    files[name][key] += n
                used[domain] += len(ids) + 1

    limit, batch, characters = limit_tokens or float("inf"), [], 0
    with contextlib.ExitStack() as stack:
        for domain, text in documents:
            if domain not in seen:
                if not re.fullmatch(r"(?!(mean|improved|worst)$)[A-Za-z0-9][A-Za-z0-9_-]*", domain):
                    raise InputError(f"{domain!r} cannot be a domain; use A-Z a-z 0-9 - _ (not mean, improved, worst)")
                seen[domain], used[domain] = set(), 0
                for name in (f"{domain}.{split}" for split in SPLITS):
                    bins[name] = stack.enter_context(open(folder / f"{name}.bin", "wb"))
                    files[name] = {"documents": 0, "tokens": 0, "bytes": 0}
            key = text_hash(text)
            if text and key not in seen[domain] and used[domain] < limit:
                seen[domain].add(key)
                batch.append((domain, text))
                characters += len(text)
            if characters > 1_000_000:
                write(batch)
                batch, characters = [], 0
        write(batch)
    for name, file in files.items():
        domain, _, split = name.rpartition(".")
        if not file["documents"]:
            raise InputError(f"{domain}: its {split} split is empty, of {len(seen[domain])} documents in all; "
                             "add some, or raise --val-fraction and --test-fraction")
        file["sha256"] = hashlib.sha256(np.memmap(folder / f"{name}.bin", mode="r")).hexdigest()
    return dict(sorted(files.items()))


def prepare(out: str | Path, sources: dict[str, list[Path]] | None = None, tokenizer: str = "train:4096",
            text_key: str = "text", domain_key: str | None = None, val_fraction: float = 0.05,
            test_fraction: float = 0.05, limit_tokens: int | None = None) -> Data:
    """Write a data set to the folder `out`, in the place of one that stood there. Raises InputError.

    sources: {domain: files}, or {None: files} with domain_key, where each record names its domain; None is the sample.
    """
    fractions = {"val": val_fraction, "test": test_fraction}
    if min(fractions.values()) <= 0 or sum(fractions.values()) >= 1:
        raise InputError(f"--val-fraction {val_fraction} --test-fraction {test_fraction}: every split needs a share")
    sample, overlap = make_sample(fractions) if sources is None else (None, {})

    def documents():
        return sample if sources is None else read_sources(sources, text_key, domain_key)

    with new_folder(Path(out)) as folder:
        path = folder / "tokenizer.json"
        if vocabulary := re.fullmatch(r"train:(\d{1,9})", tokenizer):
            texts = (text for _, text in documents() if split_of(text, **fractions) == "train")
            train_tokenizer(texts, int(vocabulary[1]), path)
        else:
            path.write_text(Tokenizer(tokenizer).json, encoding="utf-8")
        encoder = Tokenizer(path)
        paths = {domain or domain_key: [str(p) for p in files] for domain, files in (sources or {}).items()}
        meta = {"format": FORMAT, "tokenizer": encoder.meta, "fractions": fractions, "overlap": overlap,
                "sources": paths, "files": write_bins(folder, documents(), encoder, fractions, limit_tokens)}
        empty = [d for d in sources or {} if f"{d}.train" not in meta["files"] and (d or not meta["files"])]
        if empty:
            raise InputError(f"{empty[0] or 'the sources'}: no documents there; nothing was written")
        write_text(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    return Data(out)


def describe(data: Data) -> str:
    """A table of what a data set holds."""
    lines = [f"{'domain':<16}{'split':<7}{'documents':>11}{'tokens':>13}{'bytes/token':>13}"]
    for name, file in data.meta["files"].items():
        lines.append("{:<16}{:<7}".format(*name.split(".")) + f"{file['documents']:>11,}{file['tokens']:>13,}"
                     + f"{file['bytes'] / file['tokens']:>13.2f}")
    shares = ", ".join(f"{domain} {share:.0%}" for domain, share in data.meta["overlap"].items())
    return "\n".join(lines) + (f"\n13-grams of the test split that the train split has too: {shares}" if shares else "")


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("sources", nargs="*", metavar="name=source", help=f"{', '.join(SUFFIXES)}, folder or glob; nothing: the sample")
    add("--out", default=SAMPLE, help="folder to write (default: %(default)s)")
    add("--tokenizer", help="a model, a tokenizer.json, or train:N to train one (the sample: train:4096)")
    add("--text-key", default="text", help="dotted key of a record's text (default: %(default)s)")
    add("--domain-key", help="dotted key of a record's domain; sources are then given without a name")
    add("--val-fraction", type=float, help="(default: 0.05; the sample: 0.1)")
    add("--test-fraction", type=float, help="likewise")
    add("--limit-tokens", type=int, metavar="N", help="stop a domain after N tokens")
    add("--workers", type=int, metavar="N", help="threads that tokenize (default: all cores)")
    add("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args()
    if args.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(max(1, args.workers))  # read when tokenizers first runs
    out = Path(args.out)
    if out.exists() and (not args.overwrite or any(p.suffix not in (".bin", ".json") for p in out.iterdir())):
        raise InputError(f"{out} exists; choose another --out (--overwrite replaces a data set, and nothing else)")
    sources = {}
    for source in args.sources:
        name, equals, path = (None, "=", source) if args.domain_key else source.partition("=")
        if not equals:
            raise InputError(f"{source}: expected name=path, or --domain-key for records that name their domain")
        sources.setdefault(name, []).extend(source_files(path))
    if args.sources and args.tokenizer is None:
        raise InputError("--tokenizer is needed; pythia-70m, from the hub, is Pythia's, and train:4096 trains one")
    share = 0.05 if sources else SAMPLE_FRACTION
    fractions = [share if given is None else given for given in (args.val_fraction, args.test_fraction)]
    print(describe(prepare(out, sources or None, args.tokenizer or "train:4096", args.text_key, args.domain_key,
                           *fractions, args.limit_tokens)))


if __name__ == "__main__":
    cli(main)
