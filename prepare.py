"""Text in, token bins out: a raw uint16 file per domain and split, and what reads them back.

    python prepare.py             # data/sample, from text that pip has just installed, in seconds
    python prepare.py --out data/mine arxiv=papers/ web='crawl/*.jsonl.gz' --tokenizer train:4096
    python prepare.py --out data/pile val.jsonl.zst --domain-key meta.pile_set_name \
                      --tokenizer pythia-70m
"""

import argparse
import ast
import contextlib
import errno
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1  # of meta.json and the bins beside it
SPLITS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
SAMPLE = "data/sample"


# ---- errors and the command line ----


class InputError(Exception):
    """What was given cannot be used; the message is one line: what is wrong, where, what to do."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds to every option's help its default, if it has one."""

    def _get_help_string(self, action):
        if not action.option_strings or action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with a script's docstring as its help, and with errors of one line."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=HelpFormatter)

    def error(self, message: str):
        raise InputError(f"{message} (python {self.prog} --help lists the options)")


def cli(main, way_on: str = "") -> None:
    """Run a script's main function; bad input ends in one line on stderr and exit status 2.

    way_on: what is said after an interruption, or a fault of the system.
    """
    for stream in (sys.stdout, sys.stderr):
        # A name that is no UTF-8, or a terminal that is none, costs a character, not the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        print(f"\ninterrupted{way_on}", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError, UnicodeError, BrokenExecutor) as e:
        message = str(e)
        if isinstance(e, OSError):
            message = f"{e.filename}: {e.strerror}" if e.filename else f"{e}{way_on}"
        one_line = " ".join(message.split())  # whatever a library said
        print("error:", one_line, file=sys.stderr)
        sys.exit(2)


def tell(*lines: str) -> None:
    """Print lines at once. Where nobody reads any more (`| head`), go on without a word."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


SECONDS_BETWEEN_LINES = 30


class Bar:
    """How far a stage has come: a bar on a terminal, elsewhere a line every 30 seconds.

    total and done are in units; a unit "B" is bytes. shown: False on ranks that do not speak.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0, shown: bool = True):
        from tqdm import tqdm

        self.title = title
        self.total = total
        self.unit = unit
        self.first = done
        self.done = done
        self.began = self.spoke = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self.speaks = shown and not on_terminal
        look = {"unit": unit, "unit_scale": unit == "B", "leave": False}
        hidden = not (shown and on_terminal)
        self.bar = tqdm(desc=title, total=total, initial=done, disable=hidden, **look)

    def to(self, done: int, words: str = "") -> None:
        """The stage has come to `done`; words: what else there is to say."""
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self.speaks and now - self.spoke > SECONDS_BETWEEN_LINES and done > self.first:
            self.spoke = now
            left = (now - self.began) / (done - self.first) * (self.total - done)
            far = f"{self.unit} {done:,} of {self.total:,}"
            if self.unit == "B":
                far = f"{done / self.total:.0%}"
            said = [far, words, f"{left / 60:.1f} min left"]
            tell(f"{self.title}: {', '.join(filter(None, said))}")

    def close(self) -> None:
        self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()


@contextlib.contextmanager
def notice(words: str, shown: bool = True) -> Iterator[None]:
    """Words that stand on the terminal while the block runs, or for good where there is none."""
    on_terminal = sys.stderr.isatty()
    if shown and on_terminal:
        print(words, end="", file=sys.stderr, flush=True)
    elif shown:
        tell(words)
    yield
    if shown and on_terminal:
        print("\r" + " " * len(words) + "\r", end="", file=sys.stderr, flush=True)


# ---- files ----


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if os.name == "nt":  # which does that for neither a folder nor a file that is open to be read
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file or folder to write, which becomes `path` when the block ends well.

    It is then on the disk; what was there stays until then, whatever happens. Raises InputError
    where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as e:
        reason = e.strerror or e
        raise InputError(f"{path}: cannot be written ({reason}); nothing older is lost") from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def load_json(path: Path) -> dict:
    """The JSON object in a file; anything else is an InputError."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    raise InputError(f"{path}: not a JSON object; it is damaged, or not what it should be")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the faults of writing to an open file, a full disk for one, the file's name."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(
    path: Path, folder: Path, wait: bool = False, way_out: str = "choose another --out"
) -> Iterator[None]:
    """Keep other processes out of `folder` while the block runs, or until this one ends, somehow.

    path: the file that is locked, which is made. wait: for another process to let go, rather than
    raise InputError with that way out. Where there are no locks (Windows, some network file
    systems) a line says so.
    """
    with open(path, "a") as file:
        try:
            if fcntl is None:
                raise OSError("this system has none")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            message = f"{folder}: another process is at work there; {way_out}"
            raise InputError(message) from None
        except OSError as e:
            warning = f"warning: {folder}: no lock ({e}): do not start a second run there"
            print(warning, file=sys.stderr)
        yield


# ---- the hub ----


def hub_folder(name: str, patterns: list[str], kind: str = "model") -> Path:
    """The folder of the hub's cache, named by the commit, with the files that match.

    name: `pythia-70m` or `ORG/NAME@REVISION`. kind: "model" or "dataset". Raises InputError, for an
    unknown size of Pythia without asking a network.
    """
    repo, _, revision = name.partition("@")
    if "/" not in repo:
        sizes = r"14m|31m|70m|160m|410m|1b|1\.4b|2\.8b|6\.9b|12b"
        if not re.fullmatch(rf"pythia-({sizes})(-deduped)?", repo):
            raise InputError(f"{name}: no such folder or model; on the hub: ORG/NAME or pythia-70m")
        repo = f"EleutherAI/{repo}"
    from huggingface_hub import logging, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    logging.set_verbosity_error()
    disable_progress_bars()  # it draws some for what is cached, too
    try:
        found = {"repo_type": kind, "revision": revision or None, "allow_patterns": patterns}
        with notice(f"getting {name} from the hub"):
            return Path(snapshot_download(repo, **found))
    except Exception as e:  # of several libraries
        raise InputError(f"{name}: no such folder, and {hub_fault(e)}") from None


def files_on_hub(repo: str, revision: str | None) -> str:
    """The first files of a data set on the hub, in words; "" where it does not tell."""
    with contextlib.suppress(Exception):  # of several libraries
        from huggingface_hub import HfApi

        revision = revision.removeprefix("@") if revision else None
        names = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
        return f"; there are {', '.join(sorted(names)[:10])}"
    return ""


def hub_fault(error: Exception) -> str:
    """Why the hub did not give what was asked for, and what helps."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no room for it in the hub's cache; HF_HOME puts that elsewhere"
    log_in = "hf auth login, or HF_TOKEN in the environment"
    faults = {
        "GatedRepoError": f"the hub gives it to those who asked on its page; then {log_in}",
        "RepositoryNotFoundError": f"the hub has none, or not for you; if you may see it, {log_in}",
        "RevisionNotFoundError": "the hub has it, but not this revision; see its page",
        "HFValidationError": "no name on the hub looks like that; it is ORG/NAME or ORG/NAME@REV",
    }
    for kind in type(error).__mro__:
        if kind.__name__ in faults:
            return faults[kind.__name__]
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return "it is not in the hub's cache, and HF_HUB_OFFLINE is set; unset it"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub does not let you; {log_in}, or ask for access on its page"
    if status is None:
        return "the hub cannot be reached, nor is it in the cache; try the network, or HF_ENDPOINT"
    return f"the hub answered {status}; try again later"


