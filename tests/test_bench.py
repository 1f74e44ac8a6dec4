"""The benchmark of the training step takes train.py's step, and its variants compute the same."""

import functools
import itertools
import math

import pytest
import torch
from variants import VARIANTS, Training

from model import shape
from train import Hyperparameters, Mixture, learning_rate_at, train

CONFIG = shape(2, 64, 4, vocab_size=512, context=64)


def training(name: str, dtype: torch.dtype = torch.float32, config=CONFIG) -> Training:
    """Eager, with two micro-batches of two sequences."""
    T = config.max_position_embeddings
    hyper = Hyperparameters(T, 4, learning_rate=1e-3, dtype=dtype, micro_batch_size=2)
    made = Training(config, torch.device("cpu"), hyper)
    made.compile = lambda: None
    VARIANTS[name](made)
    made.compile()
    return made


def gradients(made: Training) -> dict[str, torch.Tensor]:
    """And, among them, the loss."""
    loss = made.gradients()
    return {"loss": loss} | {name: p.grad for name, p in made.model.named_parameters()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative one of any tensor."""
    return max(((found[name] - x).norm() / x.norm()).item() for name, x in expected.items())


@pytest.fixture(scope="module")
def expected():
    """Of the present code, by dtype."""
    dtypes = (torch.float32, torch.bfloat16)
    return {dtype: gradients(training("present", dtype)) for dtype in dtypes}


def test_the_present_code_is_the_step_that_train_takes(data):
    config = shape(2, 64, 4, vocab_size=data.vocab_size, context=32)
    hyper = Hyperparameters(seq_len=32, batch_size=4, learning_rate=1e-3, micro_batch_size=2)
    counts = dict.fromkeys(data.domains, 4)
    model = training("present", config=config).model
    train(model, data, counts, hyper)

    made = training("present", config=config)
    mixture = Mixture(data, counts, 32)
    steps = math.ceil(len(mixture) / 4)
    for step in range(steps):
        made.row = lambda i, first=4 * step: mixture.row(first + i)
        for group in made.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, 1e-3, hyper.warmup)
        made.steps(1)
    assert steps > 1
    torch.testing.assert_close(made.model.state_dict(), model.state_dict(), rtol=0, atol=0)


# How far gradients may be from the present code's; in bf16 what is added up in another order is
# rounded elsewhere.
FAR = {"update queued": 0, "cast once": 0, "bf16 residual": 4e-2}


@pytest.mark.parametrize("name", FAR)
def test_loss_and_gradients_are_the_present_codes(name, expected):
    """In bf16 they are as near as its rounding lets them."""
    if FAR[name] == 0:
        assert distance(gradients(training(name)), expected[torch.float32]) == 0
    found = gradients(training(name, torch.bfloat16))
    assert distance(found, expected[torch.bfloat16]) <= FAR[name]
    # The measure of it: how far bf16 is from fp32 as it is.
    rounding = distance(expected[torch.bfloat16], expected[torch.float32])
    assert distance(found, expected[torch.float32]) <= 3 * rounding


def test_the_whole_model_is_one_graph_with_the_same_gradients(expected, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compiled)
    assert distance(gradients(training("whole model")), expected[torch.float32]) <= 1e-6
    assert len(graphs) == 1


def test_every_variant_is_compared():
    assert {*FAR, "whole model", "present"} == {*VARIANTS}


@pytest.mark.parametrize("norm", [0.5, 2.0])  # one that is not clipped, and one that is
def test_a_queued_update_is_the_same(norm):
    updated = []
    for made in (training("present"), training("update queued")):
        loss = made.gradients()
        gradient = [p.grad for p in made.model.parameters()]
        before = torch.nn.utils.get_total_norm(gradient)
        torch._foreach_mul_(gradient, norm / before)
        made.update(loss)
        moments = [state["exp_avg"] for state in made.optimizer.state.values()]
        updated.append([*made.model.parameters(), *moments])
    torch.testing.assert_close(updated[1], updated[0], rtol=1e-5, atol=0)


def test_reading_ahead_every_batch_is_trained_on_once():
    losses = []
    for made in (training("present"), training("update queued")):
        # No row is read twice, so that a batch that is left out or taken again has another loss.
        reads = itertools.count()
        row = made.row
        made.row = lambda i, row=row, reads=reads: (row(i) + next(reads)) % CONFIG.vocab_size
        losses.append([made.update(made.gradients()) for _ in range(3)])
    assert len(set(losses[0])) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_with_its_update_queued_what_is_not_finite_is_left_out(bad):
    made = training("update queued")
    made.steps(1)
    before = [p.clone() for p in made.model.parameters()]
    moments = [s["exp_avg"].clone() for s in made.optimizer.state.values()]
    loss = made.gradients()
    made.model.embed_out.weight.grad[0, 0] = bad
    made.update(loss)
    assert all(map(torch.equal, made.model.parameters(), before))
    assert all(map(torch.equal, (s["exp_avg"] for s in made.optimizer.state.values()), moments))
    assert {s["step"].item() for s in made.optimizer.state.values()} == {1.0}
    # Nor does it spoil the next one.
    made.steps(1)
    assert {s["step"].item() for s in made.optimizer.state.values()} == {2.0}
