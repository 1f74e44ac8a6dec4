r"""Text in, token bins out: a raw uint16 file per domain and split, and what reads them back.

    python prepare.py             # data/sample, from text that pip has just installed, in seconds
    python prepare.py --out data/mine arxiv=papers/ web='crawl/*.jsonl.gz' --tokenizer train:4096
    python prepare.py --out data/pile val.jsonl.zst --domain-key meta.pile_set_name \
                      --tokenizer pythia-70m

A document's split is chosen by the hash of its text alone, and never changes.
"""

import argparse
import ast
import contextlib
import errno
import functools
import gc
import glob
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

FORMAT = 1  # of meta.json and the bins beside it
SPLITS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
SAMPLE = "data/sample"
FEW_DOCUMENTS = 10  # an interval from fewer says little; such a domain is marked
SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


# ---- errors and the command line ----


class InputError(Exception):
    """The input cannot be used; the message is one line: what is wrong, where, and what to do."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds to every option's help its default, if it has one."""

    def _get_help_string(self, action):
        has_none = action.default is None or action.default is False  # 0 is a default, but == False
        if has_none or not action.option_strings or action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with a script's docstring as its help, and with errors of one line."""

    def __init__(self, doc: str):
        # No abbreviations: commands to paste look for options by their full names.
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        raise InputError(f"{message} (python {self.prog} --help lists the options)")


def cli(main, way_on: str = "") -> None:
    """Run a script's main function; bad input ends in one line on stderr and exit status 2."""
    # way_on: what to do next, said when Ctrl-C or the system, not bad input, ended the run.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # of a daemon, for one
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        # A file's name or a terminal that is not UTF-8 spoils a character, not the run.
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        with bars_aside():
            print(f"\ninterrupted{way_on}", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError, UnicodeError, MemoryError, BrokenExecutor) as e:
        message = str(e)
        if isinstance(e, MemoryError):
            message = f"out of memory: {message or 'there is no more'}; free some, or ask for less"
            message += way_on
        elif isinstance(e, OSError) and e.filename:
            message = f"{e.filename}: {e.strerror}"
        elif isinstance(e, OSError):
            message += way_on
        # One line, whatever a library said.
        with bars_aside():
            print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(2)


def check_range(args, names: tuple[str, ...], low: float, high: float = 2**31 - 1) -> None:
    """Raise InputError if one of these options (names in Python) is given and out of range."""
    for name in names:
        value = vars(args)[name]
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {low:,} to {high:,}")


def is_first_process() -> bool:
    """Whether this process prints for all ranks, by torchrun's variables: no torch here."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def bars_aside():
    """A context to print in: progress bars are cleared, and drawn again below when it ends."""
    if "tqdm" in sys.modules:
        return sys.modules["tqdm"].tqdm.external_write_mode()
    return contextlib.nullcontext()


def tell(*lines: str, end: str = "\n") -> None:
    """Print lines, and flush. If nobody reads them any more (`| head`), go on silently."""
    try:
        with bars_aside():
            print(*lines, sep="\n", end=end, flush=True)
    except BrokenPipeError:
        # Otherwise Python complains of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def beside(script: str) -> str:
    """The path of another script, beside this one as it was called, for a command to paste."""
    return shlex.quote(str(Path(sys.argv[0]).with_name(script)))


def first_of(words: list[str], most: int = 4) -> str:
    """Words in one line: the first `most` of them, and how many more there are."""
    more = len(words) - most
    if more > 0:
        words = [*words[:most], f"{more} more"]
    return ", ".join(words)


def shortened(names: list[str], width: int) -> dict[str, str]:
    """Names in at most `width` characters, all distinct: whole, or a number and the end."""
    short = {}
    for number, name in enumerate(names, 1):
        short[name] = name
        if len(name) > width:
            room = width - len(f"{number}…")
            short[name] = f"{number}…{name[-room:]}"
    return short


def new_bar(**look):
    """A tqdm bar, without tqdm's monitor thread, which takes memory."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0
    return tqdm(miniters=1, leave=False, **look)


class Bar(contextlib.AbstractContextManager):
    """How far a stage has come: a bar on a terminal, elsewhere a line every 30 seconds.

    total and done are in units; a unit "B" is bytes.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0):
        self.title = title
        self.total = total
        self.unit = unit
        self.first = done
        self.done = done
        self.began = self.spoke = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self.speaks = is_first_process() and not on_terminal
        look = {"unit": unit, "unit_scale": unit == "B"}
        look["disable"] = not (is_first_process() and on_terminal)
        self.bar = new_bar(desc=title, total=total, initial=done, **look)

    def to(self, done: int, words: str = "") -> None:
        """The stage has come to `done`; words: what else there is to say."""
        self.bar.set_postfix_str(words, refresh=False)
        self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self.speaks and now - self.spoke > SECONDS_BETWEEN_LINES and done > self.first:
            self.spoke = now
            far = f"{self.unit} {done:,} of {self.total:,}"
            if self.unit == "B":
                far = f"{done / self.total:.0%}"
            # By this run's own speed: a resumed stage begins at `first`, not at 0.
            left = (now - self.began) / (done - self.first) * (self.total - done)
            said = filter(None, [far, words, f"{left / 60:.1f} min left"])
            tell(f"{self.title}: {', '.join(said)}")

    def close(self, *error) -> None:
        self.bar.close()

    __exit__ = close


@contextlib.contextmanager
def notice(words: str, shown: bool = True) -> Iterator[None]:
    """Show words on the terminal while the block runs; without a terminal, print them."""
    on_terminal = sys.stderr.isatty()
    shown = shown and is_first_process()
    if shown and not on_terminal:
        tell(words)
    # A tqdm that shows its description only: it takes a line of its own beside another bar.
    with new_bar(desc=words, bar_format="{desc}", disable=not (shown and on_terminal)):
        yield


# ---- files ----


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    # Windows cannot do that to a folder, nor to a file that is open for reading.
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write, which becomes `path` if the block succeeds; or InputError."""
    # What was there stays until the new one is on the disk, whatever happens.
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
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def load_json(path: Path, shape: dict | type = dict) -> dict:
    """The JSON object in a file, of that shape (see `fits`); anything else is an InputError."""

    def named_once(pairs: list[tuple]) -> dict:
        for name, n in Counter(name for name, _ in pairs).items():
            if n > 1:
                raise InputError(f"{path}: {name!r} is named twice; name it once")
        return dict(pairs)

    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(path.read_bytes(), object_pairs_hook=named_once)
        if fits(value, shape):
            return value
    raise InputError(f"{path}: damaged, or not what it should be (a JSON object); make it anew")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to errors of writing to an open file (a full disk), which lack it."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None


def check_place(path: Path, option: str = "--out") -> None:
    """Raise InputError if `path`, and the folders missing above it, cannot be made."""
    above = path.absolute()
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: a broken link; choose another {option}")
    if not above.is_dir():  # a folder that is there need only be writable itself
        above = above.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise InputError(f"{path}: {above} is a file, not a folder; choose another {option}")
    if not os.access(above, os.W_OK):
        raise InputError(f"{path}: {above} cannot be written to; choose another {option}")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(
    path: Path, folder: Path, wait: bool = False, way_out: str = "wait for its end, or end it"
) -> Iterator[None]:
    """Keep other processes out of `folder` while the block runs; a lock ends with its process.

    wait: until another process lets go; otherwise InputError, with that way out.
    """
    with open(path, "a") as file:
        try:
            import fcntl

            at_once = 0 if wait else fcntl.LOCK_NB
            fcntl.flock(file, fcntl.LOCK_EX | at_once)
        except BlockingIOError:
            message = f"{folder}: another process is at work there; {way_out}"
            raise InputError(message) from None
        except (ImportError, OSError) as e:
            # Windows has no such locks, nor have some network file systems.
            warning = f"warning: {folder}: no lock ({e}): do not start a second run there"
            print(warning, file=sys.stderr)
        yield