# ---- tokenizer ----


class Tokenizer:
    """A tokenizer.json (a file, a model's folder, or a model on the hub): text to ids and back.

    Special tokens that occur in a text are plain text. Raises InputError, and OSError where there
    is no such file.
    """

    def __init__(self, file_or_name: str | Path):
        import tokenizers

        path = Path(file_or_name)
        if not path.exists() and path.suffix != ".json":
            path = hub_folder(str(file_or_name), ["tokenizer.json"])
        if path.is_dir():
            path = path / "tokenizer.json"
        self.json = path.read_text(encoding="utf-8", errors="replace")
        try:
            model = json.loads(self.json)["model"]
            if model.get("continuing_subword_prefix") and model.get("merges"):
                raise ValueError("merges with continuing_subword_prefix")  # the library would abort
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except BaseException as e:  # a panic of the library's Rust is not an Exception
            raise InputError(f"{path}: not a tokenizer.json ({str(e)[:100]})") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocab = self._tokenizer.get_vocab()
        self.vocab_size = 1 + max(vocab.values(), default=0)
        self.end_of_text = vocab.get(END_OF_TEXT)
        if self.end_of_text is None or self.vocab_size > 2**16:
            expected = f"expected {END_OF_TEXT}, and at most 65,536 to fit uint16"
            raise InputError(f"{path}: {self.vocab_size:,} tokens; {expected}")
        self.meta = {
            "sha256": hashlib.sha256(self.json.encode()).hexdigest(),
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
        }

    @functools.cached_property
    def _fast(self):
        """tiktoken's encoder, where it gives the same ids; it takes a moment to make."""
        return rank_encoding(json.loads(self.json), self._tokenizer)

    def encode(self, text: str) -> np.ndarray:
        """(n,) uint16, less an end-of-text id. Raises UnicodeEncodeError for a lone surrogate."""
        text.encode()
        # tiktoken panics on a run of about 10^6 white-space characters.
        endless_space = len(text) > 10**5 and re.search(r"\s{100000}", text)
        if self._fast is None or endless_space:
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
            return np.array(encoding.ids, dtype=np.uint16)
        if self._tokenizer.normalizer and not unicodedata.is_normalized("NFC", text):
            text = self._tokenizer.normalizer.normalize_str(text)
        if len(text) < 10**6:
            return np.array(self._fast.encode_ordinary(text), dtype=np.uint16)
        # Slower, but in less memory.
        return np.array(self._fast.encode_to_numpy(text), dtype=np.uint16)

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def rank_encoding(spec: dict, tokenizer):
    """The tiktoken encoder with the ids of a byte-level BPE; None if it is something else.

    spec: its tokenizer.json; tokenizer: what the library made of it.
    tiktoken joins the neighbours that make the token of lowest id; `tokenizers` those whose merge
    comes first. It is the same if ids are in the order of merges, each making a new token of older
    ones, and every token encodes to itself: two neighbours that could make it are then those of its
    merge, for alone it has no other last step.
    """
    import tiktoken

    try:
        vocab = spec["model"].pop("vocab")
        merges = [m.split(" ") if isinstance(m, str) else m for m in spec["model"].pop("merges")]
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        added = [token for token in spec["added_tokens"] if not token["special"]]
        # Of spaces: Pythia's tokenizer has them.
        runs = [token["content"] for token in added if token["normalized"]]
        known = (
            len(runs) == len(added)
            and is_plain_byte_level_bpe(spec, runs)
            and merges_are_ranks(vocab, merges)
            and tokens_encode_to_themselves(vocab, special, tokenizer)
        )
        if not known:
            return None
        byte_of = byte_alphabet()
        plain = [(token, i) for token, i in vocab.items() if token not in special]
        ranks = {bytes(byte_of[c] for c in token): i for token, i in plain}
        ranks |= {run.encode(): tokenizer.token_to_id(run) for run in runs}
    except (KeyError, TypeError, ValueError, AttributeError):  # not of the shape that is looked for
        return None
    used_by_utf8 = [*range(0xC0), *range(0xC2, 0xF5)]
    if len(set(ranks.values())) < len(ranks) or not all(bytes([b]) in ranks for b in used_by_utf8):
        return None
    # GPT-2's pattern. Where runs of spaces are tokens of their own they are cut out first, and what
    # is white space thereafter holds no two spaces in a row.
    first = ""
    space = r"\s"
    if runs:
        first = rf" {{2,{len(runs) + 1}}}|"
        space = r"(?:[^\S ]| (?! ))"
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    pattern = rf"{first}{words}|{space}+(?!\S)|{space}+"
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def is_plain_byte_level_bpe(spec: dict, runs: list[str]) -> bool:
    """Whether a tokenizer.json, less its vocabulary, has nothing that ranks do not know."""
    pre = spec["pre_tokenizer"]
    splits = (pre["type"], pre["add_prefix_space"], pre.get("use_regex", True))
    strips = [
        token[key] for token in spec["added_tokens"] for key in ("lstrip", "rstrip", "single_word")
    ]
    return (
        {key: value for key, value in spec["model"].items() if value} == {"type": "BPE"}
        and spec["normalizer"] in (None, {"type": "NFC"})
        and splits == ("ByteLevel", False, True)
        and sorted(runs) == [" " * n for n in range(2, len(runs) + 2)]
        and not any(strips)
    )


