"""GPT-NeoX, the architecture of Pythia, written out; Pythia's safetensors in, a Hugging Face folder out.

    python model.py out/mix "def main("             # what a model says
    python model.py pythia-70m "The capital of" --temperature 0.8

Modules carry the names that the files on disk use, so there is no table of keys to maintain.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from prepare import END_OF_TEXT, ArgumentParser, InputError, Tokenizer, cli, hub_folder


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path):
    """A file, or folder, to write that is `path` when the block ends well, and then on the disk; what was there stays
    until then, whatever happens. Raises InputError where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: cannot be written ({getattr(e, 'strerror', e)}); nothing older is lost") from None
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def load_json(path: Path) -> dict:
    """The JSON object in a file; anything else is an InputError."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(path.read_bytes()), dict):
            return value
    raise InputError(f"{path}: not a JSON object; it is damaged, or not what it should be")


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


def shape(layers: int, hidden: int, heads: int, vocab_size: int = 50304, context: int = 2048) -> Config:
    return Config(vocab_size, hidden, layers, heads, 4 * hidden, context)


SHAPES = {
    "tiny": shape(4, 128, 4, 4096, 256),
    "pythia-14m": shape(6, 128, 4), "pythia-31m": shape(6, 256, 8),
    "pythia-70m": shape(6, 512, 8), "pythia-160m": shape(12, 768, 12),
    "pythia-410m": shape(24, 1024, 16), "pythia-1b": shape(16, 2048, 8),
    "pythia-1.4b": shape(24, 2048, 16), "pythia-2.8b": shape(32, 2560, 32),
    "pythia-6.9b": shape(32, 4096, 32, 50432), "pythia-12b": shape(36, 5120, 40, 50688),
}


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (2104.09864) of the first R of D dimensions; x (B, H, T, D), cos and sin (T, R)."""
    R = cos.size(-1)
    rotated, rest = x[..., :R], x[..., R:]
    a, b = rotated.chunk(2, dim=-1)  # a pair is (i, i + R/2)
    return torch.cat((rotated * cos + torch.cat((-b, a), dim=-1) * sin, rest), dim=-1)


