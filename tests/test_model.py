"""The model against transformers' GPTNeoXForCausalLM, what its files may hold, and its memory."""

import json
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, fails, works
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from model import (
    SHAPES,
    Config,
    GPTNeoX,
    attend,
    can_compile,
    load,
    peak_flops,
    save,
    sequences_at_once,
)
from prepare import InputError, Tokenizer


def theirs(folder, dtype=torch.float32, shards="1GB", **switches) -> GPTNeoXForCausalLM:
    """A random model of transformers, which it has saved to a folder in dtype."""
    torch.manual_seed(0)
    config = {"vocab_size": 211, "hidden_size": 48, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 2, "intermediate_size": 100, "max_position_embeddings": 64}
    config |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, **switches}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**config))
    for name, p in model.named_parameters():
        if p.dim() == 1:  # biases and norms too must matter
            torch.nn.init.normal_(p, mean=float("norm.weight" in name), std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return model


def assert_close(found, expected, atol=1e-5, **how):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5, **how)


SWITCHES = [
    {"use_parallel_residual": parallel, "rotary_pct": pct, "tie_word_embeddings": tied}
    for parallel, pct, tied in product((True, False), (0.25, 1.0), (False, True))
]


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("heads", [2, 6])
def test_logits_loss_and_gradients_equal_those_of_transformers(tmp_path, switches, heads):
    oracle = theirs(tmp_path, num_attention_heads=heads, **switches)
    model = load(tmp_path)
    tokens = torch.randint(211, (3, 38))
    assert_close(model(tokens), oracle(tokens).logits)
    losses = model(tokens[:, :-1], tokens[:, 1:])
    expected = oracle(tokens, labels=tokens).loss
    assert losses.shape == (3, 37)
    assert losses.dtype == torch.float32
    assert_close(losses.mean(), expected, atol=1e-6)
    losses.mean().backward()
    expected.backward()
    gradients = {n.replace("lm_head", "embed_out"): p.grad for n, p in oracle.named_parameters()}
    for name, p in model.named_parameters():
        assert_close(p.grad, gradients[name], msg=name)


def test_the_epsilon_of_every_norm_counts(tmp_path):
    oracle = theirs(tmp_path, layer_norm_eps=0.1, initializer_range=0.02)
    tokens = torch.randint(211, (2, 20))
    assert_close(load(tmp_path)(tokens), oracle(tokens).logits)


@pytest.mark.parametrize("switches", SWITCHES)
def test_transformers_loads_what_save_wrote(tmp_path, switches):
    theirs(tmp_path / "theirs", **switches)
    model = load(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.randint(211, (2, 64))
    assert_close(oracle(tokens).logits, model(tokens))
    assert oracle.config.eos_token_id == oracle.config.bos_token_id == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards, several", [("1GB", False), ("50KB", True)])
def test_whole_and_sharded_folders_of_any_dtype_load_as_fp32(tmp_path, dtype, shards, several):
    theirs(tmp_path, dtype, shards)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (tmp_path / "model.safetensors.index.json").exists() == several
    tokens = torch.randint(211, (1, 20))
    assert_close(load(tmp_path)(tokens), oracle(tokens).logits)
    assert load(tmp_path, dtype=dtype).embed_out.weight.dtype == dtype
    save(load(tmp_path), tmp_path / "saved", dtype=dtype)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}


def test_scratch_is_the_same_for_the_same_seed_and_takes_the_vocabulary():
    a, b, c = (load("scratch:tiny", vocab_size=4000, seed=seed) for seed in (1, 1, 2))
    assert a.config.vocab_size == 4096
    assert torch.equal(a.embed_out.weight, b.embed_out.weight)
    assert not torch.equal(a.embed_out.weight, c.embed_out.weight)


def test_random_weights_are_as_small_as_pythias_were():
    """sqrt(2 / 5C), and 2 / (L sqrt(C)) of what is added to x; L = 4, C = 128."""
    for name, p in load("scratch:tiny").named_parameters():
        std = 0.0559
        if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            std = 0.0442
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(std, rel=0.03), name
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name


@pytest.mark.parametrize("tokens, size", [(4000, 4096), (4096, 4096), (4097, 4224)])
def test_a_vocabulary_is_rounded_up_to_a_multiple_of_128(tokens, size):
    assert load("scratch:tiny", "meta", vocab_size=tokens).config.vocab_size == size


