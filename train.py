"""One model, one mixture, one short pass: continued pretraining on exactly the sequences counted.

    python train.py --mix uniform --sequences 800           # scratch:tiny on the sample; seconds
    python train.py --data data/pile --model pythia-1b --mix out/mix/mix.json --out out/pythia-1b
    torchrun --nproc_per_node=8 train.py --data data/pile --model pythia-1b --mix horizon

The order of the pass is a pure function of data, counts and seed; ranks, micro-batches and
restarts only slice it.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import prepare
from eval import (
    RESULT,
    check_fit,
    check_tokens,
    domain_means,
    evaluate,
    results,
    table,
    warn_of_another_tokenizer,
)
from model import (
    SHAPES,
    Config,
    GPTNeoX,
    add_up,
    autocast,
    autocast_dtype,
    barrier,
    can_compile,
    compile_for,
    enough_memory,
    find_device,
    finish,
    is_sharded,
    load,
    on_all_ranks,
    peak_flops,
    pinned,
    rank,
    save,
    say,
    sequences_at_once,
    start,
    where_it_runs,
    world_size,
    write_safetensors,
)
from prepare import Data, InputError

RESUME_HINT = "; the same command with --resume goes on"


# ---- the order of the pass ----


MOST_SEQUENCES = 10**8  # in a pass; its order then takes 4 GB
HORIZON = {"arxiv": 608, "books": 613, "github": 226, "web": 8516, "wikipedia": 1438}  # the post's


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014, section 5), on uint64; it wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def places(count: int) -> np.ndarray:
    """Where the draws of a domain stand in the pass, (count,) uint64: k at (k + 1/2) / count."""
    bits = np.uint64(31)
    n = np.uint64(count)
    # 2^63 (k + 1/2) / count in integers, which compare exactly. The numerator has more than 64
    # bits, so it takes two divisions of 31 bits each.
    numerators = (2 * np.arange(count, dtype=np.uint64) + np.uint64(1)) << bits
    high, rest = np.divmod(numerators, n)
    return (high << bits) | (rest << bits) // n


def check_counts(data: Data, counts: dict[str, int]) -> None:
    """Raise InputError for counts, wherever they come from, that are no mixture of the data."""
    for domain, count in counts.items():
        if domain not in data.domains:
            has = f"it has {', '.join(data.domains)}"
            raise InputError(f"mixture: {data.folder} has no domain {domain!r}; {has}")
        if type(count) is not int or not 0 <= count < 2**31:
            expected = "expected a whole number from 0 to 2^31 - 1"
            raise InputError(f"mixture: {domain} has {count!r} sequences; {expected}")
    if not any(counts.values()):
        raise InputError("mixture: every count is zero; there is nothing to train on")


class Mixture:
    """The sequences of one pass over `counts`, {domain: number of sequences}, in their order.

    Draw k of a domain with n windows is window perm(k // n)[k % n]: no window comes twice within
    an epoch, and a larger count holds a smaller one's draws. seen: {domain: (n,) how often each
    window was trained on before}; the least seen come first. Nothing here is random or a float.
    Raises InputError for counts that make no mixture of this data.
    """

    def __init__(
        self,
        data: Data,
        counts: dict[str, int],
        seq_len: int,
        seed: int = 0,
        seen: dict[str, np.ndarray] | None = None,
    ):
        check_counts(data, counts)
        if sum(counts.values()) > MOST_SEQUENCES:
            most = f"a pass has at most {MOST_SEQUENCES:,}"
            raise InputError(f"mixture: {sum(counts.values()):,} sequences; {most}")
        self.data = data
        self.seq_len = seq_len
        self.seed = seed
        self.seen = seen or {}
        self.counts = {d: counts[d] for d in sorted(counts) if counts[d]}
        self.windows = {d: data.windows(d, "train", seq_len) for d in self.counts}
        self._domains = list(self.counts)
        self._epochs: dict[tuple[str, int], np.ndarray] = {}  # permutations that were asked for

        # Each sequence's domain, by number, and which draw of the domain it is. The sort is
        # stable, so that of equal places the domain that is first by name comes first.
        sizes = list(self.counts.values())
        order = np.argsort(np.concatenate([places(n) for n in sizes]), kind="stable")
        self._domain = np.repeat(np.arange(len(sizes)), sizes)[order]
        self._draw = np.concatenate([np.arange(n) for n in sizes])[order]

    def __len__(self) -> int:
        return len(self._draw)

    def window(self, domain: str, k: int) -> int:
        """The number of the window that is the domain's k-th draw."""
        n = self.windows[domain]
        epoch = k // n
        if (domain, epoch) not in self._epochs:
            # A permutation by sorting hashes: numpy's own generators may change between versions.
            key = hashlib.sha256(f"{self.seed}/{domain}/{epoch}".encode()).digest()[:8]
            first = np.uint64(int.from_bytes(key, "little"))
            step = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's own
            hashes = splitmix64(first + np.arange(n, dtype=np.uint64) * step)
            # Windows that earlier passes trained on come last.
            seen = self.seen.get(domain, np.zeros(n, dtype=np.int64))
            self._epochs[domain, epoch] = np.lexsort((hashes, seen))
        return int(self._epochs[domain, epoch][k % n])

    def domain(self, i: int) -> str:
        """The domain of sequence i of the pass."""
        return self._domains[self._domain[i]]

    def row(self, i: int) -> np.ndarray:
        """Sequence i of the pass: (T + 1,) uint16, inputs and, one further, targets."""
        domain = self.domain(i)
        number = self.window(domain, int(self._draw[i]))
        return self.data.window(domain, "train", self.seq_len, number)

    def __getitem__(self, i: int) -> tuple[str, np.ndarray, np.ndarray]:
        """Sequence i of the pass: its domain, inputs (T,) and targets (T,), uint16."""
        i = range(len(self))[i]  # counts from the end, and raises, like a list
        row = self.row(i)
        return self.domain(i), row[:-1], row[1:]


def times_seen(data: Data, seq_len: int, passes: list[dict]) -> dict[str, np.ndarray]:
    """How often earlier passes over this data trained on each window: {domain: (n,) int64}."""
    seen = {d: np.zeros(data.windows(d, "train", seq_len), dtype=np.int64) for d in data.domains}
    for one in passes:
        # Windows of other data or of another length have other numbers.
        if (one["data"], one["seq_len"]) != (data.identity, seq_len):
            continue
        # What a pass drew depends on what the ones before it had seen.
        mixture = Mixture(data, one["counts"], seq_len, one["seed"], dict(seen))
        for domain, count in mixture.counts.items():
            windows = [mixture.window(domain, k) for k in range(count)]
            seen[domain] = seen[domain] + np.bincount(windows, minlength=len(seen[domain]))
    return seen