# ---- the hub ----


@contextlib.contextmanager
def asking_hub(what: str, also: str = "") -> Iterator[None]:
    """Say what is fetched from the hub; if that fails, raise InputError with what helps."""
    from huggingface_hub import logging
    from huggingface_hub.utils import disable_progress_bars

    logging.set_verbosity_error()
    disable_progress_bars()  # it draws some for what is cached, too
    log_in = "hf auth login, or HF_TOKEN in the environment"
    faults = {
        "GatedRepoError": f"the hub gives it to those who asked on its page; then {log_in}",
        "RepositoryNotFoundError": f"the hub has none, or not for you; if you may see it, {log_in}",
        "RevisionNotFoundError": "the hub has it, but not this revision; see its page",
        "HFValidationError": "no name on the hub looks like that; it is ORG/NAME or ORG/NAME@REV",
    }
    try:
        with notice(f"getting {what} from the hub"):
            yield
    except Exception as e:  # of several libraries
        kinds = [kind.__name__ for kind in type(e).__mro__ if kind.__name__ in faults]
        status = getattr(getattr(e, "response", None), "status_code", None)
        # The disk's fault, not the network's: the error names a file, or says there is no room.
        if isinstance(e, OSError) and (e.filename or e.errno in (errno.ENOSPC, errno.EDQUOT)):
            fault = f"the hub's cache: {e.strerror}; HF_HOME puts that elsewhere"
        elif kinds:
            fault = faults[kinds[0]]
        elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
            fault = "it is not in the hub's cache, and HF_HUB_OFFLINE is set; unset it"
        elif status in (401, 403):
            fault = f"the hub does not let you; {log_in}, or ask for access on its page"
        elif status is None:
            fault = "neither in the cache nor can the hub be reached; try the network, HF_ENDPOINT"
        else:
            fault = f"the hub answered {status}; try again later"
        raise InputError(f"{what}: {also}{fault}") from None


def hub_folder(name: str, patterns: list[str]) -> Path:
    """The folder of the hub's cache, named by the commit, with a model's files that match.

    name: `pythia-70m` or `ORG/NAME@REVISION`. Raises InputError.
    """
    repo, _, revision = name.partition("@")
    # A mistyped size fails here, without asking the network.
    if "/" not in repo:
        sizes = r"14m|31m|70m|160m|410m|1b|1\.4b|2\.8b|6\.9b|12b"
        if not re.fullmatch(rf"pythia-({sizes})(-deduped)?", repo):
            raise InputError(f"{name}: no such folder or model; on the hub: ORG/NAME or pythia-70m")
        repo = f"EleutherAI/{repo}"
    if repo.count("/") > 1 or not repo[0].isalnum():
        raise InputError(f"{name}: no such folder; on the hub a name is ORG/NAME or ORG/NAME@REV")
    from huggingface_hub import snapshot_download

    with asking_hub(name, "no such folder, and "):
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))


class HubFile(NamedTuple):
    """A file of a data set on the hub, which comes into the hub's cache when it is first read."""

    path: Path  # in the cache
    repo: str
    commit: str
    name: str
    size: int  # bytes

    def __str__(self) -> str:
        return f"hf://datasets/{self.repo}/{self.name}@{self.commit}"

    def fetch(self) -> Path:
        from huggingface_hub import hf_hub_download

        if not self.path.exists():
            with asking_hub(str(self)):
                hf_hub_download(self.repo, self.name, repo_type="dataset", revision=self.commit)
        return self.path


