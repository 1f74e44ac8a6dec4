"""The README and the pages beside it: their commands parse, their links lead somewhere."""

import re
import runpy
import shlex
import sys
import textwrap

import pytest
from conftest import ROOT

import prepare

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("prepare", "model", "eval", "train", "mix")


def commands(text: str) -> list[list[str]]:
    """The words of every command that runs a script, torchrun's own options left out."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for part in re.split("&&|\n", block.replace("\\\n", " ")):
            words = shlex.split(part, comments=True)
            scripts = [i for i, word in enumerate(words) if word.removesuffix(".py") in SCRIPTS]
            if scripts and words[0] in ("python", "torchrun"):
                found.append([word for word in words[scripts[0] :] if word != "…"])
    return found


def benches(text: str) -> list[list[str]]:
    """Of every command that runs a benchmark and is there in full: its file, and its words."""
    found = []
    text = text.replace("\\\n", " ")
    for name, words in re.findall(r"python (?:-m )?(tests[./]bench[\w/.]*)([^`\n#]*)", text):
        path = {"tests.bench": "tests/bench/__main__.py"}.get(name, name)
        if "…" not in words:
            found.append([path, *shlex.split(words)])
    return found


def test_commands_parse(monkeypatch):
    """Each ends as soon as its options are understood."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    of_scripts = [words for text in texts for words in commands(text)]
    of_benches = [words for text in texts for words in benches(text)]
    assert len(of_scripts) > 15 and len({path for path, *_ in of_benches}) > 7
    plain = prepare.ArgumentParser.parse_args

    def parse(self, *args):
        plain(self, *args)
        raise InterruptedError

    monkeypatch.setattr(prepare.ArgumentParser, "parse_args", parse)
    for path, *words in of_scripts + of_benches:
        name = path.removesuffix(".py")
        loaded = vars(__import__(name)) if name in SCRIPTS else runpy.run_path(str(ROOT / path))
        monkeypatch.setattr(sys, "argv", [path, *words])
        with pytest.raises(InterruptedError):
            loaded["main"]()


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_in_the_help_are_commands(script, name):
    """Each on lines of its own, and of this script."""
    status, text, _ = script(name, "--help")
    examples = re.search(r"\n\n((?:    .*\n)+)", text)[1]
    found = commands(f"```sh\n{textwrap.dedent(examples)}```")
    assert status == 0 and len(found) >= 2
    for path, *words in found:
        assert path == f"{name}.py"
        assert not {"python", "torchrun"} & set(words)


def test_the_example_in_python_runs(data, small, tmp_path, capsys):
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    for old, new in {
        "data/mine": str(data.folder),
        "out/train": str(small),
        "out/tuned": str(tmp_path / "tuned"),
        "mail": "code",
        "notes": "sums",
        "cuda": "cpu",
        "512": "32",
    }.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    said = capsys.readouterr().out
    assert "domains better" in said
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_the_help_tells_every_default_that_is_one():
    parser = prepare.ArgumentParser("a script")
    parser.add_argument("--seed", default=0, help="a number")
    parser.add_argument("--name", help="a word")
    parser.add_argument("--flag", action="store_true", help="a choice")
    assert re.findall(r"an? \w+(?: .*)?$", parser.format_help(), re.M) == [
        "a script",
        "a number (default: 0)",
        "a word",
        "a choice",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_names_of_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[)#]", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for link, anchor in re.findall(r"\]\((?!https)([^)#]*)#([^)]+)\)", text):
        target = page.parent / link if link else page
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert anchor in slugs, f"{link}#{anchor}"
    for name in re.findall(r"`((?:tests|docs)/[\w./]+|\w+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "tests" / "bench" / name).exists(), name


def test_the_readme_is_short_has_commands_of_every_script_and_a_narrow_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 12_000
    assert {words[0].removesuffix(".py") for words in commands(text)} == set(SCRIPTS)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    table = next(block for language, block in blocks if not language)
    assert max(map(len, table.splitlines())) <= 100
    head = next(line for line in table.splitlines() if line.startswith("domain "))
    assert re.fullmatch(r"domain +documents +nats( +change in nats \[95%\]){2} *", head)
    assert re.search(r"^reweighted - uniform: [-+]0\.\d{4} \[", table, re.MULTILINE)
