"""Losses against transformers, bits per byte by hand, and intervals against a bootstrap written as a plain loop."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval import bootstrap, compare, documents_of, evaluate, results, table
from model import load
from prepare import Tokenizer


def test_every_window_is_scored_once_and_as_transformers_does(data, small):
    losses, oracle = (
        evaluate(load(small), data, "test", 32),
        AutoModelForCausalLM.from_pretrained(small),
    )
    assert list(losses) == data.domains
    for d in data.domains:
        tokens = torch.from_numpy(data.tokens(d, "test").astype("int64"))
        n = (len(tokens) - 1) // 32
        assert losses[d].shape == (n,)
        for c in (0, 1, n - 1):
            logits = oracle(tokens[None, c * 32 : c * 32 + 32]).logits[0]
            expected = torch.nn.functional.cross_entropy(
                logits, tokens[c * 32 + 1 : c * 32 + 33]
            ).item()
            assert losses[d][c] == pytest.approx(expected, abs=1e-5)
    limited = evaluate(load(small), data, "test", 32, limit=3)
    for d, n in ((d, len(losses[d])) for d in data.domains):
        assert limited[d] == pytest.approx(losses[d][[0, n // 3, 2 * n // 3]], abs=1e-6)


def test_evaluation_touches_no_random_state(data, small):
    model = load(small)
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    state = torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].tolist()
    evaluate(model, data, "val", 32)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]


def test_a_window_belongs_to_the_document_it_begins_in(data):
    tokens = data.tokens("prose", "test")
    n = (len(tokens) - 1) // 32
    expected = [sum(int(t) == 0 for t in tokens[: c * 32]) for c in range(n)]
    assert documents_of(data, "prose", "test", 32, n).tolist() == expected
    assert documents_of(data, "prose", "test", 32, 3).tolist() == [
        expected[c] for c in (0, n // 3, 2 * n // 3)
    ]


def test_bits_per_byte_count_the_bytes_of_the_text(data, small):
    """A loss of ln 2 at every token is one bit a token."""
    losses = {d: np.full(3, math.log(2)) for d in data.domains}
    shown = results({"a": losses}, data, "test", 32)["models"]["a"]
    for d in data.domains:
        tokens = data.tokens(d, "test")
        text = Tokenizer(data.folder).decode(tokens[tokens != 0])
        assert shown["bits_per_byte"][d] == pytest.approx(len(tokens) / len(text.encode()))
    assert shown["nats"]["mean"] == pytest.approx(math.log(2))


def test_intervals_resample_documents():
    """Twenty documents whose windows agree within themselves: resampling windows would look far too sure."""
    rng, loop = np.random.default_rng(1), random.Random(2)
    documents = np.repeat(np.arange(20), rng.integers(1, 15, 20))
    values = rng.normal(size=20)[documents] + 0.01 * rng.normal(size=len(documents))
    by_document = [values[documents == k] for k in range(20)]
    slow = [np.concatenate(loop.choices(by_document, k=20)).mean() for _ in range(4000)]
    fast = bootstrap(values, documents)
    assert np.quantile(fast, [0.025, 0.5, 0.975]) == pytest.approx(
        np.quantile(slow, [0.025, 0.5, 0.975]), abs=0.04
    )
    assert np.std(fast) > 2 * values.std() / math.sqrt(len(values))


def test_differences_are_paired_and_counted(data, small):
    base = evaluate(load(small), data, "test", 32)
    better = {d: values - 0.25 + (0.5 if d == "sums" else 0) for d, values in base.items()}
    difference = compare(base, better, data, "test", 32)
    assert difference["code"]["change"] == pytest.approx(-0.25) and difference["code"][
        "interval"
    ] == pytest.approx([-0.25, -0.25])
    assert difference["mean"]["change"] == pytest.approx(-0.25 / 3) and difference["mean"][
        "interval"
    ] == pytest.approx([-0.25 / 3] * 2)
    assert difference["improved"] == 2 and difference["worst"] == pytest.approx(0.25)


def test_the_table_lines_up_and_marks_domains_with_few_documents(data, small):
    base = evaluate(
        load(small), data, "test", 32, limit=8
    )  # eight windows begin in fewer than ten documents
    text = table(
        results({"base": base, "tuned": {d: v - 0.1 for d, v in base.items()}}, data, "test", 32)
    )
    rows = text.splitlines()
    assert "code*" in text and "fewer than 10 documents" in text and "3 of 3, worst -0.1000" in text
    columns = [row.index("-0.1000 [") for row in rows if "-0.1000 [" in row]
    assert len(columns) == 4 and len(set(columns)) == 1


def test_the_command_prints_the_table_and_writes_json(script, data, small, tmp_path):
    status, out, err = script(
        "eval",
        small,
        "--data",
        data.folder,
        "--device",
        "cpu",
        "--no-compile",
        "--no-compile",
        "--dtype",
        "float32",
        "--json",
        tmp_path / "r.json",
    )
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["seq_len"] == 32 and f"{result['models'][str(small)]['nats']['mean']:.4f}" in out


def test_a_model_with_another_tokenizer_brings_a_warning(script, data, small, tmp_path):
    shutil.copytree(small, tmp_path / "other")
    with open(tmp_path / "other" / "tokenizer.json", "a") as f:
        f.write("\n")
    for model, warned in ((small, False), (tmp_path / "other", True)):
        status, out, _ = script(
            "eval",
            model,
            "--data",
            data.folder,
            "--device",
            "cpu",
            "--no-compile",
            "--dtype",
            "float32",
        )
        assert status == 0 and ("warning" in out) == warned
