"""The search as a user runs it: its rules, its rounds, what it leaves, and how it goes on."""

import json
import os
import re
import shutil
import time

import conftest
import numpy as np
import pytest
import torch
from conftest import Run, ends_well, fails, options, ranks, run_script, same_weights, train_options
from matplotlib.figure import Figure

import mix
import prepare
import train
from eval import evaluate, parse_objective, results
from mix import METHODS, RULES, Runs, update
from model import can_compile, load
from prepare import Data, InputError
from train import Hyperparameters

LN = np.log


# ---- the rules ----


@pytest.mark.parametrize(
    "A, losses, rule, rate, expected",
    [
        # Losses ln 1, ln 2, ln 1: their softmax is 1/4, 1/2, 1/4.
        ([100, 100, 100], LN([1, 2, 1]), "multiplicative", 2, [150, 200, 150]),
        ([100, 100, 100], LN([1, 2, 1]), "additive", 100, [125, 150, 125]),
        ([100, 100, 100], LN([1, 2, 1]), "share", 1, [175, 250, 175]),
        # Losses 0, ln 3: 1/4, 3/4; only differences count, and nothing overflows.
        ([300, 20], 800 + LN([1, 3]), "multiplicative", 4, [600, 80]),
        ([300, 20], LN([1, 3]), "additive", 4, [301, 23]),
        ([300, 20], LN([1, 3]), "share", 0.5, [340, 140]),
    ],
)
def test_rules_by_hand(A, losses, rule, rate, expected):
    assert update(np.array(A), losses, rate, rule) == pytest.approx(expected)


@pytest.mark.parametrize("rule, rate, within", [("share", 0.5, 1e-6), ("additive", 5000, 1e-2)])
def test_these_rules_settle_on_the_softmax_of_the_losses(rule, rate, within):
    A = np.array([1000.0, 10, 10])
    for _ in range(200):
        A = update(A, LN([1, 2, 1]), rate, rule)
    assert A / A.sum() == pytest.approx([0.25, 0.5, 0.25], abs=within)


def test_an_unknown_rule_is_refused():
    with pytest.raises(InputError, match="multiplicative, additive, share"):
        update([1], [1], 1, "exotic")


def test_the_lopsided_mixture_prefers_larger_domains(data):
    counts = mix.lopsided(data, 1000)
    ranked = sorted(data.domains, key=lambda d: data.size(d, "train")["tokens"])
    assert sum(counts.values()) == 1000
    assert sorted(counts, key=counts.get) == ranked
    assert counts[ranked[0]] < 1000 / 7 < 1000 / 2 < counts[ranked[2]]


# ---- searches ----


def mix_options(data, model, out, **changes) -> list[str]:
    """Of mix.py: at most three rounds of six steps of eight sequences, and what is changed."""
    words = {"sequences": 48, "seq_len": 32, "eval_sequences": 20, "lr": 1e-2}
    if changes.get("method", "reweight") == "reweight":
        words["rounds"] = 3
    return train_options(data, model, out, mix=False, **words | changes)


def compiled(argv: list[str]) -> None:
    """A search, and how many graphs it compiled."""
    run_script("mix", argv)
    print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture(scope="session")
def searches(data, small, tmp_path_factory):
    """Undisturbed searches: by every method on the small model; and "whole", compiled, on one that
    it pretrains itself. searches(name): waits for it; its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("searches")
    words = {name: mix_options(data, small, folder / name, method=name) for name in METHODS}
    runs = {name: Run(folder, "mix", *argv) for name, argv in words.items()}
    tiny = {"base_sequences": 128, "lr": 4e-3, "no_compile": False}
    argv = mix_options(data, "scratch:tiny", folder / "whole", **tiny)
    runs["whole"] = Run(folder, compiled, argv)
    printed = {}

    def ended(name: str):
        if name not in printed:
            [printed[name]] = ends_well(runs[name])
        return folder / name, printed[name]

    yield ended
    for run in runs.values():
        run.kill()


@pytest.fixture
def search(data, small, tmp_path, script):
    """Searches in this process, in a folder of the test's own; gives that, and what was printed."""

    def run(name, model=small, folder=tmp_path, **changes):
        status, text, err = script("mix", *mix_options(data, model, folder / name, **changes))
        assert status == 0, err
        return folder / name, text

    return run


def read(path) -> dict:
    return json.loads(path.read_text())


def history_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def losses_of(line: dict) -> np.ndarray:
    return np.array(list(line["losses"].values()))


