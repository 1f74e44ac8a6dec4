"""Token ids, against the tokenizers library: of text, of code points, and of what chance writes.

FUZZ=100 in the environment draws a hundred times as many texts.
"""

import functools
import glob
import gzip
import json
import os
import random
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import tokenizers
from conftest import made_documents
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from prepare import InputError, Tokenizer, fastokens_encoding

PYTHIA = os.environ.get("PYTHIA_TOKENIZER")
TEXTS = os.environ.get("PYTHIA_TEXTS")
reason = "PYTHIA_TOKENIZER is not set: the path of Pythia's tokenizer.json, not made here"
needs_pythia = pytest.mark.skipif(not PYTHIA, reason=reason)
reason = "PYTHIA_TEXTS is not set: a glob of .jsonl.gz files to compare ids on"
needs_texts = pytest.mark.skipif(not TEXTS, reason=reason)
reason = "fastokens is not installed: it is not required"
needs_fastokens = pytest.mark.skipif(not find_spec("fastokens"), reason=reason)


@functools.cache
def some_texts() -> list[str]:
    """Prose, sums, code with deep indentation, accents, other scripts, symbols, and short texts."""
    rng = random.Random(0)
    texts = [text for domain in ("prose", "sums", "code") for text in made_documents(domain, 60)]
    line = "x = (y + 1)  # don't, we'll, I'm"
    texts += ["\n".join(" " * rng.randint(0, 40) + line for _ in range(30)) for _ in range(20)]
    texts += [
        "déjà vu, naïve Ångström, e\u0301te\u0301; Привет, мир! 你好世界 한국어 日本語 " * 3,
        "№ ½ ² ٣ ∑ 🙂🙂 —\t\t\r\n\n\n" * 5,
        Path(__file__).read_text(encoding="utf-8"),
    ]
    texts += ["", " ", "\n", "  ", "a", "\u00e9", "e\u0301", "\0\0", "a \n \n  b", " " * 25 + "x"]
    return texts


@functools.cache
def neox_like() -> str:
    """A byte-level BPE of GPT-NeoX's shape: NFC, special tokens first, runs of spaces last."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(some_texts(), trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return tokenizer.to_str()


@functools.cache
def plain() -> str:
    """A byte-level BPE as prepare.py trains it."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(some_texts(), 700, 0, False, ["<|endoftext|>"])
    return tokenizer.to_str()


class Pair:
    """The scripts' tokenizer and, as an oracle, the library's, of the same file."""

    def __init__(self, path: Path):
        self.ours = Tokenizer(path)
        self.ours._encoded = 2**22  # after which fastokens is worth loading
        self.oracle = tokenizers.Tokenizer.from_file(str(path))
        self.oracle.encode_special_tokens = True

    def is_fast(self) -> bool:
        return self.ours._tiktoken is not None

    def check(self, texts: list[str]) -> None:
        expected = self.oracle.encode_batch(texts, add_special_tokens=False)
        for text, encoding in zip(texts, expected, strict=True):
            assert self.ours.encode(text).tolist() == encoding.ids, ascii(text[:200])


@pytest.fixture(
    scope="module", params=["neox_like", "plain", pytest.param("pythia", marks=needs_pythia)]
)
def tokenizer_json(request, tmp_path_factory) -> Path:
    if request.param == "pythia":
        return Path(PYTHIA)
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    path.write_text({"neox_like": neox_like, "plain": plain}[request.param]())
    return path


@pytest.fixture(
    scope="module", params=["tiktoken", pytest.param("fastokens", marks=needs_fastokens)]
)
def pair(request, tokenizer_json) -> Pair:
    made = Pair(tokenizer_json)
    assert made.is_fast()
    if request.param == "tiktoken":
        made.ours._fastokens = None  # as where it is not installed
    else:
        assert made.ours._fastokens is not None
    return made


