"""Claims about the documentation: what it shows runs, and what it names exists."""

import functools
import importlib.metadata
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import medusa
from medusa.decoding import step

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "assets", "results", "site"}.intersection(path.parts))


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@functools.cache
def help_of(verb: str) -> str:
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-m", "medusa", verb, "--help"], capture_output=True, text=True, env=wide)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readmes_python_runs(capsys):
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})
    assert "class TestStack" in capsys.readouterr().out


def test_the_evaluation_pages_python_runs(capsys):
    for block in blocks("docs/evaluation.md", "python"):
        exec(compile(block, "docs/evaluation.md", "exec"), {})
    assert "Estimate(value=" in capsys.readouterr().out


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/architecture.md",
        "docs/training.md",
        "docs/evaluation.md",
        "docs/scale.md",
        "docs/simulation.md",
        "docs/server.md",
        "docs/serving.md",
        "docs/trees.md",
        "examples/embedded_model/README.md",
        "examples/smollm2/README.md",
    ],
)
def test_files_that_documents_name_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:src|tests|docs|examples|benchmarks|integration)/[\w./-]+)`", text))
    linked = set(re.findall(r"\]\((?!http)([\w./-]+)\)", text))  # from the document's own folder
    assert all((ROOT / name).exists() for name in named), named
    assert all(((ROOT / document).parent / name).exists() for name in linked), linked


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_modules_that_documents_name_exist(document):
    named = set(re.findall(r"`(?:src/medusa/)?([\w/]+\.py|\w+/)`", (ROOT / document).read_text()))
    places = (ROOT, ROOT / "src/medusa", *(ROOT / "src/medusa").glob("*/"))
    assert [name for name in sorted(named) if not any((place / name).exists() for place in places)] == []


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/training.md",
        "docs/evaluation.md",
        "docs/simulation.md",
        "docs/server.md",
        "docs/serving.md",
        "docs/trees.md",
    ],
)
def test_commands_that_documents_show_have_those_options(document):
    for line in re.findall(r"^    medusa ([^#\n]+)", (ROOT / document).read_text(), re.MULTILINE):
        options = re.findall(r"--[\w-]+", line)
        assert all(option in help_of(line.split()[0]) for option in options), line


@pytest.mark.parametrize(
    "script", ["decode", "step_cost", "train", "recipes", "code_model", "grammar", "medusa_2", "serve", "soak"]
)
def test_benchmark_scripts_start(script):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / f"{script}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_the_python_interface_has_every_public_name():
    shown = set(re.findall(r"^::: (medusa\..*)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    assert shown == {f"{home}.{name}" for name, home in medusa._HOMES.items()} | {"medusa.errors"}


def test_the_loop_that_the_architecture_page_shows_is_the_one_that_runs():
    assert blocks("docs/architecture.md", "python") == [inspect.getsource(step)]


def test_lines_of_documents_are_at_most_132_characters():
    lines = ((path.relative_to(ROOT), line) for path in DOCUMENTS for line in path.read_text().splitlines())
    assert [(path, line) for path, line in lines if len(line) > 132] == []


def test_the_page_of_the_command_line_is_what_the_commands_say():
    only_with_pinned("typer")  # other versions word types and defaults differently
    assert (ROOT / "docs" / "cli.md").read_text() == script_of_docs("cli").page(), "run python docs/cli.py"


def test_the_page_on_fleets_is_what_its_commands_print():
    only_with_pinned("rich")  # other versions may draw tables differently
    shown = (ROOT / "docs" / "scale.md").read_text()
    assert shown.count("$ medusa simulate") > 10
    assert shown == script_of_docs("scale").page(), "run python docs/scale.py"


def only_with_pinned(package):
    pinned = re.search(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    if importlib.metadata.version(package) != pinned:
        pytest.skip(f"{package} {importlib.metadata.version(package)} is not the pinned {pinned}")


def script_of_docs(name):
    spec = importlib.util.spec_from_file_location(f"{name}_page", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