def merges_are_ranks(vocab: dict[str, int], merges: list) -> bool:
    """Whether every merge makes a newer token than the merge before it, and of older tokens."""
    made = [vocab[a + b] for a, b in merges]
    in_order = all(older < newer for older, newer in itertools.pairwise(made))
    return in_order and all(max(vocab[a], vocab[b]) < vocab[a + b] for a, b in merges)


def tokens_encode_to_themselves(vocab: dict[str, int], special: set[str], tokenizer) -> bool:
    """Whether the merges make every token of its text, but for special ones, which they do not."""
    for token, i in vocab.items():
        itself = [t.id for t in tokenizer.model.tokenize(token)] == [i]
        if itself == (token in special):
            return False
    return True


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    from tokenizers.pre_tokenizers import ByteLevel

    # Printable bytes stand for themselves, the others are the characters from U+0100 on.
    characters = sorted(ByteLevel.alphabet())
    printable = [ord(c) for c in characters if ord(c) < 256]
    others = sorted(set(range(256)) - set(printable))
    return dict(zip(characters, printable + others, strict=True))


# ---- data ----


# A domain's name is part of a file's; other rows of tables have the names that are left out.
DOMAIN = re.compile(r"(?!(?:mean|improved|worst)$)[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
OPEN_MAPS = 64  # files that a Data keeps open, of the 256 or 1024 that a process may have


class Data:
    """A folder that prepare.py wrote, and the one place that knows how a bin is cut into windows.

    Window c of a split, for sequences of T tokens, is tokens [c T, c T + T + 1): T inputs and, one
    further, T targets. Raises InputError if it is not such a folder, or a bin is missing or has
    another length.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "meta.json"
        if not path.is_file():
            make = f"prepare.py --out {folder} makes one"
            raise InputError(f"{folder}: not a data set (no meta.json); {make}")
        self.meta = load_json(path)
        if not is_meta(self.meta):
            raise InputError(f"{path}: damaged, or not of format {FORMAT}; prepare the data again")
        for name, file in self.meta["files"].items():
            bin_path = self.folder / f"{name}.bin"
            size = 2 * file["tokens"]
            if not bin_path.is_file() or bin_path.stat().st_size != size:
                raise InputError(f"{bin_path}: missing, or not of {size:,} bytes; prepare it again")
        self.domains: list[str] = sorted({name.rpartition(".")[0] for name in self.meta["files"]})
        self.vocab_size: int = self.meta["tokenizer"]["vocab_size"]
        hashes = [(name, file["sha256"]) for name, file in sorted(self.meta["files"].items())]
        digest = hashlib.sha256(json.dumps(hashes).encode())
        self.identity = digest.hexdigest()[:16]  # changes when any token does
        self._map = functools.lru_cache(OPEN_MAPS)(self._open)

    def _open(self, domain: str, split: str) -> np.memmap:
        return np.memmap(self.folder / f"{domain}.{split}.bin", dtype="<u2", mode="r")

    def tokens(self, domain: str, split: str) -> np.memmap:
        """The documents in a row, each ended by the end-of-text id: (n,) uint16, read-only."""
        return self._map(domain, split)

    def size(self, domain: str, split: str) -> dict:
        """The split's number of documents, tokens and UTF-8 bytes of text, and its sha256."""
        return self.meta["files"][f"{domain}.{split}"]

    def windows(self, domain: str, split: str, seq_len: int) -> int:
        """How many whole windows the split holds. Raises InputError if not one."""
        tokens = self.size(domain, split)["tokens"]
        if seq_len < 1 or tokens <= seq_len:
            which = f"{domain}'s {split} split, which has {tokens:,} tokens"
            raise InputError(f"--seq-len {seq_len}: too long for {which}")
        return (tokens - 1) // seq_len

    def window(self, domain: str, split: str, seq_len: int, number: int) -> np.ndarray:
        """Window `number` of the split: (T + 1,) uint16, copied: a view keeps its file open."""
        start = number * seq_len
        return np.array(self.tokens(domain, split)[start : start + seq_len + 1])

    def documents_of(
        self, domain: str, split: str, seq_len: int, numbers: np.ndarray
    ) -> np.ndarray:
        """For each of these windows (n,), the number of the document it begins in: (n,) int64."""
        tokens = self.tokens(domain, split)
        ends = np.flatnonzero(tokens == self.meta["tokenizer"]["end_of_text"])
        return np.searchsorted(ends, np.asarray(numbers) * seq_len)

    def check(self) -> None:
        """Compare every file with its hash in meta.json. Raises InputError where they differ."""
        self.check_tokenizer()
        files = self.meta["files"].items()
        with Bar("check data", len(files), "file") as bar:
            for name, file in files:
                self.check_file(f"{name}.bin", file["sha256"])
                bar.to(bar.done + 1)

    def check_tokenizer(self) -> None:
        """Likewise of tokenizer.json alone, which takes no time."""
        self.check_file("tokenizer.json", self.meta["tokenizer"]["sha256"])

    def check_file(self, name: str, sha256: str) -> None:
        path = self.folder / name
        if not path.is_file() or sha256_of(path) != sha256:
            found = "missing or damaged, not what meta.json says"
            raise InputError(f"{path}: {found}; prepare it again")


def has_types(record, **types: type) -> bool:
    """Whether a value from JSON is an object, and what it has under these keys of these types."""
    if not isinstance(record, dict):
        return False
    return all(type(record.get(key)) is wanted for key, wanted in types.items())


def is_meta(meta: dict) -> bool:
    """Whether a meta.json has what is used of it, for every domain and split."""
    if not has_types(meta, format=int, files=dict, tokenizer=dict) or meta["format"] != FORMAT:
        return False
    if not has_types(meta["tokenizer"], sha256=str, vocab_size=int, end_of_text=int):
        return False
    domains = {name.rpartition(".")[0] for name in meta["files"]}
    expected = {f"{domain}.{split}" for domain in domains for split in SPLITS}
    if not domains or set(meta["files"]) != expected or not all(map(DOMAIN.fullmatch, domains)):
        return False
    for file in meta["files"].values():
        if not has_types(file, documents=int, tokens=int, bytes=int, sha256=str):
            return False
        if file["tokens"] < 1 or file["bytes"] < 1:
            return False
    return True


# ---- sources to documents ----


READABLE = re.compile(r"\.(txt|jsonl|ndjson|json)(\.gz|\.zst)?$|\.parquet$")
BLOCK = 2**20  # bytes of text, about, that are read or handed to a worker at a time
LONGEST = 2**24  # bytes of the longest document
Sources = dict[str | None, list[Path]]  # files by domain; None: their records name the domain


class Document(NamedTuple):
    """A text, the domain that it belongs to and, once that is known, its split."""

    domain: str
    text: str
    split: str = ""


class BadLine(NamedTuple):
    """A line or row of a source that makes no document; `domain`: of the source, if it has one."""

    domain: str | None
    path: Path
    number: int
    why: str


def ending(path: Path) -> str:
    """A file's kind, by its name: ".jsonl.gz", ".txt", …; "" for what is not read."""
    match = READABLE.search(path.name.lower())
    return match[0] if match else ""


def is_txt(path: Path) -> bool:
    """Whether a file is one document."""
    return ending(path).startswith(".txt")


def source_files(source: str) -> list[Path]:
    """The files of a path, a folder and all below it, a glob or hf://datasets/ORG/NAME/GLOB@REV."""
    hub = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)/([^@]+)(@[^@]+)?", source)
    if source.startswith("hf:") and not hub:
        raise InputError(f"{source}: expected hf://datasets/ORG/NAME/GLOB, perhaps with @REVISION")
    if hub:
        folder = hub_folder(hub[1] + (hub[3] or ""), [hub[2]], "dataset")
        pattern = f"{glob.escape(str(folder))}/{hub[2]}"
    elif Path(source).is_dir():
        pattern = f"{glob.escape(source)}/**"
    elif Path(source).exists():  # whatever characters it has in its name
        pattern = glob.escape(source)
    else:
        pattern = source
    found = [Path(path) for path in glob.glob(pattern, recursive=True)]
    files = sorted(path for path in found if ending(path))
    if not files:
        if Path(source).is_file():
            kind = Path(source).suffix or "without an ending"
            raise InputError(f"{source}: {kind} is not read; make it .jsonl, .txt or .parquet")
        known = ".txt, .jsonl, .ndjson, .json (these also with .gz or .zst) or .parquet"
        there = files_on_hub(hub[1], hub[3]) if hub else ""
        raise InputError(f"{source}: no file there that ends in {known}{there}")
    return files


