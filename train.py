"""One model, one mixture, one short pass: continued pretraining on exactly the sequences that the mixture counts.

    python train.py --mix uniform --sequences 800                   # scratch:tiny on data/sample; seconds on a CPU
    python train.py --data data/pile --model pythia-1b --mix out/mix/mix.json --out out/pythia-1b
    torchrun --nproc_per_node=8 train.py --data data/pile --model pythia-1b --mix horizon --out out/horizon

The order of the pass is a pure function of data, counts and seed; ranks, micro-batches and restarts only slice it.
"""
import contextlib
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
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from eval import (Stopped, asked, assign, autocast, autocast_dtype, barrier, can_compile, check_data, check_fit,
                  check_tokenizer, enough_memory, evaluate, fill, finish, flops_per_token, gathered, is_sharded,
                  mean_loss, model_card, peak_flops, pinned, rank_and_world, results, rows_in_training, say, shard,
                  start, stoppable, table, whole, window_count)
from model import SHAPES, GPTNeoX, load, load_json, replacing, save, sync, write_safetensors, write_text
from prepare import SAMPLE, SPLITS, ArgumentParser, Data, InputError, cli, hold

HORIZON = {"arxiv": 608, "books": 613, "github": 226, "web": 8516, "wikipedia": 1438}  # the published mixture
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
    """This rank's part of sequences [step B, (step + 1) B), M at a time: tokens (M, T + 1) int64, weights (M, 1)
    fp32 and numbers. Every rank gets as many micro-batches, each of M rows; rows that fill one up have weight 0."""
    rank, world = rank_and_world()
    batch = range(step * batch_size, min((step + 1) * batch_size, len(mixture)))
    mine = batch[rank::world]
    for i in range(0, -(-len(batch) // world), micro_batch_size):
        part = mine[i:i + micro_batch_size]
        rows = [*part, *[batch[0]] * (micro_batch_size - len(part))]
        tokens = np.stack([mixture.row(j)[1] for j in rows]).astype(np.int64)
        yield torch.from_numpy(tokens), (torch.arange(micro_batch_size) < len(part)).float()[:, None], rows


def make_optimizer(model: GPTNeoX, device: torch.device) -> torch.optim.AdamW:
    """Pythia's AdamW (2304.01373, appendix); matrices decay, biases and norms do not."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=device.type in ("cuda", "cpu"))


def train(model: GPTNeoX, data: Data, counts: dict[str, int], *, seq_len: int, batch_size: int, lr: float,
          micro_batch_size: int | None = None, warmup: float = 0.2, seed: int = 0,
          seen: dict[str, np.ndarray] | None = None, dtype: torch.dtype = torch.float32, eval_every: int = 0,
          eval_sequences: int | None = None, save_every: int = 0, out: Path | None = None,
          title: str = "train", weigh=None) -> GPTNeoX:
    """Train the model, in place, on one pass over the mixture; returns it.

    counts: {domain: sequences of seq_len tokens}. lr: the schedule's peak. warmup: share of the pass. dtype: of
    autocast; the weights stay as they are. out: a folder for log.jsonl and checkpoints; the run goes on from the newest
    sound one there. eval_every, save_every: in steps, 0 for never. weigh(step, rows, losses, weights) gives the weights
    that sequences `rows` of the pass, (M, 1), have instead. A step whose loss or gradient is not finite leaves the
    model as it is. Raises InputError for bad counts and after three such steps in a row, Stopped after a signal.
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
        first, updates, in_a_row = load_checkpoint(out, model, optimizer) if out is not None else (0, 0, 0)
        if ddp:
            parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    log = cut_log(out / "log.jsonl", first) if out is not None and rank == 0 else None
    flops, peak = flops_per_token(model, seq_len), peak_flops(device, dtype) * world
    bar = tqdm(total=steps, initial=first, desc=title, unit="step", disable=None if rank == 0 else True, leave=False)
    for step in range(first, steps):
        started = time.perf_counter()
        batch = range(step * batch_size, min((step + 1) * batch_size, len(mixture)))
        total = torch.zeros(2, device=device)  # the loss, and the signals that came to any rank
        parts = [(tokens.to(device), weights.to(device), rows)
                 for tokens, weights, rows in micro_batches(mixture, step, batch_size, M)]
        with enough_memory(*memory):
            for i, (tokens, weights, rows) in enumerate(parts):
                parallel.require_backward_grad_sync = i == len(parts) - 1  # read by DDP's forward, so set before it
                with autocast(device, dtype):
                    losses = parallel(tokens[:, :-1], tokens[:, 1:])  # (M, T)
                weights = weigh(step, rows, losses.detach(), weights) if weigh else weights
                loss = (losses * weights).sum() / (len(batch) * seq_len)  # the true number of tokens, on all ranks
                (loss * world).backward()  # DDP and FSDP divide by world
                total[0] += loss.detach()
            total[1] = len(asked)
            if world > 1:
                dist.all_reduce(total)
            norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
            (loss, stop), rate = total.tolist(), learning_rate(step, steps, lr, warmup)
            finite = math.isfinite(loss) and math.isfinite(norm)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=not ddp)  # DDP's gradients live in its buckets
        line = {"step": step, "loss": loss, "lr": rate, "grad_norm": norm, "sequences": len(batch)}
        line["tokens_per_second"] = round(len(batch) * seq_len / (time.perf_counter() - started))
        if not finite:
            line |= {"loss": None, "grad_norm": None, "skipped": list(batch)}
            say(f"\nstep {step}: loss {loss}, gradient norm {norm}: no update from sequences {batch[0]} to {batch[-1]}")
        updates, in_a_row = updates + finite, 0 if finite else in_a_row + 1
        bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.1e}, {line['tokens_per_second']:,} tok/s, "
                            f"MFU {line['tokens_per_second'] * flops / peak if peak else 0:.0%}", refresh=False)
        bar.update()
        if eval_every and (step + 1) % eval_every == 0:
            losses = evaluate(model, data, "val", seq_len, dtype, eval_sequences)
            line["val"] = {d: float(values.mean()) for d, values in losses.items()} | {"mean": mean_loss(losses)}
            if rank == 0:
                bar.write(f"step {step + 1}: val " + ", ".join(f"{d} {v:.4f}" for d, v in line["val"].items()))
        if log:
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
        if in_a_row == 3:
            raise InputError(f"{title}: loss or gradient not finite in steps {step - 2} to {step}, sequences "
                             f"{(step - 2) * batch_size} to {batch[-1]}; look at these, or lower --lr, now {lr:g}")
        if out is not None and (stop or step + 1 < steps and save_every and (step + 1) % save_every == 0):
            save_checkpoint(out, model, optimizer, (step + 1, updates, in_a_row))
        if stop:
            raise Stopped(f"{title}: stopped {'and saved ' if out else ''}after step {step + 1} of {steps}")
    bar.close()
    return model


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-" + 8 * "[0-9]"))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(out: Path, model: GPTNeoX, optimizer: torch.optim.Optimizer, state: tuple[int, int, int]) -> None:
    """Weights, optimizer and state, with the sha256 of each in manifest.json, as a folder that appears whole; the
    newest two stay. state: steps done, the updates that they made, and how many of the last ones made none."""
    step, updates, in_a_row = state
    weights = gathered({name: p.detach() for name, p in model.named_parameters()})
    moments = gathered({f"{name}.{key}": optimizer.state[p][key] for name, p in model.named_parameters()
                        for key in ("exp_avg", "exp_avg_sq") if updates})
    if rank_and_world()[0] > 0:
        return
    with replacing(out / f"checkpoint-{step:08d}") as folder:
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", weights)
        write_safetensors(folder / "optimizer.safetensors", moments)
        write_text(folder / "state.json", json.dumps({"step": step, "updates": updates, "in_a_row": in_a_row}) + "\n")
        hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        write_text(folder / "manifest.json", json.dumps(hashes, indent=1) + "\n")
        sync(out / "log.jsonl")
        shutil.rmtree(out / f"checkpoint-{step:08d}", ignore_errors=True)  # one that was passed over
    for other in sorted(checkpoints(out), key=lambda path: int(path.name[-8:]) <= step)[:-2]:  # passed over, or older
        shutil.rmtree(other)


