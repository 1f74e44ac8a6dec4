"""What the scripts never do: unpickle, run what they read, or reach a network that nobody asked for."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL

SCRIPTS = ("prepare", "model", "eval", "train", "mix")
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "code",
    "runpy",
}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "torch.load",
    "np.load",
    "numpy.load",
    "torch.jit.load",
    "torch.hub.load",
    "pd.read_pickle",
}
PICKLED_BETWEEN_RANKS = {
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
}
ARGUMENTS = {"trust_remote_code", "allow_pickle"}


def dotted(node) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] * (node.module.partition(".")[0] in MODULES) + sorted(
                names & ATTRIBUTES
            )
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS
        ):
            found.append(f"{node.func.id}(")
        elif isinstance(node, ast.Attribute):
            found += [dotted(node)] * (
                dotted(node) in ATTRIBUTES or node.attr in PICKLED_BETWEEN_RANKS
            )
        elif isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            found.append(node.arg)
        elif isinstance(node, ast.Constant) and node.value in ARGUMENTS:
            found.append(node.value)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_unpickles_or_runs_what_it_reads(name):
    assert offences((ROOT / f"{name}.py").read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "read = torch.load",
        "eval('1')",
        "exec(text)",
        "__import__(name)",
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "np.load(x, allow_pickle=True)",
        "dist.broadcast_object_list(x)",
    ],
)
def test_the_walk_sees_each_of_them(source):
    assert offences(source) and not offences(
        "import torch\nfrom eval import evaluate\nmodel.eval()\nload(x)"
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_go_in_one_line(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} & set(
        SCRIPTS
    )
    assert imported <= set(SCRIPTS[: SCRIPTS.index(name)])


OFFLINE = """
import runpy, sys

def refuse(event, args):
    if event.startswith("socket.") or event == "urllib.Request":
        raise PermissionError(f"no network: {event}")

sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def offline(cwd, *argv) -> subprocess.CompletedProcess:
    """Run a script where no socket can be made."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cwd / "hub")}
    command = [sys.executable, "-c", OFFLINE, ROOT / argv[0], *map(str, argv[1:])]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_main_job_needs_no_network(data, tmp_path):
    """The sample and the search; a name on the hub is what asks for one."""
    done = offline(tmp_path, "prepare.py")
    assert done.returncode == 0 and (tmp_path / "data/sample/meta.json").exists(), done.stderr
    short = [
        "mix.py",
        "--data",
        data.folder,
        "--seq-len",
        32,
        "--base-sequences",
        64,
        "--sequences",
        24,
        "--rounds",
        2,
    ]
    done = offline(tmp_path, *short, *SMALL)
    assert done.returncode == 0 and (tmp_path / "out/mix/model.safetensors").exists(), done.stderr
    done = offline(tmp_path, *short, *SMALL, "--model", "pythia-70m", "--out", "out/other")
    assert (
        done.returncode == 2 and "pythia-70m: " in done.stderr and done.stderr.count("\n") == 1
    ), done.stderr
