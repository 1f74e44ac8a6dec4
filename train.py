"""One model, one mixture, one short pass: continued pretraining on exactly the sequences that the mixture counts.

    python train.py --mix uniform --sequences 800                   # scratch:tiny on data/sample; seconds on a CPU
    python train.py --data data/pile --model pythia-1b --mix out/mix/mix.json --out out/pythia-1b
    torchrun --nproc_per_node=8 train.py --data data/pile --model pythia-1b --mix horizon --out out/horizon

The order of the pass is a pure function of data, counts and seed; ranks, micro-batches and restarts only slice it.
"""
import hashlib
import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from eval import (assign, autocast, autocast_dtype, barrier, can_compile, check_fit, check_tokenizer, enough_memory,
                  evaluate, fill, finish, gathered, is_sharded, mean_loss, model_card, new_folder, rank_and_world,
                  results, rows_in_training, say, shard, start, table, whole, window_count)
from model import SHAPES, GPTNeoX, load, load_json, pinned, save, write_safetensors, write_text
from prepare import SAMPLE, SPLITS, ArgumentParser, Data, InputError, cli

HORIZON = {"arxiv": 608, "books": 613, "github": 226, "web": 8516, "wikipedia": 1438}  # the published mixture
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
        "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12}  # dense bf16 FLOP/s, by GPU; the first name that fits counts
