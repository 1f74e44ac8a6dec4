"""How well models predict each domain: a table of losses, with intervals, beside a baseline.

    python eval.py scratch:tiny out/mix --data data/sample
    python eval.py pythia-1b out/uniform out/found --baseline out/uniform --data data/pile
    torchrun --nproc_per_node=8 eval.py pythia-1b out/horizon --data data/pile --json losses.json

Every window of a split is scored once. Differences are paired, and their intervals resample
documents, not windows.
"""

import gc
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model import (
    GPTNeoX,
    add_up,
    autocast,
    autocast_dtype,
    can_compile,
    compile_for,
    enough_memory,
    finish,
    load,
    model_folder,
    pinned,
    rank,
    say,
    sequences_at_once,
    start,
    where_it_runs,
    world_size,
)
from prepare import (
    FEW_DOCUMENTS,
    SAMPLE,
    SPLITS,
    ArgumentParser,
    Bar,
    Data,
    InputError,
    check_place,
    check_range,
    cli,
    shortened,
    write_json,
)

Losses = dict[str, np.ndarray]  # by domain: the mean loss of every sequence (n,), nats per token


# ---- evaluate ----


def check_fit(model: GPTNeoX, data: Data, seq_len: int, name: str = "the model") -> None:
    """Raise InputError if the model cannot read the data, or sequences of seq_len tokens."""
    c = model.config
    longest = c.max_position_embeddings
    if seq_len > longest:
        ways = f"give --seq-len {longest} or less"
        raise InputError(f"--seq-len {seq_len}: {name} reads at most {longest} tokens; {ways}")
    if data.vocab_size > c.vocab_size:
        sizes = f"its tokenizer has {data.vocab_size:,} tokens, {name} only {c.vocab_size:,}"
        raise InputError(f"{data.folder}: {sizes}; prepare the data with the model's tokenizer")


def check_tokens(tokens: torch.Tensor, model: GPTNeoX, data: Data) -> None:
    """Raise InputError if a batch of the data has tokens that the model does not know."""
    if tokens.max() >= model.config.vocab_size:
        damaged = "a bin is damaged, it has tokens beyond the vocabulary"
        raise InputError(f"{data.folder}: {damaged}; --check-data tells which")


def warn_of_another_tokenizer(model: str, data: Data) -> None:
    """Warn if a model comes with another tokenizer than the data was made with."""
    if model.startswith("scratch:"):
        return
    path = model_folder(model) / "tokenizer.json"
    if path.is_file():
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if sha256 != data.meta["tokenizer"]["sha256"]:
            other = f"{path} is not the tokenizer of {data.folder}"
            say(f"warning: {other}; the losses may mean nothing")


def evaluated_windows(
    data: Data, domain: str, split: str, seq_len: int, limit: int | None = None
) -> np.ndarray:
    """The numbers of the windows that stand for a split: all, or `limit` of them, evenly spaced."""
    count = data.windows(domain, split, seq_len)
    n = min(count, limit or count)
    return np.arange(n) * count // n


def batch_of(
    model: GPTNeoX, data: Data, split: str, seq_len: int, rows: list[tuple[str, int]], B: int
) -> torch.Tensor:
    """These windows, (domain, number) each, then zeros up to B rows: (B, T + 1) int64."""
    batch = np.zeros((B, seq_len + 1), dtype=np.int64)
    for row, (domain, number) in zip(batch, rows, strict=False):
        row[:] = data.window(domain, split, seq_len, number)
    tokens = torch.from_numpy(batch)
    check_tokens(tokens, model, data)
    return tokens


