"""How well models predict each domain: a table of losses, with intervals, the first model being the baseline.

    python eval.py out/base out/mix --data data/sample
    torchrun --nproc_per_node=8 eval.py pythia-1b out/horizon --data data/pile --json losses.json

Every window of a split is scored once. Differences are paired and their intervals resample documents, not windows.
"""
import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model import GPTNeoX, find_device, load, model_folder, write_text
from prepare import CHUNK, SAMPLE, SPLITS, ArgumentParser, Data, InputError, cli

PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
        "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12}  # dense bf16 FLOP/s, by GPU; the first name that fits counts
FEW_DOCUMENTS = 10  # an interval from fewer says little; such a domain is marked
asked = []  # signals that ask this process to stop, and when each came


def start(device: str | None = None) -> torch.device:
    """The device to run on (None: a GPU if there is one); under torchrun also joins the process group."""
    device = find_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        with contextlib.suppress(AttributeError, TypeError):  # glibc: keep freed memory; its pages else are zeroed anew
            malloc = ctypes.CDLL(None).mallopt
            malloc(-4, 0), malloc(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
        # else a compiled embedding adds up its gradient in the order in which threads arrive
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=own, timeout=timedelta(hours=2))  # others wait while one saves
    return device


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # a thread of gloo that lets go of a tensor while Python shuts down aborts the process


class Stopped(Exception):
    """A signal asked for the end, and the work is saved; the message says how far it came."""


def note(number: int, frame) -> None:
    """Handle a signal; by os.write, for it may have interrupted a print."""
    if asked and time.monotonic() > asked[0][1] + 1:
        os._exit(128 + number)
    asked.append((number, time.monotonic()))
    if rank_and_world()[0] == 0 and len(asked) == 1:
        os.write(2, b"\nstopping when this step, or evaluation, is done; another signal stops at once\n")


