"""What a person sees, wherever it goes: a terminal, a log, a closed pipe; and what costs no run."""

import contextlib
import functools
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, made_documents, options, train_options, works, write_jsonl
from torch._inductor.runtime.cache_dir_utils import cache_dir

import prepare
from eval import parse_objective
from mix import History, draw
from model import Config, GPTNeoX, compile_for
from prepare import Bar, Data, InputError, cli, load_json, notice, tell

# ---- where it goes ----


@pytest.mark.parametrize(
    "encoding, expected", [("ascii", r"\u2026 caf\udce9"), ("utf-8", r"… caf\udce9")]
)
def test_what_cannot_be_encoded_is_escaped(tmp_path, encoding, expected):
    """A name of a file that is no UTF-8 reaches Python as a lone surrogate."""
    path = tmp_path / "log"
    with open(path, "w", encoding=encoding) as file, contextlib.redirect_stdout(file):
        cli(lambda: tell("… caf\udce9"))
    assert path.read_text(encoding) == expected + "\n"


def test_a_pipe_that_closes_ends_no_work(tmp_path, monkeypatch):
    """As `| head` closes it: the script goes on to its end, which is a good one."""
    source = write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 80))
    words = options(out=tmp_path / "d", tokenizer="train:300", workers=1)
    words += options(val_fraction=0.2, test_fraction=0.2)
    monkeypatch.setattr("sys.argv", ["prepare.py", f"a={source}", *words])
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file, contextlib.redirect_stdout(file):
        cli(prepare.main)
    assert Data(tmp_path / "d").domains == ["a"]


def test_nothing_to_print_to_ends_no_work(monkeypatch):
    """As for a daemon, whose streams are closed."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    cli(lambda: tell("so") or sys.stderr.isatty())
    with pytest.raises(SystemExit, match="2"):
        cli(lambda: load_json(Path("none.json")))


@pytest.mark.parametrize("said", [[], ["Unable to allocate 67.1 GiB"]])
def test_memory_that_runs_out_anywhere_is_said_in_one_line(said, capsys):
    def main():
        raise MemoryError(*said)

    with pytest.raises(SystemExit, match="2"):
        cli(main, "; --resume goes on")
    words = [*said, "there is no more"][0]
    expected = f"error: out of memory: {words}; free some, or ask for less; --resume goes on\n"
    assert capsys.readouterr().err == expected


def test_names_of_files_that_are_no_utf8(tmp_path, script):
    folder = tmp_path / "lat"
    folder.mkdir()
    path = folder / os.fsdecode(b"caf\xe9.jsonl")
    write_jsonl(path, made_documents("sums", 80))
    sizes = {"tokenizer": "train:300", "workers": 1, "val_fraction": 0.2, "test_fraction": 0.2}
    words = [f"a={folder}", *options(**sizes), "--out"]
    works(script("prepare", *words, tmp_path / "d"))
    assert Data(tmp_path / "d").meta["sources"]["a"] == [str(path)]
    path.write_text("{\n")
    fails(script("prepare", *words, tmp_path / "e"))


# ---- how far it has come ----


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(monkeypatch, capsys):
    with Bar("train", 1000, "step") as bar:
        for step in range(1000):
            bar.to(step)
    assert capsys.readouterr().out == ""  # it is too soon
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_LINES", -1)
    with notice("compiling (once)"), Bar("train", 10, "step", done=2) as bar:
        bar.to(4, "loss 3.141")
        bar.to(10)
    with Bar("read", 2000, "B") as bar:
        bar.to(500, "web")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compiling (once)"
    assert re.fullmatch(r"train: step 4 of 10, loss 3\.141, \d+\.\d min left", lines[1])
    assert re.fullmatch(r"train: step 10 of 10, 0\.0 min left", lines[2])
    assert re.fullmatch(r"read: 25%, web, \d+\.\d min left", lines[3])
    # Under torchrun the others are silent.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with notice("compiling (once)"), Bar("train", 10, "step") as bar:
        bar.to(10)
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    """For stderr: what Python writes there; what a library writes by itself goes past it."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stages", [["read:"], ["make the sample", "tokenizing the sample"]])
def test_on_a_terminal_every_stage_has_a_name(tmp_path, monkeypatch, capfd, stages):
    """Of ours: bars of a library would stay on the screen."""
    smaller = functools.partial(prepare.make_sample, max_bytes=100_000)
    monkeypatch.setattr("prepare.make_sample", smaller)
    sources = None
    if "read:" in stages:
        sources = {"a": [write_jsonl(tmp_path / "a.jsonl", made_documents("sums", 80))]}
    fractions = {"val_fraction": 0.3, "test_fraction": 0.3}
    with contextlib.redirect_stderr(Terminal()) as terminal:
        prepare.prepare(tmp_path / "d", sources, "train:300", **fractions)
    for title in ("training the tokenizer", *stages):
        assert title in terminal.getvalue()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("K", [3, 5, 7, 8, 40])