class Gunzip(io.RawIOBase):
    """What a gzip holds; as the program gzip does, it leaves out what follows and is none."""

    def __init__(self, path: Path, file):
        self.path = path
        self.stream = gzip.GzipFile(fileobj=file)
        self.is_sound = False  # so far

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            content = self.stream.read1(len(buffer))
        except gzip.BadGzipFile as e:
            # A checksum that fails is another matter.
            if not self.is_sound or not str(e).startswith("Not a gzipped file"):
                raise
            tell(f"warning: {self.path}: what follows its packed text is no gzip, and left out")
            self.stream = io.BytesIO()
            return 0
        self.is_sound = True
        buffer[: len(content)] = content
        return len(content)


def unpacked(path: Path, file):
    """The open file, or a stream that unpacks it where its name says that it is packed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(Gunzip(path, file), 2**17)
    if suffix == ".zst":
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        # Public dumps are packed with windows of up to 2^31 bytes.
        return zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})
    return file


def lines_of(stream) -> Iterator[bytes]:
    """The lines of a stream; of one longer than LONGEST, as much as shows that it is."""
    while line := stream.readline(LONGEST + 1):
        yield line
        while len(line) > LONGEST and not line.endswith(b"\n"):
            line = stream.readline(LONGEST + 1)


def records(path: Path, file, keys: list[str]) -> Iterator[bytes | dict]:
    """The lines of an open file as bytes, of which a .txt has one; a .parquet's rows as dicts.

    keys: the columns that are needed. Raises InputError where it cannot be read to its end.
    """
    try:
        if ending(path) == ".parquet":
            from pyarrow.parquet import ParquetFile

            for batch in ParquetFile(file).iter_batches(16, columns=keys):
                yield from batch.to_pylist()
        elif is_txt(path):
            yield unpacked(path, file).read(LONGEST + 1)
        else:
            yield from lines_of(unpacked(path, file))
    except Exception as e:  # of many libraries
        way_out = way_out_of(path, e)
        reason = str(e)[:200] or type(e).__name__
        raise InputError(f"{path}: cannot be read to its end: {reason}; {way_out}") from None


def way_out_of(path: Path, error: Exception) -> str:
    """What helps against an error in reading a file."""
    if isinstance(error, ImportError):
        library = "pyarrow" if ending(path) == ".parquet" else "backports.zstd"
        return f"pip install {library}"
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return "free some memory"
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return "it stands for a file that Git LFS keeps: git lfs pull"
    return "get it again"


def look_up(record: dict, key: str) -> str:
    """The string under a key, or under a path of keys joined by dots. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("no object; a line is one, as jq -c '.[]' writes them")
    value = record
    if key in record:
        value = record[key]
    else:
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str):
        keys = ", ".join(map(repr, list(record)[:10]))
        raise ValueError(f"no text under {key!r}; there are {keys or 'no keys'}")
    value.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    return value