def rescale(weights: dict[str, float], sequences: int) -> dict[str, int]:
    """Whole counts in the proportions of the weights, `sequences` in all.

    The largest remainders are rounded up, of equal ones those that are first by name.
    """
    names = sorted(weights)
    total = sum(weights.values())
    if not 0 < total < math.inf or min(weights.values()) < 0:
        raise InputError(f"mixture: there are no shares in {weights}; they are above 0, or 0")
    exact = {d: weights[d] * sequences / total for d in names}
    counts = {d: math.floor(exact[d]) for d in names}
    # What rounding down left over goes where it took most.
    left = sequences - sum(counts.values())
    for domain in sorted(names, key=lambda d: counts[d] - exact[d])[:left]:
        counts[domain] += 1
    return counts


def parse_mixture(
    text: str,
    data: Data,
    sequences: int | None,
    seq_len: int,
    domains: list[str] | None = None,
    option: str = "--mix",
) -> dict[str, int]:
    """--mix, or another option, as counts. Raises InputError for what is no mixture of this data.

    domains: those that `uniform` and `natural` have; None: all.
    """
    domains = domains or data.domains
    # Mixtures by name that are proportions only, and need a length.
    if text in ("uniform", "natural"):
        if sequences is None:
            length = "--sequences, the number of sequences to train on"
            raise InputError(f"{option} {text} needs {length}")
        weights = dict.fromkeys(domains, 1)
        if text == "natural":
            weights = {d: data.size(d, "train")["tokens"] for d in domains}
        return rescale(weights, sequences)
    # Counts: the post's, a file's, or those on the command line.
    if text == "horizon":
        counts = HORIZON
    elif text.endswith(".json"):
        counts = prepare.load_json(Path(text))
        # It is bare counts, or a mix.json, which says how long its sequences are.
        if isinstance(counts.get("counts"), dict):
            made_for = counts.get("seq_len", seq_len)
            if made_for != seq_len and sequences is None:
                made = f"made for --seq-len {made_for!r}, not {seq_len}"
                raise InputError(f"{text}: {made}; give --sequences too")
            counts = counts["counts"]
    else:
        pairs = [re.fullmatch(r"([^=]+)=(-?\d{1,15})", pair.strip()) for pair in text.split(",")]
        if not all(pairs):
            expected = "uniform, natural, horizon, FILE.json or arxiv=608,github=226"
            if os.path.isfile(f"{text}/mix.json"):  # which takes names of any length
                expected = f"{Path(text) / 'mix.json'}, perhaps"
            raise InputError(f"{option} {text}: expected {expected}")
        counts = {pair[1]: int(pair[2]) for pair in pairs}
        if len(counts) < len(pairs):
            raise InputError(f"{option} {text}: a domain is named twice; name each once")
    if not isinstance(counts, dict):
        raise InputError(f"{option} {text}: expected counts by domain")
    check_counts(data, counts)
    if sequences is None:
        return dict(counts)
    return rescale(counts, sequences)


def as_option(text: str, counts: dict[str, int]) -> str:
    """--mix, or another option, so that it means these counts even if its file changes or goes."""
    if text.endswith(".json"):
        return ",".join(f"{domain}={n}" for domain, n in counts.items())
    return text


# ---- the schedule, the optimizer, one step ----


@dataclass(frozen=True)
class Hyperparameters:
    """What a pass is trained with; all but the micro-batch determines what comes out."""

    seq_len: int  # tokens
    batch_size: int  # sequences a step, on all ranks together
    learning_rate: float  # the schedule's peak
    warmup: float = 0.2  # share of the steps
    seed: int = 0  # of the order of the pass
    dtype: torch.dtype = torch.float32  # of autocast; weights stay as they are
    micro_batch_size: int | None = None  # sequences at a time on a rank; None: as many as fit

    def record(self) -> dict:
        """For JSON: what determines the result."""
        settings = asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}
        del settings["micro_batch_size"]
        return settings