def hub_files(repo: str, revision: str) -> list[HubFile]:
    """The files of a data set on the hub. None of them is fetched. Raises InputError."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download

    with asking_hub(f"the list of hf://datasets/{repo}{revision}"):
        # Without patterns this fetches no file: only the commit, and the list of its files.
        found = {"repo_type": "dataset", "revision": revision.removeprefix("@") or None}
        folder = Path(snapshot_download(repo, allow_patterns=[], **found))
        commit = folder.name
        listed = get_cached_repo_tree(repo, repo_type="dataset", revision=commit)
    return [HubFile(folder / file.path, repo, commit, file.path, file.size) for file in listed]


# ---- tokenizer ----


class Tokenizer:
    """A tokenizer.json (a file, a model's folder, or a model on the hub): text to ids and back.

    Raises InputError, and OSError where there is no such file.
    """

    def __init__(self, file_or_name: str | Path):
        import tokenizers

        path = Path(file_or_name)
        if not path.exists() and path.suffix != ".json":
            path = hub_folder(str(file_or_name), ["tokenizer.json"])
        if path.is_dir():
            path = path / "tokenizer.json"
            if not path.exists():
                raise InputError(f"{path}: not there; copy the tokenizer.json that belongs to it")
        self.json = path.read_bytes().decode("utf-8", "replace")
        try:
            model = json.loads(self.json)["model"]
            if model.get("continuing_subword_prefix") and model.get("merges"):
                raise ValueError("merges with continuing_subword_prefix")  # the library would abort
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # a panic of the library's Rust is not an Exception
            what = f"not a tokenizer.json ({str(e)[:100]})"
            raise InputError(f"{path}: {what}; pythia-70m has one") from None
        # In a text, special tokens are text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocab = self._tokenizer.get_vocab()
        self.vocab_size = 1 + max(vocab.values(), default=0)
        self.end_of_text = vocab.get(END_OF_TEXT)
        if self.end_of_text is None or self.vocab_size > 2**16:
            expected = f"expected {END_OF_TEXT}, and at most 65,536 (uint16), as pythia-70m has"
            raise InputError(f"{path}: {self.vocab_size:,} tokens; {expected}")
        self._path = path
        # Otherwise a text that spells the token out could end its document.
        if self.end_of_text in self._slowly(f"a {END_OF_TEXT} b"):
            raise InputError(f"{path}: a text can hold {END_OF_TEXT}; make that a special token")
        self._encoded = 0  # characters so far
        self.meta = {
            "sha256": hashlib.sha256(self.json.encode()).hexdigest(),
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
        }

    @functools.cached_property
    def _tiktoken(self):
        """tiktoken's encoder, where it gives the same ids; it takes a moment to make."""
        return rank_encoding(json.loads(self.json), self._tokenizer)

    @functools.cached_property
    def _fastokens(self):
        """The encoder of fastokens, where that is installed and gives the same ids as tiktoken."""
        return fastokens_encoding(json.loads(self.json), self._tiktoken)

    def encode(self, text: str) -> np.ndarray:
        """(n,) uint16, without an end-of-text id. Raises UnicodeEncodeError for a lone surrogate,
        and InputError for text that the tokenizer cannot encode."""
        text.encode()
        if self._tiktoken is None:
            return self._slowly(text)
        if self._tokenizer.normalizer and not unicodedata.is_normalized("NFC", text):
            text = self._tokenizer.normalizer.normalize_str(text)
        # For little text, loading fastokens takes longer than it saves.
        self._encoded += len(text)
        if self._encoded > 2**22 and self._fastokens is not None:
            return fastokens_ids(self._fastokens, text)
        # tiktoken panics on a run of about 10^6 white-space characters.
        if len(text) > 10**5 and re.search(r"\s{100000}", text):
            return self._slowly(text)
        return np.array(self._tiktoken.encode_to_numpy(text), dtype=np.uint16)

    def _slowly(self, text: str) -> np.ndarray:
        try:
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        except Exception as e:  # the library knows no other kind
            raise InputError(f"{self._path}: {e}; take a tokenizer that knows any text") from None
        return np.array(encoding.ids, dtype=np.uint16)

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def rank_encoding(spec: dict, tokenizer):
    """The tiktoken encoder with the ids of a byte-level BPE; None if it is something else.

    spec: its tokenizer.json; tokenizer: what the library made of it.
    tiktoken joins the neighbours whose token has the lowest id, `tokenizers` those whose merge
    stands first. These are the same if ids rise in the order of the merges, each merge makes a new
    token of older ones, and every token encodes to itself: then only its own merge makes a token.
    """
    import tiktoken
    from tokenizers.pre_tokenizers import ByteLevel

    try:
        vocab = spec["model"]["vocab"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        # Added tokens that are not special may only be runs of spaces, as in Pythia's tokenizer.
        runs = [token["content"] for token in spec["added_tokens"] if not token["special"]]
        if not is_plain_byte_level_bpe(spec, runs):
            return None
        if not ids_are_ranks(vocab, merges, special, tokenizer):
            return None
        # A vocabulary writes a byte as a character: printable ones as themselves, the others as
        # the characters from U+0100 on.
        characters = sorted(ByteLevel.alphabet())
        printable = [ord(c) for c in characters if ord(c) < 256]
        others = sorted(set(range(256)) - set(printable))
        byte_of = dict(zip(characters, printable + others, strict=True))
        plain = [(token, i) for token, i in vocab.items() if token not in special]
        ranks = {bytes(byte_of[c] for c in token): i for token, i in plain}
        ranks |= {run.encode(): tokenizer.token_to_id(run) for run in runs}
    except (KeyError, TypeError, ValueError, AttributeError):  # not the JSON of such a BPE
        return None
    # tiktoken panics on two tokens of one id, and on a text with a byte that is no token; UTF-8
    # has all bytes but C0, C1 and F5 to FF.
    used_by_utf8 = [*range(0xC0), *range(0xC2, 0xF5)]
    if len(set(ranks.values())) < len(ranks):
        return None
    if not all(bytes([b]) in ranks for b in used_by_utf8):
        return None
    # GPT-2's pattern. If runs of spaces are tokens of their own, they are cut out first, and no
    # white space after that has two spaces in a row.
    first = ""
    space = r"\s"
    if runs:
        first = rf" {{2,{len(runs) + 1}}}|"
        space = r"(?:[^\S ]| (?! ))"
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    pattern = rf"{first}{words}|{space}+(?!\S)|{space}+"
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def fastokens_encoding(spec: dict, tiktoken_encoding):
    """The encoder of fastokens, if it is there and gives hard texts the same ids; or None.

    spec: the tokenizer.json; tiktoken_encoding: the encoder of it. Text comes to both in NFC.
    """
    try:
        import fastokens

        encoder = fastokens.Tokenizer.from_json_str(json.dumps(spec | {"normalizer": None}))
        text = hard_text()
        if fastokens_ids(encoder, text).tolist() == tiktoken_encoding.encode_ordinary(text):
            return encoder
    except KeyboardInterrupt:
        raise
    except BaseException:  # it is not there, is of another version, or its Rust panics
        return None
    return None


def hard_text() -> str:
    """What tokenizers differ in: characters of every kind, runs of spaces, contractions, digits."""
    # A letter joins the a before it, a digit the 1 after it, white space the space between. Not
    # every code point is needed: a new version of Unicode adds many characters in a row.
    code_points = [*range(0, 0xD800, 3), *range(0xE000, 0x20000, 3), *range(0x20000, 0x33480, 97)]
    text = "".join(f"a{chr(i)} {chr(i)}1" for i in code_points)
    text += "".join(" " * n + end for n in range(60) for end in ("x", ".", "\n", "\t ", "\u3000"))
    text += "don't we'll 'Some 'Then 'Mist 'Dear 'LLAMA 'Very 'Read 's's they\u2019re\r\n\r\n "
    return text + " ".join(["<|endoftext|>", "<|padding|>", *(str(7**n) for n in range(40))])


def fastokens_ids(encoder, text: str) -> np.ndarray:
    """(n,) uint16; special tokens in the text are text."""
    ids, _ = encoder.encode_batch_flat([text], split_special_tokens=True)
    return np.frombuffer(ids, dtype="<u4").astype(np.uint16)


def is_plain_byte_level_bpe(spec: dict, runs: list[str]) -> bool:
    """Whether ids depend on nothing but vocabulary, merges, NFC and these runs of spaces."""
    for token in spec["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return False
        # Such a token is looked for before NFC; here NFC always comes first.
        if not token["special"] and not token["normalized"]:
            return False
    pre = spec["pre_tokenizer"]
    known = ("vocab", "merges")
    rest = {key: value for key, value in spec["model"].items() if value and key not in known}
    return (
        rest == {"type": "BPE"}
        and spec["normalizer"] in (None, {"type": "NFC"})
        and (pre["type"], pre["add_prefix_space"]) == ("ByteLevel", False)
        and pre.get("use_regex", True)
        and sorted(runs) == [" " * n for n in range(2, len(runs) + 2)]
    )


def ids_are_ranks(vocab: dict[str, int], merges: list, special: set[str], tokenizer) -> bool:
    """Whether ids rise with the merges, and the merges make every token but the special ones."""
    newest = -1
    for a, b in merges:
        made = vocab[a + b]
        if made <= max(newest, vocab[a], vocab[b]):
            return False
        newest = made
    for token, i in vocab.items():
        itself = [t.id for t in tokenizer.model.tokenize(token)] == [i]
        # True of all tokens but the special ones, which no text may become.
        if itself == (token in special):
            return False
    return True


# ---- data ----

# A domain's name is part of file names. The excluded names are those of other rows in tables.
DOMAIN = re.compile(r"(?!(?:mean|improved|worst)$)[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
AGAIN = "remove the folder and prepare it again"
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
            make = "name one by --data; prepare.py makes them, in new folders"
            if str(folder) == SAMPLE:
                make = "python prepare.py makes it"
            raise InputError(f"{folder}: not a data set (no meta.json); {make}")
        self.meta = load_json(path)
        if not is_meta(self.meta):
            raise InputError(f"{path}: damaged, or not of format {FORMAT}; {AGAIN}")
        for name, file in self.meta["files"].items():
            bin_path = self.folder / f"{name}.bin"
            size = 2 * file["tokens"]
            if not bin_path.is_file() or bin_path.stat().st_size != size:
                raise InputError(f"{bin_path}: missing, or not of {size:,} bytes; {AGAIN}")
        self.domains: list[str] = sorted({name.rpartition(".")[0] for name in self.meta["files"]})
        self.vocab_size: int = self.meta["tokenizer"]["vocab_size"]
        hashes = [(name, file["sha256"]) for name, file in sorted(self.meta["files"].items())]
        # Changes when any token does.
        self.identity = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]
        self._root = self.folder.absolute()  # right even after a chdir
        self._map = functools.lru_cache(OPEN_MAPS)(np.memmap)

    def tokens(self, domain: str, split: str) -> np.memmap:
        """The documents in a row, each ended by the end-of-text id: (n,) uint16, read-only."""
        return self._map(self._root / f"{domain}.{split}.bin", "<u2", "r")

    def size(self, domain: str, split: str) -> dict:
        """The split's number of documents, tokens and UTF-8 bytes of text, and its sha256."""
        return self.meta["files"][f"{domain}.{split}"]

    def windows(self, domain: str, split: str, seq_len: int) -> int:
        """How many whole windows the split holds. Raises InputError if there is none."""
        tokens = self.size(domain, split)["tokens"]
        if seq_len < 1 or tokens <= seq_len:
            which = f"{domain}'s {split} split, which has {tokens:,} tokens"
            raise InputError(f"--seq-len {seq_len}: too long for {which}; take a shorter one")
        return (tokens - 1) // seq_len

    def window(self, domain: str, split: str, seq_len: int, number: int) -> np.ndarray:
        """Window `number` of the split: (T + 1,) uint16, a copy, as a view keeps its file open."""
        start = number * seq_len
        return np.array(self.tokens(domain, split)[start : start + seq_len + 1])

    def documents_of(self, domain: str, split: str, seq_len: int, numbers) -> np.ndarray:
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
        """The same for tokenizer.json alone, which takes no time."""
        self.check_file("tokenizer.json", self.meta["tokenizer"]["sha256"])

    def check_file(self, name: str, sha256: str) -> None:
        path = self.folder / name
        if not path.is_file() or sha256_of(path) != sha256:
            raise InputError(f"{path}: missing or damaged, not what meta.json says; {AGAIN}")


def is_meta(meta: dict) -> bool:
    """Whether a meta.json has all that is used of it, for every domain and split."""
    tokenizer = {"sha256": str, "vocab_size": int, "end_of_text": int}
    if not fits(meta, {"format": int, "tokenizer": tokenizer, "files": dict}):
        return False
    if not fits(meta.get("fractions", {"val": 0.1, "test": 0.1}), {"val": float, "test": float}):
        return False
    domains = {name.rpartition(".")[0] for name in meta["files"]}
    expected = {f"{domain}.{split}" for domain in domains for split in SPLITS}
    if meta["format"] != FORMAT or not domains or set(meta["files"]) != expected:
        return False
    for file in meta["files"].values():
        if not fits(file, {"documents": int, "tokens": int, "bytes": int, "sha256": str}):
            return False
        # Both are divided by.
        if min(file["tokens"], file["bytes"]) < 1:
            return False
    return all(map(DOMAIN.fullmatch, domains))


def fits(value, shape: dict | type) -> bool:
    """Whether a value from JSON has this type or, for an object, values of these types."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(fits(value.get(k), v) for k, v in shape.items())
    return type(value) is shape


# ---- sources to documents ----

READABLE = re.compile(r"\.(txt|jsonl|ndjson|json)(\.gz|\.zst)?$|\.parquet$")
BLOCK = 2**20  # bytes, about, that a worker gets or that are written at a time
LONGEST = 2**24  # bytes of the longest document
POINTER = "version https://git-lfs"  # begins a file that only stands for another
PULL = "it stands for a file that Git LFS keeps: git lfs pull"
# Files by domain; None: their records name the domain.
Sources = dict[str | None, list[Path | HubFile]]


class Keys(NamedTuple):
    """Where a record has its text and, if it names one, its domain; nested keys with dots."""

    text: str = "text"
    domain: str | None = None


class Line(NamedTuple):
    """A line of a file, a row of a .parquet or the whole of a .txt, as it was read."""

    record: bytes | dict
    path: Path
    number: int  # from 1
    domain: str | None  # None: the record names it


class Document(NamedTuple):
    """A text, and the domain that it belongs to."""

    domain: str
    text: str


class LeftOut(NamedTuple):
    """What goes into no bin. reason: "empty", "duplicate" or, with an error's message, "bad" (a
    line) or "unreadable" (the rest of a file, or a text that the tokenizer cannot encode)."""

    domain: str | None
    reason: str
    message: str = ""


Item = Line | Document | LeftOut  # what a stream of text is made of


def check_left_out(item: LeftOut, bad: int, max_bad: int) -> None:
    """Raise InputError if this one is unreadable, or more than max_bad are bad."""
    if item.reason == "unreadable" or bad > max_bad:
        raise InputError(item.message)


def ending(file: Path | HubFile) -> str:
    """A file's kind, by its name: ".jsonl.gz", ".txt", …; "" for what is not read."""
    match = READABLE.search(file.name.lower())
    return match[0] if match else ""


def size_of(file: Path | HubFile) -> int:
    return file.size if isinstance(file, HubFile) else file.stat().st_size


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and all folders below it, except hidden ones."""
    found = []
    # Links are followed, but into no folder twice: two that lead to each other would not end.
    seen = {os.path.realpath(folder)}
    for above, folders, names in os.walk(folder, followlinks=True):
        found += [Path(above, name) for name in names if not name.startswith(".")]
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(above, name))
            if name.startswith(".") or real in seen:
                folders.remove(name)
            seen.add(real)
        folders.sort()
    return found


def source_files(source: str) -> list[Path | HubFile]:
    """The files of a path, a folder and all below it, a glob or hf://datasets/ORG/NAME/GLOB@REV."""
    hub = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)/([^@]+)(@[^@]+)?", source)
    if source.startswith("hf:") and not hub:
        raise InputError(f"{source}: expected hf://datasets/ORG/NAME/GLOB, perhaps with @REVISION")
    path = Path(source)
    there = ""
    if hub:
        repo, pattern, revision = hub.groups(default="")
        listed = hub_files(repo, revision)
        there = f"; there are {', '.join(sorted(file.name for file in listed)[:10])}"
        found = [file for file in listed if matches(file.name.split("/"), pattern.split("/"))]
    elif path.is_dir():
        found = files_below(path)
    elif path.exists():  # even if its name looks like a glob
        found = [path]
    elif source.startswith(("http://", "https://")):
        raise InputError(f"{source}: fetch it, and give its path; of the hub: hf://datasets/…")
    elif not glob.has_magic(source):
        raise InputError(f"{source}: no such file or folder")
    else:
        found = [Path(name) for name in glob.glob(source, recursive=True)]
    if not hub:
        # A file is read once, whatever links lead to it.
        real = {os.path.realpath(file): file for file in sorted(found, reverse=True)}
        found = [file for file in real.values() if not file.is_dir()]
    files = sorted(file for file in found if ending(file))
    for file in files:
        if isinstance(file, Path) and not file.is_file():
            raise InputError(f"{file}: a broken link, or no file (a pipe?); put its text there")
    if not files and path.is_file():
        kind = "".join(path.suffixes[-2:]) or "without an ending"
        raise InputError(f"{source}: {kind} is not read; make it .jsonl, .txt or .parquet")
    kinds = Counter()
    if path.is_dir():
        read_once = {os.path.realpath(file) for file in files}
        there_are = [file for file in sorted(path.rglob("*")) if file.is_file()]
        unread = [file for file in there_are if os.path.realpath(file) not in read_once]
        kinds.update(file.suffix or "no ending" for file in unread)
    counts = first_of([f"{n:,} {kind}" for kind, n in kinds.most_common()])
    if kinds and not files:
        there = (
            f"; there are {counts} (hidden, or of another kind: docs/data.md says how to take it)"
        )
    if not files:
        known = ".txt, .jsonl, .ndjson, .json (these also with .gz or .zst) or .parquet"
        raise InputError(f"{source}: no file there that ends in {known}{there}")
    # Otherwise someone would notice only much later that some text is missing.
    if kinds:
        tell(f"{source}: not read: {counts} (hidden, or of another kind)")
    return files


def matches(name: list[str], pattern: list[str]) -> bool:
    """Whether a glob matches a file on the hub, as on a disk; both are split at the slashes."""
    if not pattern:
        return not name
    if pattern[0] == "**":  # any number of folders
        return any(matches(name[i:], pattern[1:]) for i in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and matches(name[1:], pattern[1:])


def records(path: Path, file, keys: Keys) -> Iterator[bytes | dict]:
    """The lines of an open file as bytes (a .txt is one line), or a .parquet's rows as dicts.

    Raises InputError if it cannot be read to its end.
    """
    kind = ending(path)
    library = ""
    stream = file
    try:
        if kind == ".parquet":
            library = "pyarrow"
            from pyarrow.parquet import ParquetFile

            parquet = ParquetFile(file)
            # If a column is missing, all are read: the error message lists those that are there.
            there = {*parquet.schema_arrow.names}
            columns = [key if key in there else key.split(".")[0] for key in filter(None, keys)]
            if not there.issuperset(columns):
                columns = None
            for batch in parquet.iter_batches(16, columns=columns):
                yield from batch.to_pylist()
            return
        if kind.endswith(".gz"):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file), 2**17)
        elif kind.endswith(".zst"):
            library = "backports.zstd"
            if sys.version_info >= (3, 14):
                from compression import zstd
            else:
                from backports import zstd
            # Public dumps are packed with windows of up to 2^31 bytes.
            options = {zstd.DecompressionParameter.window_log_max: 31}
            stream = zstd.ZstdFile(file, options=options)
        if kind.startswith(".txt"):
            yield stream.read(LONGEST + 1)
            return
        while line := stream.readline(LONGEST + 1):
            yield line
            # A line that is too long: enough of it was read to say so; skip the rest.
            while len(line) > LONGEST and not line.endswith(b"\n"):
                line = stream.readline(LONGEST + 1)
    except Exception as e:  # of many libraries
        with open(path, "rb") as again:
            is_pointer = again.read(40).startswith(POINTER.encode())
        way_out = "get it again or, if it is of another kind, give it that one's ending"
        if isinstance(e, ImportError):
            way_out = f"pip install {library}"
        elif isinstance(e, MemoryError) or "not enough memory" in str(e):
            way_out = "free some memory"
        elif is_pointer:
            way_out = PULL
        reason = str(e)[:200] or type(e).__name__
        raise InputError(f"{path}: cannot be read to its end: {reason}; {way_out}") from None


