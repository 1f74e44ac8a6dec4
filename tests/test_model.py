"""The model against transformers' GPTNeoXForCausalLM: same logits, loss and gradients, loaded either way."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from eval import can_compile
from model import SHAPES, Config, GPTNeoX, attend, load, save
from prepare import InputError, Tokenizer
from train import flops_per_token

SWITCHES = [
    dict(
        use_parallel_residual=parallel,
        rotary_pct=pct,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
    )
    for parallel in (True, False)
    for pct in (0.25, 1.0)
    for heads, tied in ((2, False), (6, True))
]


def theirs(folder, dtype=torch.float32, **switches):
    """A random transformers model, saved to a folder as transformers saves it."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 211,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 100,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **switches,
    }
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**config))
    for name, p in model.named_parameters():
        if p.dim() == 1:  # biases and norms too must matter
            torch.nn.init.normal_(p, mean=float("norm.weight" in name), std=0.2)
    model.to(dtype).save_pretrained(folder)
    return model.float()


@pytest.mark.parametrize("switches", SWITCHES)
def test_logits_loss_and_gradients_equal_those_of_transformers(tmp_path, switches):
    oracle, model = theirs(tmp_path, **switches), load(tmp_path)
    tokens = torch.randint(211, (3, 38))
    torch.testing.assert_close(model(tokens), oracle(tokens).logits, atol=1e-5, rtol=1e-5)
    loss, expected = model(tokens[:, :-1], tokens[:, 1:]), oracle(tokens, labels=tokens).loss
    assert loss.shape == (3, 37) and loss.dtype == torch.float32
    torch.testing.assert_close(loss.mean(), expected, atol=1e-6, rtol=1e-6)
    loss.mean().backward()
    expected.backward()
    gradients = {
        name.replace("lm_head", "embed_out"): p.grad for name, p in oracle.named_parameters()
    }
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("switches", SWITCHES)
def test_transformers_loads_what_save_wrote(tmp_path, switches):
    theirs(tmp_path / "a", **switches)
    model = load(tmp_path / "a")
    save(model, tmp_path / "b")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    tokens = torch.randint(211, (2, 64))
    torch.testing.assert_close(oracle(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    assert oracle.config.eos_token_id == oracle.config.bos_token_id == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folders_load_as_fp32(tmp_path, dtype):
    theirs(tmp_path, dtype)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(211, (1, 20))
    torch.testing.assert_close(load(tmp_path)(tokens), oracle(tokens).logits, atol=1e-5, rtol=1e-5)
    assert load(tmp_path, dtype=dtype).embed_out.weight.dtype == dtype


def test_sharded_folders_load(tmp_path):
    oracle = theirs(tmp_path / "whole")
    oracle.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    tokens = torch.randint(211, (1, 20))
    torch.testing.assert_close(
        load(tmp_path / "shards")(tokens), oracle(tokens).logits, atol=1e-5, rtol=1e-5
    )


def test_buffers_of_old_checkpoints_are_dropped(tmp_path):
    theirs(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for n in range(3):
        prefix = f"gpt_neox.layers.{n}.attention"
        weights |= {
            f"{prefix}.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
            f"{prefix}.masked_bias": torch.tensor(-1e9),
            f"{prefix}.rotary_emb.inv_freq": torch.ones(3),
        }
    save_file(weights, tmp_path / "model.safetensors")
    load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.update({"gpt_neox.layers.0.attention.extra.bias": torch.ones(1)}),
            "unknown tensor gpt_neox.layers.0.attention.extra.bias",
        ),
        (
            lambda w: w.pop("gpt_neox.layers.1.attention.dense.bias"),
            "the first is gpt_neox.layers.1.attention.dense.bias",
        ),
        (
            lambda w: w.update({"embed_out.weight": torch.ones(5, 48)}),
            "embed_out.weight has shape [5, 48]",
        ),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    theirs(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, None])
def test_truncated_weights_are_refused(tmp_path, content):
    theirs(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "many"},
        {"hidden_size": -48},
        {"hidden_size": 0},
        {"num_hidden_layers": True},
        {"vocab_size": 1e300},
        {"num_attention_heads": 5},
        {"rope_parameters": {"partial_rotary_factor": 2.0}},
        {"model_type": "llama"},
        {"hidden_act": "relu"},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": 7},
        {"rope_scaling": {"type": "linear"}},
        {"layer_norm_eps": None},
        {"attention_bias": False},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path, change):
    theirs(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match="config.json"):
        load(tmp_path)


def test_an_index_may_only_name_shards(tmp_path):
    theirs(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"embed_out.weight": "../../x.safetensors"}})
    )
    with pytest.raises(InputError, match="weight_map"):
        load(tmp_path)


def test_presets_have_the_published_parameter_counts():
    published = {
        "14m": 14_067_712,
        "31m": 30_494_720,
        "70m": 70_426_624,
        "160m": 162_322_944,
        "410m": 405_334_016,
        "1b": 1_011_781_632,
        "1.4b": 1_414_647_808,
        "2.8b": 2_775_208_960,
        "6.9b": 6_857_302_016,
        "12b": 11_846_072_320,
    }
    with torch.device("meta"):
        counted = {
            size: sum(p.numel() for p in GPTNeoX(SHAPES[f"pythia-{size}"]).parameters())
            for size in published
        }
        assert (
            flops_per_token(GPTNeoX(SHAPES["pythia-1b"]), 2048) == 6_257_860_608
        )  # 6 x 908,759,040 + 12 x 16 x 2048 x 2048
    assert counted == published