def test_the_saved_tokenizer_is_the_same_in_transformers(small):
    text = "def river_3(x):\n    return 1 + 2 <|endoftext|> the End\n"
    ours = Tokenizer(small)
    auto = AutoTokenizer.from_pretrained(small)
    ids = auto.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ids == ours.encode(text).tolist()
    assert auto.eos_token_id == ours.end_of_text == 0


# ---- what its files may hold ----


def test_buffers_of_old_checkpoints_are_dropped(tmp_path):
    theirs(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for n in range(3):
        prefix = f"gpt_neox.layers.{n}.attention"
        weights[f"{prefix}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        weights[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        weights[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors")
    load(tmp_path)


ATTENTION = "gpt_neox.layers.1.attention"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (f"{ATTENTION}.extra.bias", torch.ones(1), f"unknown tensor {ATTENTION}.extra.bias"),
        (f"{ATTENTION}.dense.bias", None, f"the first is {ATTENTION}.dense.bias"),
        ("embed_out.weight", torch.ones(5, 32), "embed_out.weight has shape [5, 32]"),
        ("embed_out.weight", torch.ones(512, 32).long(), "embed_out.weight is torch.int64"),
    ],
)
def test_a_wrong_tensor_is_named(copy_of_small, name, tensor, message):
    path = copy_of_small / "model.safetensors"
    weights = load_file(path)
    weights.pop(name, None)
    save_file(weights if tensor is None else weights | {name: tensor}, path)
    with pytest.raises(InputError, match=re.escape(message)):
        load(copy_of_small)