def record_of(line: bytes | dict, path: Path, number: int, text_key: str) -> dict:
    """Line `number` of a file, or a row, as a record; a .txt is the text of one.

    Raises ValueError and RecursionError.
    """
    if isinstance(line, dict):
        return line
    if len(line) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} bytes")
    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    if text.startswith("version https://git-lfs"):
        raise ValueError("it stands for a file that Git LFS keeps: git lfs pull")
    if is_txt(path):
        return {text_key: text}
    if text.strip() in ("{", "["):
        raise ValueError("JSON over many lines; a line is an object, as jq -c . writes them")
    return json.loads(text)


def read(
    sources: Sources, text_key: str, domain_key: str | None, full: set[str] = frozenset()
) -> Iterator[Document | BadLine]:
    """Every document of the sources, while a bar counts bytes.

    full: domains that are read no further, as soon as they are in it.
    """
    keys = [text_key, domain_key] if domain_key else [text_key]
    files = [(domain, path) for domain, paths in sources.items() for path in paths]
    total = sum(path.stat().st_size for _, path in files)
    done = 0  # bytes, of the files before this one
    with Bar("read", total, "B") as bar:
        for domain, path in files:
            with open(path, "rb") as file:
                for number, line in enumerate(records(path, file, keys), 1):
                    if domain in full:
                        break
                    bar.to(done + file.tell(), domain or path.name)
                    if not is_txt(path) and isinstance(line, bytes) and not line.strip():
                        continue
                    try:
                        record = record_of(line, path, number, text_key)
                        text = look_up(record, text_key)
                        label = look_up(record, domain_key) if domain_key else domain
                        yield Document(label, text)
                    except (ValueError, RecursionError) as e:
                        kind = "" if type(e) is ValueError else f"{type(e).__name__}: "
                        yield BadLine(domain, path, number, f"{kind}{e}"[:300])
            done += path.stat().st_size


# ---- splits ----


class LeftOut(NamedTuple):
    """What goes into no bin: it is "bad" (then with an error's message), "empty" or "duplicate"."""

    domain: str | None
    reason: str
    message: str = ""


def hash_of(text: str) -> int:
    """64 bits of the text alone, which tell exact duplicates and choose the split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[8:], "little")


def split_of(key: int, fractions: dict[str, float]) -> str:
    """The split of a text with this hash. fractions: {"val", "test": share of the documents}."""
    x = key / 2**64
    if x < fractions["test"]:
        return "test"
    if x < fractions["test"] + fractions["val"]:
        return "val"
    return "train"


def domain_named(label: str, by_record: bool) -> str:
    """A domain's name: as given or, if records name it, made fit for a file. Raises InputError."""
    domain = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_") if by_record else label
    if not DOMAIN.fullmatch(domain):
        use = "use A-Z a-z 0-9 - _ (not mean, improved, worst)"
        raise InputError(f"{label[:100]!r} cannot be a domain; {use}")
    return domain


def place(
    documents: Iterable[Document | BadLine], fractions: dict[str, float], by_record: bool = False
) -> Iterator[list[Document | LeftOut]]:
    """Documents with their splits, less empty and duplicate ones, in lists of some BLOCK of text.

    Duplicates are told within a domain, by a 64-bit hash of every document that is kept in memory.
    Raises InputError for a name that cannot be a domain's, and for two that not every disk tells
    apart.
    """
    batch = []
    size = 0  # of its text, about
    labels: dict[str, str] = {}  # by name of the domain in lower case
    seen: dict[str, set[int]] = defaultdict(set)
    for document in documents:
        if isinstance(document, BadLine):
            where = f"{document.path}:{document.number}"
            message = f"{where}: {document.why}; --max-bad N lets N such lines pass"
            batch.append(LeftOut(document.domain, "bad", message))
        else:
            label, text, _ = document
            domain = domain_named(label, by_record)
            known = labels.setdefault(domain.lower(), label)
            if known != label:
                both = f"{known!r} and {label!r} would both be called {domain.lower()}"
                raise InputError(f"{both}; rename one of them")
            key = hash_of(text)
            if not text.strip():
                batch.append(LeftOut(domain, "empty"))
            elif key in seen[domain]:
                batch.append(LeftOut(domain, "duplicate"))
            else:
                batch.append(Document(domain, text, split_of(key, fractions)))
                seen[domain].add(key)
                size += len(text)
        size += 100  # what holds no text takes memory too
        if size >= BLOCK:
            yield batch
            batch = []
            size = 0
    yield batch


# ---- the sample ----


SAMPLE_DOMAINS = ("cpp", "docstrings", "manual", "python", "stubs")
SAMPLE_FILES = {  # packages, folders of one, or a module in the folder that is meant; and a pattern
    "cpp": (["torch/include"], "*.h"),
    "docstrings": (["numpy", "torch"], "*.py"),
    "python": (["argparse"], "*.py"),
    "stubs": (["numpy", "torch", "matplotlib"], "*.pyi"),
}