@torch.no_grad()
def evaluate(
    model: GPTNeoX,
    data: Data,
    split: str,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
    after_batch: Callable[[], None] | None = None,
    per_token: bool = False,
) -> Losses:
    """Mean loss of every sequence of every domain's split: {domain: (n,) float64}, nats per token.

    limit: at most this many sequences of each domain, evenly spaced. after_batch: may raise, to
    stop here. per_token: the loss of every token instead, (n, T) float32, 4 n T bytes a domain.
    Under torchrun the ranks share the work and return the same. Touches no random state. Raises
    InputError where a split is shorter than one sequence, or a loss is not finite.
    """
    check_fit(model, data, seq_len)
    device = model.device
    numbers = {d: evaluated_windows(data, d, split, seq_len, limit) for d in data.domains}
    windows = [(d, number) for d in data.domains for number in numbers[d]]
    if per_token:
        losses = torch.zeros(len(windows), seq_len)
    else:
        losses = torch.zeros(len(windows), dtype=torch.float64)

    # Always B rows, so that a compiled model sees one shape; and equally many batches on every
    # rank, the last of which may be all padding.
    fits = sequences_at_once(model, seq_len, dtype, device, training=False)
    B = min(fits, math.ceil(len(windows) / world_size()))
    stride = world_size() * B
    batches = math.ceil(len(windows) / stride)
    what = f"evaluating {B} sequences of {seq_len} tokens"
    memory = (what, "try a shorter --seq-len or a smaller model")
    with enough_memory(*memory):
        compile_for(model, B, seq_len, dtype, training=False)
    # Every rank fills its own places in `losses`, 0 elsewhere; then the ranks' arrays are added up.
    with enough_memory(*memory), Bar(f"evaluate {split}", batches, "batch") as bar:
        for number in range(batches):
            i = number * stride + rank() * B
            rows = windows[i : i + B]
            tokens = batch_of(model, data, split, seq_len, rows, B).to(device)
            with autocast(device, dtype):
                found = model(tokens[:, :-1], tokens[:, 1:])
                if not per_token:
                    found = found.mean(1)
            losses[i : i + len(rows)] = found[: len(rows)].cpu()
            if after_batch:
                after_batch()
            bar.to(number + 1)
    if world_size() > 1:
        losses = add_up(losses.to(device))

    # Split them by domain again.
    ends = np.cumsum([len(numbers[d]) for d in data.domains])
    by_domain = np.split(losses.cpu().numpy(), ends[:-1])
    losses_of = dict(zip(data.domains, by_domain, strict=True))
    for domain, values in losses_of.items():
        check_losses(values, f"{domain}'s {split} split")
    return losses_of


def check_losses(values: np.ndarray, where: str) -> None:
    """Raise InputError if a sequence's loss, or one of its tokens', is not finite."""
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        reason = "weights are damaged, too large for --dtype, or of too high a learning rate"
        raise InputError(f"{where}: the loss of sequence {finite.argmin()} is not finite; {reason}")


def domain_means(losses: Losses) -> np.ndarray:
    """(D,), in the order of the domains."""
    return np.array([values.mean() for values in losses.values()])


# ---- intervals ----


def bootstrap(
    differences: np.ndarray, documents: np.ndarray, resamples: int = 2000, seed: int = 0
) -> np.ndarray:
    """Means (resamples,) over resampled documents, each taken with all its sequences.

    differences: (n,), of every sequence. documents: (n,), the document each belongs to.
    """
    _, index = np.unique(documents, return_inverse=True)
    total = np.bincount(index, weights=differences)
    size = np.bincount(index)
    n = len(size)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(0, resamples, 100):  # a (100, n) table at a time
        draws = rng.multinomial(n, np.full(n, 1 / n), size=min(100, resamples - i))
        means[i : i + 100] = (draws @ total) / (draws @ size)
    return means


def interval(means: np.ndarray) -> list[float]:
    """The 95% interval of resampled means."""
    return [float(x) for x in np.quantile(means, (0.025, 0.975))]


def resampled_changes(
    baseline: Losses, other: Losses, data: Data, split: str, seq_len: int
) -> np.ndarray:
    """Mean changes of losses, other - baseline, over resampled documents: (D, resamples).

    Domains are resampled independently, and the documents drawn are the same for any two models.
    """
    rows = []
    for k, domain in enumerate(baseline):
        # Paired: both models on the same window, so that how hard it is cancels out.
        difference = other[domain] - baseline[domain]
        numbers = evaluated_windows(data, domain, split, seq_len, len(difference))
        documents = data.documents_of(domain, split, seq_len, numbers)
        rows.append(bootstrap(difference, documents, seed=k))
    return np.array(rows)


@dataclass(frozen=True)
class Objective:
    """What a model is judged by: a weighted mean of its losses or, without weights, the largest
    change of any domain's loss from the untouched model's."""

    name: str
    weights: np.ndarray | None  # (D,), of sum 1

    def of(self, changes: np.ndarray) -> np.ndarray:
        """The objective (…) of changes (D, …) in the losses from the untouched model's."""
        if self.weights is None:
            return changes.max(0)
        return np.tensordot(self.weights, changes, 1)

    def only(self, domains: list[str], some: list[str]) -> "Objective | None":
        """The same for some of the domains alone; None where these do not count."""
        if not some:
            return None
        if self.weights is None:
            return self
        weights = np.array([w for d, w in zip(domains, self.weights, strict=True) if d in some])
        if not weights.any():
            return None
        return Objective(self.name, weights / weights.sum())


WORST = Objective("worst", None)