def look_up(record: dict, key: str) -> str:
    """The string under a key, or under a path of keys joined by dots. Raises ValueError."""
    if not isinstance(record, dict):
        way_out = "jq -c '.[]' takes a list apart, jq -c '{text: .}' makes an object of a string"
        raise ValueError(f"no object; a line is one: {way_out}")
    path = key.split(".")
    if key in record:
        path = [key]
    value = record
    for part in path:
        if not isinstance(value, dict):
            value = {}
        value = value.get(part)
    if not isinstance(value, str):
        names = []
        for name, inner in record.items():
            below = [f"{name}.{part}" for part in inner] if isinstance(inner, dict) else []
            names += below or [name]
        keys = first_of(list(map(repr, names)), 10)
        ways = "--text-key and --domain-key take others"
        raise ValueError(f"no string under {key!r}; there are {keys or 'no keys'}; {ways}")
    value.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    return value


def document_of(line: Line, keys: Keys) -> Document | LeftOut:
    """The document in a line, or a LeftOut that says why there is none."""
    record, path, number, domain = line
    is_txt = ending(path).startswith(".txt")
    try:
        if isinstance(record, bytes):
            if len(record) > LONGEST:
                raise ValueError(f"longer than {LONGEST:,} bytes")
            text = record.decode()
            if number == 1:  # where some editors put a byte order mark
                text = text.removeprefix("\ufeff")
            if text.startswith(POINTER):
                raise ValueError(PULL)
            if text.count("\0") > len(text) / 4:  # of ASCII in UTF-16 half, which is valid UTF-8
                raise ValueError("full of NULs: no text, or UTF-16 (iconv -f UTF-16LE -t UTF-8)")
            if text.strip() in ("{", "[") and not is_txt:
                way_out = "a line is an object, as jq -c . or, of a list, jq -c '.[]' writes it"
                raise ValueError(f"JSON over many lines; {way_out}")
            record = {keys.text: text}
            if not is_txt:
                record = json.loads(text)
        if keys.domain:
            label = look_up(record, keys.domain)
            domain_named(label, by_record=True)  # or it is a bad line
            return Document(label, look_up(record, keys.text))
        return Document(domain, look_up(record, keys.text))
    except (ValueError, RecursionError, InputError) as e:
        why = str(e)
        if isinstance(e, UnicodeDecodeError):
            why = f"not UTF-8, which iconv -f UTF-16 -t UTF-8 makes of UTF-16, for one ({e})"
        elif type(e) not in (ValueError, InputError):
            why = f"{type(e).__name__}: {e}"
        message = f"{path}:{number}: {why[:300]}; --max-bad N lets N such lines pass"
        return LeftOut(domain, "bad", message)


