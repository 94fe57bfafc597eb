"""The examples of docs/server.md run as they are written, but for the server's address and the model's name."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from running import serve

ROOT = Path(__file__).parents[2]
NODE = Path(os.environ.get("ENVIRONMENTS", ROOT / ".integration")) / "node/node_modules"  # made by integration/serving/run.sh


@pytest.fixture(scope="module")
def served(model, tokenizer):
    """A server of short answers: the examples set no limit."""
    with serve(model, tokenizer, engine={"capacity": 240}) as found:
        yield found


def example(language: str, served) -> str:
    """The one example in a language, asking a server of the tests."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/server.md").read_text(), re.DOTALL)
    return found.replace("http://127.0.0.1:8000", served.url).replace('"smollm2"', '"tiny"')


def answered(served) -> float:
    return sum(served.metric("vllm:request_success_total", finished_reason=reason) or 0 for reason in ("stop", "length"))


def test_curl(served):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    done = subprocess.run(["bash", "-c", example("bash", served)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and '"finish_reason":' in done.stdout, done.stderr


def test_openais_python_client(served, capsys):
    pytest.importorskip("openai")
    before = answered(served)
    exec(compile(example("py", served), "docs/server.md", "exec"), {})
    assert capsys.readouterr().out and answered(served) == before + 1


def test_openais_javascript_client(served, tmp_path):
    if shutil.which("node") is None or not (NODE / "openai").exists():
        pytest.skip("there is no node, or no openai for it; integration/serving/run.sh node installs it")
    (tmp_path / "node_modules").symlink_to(NODE)
    (tmp_path / "example.mjs").write_text(example("js", served))
    before = answered(served)
    done = subprocess.run(["node", tmp_path / "example.mjs"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout and answered(served) == before + 1, done.stderr


def test_the_config_file_has_options_of_the_command(served):
    from typer.main import get_command

    from medusa.cli import app

    options = yaml.safe_load(example("yaml", served))
    assert options.keys() <= {parameter.name for parameter in get_command(app).commands["serve"].params}