def with_weights(out) -> list[str]:
    """The mixtures whose weights are there, as JSON."""
    kept = [path.with_name("run.json") for path in out.glob("runs/*/model.safetensors")]
    return sorted(json.dumps(read(path)["settings"]["counts"]) for path in kept)


@pytest.mark.parametrize("name", [*METHODS, "whole"])
def test_a_search_writes_what_it_promises(name, searches, data, small):
    out, text = searches(name)
    method = name.replace("whole", "reweight")
    found = read(out / "mix.json")
    assert (found["method"], found["unit"], found["seq_len"]) == (method, "sequences", 32)
    assert (found["seed"], found["data"]) == (0, str(data.folder))
    history = history_of(out)
    assert [line["round"] for line in history] == list(range(len(history)))
    assert history[0]["counts"] is None
    assert history[found["round"]]["counts"] == found["counts"]
    assert {sum(line["counts"].values()) for line in history[1:]} == {48}
    assert ("predicted" in found) == (method == "experts")
    if method == "reweight":
        means = [losses_of(line).mean() for line in history[1:]]
        assert found["round"] == 1 + np.argmin(means)

    title = method.replace("reweight", "reweighted")
    result = read(out / "result.json")
    assert list(result["models"]) == list(dict.fromkeys(["untouched", "uniform", title]))
    assert result["models"][title]["difference"]["mean"]["change"] < 0
    assert all(words in text for words in (mix.verdict(result), "wall time: ", "next    python"))
    assert "warning:" not in text
    assert f"search  {method}: {METHODS[method].cost}; then" in text
    card = (out / "README.md").read_text()
    found_by = f"found by `--method {method}`"
    if method in ("reweight", "experts"):  # the others do not look at it
        found_by = f"found by `--method {method} --objective mean`"
    assert all(words in card for words in (found_by, "Losses on the test split", title))
    picture = (out / "mix.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width = 1800 if method == "experts" else 1200
    assert int.from_bytes(picture[16:20], "big") == width

    # What it cost: passes of 48 sequences, and evaluations of at most 20 of a domain.
    windows = sum(map(len, evaluate(load(small), data, "val", 32, limit=20).values()))
    rounds = len(history) - 1
    passes = {"reweight": rounds, "doremi": 3, "experts": 2}.get(method, 0)
    evaluated = {"reweight": rounds + 1, "experts": 3}.get(method, 1) * windows
    trained = 48 * passes
    if method == "experts":  # three of a third, each measured on 25 windows a domain, or all
        trained += 3 * 16
        evaluated += 3 * sum(min(25, data.windows(d, "val", 32)) for d in data.domains)
    assert found["tokens"] == {"trained": 32 * trained, "evaluated": 32 * evaluated}
    # Weights are there of what the table compares; others were measured, and no more.
    assert len(list(out.glob("runs/*/tokens-25.npz"))) == (3 if method == "experts" else 0)
    assert not list(out.glob("runs/*/checkpoint-*"))
    compared = {json.dumps(found["counts"]), json.dumps(dict.fromkeys(data.domains, 16))}
    assert set(with_weights(out)) == compared


def test_train_and_eval_take_what_it_leaves(searches, data, small, tmp_path, script):
    """A mixture and a model."""
    out, _ = searches("reweight")
    words = {"mix": out / "mix.json", "sequences": False, "lr": 1e-2}
    ends_well(Run(tmp_path, "train", *train_options(data, small, tmp_path / "again", **words)))
    assert same_weights(tmp_path / "again", out)  # the best round, trained once more
    words = options(data=data.folder, device="cpu", no_compile=True)
    status, text, err = script("eval", small, out, *words)
    assert status == 0, err
    assert "3 of 3" in text


def test_grow_trains_on_the_growing_quantities_and_compares_at_equal_length(search, data):
    """Six times as long, the second round is the better one; of few sequences it warns."""
    changes = {"sequences": 16, "grow": True, "rule": "additive", "rate": 80, "rounds": 2}
    out, text = search("grow", eval_sequences=5, resume=True, **changes)
    assert "wall time: " in text  # for there was nothing to resume
    assert [sum(line["counts"].values()) for line in history_of(out)[1:]] == [16, 96]
    assert read(out / "mix.json")["round"] == 2
    # Of the first round's weights the comparison has no use.
    uniform = json.dumps(dict.fromkeys(data.domains, 32))
    assert with_weights(out) == sorted([uniform, json.dumps(history_of(out)[2]["counts"])])
    assert f"fewer than 10 documents are measured of {', '.join(data.domains)};" in text


def test_the_last_table_is_of_all_test_windows(search, data):
    out, _ = search("uniform", method="uniform", eval_sequences=5)
    for d, n in read(out / "result.json")["domains"].items():
        assert n["sequences"] == data.windows(d, "test", 32)


def test_overwrite_removes_the_runs_of_a_search(search):
    out, _ = search("run", method="uniform", seed=1)
    before = {path.name for path in (out / "runs").iterdir()}
    search("run", method="uniform", overwrite=True)
    assert not before & {path.name for path in (out / "runs").iterdir()}


def test_a_search_remembers_the_passes_of_its_base(search):
    out, _ = search("run", "scratch:tiny", method="uniform", base_sequences=64)
    passes = read(out / "run.json")["passes"]
    assert [sum(one["counts"].values()) for one in passes] == [64, 48]


def test_the_objective_chooses_the_round(search):
    """As code is learnt the fastest, half of it has the best mean; less of it spares the others."""
    rounds = {}
    for objective in ("mean", "worst"):
        changes = {"objective": objective, "start": "code=24,prose=12,sums=12", "rate": 2}
        out, text = search(objective, **changes)
        assert f"round{objective:>7}" in text
        first, *history = history_of(out)
        means = [losses_of(line).mean() for line in history]
        worst = [(losses_of(line) - losses_of(first)).max() for line in history]
        assert [line["mean"] for line in history] == pytest.approx(means)
        assert [line["worst"] for line in history] == pytest.approx(worst)
        rounds[objective] = read(out / "mix.json")["round"]
        assert rounds[objective] == 1 + np.argmin(means if objective == "mean" else worst)
    assert rounds["mean"] != rounds["worst"]


def test_where_the_rule_found_nothing_the_better_search_is_of_the_same(monkeypatch):
    monkeypatch.setattr("sys.argv", ["../mix.py"])
    words = ["--data", "my data", "--seq-len", "32", "--objective", "code=1", "--rate", "2"]
    words += ["--base-sequences", "80", "--no-compile", "--out", "out/my run"]
    unsure = {"change": 0.0, "interval": [-1.0, 1.0], "objective": "mean"}
    result = {"models": {"uniform": {}, "reweighted": {}}, "domains": {}, "judged": unsure}
    result |= {"difference": {"improved": 0}, "sure": unsure}
    first, last = mix.next_steps(mix.make_parser().parse_args(words), result)
    assert first == "next    python ../model.py 'out/my run' 'def main('"
    same = "--data 'my data' --seq-len 32 --no-compile --objective code=1 --base-sequences 80"
    where = "--method experts --out 'out/my run-experts'"
    assert last == f"better  python ../mix.py {where} {same}"
    pythia = ["--model", "EleutherAI/pythia-70m@abc", "--seq-len", "512", "--lr", "1e-4"]
    pythia += ["--batch-size", "8", "--rounds", "2", "--no-compile"]
    first, _ = mix.next_steps(mix.make_parser().parse_args(pythia), result)
    assert first == (
        "next    python ../train.py --data data/sample --model pythia-1b --mix out/mix/mix.json"
        " --out out/mix-larger --seq-len 512 --batch-size 8 --no-compile"
    )
    own = mix.make_parser().parse_args(["--model", "out/my model", "--out", "out/mix/"])
    monkeypatch.setattr("sys.argv", ["my dir/mix.py"])
    assert mix.next_steps(own, result) == [
        "next    python 'my dir/model.py' out/mix 'def main('",
        "better  python 'my dir/mix.py' --method experts --out out/mix-experts"
        " --model 'out/my model'",
    ]
    assert (
        "python 'my dir/train.py' --data"
        in mix.next_steps(mix.make_parser().parse_args(pythia), result)[0]
    )
    monkeypatch.setattr("sys.argv", ["../mix.py"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    *_, last = mix.next_steps(mix.make_parser().parse_args(["--fsdp"]), result)
    assert last == (
        "better  torchrun --nproc_per_node=2 ../mix.py --method experts --out out/mix-experts"
        " --fsdp"
    )
    # Else torchrun takes --start for a part of its own --start-method.
    *_, last = mix.next_steps(mix.make_parser().parse_args(["--start", "natural"]), result)
    assert last.startswith("better  torchrun --nproc_per_node=2 -- ../mix.py --method experts")
    assert last.endswith(" --start natural")


def test_the_picture_of_a_single_mixture_shows_its_change_from_the_untouched_model(tmp_path):
    mean = parse_objective("mean", ["a", "b"])
    history = mix.History(tmp_path / "history.jsonl", {}, {"a": 3.0, "b": 2.0}, mean)
    history.begin()
    history.add({"a": 1, "b": 1}, np.array([2.5, 2.25]))
    left, right = Figure().subplots(1, 2)
    mix.draw_rounds(history, True, left, right)
    assert right.get_ylabel() == "change from untouched, nats per token"
    drawn = {line.get_label(): list(line.get_ydata()) for line in right.get_lines()}
    assert (drawn["a"], drawn["b"], drawn["mean"]) == ([-0.5], [0.25], [-0.125])


def judged(interval, sure) -> dict:
    found = {"change": sum(interval) / 2, "interval": interval, "objective": "mean"}
    result = {"models": {"uniform": {}, "experts": {}}, "domains": {"a": {}}, "judged": found}
    return result | {"difference": {"improved": 1}, "sure": sure and {"interval": sure}}


@pytest.mark.parametrize(
    "interval, sure, words",
    [
        ([-0.2, -0.1], [-0.2, -0.1], "\nbetter than uniform, by this seed"),
        ([0.1, 0.2], [0.1, 0.2], "\nworse than uniform, by this seed"),
        ([-0.1, 0.2], [0.1, 0.2], "\nnot distinguishable from uniform, by this seed"),
        ([-0.2, -0.1], [-0.1, 0.2], "from uniform, by this seed (what differs are domains of"),
        ([-0.2, -0.1], None, "from uniform, by this seed (what differs are domains of"),
        ([-0.2, -0.1], [0.1, 0.2], "from uniform, by this seed (what differs are domains of"),
        ([0.1, 0.2], [-0.2, -0.1], "from uniform, by this seed (what differs are domains of"),
        ([0.0, 0.0], None, "experts is uniform"),
    ],
)
def test_the_verdict_is_what_the_intervals_say(interval, sure, words):
    assert words in mix.verdict(judged(interval, sure))


@pytest.mark.parametrize("worst, said", [(0.05, "held"), (0.1, "held"), (0.2, "did not hold")])
def test_whether_a_domain_was_spared(worst, said):
    args = mix.make_parser().parse_args(["--method", "experts", "--spare", "0.1"])
    changes = {"a": {"change": -1.0}, "b": {"change": worst, "interval": [-1.0, 1.0]}}
    result = {"models": {"untouched": {}, "experts": {"difference": changes}}}
    [line] = mix.whether_spared(result | {"domains": {"a": {}, "b": {}}}, args)
    assert line == f"--spare 0.1 {said} on the test split: b {worst:+.4f} [-1.0000, +1.0000]"


def test_a_goal_that_is_not_trained_on(search):
    """Only code and prose have shares; sums alone is what the rounds, the table and the verdict
    are about, and what is to be spared."""
    words = {"method": "experts", "objective": "sums=1", "train_on": "code,prose", "spare": -0.01}
    out, text = search("goal", **words)
    assert "round   goal" in text
    history = history_of(out)
    assert all(not line["counts"].get("sums") for line in history[1:])
    assert history[1]["objective"] == history[1]["losses"]["sums"]
    result = read(out / "result.json")
    model = result["models"]["experts"]
    of_sums = model["difference"]["sums"]["change"]
    assert model["objective"]["change"] == pytest.approx(of_sums)
    uniform = result["models"]["uniform"]["difference"]["sums"]["change"]
    assert result["judged"]["change"] == pytest.approx(of_sums - uniform)
    assert "\ngoal " in text
    assert "\nexperts - uniform (goal): " in text
    assert re.search(r"--spare -0.01 (held|did not hold) on the test split", text)


def slow_to_hash(argv: list[str]) -> None:
    """mix.py, whose first rank takes a while between a run's weights and its run.json."""
    plain = prepare.sha256_of

    def slow(path):
        time.sleep(1)
        return plain(path)

    prepare.sha256_of = slow
    run_script("mix", argv)


def test_all_ranks_know_what_a_new_base_was_trained_on(data, tmp_path):
    """For windows that it has seen come last: ranks that differ in that slice different orders."""
    words = {"method": "uniform", "base_sequences": 96, "eval_sequences": 4}
    one = tmp_path / "one" / "run"
    two = tmp_path / "two" / "run"
    ends_well(Run(tmp_path, "mix", *mix_options(data, "scratch:tiny", one, **words)))
    argv = mix_options(data, "scratch:tiny", two, **words)
    ends_well(*ranks(tmp_path, 2, slow_to_hash, argv))
    means = [[line["mean"] for line in history_of(out)] for out in (one, two)]
    assert means[1] == pytest.approx(means[0], abs=1e-3)


def late(argv: list[str]) -> None:
    """train.py, with a second rank that is a second behind the first."""
    plain = train.set_up

    def set_up(args):
        time.sleep(int(os.environ["RANK"]))
        return plain(args)

    train.set_up = set_up
    run_script("train", argv)


def test_a_rank_that_is_late_finds_the_folder_begun(data, small, tmp_path):
    ends_well(*ranks(tmp_path, 2, late, train_options(data, small, tmp_path / "run")))


@pytest.mark.parametrize(
    "words, message",
    [
        ({"train_on": "code", "start": "code=3,sums=3"}, "no other domains there than --train-on"),
        ({"train_on": "code,web"}, "no domain 'web'; there are code, prose, sums"),
        ({"method": "magic"}, "invalid choice"),
        ({"objective": "best"}, "expected mean, worst, or weights like code=2"),
        ({"objective": "code=1,web=1"}, "no domain 'web'; there are code, prose, sums"),
        ({"objective": "code=0"}, "every weight is zero"),
        ({"objective": "code=1,code=2"}, "code is named twice"),
        ({"start": "code"}, "--start code: expected"),
        ({"start": "code=3,code=4"}, "--start code=3,code=4: a domain is named twice"),
        ({"resume": True, "overwrite": True}, "--resume goes on and --overwrite starts anew"),
        ({"method": "experts", "expert_sequences": 0}, "--expert-sequences 0: expected 1 to 2,147"),
        ({"method": "experts", "spare": "nan"}, "--spare nan: expected -1,000,000,000 to 1,000,"),
        ({"spare": 0.1}, "--spare is of --method experts, not of reweight"),
        ({"method": "experts", "objective": "worst", "spare": 0.1}, "--spare: --objective worst"),
        ({"method": "doremi", "rounds": 2}, "--rounds is of --method reweight, not of doremi"),
        ({"method": "doremi", "start": "natural"}, "--start is of --method reweight or experts, "),
        ({"rate": -1}, "--rate -1.0: expected 1e-09 to 1,000,000,000"),
    ],
)
def test_what_a_method_cannot_do_is_said_at_once(words, message, data, small, tmp_path, script):
    fails(script("mix", *mix_options(data, small, tmp_path / "run", **words)), message)
    assert not (tmp_path / "run").exists()


def test_forty_domains_need_no_more_open_files_than_three(tmp_path):
    """Three splits of each are 120 files; a process here may have 256 open, as on macOS. Nor do
    the lines of the rounds become longer than others."""
    sources = {}
    for i in range(40):
        documents = conftest.made_documents("sums", 24, seed=i)
        sources[f"d{i:02}"] = [conftest.write_jsonl(tmp_path / f"{i}.jsonl", documents)]
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2}
    data = prepare.prepare(tmp_path / "data", sources, "train:300", **fractions)
    model = conftest.small_model(tmp_path / "model", data)
    words = {"sequences": 40, "rounds": 2, "seq_len": 8, "eval_sequences": 2}
    argv = mix_options(data, model, tmp_path / "run", **words)
    [text] = ends_well(Run(tmp_path, "mix", *argv))
    rounds = [line for line in text.splitlines() if line[:5].strip().isdigit()]
    assert len(rounds) == 3
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(len(line) for line in lines if not line.startswith("warning")) <= 100
    assert text.count("warning") == 1
    assert [len(line["losses"]) for line in history_of(tmp_path / "run")] == [40] * 3


# ---- interrupted, and in several processes ----


@pytest.mark.parametrize(
    "method, moment, said",
    [
        ("uniform", "rename .*result.json", ""),
        ("reweight", "remove .*model.safetensors", ""),  # of the second round
        # After the reference was trained; after 16 steps of the first expert, and 7 checkpoints.
        ("doremi", "rename .*/runs/[^/]*/model.safetensors", ""),
        ("experts", "rename .*tokens-", "/checkpoint-00000014"),
    ],
)
def test_killed_and_resumed_it_ends_the_same(method, moment, said, searches, data, small, tmp_path):
    out = tmp_path / method
    argv = mix_options(data, small, out, method=method, save_every=2)
    assert Run(tmp_path, "mix", *argv, kill_at=moment).end()[0] == -9
    assert not (out / "model.safetensors").exists()
    [text] = ends_well(Run(tmp_path, "mix", *argv, "--resume"))
    assert said in text
    assert "wall time since it was resumed: " in text
    whole, _ = searches(method)
    assert same_weights(out, whole)
    for name in ("history.jsonl", "mix.json", "result.json"):
        assert (out / name).read_text() == (whole / name).read_text()
    assert with_weights(out) == with_weights(whole)
    assert not list(out.glob("runs/*/checkpoint-*"))


def test_a_finished_search_prints_and_draws_its_result_again(searches, search):
    out, text = searches("reweight")
    picture = (out / "mix.png").read_bytes()
    (out / "mix.png").unlink()
    _, again = search("reweight", folder=out.parent, resume=True)
    result = text[text.index("\ntest split") : text.index("wall time")]
    assert result in again
    assert (out / "mix.png").read_bytes() == picture


CHANGES = [
    ({"eval_sequences": 5}, "eval_sequences was 20, is 5"),
    ({"sequences": 40}, "sequences was 48, is 40"),
    ({"objective": "worst"}, "objective was mean, is worst"),
    ({"train_on": "code,sums"}, "train_on was"),
    ({"base_sequences": 64}, "base_sequences was 6400, is 64"),
    ({"base_lr": 0.5}, "base_lr was None, is 0.5"),
    ({"method": "natural"}, "method was uniform, is natural"),
    ({"method": "experts"}, "method was uniform, is experts"),
]


@pytest.mark.parametrize("change, said", CHANGES)
def test_a_search_does_not_go_on_with_other_settings(change, said, searches, data, small, script):
    out, _ = searches("uniform")
    argv = mix_options(data, small, out, **{"method": "uniform", "resume": True} | change)
    fails(script("mix", *argv), "--resume with other settings", said)


@pytest.mark.parametrize(
    "method, fsdp", [("reweight", True), ("doremi", False), ("experts", False)]
)
def test_two_processes_search_like_one(method, fsdp, searches, data, small, tmp_path):
    """The same mixtures and the same table, with every rank at work in every run."""
    two = tmp_path / "two"
    argv = mix_options(data, small, two, method=method, fsdp=fsdp)
    assert sum("on cpu x 2," in text for text in ends_well(*ranks(tmp_path, 2, "mix", *argv))) == 1
    one, _ = searches(method)
    for a, b in zip(history_of(two), history_of(one), strict=True):
        assert a["counts"] == b["counts"]
        assert a["losses"] == (b["losses"] and pytest.approx(b["losses"], abs=1e-5))
    models = read(two / "result.json")["models"]
    for name, model in read(one / "result.json")["models"].items():
        assert models[name]["nats"] == pytest.approx(model["nats"], abs=1e-5)


# ---- runs are named by what they are ----


def test_after_the_rule_was_edited_no_old_losses_come_back(searches, search, tmp_path, monkeypatch):
    """A search that goes on with another rule finds what one finds that began with it."""
    whole, _ = searches("reweight")
    shutil.copytree(whole, tmp_path / "edited")
    (tmp_path / "edited" / "model.safetensors").unlink()
    monkeypatch.setitem(RULES, "multiplicative", (lambda A, L, r: A[::-1] * [9, 2, 0], 1.0))
    edited = history_of(search("edited", resume=True)[0])
    fresh = history_of(search("fresh")[0])
    assert edited[2]["counts"] != history_of(whole)[2]["counts"]
    for a, b in zip(edited, fresh, strict=True):
        assert a["counts"] == b["counts"]
        assert a["losses"] == pytest.approx(b["losses"], abs=1e-5)


@pytest.fixture
def runs(data, small, tmp_path) -> Runs:
    hyper = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2)
    measured = {"sequences": 8, "eval_sequences": 5}
    return Runs(load(small), small, "small", data, hyper, tmp_path / "runs", **measured)


def test_as_many_documents_as_are_enough_make_a_domain_sure(runs, data, small, monkeypatch):
    """Where the smallest domain has just as many, the verdict without the small ones is of all."""
    losses = {"untouched": evaluate(load(small), data, "test", 32)}
    domains = results(losses, data, "test", 32)["domains"]
    monkeypatch.setattr("mix.FEW_DOCUMENTS", min(n["documents"] for n in domains.values()))
    mean = parse_objective("mean", data.domains)
    result = mix.comparison(runs, {"code": 1, "sums": 7}, "natural", mean)
    assert result["sure"] == {key: result["judged"][key] for key in ("change", "interval")}


ONE, TWO, THREE = ({"code": n, "sums": 8 - n} for n in (1, 2, 3))


def flipped(archive: bytes) -> bytes:
    """With one bit of the last array changed, whose data begin 123 bytes after this word."""
    at = archive.rindex(b"NUMPY") + 130
    return archive[:at] + bytes([archive[at] ^ 1]) + archive[at + 1 :]


DAMAGED = {
    "of other counts": lambda mine, other: other,
    "cut short": lambda mine, other: mine[:-40],
    "a bit flipped": lambda mine, other: flipped(mine),
    "no archive": lambda mine, other: b"losses",
}


def test_whatever_bit_is_flipped_in_kept_losses_they_are_the_same_or_none(runs):
    runs.measure(ONE)
    path = runs.run_of(ONE).folder / "sequences-5.npz"
    whole = path.read_bytes()
    losses = runs.kept_losses(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        found = runs.kept_losses(path)
        assert found is None or all((found[d] == losses[d]).all() for d in losses)


def test_weights_that_were_kept_last_of_all_are_not_trained_again(runs, monkeypatch):
    """Killed before their hash was written, and before the checkpoints had gone."""
    losses = runs.measure(ONE)
    run = runs.run_of(ONE)
    record = (run.folder / "run.json").read_text()
    (run.folder / "run.json").unlink()
    (run.folder / "sequences-5.npz").unlink()
    (run.folder / "checkpoint-00000001").mkdir()
    monkeypatch.setattr("train.train", None)
    assert (runs.measure(ONE) == losses).all()
    assert (run.folder / "run.json").read_text() == record
    assert not (run.folder / "checkpoint-00000001").exists()


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("per_token", [False, True])
def test_losses_that_are_not_this_runs_are_measured_anew(damage, per_token, runs):
    first, other = (runs.run_of(counts) for counts in (ONE, TWO))
    losses, _ = (runs.losses_of(run, 5, "run", per_token=per_token) for run in (first, other))
    kind = "tokens" if per_token else "sequences"
    mine, its = (run.folder / f"{kind}-5.npz" for run in (first, other))
    before = mine.read_bytes()
    mine.write_bytes(DAMAGED[damage](before, its.read_bytes()))
    again = runs.losses_of(first, 5, "run", per_token=per_token)
    assert all((again[d] == losses[d]).all() for d in losses)
    assert again["code"].shape == ((5, 32) if per_token else (5,))
    assert mine.read_bytes() == before


def test_a_folder_of_another_run_is_refused(runs):
    runs.measure(ONE)
    folder = runs.run_of(TWO).folder
    shutil.copytree(runs.run_of(ONE).folder, folder)
    with pytest.raises(InputError, match=f"{folder}: .* of another run; remove the folder"):
        runs.measure(TWO)


def weights_of(runs, *mixtures) -> list[bool]:
    """Whether the weights of each are there."""
    return [(runs.run_of(counts).folder / "model.safetensors").is_file() for counts in mixtures]


def test_only_the_weights_of_the_best_by_now_are_written(runs, monkeypatch):
    scores = {"first": 3.0, "worse": 4.0, "better": 2.0, "asked for": 5.0}
    mixtures = [{"code": n, "sums": 8 - n} for n in (1, 2, 3, 4)]
    for counts, (name, score) in zip(mixtures, scores.items(), strict=True):
        monkeypatch.setattr(runs, "score", lambda losses, score=score: score)
        runs.measure(counts, keep=name == "asked for")
    assert weights_of(runs, *mixtures) == [True, False, True, True]
    # One that is measured already may be trained now, for the comparison.
    (runs.run_of(mixtures[1]).folder / "checkpoint-00000001").mkdir()
    runs.measure(mixtures[1])
    assert (runs.run_of(mixtures[1]).folder / "checkpoint-00000001").exists()
    runs.token_losses({"code": 8}, 5, "expert")
    assert weights_of(runs, {"code": 8}) == [False]


def test_a_run_that_is_stopped_while_it_is_measured_is_not_trained_again(runs, monkeypatch):
    """Nor one whose weights would not have been written."""
    whole = runs.measure(ONE)
    shutil.rmtree(runs.run_of(ONE).folder)
    runs.lowest = 0.0

    def stop():
        raise train.Stopped("stopped")

    with monkeypatch.context() as patched, pytest.raises(train.Stopped):
        patched.setattr(runs, "stop_if_asked", stop)
        runs.measure(ONE)
    monkeypatch.setattr("train.train", None)
    assert (runs.measure(ONE) == whole).all()


def test_only_weights_go_that_nobody_wants(runs, tmp_path):
    """Neither the search's own model nor a run's that is to be kept goes."""
    own = tmp_path / "model.safetensors"
    own.write_text("the search's own")
    for counts in (ONE, TWO, THREE):
        runs.train(counts)
        (runs.run_of(counts).folder / "checkpoint-00000001").mkdir()
    runs.keep_only(ONE | {"prose": 0}, TWO)
    assert weights_of(runs, ONE, TWO, THREE) == [True, True, False]
    left = {path.parent for path in runs.folder.glob("*/checkpoint-*")}
    assert left == {runs.run_of(counts).folder for counts in (ONE, TWO)}
    runs.train(THREE)
    runs.keep_only(THREE)
    assert weights_of(runs, ONE, TWO, THREE) == [False, False, True]
    runs.keep_only()
    assert weights_of(runs, ONE, TWO, THREE) == [False] * 3
    assert own.is_file()


def lean(runs, history, start, args):
    """A method: the start, and half of it with one domain, which an option names, for the rest."""
    only = np.eye(len(runs.domains))[runs.domains.index(args.towards)]
    for counts in (start, runs.counts(runs.shares(start) + only)):
        history.add(counts, runs.measure(counts))
    return counts


# From 32, 8, 8 the rule makes 32 + 16, 8 + 16, 8 + 64 of 144: a third, a sixth, a half of 48.
ADDED = [
    ({"method": "lean", "towards": "sums"}, {"towards": "prose"}, [8, 8, 32]),
    ({"rule": "reversed", "start": "code=32,prose=8,sums=8"}, {"rule": "share"}, [16, 8, 24]),
]


@pytest.mark.parametrize("words, other, counts", ADDED)
def test_a_rule_and_a_method_are_added_by_one_entry_each(
    words, other, counts, search, data, small, script, monkeypatch
):
    towards = {"choices": data.domains, "default": "code", "help": "a domain"}
    own = {"--towards": towards, "--rounds": mix.REWEIGHT_OPTIONS["--rounds"]}
    monkeypatch.setitem(METHODS, "lean", mix.Method(lean, options=own))
    monkeypatch.setitem(RULES, "reversed", (lambda A, L, r: A[::-1] * r, 2.0))
    out, text = search("run", **words)
    history = (out / "history.jsonl").read_text()
    assert list(history_of(out)[2]["counts"].values()) == counts
    assert (out / "mix.png").read_bytes()[:4] == b"\x89PNG"
    (out / "model.safetensors").unlink()
    _, again = search("run", resume=True, **words)
    assert again.partition("wall time")[0] == text.partition("wall time")[0]
    assert (out / "history.jsonl").read_text() == history
    [(name, value)] = other.items()
    assert read(out / "mix.json")[name] == words[name]
    argv = mix_options(data, small, out, resume=True, **words | other)
    fails(script("mix", *argv), f"{name} was {words[name]}, is {value}")


@pytest.mark.skipif(
    not can_compile(torch.device("cpu"))[0], reason=can_compile(torch.device("cpu"))[1]
)
def test_a_whole_search_compiles_each_shape_once(searches):
    """A layer and the losses, each in training, in validation and in the test."""
    _, text = searches("whole")
    assert "torch.compile (" in text
    assert "graphs: 6\n" in text


def test_the_base_is_used_again(searches, search):
    folder = searches("whole")[0].parent
    [base] = folder.glob("base-tiny-*")
    stamp = (base / "model.safetensors").stat().st_mtime_ns
    out, _ = search("second", "scratch:tiny", folder, base_sequences=128, rounds=1)
    card = (out / "README.md").read_text()
    assert "from `scratch:tiny`, after a pass over 128 sequences." in card
    assert [*folder.glob("base-tiny-*")] == [base]
    assert (base / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_base_is_named_by_its_data_and_its_settings(data, tmp_path, monkeypatch):
    for name in ("train_once", "keep_run"):
        monkeypatch.setattr(mix, name, lambda *run: None)
    hyper = Hyperparameters(seq_len=32, batch_size=8, learning_rate=1e-2)
    other = Data(shutil.copytree(data.folder, tmp_path / "d"))
    other.identity = "of other tokens"
    tiny = load("scratch:tiny", "meta")
    changes = [[], ["--base-sequences", "64"], ["--base-lr", "0.1"]]
    args = [mix.make_parser().parse_args(["--out", f"{tmp_path}/run", *words]) for words in changes]
    folders = {mix.pretrain(tiny, data, hyper, each) for each in args}
    folders.add(mix.pretrain(tiny, other, hyper, args[0]))
    assert len(folders) == 4