def parse_objective(text: str, domains: list[str]) -> Objective:
    """--objective: mean, worst or "arxiv=2,web=1" (others 0). Raises InputError."""
    if text == "worst":
        return WORST
    if text == "mean":
        return Objective(text, np.full(len(domains), 1 / len(domains)))
    weights = dict.fromkeys(domains, 0.0)
    for pair in text.split(","):
        match = re.fullmatch(r"([^=]+)=(\d{1,9}(?:\.\d{1,9})?)", pair.strip())
        if not match:
            expected = f"mean, worst, or weights like {domains[0]}=2"
            raise InputError(f"--objective {text}: expected {expected}")
        if match[1] not in weights:
            there_are = f"there are {', '.join(domains)}"
            raise InputError(f"--objective {text}: no domain {match[1]!r}; {there_are}")
        if weights[match[1]]:
            raise InputError(f"--objective {text}: {match[1]} is named twice; name each once")
        weights[match[1]] = float(match[2])
    total = sum(weights.values())
    if not total:
        raise InputError(f"--objective {text}: every weight is zero")
    return Objective("goal", np.array(list(weights.values())) / total)


def compare(baseline: Losses, other: Losses, data: Data, split: str, seq_len: int) -> dict:
    """other - baseline in nats per token.

    {domain or "mean": {"change", "interval"}, "improved": number of domains, "worst": change}.
    """
    changes = domain_means(other) - domain_means(baseline)
    resampled = resampled_changes(baseline, other, data, split, seq_len)
    rows = {}
    for domain, change, means in zip(baseline, changes, resampled, strict=True):
        rows[domain] = {"change": float(change), "interval": interval(means)}
    rows["mean"] = {"change": float(changes.mean()), "interval": interval(resampled.mean(0))}
    return {**rows, "improved": int((changes < 0).sum()), "worst": float(changes.max())}


def judge(
    untouched: Losses,
    baseline: Losses,
    other: Losses,
    data: Data,
    split: str,
    seq_len: int,
    objective: Objective,
) -> dict:
    """other's objective - baseline's: {"change", "interval"}, in nats per token."""
    changes = []
    resampled = []
    for losses in (baseline, other):
        changes.append(objective.of(domain_means(losses) - domain_means(untouched)))
        means = resampled_changes(untouched, losses, data, split, seq_len)
        resampled.append(objective.of(means))
    change = float(changes[1] - changes[0])
    found = interval(resampled[1] - resampled[0])
    # Where domains change alike, resampled maxima lie to one side of the maximum that was found: so
    # the interval of a maximum reaches as far to the other side.
    if objective.weights is None:
        reach = max(change - found[0], found[1] - change)
        found = [change - reach, change + reach]
    return {"change": change, "interval": found}


# ---- results ----


# What a sound result.json has at least.
RESULT = {"split": str, "seq_len": int, "domains": dict, "models": dict}


def results(
    losses: dict[str, Losses],
    data: Data,
    split: str,
    seq_len: int,
    objective: Objective | None = None,
) -> dict:
    """All that the table shows. losses: {model: its losses}; the first model is the baseline.

    Bits per byte are nats x tokens / (ln 2 x UTF-8 bytes of the text). objective: what the models
    were made for.
    """
    baseline = next(iter(losses.values()))
    domains = {}
    models = {}
    for domain, values in baseline.items():
        numbers = evaluated_windows(data, domain, split, seq_len, len(values))
        documents = np.unique(data.documents_of(domain, split, seq_len, numbers))
        domains[domain] = {"sequences": len(values), "documents": len(documents)}
    for name, by_domain in losses.items():
        nats = {}
        bits = {}
        for domain, values in by_domain.items():
            size = data.size(domain, split)
            nats[domain] = float(values.mean())
            bits[domain] = nats[domain] / math.log(2) * size["tokens"] / size["bytes"]
        nats["mean"] = float(np.mean(list(nats.values())))
        bits["mean"] = float(np.mean(list(bits.values())))
        models[name] = {"nats": nats, "bits_per_byte": bits}
        if by_domain is not baseline:
            models[name]["difference"] = compare(baseline, by_domain, data, split, seq_len)
            if objective and objective.name != "mean":
                row = judge(baseline, baseline, by_domain, data, split, seq_len, objective)
                models[name]["objective"] = row | {"name": objective.name}
    return {
        "data": str(data.folder),
        "split": split,
        "seq_len": seq_len,
        "domains": domains,
        "models": models,
    }


def signed(row: dict) -> str:
    """A change and its interval, in 26 columns."""
    low, high = row["interval"]
    return f"{row['change']:+.4f} [{low:+.4f}, {high:+.4f}]"