def load_checkpoint(out: Path, model: GPTNeoX, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Restore the newest sound checkpoint in `out`, saying which are passed over, and return its state. What a killed
    process left half written is removed."""
    found = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    if rank_and_world()[0] == 0:
        for leftover in out.glob(".*.partial"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for folder in reversed(checkpoints(out)):
            try:
                for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
                    if sha256(folder / name) != load_json(folder / "manifest.json").get(name):
                        raise InputError(f"{name} is not what it was when it was saved")
                found += int(folder.name[-8:])
                break
            except (OSError, InputError) as e:
                say(f"{folder} is damaged and passed over: {e}")
    if dist.is_initialized():
        dist.broadcast(found, 0)
    if not found:
        return 0, 0, 0
    folder, weights, moments = out / f"checkpoint-{found.item():08d}", {}, {}
    say(f"going on from {folder}")
    step, updates, in_a_row = (load_json(folder / "state.json")[key] for key in ("step", "updates", "in_a_row"))
    if rank_and_world()[0] == 0 or not is_sharded(model):
        weights, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    for name, p in model.named_parameters():
        assign(p, weights[name] if weights else None)
        own = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq") if updates}
        for key, moment in own.items():
            assign(moment, moments[f"{name}.{key}"] if moments else None)
        if updates:
            optimizer.state[p] = {"step": torch.tensor(float(updates), device=p.device), **own}
    return step, updates, in_a_row


def keep(model: GPTNeoX, data: Data, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save the finished model with its tokenizer, if that is not done, and remove its checkpoints; on every rank."""
    weights = gathered({name: weight.to(dtype) for name, weight in model.state_dict().items()})
    if rank_and_world()[0] == 0:
        if not (out / "model.safetensors").is_file():
            save(model, out, data.folder / "tokenizer.json", dtype, weights)
        for folder in checkpoints(out):
            shutil.rmtree(folder)
    barrier()  # the others may read what the first rank wrote


def cut_log(path: Path, first: int) -> Path:
    """Leave in log.jsonl the lines of the steps before `first`: the others will be done again."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    write_text(path, "".join(f"{line}\n" for line in lines[:first]))
    return path


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
    add("--dtype", choices=("float32", "bfloat16"), help="of autocast (default: bfloat16 where it is fast)")
    add("--no-compile", action="store_true")
    add("--activation-checkpointing", action="store_true", help="keep less for the backward pass, compute more")
    add("--fsdp", action="store_true", help="spread model and optimizer over the ranks, for a model that fits no GPU")
    add("--check-data", action="store_true", help="hash all of the data first, not a sample of it")
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
    check_data(data, args.check_data)
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
    say(f"data    {args.data}: {sum(data.size(d, 'train')['tokens'] for d in data.domains):,} training tokens of "
        f"{len(data.domains)} domains",
        f"model   {args.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {device.type} x "
        f"{rank_and_world()[1]}, {precision} ({reason}), {why}")
    return data, model, hyper


def passes_of(model: str) -> list[dict]:
    """The passes that a model folder says it was trained on."""
    record = Path(model) / "run.json"
    return load_json(record).get("passes", []) if record.is_file() else []


def this_pass(data: Data, hyper: dict, counts: dict[str, int]) -> dict:
    return {"data": data.identity, "seq_len": hyper["seq_len"], "seed": hyper["seed"], "counts": counts}


@contextlib.contextmanager
def claim(out: Path, args, data: Data, hyper: dict, more: dict, passes: list[dict]):
    """Make `out` this run's folder, or check that it is, and keep others out. Raises InputError first of all."""
    record = out / "run.json"
    with contextlib.ExitStack() as stack:
        if rank_and_world()[0] == 0:
            files = [sha256(path)[:16] for path in sorted(Path(args.model).glob("*"))
                     if path.suffix == ".safetensors" or path.name in ("config.json", "run.json")]
            settings = {"model": args.model, "model's files": files, "data": data.identity,
                        "tokenizer": data.meta["tokenizer"]["sha256"], **hyper, "dtype": str(hyper["dtype"]), **more}
            del settings["micro_batch_size"]  # which may change
            resuming = args.resume and record.is_file()
            old = load_json(record).get("settings", {}) if resuming else settings
            if old != settings:
                different = [f"{key} was {old.get(key)}, is {settings.get(key)}" for key in {**old, **settings}
                             if old.get(key) != settings.get(key)]
                raise InputError(f"{out}: --resume with other settings: {'; '.join(different)}")
            if not resuming and out.exists() and {path.name for path in out.iterdir()} - {".lock", ".run.json.partial"}:
                if not (args.overwrite and record.is_file()):
                    raise InputError(f"{out} is not empty; --resume continues a run there, --overwrite starts it anew")
                if Path(args.model).resolve().is_relative_to(out.resolve()):
                    raise InputError(f"{out}: --overwrite would remove {args.model}; choose another --out")
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(out / ".lock", out))
            if not resuming:
                stale = ("model.safetensors", "checkpoint-*", "history.jsonl", "round-*", "only-*", "more-*", "uniform",
                         "found", "log.jsonl", "result.json", "mix.json", "mix.png")  # first what makes it finished
                for path in (path for pattern in stale for path in out.glob(pattern)):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                write_text(record, json.dumps({"settings": settings, "passes": passes}, indent=1) + "\n")
        barrier()
        if not record.is_file():
            raise InputError(f"{out}: this node does not see what the first one wrote there; every node must see --out")
        yield


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
    repeats = Mixture(data, counts, T).repeats().items()
    passes = passes_of(args.model)
    with claim(out, args, data, hyper, {"counts": counts}, passes + [this_pass(data, hyper, counts)]), stoppable():
        if not (out / "model.safetensors").is_file():
            say(f"pass    {sum(counts.values()):,} sequences of {T} tokens, {hyper['batch_size']} a step, "
                f"lr {hyper['lr']:g}; times through a domain: " + ", ".join(f"{d} {r:.2f}" for d, r in repeats))
            losses = {"before": evaluate(model, data, "val", T, dtype, args.eval_sequences)}
            train(model, data, counts, **hyper, seen=times_seen(data, T, passes), eval_every=args.eval_every,
                  eval_sequences=args.eval_sequences, save_every=args.save_every, out=out)
            losses["after"] = evaluate(model, data, "val", T, dtype, args.eval_sequences)
            if rank_and_world()[0] == 0:
                write_text(out / "result.json", json.dumps(results(losses, data, "val", T), indent=1) + "\n")
                card = model_card(out.name, args.model, data, counts, hyper, load_json(out / "result.json"), passes)
                write_text(out / "README.md", card)
        keep(model, data, out, getattr(torch, args.save_dtype))
    if rank_and_world()[0] == 0:
        result = load_json(out / "result.json")
        say(f"validation losses, {T} tokens a sequence", table(result), f"model and log in {out}")
    finish()


if __name__ == "__main__":
    cli(main, RESUME_HINT)