def test_text_becomes_the_same_ids_and_text_again(pair):
    pair.check(some_texts())
    for text in some_texts():
        decoded = pair.ours.decode(pair.ours.encode(text))
        assert decoded in (text, unicodedata.normalize("NFC", text))


@needs_texts
@needs_pythia
def test_pythia_on_real_text():
    for path in sorted(glob.glob(TEXTS)):
        lines = gzip.decompress(Path(path).read_bytes()).splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        for i in range(0, len(texts), 1000):
            Pair(PYTHIA).check(texts[i : i + 1000])


def code_points() -> list[str]:
    """All of planes 0 and 1, but for a sample of ideographs, of syllables and of other planes."""
    whole = [range(0x3400), range(0xA000, 0xAC00), range(0xE000, 0x20000), range(0x2F800, 0x2FA20)]
    alike = [range(0x3400, 0xA000, 11), range(0xAC00, 0xD800, 11), range(0x20000, 0x40000, 11)]
    rest = [range(0x40000, sys.maxunicode + 1, 101)]  # tags; private ones, and none at all
    return [chr(c) for part in whole + alike + rest for c in part]


# Letters join the a before them, digits the 1 after them, white space the space between the two.
@pytest.mark.parametrize("context", ["a{0} {0}1", "{0}{0}\u0301 "])
def test_every_code_point(pair, context):
    # One text that NFC changes would hide others that it should not.
    texts = {True: [], False: []}
    for text in map(context.format, code_points()):
        texts[unicodedata.is_normalized("NFC", text)].append(text)
    for alike in texts.values():
        pair.check(["".join(alike[i : i + 512]) for i in range(0, len(alike), 512)])


def test_what_chance_writes(pair):
    rng = random.Random(0)
    odd = ["Mn", "Mc", "Cc", "Cf", "Nd", "No"]
    alphabets = [
        code_points(),
        [c for c in code_points() if unicodedata.category(c) in odd],
        " \t\n\r\v\f\u00a0\u2003\u3000\u0085\x1c\u200b",
        "ab01_(), ",
        ["<|endoftext|>", "<|padding|>", "'s", "'ll", "'LL", "\u2019s", "\ufeff"],
        ["e\u0301\u0323", "\u0315\u0300\u05ae\u0301", "\u1100\u1161", " " * 24, " " * 25],
    ]
    texts = []
    for _ in range(4000 * int(os.environ.get("FUZZ", 1))):
        pieces = [rng.choices(rng.choice(alphabets), k=rng.randint(0, 10)) for _ in range(4)]
        texts.append("".join(map("".join, pieces)))
    pair.check(texts)


@pytest.mark.parametrize("run", [" ", "\n", "\t", "\u3000", "\r\n", "\n ", "  \n"])
def test_endless_white_space(pair, run):
    nearly = 99_999 // len(run)  # what is just short of going to the library
    pair.check(["x" + run * nearly + "y", run * (nearly + 2)])


def test_a_million_characters(pair):
    pair.check(["ab" * 60_000])  # one word
    text = " ".join(some_texts()) + "\n"
    pair.check([text])
    times = 1 + 10**6 // len(text)
    assert pair.ours.encode(text * times).tolist() == [*pair.ours.encode(text)] * times
    space = " " * 10**6
    assert pair.ours.decode(pair.ours.encode(space)) == space


def test_special_tokens_in_the_text_are_text(pair):
    for text in ("<|endoftext|>", "a <|endoftext|>\n", "<|endoftext|><|padding|>"):
        ids = pair.ours.encode(text)
        assert pair.ours.end_of_text not in ids
        assert pair.ours.decode(ids) == text
    assert pair.ours.decode([pair.ours.end_of_text]) == "<|endoftext|>"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80" * 3])
def test_a_lone_surrogate_is_an_error(pair, text):
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        pair.ours.encode(text)


def raising(error: type[BaseException]):
    def function(*args, **kwargs):
        raise error

    return function