def test_lines_of_a_search_keep_to_100_columns(K, tmp_path, capsys):
    """Whatever the number of domains, and it is drawn; what was measured before says so."""
    domains = [f"a_domain_with_a_name_{k}" for k in range(K)]
    losses = np.linspace(1.5, 12.5, K)
    untouched = dict(zip(domains, losses.tolist(), strict=True))
    path = tmp_path / "history.jsonl"
    mean = parse_objective("mean", domains)
    history = History(path, dict.fromkeys(domains, 30), untouched, mean)
    history.begin()
    even = dict.fromkeys(domains, 10)
    history.add(even, losses - 0.25)
    history.add(even | {domains[0]: 90}, losses - 0.5, note="a probe")
    history.add(even, losses - 0.25)
    history.add(even | {domains[1]: 70})
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "a probe, a_domain_with_a_name_0 3.0 times" in text
    assert text.count("as round 1") == 1
    rows = [line for line in text.splitlines() if re.match(" {0,3}[0-9]", line)]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "4"]
    if K <= 8:
        head = next(line for line in text.splitlines() if line.startswith("round"))
        assert len(set(head.split())) == K + 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[2]["note"] == "a probe"
    (tmp_path / "mix.json").write_text('{"round": 2}')
    draw(tmp_path, mean, is_path=True)
    assert (tmp_path / "mix.png").read_bytes()[:4] == b"\x89PNG"


# ---- what a compiler does ----


@pytest.fixture
def network() -> GPTNeoX:
    """As compiled, but for the compiler."""
    model = GPTNeoX(Config(64, 16, 1, 2, 32, 16))
    model.compile_parts = lambda: None
    model.compiled = True
    model.compiled_for = set()
    return model


@pytest.mark.parametrize("error", ["{}: file too short", "C++ compile error"])
def test_what_a_kill_left_in_the_compilers_cache_is_made_anew(network, error, capsys):
    """Whether the error names it or not."""
    broken = os.path.join(cache_dir(), "cut-short.so")
    open(broken, "w").close()
    plain = network.token_losses

    def losses(x, targets):
        if os.path.exists(broken):
            raise ImportError(error.format(broken))
        return plain(x, targets)

    network.token_losses = losses
    compile_for(network, 2, 8, torch.float32, training=True)
    assert not os.path.exists(broken)
    assert network.compiled
    assert "warning" not in capsys.readouterr().out
    assert all(p.grad is None for p in network.parameters())


COMPILER = """CppCompileError: C++ compile error

Command:
/usr/bin/g++ /tmp/a.cpp -D A_MACRO -O3 -Werror -o MINE

Output:
In file included from /tmp/a.cpp:1:
/tmp/b.h:3:10: fatal error: omp.h: No such file or directory
    3 | #include <omp.h>
compilation terminated.

Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace
"""


@pytest.mark.parametrize(
    "message, shown",
    [
        (COMPILER, "/tmp/b.h:3:10: fatal error: omp.h: No such file or directory"),
        ("\nNo working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1", "No working C++ compiler"),
        ("", "RuntimeError('')"),
        ("error: " + "x" * 500, "error: " + "x" * 153 + "\n"),
    ],
)
def test_a_compiler_that_fails_is_done_without(network, tmp_path, capsys, message, shown):
    """One line shows the fault; a library that is not of the compiler's cache stays where it is."""
    mine = tmp_path / "libmine.so"
    mine.write_text("")

    def losses(x, targets):
        raise RuntimeError(message.replace("MINE", str(mine)))

    network.token_losses = losses
    compile_for(network, 2, 8, torch.float32, training=False)
    assert not network.compiled
    assert mine.exists()
    text = capsys.readouterr().out
    assert text.count("warning") == 1
    assert f"torch.compile failed, going on without it: {shown}" in text
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    assert network(tokens, tokens).shape == (2, 8)


@pytest.mark.parametrize("is_broken, way_out", [(False, "--no-compile does"), (True, "try again")])
def test_a_compiler_that_fails_ends_a_model_that_is_spread_over_ranks(
    network, tmp_path, monkeypatch, is_broken, way_out
):
    """Where it fails on one of them alone, the others wait for that one's share of a layer."""
    broken = tmp_path / "cut.so"
    broken.write_text("half")
    monkeypatch.setattr("model.broken_libraries", lambda error: {broken} if is_broken else set())
    monkeypatch.setattr("model.is_sharded", lambda model: True)
    monkeypatch.setattr("model.world_size", lambda: 2)
    network.token_losses = None
    with pytest.raises(InputError, match=f"torch.compile failed: .*; .*{way_out}"):
        compile_for(network, 2, 8, torch.float32, training=False)
    assert broken.exists() is not is_broken


def test_a_broken_compiler_on_the_path_ends_no_run(data, small, tmp_path, script, monkeypatch):
    """It answers `which`, but that is all it does."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(compiler)))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    words = train_options(data, small, tmp_path / "run", no_compile=False)
    assert works(script("train", *words)).count("torch.compile failed") == 1
    assert (tmp_path / "run" / "model.safetensors").exists()