def crafted(header, size: int | None = None) -> bytes:
    """A safetensors file with this header, and this for its length, over 256 bytes of tensors."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + b"\0" * 256


def tensors(*found) -> bytes:
    """A file with tensors of these names, types, shapes and offsets."""
    keys = ("dtype", "shape", "data_offsets")
    return crafted({name: dict(zip(keys, rest, strict=True)) for name, *rest in found})


BIAS = "gpt_neox.final_layer_norm.bias"
SAFETENSORS = {
    "empty": b"",
    "too short for a length": b"\0" * 7,
    "all ones": b"\xff" * 64,
    "length of 2^63": crafted(b"{}", size=2**63),
    "length past the end": crafted(b"{}", size=2**30),
    "not UTF-8": crafted(b"\xff" * 100),
    "deep lists": crafted(b"[" * 100_000),
    "deep objects": crafted(b'{"a":' * 50_000),
    "metadata of numbers": crafted({"__metadata__": {"a": 3}}),
    "overlap": tensors(("a", "F32", [32], [0, 128]), ("b", "F32", [48], [64, 256])),
    "one place": tensors(("a", "F32", [64], [0, 256]), ("b", "F32", [64], [0, 256])),
    "a hole": tensors(("a", "F32", [1], [0, 4]), ("b", "F32", [62], [8, 256])),
    "past the end": tensors(("a", "F32", [2**38], [0, 2**40])),
    "ends before it begins": tensors(("a", "F32", [64], [256, 0])),
    "begins before the file": tensors(("a", "F32", [64], [-256, 0])),
    "more elements than 2^64": tensors(("a", "F32", [2**32, 2**32], [0, 256])),
    "negative shape": tensors(("a", "F32", [-64], [0, 256])),
    "unknown type": tensors(("a", "F999", [64], [0, 256])),
    "cut short": tensors((BIAS, "F32", [64], [0, 256]))[:-9],
    "another shape": tensors((BIAS, "F32", [8, 8], [0, 256])),
    "complex": tensors((BIAS, "C64", [32], [0, 256])),
    "8 bits": tensors((BIAS, "F8_E4M3", [256], [0, 256])),
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_weights_that_are_none_are_refused(copy_of_small, content):
    (copy_of_small / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(copy_of_small)


@pytest.mark.parametrize(
    "shard",
    ["../../x", "/etc/passwd", "model-00001-of-00002.bin", 7, None, ["x"], {"a": 1}, "x" * 10**6],
)
def test_an_index_may_only_name_shards(copy_of_small, shard):
    (copy_of_small / "model.safetensors").unlink()
    index = {"weight_map": {"embed_out.weight": shard}}
    (copy_of_small / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="weight_map"):
        load(copy_of_small)


NONSENSE = {
    "hidden_size": ["many", -48, 0, 10**9, 2**80],
    "num_hidden_layers": [True, 2.5, 6.0, 10**6],
    "num_attention_heads": [5, True],
    "vocab_size": ["many", 1e300, 2**40, 50304.0],
    "rotary_pct": [1e308, float("nan"), 10**400, -(10**400)],
    "rotary_emb_base": [-1],
    "layer_norm_eps": [None, float("inf")],
    "rope_parameters": [7, [1], {"rope_type": "yarn"}, {"rope_theta": {}}],
    "rope_scaling": [{"type": "linear"}],
    "model_type": ["llama", ["gpt_neox"]],
    "hidden_act": ["relu"],
    "attention_bias": [False],
}
CONFIGS = [{name: value} for name, values in NONSENSE.items() for value in values]
CONFIGS += [{"rope_parameters": {"partial_rotary_factor": 2.0}}]
CONFIGS += [{"max_position_embeddings": 2**20 - 1, "rotary_pct": 1.0, "hidden_size": 2**19}]
CONFIGS += ["", "[]", "null", "{", "\0" * 50, "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("content", CONFIGS, ids=lambda content: str(content)[:50])
def test_a_config_that_makes_no_sense_is_refused(copy_of_small, content):
    path = copy_of_small / "config.json"
    if isinstance(content, dict):  # of changes
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        load(copy_of_small)


@dataclass
class Wider(Config):
    dropout: float = 0.0
    activation: str = "gelu"
    groups: int | None = None


@pytest.mark.parametrize("own", [{}, {"dropout": 0.1, "activation": "swiglu", "groups": 2}])
def test_settings_of_ones_own_are_saved_and_loaded(tmp_path, monkeypatch, own):
    monkeypatch.setattr("model.Config", Wider)
    config = Wider(64, 16, 1, 2, 32, 16, **own)
    save(GPTNeoX(config), tmp_path)
    assert load(tmp_path).config == config


# ---- what it says ----


def test_greedy_generation_equals_that_of_transformers_and_sampling_its_seed(tmp_path):
    oracle = theirs(tmp_path)
    model = load(tmp_path)
    prompt = torch.randint(1, 211, (1, 5))
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 210, "pad_token_id": 0}
    expected = oracle.generate(prompt, **greedy)[0, 5:].tolist()
    ours = list(model.generate(prompt, 20, end=210))
    assert ours
    assert ours == expected[: len(ours)]
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    sampled = [list(model.generate(prompt, 20, 1.0, generator=seed)) for seed in seeds]
    assert sampled[0] == sampled[1]
    assert sampled[0][: len(ours)] != ours


def test_what_needs_no_compiler_does_not_import_it(tmp_path):
    """Which takes a second or two; but it is told that sums have an order."""
    save(load("scratch:tiny", vocab_size=128), tmp_path)
    lines = "import sys, torch, model; model.start('cpu'); tiny = model.load(sys.argv[1])\n"
    lines += "list(tiny.generate(torch.ones(1, 2, dtype=torch.int64), 2))\n"
    lines += "assert 'torch._dynamo' not in sys.modules\n"
    lines += "tiny.compile_parts()\n"
    lines += "assert torch._inductor.config.deterministic"
    subprocess.run([sys.executable, "-c", lines, tmp_path], cwd=ROOT, check=True)


def test_generation_goes_on_when_the_window_is_full():
    """Within the context with its cache, and beyond it, like the window computed anew each time."""
    model = GPTNeoX(Config(211, 32, 2, 4, 64, 32))
    tokens = torch.randint(211, (1, 20))
    expected = tokens
    for _ in range(24):
        logits = model(expected[:, -32:])
        expected = torch.cat((expected, logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert list(model.generate(tokens, 24)) == expected[0, 20:].tolist()


def test_generation_ends_before_the_end_and_little_temperature_is_greedy():
    torch.manual_seed(0)
    model = GPTNeoX(Config(211, 32, 2, 4, 64, 32))
    tokens = torch.randint(211, (1, 5))
    whole = list(model.generate(tokens, 20))
    end = whole[-1]
    assert list(model.generate(tokens, 20, end=end)) == whole[: whole.index(end)]
    assert list(model.generate(tokens, 20, 1e-5)) == whole


def test_the_command_line_speaks(script, small):
    """One model, or several, each under its name: the text is whole, however it came."""
    words = ["the old", "--tokens", 5, "--device", "cpu"]
    status, out, err = script("model", small, *words)
    assert (status, err) == (0, "")
    tokenizer = Tokenizer(small)
    prompt = torch.from_numpy(tokenizer.encode("the old").astype("int64"))[None]
    new = list(load(small).generate(prompt, 5, end=tokenizer.end_of_text))
    assert out == tokenizer.decode([*prompt[0].tolist(), *new]) + "\n"
    status, both, _ = script("model", small, f"{small}/", *words)
    assert both == f"---- {small}\n{out}---- {small}/\n{out}"
    fails(script("model", small, "\udcff"), "the prompt is not UTF-8")


def test_the_command_line_draws_by_its_seed_and_temperature(script, small):
    words = [small, "the old", "--tokens", 20, "--device", "cpu", "--temperature", 1]
    said = [works(script("model", *words, "--seed", seed)) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_a_prompt_of_which_the_tokenizer_makes_nothing_begins_a_document(script, copy_of_small):
    words = {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "old": 1}, "unk_token": "old"}
    end = {"id": 0, "content": "<|endoftext|>", "special": True, "single_word": False}
    end |= {"lstrip": False, "rstrip": False, "normalized": False}
    spec = {"version": "1.0", "added_tokens": [end], "model": words}
    spec["pre_tokenizer"] = {"type": "Whitespace"}
    (copy_of_small / "tokenizer.json").write_text(json.dumps(spec))
    status, out, err = script("model", copy_of_small, " ", "--tokens", 3, "--device", "cpu")
    assert (status, err) == (0, "") and out.startswith("<|endoftext|>")


def test_a_model_that_does_not_know_all_of_its_tokenizer_does_not_speak(script, small, tmp_path):
    size = Tokenizer(small).vocab_size
    save(GPTNeoX(Config(size - 1, 32, 2, 4, 64)), tmp_path / "m", small / "tokenizer.json")
    said = [f"has {size:,} tokens, it knows {size - 1:,}"]
    fails(script("model", tmp_path / "m", "the old", "--device", "cpu"), *said)
    fails(script("model", small, "the old", "--seed", "9" * 20), "--seed 9999")
    fails(script("model", small, "the old", "--temperature", 1e-39), "--temperature 1e-39")
    fails(script("model", "scratch:tiny", "the old"), "scratch:tiny", "a trained model")


# ---- two ways to compute the same ----


def learning(model, tokens) -> dict[str, torch.Tensor]:
    """Its losses and gradients, where no two tokens count the same."""
    model.zero_grad()
    losses = model(tokens[:, :-1], tokens[:, 1:])
    weights = torch.linspace(0, 1, losses.numel()).view_as(losses)
    (losses * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"losses": losses.detach(), **gradients}


def assert_same_learning(found, expected, tolerance):
    for name, values in expected.items():
        atol = tolerance * values.abs().max().item() + 1e-9
        torch.testing.assert_close(found[name], values, atol=atol, rtol=tolerance)


def test_activation_checkpointing_changes_nothing():
    model = GPTNeoX(Config(211, 32, 2, 4, 64, 32))
    tokens = torch.randint(211, (3, 21))
    expected = learning(model, tokens)
    calls = []
    model.gpt_neox.layers[0].mlp.register_forward_pre_hook(lambda *call: calls.append(call))
    model.activation_checkpointing = True
    assert_same_learning(learning(model, tokens), expected, 1e-6)
    assert len(calls) == 2  # once more for the gradient


compiles, how = can_compile(torch.device("cpu"))
compiled = pytest.mark.skipif(not compiles, reason=how)


@compiled
def test_a_compiled_model_learns_like_an_eager_one():
    model = GPTNeoX(Config(211, 32, 2, 4, 64, 32))
    tokens = torch.randint(211, (2, 32))
    expected = learning(model, tokens)
    model.compile_parts()
    assert_same_learning(learning(model, tokens), expected, 1e-5)


def attention(function, dtype: torch.dtype, inputs: torch.Tensor) -> torch.Tensor:
    """What function(q, k, v) gives in dtype, and its three gradients, stacked, in fp64."""
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
    y = function(q, k, v)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    y.backward(weights.to(dtype))
    return torch.stack([x.detach().double() for x in (y, q.grad, k.grad, v.grad)])


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def assert_rounds_like_sdpa(function, dtype, T):
    """To a factor of 2 the result and each gradient are as near to fp64's as those of SDPA."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 2, T, 32, dtype=torch.float64)
    exact = attention(sdpa, torch.float64, inputs)
    errors = (attention(function, dtype, inputs) - exact).square().mean((1, 2, 3, 4))
    theirs = (attention(sdpa, dtype, inputs) - exact).square().mean((1, 2, 3, 4))
    assert (errors < 4 * theirs).all(), (errors / theirs).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [31, 300, 1100])  # in one block, in three and in nine of other sizes