def installed_files(packages: list[str], pattern: str) -> Iterator[Path]:
    """The files below installed packages, in an order that is mixed, and the same everywhere."""
    found = []
    for number, package in enumerate(packages):
        name, _, below = package.partition("/")
        folder = Path(find_spec(name).origin).parent / below
        for path in folder.rglob(pattern):
            relative = path.relative_to(folder).as_posix()
            # Of the standard library, neither what pip put there nor the manual once more.
            if not re.match("site-packages|pydoc_data", relative):
                found.append((number, hashlib.sha256(relative.encode()).digest(), path))
    for _, _, path in sorted(found):
        yield path


def docstrings_of(source: str) -> Iterator[str]:
    """The docstrings of the classes and functions in Python source."""
    with contextlib.suppress(SyntaxError):  # of a newer Python
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield text


def pieces_of(text: str) -> Iterator[str]:
    """A text cut, at blank lines before unindented ones, into pieces of about 4096 characters."""
    piece = ""
    for block in re.split(r"(?<=\n)\n+(?=\S)", text):
        if piece and len(piece) + len(block) > 4096:
            yield piece
            piece = ""
        piece += f"\n{block}" if piece else block
    yield piece


def sample_texts(domain: str) -> Iterator[str]:
    """The texts of a sample domain, from files that every installation of the requirements has."""
    if domain == "manual":
        from pydoc_data.topics import topics

        texts = (topics[name] for name in sorted(topics))
    else:
        paths = installed_files(*SAMPLE_FILES[domain])
        texts = (path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    cut = docstrings_of if domain == "docstrings" else pieces_of
    for text in texts:
        yield from cut(text)


def make_sample(
    fractions: dict[str, float], max_bytes: int = 4_000_000
) -> tuple[list[Document], dict[str, float]]:
    """The sample's documents, and {domain: how much of it leaks between splits}.

    Left out are short texts and near-duplicates, of which more than half of the 13-grams of words
    stood in earlier texts. What leaks is the share of the test split's distinct 13-grams that the
    train split has too.
    """
    documents = []
    overlap = {}
    for domain in SAMPLE_DOMAINS:
        seen = set()
        in_split = {split: set() for split in SPLITS}
        size = 0
        for text in sample_texts(domain):
            words = re.findall(r"\w+", text)
            grams = {hash(tuple(words[i : i + 13])) for i in range(len(words) - 12)}
            if len(text) < 200 or len(grams & seen) > len(grams) / 2:
                continue
            seen |= grams
            in_split[split_of(hash_of(text), fractions)] |= grams
            documents.append(Document(domain, text))
            size += len(text.encode())
            if size > max_bytes:
                break
        leaked = in_split["test"] & in_split["train"]
        overlap[domain] = len(leaked) / max(1, len(in_split["test"]))
    return documents, overlap


# ---- bins ----


class Encoded(NamedTuple):
    """A document's tokens as they stand in a bin, and the number of UTF-8 bytes of its text."""

    domain: str
    split: str
    tokens: bytes
    size: int


def encode(batch: list[Document | LeftOut], tokenizer: Tokenizer) -> list[Encoded | LeftOut]:
    """The tokens of each document, ended by the end-of-text id."""
    encoded = []
    for item in batch:
        if isinstance(item, Document):
            ids = np.append(tokenizer.encode(item.text), np.uint16(tokenizer.end_of_text))
            tokens = ids.astype("<u2").tobytes()
            item = Encoded(item.domain, item.split, tokens, len(item.text.encode()))
        encoded.append(item)
    return encoded


_tokenizer: Tokenizer | None = None  # of a worker process


def start_worker(tokenizer: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(tokenizer)
    # Ctrl-C is for the process that started this one. When that ends, this one does, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def encode_in_worker(batch: list[Document | LeftOut]) -> list[Encoded | LeftOut]:
    return encode(batch, _tokenizer)


def encode_all(
    batches: Iterator[list[Document | LeftOut]], workers: int, tokenizer: Path
) -> Iterator[list[Encoded | LeftOut]]:
    """`encode` for every batch, in order, by several processes; few batches wait at a time."""
    if workers <= 1:
        own = Tokenizer(tokenizer)
        for batch in batches:
            yield encode(batch, own)
        return
    context = multiprocessing.get_context("spawn")
    # A few batches wait for every worker, so that memory stays bounded and none is idle.
    with ProcessPoolExecutor(workers, context, start_worker, (tokenizer,)) as pool:
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(encode_in_worker, batch))
            if len(waiting) == 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_bins(
    folder: Path,
    batches: Iterator[list[Encoded | LeftOut]],
    limit_tokens: int | None,
    max_bad: int,
    full: set[str],
) -> tuple[dict[str, dict], dict[str, int]]:
    """Write documents to folder/DOMAIN.SPLIT.bin, which is open only while a batch is added to it.

    A domain that has its limit_tokens goes into `full`, and gets no more. Returns what meta.json
    says of each file, and how many documents were left out, by reason. Raises InputError for more
    than max_bad bad ones.
    """
    files: dict[str, Counter] = {}
    left_out = Counter()
    for batch in batches:
        # What each file gets of this batch, so that none need stay open.
        contents = defaultdict(bytearray)
        for item in batch:
            if item.domain in full:
                continue
            if isinstance(item, LeftOut):
                left_out[item.reason] += 1
                if left_out["bad"] > max_bad:
                    raise InputError(item.message)
                continue
            names = [f"{item.domain}.{split}" for split in SPLITS]
            for name in names:
                files.setdefault(name, Counter(documents=0, tokens=0, bytes=0))
            name = f"{item.domain}.{item.split}"
            contents[name] += item.tokens
            files[name].update(documents=1, tokens=len(item.tokens) // 2, bytes=item.size)
            if limit_tokens and sum(files[name]["tokens"] for name in names) >= limit_tokens:
                full.add(item.domain)
        for name, content in contents.items():
            path = folder / f"{name}.bin"
            with naming(path), open(path, "ab") as file:
                file.write(content)
    return {name: dict(file) for name, file in files.items()}, dict(left_out)


def documents_in(files: dict[str, dict], domain: str) -> int:
    return sum(files.get(f"{domain}.{split}", {}).get("documents", 0) for split in SPLITS)


def leave_out_small(files: dict[str, dict], min_documents: int, folder: Path) -> int:
    """Take domains of fewer documents out of a data set; returns how many documents they had."""
    left_out = 0
    for domain in {name.rpartition(".")[0] for name in files}:
        n = documents_in(files, domain)
        if n < min_documents:
            left_out += n
            for split in SPLITS:
                del files[f"{domain}.{split}"]
                (folder / f"{domain}.{split}.bin").unlink(missing_ok=True)
    return left_out


def check_no_split_is_empty(files: dict[str, dict], domains: Iterable[str | None]) -> None:
    """Raise InputError if a split of a domain, or one of these domains, has no document."""
    expected = [*files, *(f"{domain}.train" for domain in domains if domain)]
    if not expected:
        raise InputError("every split is left empty, of 0 documents; the sources hold no text")
    for name in expected:
        if name not in files or not files[name]["documents"]:
            n = documents_in(files, name.rpartition(".")[0])
            unit = "a document is in one split: cut long ones up (a paragraph each), add some"
            way_out = f"{unit}, raise --val- and --test-fraction, or --min-documents {n + 1}"
            raise InputError(f"{name} is left empty, of {n} documents; {way_out}")


# ---- prepare ----


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE, and write its tokenizer.json."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, 0, sys.stderr.isatty(), [END_OF_TEXT])
    tokenizer.save(str(path))


def train_texts(
    documents: Iterable[Document | BadLine], fractions: dict[str, float], every: int
) -> Iterator[str]:
    """The train split's texts or, by their hash, one in so many."""
    for document in documents:
        if isinstance(document, Document):
            key = hash_of(document.text)
            if split_of(key, fractions) == "train" and key % every == 0:
                yield document.text


@contextlib.contextmanager
def staged(out: Path, name: str) -> Iterator[Path]:
    """A hidden folder beside `out`, for this process alone, which is gone when the block ends."""
    stage = out.with_name(f".{out.name}-{name}.partial")
    stage.mkdir(parents=True, exist_ok=True)
    with locked(stage / "tokenizer.json", out):
        for leftover in stage.glob("*.bin"):  # of one that was killed
            leftover.unlink()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def merged(old: dict, new: dict, out: Path) -> dict:
    """The meta.json of a data set to which domains are added. Raises InputError for old ones."""
    twice = old["files"].keys() & new["files"].keys()
    if twice:
        raise InputError(f"{out} has {min(twice)} already; --add is for other domains")
    both = dict(old)
    both["files"] = dict(sorted((old["files"] | new["files"]).items()))
    both["sources"] = old.get("sources", {}) | new["sources"]
    both["left_out"] = dict(Counter(old.get("left_out", {})) + Counter(new["left_out"]))
    return both


def publish(stage: Path, out: Path, meta: dict, add: bool) -> None:
    """Make the staged folder the data set `out`, or add its domains to the one there.

    All that is written is on the disk before it has its name, and meta.json is the last.
    """
    with contextlib.ExitStack() as stack:
        bins = [f"{name}.bin" for name in meta["files"]]
        if add:  # as another process may do, too
            stack.enter_context(locked(out / "tokenizer.json", out, wait=True))
            meta = merged(Data(out).meta, meta, out)
        text = json.dumps(meta, indent=1) + "\n"
        (stage / "meta.json").write_text(text, encoding="utf-8")
        if hasattr(os, "sync"):
            os.sync()
        if add:
            for name in (*bins, "meta.json"):
                os.replace(stage / name, out / name)
        else:
            os.rename(stage, out)


def vocabulary_of(tokenizer: str) -> int:
    """The N of train:N; 0 for a tokenizer that there is already. Raises InputError."""
    if not re.fullmatch(r"train:\d{1,9}", tokenizer):
        return 0
    vocab_size = int(tokenizer.removeprefix("train:"))
    if not 257 <= vocab_size <= 2**16:
        raise InputError(f"--tokenizer {tokenizer}: a vocabulary has 257 to 65,536 tokens")
    return vocab_size


def prepare(
    out: str | Path,
    sources: Sources | None = None,
    tokenizer: str = "train:4096",
    *,
    text_key: str = "text",
    domain_key: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    limit_tokens: int | None = None,
    max_bad: int = 0,
    min_documents: int = 0,
    workers: int = 1,
    add: bool = False,
) -> Data:
    """Write a data set to the folder `out`, or add domains to the one there. Raises InputError.

    sources: None makes the sample. tokenizer: what Tokenizer takes, or train:N. domain_key: where
    a record names its domain. fractions: of the documents. The others are the command line's. The
    folder appears whole, at the end, or not at all.
    """
    out = Path(out).resolve()
    if out.exists() and not add:
        raise InputError(f"{out} exists; choose another --out, or --add to it")
    if add and not out.exists():
        raise InputError(f"{out} is not there to add to")
    default = 0.05 if sources else 0.1  # the sample is small
    given = {"val": val_fraction, "test": test_fraction}
    fractions = {split: default if f is None else f for split, f in given.items()}
    if add:
        fractions = Data(out).meta.get("fractions", fractions)
        tokenizer = str(out)
    if not (all(f > 0 for f in fractions.values()) and sum(fractions.values()) < 1):
        raise InputError(f"--val-fraction, --test-fraction: {fractions}: every split needs a share")
    vocab_size = vocabulary_of(tokenizer)
    sources = sources or {}
    sample = []
    overlap = {}
    if not sources:
        sample, overlap = make_sample(fractions)

    def documents(full: set[str] = frozenset()) -> Iterable[Document | BadLine]:
        return read(sources, text_key, domain_key, full) if sources else sample

    # The same command, after it was killed, finds its own leftovers; another one does not.
    name = hashlib.sha256(repr((sources, domain_key)).encode()).hexdigest()[:8]
    with staged(out, name) as stage:
        path = stage / "tokenizer.json"
        if vocab_size:
            files = itertools.chain.from_iterable(sources.values())
            every = 1 + sum(file.stat().st_size for file in files) // 2**27  # of much text, a part
            train_tokenizer(train_texts(documents(), fractions, every), vocab_size, path)
            tokenizer = path
        loaded = Tokenizer(tokenizer)
        path.write_text(loaded.json, encoding="utf-8")

        # From text to bins, as a stream: nothing is read before there is room for it.
        full = set()
        placed = place(documents(full), fractions, by_record=domain_key is not None)
        encoded = encode_all(placed, workers, path)
        files, left_out = write_bins(stage, encoded, limit_tokens, max_bad, full)
        small = leave_out_small(files, min_documents, stage)
        if small:
            left_out["in a small domain"] = small
        check_no_split_is_empty(files, [] if min_documents else sources)
        for file_name, file in files.items():
            file["sha256"] = sha256_of(stage / f"{file_name}.bin")
        # What is said of it all in meta.json, without which a folder is no data set.
        named = {d or domain_key: list(map(str, paths)) for d, paths in sources.items()}
        meta = {"format": FORMAT, "tokenizer": loaded.meta, "fractions": fractions}
        meta |= {"overlap": overlap, "sources": named, "left_out": left_out}
        meta["files"] = dict(sorted(files.items()))
        publish(stage, out, meta, add)
    return Data(out)


# ---- main ----


def parse_sources(words: list[str], domain_key: str | None) -> Sources:
    """Sources as {domain: files}, or with a domain_key as {None: files}. Raises InputError."""
    sources: Sources = {}
    for word in words:
        name, equals, path = (None, "=", word) if domain_key else word.partition("=")
        if not equals or not path:
            expected = "name=path, or --domain-key for records that name their domain"
            raise InputError(f"{word}: expected {expected}")
        sources.setdefault(name, []).extend(source_files(path))
        if Path(path).is_dir():
            files = [file for file in Path(path).rglob("*") if file.is_file()]
            unread = Counter(file.suffix or "no ending" for file in files if not ending(file))
            if unread:
                kinds = ", ".join(f"{n:,} {kind}" for kind, n in unread.items())
                tell(f"{path}: not read: {kinds}")
    return sources


def main():
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # of these, those that this process may use
        cores = len(os.sched_getaffinity(0))
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    what = "file, folder, glob or hf://datasets/…; none: the sample"
    add("sources", nargs="*", metavar="name=source", help=what)
    add("--out", default=SAMPLE, help="folder to write")
    what = "add domains to the data set in --out, with its tokenizer and fractions"
    add("--add", action="store_true", help=what)
    what = "a model, a tokenizer.json, or train:N to train one (the sample: train:4096)"
    add("--tokenizer", help=what)
    add("--text-key", default="text", help="dotted key of a record's text")
    add("--domain-key", help="dotted key of a record's domain; sources then have no name")
    add("--val-fraction", type=float, help="of the documents (default: 0.05; the sample: 0.1)")
    add("--test-fraction", type=float, help="likewise")
    add("--limit-tokens", type=int, metavar="N", help="stop a domain after N tokens")
    add("--min-documents", type=int, metavar="N", default=0, help="leave out smaller domains")
    add("--max-bad", type=int, metavar="N", default=0, help="lines to skip that hold no document")
    add("--workers", type=int, metavar="N", default=cores, help="processes that tokenize")
    args = parser.parse_args()
    for name, low in (("limit_tokens", 1), ("min_documents", 0), ("max_bad", 0), ("workers", 1)):
        if vars(args)[name] is not None and vars(args)[name] < low:
            option = name.replace("_", "-")
            raise InputError(f"--{option} {vars(args)[name]}: expected at least {low}")
    if args.add and not args.sources:
        raise InputError("--add: name the sources to add")
    if args.add and args.tokenizer:
        raise InputError("--add: the data set's own tokenizer is taken; leave --tokenizer out")
    if args.add and (args.val_fraction or args.test_fraction):
        raise InputError("--add: the data set's own fractions are taken; leave them out")
    if args.sources and not args.add and not args.tokenizer:
        ways = "pythia-70m is Pythia's, train:4096 trains one, --add takes a data set's own"
        raise InputError(f"name a --tokenizer: {ways}")
    data = prepare(
        args.out,
        parse_sources(args.sources, args.domain_key) or None,
        args.tokenizer or "train:4096",
        text_key=args.text_key,
        domain_key=args.domain_key,
        val_fraction=args.val_fraction,
        test_fraction=args.test_fraction,
        limit_tokens=args.limit_tokens,
        max_bad=args.max_bad,
        min_documents=args.min_documents,
        workers=args.workers,
        add=args.add,
    )
    print(f"{'':<24}{'documents':>12}{'tokens':>16}{'bytes/token':>13}")
    for name, file in data.meta["files"].items():
        ratio = file["bytes"] / file["tokens"]
        print(f"{name:<24}{file['documents']:>12,}{file['tokens']:>16,}{ratio:>13.2f}")
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in data.meta["left_out"].items())
    print("left out:", left_out or "nothing")
    if data.meta["overlap"]:
        shares = [f"{domain} {share:.0%}" for domain, share in data.meta["overlap"].items()]
        print("13-grams of the test split that the train split has too:", ", ".join(shares))


if __name__ == "__main__":
    cli(main, "; nothing of it is kept")
