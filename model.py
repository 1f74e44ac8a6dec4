"""GPT-NeoX, Pythia's architecture, written out; its safetensors in, a Hugging Face folder out.

    python model.py out/mix "def main("                              # what a model says
    python model.py pythia-70m out/mix "The capital of" --temperature 0.8      # one after another

Modules carry the names that the files on disk use, so there is no table of keys to maintain.
In comments on shapes B is sequences, T tokens, C hidden_size, H heads, D = C / H, V the vocabulary.
"""

import contextlib
import ctypes
import functools
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import prepare
from prepare import InputError, Tokenizer

# ---- the shapes ----


@dataclass
class Config:
    """The shape of a GPT-NeoX, under the names of Hugging Face's config.json."""

    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 2048  # the longest sequence
    rotary_pct: float = 0.25  # share of each head's dimensions that is rotated
    rotary_emb_base: float = 10000.0
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dims(self) -> int:
        return int(self.head_dim * self.rotary_pct)


def shape(layers: int, hidden: int, heads: int, vocab_size=50304, context=2048) -> Config:
    return Config(vocab_size, hidden, layers, heads, 4 * hidden, context)


SHAPES = {
    "tiny": shape(4, 128, 4, vocab_size=4096, context=256),
    "pythia-14m": shape(6, 128, 4),
    "pythia-31m": shape(6, 256, 8),
    "pythia-70m": shape(6, 512, 8),
    "pythia-160m": shape(12, 768, 12),
    "pythia-410m": shape(24, 1024, 16),
    "pythia-1b": shape(16, 2048, 8),
    "pythia-1.4b": shape(24, 2048, 16),
    "pythia-2.8b": shape(32, 2560, 32),
    "pythia-6.9b": shape(32, 4096, 32, vocab_size=50432),
    "pythia-12b": shape(36, 5120, 40, vocab_size=50688),
}