def defaults(name: str, config: Config) -> dict:
    """Settings that belong to a model: the post's, or for random weights and tiny found by trying.

    base_learning_rate is for random weights that are to become a base.
    """
    own = {"seq_len": config.max_position_embeddings, "batch_size": 64}
    own |= {"learning_rate": 1e-5, "base_learning_rate": 1e-3}
    tiny = SHAPES["tiny"]
    if (config.num_hidden_layers, config.hidden_size) == (tiny.num_hidden_layers, tiny.hidden_size):
        own |= {"batch_size": 16, "learning_rate": 4e-3, "base_learning_rate": 1e-2}
    elif name.startswith("scratch:"):
        own["learning_rate"] = 1e-3
    return own


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear from 0 over the first `warmup` share of the pass, then a cosine to 0."""
    x = (step + 0.5) / steps  # the middle of the step, so that none has rate 0
    if x < warmup:
        return peak * x / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (x - warmup) / (1 - warmup)))


def make_optimizer(model: GPTNeoX, hyper: Hyperparameters) -> torch.optim.Optimizer:
    """Pythia's AdamW (2304.01373, appendix); matrices decay, biases and norms do not.

    `train` sets the learning rate before every step; checkpoints save any state it has. To combine
    two optimizers, subclass torch.optim.Optimizer.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    fused = matrices[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def sequences_of_step(step: int, batch_size: int, sequences: int) -> range:
    """The sequences of the pass that a step takes; the last step may have fewer."""
    return range(step * batch_size, min((step + 1) * batch_size, sequences))


# A micro-batch: tokens (M, T + 1) int64, weights (M, 1) fp32, the numbers of the sequences.
Part = tuple[torch.Tensor, torch.Tensor, list[int]]
# weigh(step, sequences of the pass, their losses (M, T), weights (M, 1)) -> weights (M, 1)
Weigh = Callable[[int, list[int], torch.Tensor, torch.Tensor], torch.Tensor]


def micro_batches(mixture: Mixture, batch: range, micro_batch_size: int) -> Iterator[Part]:
    """This rank's part of a batch. Every rank gets as many micro-batches, each of M rows.

    Rows that only fill one up have weight 0.
    """
    # Sequences go round the ranks, so that the domains of a batch are spread evenly over them.
    mine = batch[rank() :: world_size()]
    for i in range(0, math.ceil(len(batch) / world_size()), micro_batch_size):
        part = list(mine[i : i + micro_batch_size])
        rows = part + [batch[0]] * (micro_batch_size - len(part))
        tokens = np.stack([mixture.row(j) for j in rows]).astype(np.int64)
        weights = (torch.arange(micro_batch_size) < len(part)).float()[:, None]
        yield torch.from_numpy(tokens), weights, rows


def add_gradients(
    network: torch.nn.Module,
    parts: list[Part],
    step: int,
    sequences: int,
    hyper: Hyperparameters,
    weigh: Weigh | None,
) -> torch.Tensor:
    """Add the gradient of the mean loss of a batch of `sequences` to the parameters' gradients.

    parts: this rank's micro-batches. weigh: gives sequences other weights.
    Returns this rank's part of that loss: ().
    """
    device = next(network.parameters()).device
    total = torch.zeros((), device=device)
    # Every micro-batch is on the device before the first one is computed.
    parts = [(tokens.to(device), weights.to(device), rows) for tokens, weights, rows in parts]
    for i, (tokens, weights, rows) in enumerate(parts):
        # DDP adds gradients up over the ranks where this is set: only with the last micro-batch. It
        # must be set before the forward pass, which reads it.
        network.require_backward_grad_sync = i == len(parts) - 1
        with autocast(device, hyper.dtype):
            losses = network(tokens[:, :-1], tokens[:, 1:])  # (M, T)
        # A method may weigh a sequence by its loss.
        if weigh:
            weights = weigh(step, rows, losses.detach(), weights)
        # Divided by the batch of all ranks, because micro-batches and ranks may differ in size.
        loss = (losses * weights).sum() / (sequences * hyper.seq_len)
        # DDP and FSDP divide by the number of ranks.
        (loss * world_size()).backward()
        total += loss.detach()
    return total


def clip_gradients(model: GPTNeoX) -> torch.Tensor:
    """Scale all gradients so that their norm is at most 1; returns what it was: ()."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if is_sharded(model):
        norm = norm.full_tensor()
    return norm


# ---- train ----


def micro_batch_size(
    model: GPTNeoX, hyper: Hyperparameters, device: torch.device, sequences: int
) -> int:
    """As asked for, or what fits with few rows idle; at most a rank's share of a step.

    sequences: of the pass.
    """
    rows = math.ceil(min(hyper.batch_size, sequences) / world_size())
    if hyper.micro_batch_size:
        return min(rows, hyper.micro_batch_size)
    fits = sequences_at_once(model, hyper.seq_len, hyper.dtype, device, training=True)
    # Where 10 fit, 64 rows make 8 parts of 8, not 7 of 10; but never less than 3/4 of what fits.
    most = min(rows, fits)
    best = most
    for size in range(most, most * 3 // 4, -1):
        if size * math.ceil(rows / size) < best * math.ceil(rows / best):
            best = size
    return best


def memory_words(micro_batch_size: int, seq_len: int) -> tuple[str, str]:
    """What to say if memory runs out: what took it, and a way out that helps in that case."""
    way_out = f"try --micro-batch-size {micro_batch_size // 2}"
    if micro_batch_size == 1:
        way_out = "try --activation-checkpointing, a shorter --seq-len or --fsdp"
    return f"training on {micro_batch_size} sequences of {seq_len} tokens at a time", way_out


def cut_log(path: Path, steps: int, losses: dict[str, float] | None) -> None:
    """Cut log.jsonl down to the lines of the first `steps` steps: later ones will be done again.

    losses: of the evaluation after the last of these steps, if one was due.
    """
    lines = []
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()[:steps]
    # A signal may have cut that evaluation short. A line that is damaged stays as it is.
    if losses is not None and len(lines) == steps:
        with contextlib.suppress(ValueError):
            lines[-1] = json.dumps(json.loads(lines[-1]) | {"val": losses})
    path.parent.mkdir(parents=True, exist_ok=True)
    prepare.write_text(path, "".join(f"{line}\n" for line in lines))


def check_skipped(
    skipped: int, step: int, title: str, batch: range, hyper: Hyperparameters
) -> None:
    """Raise InputError if three steps in a row, the last one with this batch, made no update."""
    if skipped == 3:
        first = step - 2
        where = f"steps {first} to {step}, sequences {first * hyper.batch_size} to {batch[-1]}"
        lower = f"a lower --lr (of a base: --base-lr), now {hyper.learning_rate:g}"
        way_out = f"look at these, or --overwrite with {lower}"
        raise InputError(f"{title}: loss or gradient not finite in {where}; {way_out}")


def speed_words(model: GPTNeoX, hyper: Hyperparameters, tokens_per_second: int) -> str:
    """How fast it is and, on GPUs whose peak is known, what share of that (MFU)."""
    words = f"{tokens_per_second:,} tok/s"
    peak = peak_flops(model.device, hyper.dtype)
    if peak:
        used = tokens_per_second * model.flops_per_token(hyper.seq_len)
        words += f", MFU {used / (peak * world_size()):.0%}"
    return words


def over_ranks(model: GPTNeoX) -> torch.nn.Module:
    """The model as DDP has it, which adds gradients up over the ranks; itself if FSDP does that."""
    if world_size() == 1 or is_sharded(model):
        return model
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Buffers are the same everywhere. As an argument this would warn.
    network.broadcast_buffers = False
    return network


def train(
    model: GPTNeoX,
    data: Data,
    counts: dict[str, int],
    hyper: Hyperparameters,
    *,
    seen: dict[str, np.ndarray] | None = None,
    out: Path | None = None,
    save_every: int = 0,
    validate: Callable[[int], dict[str, float] | None] | None = None,
    weigh: Weigh | None = None,
    title: str = "train",
) -> GPTNeoX:
    """Train the model, in place, on one pass over the mixture; returns it.

    counts: {domain: sequences}. seen: times_seen by earlier passes. out: a folder for log.jsonl
    and, every save_every steps, checkpoints; the run goes on from the newest sound one there.
    validate(steps done): losses to log, or None; a run that goes on asks again for those of its
    last step. A step whose loss or gradient is not finite leaves the model as it is. Raises
    InputError for bad counts and after three such steps in a row, Stopped after a signal.
    """
    check_fit(model, data, hyper.seq_len)
    device = model.device
    mixture = Mixture(data, counts, hyper.seq_len, hyper.seed, seen)
    steps = math.ceil(len(mixture) / hyper.batch_size)
    M = micro_batch_size(model, hyper, device, len(mixture))
    memory = memory_words(M, hyper.seq_len)
    # The optimizer's state is loaded before DDP makes gradients views of its buckets.
    optimizer = make_optimizer(model, hyper)
    with enough_memory(*memory):
        stop_if_asked(device)
        compile_for(model, M, hyper.seq_len, hyper.dtype, training=True)
        stop_if_asked(device)  # Ctrl-C ends the compiler, too: stop rather than go on eagerly
        first, skipped = load_checkpoint(out, model, optimizer)
        network = over_ranks(model)
    losses = validate(first) if validate and first else None
    if out and rank() == 0:
        cut_log(out / "log.jsonl", first, losses)
    bar = prepare.Bar(title, steps, "step", first)

    for step in range(first, steps):
        began = time.perf_counter()
        batch = sequences_of_step(step, hyper.batch_size, len(mixture))
        rate = learning_rate_at(step, steps, hyper.learning_rate, hyper.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # The step. All ranks get the same loss, norm and signals, and so decide the same. Where the
        # loss or a gradient is not finite an update would ruin the weights for good: none is made.
        with enough_memory(*memory):
            parts = list(micro_batches(mixture, batch, M))
            for tokens, _, _ in parts:
                check_tokens(tokens, model, data)
            own_loss = add_gradients(network, parts, step, len(batch), hyper, weigh)
            own_signals = torch.full_like(own_loss, len(stop_signals))
            both = add_up(torch.stack((own_loss, own_signals)))  # one exchange between the ranks
            norm = clip_gradients(model)
            loss, signals, grad_norm = torch.stack((*both, norm)).tolist()  # one wait for all
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=network is model)  # DDP's gradients live in its buckets
        tokens_per_second = len(batch) * hyper.seq_len / (time.perf_counter() - began)
        stop = signals > 0
        skipped = 0 if finite else skipped + 1  # in a row

        # Its line in the log, and in the bar.
        line = {"step": step, "loss": loss, "lr": rate, "grad_norm": grad_norm}
        line |= {"sequences": len(batch), "tokens_per_second": round(tokens_per_second)}
        if not finite:
            line |= {"loss": None, "grad_norm": None, "skipped": list(batch)}
            found = f"loss {loss}, gradient norm {grad_norm}"
            say(f"step {step}: {found}: no update from sequences {batch[0]} to {batch[-1]}")
        speed = speed_words(model, hyper, line["tokens_per_second"])
        bar.to(step + 1, f"loss {loss:.3f}, lr {rate:.1e}, {speed}")

        # After a signal the evaluation is skipped or cut short; --resume makes up for it.
        losses = None
        try:
            if validate and not stop:
                losses = validate(step + 1)
        except Stopped:
            stop = True
        if losses is not None:
            line["val"] = losses
        if out and rank() == 0:
            with prepare.naming(out / "log.jsonl"), open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

        # The end, if too many steps failed or a signal came; else a checkpoint if one is due.
        check_skipped(skipped, step, title, batch, hyper)
        due = save_every and (step + 1) % save_every == 0 and step + 1 < steps
        if out and (stop or due):
            save_checkpoint(out, model, optimizer, step + 1, skipped)
        if stop:
            bar.close()
            saved = "and saved " if out else ""
            raise Stopped(f"{title}: stopped {saved}after step {step + 1} of {steps}")
    bar.close()
    return model


# ---- state and checkpoints, on one GPU or spread over several ----


def shard(model: GPTNeoX, dtype: torch.dtype, device: torch.device) -> None:
    """Spread a model on device "meta" over the ranks by FSDP2, in place; weights are not set yet.

    Each rank keeps its share of every parameter and of what belongs to it, in fp32. A layer's
    parameters are gathered in dtype when it runs; gradients are added up in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (world_size(),))
    # The root frees what it gathered, too: after an evaluation no backward pass does that.
    for module in (*model.gpt_neox.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.to_empty(device=device)
    model.make_rotary()


def torch_state():
    """The module of torch's that reads and sets state, sharded or not.

    It is imported late, for that takes half a second, and --help does not need it.
    """
    from torch.distributed.checkpoint import state_dict

    return state_dict


def gather_options():
    """How state is read: the first rank gets whole tensors on its CPU, the others nothing."""
    return torch_state().StateDictOptions(full_state_dict=True, cpu_offload=True)


def spread_options(model: GPTNeoX):
    """How state is set: by the first rank for all where it is sharded, else by every rank."""
    by_first = is_sharded(model)
    return torch_state().StateDictOptions(full_state_dict=by_first, broadcast_from_rank0=by_first)


def reads_state(model: GPTNeoX) -> bool:
    """Whether this rank reads a model's state from the disk."""
    return rank() == 0 or not is_sharded(model)


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise InputError if a tensor is not finite."""
    for name, tensor in tensors.items():
        # A sum takes a tenth of the time, and is not finite if one of its terms is not; but it can
        # also overflow, so then look at all of them.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            kept = "what was saved before is as it was"
            way_out = "try --overwrite with a lower --lr (of a base: --base-lr)"
            if tensor.dtype == torch.float16:
                way_out = "try --resume with --save-dtype float32"
            raise InputError(f"{name} is not finite and not saved; {kept}; {way_out}")


IN_FILE = "optimizer.safetensors"  # also the key in JSON for the name of a tensor in that file


def split_tensors(state, tensors: dict[str, torch.Tensor], path: str = "state"):
    """Nested state, fit for JSON: tensors move into `tensors`, and their names take their place."""
    if isinstance(state, torch.Tensor):
        tensors[path] = state.contiguous()
        return {IN_FILE: path}
    if isinstance(state, dict):
        return {key: split_tensors(x, tensors, f"{path}.{key}") for key, x in state.items()}
    if isinstance(state, (list, tuple)):
        return [split_tensors(x, tensors, f"{path}.{i}") for i, x in enumerate(state)]
    return state


def join_tensors(state, tensors: dict[str, torch.Tensor]):
    """Undo split_tensors; what was a tuple is now a list."""
    if isinstance(state, list):
        return [join_tensors(x, tensors) for x in state]
    if not isinstance(state, dict):
        return state
    if state.keys() == {IN_FILE}:
        return tensors[state[IN_FILE]]
    return {key: join_tensors(x, tensors) for key, x in state.items()}


def fill(model: GPTNeoX, name: str | Path, **scratch) -> None:
    """Copy the weights of `name`, as `load` takes it, into a model of that shape, in place.

    It stays compiled and sharded, if it is.
    """
    weights = {}
    if reads_state(model):
        weights = load(name, **scratch).state_dict()
    torch_state().set_model_state_dict(model, weights, options=spread_options(model))


def keep(model: GPTNeoX, data: Data, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save the finished model, if that is not done, and remove its checkpoints; on every rank."""
    if not on_all_ranks((out / "model.safetensors").is_file(), model.device):
        weights = torch_state().get_model_state_dict(model, options=gather_options())
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        check_finite(weights)
        if rank() == 0:
            save(model, out, data.folder / "tokenizer.json", dtype, weights)
    if rank() == 0:
        for folder in checkpoints(out):
            shutil.rmtree(folder)
    # The others may read what the first rank wrote.
    barrier()


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-" + 8 * "[0-9]"))


def save_checkpoint(
    out: Path, model: GPTNeoX, optimizer: torch.optim.Optimizer, steps: int, skipped: int
) -> None:
    """Weights, optimizer and how far they have come, with the sha256 of each in manifest.json.

    steps: that are done; skipped: how many of the last ones made no update. The folder appears
    whole. The newest two stay.
    """
    weights = torch_state().get_model_state_dict(model, options=gather_options())
    known = {"step": steps, "skipped": skipped, "optimizer": {}}
    moments = {}
    # Before its first step an optimizer has no state, and to ask for it would take a step.
    if optimizer.state:
        state = torch_state().get_optimizer_state_dict(model, optimizer, options=gather_options())
        known["optimizer"] = split_tensors(state, moments)
    check_finite(weights | moments)
    # A file cannot hold one tensor under two names.
    if model.config.tie_word_embeddings and weights:
        weights["embed_out.weight"] = weights["embed_out.weight"].clone()
    if rank() == 0:
        write_checkpoint(out, weights, moments, known)
    # No rank exits earlier: torchrun would kill the others.
    barrier()


def write_checkpoint(out: Path, weights: dict, moments: dict, known: dict) -> None:
    final = out / f"checkpoint-{known['step']:08d}"
    with prepare.replacing(final) as folder:
        folder.mkdir()
        # Each of these is on the disk before the manifest, and that before the folder's name.
        write_safetensors(folder / "model.safetensors", weights)
        write_safetensors(folder / "optimizer.safetensors", moments)
        prepare.write_json(folder / "state.json", known)
        hashes = {path.name: prepare.sha256_of(path) for path in sorted(folder.iterdir())}
        prepare.write_json(folder / "manifest.json", hashes)
        prepare.sync(out / "log.jsonl")
        shutil.rmtree(final, ignore_errors=True)
    # Any later ones were passed over as damaged.
    later = [path for path in checkpoints(out) if path > final]
    older = [path for path in checkpoints(out) if path < final]
    for folder in later + older[:-1]:
        shutil.rmtree(folder)


def newest_checkpoint(out: Path) -> Path | None:
    """The newest sound checkpoint; says which it passes over, removes what is half written."""
    for leftover in out.glob(".*.partial"):
        prepare.remove(leftover)
    for folder in reversed(checkpoints(out)):
        try:
            hashes = prepare.load_json(folder / "manifest.json")
            for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
                if prepare.sha256_of(folder / name) != hashes.get(name):
                    raise InputError(f"{name} is not what it was when it was saved")
            return folder
        except (OSError, InputError) as e:
            say(f"{folder} is damaged and passed over: {e}")
    return None


def load_checkpoint(
    out: Path | None, model: GPTNeoX, optimizer: torch.optim.Optimizer
) -> tuple[int, int]:
    """Restore the newest sound checkpoint in `out`, if any; returns its steps, and skipped."""
    if out is None:
        return 0, 0
    # The first rank looks, for the others may see the folder later than it does.
    step = 0
    if rank() == 0:
        newest = newest_checkpoint(out)
        if newest:
            step = int(newest.name[-8:])
    step = add_up(torch.tensor(step, device=model.device)).item()
    if step == 0:
        return 0, 0
    folder = out / f"checkpoint-{step:08d}"
    say(f"going on from {folder}")
    known = prepare.load_json(folder / "state.json", {"skipped": int, "optimizer": dict})
    weights = {}
    state = {}
    if reads_state(model):
        weights = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        state = join_tensors(known["optimizer"], moments)
    torch_state().set_model_state_dict(model, weights, options=spread_options(model))
    # Every rank takes part in setting it, also one that read nothing.
    if known["optimizer"]:
        torch_state().set_optimizer_state_dict(
            model, optimizer, state, options=spread_options(model)
        )
    return step, known["skipped"]


# ---- the run's folder ----


class Stopped(Exception):
    """A signal asked for the end, and the work is saved; the message says how far it came."""


stop_signals: list[int] = []  # that came to this process


def stop_if_asked(device: torch.device) -> None:
    """Raise Stopped, on all ranks, if a signal came to any; every rank must ask."""
    asked = torch.tensor(float(len(stop_signals)), device=device)
    if add_up(asked) > 0:
        raise Stopped("stopped")


def note_signal(number: int, frame) -> None:
    """Note that a signal came. Says so by os.write, because it may have interrupted a print."""
    if not stop_signals and rank() == 0:
        begin = b"\n"
        if sys.stderr.isatty():
            begin = b"\r\x1b[K"  # over the bar, which comes again below
        os.write(2, begin + b"stopping when this step, batch or compilation is done\n")
    stop_signals.append(number)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Only note SIGINT and SIGTERM in this block: train ends its step, saves and raises Stopped.

    The process then ends with status 128 + the signal, and the command that goes on.
    """
    before = {n: signal.signal(n, note_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Stopped as e:
        if rank() == 0:
            print(f"\n{e}; go on with: {resume_command()}", file=sys.stderr)
        finish()
        # If it came to another rank, take it for a SIGTERM.
        number = stop_signals[0] if stop_signals else signal.SIGTERM
        sys.exit(128 + number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop_signals.clear()


def resume_command() -> str:
    options = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    return shlex.join([*launcher(options), sys.argv[0], *options, "--resume"])


def launcher(options: list[str]) -> list[str]:
    """What stood before the script's name: python, or torchrun with its own options.

    options: those of the script that are to follow.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    if ranks is None:
        return ["python"]
    # torchrun would take --start for one of its own options, two of which begin so.
    end = ["--"] if any(word.startswith("--start") for word in options) else []
    # On Linux torchrun, which is the parent, shows its command line, up to the script's name.
    with contextlib.suppress(OSError, ValueError):
        called = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
        called = [word for word in called[: called.index(sys.argv[0])] if word != "--"]
        for i, word in enumerate(called):
            if word == "torch.distributed.run" or Path(word).name == "torchrun":
                return ["torchrun", *called[i + 1 :], *end]
    return ["torchrun", f"--nproc_per_node={ranks}", *end]


@functools.cache  # the code that runs is that which was read first
def source_digest() -> str:
    """A hash of the code that determines a run and its losses, without comments or docstrings."""
    # All that is defined in this file, in those of this folder that it imports, and so on.
    defined: dict[str, list[ast.stmt]] = defaultdict(list)  # by name
    files = [Path(__file__)]
    for file in files:  # which grow
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined[node.name].append(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for name in ast.walk(node):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        defined[name.id].append(node)
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module]
            found = [file.with_name(f"{module}.py") for module in imported]
            files += [path for path in found if path.is_file() and path not in files]
    # An edit of these functions, of what they use, and so on, may change what comes out. In
    # prepare.tell, `prepare` is the module, not the function of that name: so no module's name is
    # followed.
    modules = {file.stem for file in files}
    used = ["train", "times_seen", "fill", "keep", "evaluate"]
    digest = hashlib.sha256()
    for name in used:  # it grows in the loop
        for node in defined[name]:
            # Without docstrings, which only explain.
            for each in ast.walk(node):
                if isinstance(each, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(each):
                    del each.body[0]
            digest.update(ast.dump(node).encode())
            # Every name and attribute in it; of these, those that some file defines.
            words = {getattr(each, "id", getattr(each, "attr", "")) for each in ast.walk(node)}
            used += sorted(words & defined.keys() - modules - {*used})
    return digest.hexdigest()[:16]


def name_of(settings: dict) -> str:
    """A run's name: a hash of all that determines its result, the code included."""
    text = json.dumps(settings | {"code": source_digest()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_record(folder: str | Path, way_out: str = "remove it, or the whole folder") -> dict:
    """The run.json of a run's folder: what it is. Raises InputError if it is damaged."""
    path = Path(folder) / "run.json"
    record = {"settings": {}, "passes": [], "options": {}}
    one = {"data": str, "seq_len": int, "seed": int, "counts": dict}
    sound = False
    with contextlib.suppress(InputError):
        record |= prepare.load_json(path)
        sound = prepare.fits(record, {"settings": dict, "passes": list, "options": dict})
    if not sound or not all(prepare.fits(each, one) for each in record["passes"]):
        raise InputError(f"{path}: damaged; {way_out}")
    return record


def passes_of(model: str | Path) -> list[dict]:
    """The passes that a model's folder says it was trained on."""
    if not is_run(Path(model)):
        return []
    return read_record(model)["passes"]


def this_pass(data: Data, hyper: Hyperparameters, counts: dict[str, int]) -> dict:
    return {"data": data.identity, "seq_len": hyper.seq_len, "seed": hyper.seed, "counts": counts}


def settings_of(args, data: Data, hyper: Hyperparameters) -> dict:
    """The settings that must be the same when a run is resumed."""
    files = []
    if rank() == 0:  # which alone writes them down
        for path in sorted(Path(args.model).glob("*")):
            if path.suffix == ".safetensors" or path.name in ("config.json", "run.json"):
                files.append(prepare.sha256_of(path)[:16])
    # A folder is identified by its files, not by its path.
    name = "" if Path(args.model).exists() else args.model
    return {
        "model": name,
        "model's files": files,
        "data": data.identity,
        "tokenizer": data.meta["tokenizer"]["sha256"],
        **hyper.record(),
    }


def is_run(out: Path) -> bool:
    return (out / "run.json").is_file()


def check_folder(out: Path, args) -> None:
    """Raise InputError if these options may not begin, continue or overwrite a run in `out`."""
    prepare.check_place(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file, not a folder; choose another --out")
    if not {path.name for path in out.iterdir()} - {".lock", ".run.json.partial"}:
        return
    if not is_run(out):
        raise InputError(f"{out} holds other files than a run's; choose another --out")
    for name in (args.model, vars(args).get("mix"), vars(args).get("start")):
        is_there = name is not None and Path(name).exists()
        if args.overwrite and is_there and Path(name).resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out}: --overwrite would remove {name}; choose another --out")
    try:
        is_search = "method" in read_record(out, "--overwrite starts anew")["settings"]
    except InputError:
        if args.overwrite:
            return
        raise
    if is_search and not hasattr(args, "method"):
        raise InputError(f"{out} holds a search of mix.py's; choose another --out")
    if hasattr(args, "method") and not is_search:
        raise InputError(f"{out} holds a run of train.py's; choose another --out")
    if not (args.resume or args.overwrite):
        ways = "--resume continues the run there, --overwrite starts it anew"
        raise InputError(f"{out} is not empty; {ways}")


# What a run leaves in its folder; the weights, which make it a finished one, go first.
OWN_FILES = ("model.safetensors", "checkpoint-*", "log.jsonl", "result.json", "train.png")

# Options of one call, which --resume does not repeat.
NOT_KEPT = ("out", "resume", "overwrite", "dry_run", "check_data")


def words_of(options: dict) -> list[str]:
    """Options, {name in Python: value}, as they stand on a command line."""
    words = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif str(value).startswith("-"):
            words.append(f"{option}={value}")
        elif value is not None and value is not False:
            words += [option, str(value)]
    return words


def parse_args(parser: prepare.ArgumentParser):
    """The command line; with --resume, options left out are as they were given last."""
    args = parser.parse_args()
    if args.resume and args.overwrite:
        raise InputError("--resume goes on and --overwrite starts anew: give one of them")
    out = Path(args.out)
    path = out / "run.json"
    begins = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if args.resume and begins and prepare.is_first_process():
        prepare.tell(f"{out} holds no run to go on with: this is a new one")
    if args.resume and path.is_file():
        options = read_record(args.out, "--overwrite starts anew")["options"]
        # Those of another script's run are not this one's: check_folder says whose it is.
        known = {name: value for name, value in options.items() if name in vars(args)}
        try:
            args = parser.parse_args([*words_of(known), *sys.argv[1:]])
        except InputError as e:
            raise InputError(f"{path} is damaged: {e}; --overwrite starts anew") from None
        # The recorded options belong to the recorded method.
        if "method" in known and args.method != known["method"]:
            changed = f"method was {known['method']}, is {args.method}"
            raise InputError(f"{out}: --resume with other settings: {changed}")
    return args


@contextlib.contextmanager
def claim(
    out: Path, args, settings: dict, passes: list[dict], own_files: tuple[str, ...] = OWN_FILES
) -> Iterator[None]:
    """Make `out` this run's folder, or check that it is, and keep others out while the block runs.

    own_files: patterns of what a run of this kind leaves there, which --overwrite removes.
    Raises InputError before it changes anything.
    """
    record = out / "run.json"
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            check_folder(out, args)
            resuming = args.resume and is_run(out)
            if resuming:
                known = read_record(out)
                was = known["settings"]
                changed = []
                for key in {**was, **settings}:
                    if was.get(key) != settings.get(key):
                        changed.append(f"{key} was {was.get(key)}, is {settings.get(key)}")
                if changed:
                    raise InputError(f"{out}: --resume with other settings: {'; '.join(changed)}")
                if known.get("code") != source_digest():
                    say(f"warning: the code is not what it was when the run in {out} began")
            # From here on the folder changes.
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(prepare.locked(out / ".lock", out))
            if resuming:
                known = read_record(out)  # again, now that nobody else writes it
            else:
                for pattern in own_files:
                    for path in out.glob(pattern):
                        prepare.remove(path)
                known = {"settings": settings, "passes": passes, "options": None}
                known["code"] = source_digest()
            # Record the options given last, but leave a finished run's record alone: runs that
            # start from it have recorded its hash.
            options = {name: x for name, x in vars(args).items() if name not in NOT_KEPT}
            if options != known["options"] and not (out / "model.safetensors").is_file():
                prepare.write_json(record, known | {"options": options})
        # The other ranks look only now that it is written.
        barrier()
        if not record.is_file():
            seen = "this node does not see what the first one wrote there"
            raise InputError(f"{out}: {seen}; every node must see --out")
        yield


@contextlib.contextmanager
def decorating(path: Path) -> Iterator[None]:
    """Make a picture or a card in this block; if that fails, warn, and do without it."""
    try:
        yield
    # Whatever it is, it must not cost the weights.
    except Exception as e:
        say(f"warning: {path} could not be made: {type(e).__name__}: {' '.join(str(e).split())}")


def draw(log: Path, path: Path) -> None:
    """The loss and the learning rate by step and, where it was measured, each domain's loss."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [line for line in lines if "val" in line]
    panels = 2 if measured else 1
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    # The loss, with a gap where a step was skipped, and on an axis of its own the learning rate.
    steps = [line["step"] + 1 for line in lines]
    losses = np.array([line["loss"] for line in lines], dtype=np.float64)
    axes[0].plot(steps, losses, lw=1)
    axes[0].set(title="Training", xlabel="step", ylabel="loss, nats per token")
    rate = axes[0].twinx()
    rate.plot(steps, [line["lr"] for line in lines], color="0.7")
    rate.set_ylabel("learning rate", color="0.5")
    rate.set_ylim(bottom=0)
    # Each domain's loss where it was measured.
    if measured:
        steps = [line["step"] + 1 for line in measured]
        for domain in measured[0]["val"]:
            style = "k--" if domain == "mean" else ".-"
            axes[1].plot(steps, [line["val"][domain] for line in measured], style, label=domain)
        axes[1].set(title="Validation", xlabel="step", ylabel="loss, nats per token")
        figure.legend(loc="outside lower center", ncols=7, frameon=False)
    for panel in axes:
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    with prepare.replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def model_card(
    title: str,
    model: str,
    earlier: list[dict],
    data: Data,
    counts: dict[str, int],
    hyper: Hyperparameters,
    result: dict,
    found: str = "",
) -> str:
    """The README.md of a trained model's folder, in the hub's format.

    What made it, and what came of it; of a local folder nothing but its name is told. earlier:
    passes that the model had before this one. found: how the mixture was found.
    """
    # A model of the hub is named with its commit, and linked to.
    on_hub = re.fullmatch("([^/]+/[^/]+)@([0-9a-f]{40})", model)
    base = f"`{Path(model).resolve().name}`"
    front = "library_name: transformers"
    if on_hub:
        base = f"`{on_hub[1]}`, commit `{on_hub[2]}`"
        front += f"\nbase_model: {on_hub[1]}"
    for one in earlier:
        base += f", after a pass over {sum(one['counts'].values()):,} sequences"
    width = max(map(len, counts))
    total = sum(counts.values())
    shares = "\n".join(f"{d:<{width}}{n:>12,}{n / total:>8.1%}" for d, n in counts.items())
    settings = ", ".join(f"{name} {value}" for name, value in hyper.record().items())
    return f"""---
{front}
---

# {title}

Continued pretraining, with the scripts of reweight, from {base}.

## Mixture, in sequences{found}

```
{shares}
```

## Training

One pass: {settings}.

Data set `{data.identity}`, tokenizer `{data.meta["tokenizer"]["sha256"]}`.

## Losses on the {result["split"]} split, {result["seq_len"]} tokens a sequence

```
{table(result)}
```
"""


def write_card(out: Path, *of_the_run) -> None:
    """The README.md of a model's folder; of_the_run: what model_card takes besides its title."""
    path = out / "README.md"
    with decorating(path):
        prepare.write_text(path, model_card(out.resolve().name, *of_the_run))


# ---- options and main ----


def add_options(parser: prepare.ArgumentParser, out: str) -> None:
    """The options that train.py and mix.py share."""
    add = parser.add_argument_group("what to train on").add_argument
    add("--data", default=prepare.SAMPLE, help="a folder that prepare.py wrote")
    names = "a folder, a name on the hub, or scratch:SIZE"
    add("--model", default="scratch:tiny", help=names)
    add("--sequences", type=int, metavar="N", help="length of a pass")
    add("--seq-len", type=int, metavar="T", help="tokens a sequence; default: the model's context")

    add = parser.add_argument_group("how").add_argument
    add("--batch-size", type=int, metavar="B", help="sequences a step; default: the model's")
    add("--micro-batch-size", type=int, metavar="M", help="sequences at a time; default: what fits")
    add("--lr", type=float, help="peak learning rate; default: the model's")
    add("--warmup", type=float, default=0.2, help="share of the steps")
    add("--seed", type=int, default=0, help="of the order of the pass")

    add = parser.add_argument_group("where to").add_argument
    add("--out", default=out, help="folder of the run")
    add("--dry-run", action="store_true", help="check everything, say what it takes, and end")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="start anew, over the run in --out")
    add("--save-every", type=int, metavar="N", default=100, help="steps between checkpoints")
    dtypes = ("float32", "float16", "bfloat16")
    add("--save-dtype", choices=dtypes, default="float32", help="of the weights that come out")

    add = parser.add_argument_group("evaluation").add_argument
    most = "at most this many from each domain's validation split"
    add("--eval-sequences", type=int, metavar="N", default=512, help=most)
    add("--check-data", action="store_true", help="compare the data with its hashes first")

    add = parser.add_argument_group("hardware").add_argument
    add("--device", help="default: cuda where there is one, else cpu")
    of_autocast = ("float32", "bfloat16")
    add("--dtype", choices=of_autocast, help="of autocast; default: bfloat16 where it is fast")
    add("--no-compile", action="store_true", help="do without torch.compile")
    back = {"dest": "no_compile", "action": "store_false", "default": False}
    add("--compile", **back, help="with --resume: undo an earlier --no-compile")
    either = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--activation-checkpointing", **either, help="less memory, more computation")
    add("--fsdp", **either, help="spread a model that fits no GPU over the ranks")


def set_up(args) -> tuple[Data, Hyperparameters]:
    """Open the data and check all that can be checked before weights are read.

    Raises InputError. args.model becomes a name that means the same model tomorrow.
    """
    sizes = ("seq_len", "batch_size", "micro_batch_size", "eval_sequences")
    prepare.check_range(args, sizes, 1)
    prepare.check_range(args, ("sequences",), 1, MOST_SEQUENCES)
    prepare.check_range(args, ("seed", "save_every"), 0)
    prepare.check_range(args, ("lr", "warmup"), 0, 1)
    # Options by themselves, then the folder, the data, the model's shape, and how they fit.
    if args.fsdp and not dist.is_torchelastic_launched():
        start_it = f"torchrun --nproc_per_node=GPUS {Path(sys.argv[0]).name} --fsdp …"
        raise InputError(f"--fsdp needs torchrun: {start_it}; or --no-fsdp")
    # The first rank looks at the folder, and may have begun there before the others come this far.
    if rank() == 0:
        check_folder(Path(args.out), args)
    data = Data(args.data)
    args.model = pinned(args.model)
    shape = load(args.model, "meta", vocab_size=data.vocab_size)
    # What was not given is the model's own.
    own = defaults(args.model, shape.config)
    hyper = Hyperparameters(
        seq_len=args.seq_len or own["seq_len"],
        batch_size=args.batch_size or own["batch_size"],
        learning_rate=own["learning_rate"] if args.lr is None else args.lr,
        warmup=args.warmup,
        seed=args.seed,
        dtype=autocast_dtype(args.dtype, find_device(args.device)),
        micro_batch_size=args.micro_batch_size,
    )
    check_fit(shape, data, hyper.seq_len)
    for domain in data.domains:
        for split in prepare.SPLITS:
            data.windows(domain, split, hyper.seq_len)
    data.check_tokenizer()  # it goes into the model's folder, at the very end
    if args.check_data:
        data.check()
    warn_of_another_tokenizer(args.model, data)
    return data, hyper


def load_to_train(args, data: Data, dtype: torch.dtype, device: torch.device) -> GPTNeoX:
    """The model that the options name, on the device or spread over the ranks, compiled or not."""
    scratch = {"vocab_size": data.vocab_size, "seed": args.seed}
    if args.fsdp:
        model = load(args.model, "meta", **scratch)
        with enough_memory(f"spreading {args.model}", "take a smaller one, or more GPUs"):
            shard(model, dtype, device)
            fill(model, args.model, **scratch)
    else:
        model = load(args.model, device, **scratch)
    model.activation_checkpointing = args.activation_checkpointing

    compiles, how = can_compile(device, args.no_compile)
    if compiles and args.fsdp and device.type == "cpu" and dtype == torch.bfloat16:
        compiles = False
        how = "eager (torch.compile fails on a CPU with bfloat16 parameters)"
    tokens = sum(data.size(d, "train")["tokens"] for d in data.domains)
    say(f"data    {args.data}: {tokens:,} training tokens of {len(data.domains)} domains")
    say(f"model   {args.model}: {model.parameter_count():,} parameters")
    say(f"runs    on {where_it_runs(device, dtype)}, {how}")
    model.to_compile = compiles
    return model


def say_cost(model: GPTNeoX, hyper: Hyperparameters, sequences: int, device: torch.device) -> None:
    """Say what a pass is, and what it takes by arithmetic."""
    T = hyper.seq_len
    length = f"{sequences:,} sequences of {T} tokens ({sequences * T:,} in all)"
    say(f"pass    {length}, {hyper.batch_size} a step, lr {hyper.learning_rate:g}")
    # A checkpoint has the weights and Adam's two moments, in fp32.
    parameters = model.parameter_count()
    disk = 12 * parameters / 1e9
    takes = f"takes   {disk:.2f} GB on the disk for a checkpoint, of which two stay"
    # Training has their gradient as well; a model that is sharded has its part of all that.
    if device.type == "cuda":
        M = micro_batch_size(model, hyper, device, sequences)
        tokens = M * T * model.bytes_per_token(True, hyper.dtype)
        state = 16 * parameters
        if is_sharded(model):
            state //= world_size()
        takes += f"; {(state + tokens) / 1e9:.1f} GB on a GPU, {M} sequences at a time"
    say(takes)


def counts_words(counts: dict[str, int]) -> str:
    """A mixture in one line, the largest domains first."""
    sizes = sorted(counts.items(), key=lambda item: -item[1])
    return prepare.first_of([f"{domain} {n:,}" for domain, n in sizes], 6)


def say_mixture(mixture: Mixture) -> None:
    """Say what a pass is made of, and which domains it goes through more than once."""
    say(f"mixture {counts_words(mixture.counts)}")
    repeats = {d: count / mixture.windows[d] for d, count in mixture.counts.items()}
    ranked = sorted(repeats, key=repeats.get, reverse=True)
    often = [f"{d} {repeats[d]:.1f}" for d in ranked if repeats[d] > 1]
    if often:
        say(f"        times through a domain: {prepare.first_of(often)}")
    # Up to four epochs are worth nearly as much as new text (2305.16264).
    too_often = [d for d in ranked if repeats[d] > 4]
    if too_often:
        names = prepare.first_of(too_often)
        say(f"warning: more than 4 times through {names}; more teach little: prepare more of it")


def show_result(args) -> None:
    """The picture and the table of a finished run, and commands that are worth a try now."""
    out = Path(args.out)
    with decorating(out / "train.png"):
        draw(out / "log.jsonl", out / "train.png")
    result = prepare.load_json(out / "result.json", RESULT)
    say(f"validation losses, {result['seq_len']} tokens a sequence", table(result))
    say(f"model, log and train.png in {out}")
    words = [args.model, args.out, "--data", args.data]
    words += words_of({name: vars(args)[name] for name in ("seq_len", "device", "dtype")})
    # eval.py has no --seed: it would draw other random weights.
    if args.model.startswith("scratch:") and args.seed:
        del words[0]
    say(f"next    python {prepare.beside('eval.py')} {shlex.join(words)}")
    say(f"or      python {prepare.beside('model.py')} {shlex.quote(args.out)} 'def main('")


def main():
    parser = prepare.ArgumentParser(__doc__)
    add_options(parser, "out/train")
    add = parser.add_argument
    kinds = "uniform, natural, horizon, FILE.json, or counts like arxiv=608,github=226; the last "
    kinds += "three are taken as they are, or scaled to --sequences"
    add("--mix", default="uniform", help=kinds)
    add("--eval-every", type=int, metavar="N", default=0, help="steps between validation losses")
    args = parse_args(parser)
    prepare.check_range(args, ("eval_every",), 0)
    out = Path(args.out)
    device = start(args.device)
    data, hyper = set_up(args)
    counts = parse_mixture(args.mix, data, args.sequences, hyper.seq_len)
    args.mix = as_option(args.mix, counts)
    earlier = passes_of(args.model)
    model = load_to_train(args, data, hyper.dtype, device)
    T = hyper.seq_len
    steps = math.ceil(sum(counts.values()) / hyper.batch_size)
    losses = {}  # the table's models: "before" the pass, its baseline, and "after" it

    def validation() -> dict[str, np.ndarray]:
        stop = functools.partial(stop_if_asked, device)
        return evaluate(model, data, "val", T, hyper.dtype, args.eval_sequences, stop)

    def validate(steps_done: int) -> dict[str, float] | None:
        is_last = steps_done == steps
        is_due = args.eval_every > 0 and (is_last or steps_done % args.eval_every == 0)
        if is_due or is_last:
            losses["after"] = validation()  # the last step's is for the table
        if not is_due:
            return None  # nothing for the log
        means = domain_means(losses["after"])
        say(f"step {steps_done}: validation loss {means.mean():.4f} in the mean")
        return {**dict(zip(data.domains, means.tolist(), strict=True)), "mean": float(means.mean())}

    say_cost(model, hyper, sum(counts.values()), device)
    say_mixture(Mixture(data, counts, T))
    if args.dry_run:
        finish()
        return
    settings = settings_of(args, data, hyper) | {"counts": counts}
    passes = [*earlier, this_pass(data, hyper, counts)]
    with claim(out, args, settings, passes), stoppable():
        if not (out / "model.safetensors").is_file():
            losses["before"] = validation()
            seen = times_seen(data, T, earlier)
            kept = {"out": out, "save_every": args.save_every, "validate": validate}
            train(model, data, counts, hyper, seen=seen, **kept)
            if rank() == 0:
                result = results(losses, data, "val", T)
                prepare.write_json(out / "result.json", result)
                write_card(out, args.model, earlier, data, counts, hyper, result)
        keep(model, data, out, getattr(torch, args.save_dtype))
    # Also if the run was finished before.
    if rank() == 0:
        show_result(args)
    finish()


if __name__ == "__main__":
    prepare.cli(main, RESUME_HINT)