def attend(q, k, v):
    """Causal attention of the last T of S tokens; q and the result (B, H, T, D), k and v (B, H, S, D).

    On a CPU, blocks of queries in operations that torch.compile fuses are faster than SDPA's kernel: forward and
    backward of bf16 (16, 4, 256, 32) take 6.7 ms on two cores, not 21.4; a step of pythia-70m on one sequence of 2048
    1.21 s, not 1.46. They keep the half of a sequence's H T^2 probabilities that is not zero for the backward pass.
    On a GPU the choice of kernel is SDPA's own; none has been measured yet (python -m tests.bench does).
    """
    T, S = q.size(2), k.size(2)
    if not (q.device.type == "cpu" and torch.compiler.is_compiling() and T == S):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T == S)
    size, out = max(128, T // 8), []
    for i in range(0, T, size):
        n = min(i + size, T)
        later = torch.arange(n) > torch.arange(i, n)[:, None]
        scores = (q[:, :, i:n] @ k[:, :, :n].transpose(-2, -1)).float() * q.size(-1) ** -0.5
        scores = scores.masked_fill(later, -math.inf)
        p = (scores - scores.amax(-1, keepdim=True).detach()).exp().to(v.dtype)
        out.append((p @ v[:, :, :n] / p.float().sum(-1, keepdim=True)).to(v.dtype))
    return torch.cat(out, 2)


class Linear(nn.Linear):
    def forward(self, x):
        y = F.linear(x, self.weight)  # the bias apart, so that torch.compile fuses it with what follows
        return y + self.bias.to(y.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        qkv = self.query_key_value(x).view(B, T, self.heads, -1).transpose(1, 2)  # fused per head: (B, H, T, 3D)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:  # (2, B, H, S, D): keys and values of all S tokens so far, these T being the last
            cache[0, :, :, -T:], cache[1, :, :, -T:] = k, v
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
        if self.parallel:  # both branches read x
            return x + attended + self.mlp(self.post_attention_layernorm(x))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class GPTNeoX(nn.Module):
    """GPT-NeoX (2204.06745). Weights are drawn on construction; `load` replaces them by a model's own."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # of activations: keep only what enters a layer, compute the rest again
        self.logits_at_once = 2**30  # 4 GB in fp32; more are computed in parts, and again for the gradient
        self.gpt_neox = nn.ModuleDict({
            "embed_in": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            "final_layer_norm": nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
        })
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.embed_out.weight = self.gpt_neox.embed_in.weight
        self.make_rotary()
        small = math.sqrt(2 / (5 * config.hidden_size))  # as Pythia: 1910.05895, and for what a branch adds 2204.06745
        wang = 2 / (config.num_hidden_layers * math.sqrt(config.hidden_size))
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=wang if name.endswith(("attention.dense.weight", "4h_to_h.weight")) else small)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def make_rotary(self) -> None:
        """Fill the (T, R) tables of cosines and sines, fp32, computed on the CPU so that every device has the same."""
        R, T, device = self.config.rotary_dims, self.config.max_position_embeddings, self.embed_out.weight.device
        with torch.device("cpu"):
            frequency = self.config.rotary_emb_base ** (-torch.arange(0, R, 2, dtype=torch.float32) / R)
            angle = torch.outer(torch.arange(T, dtype=torch.float32), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos().to(device), persistent=False)
        self.register_buffer("sin", angle.sin().to(device), persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None,
                cache: torch.Tensor | None = None) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V); with targets, likewise, -> every token's loss (B, T), fp32, nats.

        cache: (L, 2, B, H, S, D), the keys and values of S tokens, of which these T are the last; theirs are filled in.
        """
        T, layers = tokens.size(1), self.gpt_neox.layers
        first = 0 if cache is None else cache.size(4) - T
        x = self.gpt_neox.embed_in(tokens)
        cos, sin = self.cos[first:first + T].to(x.dtype), self.sin[first:first + T].to(x.dtype)
        for i, layer in enumerate(layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, None if cache is None else cache[i])
        if targets is None:
            return self.embed_out(self.gpt_neox.final_layer_norm(x))
        x, targets = x.flatten(0, 1), targets.flatten()
        parts = 1 << ((targets.numel() * self.config.vocab_size - 1) // self.logits_at_once).bit_length()
        if parts == 1:
            losses = self.token_losses(x, targets)
        else:
            losses = torch.cat([checkpoint(self.token_losses, *part, use_reentrant=False, preserve_rng_state=False)
                                for part in zip(x.chunk(parts), targets.chunk(parts))])
        return losses.view_as(tokens).clone()  # FSDP's hooks want no view

    def token_losses(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The last layer's output (N, C) and targets (N,) -> losses (N,)."""
        logits = self.embed_out(self.gpt_neox.final_layer_norm(x))
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def compile_parts(self) -> None:
        """torch.compile what takes the time; all layers share one compilation."""
        torch._dynamo.config.optimize_ddp = False  # which cuts graphs so that DDP can overlap them: a layer is a cut
        for layer in self.gpt_neox.layers:
            layer.compile(dynamic=False)
        self.token_losses = torch.compile(self.token_losses, dynamic=False)

    @torch.compiler.set_stance("force_eager")  # every token makes another shape
    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, new_tokens: int, temperature: float = 0.0, end: int | None = None,
                 generator: torch.Generator | None = None) -> torch.Tensor:
        """Continue tokens (1, T) by up to new_tokens: greedily, or sampled if temperature > 0; stops before `end`."""
        c, limit, known = self.config, self.config.max_position_embeddings, 0
        room = (c.num_hidden_layers, 2, 1, c.num_attention_heads, min(limit, tokens.size(1) + new_tokens), c.head_dim)
        cache = self.embed_out.weight.new_empty(room)
        for _ in range(new_tokens):
            if (n := tokens.size(1)) <= limit:
                logits, known = self(tokens[:, known:], cache=cache[..., :n, :]), n
            else:  # the window slides, and every token's position with it
                logits = self(tokens[:, -limit:])
            logits = logits[:, -1].float()  # (1, V)
            if temperature > 0:
                token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            if token.item() == end:
                break
            tokens = torch.cat((tokens, token), dim=1)
        return tokens


def read_config(path: Path) -> Config:
    """The Config in a config.json; InputError if it is of another architecture or does not make sense."""
    values = load_json(path)
    if values.get("model_type") != "gpt_neox":
        raise InputError(f"{path}: model_type is {values.get('model_type')!r}; this program knows gpt_neox (Pythia)")
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or values.get("rope_scaling"):
        raise InputError(f"{path}: only plain rotary embeddings are known, not {rope or values['rope_scaling']}")
    if values.get("hidden_act", "gelu") != "gelu" or values.get("attention_bias", True) is not True:
        raise InputError(f"{path}: only hidden_act gelu and attention_bias true are known")
    known = {"rotary_pct": rope.get("partial_rotary_factor"), "rotary_emb_base": rope.get("rope_theta")}
    settings = {}
    for name, field in Config.__dataclass_fields__.items():
        value = known.get(name)
        value = values.get(name, field.default) if value is None else value
        high = {bool: 2, int: 2**20, float: 1e9}[field.type]
        whole = type(value) is int and field.type is float  # 10000 will do for 10000.0
        if not (whole or type(value) is field.type) or not (0 < value < high or value is False):
            raise InputError(f"{path}: {name} is {value!r}, expected a sensible {field.type.__name__}")
        settings[name] = field.type(value)
    config = Config(**settings)
    R = config.rotary_dims
    if config.num_hidden_layers > 1024 or R * config.max_position_embeddings > 2**27:
        raise InputError(f"{path}: {config.num_hidden_layers} layers or {config.max_position_embeddings} positions: "
                         "more than a model has")
    if config.hidden_size % config.num_attention_heads or R % 2 or not 0 < R <= config.head_dim:
        raise InputError(f"{path}: hidden_size {config.hidden_size}, {config.num_attention_heads} heads and rotary_pct "
                         f"{config.rotary_pct} do not give heads with an even number of rotated dimensions")
    return config


def verify(path: Path) -> None:
    """Check a file of the hub's cache, where it is a link to one that is named by the sha256 of its content or, if it
    is small, by git's hash. Raises InputError."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        header = b"" if len(blob.name) == 64 else b"blob %d\0" % blob.stat().st_size
        with open(blob, "rb") as file:
            found = hashlib.file_digest(file, lambda: (hashlib.sha1 if header else hashlib.sha256)(header)).hexdigest()
        if found != blob.name:
            raise InputError(f"{path}: damaged, its hash is not its name; remove {blob}, and it is fetched again")


@functools.cache
def model_folder(name: str) -> Path:
    """The folder of a model: `name` itself or, of the hub, one in the cache, named by the commit. Raises InputError."""
    if Path(name).exists():
        return Path(name)
    folder = hub_folder(name, ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"])
    for path in folder.glob("*.json"):
        verify(path)
    return folder


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a model: the one file, or the shards that its index names. Raises InputError."""
    folder = model_folder(name)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{name}: has no model.safetensors{elsewhere(name)}")
    weight_map = load_json(index).get("weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not shards or not all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", shard) for shard in shards):
        raise InputError(f"{index}: its weight_map must name files like model-00001-of-00002.safetensors")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise InputError(f"{name}: {missing[0]}, which its index names, is missing")
    return [folder / shard for shard in shards]


def elsewhere(name: str) -> str:
    """Where on the hub a model has safetensors, if this revision has none; .bin files can hold code and stay unread."""
    repo = name.partition("@")[0] if "/" in name else f"EleutherAI/{name.partition('@')[0]}"
    with contextlib.suppress(Exception):  # of several libraries, where the hub cannot be asked
        from huggingface_hub import file_exists
        files = [] if Path(name).exists() else ["model.safetensors", "model.safetensors.index.json"]
        if any(file_exists(repo, file) for file in files):
            return f" in this revision; {repo}@main has it, which for a Pythia is step143000"
    return ""


def read_weights(files: list[Path], model: GPTNeoX, device, dtype: torch.dtype) -> None:
    """Replace a model's parameters by the tensors of these files, which must be just the model's own."""
    expected = {name: list(p.shape) for name, p in model.state_dict(keep_vars=True).items()}
    tied = model.config.tie_word_embeddings
    weights = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for name in names:
                if name.endswith((".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")):
                    continue  # buffers of old checkpoints
                if name not in expected:
                    raise InputError(f"{path}: unknown tensor {name}")
                with safe_open(path, framework="pt") as file:  # anew, to let go of the memory that the last one took
                    found = list(file.get_slice(name).get_shape())
                    if found != expected[name]:
                        raise InputError(f"{path}: {name} has shape {found}, config.json asks for {expected[name]}")
                    tensor = file.get_tensor(name)
                    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                        raise InputError(f"{path}: {name} is {tensor.dtype}, expected float16, bfloat16 or float32")
                    weights[name] = tensor.to(device=device, dtype=dtype)
        except SafetensorError as e:
            raise InputError(f"{path}: not a whole safetensors file ({e})") from None
    if tied:
        weights["embed_out.weight"] = weights.get("gpt_neox.embed_in.weight")
    missing = [name for name in expected if weights.get(name) is None]
    if missing:
        raise InputError(f"{files[0]}: {len(missing)} tensors are missing, the first is {missing[0]}")
    model.load_state_dict(weights, assign=True)
    if tied:
        model.embed_out.weight = model.gpt_neox.embed_in.weight
    model.make_rotary()
    model.requires_grad_(True)


def load(name: str | Path, device="cpu", dtype: torch.dtype = torch.float32, vocab_size: int | None = None,
         seed: int = 0) -> GPTNeoX:
    """A model from a Hugging Face folder, from the hub (`pythia-70m`, `ORG/NAME@REVISION`), or random (`scratch:SIZE`).

    vocab_size and seed are for scratch; the vocabulary is rounded up to a multiple of 128, like Pythia's. On device
    "meta" it has its shape alone, and the weights stay unread. Raises InputError where there is no such model, or a
    tensor is unknown, missing or of another shape.
    """
    if str(name).startswith("scratch:"):
        size = str(name)[len("scratch:"):]
        if size not in SHAPES:
            raise InputError(f"{name}: unknown size; the sizes are {', '.join(SHAPES)}")
        config = Config(**asdict(SHAPES[size]))
        if vocab_size is not None:
            config.vocab_size = -(-vocab_size // 128) * 128
        with torch.random.fork_rng(devices=[]), torch.device("meta" if str(device) == "meta" else "cpu"):
            torch.manual_seed(seed)
            return GPTNeoX(config).to(device=device, dtype=dtype)
    config = model_folder(str(name)) / "config.json"
    if not config.is_file():
        raise InputError(f"{name}: not a model (no config.json); expected a Hugging Face folder or a name on the hub")
    with torch.device("meta"):
        model = GPTNeoX(read_config(config))
    if str(device) == "meta":
        return model
    files = weight_files(str(name))
    with ThreadPoolExecutor(1) as pool:
        checks = pool.map(verify, files)  # meanwhile
        try:
            read_weights(files, model, device, dtype)
        finally:
            list(checks)  # raises what they found
    return model


def save(model: GPTNeoX, folder: str | Path, tokenizer: str | Path | None = None,
         dtype: torch.dtype = torch.float32, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a folder that transformers loads, model.safetensors last. tokenizer: a tokenizer.json to put beside it.
    weights: those to write, if not the model's own."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    end = 0
    if tokenizer is not None:
        loaded = Tokenizer(tokenizer)
        end = loaded.end_of_text
        write_text(folder / "tokenizer.json", loaded.json)
        special = {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk")}
        write_text(folder / "tokenizer_config.json", json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.max_position_embeddings,
             **special}, indent=1) + "\n")
    config = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", **asdict(model.config),
              "hidden_act": "gelu", "attention_bias": True, "bos_token_id": end, "eos_token_id": end,
              "torch_dtype": str(dtype).removeprefix("torch.")}
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    weights = {name: p.to(dtype).contiguous() for name, p in (weights or model.state_dict()).items()}
    if model.config.tie_word_embeddings:
        del weights["embed_out.weight"]
    write_safetensors(folder / "model.safetensors", weights)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """save_file, but whole or not at all, and with the mode that the umask gives."""
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(mode)


def find_device(name: str | None) -> torch.device:
    """--device as a torch.device that works; None is a GPU if there is one, under torchrun the rank's own."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: {str(e)[:100]}") from None
    return device


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("model", help="a folder or a name on the hub")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=100, help="how many to add (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    args = parser.parse_args()
    device = find_device(args.device)
    model, tokenizer = load(args.model, device), Tokenizer(args.model)
    generator = torch.Generator(device).manual_seed(args.seed)
    tokens = torch.from_numpy(tokenizer.encode(args.prompt or "\n").astype("int64"))[None].to(device)
    tokens = model.generate(tokens, args.tokens, args.temperature, tokenizer.end_of_text, generator)
    print(tokenizer.decode(tokens[0].tolist()))


if __name__ == "__main__":
    cli(main)
