"""The order of the pass, by brute force: the rest of what is promised of it stands in test_fuzz."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from conftest import bins

from prepare import InputError
from train import Hyperparameters, Mixture, parse_mixture, rescale, this_pass, times_seen

T = 10
LENGTHS = {"a": 1001, "b": 301, "c": 2500, "d": 75, "e": 4001}  # 100, 30, 249, 7, 400 windows
COUNTS = [
    {"a": 30, "b": 20, "c": 50},
    {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1},
    {"a": 7, "b": 0, "c": 13, "d": 29, "e": 111},
    {"d": 40},
    {"e": 100, "a": 99, "b": 101},
    {"a": 250, "b": 3, "c": 1000},
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return bins(tmp_path_factory.mktemp("bins") / "data", LENGTHS)


def drawn(mixture) -> list[tuple[str, int]]:
    """The pass as (domain, window), read off the tokens: window c begins with token 10 c."""
    out = []
    for domain, inputs, targets in mixture:
        assert inputs.dtype == targets.dtype == np.uint16
        assert np.array_equal(inputs, inputs[0] + np.arange(T))
        assert np.array_equal(targets, inputs + 1)
        out.append((domain, int(inputs[0]) // T))
    return out


@pytest.mark.parametrize("counts", COUNTS)
def test_domains_interleave_by_the_middle_of_their_draws_ties_by_name(counted, counts):
    expected = sorted((Fraction(2 * k + 1, 2 * n), d) for d, n in counts.items() for k in range(n))
    assert [d for d, _ in drawn(Mixture(counted, counts, T))] == [d for _, d in expected]


def test_the_seed_decides_the_windows_but_not_the_places(counted):
    first, again, other = (drawn(Mixture(counted, COUNTS[0], T, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert [d for d, _ in first] == [d for d, _ in other]


def test_the_order_never_changes(counted):
    """The digest pins the order for good: a checkpoint holds nothing but the step."""
    orders = [drawn(Mixture(counted, counts, T, seed=5)) for counts in COUNTS]
    digest = hashlib.sha256(repr(orders).encode()).hexdigest()
    assert digest == "5079cc84edd8cc6053adcef8f50e3fe38958866be5c5011ff88e7478d3690be0"


def test_windows_that_earlier_passes_over_this_data_saw_come_last_the_others_as_ever(counted):
    one = {"data": counted.identity, "seq_len": T, "seed": 8, "counts": {"a": 70}}
    seen = times_seen(counted, T, [one, one | {"data": "another"}, one | {"seq_len": 2 * T}])
    assert {d: n.sum() for d, n in seen.items()} == {"a": 70, "b": 0, "c": 0, "d": 0, "e": 0}
    aware, unaware = (drawn(Mixture(counted, {"a": 100}, T, 4, past)) for past in (seen, None))
    assert [draw for draw in unaware if not seen["a"][draw[1]]] == aware[:30]


def test_a_pass_is_remembered_with_its_seed(data):
    one = this_pass(
        data, Hyperparameters(seq_len=32, batch_size=8, learning_rate=0.1, seed=3), {"sums": 9}
    )
    mixture = Mixture(data, {"sums": 9}, 32, seed=3)
    drawn = sorted(mixture.window("sums", k) for k in range(9))
    assert np.flatnonzero(times_seen(data, 32, [one])["sums"]).tolist() == drawn


@pytest.mark.parametrize(
    "counts, message",
    [
        ({"a": 0, "b": 0}, "every count is zero"),
        ({}, "every count is zero"),
        ({"a": -1}, "-1"),
        ({"a": 1.5}, "1.5"),
        ({"a": True}, "True"),
        ({"a": "7"}, "'7'"),
        ({"x": 3}, "no domain 'x'"),
        ({"a": 2**40}, "sequences"),
    ],
)
def test_what_is_no_mixture_is_refused(counted, counts, message):
    with pytest.raises(InputError, match=message):
        Mixture(counted, counts, T)


def test_rescale_rounds_up_the_largest_remainders_ties_by_name():
    assert rescale({"a": 1, "b": 1, "c": 1}, 8) == {"a": 3, "b": 3, "c": 2}
    assert rescale({"a": 0.5, "b": 0.3, "c": 0.2}, 9) == {"a": 4, "b": 3, "c": 2}  # 4.5, 2.7, 1.8


def test_mixtures_by_name_file_and_string(counted, tmp_path):
    assert parse_mixture("uniform", counted, 10, T) == dict.fromkeys("abcde", 2)
    natural = {"a": 100, "b": 30, "c": 250, "d": 7, "e": 400}  # of 7,878 tokens
    assert parse_mixture("natural", counted, 787, T) == natural
    assert parse_mixture("a=3, c=4", counted, None, T) == {"a": 3, "c": 4}
    path = tmp_path / "mix.json"
    path.write_text('{"counts": {"a": 30, "b": 10}, "seq_len": 20}')
    assert parse_mixture(str(path), counted, 8, T) == {"a": 6, "b": 2}
    for text in ("uniform", str(path)):
        with pytest.raises(InputError, match=f"{text}.*--sequences"):
            parse_mixture(text, counted, None, T)
    for content in ("{", "[]", '{"a": "x"}', '{"counts": 3}', '{"counts": {"a": 2.5}}'):
        path.write_text(content)
        with pytest.raises(InputError, match="mix"):
            parse_mixture(str(path), counted, 8, T)


def test_the_published_mixture_is_taken_where_the_domains_have_its_names(tmp_path):
    published = {"arxiv": 608, "github": 226, "books": 613, "wikipedia": 1438, "web": 8516}
    data = bins(tmp_path / "d", dict.fromkeys(published, 20_000))
    assert parse_mixture("horizon", data, None, 16) == published
    assert rescale(published, 11401) == published
    assert len(Mixture(data, published, 16)) == 11401
    assert sum(parse_mixture("horizon", data, 100, 16).values()) == 100
