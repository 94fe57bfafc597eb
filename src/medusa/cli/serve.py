"""medusa serve: a server with OpenAI's interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medusa.cli import common
from medusa.serving.settings import ServerSettings, options_in, parted


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a YAML file as defaults, so that flags override them."""
    if path is not None:
        from medusa.errors import InvalidInput
        from medusa.runs.files import read_yaml

        ctx.default_map = options_in(read_yaml(path, InvalidInput) or {}, str(path))
    return path


@common.with_options(common.Loading, ServerSettings)
def serve_command(
    model: common.ModelArgument = "smollm2",
    tree: common.TreeOption = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Number of requests decoded at the same time (default: as many as memory allows).")
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(min=16, help="Number of tokens that a slot holds: prompt, answer and tree (default: what memory allows)."),
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
    """Serve a model to clients of the OpenAI API at http://127.0.0.1:8000/v1. Ctrl-C or SIGTERM stops the server."""
    from medusa.runs.extras import require

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve", "medusa serve")
    from medusa.serving.server import check_address, launched, run

    engine = {"tree": tree, "slots": slots, "capacity": capacity, "quantization": quantization, "tp": tp, "compile": compile}
    launch, settings = parted({"model": model, **engine, **options}, "options")
    check_address(settings)
    run(launched(launch, settings))
