"""Token ids, against the tokenizers library: on text, on every code point, and on what a fuzzer finds."""

import glob
import gzip
import json
import os
import random
import sys
import unicodedata

import pytest
import tokenizers
from conftest import made_documents
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from prepare import InputError, Tokenizer

PYTHIA, TEXTS = os.environ.get("PYTHIA_TOKENIZER"), os.environ.get("PYTHIA_TEXTS")
needs_pythia = pytest.mark.skipif(
    not PYTHIA,
    reason="PYTHIA_TOKENIZER is not set: the path of Pythia's tokenizer.json, which is not made here",
)


def training_texts() -> list[str]:
    """Text of several kinds: prose, sums, code with deep indentation, accents, other scripts, symbols."""
    rng = random.Random(0)
    texts = [text for d in ("prose", "sums", "code") for text in made_documents(d, 60)]
    texts += [
        "\n".join(" " * rng.randint(0, 40) + "x = (y + 1)  # don't, we'll, I'm" for _ in range(30))
        for _ in range(20)
    ]
    texts += [
        "déjà vu, naïve Ångström, e\u0301te\u0301; Привет, мир! 你好世界 한국어 日本語 " * 3,
        "№ ½ ² ٣ ∑ 🙂🙂 —\t\t\r\n\n\n" * 5,
    ]
    return texts


def neox_like() -> tokenizers.Tokenizer:
    """A byte-level BPE of GPT-NeoX's shape: NFC, two special tokens first, runs of 24 to 2 spaces last."""
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
    tokenizer.train_from_iterator(training_texts(), trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return tokenizer


def plain() -> tokenizers.Tokenizer:
    """A byte-level BPE as prepare.py trains it."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(training_texts(), 700, 0, False, ["<|endoftext|>"])
    return tokenizers.Tokenizer.from_str(tokenizer.to_str())


@pytest.fixture(
    scope="module", params=["neox_like", "plain", pytest.param("pythia", marks=needs_pythia)]
)
def pair(request, tmp_path_factory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours, and the library's, from the same file."""
    path = PYTHIA
    if request.param != "pythia":
        path = str(tmp_path_factory.mktemp(request.param) / "tokenizer.json")
        {"neox_like": neox_like, "plain": plain}[request.param]().save(path)
    oracle = tokenizers.Tokenizer.from_file(path)
    oracle.encode_special_tokens = True
    ours = Tokenizer(path)
    assert len(ours.encode("x")) == 1 and ours._fast is not None
    return ours, oracle


def check(pair, texts: list[str]) -> None:
    ours, oracle = pair
    for text, encoding in zip(texts, oracle.encode_batch(texts, add_special_tokens=False)):
        assert ours.encode(text).tolist() == encoding.ids, ascii(text[:200])


def test_text(pair):
    check(pair, training_texts())
    check(
        pair,
        [
            open(__file__, encoding="utf-8").read(),
            "",
            " ",
            "\n",
            "  ",
            "a",
            "\u00e9",
            "e\u0301",
            "\0\0",
        ],
    )
    ours, _ = pair
    text = unicodedata.normalize("NFC", training_texts()[-2])
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.skipif(
    not TEXTS, reason="PYTHIA_TEXTS is not set: a glob of .jsonl.gz files to compare ids on"
)
@needs_pythia
def test_pythia_on_real_text():
    ours, oracle = Tokenizer(PYTHIA), tokenizers.Tokenizer.from_file(PYTHIA)
    oracle.encode_special_tokens = True
    for path in sorted(glob.glob(TEXTS)):
        texts = [json.loads(line)["text"] for line in gzip.open(path)]
        for i in range(0, len(texts), 1000):
            check((ours, oracle), texts[i : i + 1000])


@pytest.mark.parametrize("context", ["{0}", "a{0}b", " {0} {0}  ", "\n{0}1{0}{0}\u0301"])
def test_every_code_point(pair, context):
    points = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    check(
        pair,
        ["".join(map(context.format, points[i : i + 4096])) for i in range(0, len(points), 4096)],
    )


pieces = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "<|endoftext|>",
            "<|padding|>",
            "'s",
            "'ll",
            "'LL",
            "\u2019s",
            "e\u0301\u0323",
            "\u1100\u1161",
            "\ufeff",
        ]
    ),
    st.text(alphabet=" \t\n\r\v\f\u00a0\u2003\u3000\u0085\x1c\u200b", max_size=30),
    st.integers(1, 60).map(" ".__mul__),
    st.text(alphabet=st.characters(categories=["Mn", "Mc", "Cc", "Cf", "Nd", "No"]), max_size=6),
    st.text(alphabet="ab01_(), ", max_size=10),
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(pieces, max_size=8).map("".join))
@example(" " * 25 + "x")
@example("a \n \n  b")
@example("\u0315\u0300\u05ae\u0301")
def test_what_a_fuzzer_writes(pair, text):
    check(pair, [text])