def read(sources: Sources, keys: Keys, full: set[str] = frozenset()) -> Iterator[Item]:
    """Every line of the sources that is not blank, while a bar counts bytes.

    A .txt is a line even if it is blank. Rows of a .parquet come as documents, and what cannot be
    read of a file as LeftOut. full: domains to read no further; the caller adds to it meanwhile.
    """
    files = [(domain, file) for domain, files in sources.items() for file in files]
    done = 0  # bytes, to the end of this file
    with Bar("read", sum(size_of(file) for _, file in files), "B") as bar:
        for domain, source in files:
            start = done
            done += size_of(source)
            # Files are fetched from the hub one at a time, and none for a domain that is full.
            if domain in full:
                continue
            path = source
            if isinstance(source, HubFile):
                path = source.fetch()
            is_txt = ending(path).startswith(".txt")
            with open(path, "rb") as file:
                try:
                    for number, record in enumerate(records(path, file, keys), 1):
                        if domain in full:
                            break
                        bar.to(start + file.tell(), domain or path.name)
                        line = Line(record, path, number, domain)
                        if isinstance(record, dict):  # parsed already, with more than is needed
                            yield document_of(line, keys)
                        elif is_txt or not record.isspace():
                            yield line
                # If the domain is full by then, the fault does not matter.
                except InputError as e:
                    yield LeftOut(domain, "unreadable", str(e))


def documents_in(items: Iterable[Item], keys: Keys) -> Iterator[Document | LeftOut]:
    """The items, with each Line replaced by what is in it."""
    for item in items:
        if isinstance(item, Line):
            item = document_of(item, keys)
        yield item


# ---- splits ----


def hash_of(text: str) -> int:
    """64 bits of the text alone, which identify exact duplicates and choose the split."""
    # The last 8 of 16 bytes: with any others, documents in existing data sets would change splits.
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
    domain = label
    if by_record:
        domain = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
    if not DOMAIN.fullmatch(domain):
        use = "use A-Z a-z 0-9 - _ (100 at most; not mean, improved, worst)"
        raise InputError(f"{label[:100]!r} cannot be a domain; {use}")
    return domain


# ---- the sample ----

# By domain: packages, folders in a package, or a module whose folder is meant; and a glob. The
# fifth domain, `manual`, is Python's manual.
SAMPLE_FILES = {
    "cpp": (["torch/include"], "*.h"),
    "docstrings": (["numpy", "torch"], "*.py"),
    "python": (["argparse"], "*.py"),
    "stubs": (["numpy", "torch", "matplotlib"], "*.pyi"),
}
SHORTEST = 200  # characters of a text of the sample


def pieces_of(text: str) -> Iterator[str]:
    """A text cut, at blank lines before unindented ones, into pieces of about 4096 characters."""
    piece = ""
    for block in re.split(r"(?<=\n)\n+(?=\S)", text):
        if piece and len(piece) + len(block) > 4096:
            yield piece
            piece = block
        elif piece:
            piece += f"\n{block}"
        else:
            piece = block
    yield piece