@contextlib.contextmanager
def stoppable():
    """In this block the first SIGINT or SIGTERM is only noted: train ends its step, saves and raises Stopped, on which
    the process ends with status 128 + the signal and the command that goes on. A second one ends it at once, if it
    comes more than a second later: schedulers send theirs to torchrun and to its workers, which get it from both."""
    asked.clear()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Stopped as e:
        number = asked[0][0] if asked else signal.SIGTERM  # which came to another rank
        ranks = os.environ.get("LOCAL_WORLD_SIZE")
        start = ["torchrun", f"--nproc_per_node={ranks}"] if ranks else ["python"]
        options = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        if rank_and_world()[0] == 0:
            print(f"\n{e}; go on with: {shlex.join([*start, sys.argv[0], *options, '--resume'])}", file=sys.stderr)
        finish()
        sys.exit(128 + number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shard(model: GPTNeoX, dtype: torch.dtype, device: torch.device) -> None:
    """Spread a model over the ranks by FSDP2, in place: each keeps its share of every parameter and of what belongs to
    it, in fp32. A layer's parameters are gathered in dtype when it runs; gradients are added up in fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if not dist.is_initialized():
        raise InputError("--fsdp needs torchrun: torchrun --nproc_per_node=GPUS train.py --fsdp …")
    how = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
           "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    for layer in model.gpt_neox.layers:
        fully_shard(layer, **how)
    fully_shard(model, reshard_after_forward=False, **how)
    model.to_empty(device=device)
    model.make_rotary()


def is_sharded(model: GPTNeoX) -> bool:
    return hasattr(model, "reshard")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over the ranks, in one piece (every rank must ask); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def assign(target: torch.Tensor, source: torch.Tensor | None) -> None:
    """Copy source into target; where that is spread over the ranks, the first one's source, each its share."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        source = torch.empty(target.shape) if source is None else source
        source = distribute_tensor(source.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(source)


def fill(model: GPTNeoX, name: str | Path, **scratch) -> None:
    """Copy the weights of a model into another of the same shape, which stays the module that it is, compiled or not.
    Under FSDP only the first rank reads them."""
    weights = load(name, **scratch).state_dict() if rank_and_world()[0] == 0 or not is_sharded(model) else {}
    for key, target in model.state_dict().items():
        assign(target, weights[key] if weights else None)


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors to save, whole and on the first rank's CPU; every rank must ask. Raises InputError for one not finite."""
    pieces = ((name, whole(tensor)) for name, tensor in tensors.items())
    pieces = {name: piece.cpu() for name, piece in pieces if rank_and_world()[0] == 0}
    for name, piece in pieces.items():
        if not piece.isfinite().all():
            raise InputError(f"{name} is not finite and not saved; what was saved before is as it was; lower --lr")
    return pieces


@contextlib.contextmanager
def enough_memory(what: str, way_out: str):
    """Make an InputError, with what to try, of running out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not re.search("out of memory|allocate memory|bad_alloc|ALLOC_FAILED|MemoryError", repr(e)):
            raise
        asked = re.search(r"allocate ([\d.]+ \w+)", str(e))
        asked = f" (it asked for {asked[1]} more)" if asked else ""
        raise InputError(f"out of memory: {what}{asked}; {way_out}") from None


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 here."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def autocast_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """--dtype as a torch.dtype; None: bf16 where the hardware has it."""
    return getattr(torch, name or ("bfloat16" if has_bf16(device) else "float32"))


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()


def can_compile(device: torch.device) -> tuple[bool, str]:
    """Whether torch.compile works here, and why."""
    compiler = shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    if device.type not in ("cpu", "cuda"):
        return False, f"eager (torch.compile is not used on {device.type})"
    if compiler is None:
        return False, "eager (no C++ compiler found: install g++ for torch.compile)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return False, "eager (no Python.h found: install Python's headers for torch.compile)"
    if device.type == "cuda" and (importlib.util.find_spec("triton") is None
                                  or torch.cuda.get_device_capability(device) < (7, 0)):
        return False, "eager (no triton for this GPU)"
    return True, f"torch.compile ({'triton' if device.type == 'cuda' else compiler} found; --no-compile for eager)"


def pinned(name: str) -> str:
    """A name on the hub as ORG/NAME@COMMIT, the commit that its revision is now; a folder or scratch:SIZE as it is."""
    if name.startswith("scratch:") or Path(name).exists():
        return name
    folder = model_folder(name)  # …/models--ORG--NAME/snapshots/COMMIT
    return f"{folder.parents[1].name.removeprefix('models--').replace('--', '/')}@{folder.name}"


def say(*lines: str) -> None:
    """Print on the first rank."""
    if rank_and_world()[0] == 0:
        print(*lines, sep="\n", flush=True)


def window_count(data: Data, domain: str, split: str, seq_len: int) -> int:
    """How many windows of seq_len inputs, each with its target, the split holds; InputError if not one."""
    tokens = data.size(domain, split)["tokens"]
    if seq_len < 1 or tokens <= seq_len:
        raise InputError(f"--seq-len {seq_len}: too long for {domain}'s {split} split, which has {tokens:,} tokens")
    return (tokens - 1) // seq_len


def windows_of(data: Data, domain: str, split: str, seq_len: int, limit: int | None = None) -> np.ndarray:
    """The windows that stand for a split, by number: all, or `limit` of them, evenly spaced."""
    count = window_count(data, domain, split, seq_len)
    n = min(count, limit or count)
    return np.arange(n) * count // n


def check_fit(model: GPTNeoX, data: Data, seq_len: int) -> None:
    if seq_len > model.config.max_position_embeddings:
        raise InputError(f"--seq-len {seq_len}: the model reads at most {model.config.max_position_embeddings} tokens")
    if data.vocab_size > model.config.vocab_size:
        raise InputError(f"{data.folder}: its tokenizer has {data.vocab_size:,} tokens, the model only "
                         f"{model.config.vocab_size:,}; prepare the data with the model's tokenizer")


def check_data(data: Data, everything: bool = False) -> None:
    """Compare the data with the hashes in meta.json: the tokenizer, and 16 random CHUNKs of the bins or all of them.
    Raises InputError where they differ."""
    from tqdm import tqdm
    files = {f"{name}.bin": file for name, file in data.meta["files"].items()}
    parts = [(name, slice(None), file["sha256"]) for name, file in files.items()]
    if not everything:
        parts = [(name, slice(i * CHUNK, (i + 1) * CHUNK), start)
                 for name, file in files.items() for i, start in enumerate(file.get("chunks", []))]
        parts = random.SystemRandom().sample(parts, min(16, len(parts)))
    parts.append(("tokenizer.json", slice(None), data.meta["tokenizer"]["sha256"]))
    for name, part, known in tqdm(parts, "check data", disable=None, leave=False):
        path = data.folder / name
        content = np.memmap(path, np.uint8, "r")[part] if path.stat().st_size else b""
        if hashlib.sha256(content).hexdigest()[:len(known)] != known:
            raise InputError(f"{path}: damaged, its hash is not the one in meta.json; prepare it again")


def check_tokenizer(model: str, data: Data) -> None:
    """Warn where a model comes with another tokenizer than the data was made with."""
    path = Path() if model.startswith("scratch:") else model_folder(model) / "tokenizer.json"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != data.meta["tokenizer"].get("sha256"):
        say(f"warning: {path} is not the tokenizer of {data.folder}; the losses may mean nothing")


def rows_at_once(model: GPTNeoX, seq_len: int, device: torch.device) -> int:
    """How many sequences have logits that fit, in fp32, into a tenth of a GPU's memory and 4 GB; 128 MB elsewhere."""
    logits = min(2**30, torch.cuda.get_device_properties(device).total_memory // 40) if device.type == "cuda" else 2**25
    return max(1, logits // (seq_len * model.config.vocab_size))


def rows_in_training(model: GPTNeoX, seq_len: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many sequences a step takes at a time: no more than evaluation, and on a GPU no more than 90% of its memory
    hold: 18 bytes a parameter and, for a token, 40 d bytes a layer (4 d with activation checkpointing) and 6 V for the
    logits, which is what autocast to bf16 keeps; without it twice as much."""
    rows, c, world = rows_at_once(model, seq_len, device), model.config, rank_and_world()[1]
    if device.type != "cuda":
        return rows
    state = 18 * sum(p.numel() for p in model.parameters()) // (world if is_sharded(model) else 1)
    token = (4 if model.checkpointing else 40) * c.hidden_size * c.num_hidden_layers + 6 * c.vocab_size
    token *= 1 if dtype == torch.bfloat16 else 2
    fit = (torch.cuda.get_device_properties(device).total_memory * 9 // 10 - state) // (seq_len * token)
    if world > 1:  # as many on every rank
        least = torch.tensor(fit, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        fit = least.item()
    return max(1, min(rows, fit))


def flops_per_token(model: GPTNeoX, seq_len: int) -> int:
    """Floating-point operations of training on one token: 6 for each weight that multiplies, and 12 L d T for
    attention, not halved for its causality (2204.02311, appendix B)."""
    c = model.config
    matrices = sum(p.numel() for p in model.parameters())
    if not c.tie_word_embeddings:
        matrices -= c.vocab_size * c.hidden_size  # a look-up multiplies nothing
    return 6 * matrices + 12 * c.num_hidden_layers * c.hidden_size * seq_len


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The GPU's dense bf16 FLOP/s by its maker's data sheet; 0 where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == torch.bfloat16 else ""
    return next((peak for known, peak in PEAK.items() if known in name), 0.0)


@torch.no_grad()
def evaluate(model: GPTNeoX, data: Data, split: str, seq_len: int, dtype: torch.dtype = torch.float32,
             limit: int | None = None) -> dict[str, np.ndarray]:
    """Mean loss of every sequence (window of seq_len) of every domain's split: {domain: (n,) float64}, nats per token.

    limit: of each domain at most so many sequences, evenly spaced (windows_of). Under torchrun the ranks share the work
    and return the same. Touches no random state. Raises InputError where a split is shorter than one sequence.
    """
    from tqdm import tqdm
    check_fit(model, data, seq_len)
    rank, world = rank_and_world()
    device = next(model.parameters()).device
    taken = {d: windows_of(data, d, split, seq_len, limit) for d in data.domains}
    windows = [(data.tokens(d, split), c) for d in data.domains for c in taken[d]]
    B = rows_at_once(model, seq_len, device)
    losses = torch.zeros(len(windows), dtype=torch.float64)
    batches = range(rank * B, len(windows) + rank * B, world * B)  # as many on every rank; the last ones can be empty
    with (torch.inference_mode(not is_sharded(model)), autocast(device, dtype),
          enough_memory(f"evaluating {B} sequences of {seq_len} tokens", "try a shorter --seq-len or a smaller model")):
        for i in tqdm(batches, desc=f"evaluate {split}", unit="batch", disable=rank > 0 or None, leave=False):
            rows = [tokens[c * seq_len:(c + 1) * seq_len + 1] for tokens, c in windows[i:i + B]]
            batch = np.zeros((B, seq_len + 1), dtype=np.int64)  # always B rows, so that a compiled model sees one shape
            batch[:len(rows)] = rows or batch[:0]
            batch = torch.from_numpy(batch).to(device)
            losses[i:i + len(rows)] = model(batch[:, :-1], batch[:, 1:]).mean(1)[:len(rows)].cpu()
    if is_sharded(model):
        model.reshard()
    if world > 1:
        losses = losses.to(device)
        dist.all_reduce(losses)
    ends = np.cumsum([*map(len, taken.values())])
    losses = dict(zip(data.domains, np.split(losses.cpu().numpy(), ends[:-1])))
    for d, values in losses.items():
        if not np.isfinite(values).all():
            raise InputError(f"{d}'s {split} split: the model's loss on sequence {np.isfinite(values).argmin()} is not "
                             "finite; its weights are damaged, or too large for --dtype")
    return losses


def mean_loss(losses: dict[str, np.ndarray]) -> float:
    """The mean over domains of each one's mean loss: every domain counts the same, however long."""
    return float(np.mean([values.mean() for values in losses.values()]))


def documents_of(data: Data, domain: str, split: str, seq_len: int, n: int) -> np.ndarray:
    """For each of n windows (windows_of), the number of the document that it begins in: (n,) int64."""
    ends = np.flatnonzero(data.tokens(domain, split) == data.meta["tokenizer"]["end_of_text"])
    return np.searchsorted(ends, windows_of(data, domain, split, seq_len, n) * seq_len)


def bootstrap(differences: np.ndarray, documents: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of (n,) per-sequence values over resampled documents, each taken with all its sequences: (resamples,)."""
    _, index = np.unique(documents, return_inverse=True)
    total, size = np.bincount(index, weights=differences), np.bincount(index)
    D, rng = len(size), np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(0, resamples, 100):  # a (100, D) table at a time
        draws = rng.multinomial(D, np.full(D, 1 / D), size=min(100, resamples - i))
        means[i:i + 100] = (draws @ total) / (draws @ size)
    return means


def interval(means: np.ndarray) -> list[float]:
    return [float(x) for x in np.quantile(means, (0.025, 0.975))]


def compare(base: dict[str, np.ndarray], other: dict[str, np.ndarray], data: Data, split: str, seq_len: int) -> dict:
    """other - base in nats per token: {domain or "mean": {"change", "interval"}, "improved": domains, "worst"}."""
    rows, resampled = {}, []
    for k, d in enumerate(base):
        difference = other[d] - base[d]
        means = bootstrap(difference, documents_of(data, d, split, seq_len, len(difference)), seed=k)
        rows[d] = {"change": float(difference.mean()), "interval": interval(means)}
        resampled.append(means)
    changes = [row["change"] for row in rows.values()]
    return {**rows, "mean": {"change": float(np.mean(changes)), "interval": interval(np.mean(resampled, axis=0))},
            "improved": sum(c < 0 for c in changes), "worst": max(changes)}


def results(losses: dict[str, dict[str, np.ndarray]], data: Data, split: str, seq_len: int) -> dict:
    """All that the table shows. losses: {model: what evaluate returned}; the first model is the baseline."""
    base = next(iter(losses.values()))
    out = {"data": str(data.folder), "split": split, "seq_len": seq_len, "domains": {}, "models": {}}
    for d in base:
        documents = len(np.unique(documents_of(data, d, split, seq_len, len(base[d]))))
        out["domains"][d] = {"sequences": len(base[d]), "documents": documents}
    for name, by_domain in losses.items():
        nats = {d: float(values.mean()) for d, values in by_domain.items()}
        bits = {d: nats[d] / math.log(2) * data.size(d, split)["tokens"] / data.size(d, split)["bytes"] for d in nats}
        out["models"][name] = {"nats": nats | {"mean": float(np.mean(list(nats.values())))},
                               "bits_per_byte": bits | {"mean": float(np.mean(list(bits.values())))}}
        if by_domain is not base:
            out["models"][name]["difference"] = compare(base, by_domain, data, split, seq_len)
    return out


def signed(row: dict) -> str:
    low, high = row["interval"]
    return f"{row['change']:+.4f} [{low:+.4f}, {high:+.4f}]"


def table(result: dict) -> str:
    """The results as text: domains down, models across."""
    models, base = result["models"], next(iter(result["models"]))
    few = [d for d, n in result["domains"].items() if n["documents"] < FEW_DOCUMENTS]
    width = max(map(len, [*result["domains"], "domains better"])) + 2
    top = " " * (width + 21) + "".join(f"  {name[-18:]:>18}" + " " * 28 * (name != base) for name in models)
    head = f"{'domain':<{width}}{'sequences':>10} {'documents':>10}"
    for name in models:
        head += f"  {'nats':>7}{'bits/byte':>11}" + f"  {'change in nats [95%]':<26}" * (name != base)
    lines = [top.rstrip(), head.rstrip()]
    for d in [*result["domains"], "mean"]:
        n = result["domains"].get(d)
        line = f"{d + '*' * (d in few):<{width}}" + (f"{n['sequences']:>10,} {n['documents']:>10,}" if n else " " * 21)
        for m in models.values():
            line += f"  {m['nats'][d]:>7.4f}{m['bits_per_byte'][d]:>11.4f}"
            line += f"  {signed(m['difference'][d]):<26}" if "difference" in m else ""
        lines.append(line.rstrip())
    line = f"{'domains better':<{width + 41}}"
    for m in list(models.values())[1:]:
        better = f"{m['difference']['improved']} of {len(result['domains'])}, worst {m['difference']['worst']:+.4f}"
        line += f"{' ' * 22}{better:<26}"
    lines += [line.rstrip()] * (len(models) > 1)
    lines += [f"* fewer than {FEW_DOCUMENTS} documents: too few to say anything"] * bool(few)
    return "\n".join(lines)


def model_card(title: str, model: str, data: Data, counts: dict[str, int], hyper: dict, result: dict,
               passes: list[dict]) -> str:
    """The README.md of a trained model's folder, in the hub's format: what it is made of, and what came of that. Of
    files and folders of this machine it has no more than the names. passes: those that the base had before."""
    on_hub = re.fullmatch("([^/]+/[^/]+)@([0-9a-f]{40})", model)
    base = f"{on_hub[1]}`, commit `{on_hub[2]}" if on_hub else Path(model).name
    total, width = sum(counts.values()), max(map(len, counts))
    mixture = [f"{d:<{width}}{n:>12,}{n / total:>8.1%}" for d, n in counts.items()]
    in_cache, address = r".*/datasets--(.+?)--(.+?)/snapshots/([0-9a-f]{40})/(.+)", r"hf://datasets/\1/\2/\4@\3"
    sources = [f"{name:<{width}}  {re.sub(in_cache, address, path) if re.match(in_cache, path) else Path(path).name}"
               for name, paths in data.meta.get("sources", {}).items() for path in paths]
    sources[50:] = [f"and {len(sources) - 50:,} more files"] * (len(sources) > 50)
    before = [", ".join(f"{d} {n:,}" for d, n in p["counts"].items()) + f" of {p['seq_len']} tokens" for p in passes]
    settings = [f"{name} {str(value).removeprefix('torch.')}" for name, value in hyper.items() if value is not None]
    return "\n".join([
        "---", "library_name: transformers", *([f"base_model: {on_hub[1]}"] if on_hub else []), "---", "",
        f"# {title}", "", f"Trained by reweight from `{base}`.", "",
        *([f"Passes that it had before, in sequences: {'; '.join(before)}.", ""] if before else []),
        "## Mixture, in sequences", "", "```", *mixture, "```", "",
        "## Training", "", f"One pass, {', '.join(settings)}; linear warm-up, then a cosine to 0. AdamW, betas 0.9 and "
        "0.95, eps 1e-8, weight decay 0.1 on matrices; gradients clipped at norm 1.", "",
        "## Data", "", f"Data set `{data.identity}`, tokenizer sha256 `{data.meta['tokenizer']['sha256']}`.",
        *(["", "```", *sources, "```"] if sources else []), "",
        f"## Losses on the {result['split']} split, {result['seq_len']} tokens a sequence", "",
        "```", table(result), "```", ""])


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder or a name on the hub, the baseline first")
    parser.add_argument("--data", default=SAMPLE, help="a folder that prepare.py wrote (default: %(default)s)")
    parser.add_argument("--split", default="test", choices=SPLITS, help="(default: %(default)s)")
    parser.add_argument("--seq-len", type=int, metavar="T", help="tokens a sequence (default: the baseline's context)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: bfloat16 where it is fast)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--check-data", action="store_true", help="hash all of the data first, not a sample of it")
    args = parser.parse_args()
    if len(set(args.models)) < len(args.models):
        raise InputError("the same model is named twice")
    data, device = Data(args.data), start(args.device)
    check_data(data, args.check_data)
    losses, seq_len = {}, args.seq_len
    for name in args.models:
        model = None
        gc.collect()  # a compiled model refers to itself
        model = load(name, device, vocab_size=data.vocab_size)
        check_tokenizer(name, data)
        if can_compile(device)[0] and not args.no_compile:
            model.compile_parts()
        seq_len = model.config.max_position_embeddings if seq_len is None else seq_len
        losses[name] = evaluate(model, data, args.split, seq_len, autocast_dtype(args.dtype, device))
    if rank_and_world()[0] == 0:
        result = results(losses, data, args.split, seq_len)
        print(f"{args.split} split of {args.data}, {seq_len} tokens a sequence", table(result), sep="\n")
        if args.json:
            result["names"] = {name: pinned(name) for name in args.models}
            write_text(Path(args.json), json.dumps(result, indent=1) + "\n")
    finish()


if __name__ == "__main__":
    cli(main)