def other_ids(texts: list[str], split_special_tokens: bool) -> tuple[bytes, bytes]:
    return np.zeros(10, np.uint32).tobytes(), b""


OTHER_FASTOKENS = {
    "not installed": None,
    "an older one": SimpleNamespace(),
    "one that cannot load it": raising(ValueError),
    "one that panics": raising(BaseException),
    "one that cannot encode": lambda spec: SimpleNamespace(),
    "one with other ids": lambda spec: SimpleNamespace(encode_batch_flat=other_ids),
}


@pytest.mark.parametrize("kind", OTHER_FASTOKENS)
def test_another_fastokens_changes_nothing(tmp_path, monkeypatch, kind):
    other = OTHER_FASTOKENS[kind]
    if callable(other):
        other = SimpleNamespace(Tokenizer=SimpleNamespace(from_json_str=other))
    monkeypatch.setitem(sys.modules, "fastokens", other)
    (tmp_path / "t.json").write_text(neox_like())
    pair = Pair(tmp_path / "t.json")
    pair.check(some_texts())
    assert pair.is_fast() and pair.ours._fastokens is None


# What may be mistaken in GPT-2's pattern: what an apostrophe takes, digits, what lies ahead.
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("[sdmt]", "[sdm]"), (r"\p{N}++", r"\p{N}{1,3}"), (r"(?!\S)", r"(?![^\s.])")],
)
def test_a_fastokens_that_cuts_other_words_is_not_taken(tmp_path, monkeypatch, right, wrong):
    (tmp_path / "t.json").write_text(plain())
    ours = Tokenizer(tmp_path / "t.json")

    def encoder_of(pattern: str) -> SimpleNamespace:
        ranks = ours._tiktoken._mergeable_ranks
        other = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

        def encode(texts, split_special_tokens):
            return other.encode_to_numpy(texts[0]).astype(np.uint32).tobytes(), b""

        return SimpleNamespace(encode_batch_flat=encode)

    pattern = ours._tiktoken._pat_str
    for taken, cut in ((True, pattern), (False, pattern.replace(right, wrong))):
        made = SimpleNamespace(from_json_str=lambda spec, cut=cut: encoder_of(cut))
        monkeypatch.setitem(sys.modules, "fastokens", SimpleNamespace(Tokenizer=made))
        found = fastokens_encoding(json.loads(ours.json), ours._tiktoken)
        assert (found is not None) == taken


@pytest.mark.parametrize("library", ["tokenizers", "fastokens"])
def test_an_interruption_while_a_library_loads_is_one(tmp_path, monkeypatch, library):
    (tmp_path / "t.json").write_text(plain())
    interrupted = raising(KeyboardInterrupt)
    loader = SimpleNamespace(from_str=interrupted, from_json_str=interrupted)
    monkeypatch.setitem(sys.modules, library, SimpleNamespace(Tokenizer=loader))
    with pytest.raises(KeyboardInterrupt):
        Pair(tmp_path / "t.json").ours.encode("a")


def test_of_little_text_fastokens_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", SimpleNamespace())
    (tmp_path / "t.json").write_text(plain())
    ours = Tokenizer(tmp_path / "t.json")
    ours.encode("a" * 2**20)
    assert "_fastokens" not in vars(ours)
    for _ in range(4):
        ours.encode("a" * 2**20)
    assert "_fastokens" in vars(ours)


def add_token(spec: dict, content: str, **more) -> None:
    token = {**spec["added_tokens"][0], "id": 700, "content": content, "special": False}
    spec["added_tokens"].append(token | more)


def swap_merges(spec: dict) -> None:
    merges = spec["model"]["merges"]
    merges[5], merges[200] = merges[200], merges[5]


def lose_a_byte(spec: dict) -> None:
    model = spec["model"]
    model["merges"] = [merge for merge in model["merges"] if "z" not in "".join(merge)]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if "z" not in token}


