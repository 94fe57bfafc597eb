"""medusa serve: a server with OpenAI's interface."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa.cli import common
from medusa.serving.settings import ServerSettings

KEY = "MEDUSA_API_KEY"


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a YAML file as defaults, so that flags override them."""
    from medusa.errors import ConfigError, InvalidInput
    from medusa.runs.files import read_yaml

    if path is None:
        return None
    found = read_yaml(path, InvalidInput) or {}
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds a {type(found).__name__}, expected `option: value` lines")
    options = {str(key).replace("-", "_"): value for key, value in found.items()}
    known = {parameter.name for parameter in ctx.command.params} - {"config"}
    for key in options:
        if key not in known:
            nearest = difflib.get_close_matches(key, [name for name in known if name], n=1)
            raise ConfigError(f"{path}: unknown key {key!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
    repeatable = {parameter.name for parameter in ctx.command.params if getattr(parameter, "multiple", False)}
    ctx.default_map = {
        key: [value] if key in repeatable and not isinstance(value, list) else value for key, value in options.items()
    }
    return path


@common.with_options(common.Loading, ServerSettings)
def serve_command(
    model: common.ModelArgument = "smollm2",
    tree: common.TreeOption = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Number of requests that decode at a time (default: as many as memory allows).")
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(min=16, help="Tokens of a prompt and its answer together (default: what memory allows).")
    ] = None,
    quantization: common.QuantizationOption = "none",
    tp: common.TpOption = 1,
    compile: common.CompileOption = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="YAML file of these options; flags override it.", callback=_read_config, is_eager=True
        ),
    ] = None,
    **options: Any,
) -> None:
    """Serve a model to any client of OpenAI's interface: http://127.0.0.1:8000/v1. Ctrl-C or SIGTERM ends it."""
    from medusa.runs.extras import require

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve", "medusa serve")
    from medusa.checkpoints import named
    from medusa.cli import parallel
    from medusa.serving.server import log_to_stderr, make_service, run

    if not options.get("api_key") and os.environ.get(KEY):
        options["api_key"] = [os.environ[KEY]]
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    settings = common.take(ServerSettings, options)
    name, full = settings.served_model_name or model, common.full_name(model, options)
    named.require_heads(full, options["heads"], tree == "root")
    tokenizer = named.load_tokenizer(full, options["trust_remote_code"])
    medusa = parallel.load_model(full, tp, tree=tree, quantization=quantization, **options)
    named.note_advice_on_tree(medusa, full, options["heads"], tree)
    log_to_stderr()
    run(make_service(medusa, tokenizer, name, settings, slots, capacity, compile))