# ---- the network ----


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (2104.09864, equation 34) of the first R of D dimensions.

    x (B, T, H, D), cos and sin (T, R) -> (B, T, H, D).
    """
    R = cos.size(-1)
    cos = cos[:, None]
    sin = sin[:, None]
    rotated = x[..., :R]
    # GPT-NeoX rotates dimension i with i + R/2, not with its neighbour.
    a, b = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((rotated, x[..., R:]), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens: q (B, H, T, D), k, v (B, H, S, D) -> like q.

    T is S, or 1.
    """
    T = q.size(2)
    S = k.size(2)
    in_blocks = q.device.type == "cpu" and torch.compiler.is_compiling() and T == S
    if not in_blocks:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T == S)
    # On a CPU, blocks of queries in operations that torch.compile fuses are faster than SDPA's
    # kernel: forward and backward of bf16 (16, 4, 256, 32) take 6.7 ms on two cores, not 21.4.
    # For the backward pass they keep the probabilities that are not zero, half of H T^2 a sequence.
    size = max(128, T // 8)
    out = []
    for i, queries in zip(range(0, T, size), q.split(size, dim=2), strict=True):
        # A block of queries sees the keys up to its own end.
        n = min(i + size, T)
        scores = (queries @ k[:, :, :n].transpose(-2, -1)).float() * q.size(-1) ** -0.5
        # A query sees no later key. int32 is as wide as a score, so vectors need no conversion;
        # with masked_fill, inductor would keep exp in fp32 for all blocks but the first.
        keys = torch.arange(n, dtype=torch.int32)
        later = keys > keys[i:, None]  # a row is a query of this block
        scores = scores - 1e30 * later
        # The softmax's division comes last, on D numbers a query instead of n.
        p = (scores - scores.amax(-1, keepdim=True).detach()).exp().to(v.dtype)
        out.append((p @ v[:, :, :n] / p.float().sum(-1, keepdim=True)).to(v.dtype))
    return torch.cat(out, 2)


class Linear(nn.Linear):
    def forward(self, x):
        # On a GPU the matrix product adds the bias at no cost. Added separately, its gradient would
        # be summed before the products that read the same values, and inductor would compute these
        # twice. On a CPU a separate addition fuses with what follows.
        if x.is_cuda or self.bias is None:
            return super().forward(x)
        y = F.linear(x, self.weight)
        return y + self.bias.to(y.dtype)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        # On device "meta" there is nothing to draw, and to find that out torch would import its
        # compiler, which takes a second.
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        # (B, T, 3C), in which each head has its query, key and value side by side: (B, T, H, 3D).
        qkv = self.query_key_value(x).view(B, T, self.heads, -1)
        q, k, v = qkv.chunk(3, dim=-1)
        # Only the shapes are transposed: in memory a token's heads stay side by side, also in what
        # comes of them, and nothing has to be copied before the next product.
        q = rotate(q, cos, sin).transpose(1, 2)
        k = rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        # The cache (2, B, H, S, D) holds keys and values of all S tokens, these T the last.
        if cache is not None:
            cache[0, :, :, -T:] = k
            cache[1, :, :, -T:] = v
            k, v = cache
        y = attend(q, k, v)
        return self.dense(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))  # the exact (erf) GELU


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        attended = self.attention(self.input_layernorm(x), cos, sin, cache)
        # In Pythia both branches read x.
        if self.parallel:
            return x + attended + self.mlp(self.post_attention_layernorm(x))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class GPTNeoX(nn.Module):
    """GPT-NeoX (2204.06745). Its weights are drawn here; `load` replaces them by a model's own."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.to_compile = False  # whether compile_for is to compile it, when first used
        self.compiled = False
        self.compiled_for = set()  # shapes of batches; see compile_for
        # Keep only the input of each layer; compute the rest again for the gradient.
        self.activation_checkpointing = False
        self.gpt_neox = nn.ModuleDict(
            {
                "embed_in": Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
                "final_layer_norm": nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
            }
        )
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.embed_out.weight = self.gpt_neox.embed_in.weight
        if not self.embed_out.weight.is_meta:
            self.draw_weights()
        self.make_rotary()

    def draw_weights(self) -> None:
        """As Pythia's were: small (1910.05895), and smaller for what a branch adds to x
        (2204.06745), so that the sum over the layers does not grow with their number."""
        c = self.config
        small = math.sqrt(2 / (5 * c.hidden_size))
        added = 2 / (c.num_hidden_layers * math.sqrt(c.hidden_size))
        for name, p in self.named_parameters():
            if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                nn.init.normal_(p, std=added)
            elif p.dim() == 2:
                nn.init.normal_(p, std=small)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def make_rotary(self) -> None:
        """Fill the (T, R) tables of cosines and sines, fp32."""
        c = self.config
        # On the CPU, so that every device has the same.
        with torch.device("cpu"):
            exponent = torch.arange(0, c.rotary_dims, 2, dtype=torch.float32) / c.rotary_dims
            position = torch.arange(c.max_position_embeddings, dtype=torch.float32)
            angle = torch.outer(position, c.rotary_emb_base**-exponent).repeat(1, 2)
        device = self.embed_out.weight.device
        self.register_buffer("cos", angle.cos().to(device), persistent=False)
        self.register_buffer("sin", angle.sin().to(device), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Tensor | None = None):
        """tokens (B, T) int64 -> logits (B, T, V), or with targets the loss of every token.

        targets: (B, T) int64, too; losses: (B, T), fp32, nats. cache: (L, 2, B, H, S, D), keys and
        values of S tokens in each of L layers; those of these T (S or 1), the last, are filled in.
        """
        T = tokens.size(1)
        # Positions begin at 0, or after the tokens that are in the cache.
        first = 0
        if cache is not None:
            first = cache.size(4) - T
        x = self.gpt_neox.embed_in(tokens)
        cos = self.cos[first : first + T].to(x.dtype)
        sin = self.sin[first : first + T].to(x.dtype)
        for i, layer in enumerate(self.gpt_neox.layers):
            if cache is not None:
                x = layer(x, cos, sin, cache[i])
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin)
        if targets is None:
            return self.embed_out(self.gpt_neox.final_layer_norm(x))
        losses = self.token_losses(x.flatten(0, 1), targets.flatten())
        # A copy, because FSDP's hooks cannot take a view.
        return losses.view_as(tokens).clone()

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """The last layer's output (N, C) and targets (N,) -> losses (N,)."""
        logits = self.embed_out(self.gpt_neox.final_layer_norm(x))
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def compile_parts(self) -> None:
        """torch.compile what takes the time; all layers share one compilation."""
        # Else dynamo cuts graphs so that DDP can overlap them; here a layer is a graph anyway.
        torch._dynamo.config.optimize_ddp = False
        # Otherwise inductor first compiles torch's headers once for each of the CPU's vector
        # instruction sets, to see whether the compiler can: 10 seconds. A compiler that knows the
        # C++20 of these headers knows AVX-512; if not, everything runs eagerly. AMX and VNNI are
        # tested all the same.
        torch._inductor.config.cpp.vec_isa_ok = True
        # Tell inductor, too, what `start` told torch.
        torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())
        for layer in self.gpt_neox.layers:
            layer.compile(dynamic=False)
        self.token_losses = torch.compile(self.token_losses, dynamic=False)
        self.compiled = True
        self.compiled_for = set()

    def run_eagerly(self) -> None:
        """Undo compile_parts."""
        for layer in self.gpt_neox.layers:
            layer._compiled_call_impl = None
        del self.token_losses  # the compiled one, which hides the method
        self.compiled = False
        self.to_compile = False

    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        temperature: float = 0.0,
        end: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """The ids that follow tokens (1, T) int64, one by one: at most new_tokens.

        It stops before `end`. Each is the likeliest or, if temperature > 0, drawn at random.
        """
        c = self.config
        limit = c.max_position_embeddings
        # Keys and values of the tokens so far, so that each is computed once.
        room = min(limit, tokens.size(1) + new_tokens)
        shape = (c.num_hidden_layers, 2, 1, c.num_attention_heads, room, c.head_dim)
        cache = self.embed_out.weight.new_empty(shape)
        known = 0  # tokens whose keys and values are in the cache
        for _ in range(new_tokens):
            n = tokens.size(1)
            with torch.no_grad():
                if n <= limit:
                    logits = self(tokens[:, known:], cache=cache[..., :n, :])
                    known = n
                else:
                    # The window slides, and every token's position with it: nothing known holds.
                    logits = self(tokens[:, -limit:])
            logits = logits[:, -1].float()  # (1, V)
            if temperature > 0:
                probabilities = torch.softmax(logits / temperature, dim=-1)
                token = torch.multinomial(probabilities, 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            if token.item() == end:
                return
            tokens = torch.cat((tokens, token), dim=1)
            yield token.item()

    @property
    def device(self) -> torch.device:
        return self.embed_out.weight.device

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training on one token (2204.02311, appendix B).

        6 for each weight that multiplies, and 12 L C T for attention, not halved for causality.
        """
        c = self.config
        matrices = self.parameter_count()
        if not c.tie_word_embeddings:
            matrices -= c.vocab_size * c.hidden_size  # a look-up multiplies nothing
        return 6 * matrices + 12 * c.num_hidden_layers * c.hidden_size * seq_len

    def bytes_per_token(self, training: bool, dtype: torch.dtype) -> int:
        """Memory that a token takes in a compiled model, in bytes.

        Measured for training in bf16: 40 C a layer, 2 V, and 16 bytes a parameter add up to between
        2% less and 11% more than pythia-70m, 410m and 1b took on an H200. The rest is estimated.
        """
        c = self.config
        # Of one layer at a time, and of the logits: as computed, in fp32, and as a softmax.
        if not training:
            return 40 * c.hidden_size + 8 * c.vocab_size
        # Every layer keeps what its gradient needs; a checkpointed one keeps only its input.
        layer = 40 * c.hidden_size
        if self.activation_checkpointing:
            layer = 4 * c.hidden_size
        token = layer * c.num_hidden_layers + 2 * c.vocab_size
        return token if dtype == torch.bfloat16 else 2 * token


# ---- load and save ----


def read_config(path: Path) -> Config:
    """The Config in a config.json; InputError if it is another architecture or makes no sense."""
    values = prepare.load_json(path)
    if values.get("model_type") != "gpt_neox":
        found = f"model_type is {values.get('model_type')!r}"
        raise InputError(f"{path}: {found}; this program knows gpt_neox (Pythia)")
    if values.get("hidden_act", "gelu") != "gelu" or values.get("attention_bias", True) is not True:
        raise InputError(f"{path}: only hidden_act gelu and attention_bias true are known")
    # Newer files have the rotary settings in rope_parameters. Any scaling of them, in whatever
    # spelling, would be other arithmetic.
    plain = (None, "default")
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        is_object = isinstance(rope, dict)
        if not is_object or rope.get("rope_type") not in plain or rope.get("type") not in plain:
            raise InputError(f"{path}: {key} is {rope!r}; only plain rotary embeddings are known")
    rope = values.get("rope_parameters") or {}
    newer_names = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    for name, newer in newer_names.items():
        if rope.get(newer) is not None:
            values[name] = rope[newer]
    # Each value by itself: its type and, for a number, a size that a model can have.
    settings = {}
    for field in fields(Config):
        name = field.name
        value = values.get(name, field.default)
        if type(value) is int and field.type is float and abs(value) < 2**53:  # 10000 is 10000.0
            value = float(value)
        is_sound = isinstance(value, field.type)
        if field.type in (int, float):
            most = {int: 2**20, float: 1e9}[field.type]
            is_sound = type(value) is field.type and 0 < value < most
        is_default = type(value) is type(field.default) and value == field.default
        if not is_sound and not is_default:
            expected = getattr(field.type, "__name__", field.type)
            raise InputError(f"{path}: {name} is {value!r}, expected a sensible {expected}")
        settings[name] = value
    # Then all of them together.
    config = Config(**settings)
    R = config.rotary_dims
    if config.num_hidden_layers > 1024 or R * config.max_position_embeddings > 2**27:
        raise InputError(f"{path}: more layers or positions than a model has")
    if config.hidden_size % config.num_attention_heads or R % 2 or not 0 < R <= config.head_dim:
        heads = f"{config.num_attention_heads} heads and rotary_pct {config.rotary_pct}"
        problem = "do not give heads with an even number of rotated dimensions"
        raise InputError(f"{path}: hidden_size {config.hidden_size}, {heads} {problem}")
    return config


@functools.cache
def model_folder(name: str) -> Path:
    """The folder of a model: `name` itself or, from the hub, one in the cache named by commit.

    Raises InputError.
    """
    if Path(name).exists():
        return Path(name)
    files = ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"]
    return prepare.hub_folder(name, files)


def pinned(name: str) -> str:
    """A name on the hub as ORG/NAME@COMMIT, with its revision's commit now; others unchanged."""
    if name.startswith("scratch:") or Path(name).exists():
        return name
    # The cache has it as …/models--ORG--NAME/snapshots/COMMIT.
    folder = model_folder(name)
    repo = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return f"{repo}@{folder.name}"


def weight_files(name: str) -> list[Path]:
    """The one safetensors file of a model, or the shards its index names. Raises InputError."""
    folder = model_folder(name)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        hint = "some revisions of a Pythia have only .bin files, which are not read: take main"
        raise InputError(f"{name}: has no model.safetensors; {hint}")
    # An index comes from outside: it may name nothing but shards in this folder.
    weight_map = prepare.load_json(index).get("weight_map")
    shards = []
    if isinstance(weight_map, dict):
        shards = sorted({str(shard) for shard in weight_map.values()})
    shard_name = r"model-\d{5}-of-\d{5}\.safetensors"
    if not shards or not all(re.fullmatch(shard_name, shard) for shard in shards):
        expected = "files like model-00001-of-00002.safetensors"
        raise InputError(f"{index}: its weight_map must name {expected}")
    for shard in shards:
        if not (folder / shard).is_file():
            raise InputError(f"{name}: {shard}, which its index names, is missing")
    return [folder / shard for shard in shards]


# Buffers in old checkpoints, which are left out: the model computes them itself.
BUFFERS = (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")


def read_tensors(path: Path, shapes: dict[str, list[int]], device, dtype) -> dict:
    """{name: tensor} of a file, which must be of these shapes. Raises InputError."""
    tensors = {}
    with safe_open(path, framework="pt") as file:
        names = file.keys()
    for name in names:
        if name.endswith(BUFFERS):
            continue
        if name not in shapes:
            raise InputError(f"{path}: unknown tensor {name}")
        # Opened anew for each tensor, to free the memory that the last one took.
        with safe_open(path, framework="pt") as file:
            found = list(file.get_slice(name).get_shape())
            if found != shapes[name]:
                expected = f"config.json asks for {shapes[name]}"
                raise InputError(f"{path}: {name} has shape {found}, {expected}")
            tensor = file.get_tensor(name)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise InputError(f"{path}: {name} is {tensor.dtype}, expected a floating-point type")
        tensors[name] = tensor.to(device=device, dtype=dtype)
    return tensors


def read_weights(files: list[Path], model: GPTNeoX, device, dtype: torch.dtype) -> None:
    """Replace a model's parameters by the tensors in these files, which must be just its own."""
    shapes = {name: list(p.shape) for name, p in model.state_dict().items()}
    weights = {}
    for path in files:
        try:
            weights |= read_tensors(path, shapes, device, dtype)
        except SafetensorError as e:
            raise InputError(f"{path}: not a whole safetensors file ({e})") from None
    # If embeddings are tied, a file has only one of them.
    tied = model.config.tie_word_embeddings
    if tied and "gpt_neox.embed_in.weight" in weights:
        weights["embed_out.weight"] = weights["gpt_neox.embed_in.weight"]
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise InputError(f"{files[0]}: lacks {len(missing)} tensors, the first is {missing[0]}")
    model.load_state_dict(weights, assign=True)
    if tied:
        model.embed_out.weight = model.gpt_neox.embed_in.weight
    model.make_rotary()
    model.requires_grad_(True)


def random_model(
    name: str, device: str | torch.device, dtype: torch.dtype, vocab_size: int | None, seed: int
) -> GPTNeoX:
    """A model `scratch:SIZE`; see load."""
    size = name.removeprefix("scratch:")
    if size not in SHAPES:
        raise InputError(f"{name}: unknown size; the sizes are {', '.join(SHAPES)}")
    config = Config(**asdict(SHAPES[size]))
    if vocab_size is not None:
        config.vocab_size = 128 * math.ceil(vocab_size / 128)
    # Drawn on the CPU, so that every device has the same.
    drawn_on = "cpu"
    if str(device) == "meta":
        drawn_on = "meta"
    with torch.random.fork_rng(devices=[]), torch.device(drawn_on):
        torch.manual_seed(seed)
        return GPTNeoX(config).to(device=device, dtype=dtype)


def load(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
    seed: int = 0,
) -> GPTNeoX:
    """A model from a Hugging Face folder, from the hub, or with random weights (`scratch:SIZE`).

    On the hub `pythia-70m` is EleutherAI's; any other is `ORG/NAME` or `ORG/NAME@REVISION`.
    vocab_size and seed are for scratch; the vocabulary is rounded up to a multiple of 128, like
    Pythia's. On device "meta" it has its shape alone, and the weights stay unread. Raises
    InputError where there is no such model, a tensor is unknown, missing or of another shape, or
    memory runs out.
    """
    with enough_memory(f"loading {name}", "take a smaller one"):
        if str(name).startswith("scratch:"):
            return random_model(str(name), device, dtype, vocab_size, seed)
        # A folder, or the hub's: its shape first, which takes no memory, then its weights.
        folder = model_folder(str(name))
        is_run = (folder / "run.json").is_file()
        if is_run and not (folder / "model.safetensors").is_file():
            raise InputError(f"{name}: holds a run that has not ended; --resume goes on with it")
        if not (folder / "config.json").is_file():
            expected = "expected a Hugging Face folder or a name on the hub"
            raise InputError(f"{name}: not a model (no config.json); {expected}")
        with torch.device("meta"):
            model = GPTNeoX(read_config(folder / "config.json"))
        files = weight_files(str(name))
        if str(device) != "meta":
            read_weights(files, model, device, dtype)
        return model


def save(
    model: GPTNeoX,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a folder that transformers loads, model.safetensors last.

    tokenizer: a tokenizer.json to put beside it. weights: those to write, if not the model's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The tokenizer, and what transformers wants to know of it.
    end = 0
    if tokenizer is not None:
        loaded = Tokenizer(tokenizer)
        end = loaded.end_of_text
        prepare.write_text(folder / "tokenizer.json", loaded.json)
        settings = {f"{role}_token": prepare.END_OF_TEXT for role in ("bos", "eos", "unk")}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_max_length"] = model.config.max_position_embeddings
        prepare.write_json(folder / "tokenizer_config.json", settings)
    # The shape, under the names that transformers 4 and 5 both read.
    config = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    config |= asdict(model.config)
    config |= {"hidden_act": "gelu", "attention_bias": True}
    config |= {"bos_token_id": end, "eos_token_id": end}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    prepare.write_json(folder / "config.json", config)
    # The weights come last, for a folder that has them counts as whole.
    weights = weights or model.state_dict()
    weights = {name: p.to(dtype).contiguous() for name, p in weights.items()}
    if model.config.tie_word_embeddings:
        del weights["embed_out.weight"]
    write_safetensors(folder / "model.safetensors", weights)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """save_file, but whole or not at all, and with the mode that the umask gives."""
    with prepare.replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
        # A full disk, for example.
        except SafetensorError as e:
            raise OSError(str(e)) from None
        partial.chmod(mode)


# ---- the device, and the ranks ----


# Dense bf16 FLOP/s of GPUs, by their makers' data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def find_device(name: str | None) -> torch.device:
    """--device as a torch.device that works; None is a GPU if there is one, else the CPU.

    Under torchrun "cuda" is the rank's own. Raises InputError.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, _ = name.partition(":")
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise InputError(f"--device {name}: expected cpu, cuda, cuda:N, mps or xpu")
    if colon and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise InputError(f"--device {name} is one device for all ranks; give --device {kind}")
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: {str(e)[:100]}") from None
    return device


def start(device_name: str | None = None) -> torch.device:
    """What every script begins with: the device and, under torchrun, the process group."""
    device = find_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        # glibc gives large blocks back to the system, which zeroes their pages anew for every step:
        # M_MMAP_MAX (-4) and M_TRIM_THRESHOLD (-1) make it keep them. Other C libraries have none.
        with contextlib.suppress(AttributeError, TypeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)
            mallopt(-1, -1)
        # Otherwise a compiled embedding adds up its gradient in the order in which threads arrive.
        # Not by use_deterministic_algorithms: that imports the compiler, which takes two seconds.
        # compile_parts calls it.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # Long, because the others wait while one rank saves.
        timeout = timedelta(hours=2)
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return device


def finish() -> None:
    """What every script ends with."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # If a thread of gloo frees a tensor while Python shuts down, the process aborts.
        time.sleep(0.1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def add_up(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def on_all_ranks(true: bool, device: torch.device) -> bool:
    """Whether `true` holds on all ranks: that a file is there, say, which some may see later."""
    return add_up(torch.tensor(float(not true), device=device)).item() == 0


def say(*lines: str) -> None:
    """Print on the first rank."""
    if rank() == 0:
        prepare.tell(*lines)


def autocast_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """--dtype as a torch.dtype; None: bf16 where its matrix products are faster than fp32's."""
    if name is not None:
        return getattr(torch, name)
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        fast = found.get("avx512_bf16") or found.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def where_it_runs(device: torch.device, dtype: torch.dtype) -> str:
    """In words, for the header."""
    return f"{device.type} x {world_size()}, {str(dtype).removeprefix('torch.')}"


def autocast(device: torch.device, dtype: torch.dtype):
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def can_compile(device: torch.device, no_compile: bool = False) -> tuple[bool, str]:
    """Whether to try torch.compile here, and why; if that fails, compile_for copes."""
    if no_compile:
        return False, "eager (--no-compile)"
    default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = shutil.which(os.environ.get("CXX") or default)
    if device.type not in ("cpu", "cuda"):
        return False, f"eager (torch.compile is not used on {device.type})"
    if compiler is None:
        return False, f"eager (no C++ compiler found: install {default} for torch.compile)"
    return True, f"torch.compile ({Path(compiler).name} found)"


def broken_libraries(error: Exception) -> set[Path]:
    """Truncated libraries in the compiler's cache, left by a process killed while compiling.

    They are those that the error names, if they lie in the cache (others are not ours to remove),
    and all empty ones: probes of the CPU's instruction sets, which the error need not name.
    """
    broken = set()
    # There may be no cache: perhaps its folder is the very thing that could not be made.
    with contextlib.suppress(OSError):
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        named = re.findall(r"/[^\s:]+\.(?:so|dylib|pyd)\b", str(error))
        broken |= {Path(path) for path in named if Path(path).is_relative_to(cache_dir())}
        found = Path(cache_dir()).rglob("*.so")
        broken |= {path for path in found if path.stat().st_size == 0}
    return broken


def telling_line(error: Exception) -> str:
    """The start of the line that tells most: a compiler's own, for torch's report is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line]
    telling += [line for line in lines if not line.endswith("raised:")] + [repr(error)]
    return telling[0][:160]


def compile_for(
    model: GPTNeoX, rows: int, seq_len: int, dtype: torch.dtype, training: bool
) -> None:
    """Compile the model for batches of this shape, once, by running a batch of zeros.

    Whatever the compiler, its cache or the linker raises, the model still works, eagerly if need
    be; only if it is spread over ranks does that raise InputError.
    """
    shape = (rows, seq_len, training)
    if not (model.to_compile or model.compiled) or shape in model.compiled_for:
        return
    device = model.device
    tokens = torch.zeros(rows, seq_len, dtype=torch.int64, device=device)
    removed = set()
    # Where CUDA's toolkit is installed and there is no GPU, torch would warn of that.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with prepare.notice("compiling (once)"):
        if not model.compiled:
            model.compile_parts()
        while shape not in model.compiled_for:
            try:
                with autocast(device, dtype), torch.set_grad_enabled(training):
                    losses = model(tokens, tokens)
                if training:
                    (losses * torch.ones(rows, 1, device=device)).sum().backward()
                model.compiled_for.add(shape)
            except Exception as e:
                if is_out_of_memory(e):
                    raise
                reason = telling_line(e)
                # What is broken is removed.
                broken = broken_libraries(e) - removed
                for path in broken:
                    path.unlink(missing_ok=True)
                removed |= broken
                # Ranks where it did not fail now wait for this one's share of a layer: it cannot
                # go on alone.
                if is_sharded(model) and world_size() > 1:
                    way_out = "--no-compile does without it"
                    if broken:
                        way_out = "what its cache held half written is gone: try again"
                    raise InputError(f"torch.compile failed: {reason}; {way_out}") from None
                # Try again if something was removed, else go on eagerly.
                if not broken:
                    say(f"warning: torch.compile failed, going on without it: {reason}")
                    model.run_eagerly()
                    break
                torch._dynamo.reset()
                model.compile_parts()
    model.zero_grad(set_to_none=True)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The GPU's dense bf16 FLOP/s by its maker's data sheet; None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def is_sharded(model: GPTNeoX) -> bool:
    """Whether the model is spread over the ranks by FSDP."""
    return hasattr(model, "reshard")


def sequences_at_once(
    model: GPTNeoX, seq_len: int, dtype: torch.dtype, device: torch.device, training: bool
) -> int:
    """How many sequences to take at a time, the same on all ranks.

    On a GPU as many as fit its memory by arithmetic, but with no more than 4 GB, and no more than a
    tenth of the memory, of logits in fp32; elsewhere what takes 300 MB: 32 sequences of tiny.
    """
    if device.type != "cuda":
        bytes_each = seq_len * model.bytes_per_token(False, dtype)
        return max(1, 296 * 2**20 // bytes_each)
    memory = torch.cuda.get_device_properties(device).total_memory
    # Each parameter's fp32 weight and, in training, its gradient and Adam's two moments.
    state = 4 * model.parameter_count()
    if training:
        state *= 4
    if is_sharded(model):
        state //= world_size()
    # A tenth stays free, because the allocator's blocks never fill the memory.
    bytes_each = seq_len * model.bytes_per_token(training, dtype)
    by_memory = (memory * 9 // 10 - state) // bytes_each
    by_logits = min(2**30, memory // 40) // (seq_len * model.config.vocab_size)
    sequences = max(1, min(by_memory, by_logits))
    # GPUs may differ; a batch is cut the same way on all of them.
    if dist.is_initialized():
        least = torch.tensor(sequences, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        sequences = least.item()
    return sequences


def is_out_of_memory(error: Exception) -> bool:
    # torch, the C library, C++, cuBLAS and Python, each in its own words; and oneDNN, whose
    # "primitive descriptor" is another matter.
    words = "out of memory|allocate memory|bad_alloc|ALLOC_FAILED|MemoryError"
    onednn = "could not create a (primitive(?! descriptor)|memory object)"
    return bool(re.search(f"{words}|{onednn}", repr(error)))


@contextlib.contextmanager
def enough_memory(what: str, way_out: str):
    """Turn running out of memory into an InputError that says what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        more = ""
        if asked := re.search(r"allocate ([\d.]+ \w+)", str(e)):
            more = f" (it asked for {asked[1]} more)"
        raise InputError(f"out of memory: {what}{more}; {way_out}") from None


# ---- main ----


def speak(model: GPTNeoX, tokenizer: Tokenizer, prompt: str, args) -> None:
    """Print the prompt and what the model says, as it comes."""
    device = model.device
    generator = torch.Generator(device).manual_seed(args.seed)
    ids = tokenizer.encode(prompt or "\n").tolist()
    if not ids:  # some tokenizers make nothing of white space
        ids = [tokenizer.end_of_text]
    tokens = torch.tensor([ids], device=device)
    said = tokenizer.decode(ids)
    prepare.tell(said, end="")
    end = tokenizer.end_of_text
    for token in model.generate(tokens, args.tokens, args.temperature, end, generator):
        ids.append(token)
        text = tokenizer.decode(ids)
        # The bytes of a character may come one by one.
        if not text.endswith("\ufffd"):
            prepare.tell(text[len(said) :], end="")
            said = text
    prepare.tell(tokenizer.decode(ids)[len(said) :])


def main():
    parser = prepare.ArgumentParser(__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders or names on the hub")
    add("prompt", help="the text to continue")
    add("--tokens", type=int, default=100, help="how many to add")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--seed", type=int, default=0, help="of random choices")
    add("--device", help="default: cuda where there is one, else cpu")
    args = parser.parse_args()
    device = find_device(args.device)
    if re.search("[\ud800-\udfff]", args.prompt):
        raise InputError("the prompt is not UTF-8; LANG=C.UTF-8 may help, or other characters")
    # What is wrong with any of them is said before the first speaks.
    prepare.check_range(args, ("tokens",), 0)
    prepare.check_range(args, ("seed",), 0, 2**63 - 1)
    if args.temperature != 0:
        prepare.check_range(args, ("temperature",), 0.001, 100)
    tokenizers = {}
    for name in args.models:
        if name.startswith("scratch:"):
            raise InputError(f"{name}: random weights have no tokenizer; name a trained model")
        size = load(name, "meta").config.vocab_size
        tokenizers[name] = Tokenizer(name)
        if tokenizers[name].vocab_size > size:
            sizes = f"its tokenizer has {tokenizers[name].vocab_size:,} tokens, it knows {size:,}"
            raise InputError(f"{name}: {sizes}; put the tokenizer.json there that belongs to it")
    for name in args.models:
        with prepare.notice(f"loading {name}", shown=sys.stderr.isatty()):
            model = load(name, device)
        if len(args.models) > 1:
            prepare.tell(f"---- {name}")
        speak(model, tokenizers[name], args.prompt, args)


if __name__ == "__main__":
    prepare.cli(main)