def test_scratch_is_the_same_for_the_same_seed_and_takes_the_vocabulary():
    a, b, c = (load("scratch:tiny", vocab_size=4000, seed=seed) for seed in (1, 1, 2))
    assert a.config.vocab_size == 4096 and torch.equal(a.embed_out.weight, b.embed_out.weight)
    assert not torch.equal(a.embed_out.weight, c.embed_out.weight)


def test_greedy_generation_equals_that_of_transformers(tmp_path):
    oracle, model = theirs(tmp_path), load(tmp_path)
    prompt = torch.randint(1, 211, (1, 5))
    expected = oracle.generate(
        prompt, max_new_tokens=20, do_sample=False, eos_token_id=210, pad_token_id=0
    )
    ours = model.generate(prompt, 20, end=210)
    assert torch.equal(ours, expected[:, : ours.size(1)]) and ours.size(1) > 5
    sampled = [
        model.generate(prompt, 20, 1.0, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*sampled) and not torch.equal(sampled[0][:, : ours.size(1)], ours)


def test_the_saved_tokenizer_is_the_same_in_transformers(small, data):
    text = "def river_3(x):\n    return 1 + 2 <|endoftext|> the End\n"
    ours, auto = Tokenizer(small), AutoTokenizer.from_pretrained(small)
    assert auto.eos_token_id == ours.end_of_text == 0
    assert (
        auto.encode(text, add_special_tokens=False, split_special_tokens=True)
        == ours.encode(text).tolist()
    )


def test_the_command_line_speaks(script, small):
    status, out, err = script("model", small, "the old", "--tokens", 5, "--device", "cpu")
    assert (status, err) == (0, "") and out.startswith("the old")


def test_save_keeps_the_dtype_asked_for_and_the_umask(tmp_path):
    save(GPTNeoX(Config(64, 16, 1, 2, 32, 16)), tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert (tmp_path / "model.safetensors").stat().st_mode == (
        tmp_path / "config.json"
    ).stat().st_mode


def losses_and_gradients(model, tokens):
    losses = model(tokens[:, :-1], tokens[:, 1:])
    weights = torch.linspace(0, 1, losses.numel()).view_as(losses)  # no two tokens count the same
    (losses * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return losses.detach(), gradients


def assert_equal_learning(found, expected, atol=1e-6):
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=atol)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=atol * gradient.abs().max().item() + 1e-9, rtol=atol
        )


@pytest.mark.parametrize("part", [1, 2, 7, 3 * 20])
def test_losses_in_parts_are_the_plain_ones(part):
    """Logits of at most so many tokens at once, an uneven last part among them."""
    model, tokens = GPTNeoX(Config(211, 32, 2, 4, 64, 32)).double(), torch.randint(211, (3, 21))
    expected, seen = losses_and_gradients(model, tokens), []
    model.logits_at_once = part * 211
    model.embed_out.register_forward_hook(lambda module, args, logits: seen.append(logits.numel()))
    assert_equal_learning(losses_and_gradients(model, tokens), expected)
    assert max(seen) <= part * 211 and len(seen) >= 60 / part


def test_activation_checkpointing_changes_nothing():
    model, tokens = GPTNeoX(Config(211, 32, 2, 4, 64, 32)), torch.randint(211, (3, 21))
    expected, seen = losses_and_gradients(model, tokens), []
    model.gpt_neox.layers[0].mlp.register_forward_pre_hook(lambda *call: seen.append(call))
    model.checkpointing = True
    assert_equal_learning(losses_and_gradients(model, tokens), expected)
    assert len(seen) == 2  # once more for the gradient


@pytest.mark.skipif(
    not can_compile(torch.device("cpu"))[0], reason=can_compile(torch.device("cpu"))[1]
)
@pytest.mark.parametrize("T", [31, 300])
def test_a_compiled_model_learns_like_an_eager_one(T):
    """With attention in blocks: in one, and in three of which the last is short."""
    model, tokens = GPTNeoX(Config(211, 32, 2, 4, 64, 512)), torch.randint(211, (2, T + 1))
    expected = losses_and_gradients(model, tokens)
    model.compile_parts()
    assert_equal_learning(losses_and_gradients(model, tokens), expected, atol=1e-5)


@pytest.mark.skipif(
    not can_compile(torch.device("cpu"))[0], reason=can_compile(torch.device("cpu"))[1]
)
def test_compiled_attention_rounds_no_more_in_bfloat16_than_sdpa():
    """Both against fp64: the result and its gradients are as near in blocks as in SDPA's kernel, to a factor of 2."""
    exact = [torch.randn(2, 2, 200, 32, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.randn(2, 2, 200, 32)

    def outcome(f, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
        out = f(*inputs)
        out.backward(weights.to(dtype))
        return [x.double() for x in (out.detach(), *(x.grad for x in inputs))]

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    expected = outcome(sdpa, torch.float64)
    theirs, ours = (
        outcome(sdpa, torch.bfloat16),
        outcome(torch.compile(attend, dynamic=False), torch.bfloat16),
    )
    for e, a, b in zip(expected, theirs, ours):
        assert (b - e).square().mean() < 4 * (a - e).square().mean()


def test_generation_goes_on_when_the_window_is_full(tmp_path):
    """Within the context with its cache, and beyond it, like the whole window computed anew for every token."""
    model, tokens = GPTNeoX(Config(211, 32, 2, 4, 64, 32)), torch.randint(211, (1, 20))
    expected = tokens
    for _ in range(24):
        logits = model(expected[:, -32:])
        expected = torch.cat((expected, logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(tokens, 24), expected)