RESUME_HINT = "; the same command with --resume goes on"


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014, section 5), elementwise on uint64; wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Mixture:
    """The sequences of one pass over `counts`, {domain: number of sequences}, in their order. Integers only.

    Draw k of a domain with n windows is window perm(k // n)[k % n]: no window comes twice within an epoch, and a larger
    count holds a smaller one's draws. seen: {domain: (n,) how often each window was trained on before}; the least seen
    come first. Raises InputError for counts that make no mixture of this data.
    """

    def __init__(self, data: Data, counts: dict[str, int], seq_len: int, seed: int = 0,
                 seen: dict[str, np.ndarray] | None = None):
        for d, count in counts.items():
            if d not in data.domains:
                raise InputError(f"mixture: {data.folder} has no domain {d!r}; it has {', '.join(data.domains)}")
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 2**31:
                raise InputError(f"mixture: {d} has {count!r} sequences; expected a whole number from 0 to 2^31 - 1")
        if not any(counts.values()):
            raise InputError("mixture: every count is zero; there is nothing to train on")
        self.data, self.seq_len, self.seed, self.seen = data, seq_len, seed, seen or {}
        self.counts = {d: counts[d] for d in sorted(counts) if counts[d]}
        self.windows = {d: window_count(data, d, "train", seq_len) for d in self.counts}
        self._tokens = {d: data.tokens(d, "train") for d in self.counts}
        self._names, self._perms = list(self.counts), {}
        places, word = [], np.uint64(31)
        for A in self.counts.values():  # draw k sits at (k + 1/2) / A: compared exactly, as floor((2k + 1) 2^62 / A)
            high, rest = np.divmod((2 * np.arange(A, dtype=np.uint64) + np.uint64(1)) << word, np.uint64(A))
            places.append((high << word) | (rest << word) // np.uint64(A))
        order = np.argsort(np.concatenate(places), kind="stable")  # stable: ties by name
        self._domain = np.repeat(np.arange(len(places)), list(self.counts.values()))[order]
        self._draw = np.concatenate([np.arange(A) for A in self.counts.values()])[order]

    def __len__(self) -> int:
        return len(self._draw)

    def window(self, domain: str, k: int) -> int:
        """The window that is the domain's k-th draw."""
        n = self.windows[domain]
        epoch = k // n
        if (domain, epoch) not in self._perms:
            key = int.from_bytes(hashlib.sha256(f"{self.seed}/{domain}/{epoch}".encode()).digest()[:8], "little")
            hashes = splitmix64(np.uint64(key) + np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
            seen = self.seen.get(domain, np.zeros(n, dtype=np.int64))
            self._perms[domain, epoch] = np.lexsort((hashes, seen))
        return int(self._perms[domain, epoch][k % n])

    def row(self, i: int) -> tuple[str, np.ndarray]:
        """Sequence i of the pass as its domain and (T + 1,) uint16 tokens: inputs and, one further, targets."""
        d = self._names[self._domain[i]]
        start = self.window(d, int(self._draw[i])) * self.seq_len
        return d, self._tokens[d][start:start + self.seq_len + 1]

    def __getitem__(self, i: int) -> tuple[str, np.ndarray, np.ndarray]:
        """Sequence i of the pass: its domain, inputs (T,) and targets (T,), uint16."""
        d, row = self.row(range(len(self))[i])
        return d, row[:-1], row[1:]

    def repeats(self) -> dict[str, float]:
        """How many times the pass goes through each domain."""
        return {d: count / self.windows[d] for d, count in self.counts.items()}


def times_seen(data: Data, seq_len: int, passes: list[dict]) -> dict[str, np.ndarray]:
    """How often earlier passes over this data trained on each window: {domain: (n,) int64}."""
    seen = {d: np.zeros(window_count(data, d, "train", seq_len), dtype=np.int64) for d in data.domains}
    for p in passes:
        if (p["data"], p["seq_len"]) == (data.identity, seq_len):
            mixture = Mixture(data, p["counts"], seq_len, p["seed"], dict(seen))
            for d, count in mixture.counts.items():
                windows = [mixture.window(d, k) for k in range(count)]
                seen[d] = seen[d] + np.bincount(windows, minlength=len(seen[d]))
    return seen


def rescale(weights: dict[str, float], sequences: int) -> dict[str, int]:
    """Whole counts in the proportions of the weights, `sequences` in all: largest remainders first, ties by name."""
    names, total = sorted(weights), sum(weights.values())
    exact = {d: weights[d] * sequences / total for d in names}
    counts = {d: math.floor(exact[d]) for d in names}
    for d in sorted(names, key=lambda d: counts[d] - exact[d])[:sequences - sum(counts.values())]:
        counts[d] += 1
    return counts


def parse_mixture(text: str, data: Data, sequences: int | None, seq_len: int) -> dict[str, int]:
    """--mix as counts. Raises InputError, naming what is wrong, for anything that is not a mixture of this data."""
    if sequences is not None and sequences < 1:
        raise InputError(f"--sequences {sequences}: expected at least 1")
    if text in ("uniform", "natural"):
        if sequences is None:
            raise InputError(f"--mix {text} needs --sequences, the number of sequences to train on")
        weights = {d: 1 if text == "uniform" else data.size(d, "train")["tokens"] for d in data.domains}
        return rescale(weights, sequences)
    if text == "horizon":
        counts = HORIZON
    elif text.endswith(".json"):
        if not Path(text).is_file():
            raise InputError(f"--mix {text}: no such file")
        counts = load_json(Path(text))
        if "counts" in counts:
            if counts.get("seq_len", seq_len) != seq_len and sequences is None:
                raise InputError(f"{text}: made for --seq-len {counts['seq_len']}, not {seq_len}; give --sequences too")
            counts = counts["counts"]
    else:
        pairs = [re.fullmatch(r"([^=]+)=(-?\d+)", pair.strip()) for pair in text.split(",")]
        if not all(pairs):
            raise InputError(f"--mix {text}: expected uniform, natural, horizon, FILE.json or arxiv=608,github=226")
        counts = {pair[1]: int(pair[2]) for pair in pairs}
    if not isinstance(counts, dict):
        raise InputError(f"--mix {text}: expected counts by domain")
    Mixture(data, counts, seq_len)  # says what is wrong with them
    return dict(counts) if sequences is None else rescale(counts, sequences)


def defaults(model: GPTNeoX) -> dict:
    """Settings that belong to a model: the post's, or for tiny found by trying. base_lr is for random weights."""
    c, tiny = model.config, SHAPES["tiny"]
    if (c.num_hidden_layers, c.hidden_size) == (tiny.num_hidden_layers, tiny.hidden_size):
        return {"lr": 4e-3, "batch_size": 16, "seq_len": c.max_position_embeddings, "base_lr": 1e-2}
    return {"lr": 1e-5, "batch_size": 64, "seq_len": c.max_position_embeddings, "base_lr": 1e-3}


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear from 0 over the first `warmup` share of the pass, then a cosine to 0; taken at the middle of the step."""
    x = (step + 0.5) / steps
    if x < warmup:
        return peak * x / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (x - warmup) / (1 - warmup)))


def micro_batches(mixture: Mixture, step: int, batch_size: int, micro_batch_size: int):
    """This rank's part of sequences [step B, (step + 1) B), M at a time: tokens (M, T + 1) int64, weights (M, 1) fp32.

    Every rank gets as many micro-batches, each of M rows; rows that fill one up have weight 0.
    """
    rank, world = rank_and_world()
    batch = range(step * batch_size, min((step + 1) * batch_size, len(mixture)))
    mine = batch[rank::world]
    for i in range(0, -(-len(batch) // world), micro_batch_size):
        part = mine[i:i + micro_batch_size]
        rows = [*part, *[batch[0]] * (micro_batch_size - len(part))]
        tokens = np.stack([mixture.row(j)[1] for j in rows]).astype(np.int64)
        yield torch.from_numpy(tokens), (torch.arange(micro_batch_size) < len(part)).float()[:, None]


def make_optimizer(model: GPTNeoX, device: torch.device) -> torch.optim.AdamW:
    """Pythia's AdamW (2304.01373, appendix); matrices decay, biases and norms do not."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=device.type in ("cuda", "cpu"))


def train(model: GPTNeoX, data: Data, counts: dict[str, int], *, seq_len: int, batch_size: int, lr: float,
          micro_batch_size: int | None = None, warmup: float = 0.2, seed: int = 0,
          seen: dict[str, np.ndarray] | None = None, dtype: torch.dtype = torch.float32, eval_every: int = 0,
          eval_sequences: int | None = None, save_every: int = 0, out: Path | None = None,
          title: str = "train") -> GPTNeoX:
    """Train the model, in place, on one pass over the mixture; returns it.

    counts: {domain: sequences of seq_len tokens}. lr: the schedule's peak. warmup: share of the pass. dtype: of
    autocast; the weights stay as they are. out: a folder for log.jsonl and checkpoints; the run goes on from the newest
    one there. eval_every, save_every: in steps, 0 for never. Raises InputError for bad counts and infinite gradients.
    """
    from tqdm import tqdm
    check_fit(model, data, seq_len)
    rank, world = rank_and_world()
    device = next(model.parameters()).device
    mixture = Mixture(data, counts, seq_len, seed, seen)
    steps = -(-len(mixture) // batch_size)
    rows = -(-batch_size // world)  # of a rank, in as few equal parts as fit
    M = micro_batch_size or -(-rows // -(-rows // rows_in_training(model, seq_len, dtype, device)))
    optimizer, parallel, ddp = make_optimizer(model, device), model, world > 1 and not is_sharded(model)
    fewer = f"--micro-batch-size {M // 2}" if M > 1 else "--activation-checkpointing, a shorter --seq-len or --fsdp"
    memory = f"training on {M} sequences of {seq_len} tokens at a time", f"try {fewer}"
    with enough_memory(*memory):
        first = load_checkpoint(out, model, optimizer) if out is not None else 0
        if ddp:
            parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    log = open_log(out / "log.jsonl", first) if out is not None and rank == 0 else None
    flops, peak = flops_per_token(model, seq_len), peak_flops(device, dtype) * world
    bar = tqdm(total=steps, initial=first, desc=title, unit="step", disable=None if rank == 0 else True, leave=False)
    for step in range(first, steps):
        started = time.perf_counter()
        sequences = min(batch_size, len(mixture) - step * batch_size)
        total = torch.zeros((), device=device)
        parts = [(tokens.to(device), weights.to(device))
                 for tokens, weights in micro_batches(mixture, step, batch_size, M)]
        with enough_memory(*memory):
            for i, (tokens, weights) in enumerate(parts):
                parallel.require_backward_grad_sync = i == len(parts) - 1  # read by DDP's forward, so set before it
                with autocast(device, dtype):
                    losses = parallel(tokens[:, :-1], tokens[:, 1:])  # (M, T)
                loss = (losses * weights).sum() / (sequences * seq_len)  # the true number of tokens, on all ranks
                (loss * world).backward()  # DDP and FSDP divide by world
                total += loss.detach()
            if world > 1:
                dist.all_reduce(total)
            norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
            rate = learning_rate(step, steps, lr, warmup)
            if not math.isfinite(norm):
                raise InputError(f"step {step}: the gradient is not finite (loss {total.item()}); "
                                 f"lower --lr, now {lr:g}")
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=not ddp)  # DDP's gradients live in its buckets
        line = {"step": step, "loss": total.item(), "lr": rate, "grad_norm": norm, "sequences": sequences}
        line["tokens_per_second"] = round(sequences * seq_len / (time.perf_counter() - started))
        bar.set_postfix_str(f"loss {line['loss']:.3f}, lr {rate:.1e}, {line['tokens_per_second']:,} tok/s, "
                            f"MFU {line['tokens_per_second'] * flops / peak if peak else 0:.0%}", refresh=False)
        bar.update()
        if eval_every and (step + 1) % eval_every == 0:
            losses = evaluate(model, data, "val", seq_len, dtype, eval_sequences)
            line["val"] = {d: float(values.mean()) for d, values in losses.items()} | {"mean": mean_loss(losses)}
            if rank == 0:
                bar.write(f"step {step + 1}: val " + ", ".join(f"{d} {v:.4f}" for d, v in line["val"].items()))
        if log:
            log.write(json.dumps(line) + "\n")
            log.flush()
        if save_every and out is not None and (step + 1) % save_every == 0 and step + 1 < steps:
            save_checkpoint(out, model, optimizer, step + 1)
    bar.close()
    if log:
        log.close()
    return model


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


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*"))


def save_checkpoint(out: Path, model: GPTNeoX, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights, optimizer state and the step, as a folder that appears whole; then the older ones go."""
    older = [folder for folder in checkpoints(out) if folder.name != f"checkpoint-{step:08d}"]
    weights = gathered({name: p.detach() for name, p in model.named_parameters()})
    state = gathered({f"{name}.{key}": optimizer.state[p][key] for name, p in model.named_parameters()
                      for key in ("exp_avg", "exp_avg_sq")})
    if rank_and_world()[0] > 0:
        return
    with new_folder(out / f"checkpoint-{step:08d}") as folder:
        write_safetensors(folder / "model.safetensors", weights)
        write_safetensors(folder / "optimizer.safetensors", state)
        write_text(folder / "state.json", json.dumps({"step": step}) + "\n")
    for folder in older:
        shutil.rmtree(folder)


def load_checkpoint(out: Path, model: GPTNeoX, optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest checkpoint in `out`, if there is one; returns the step to go on with."""
    found = checkpoints(out)
    if not found:
        return 0
    try:
        step, weights, state = load_json(found[-1] / "state.json")["step"], {}, {}
        if rank_and_world()[0] == 0 or not is_sharded(model):
            weights, state = load_file(found[-1] / "model.safetensors"), load_file(found[-1] / "optimizer.safetensors")
        for name, p in model.named_parameters():
            assign(p, weights[name] if weights else None)
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            for key, moment in moments.items():
                assign(moment, state[f"{name}.{key}"] if state else None)
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
        return step
    except (SafetensorError, KeyError) as e:
        raise InputError(f"{found[-1]}: damaged ({e}); remove it to go on without it") from None


def keep(model: GPTNeoX, data: Data, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save the finished model with its tokenizer; its checkpoints are no longer needed. Every rank must take part."""
    weights = gathered(model.state_dict())
    if rank_and_world()[0] == 0:
        save(model, out, data.folder / "tokenizer.json", dtype, weights)
        for folder in checkpoints(out):
            shutil.rmtree(folder)


def open_log(path: Path, first: int):
    """Open log.jsonl to append, without the lines of steps that will be done again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() and first else []
    write_text(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first))
    return open(path, "a")


def add_options(parser: ArgumentParser, out: str) -> None:
    """The options that train.py and mix.py share."""
    add = parser.add_argument
    add("--data", default=SAMPLE, help="a folder that prepare.py wrote (default: %(default)s)")
    add("--model", default="scratch:tiny", help="a folder, a name on the hub, or scratch:SIZE (default: %(default)s)")
    add("--out", default=out, help="folder of the run (default: %(default)s)")
    add("--sequences", type=int, metavar="N", help="length of a pass (default: %(default)s)")
    add("--seq-len", type=int, metavar="T", help="tokens a sequence (default: the model's context)")
    add("--batch-size", type=int, metavar="B", help="sequences a step, on all ranks together (default: the model's)")
    add("--micro-batch-size", type=int, metavar="M", help="sequences at a time on a rank (default: as logits allow)")
    add("--lr", type=float, help="peak learning rate (default: the model's)")
    add("--warmup", type=float, default=0.2, help="share of the steps (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--eval-sequences", type=int, default=512, metavar="N", help="of a domain, at most (default: %(default)s)")
    add("--save-every", type=int, default=100, metavar="N", help="a checkpoint every N steps (default: %(default)s)")
    add("--save-dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="(default: %(default)s)")
    add("--device", help="(default: cuda where there is one, else cpu)")
    add("--dtype", help="of autocast: float32 or bfloat16 (default: bfloat16 where the hardware has it)")
    add("--no-compile", action="store_true")
    add("--activation-checkpointing", action="store_true", help="keep less for the backward pass, compute more")
    add("--fsdp", action="store_true", help="spread model and optimizer over the ranks, for a model that fits no GPU")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="start anew, over the run in --out")


def open_run(args) -> tuple[Data, GPTNeoX, dict]:
    """Load what the options name; returns the data, the model and train's keyword arguments."""
    for name, low in (("seq_len", 1), ("batch_size", 1), ("micro_batch_size", 1), ("eval_sequences", 1), ("lr", 0),
                      ("warmup", 0), ("save_every", 0), ("seed", 0)):
        value, high = vars(args)[name], 1 if name in ("lr", "warmup") else 2**31
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    data, device, args.model = Data(args.data), start(args.device), pinned(args.model)
    dtype, scratch = autocast_dtype(args.dtype, device), {"vocab_size": data.vocab_size, "seed": args.seed}
    with enough_memory(f"loading {args.model}", "take a smaller one"):
        if args.fsdp:
            model = load(args.model, "meta", **scratch)
            shard(model, dtype, device)
            fill(model, args.model, **scratch)
        else:
            model = load(args.model, device, **scratch)
    model.checkpointing, own = args.activation_checkpointing, defaults(model)
    hyper = {key: own[key] if vars(args)[key] is None else vars(args)[key] for key in ("seq_len", "batch_size", "lr")}
    hyper |= {"micro_batch_size": args.micro_batch_size, "warmup": args.warmup, "seed": args.seed, "dtype": dtype}
    check_fit(model, data, hyper["seq_len"])
    check_tokenizer(args.model, data)
    train_tokens = sum(data.size(d, "train")["tokens"] for d in data.domains)
    for d in data.domains:
        for split in SPLITS:
            window_count(data, d, split, hyper["seq_len"])
    precision = str(dtype).removeprefix("torch.")
    reason = "--dtype" if args.dtype else "the hardware has it" if precision == "bfloat16" else "no fast bfloat16 here"
    compiled, why = (False, "eager (--no-compile)") if args.no_compile else can_compile(device)
    if compiled and args.fsdp and device.type == "cpu" and dtype == torch.bfloat16:
        compiled, why = False, "eager (torch.compile fails on a CPU with bfloat16 parameters)"
    if compiled:
        model.compile_parts()
    say(f"data    {args.data}: {len(data.domains)} domains, {train_tokens:,} training tokens",
        f"model   {args.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {device.type} x "
        f"{rank_and_world()[1]}, {precision} ({reason}), {why}")
    return data, model, hyper


def passes_of(model: str) -> list[dict]:
    """The passes that a model folder says it was trained on."""
    record = Path(model) / "run.json"
    return load_json(record).get("passes", []) if record.is_file() else []


def this_pass(data: Data, hyper: dict, counts: dict[str, int]) -> dict:
    """What a model folder says of the pass it was trained on."""
    return {"data": data.identity, "seq_len": hyper["seq_len"], "seed": hyper["seed"], "counts": counts}


def claim(out: Path, args, data: Data, hyper: dict, more: dict, passes: list[dict]) -> None:
    """Make `out` the folder of this run, or check that it is. Raises InputError before anything is touched."""
    settings = {"model": args.model, "data": data.identity, **hyper, "dtype": str(hyper["dtype"]), **more}
    record = out / "run.json"
    if record.is_file() and args.resume:
        old = load_json(record).get("settings", {})
        different = [f"{key} was {old.get(key)}, is {settings.get(key)}" for key in {**old, **settings}
                     if old.get(key) != settings.get(key)]
        if different:
            raise InputError(f"{out}: --resume with other settings: {'; '.join(different)}")
        return
    if out.exists() and any(out.iterdir()) and not args.overwrite:
        raise InputError(f"{out} holds no run that could be resumed; --overwrite starts one there" if args.resume else
                         f"{out} already holds a run; --resume continues it, --overwrite starts anew")
    barrier()  # every rank has looked before the first one changes anything
    if rank_and_world()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        stale = ("model.safetensors", "run.json", "log.jsonl", "history.jsonl", "result.json", "mix.json", "mix.png",
                 "checkpoint-*", "round-*", "uniform")
        for old in (path for pattern in stale for path in out.glob(pattern)):  # first what makes it a finished run
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        write_text(record, json.dumps({"settings": settings, "passes": passes}, indent=1) + "\n")
    barrier()
    if not record.is_file():
        raise InputError(f"{out}: this node does not see what the first one wrote there; every node must see --out")


def main():
    parser = ArgumentParser(__doc__)
    add_options(parser, "out/train")
    parser.add_argument("--mix", default="uniform", help="uniform, natural, horizon, FILE.json, or counts like "
                                                         "arxiv=608,github=226 (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=0, metavar="N", help="validation losses every N steps")
    args = parser.parse_args()
    data, model, hyper = open_run(args)
    T, dtype, out = hyper["seq_len"], hyper["dtype"], Path(args.out)
    counts = parse_mixture(args.mix, data, args.sequences, T)
    repeats = Mixture(data, counts, T).repeats()
    passes = passes_of(args.model)
    claim(out, args, data, hyper, {"counts": counts}, passes + [this_pass(data, hyper, counts)])
    if not (out / "model.safetensors").is_file():
        say(f"pass    {sum(counts.values()):,} sequences of {T} tokens, {hyper['batch_size']} a step, "
            f"lr {hyper['lr']:g}; times through a domain: " + ", ".join(f"{d} {r:.2f}" for d, r in repeats.items()))
        losses = {"before": evaluate(model, data, "val", T, dtype, args.eval_sequences)}
        train(model, data, counts, **hyper, seen=times_seen(data, T, passes), eval_every=args.eval_every,
              eval_sequences=args.eval_sequences, save_every=args.save_every, out=out)
        losses["after"] = evaluate(model, data, "val", T, dtype, args.eval_sequences)
        if rank_and_world()[0] == 0:
            write_text(out / "result.json", json.dumps(results(losses, data, "val", T), indent=1) + "\n")
            card = model_card(out.name, args.model, data, counts, hyper, load_json(out / "result.json"), passes)
            write_text(out / "README.md", card)
        keep(model, data, out, getattr(torch, args.save_dtype))
        barrier()
    if rank_and_world()[0] == 0:
        result = load_json(out / "result.json")
        say(f"validation losses, {T} tokens a sequence", table(result), f"model and log in {out}")
    finish()


if __name__ == "__main__":
    cli(main, RESUME_HINT)