def docstrings_of(module: str) -> Iterator[str]:
    """The docstrings of the classes and functions in a module's text, the outermost first.

    Some short ones are missing, and some that are not in triple double quotes.
    """
    # Syntax trees take most of the sample's time: a class or function whose docstrings are all too
    # short for the sample gets none.
    parts = []
    for part in re.split(r"\n(?=class |def |@)", module):
        quoted = part.split('"""')[1::2]
        if max(map(len, quoted), default=0) >= SHORTEST:
            parts.append(part)
    nodes = deque()
    try:
        nodes.extend([ast.parse(part) for part in parts])
    except SyntaxError:  # it was cut inside a string, or is for a newer Python
        with contextlib.suppress(SyntaxError):
            nodes.append(ast.parse(module))
    while nodes:
        node = nodes.popleft()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""
        # Like ast.walk, but without expressions: they are most of a tree and hold no docstring.
        for statements in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes.extend(getattr(node, statements, ()))


def sample_texts(domain: str) -> Iterator[str]:
    """The texts of a sample domain, from files that every installation of the requirements has."""
    if domain == "manual":
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield from pieces_of(topics[name])
        return
    packages, pattern = SAMPLE_FILES[domain]
    found = []
    for number, package in enumerate(packages):
        name, _, below = package.partition("/")
        folder = Path(find_spec(name).origin).parent / below
        for path in folder.rglob(pattern):
            relative = path.relative_to(folder).as_posix()
            # In the standard library's folder: neither pip's packages nor the manual again.
            if not re.match("site-packages|pydoc_data", relative):
                found.append((number, hashlib.sha256(relative.encode()).digest(), path))
    # Sorted by a hash, files are in a mixed order that is the same everywhere.
    for _, _, path in sorted(found):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if domain == "docstrings":
            yield from docstrings_of(text)
        else:
            yield from pieces_of(text)


def make_sample(
    fractions: dict[str, float], max_bytes: int = 4_000_000
) -> tuple[list[Document], dict[str, float]]:
    """The sample's documents, and {domain: how much of it leaks between splits}."""
    documents = []
    overlap = {}
    domains = sorted([*SAMPLE_FILES, "manual"])
    bar = Bar("make the sample", len(domains) * max_bytes, "B")
    # Syntax trees are freed without the collector, whose passes took a third of the time.
    gc.disable()
    for number, domain in enumerate(domains):
        seen = set()
        in_split = {split: set() for split in SPLITS}
        size = 0
        for text in sample_texts(domain):
            # Boilerplate comes again and again: leave out short texts, and those that share more
            # than half of their 13-grams of words with earlier ones.
            if len(text) < SHORTEST:
                continue
            words = re.findall(r"\w+", text)
            grams = {hash(tuple(words[i : i + 13])) for i in range(len(words) - 12)}
            if len(grams & seen) > len(grams) / 2:
                continue
            seen |= grams
            in_split[split_of(hash_of(text), fractions)] |= grams
            documents.append(Document(domain, text))
            size += len(text.encode())
            bar.to(number * max_bytes + size, domain)
            if size > max_bytes:
                break
        # What leaks is the share of the test split's 13-grams that the train split has too.
        leaked = in_split["test"] & in_split["train"]
        overlap[domain] = len(leaked) / max(1, len(in_split["test"]))
    gc.enable()
    bar.close()
    return documents, overlap


# ---- bins ----


class Encoded(NamedTuple):
    """A document as it stands in a bin: its tokens, the last of them the end-of-text id."""

    domain: str  # as the record spells it, until `place` names it
    key: int  # hash_of the text
    tokens: bytes  # uint16; empty if the text is blank, or known to the process that encoded it
    size: int  # of the text, in UTF-8 bytes
    split: str = ""  # set by `place`