def table(result: dict) -> str:
    """The results as text, within 100 columns: domains down, the baseline and two others across.

    Further models stand in blocks of their own, each below the last.
    """
    baseline, *others = result["models"]
    domains = result["domains"]
    few = [d for d, n in domains.items() if n["documents"] < FEW_DOCUMENTS]
    rows = shortened([*domains, "mean"], 17)
    columns = shortened([baseline, *others], 26) | shortened([baseline], 12)
    width = max(len("domains better"), *map(len, rows.values())) + 1  # with a mark
    models = result["models"]
    lines = []
    for i in range(0, max(1, len(others)), 2):
        shown = others[i : i + 2]
        differences = [models[name]["difference"] for name in shown]
        cells = [
            ["", "", columns[baseline], *(columns[name] for name in shown)],
            ["domain", "documents", "nats", *["change in nats [95%]"] * len(shown)],
        ]
        for d, label in rows.items():
            mark = "*" if d in few else ""
            documents = f"{domains[d]['documents']:,}" if d in domains else ""
            nats = f"{models[baseline]['nats'][d]:.4f}"
            cells.append([label + mark, documents, nats, *(signed(x[d]) for x in differences)])
        better = [
            f"{x['improved']} of {len(domains)}, worst {x['worst']:+.4f}" for x in differences
        ]
        if better:
            cells.append(["domains better", "", "", *better])
        if shown and "objective" in models[shown[0]]:
            judged = [models[name]["objective"] for name in shown]
            cells.append([judged[0].get("name", "goal"), "", "", *map(signed, judged)])
        bits = [models[name]["bits_per_byte"]["mean"] for name in (baseline, *shown)]
        cells.append(["bits per byte", "", *(f"{value:.4f}" for value in bits)])
        if lines:
            lines.append("")
        for label, documents, nats, *changes in cells:
            line = f"{label:<{width}}{documents:>10}  {nats:>12}"
            lines.append(line + "".join(f"   {change:<26}" for change in changes))
    if few:
        lines.append(f"* fewer than {FEW_DOCUMENTS} documents: too few to say anything")
    for name, short in (rows | columns).items():
        if short != name:
            lines.append(f"{short} is {name}")
    return "\n".join(line.rstrip() for line in lines)


# ---- main ----


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders or names on the hub")
    add("--baseline", metavar="MODEL", help="what the others are compared with; default: the first")
    add("--data", default=SAMPLE, help="a folder that prepare.py wrote")
    add("--split", default="test", choices=SPLITS, help="which documents")
    tokens = "tokens a sequence; default: the baseline's context"
    add("--seq-len", type=int, metavar="T", help=tokens)
    add("--json", metavar="FILE", help="write the numbers there too")
    add("--device", help="default: cuda where there is one, else cpu")
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, help="of autocast; default: bfloat16 where it is fast")
    add("--no-compile", action="store_true", help="do without torch.compile")
    add("--check-data", action="store_true", help="compare the data with its hashes first")
    args = parser.parse_args()
    check_range(args, ("seq_len",), 1)

    def resolved(name: str) -> Path | str:
        return Path(name).resolve() if Path(name).exists() else name

    if len(set(map(resolved, args.models))) < len(args.models):
        raise InputError("the same model is named twice")
    if args.baseline:  # it comes first, whether it was named among the models or not
        others = [name for name in args.models if resolved(name) != resolved(args.baseline)]
        args.models = [args.baseline, *others]
    if args.json:
        check_place(Path(args.json), "--json")
        if Path(args.json).is_dir():
            raise InputError(f"--json {args.json} is a folder; name a file")
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    data = Data(args.data)
    device = start(args.device)
    if args.check_data:
        data.check()
    seq_len = args.seq_len
    for name in args.models:  # what is wrong with any of them is said before the first is read
        shape = load(name, "meta", vocab_size=data.vocab_size)
        seq_len = seq_len or shape.config.max_position_embeddings
        check_fit(shape, data, seq_len, name)
        warn_of_another_tokenizer(name, data)
    dtype = autocast_dtype(args.dtype, device)
    compiles, how = can_compile(device, args.no_compile)
    say(f"on {where_it_runs(device, dtype)}, {how}")
    losses = {}
    for name in args.models:
        model = load(name, device, vocab_size=data.vocab_size)
        model.to_compile = compiles
        losses[name] = evaluate(model, data, args.split, seq_len, dtype)
        say(f"{name}: {domain_means(losses[name]).mean():.4f} nats per token in the mean")
        del model
        gc.collect()  # a compiled model refers to itself
    if rank() == 0:
        result = results(losses, data, args.split, seq_len)
        say(f"{args.split} split of {args.data}, {seq_len} tokens a sequence", table(result))
        if args.json:
            names = {name: pinned(name) for name in args.models}
            write_json(Path(args.json), result | {"names": names})
    finish()


if __name__ == "__main__":
    cli(main)