def test_attention_in_blocks_rounds_no_more_than_sdpa(monkeypatch, dtype, T):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_rounds_like_sdpa(attend, dtype, T)


@compiled
def test_compiled_attention_rounds_no_more_in_bfloat16_than_sdpa():
    assert_rounds_like_sdpa(torch.compile(attend, dynamic=False), torch.bfloat16, 200)


# ---- its size ----


SIZES = ["14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]
COUNTS = [14_067_712, 30_494_720, 70_426_624, 162_322_944, 405_334_016, 1_011_781_632]
COUNTS += [1_414_647_808, 2_775_208_960, 6_857_302_016, 11_846_072_320]
PUBLISHED = {f"pythia-{size}": count for size, count in zip(SIZES, COUNTS, strict=True)}


def test_presets_have_the_published_parameter_counts():
    with torch.device("meta"):
        counted = {size: GPTNeoX(SHAPES[size]).parameter_count() for size in PUBLISHED}
    assert counted == PUBLISHED


def test_a_token_takes_6_operations_for_each_weight_that_multiplies_and_those_of_attention():
    """6 x 908,759,040, for the look-up of tokens is none, and 12 x 16 x 2048 x 2048."""
    assert load("scratch:pythia-1b", "meta").flops_per_token(2048) == 6_257_860_608


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12)]
    + [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA T4", None)],
)
def test_the_peak_of_a_gpu_is_its_own(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak


# Peaks of training on sequences of 2048 tokens: bf16, compiled, weights in fp32, on an H200; the
# second and the last in several micro-batches, where gradients are there from the second one on.
MEASURED = [
    ("pythia-70m", 32, 15.1e9),
    ("pythia-70m", 8, 4.87e9),
    ("pythia-410m", 16, 38.3e9),
    ("pythia-1b", 8, 39.5e9),
]


@pytest.fixture
def fitting(monkeypatch):
    """How many sequences a GPU with so many bytes takes at a time."""

    def fitting(memory: int, *setting, training: bool) -> int:
        gpu = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        return sequences_at_once(*setting, torch.device("cuda"), training=training)

    return fitting


@pytest.mark.parametrize("name, sequences, measured", MEASURED)
def test_the_memory_of_training_is_reckoned_as_it_was(fitting, name, sequences, measured):
    """Measured, within the tenth that stays free."""
    model = load(f"scratch:{name}", "meta", vocab_size=50304)
    state = 16 * PUBLISHED[name]
    activations = sequences * 2048 * model.bytes_per_token(True, torch.bfloat16)
    assert 0.98 * measured <= state + activations <= 1.2 * measured
    setting = (model, 2048, torch.bfloat16)
    # What was measured fills a GPU of this size; on one too small for the model one is tried.
    assert 1 <= fitting(int(measured), *setting, training=True) <= sequences
    assert fitting(10**9, *setting, training=True) == 1


def test_a_gpu_gets_as_many_sequences_as_its_memory_holds(fitting):
    """Worked out by hand for pythia-1b: 16 x 1,011,781,632 bytes, then 2.89 GB a sequence, or 0.47
    with activation checkpointing; logits of 0.41 GB in at most a tenth of it all, or 4 GB."""
    model = load("scratch:pythia-1b", "meta")
    setting = (model, 2048, torch.bfloat16)
    found = [fitting(gib * 2**30, *setting, training=True) for gib in (16, 24, 40, 80)]
    assert found == [1, 2, 7, 10]
    model.activation_checkpointing = True
    assert fitting(24 * 2**30, *setting, training=True) == 6


def test_evaluation_counts_hidden_states_where_logits_are_small(fitting):
    """Of a vocabulary of 512 they are small beside what goes through a layer of pythia-1b."""
    model = load("scratch:pythia-1b", "meta", vocab_size=512)
    n = fitting(80 * 10**9, model, 64, torch.float32, training=False)
    numbers = 2048 + 2048 + 8192 + 8192  # of a token: what comes in, its norm, the MLP's middle
    assert 10e9 < 4 * 64 * n * numbers < 75e9