def in_batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items in lists that take about BLOCK bytes each."""
    batch = []
    size = 0
    for item in items:
        batch.append(item)
        size += 500  # what holds little text takes memory, too
        if isinstance(item, Line):
            size += len(item.record)
        elif isinstance(item, Document):
            size += len(item.text)
        if size >= BLOCK:
            yield batch
            batch = []
            size = 0
    yield batch


class Encoder:
    """Turns items into what stands in bins; every process that does this has its own."""

    def __init__(self, keys: Keys, tokenizer: Path):
        self.keys = keys
        self.tokenizer = Tokenizer(tokenizer)
        self.end = np.array(self.tokenizer.end_of_text, "<u2").tobytes()
        self.known: dict[str, set[int]] = defaultdict(set)  # hashes of texts, by the record's label

    def encode(self, batch: list[Item]) -> list[Encoded | LeftOut]:
        encoded = []
        for item in documents_in(batch, self.keys):
            if isinstance(item, Document):
                item = self.encode_document(item)
            encoded.append(item)
        return encoded

    def encode_document(self, document: Document) -> Encoded | LeftOut:
        domain, text = document
        key = hash_of(text)
        tokens = b""
        # A process gets its batches in order: what came by here before, `place` has seen before it
        # sees this, and calls this a duplicate. Nobody needs its tokens.
        if text.strip() and key not in self.known[domain]:
            self.known[domain].add(key)
            try:
                tokens = self.tokenizer.encode(text).astype("<u2", copy=False).tobytes() + self.end
            except InputError as e:  # beyond a domain's limit it does not matter
                return LeftOut(domain, "unreadable", str(e))
        return Encoded(domain, key, tokens, len(text.encode()))


_encoder: Encoder | None = None  # of a worker process


def start_worker(keys: Keys, tokenizer: Path) -> None:
    global _encoder
    # Ctrl-C is for the parent process. When that ends, however it does, this one ends, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _encoder = Encoder(keys, tokenizer)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def encode_in_worker(batch: list[Item]) -> list[Encoded | LeftOut]:
    return _encoder.encode(batch)


def encode_all(
    batches: Iterable[list[Item]], keys: Keys, workers: int, tokenizer: Path
) -> Iterator[Encoded | LeftOut]:
    """All batches, encoded by several processes, in order."""
    if workers <= 1:
        own = Encoder(keys, tokenizer)
        for batch in batches:
            yield from own.encode(batch)
        return
    # Not by fork: threads that libraries have started would be missing in the workers.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (keys, tokenizer))
    try:
        # Start all workers now, so that they ignore Ctrl-C from their first moment.
        with on_interrupt(signal.SIG_IGN):
            for _ in range(workers):
                pool.submit(int)
        # Three batches wait for each worker, so that none is idle and memory stays bounded.
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(encode_in_worker, batch))
            if len(waiting) == 3 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        # A second Ctrl-C would break this off, and Python would then wait for its workers for ever.
        with on_interrupt(signal.SIG_IGN):
            pool.shutdown(cancel_futures=True)


def place(
    encoded: Iterable[Encoded | LeftOut], fractions: dict[str, float], by_record: bool = False
) -> Iterator[Encoded | LeftOut]:
    """Documents with their domains and splits; blank ones and duplicates become LeftOut.

    by_record: whether records name the domains. Raises InputError for names that are unfit.
    """
    labels: dict[str, str] = {}  # by name of the domain in lower case
    # Only a 64-bit hash of every document stays in memory, here and where it was encoded.
    seen: dict[str, set[int]] = defaultdict(set)
    for item in encoded:
        if isinstance(item, LeftOut):
            if item.domain is not None:
                item = item._replace(domain=domain_named(item.domain, by_record))
            yield item
            continue
        label, key, tokens, size, _ = item
        domain = domain_named(label, by_record)
        # Not every disk tells upper case from lower.
        known = labels.setdefault(domain.lower(), label)
        if known != label:
            both = f"{known!r} and {label!r} would both be called {domain.lower()}"
            raise InputError(f"{both}; rename one of them, or give their records one spelling")
        if key in seen[domain]:
            yield LeftOut(domain, "duplicate")
        elif not tokens:
            yield LeftOut(domain, "empty")
        else:
            seen[domain].add(key)
            yield Encoded(domain, key, tokens, size, split_of(key, fractions))


def append_to(folder: Path, contents: dict[str, bytearray]) -> None:
    """Append to each folder/NAME.bin what belongs there. None stays open."""
    for name, content in contents.items():
        path = folder / f"{name}.bin"
        with naming(path), open(path, "ab") as file:
            file.write(content)


def write_bins(
    folder: Path,
    documents: Iterable[Encoded | LeftOut],
    limit_tokens: int | None,
    max_bad: int,
    full: set[str],
) -> tuple[dict[str, Counter], Counter]:
    """Write documents to folder/DOMAIN.SPLIT.bin; domains that have limit_tokens go into `full`.

    Returns the documents, tokens and bytes of each file, and how many documents were left out, by
    reason. Raises InputError for more than max_bad bad ones, or an unreadable one.
    """
    files: dict[str, Counter] = {}
    left_out = Counter()
    waiting = defaultdict(bytearray)  # what each file gets next
    size = 0  # of it, in bytes
    for item in documents:
        # Reading runs ahead of the limit: what was read beyond it is not counted, bad or not.
        if item.domain in full:
            continue
        if isinstance(item, LeftOut):
            left_out[item.reason] += 1
            check_left_out(item, left_out["bad"], max_bad)
            continue
        names = [f"{item.domain}.{split}" for split in SPLITS]
        if names[0] not in files:
            for name in names:
                files[name] = Counter(documents=0, tokens=0, bytes=0)
        name = f"{item.domain}.{item.split}"
        waiting[name] += item.tokens
        files[name]["documents"] += 1
        files[name]["tokens"] += len(item.tokens) // 2
        files[name]["bytes"] += item.size
        if limit_tokens and sum(files[name]["tokens"] for name in names) >= limit_tokens:
            full.add(item.domain)
        size += len(item.tokens)
        if size >= BLOCK:
            append_to(folder, waiting)
            waiting.clear()
            size = 0
    append_to(folder, waiting)
    return files, left_out


def check_splits(
    folder: Path, files: dict[str, Counter], left_out: Counter, sources: Sources, least: int
) -> None:
    """Leave out domains of fewer documents than `least`; raise InputError for an empty split."""
    # A domain that was asked for counts even if its sources hold nothing.
    documents = Counter({domain: 0 for domain in sources if domain})
    for name, file in files.items():
        documents[name.rpartition(".")[0]] += file["documents"]
    most = max(documents.values(), default=0)
    for domain, n in documents.items():
        names = [f"{domain}.{split}" for split in SPLITS]
        if n < least:
            left_out["in a small domain"] += n
            for name in names:
                files.pop(name, None)
                (folder / f"{name}.bin").unlink(missing_ok=True)
            continue
        empty = [name for name in names if name not in files or not files[name]["documents"]]
        if empty:
            ways = "a document is in one split: cut long ones up (a paragraph each), add some"
            if n == 0:
                ways = "its sources hold no text: name others"
            change = "raise"
            if empty[0].endswith(".train"):
                change = "lower"
            ways += ", raise --limit-tokens if given or, without --add,"
            ways += f" {change} --val- and --test-fraction"
            if n < most:
                ways += f"; --min-documents {n + 1} leaves the domain out"
            raise InputError(f"{empty[0]} is left empty, of {n} documents; {ways}")
    if not files:
        ways = "the sources hold no text"
        if most:
            ways = f"--min-documents {most} leaves the largest domain"
        raise InputError(f"every split is left empty, of {most} documents; {ways}")


# ---- prepare ----


@contextlib.contextmanager
def on_interrupt(action: signal.Handlers) -> Iterator[None]:
    """What Ctrl-C does in this block: SIG_DFL, it ends the process at once; SIG_IGN, nothing."""
    if threading.current_thread() is not threading.main_thread():  # another one cannot
        yield
        return
    before = signal.signal(signal.SIGINT, action)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def without_long_words(text: str, longest: int = 10_000) -> str:
    """The text with long words cut up: training's time is quadratic in a word's length."""
    words = text.split()
    if max(map(len, words), default=0) <= longest:
        return text
    parts = [word[i : i + longest] for word in words for i in range(0, len(word), longest)]
    return " ".join(parts)


def make_tokenizer(
    name: str,
    documents: Iterable[Document | LeftOut],
    fractions: dict,
    size: int,
    path: Path,
    max_bad: int | None = None,
) -> Tokenizer:
    """The tokenizer of that name, or one that is trained on the documents, written to `path`.

    name: what Tokenizer takes, or train:N. size: of all the files, in bytes. max_bad: bad lines
    that may pass; None: all. Raises InputError.
    """
    if name.startswith("train:"):
        size_asked = name.removeprefix("train:")
        if not re.fullmatch(r"\d{1,9}", size_asked) or not 257 <= int(size_asked) <= 2**16:
            raise InputError(f"--tokenizer {name}: expected train:N, for N = 257 to 65536 tokens")
        from tokenizers import ByteLevelBPETokenizer

        # It learns from the train split alone, and of much text from one document in `every`.
        every = 1 + size // 2**27

        def texts():
            bad = 0
            for item in documents:
                if isinstance(item, Document):
                    key = hash_of(item.text)
                    if split_of(key, fractions) == "train" and key % every == 0:
                        yield without_long_words(item.text)
                elif max_bad is not None:
                    if item.reason == "bad":
                        bad += 1
                    check_left_out(item, bad, max_bad)

        trained = ByteLevelBPETokenizer()
        # A notice, because the library's own bars would stay; SIG_DFL, because it hears no Ctrl-C.
        with on_interrupt(signal.SIG_DFL), notice("training the tokenizer"):
            trained.train_from_iterator(texts(), int(size_asked), 0, False, [END_OF_TEXT])
        if trained.get_vocab_size() < int(size_asked):
            tell(
                f"warning: {name}: the text is enough for {trained.get_vocab_size():,} tokens only"
            )
        with naming(path):
            path.write_text(trained.to_str(pretty=True), encoding="utf-8", newline="\n")
        name = str(path)
    tokenizer = Tokenizer(name)
    with naming(path):
        path.write_text(tokenizer.json, encoding="utf-8", newline="\n")
    return tokenizer


@contextlib.contextmanager
def staged(out: Path, name: str, add: bool) -> Iterator[Path]:
    """A hidden folder beside `out`, for this process alone, which is gone when the block ends.

    add: inside `out`, which may be a disk of its own.
    """
    stage = out.with_name(f".{out.name}-{name}.partial")
    if add:
        stage = out / f".{name}.partial"
    stage.mkdir(parents=True, exist_ok=True)
    # Lock a file that the data set has anyway: a .lock would become part of it.
    with locked(stage / "tokenizer.json", out, way_out="wait for its end"):
        for leftover in stage.glob("*.bin"):  # of one that was killed
            leftover.unlink()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def check_new(domains: Iterable[str], data: Data) -> None:
    """Raise InputError if the data set has one of these domains, which are to be added to it."""
    # Not every disk tells upper case from lower.
    known = {domain.lower() for domain in data.domains}
    for domain in sorted(domains):
        if domain.lower() in known:
            raise InputError(f"{data.folder} has {domain} already; give what is added another name")


def publish(stage: Path, out: Path, meta: dict, add: bool) -> None:
    """Make the staged folder the data set `out`, or add its domains, if new, to the one there."""
    added = [*(f"{name}.bin" for name in meta["files"]), "meta.json"]
    with contextlib.ExitStack() as stack:
        if add:  # as another process may do, too
            stack.enter_context(locked(out / "tokenizer.json", out, wait=True))
            data = Data(out)
            check_new({name.rpartition(".")[0] for name in meta["files"]}, data)
            old = data.meta
            left_out = Counter(old.get("left_out", {})) + Counter(meta["left_out"])
            sources = old.get("sources", {}) | meta["sources"]
            files = dict(sorted((old["files"] | meta["files"]).items()))
            meta = old | {"files": files, "sources": sources, "left_out": dict(left_out)}
        write_json(stage / "meta.json", meta)
        # Everything is on the disk before it is renamed into place; meta.json comes last.
        if hasattr(os, "sync"):
            os.sync()
        if add:
            for name in added:
                os.replace(stage / name, out / name)
        else:
            if out.exists():  # as an empty folder
                out.rmdir()
            os.rename(stage, out)


def check_out(out: Path, add: bool, domains: Iterable[str]) -> None:
    """Raise InputError, before any work is done, if these domains cannot be written to `out`."""
    check_place(out)
    if add and not out.exists():
        raise InputError(f"{out} is not there to add to; without --add it is made")
    if add:
        data = Data(out)
        data.check_tokenizer()  # the new domains use it, too
        check_new(domains, data)
        return
    if (out / "meta.json").is_file():
        raise InputError(f"{out} exists; choose another --out, or --add domains to it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists, and is no data set; choose another --out")


def fractions_of(
    out: Path, add: bool, val: float | None, test: float | None, is_sample: bool
) -> dict[str, float]:
    """The shares of val and test: those given, or those of the data set to add to."""
    if add:
        return Data(out).meta.get("fractions", {"val": 0.05, "test": 0.05})
    default = 0.1 if is_sample else 0.05  # the sample is small
    given = {"val": val, "test": test}
    fractions = {split: default if f is None else f for split, f in given.items()}
    if not (all(f > 0 for f in fractions.values()) and sum(fractions.values()) < 1):
        ways = "expected both above 0, and less than 1 together"
        raise InputError(f"--val-fraction, --test-fraction: {fractions}; {ways}")
    return fractions


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

    sources: None makes the sample. tokenizer: what Tokenizer takes, or train:N. The others are the
    command line's. The folder appears whole, at the end, or not at all.
    """
    out = Path(out).resolve()
    check_out(out, add, filter(None, sources or ()))
    fractions = fractions_of(out, add, val_fraction, test_fraction, is_sample=not sources)
    if add:
        tokenizer = str(out)
    sample = []
    overlap = {}
    if not sources:
        sources = {}
        sample, overlap = make_sample(fractions)
    keys = Keys(text_key, domain_key)

    def items(full: set[str] = frozenset()) -> Iterable[Item]:
        return read(sources, keys, full) if sources else sample

    # Named by the sources: the same command finds its leftovers if it was killed; others do not.
    name = hashlib.sha256(repr((sources, domain_key)).encode()).hexdigest()[:8]
    with staged(out, name, add) as stage:
        size = sum(size_of(file) for files in sources.values() for file in files)
        path = stage / "tokenizer.json"
        # Bad lines beyond a domain's limit do not count, and only write_bins knows where that is.
        most = None if limit_tokens else max_bad
        loaded = make_tokenizer(tokenizer, documents_in(items(), keys), fractions, size, path, most)
        # From text to bins, as a stream: nothing is read before there is room for it.
        full = set()
        encoding = encode_all(in_batches(items(full)), keys, workers, path)
        placed = place(encoding, fractions, by_record=domain_key is not None)
        # `closing` ends the workers before their files go. Sources have the bar of `read` instead.
        with contextlib.closing(encoding), notice("tokenizing the sample", shown=bool(sample)):
            files, left_out = write_bins(stage, placed, limit_tokens, max_bad, full)
        check_splits(stage, files, left_out, sources, min_documents)
        # meta.json describes it all; a folder without it is not a data set.
        named = {d or domain_key: list(map(str, paths)) for d, paths in sources.items()}
        meta = {"format": FORMAT, "tokenizer": loaded.meta, "fractions": fractions}
        meta |= {"overlap": overlap, "sources": named, "left_out": dict(+left_out), "files": {}}
        for file_name, counts in sorted(files.items()):
            sha256 = sha256_of(stage / f"{file_name}.bin")
            meta["files"][file_name] = dict(counts) | {"sha256": sha256}
        publish(stage, out, meta, add)
    return Data(out)