OTHER_SHAPES = {
    "a space before the text": lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    "no regex": lambda spec: spec["pre_tokenizer"].update(use_regex=False),
    "lower case": lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    "NFKC": lambda spec: spec.update(normalizer={"type": "NFKC"}),
    "whole words": lambda spec: spec["model"].update(ignore_merges=True),
    "dropout": lambda spec: spec["model"].update(dropout=0.1),
    "merges in another order": swap_merges,
    "a token that no merge makes": lambda spec: spec["model"]["vocab"].update(zqzq=700),
    "one id twice": lambda spec: spec["model"]["vocab"].update(y=spec["model"]["vocab"]["z"]),
    "a byte is missing": lose_a_byte,
    "a token for a word": lambda spec: add_token(spec, "house"),
    "a token that takes a space": lambda spec: add_token(spec, "  ", lstrip=True, normalized=True),
}


@pytest.mark.parametrize("change", OTHER_SHAPES)
def test_a_tokenizer_whose_ids_are_no_ranks_runs_on_the_library(tmp_path, change):
    spec = json.loads(plain())
    OTHER_SHAPES[change](spec)
    (tmp_path / "t.json").write_text(json.dumps(spec))
    other = Pair(tmp_path / "t.json")
    assert len(other.ours.encode("a house")) > 0 and not other.is_fast()
    if change != "dropout":  # whose ids are never the same
        other.check(some_texts())


def test_runs_of_spaces_have_the_ids_that_the_library_gives_them(tmp_path):
    """It counts them itself where they follow the vocabulary, whatever the file says."""
    spec = json.loads(neox_like())
    runs = [token for token in spec["added_tokens"] if not token["special"]]
    for token, i in zip(runs, [token["id"] for token in reversed(runs)], strict=True):
        token["id"] = i
    (tmp_path / "t.json").write_text(json.dumps(spec))
    Pair(tmp_path / "t.json").check(some_texts())


def bpe(vocab: str, merges: str = "[]", added: str = "[]") -> str:
    model = f'{{"type": "BPE", "vocab": {vocab}, "merges": {merges}}}'
    return f'{{"version": "1.0", "model": {model}, "added_tokens": {added}}}'


SPLIT = '{"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}'
UNIGRAM = '{"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}, "added_tokens": []}'
WORDS = '{"model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 70000}, "unk_token": "x"}}'


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "[" * 100_000, UNIGRAM, WORDS),
        bpe("{}", '[["a", "b"]]'),
        bpe('{"a": 0}', '["a"]'),
        bpe('{"a": 4294967295}'),
        bpe('{"b": 1}', added='[{"id": 9}]'),
        bpe("{}").replace('"model"', f'"pre_tokenizer": {SPLIT}, "model"'),
    ],
)
def test_what_is_not_a_tokenizer_is_refused(tmp_path, content, capfd):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match=r"t\.json"):
        Tokenizer(tmp_path / "t.json")
    assert capfd.readouterr().err == ""


def test_a_trained_tokenizer_is_fast(data):
    assert Pair(data.folder / "tokenizer.json").is_fast()


def test_a_tokenizer_by_which_a_text_could_end_a_document_is_refused(tmp_path):
    spec = json.loads(neox_like())
    for token in spec["added_tokens"]:
        token["special"] = False
    (tmp_path / "t.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="a text can hold <|endoftext|>; make that a special"):
        Tokenizer(tmp_path / "t.json")


def test_a_tokenizer_that_does_not_know_every_text_says_so(tmp_path):
    spec = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    words = ["<|endoftext|>", "a", "b", "<|", "|>", "endoftext"]
    vocab = {word: i for i, word in enumerate(words)}
    for known in (vocab, {"<|endoftext|>": 0}):
        spec["model"] = {"type": "WordLevel", "vocab": known, "unk_token": "none"}
        (tmp_path / "t.json").write_text(json.dumps(spec))
        with pytest.raises(InputError, match=r"t\.json: WordLevel error.*; take a tokenizer"):
            Tokenizer(tmp_path / "t.json").encode("another")