@pytest.mark.parametrize("run", [" ", "\n", "\t", "\u3000", "\r\n", "\n ", "  \n"])
def test_a_million_whitespace_characters(pair, run):
    check(pair, ["x" + run * (10**6 // len(run)) + "y", run * 120_000])


def test_a_long_document_of_one_word(pair):
    check(pair, ["ab" * 600_000, "x y " * 300_000])


def test_special_tokens_in_the_text_are_text(pair):
    ours, _ = pair
    for text in ("<|endoftext|>", "a <|endoftext|>\n", "<|endoftext|><|padding|>"):
        assert ours.end_of_text not in ours.encode(text) and ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80" * 3])
def test_a_lone_surrogate_is_an_error(pair, text):
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        pair[0].encode(text)


def another(change: str) -> dict:
    """The plain tokenizer's JSON, changed so that ids by rank would be wrong, or might be."""
    spec = json.loads(plain().to_str())
    model, merges = spec["model"], spec["model"]["merges"]
    if change == "prefix space":
        spec["pre_tokenizer"]["add_prefix_space"] = True
    elif change == "no regex":
        spec["pre_tokenizer"]["use_regex"] = False
    elif change == "lower case":
        spec["normalizer"] = {"type": "Lowercase"}
    elif change == "NFKC":
        spec["normalizer"] = {"type": "NFKC"}
    elif change == "dropout":
        model["dropout"] = 0.1
    elif change == "whole words":
        model["ignore_merges"] = True
    elif change == "merges in another order":
        merges[5], merges[200] = merges[200], merges[5]
    elif change == "a token that no merge makes":
        model["vocab"]["zqzq"] = max(model["vocab"].values()) + 1
    elif change == "a byte is missing":
        del model["vocab"]["z"]
        model["merges"] = [merge for merge in merges if "z" not in "".join(merge)]
        model["vocab"] = {
            t: i for t, i in model["vocab"].items() if "z" not in t or t == "<|endoftext|>"
        }
    elif change == "a token for a word":
        spec["added_tokens"].append(
            {**spec["added_tokens"][0], "id": 700, "content": "house", "special": False}
        )
    elif change == "two tokens with one id":
        model["vocab"]["y"] = model["vocab"]["z"]
    elif change == "a token that takes the space before it":
        spec["added_tokens"].append(
            {
                **spec["added_tokens"][0],
                "id": 700,
                "content": "  ",
                "special": False,
                "lstrip": True,
                "normalized": True,
            }
        )
    return spec


@pytest.mark.parametrize(
    "change",
    [
        "prefix space",
        "no regex",
        "lower case",
        "NFKC",
        "whole words",
        "merges in another order",
        "a token that no merge makes",
        "a byte is missing",
        "a token for a word",
        "two tokens with one id",
        "a token that takes the space before it",
    ],
)
def test_a_tokenizer_of_another_shape_runs_on_the_library(tmp_path, change):
    (tmp_path / "t.json").write_text(json.dumps(another(change)))
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    oracle.encode_special_tokens = True
    ours = Tokenizer(tmp_path / "t.json")
    check((ours, oracle), training_texts())
    assert ours._fast is None


def test_runs_of_spaces_have_the_ids_that_the_library_gives_them(tmp_path):
    """It counts them itself where they follow the vocabulary, whatever the file says."""
    spec = json.loads(neox_like().to_str())
    runs = [token for token in spec["added_tokens"] if not token["special"]]
    for token, other in zip(runs, [*reversed([token["id"] for token in runs])]):
        token["id"] = other
    (tmp_path / "t.json").write_text(json.dumps(spec))
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    oracle.encode_special_tokens = True
    check((Tokenizer(tmp_path / "t.json"), oracle), training_texts())


def test_dropout_is_not_taken_for_plain(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(another("dropout")))
    ours = Tokenizer(tmp_path / "t.json")
    assert len(ours.encode("a house by a river")) > 0 and ours._fast is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}, "added_tokens": []}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}, "added_tokens": []}',
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 70000}, "unk_token": "x"}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"b": 1}, "merges": []}, "added_tokens": [{"id": 9}]}',
        '{"version": "1.0", "model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}, "added_tokens": []}',
        '{"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", '
        '"invert": false}, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
)
def test_what_is_not_a_tokenizer_is_refused(tmp_path, content, capfd):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match=r"t\.json"):
        Tokenizer(tmp_path / "t.json")
    assert capfd.readouterr().err == ""


def test_a_trained_tokenizer_is_of_the_fast_shape(data):
    tokenizer = Tokenizer(data.folder)
    assert len(tokenizer.encode("a house")) > 0 and tokenizer._fast is not None