# ---- main ----


def parse_sources(words: list[str], domain_key: str | None) -> Sources:
    """Sources as {domain: files}, or with a domain_key as {None: files}. Raises InputError."""
    sources: Sources = {}
    for word in words:
        name = None
        path = word
        if not domain_key:
            name, _, path = word.partition("=")
        if not path:
            expected = "name=path, or --domain-key for records that name their domain"
            raise InputError(f"{word}: expected {expected}")
        if name is not None:
            domain_named(name, by_record=False)  # rather than when its text is read
            for other in sources:
                if other != name and other.lower() == name.lower():
                    raise InputError(f"{word}: there is {other}, too; give one another name")
        if domain_key and re.match(r"[\w-]+=", path) and not glob.glob(path):
            raise InputError(f"{path}: with --domain-key a source has no name; give its path alone")
        sources.setdefault(name, []).extend(source_files(path))
    return sources


def describe(data: Data, out: str) -> None:
    """Say what a data set holds, where that is too little, and what to do with it."""
    names = shortened(list(data.meta["files"]), 58)
    width = max(24, *map(len, names.values()))
    tell(f"{'':<{width}}{'documents':>12}{'tokens':>16}{'bytes/token':>13}")
    for name, file in data.meta["files"].items():
        ratio = file["bytes"] / file["tokens"]
        tell(f"{names[name]:<{width}}{file['documents']:>12,}{file['tokens']:>16,}{ratio:>13.2f}")
    few = [
        f"{name} {file['documents']}"
        for name, file in data.meta["files"].items()
        if not name.endswith(".train") and file["documents"] < FEW_DOCUMENTS
    ]
    if few:
        ways = "add some, or make it anew with larger fractions"
        tell(f"warning: few documents to measure on: {first_of(few)}; {ways}")
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in data.meta["left_out"].items())
    tell(f"left out: {left_out or 'nothing'}")
    overlap = data.meta.get("overlap")  # of the sample
    if overlap:
        shares = [f"{domain} {share:.0%}" for domain, share in overlap.items()]
        tell(f"13-grams of the test split that the train split has too: {', '.join(shares)}")
    tell(f"{out} holds the data set")
    tell(f"next    python {beside('mix.py')} --data {shlex.quote(out)}")


def main():
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # of these, those that this process may use
        cores = len(os.sched_getaffinity(0))
    if os.name == "nt":  # which waits for no more processes at a time
        cores = min(cores, 61)
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
    add("--test-fraction", type=float, help="the same, for the test split")
    add("--limit-tokens", type=int, metavar="N", help="stop a domain after N tokens")
    add("--min-documents", type=int, metavar="N", default=0, help="leave out smaller domains")
    add("--max-bad", type=int, metavar="N", default=0, help="skip up to N bad lines")
    add("--workers", type=int, metavar="N", default=cores, help="processes that parse and tokenize")
    args = parser.parse_args()
    check_range(args, ("workers",), 1, 10**4)
    check_range(args, ("limit_tokens",), 1, 2**63)
    check_range(args, ("min_documents", "max_bad"), 0, 2**63)
    if args.add and not args.sources:
        raise InputError("--add: name the sources to add")
    if args.domain_key and not args.sources:
        raise InputError("--domain-key: name the sources whose records have it")
    given = (args.tokenizer, args.val_fraction, args.test_fraction)
    if args.add and given != (None, None, None):
        own = "the data set's tokenizer and its own fractions are taken"
        raise InputError(f"--add: {own}; leave --tokenizer, --val-fraction, --test-fraction out")
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
    describe(data, args.out)


if __name__ == "__main__":
    cli(main, "; nothing of it is kept")
