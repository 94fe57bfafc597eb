"""medusa convert: heads from any format into any other."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medusa.cli import common
from medusa.runs.console import note

if TYPE_CHECKING:
    from medusa.checkpoints.reader import Checkpoint


def convert_command(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A folder, file or hub id with heads of any format, or `embedded`.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    to: Annotated[
        Literal["medusa", "v0.1", "v2", "vllm", "merged"],
        typer.Option(help="Format to write: medusa is our own; merged puts backbone and heads into one model."),
    ],
    backbone: Annotated[
        str | None, typer.Option(help="Folder or hub id of the backbone (default: the one in IN, or the one that IN names).")
    ] = None,
    quantization: common.QuantizationOption = "none",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Publish OUT on the hub as this repository, with a model card.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    trust_remote_code: common.TrustOption = False,
    as_json: common.JsonOption = False,
) -> None:
    """Write heads in the format of another engine (docs/serving.md), and check them by reading them back."""
    from medusa.checkpoints import publish
    from medusa.checkpoints.conversion import convert
    from medusa.checkpoints.hub import at
    from medusa.checkpoints.named import quiet_transformers

    quiet_transformers()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        written = convert(at(source, revision), output, to, backbone, quantization, trust_remote_code=trust_remote_code)
    for warning in caught:
        if warning.category is UserWarning:  # ours; deprecations of libraries have other categories
            note(f"medusa: {warning.message}")
    address = publish.push_to_hub(output, push_to_hub, private or None) if push_to_hub is not None else None
    _show(written, output, to, address, as_json)


def _show(written: Checkpoint, output: Path, to: str, address: str | None, as_json: bool) -> None:
    """Print what was written, and its address on the hub."""
    record = {
        "output": str(output),
        "format": to,
        "num_heads": written.num_heads,
        "num_layers": written.config.medusa_num_layers,
        "base_model": written.config.base_model_name_or_path,
    }
    if as_json:
        print(json.dumps(record if address is None else {**record, "published": address}))
        return
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(
        f"{written.num_heads} heads of {record['num_layers']} layers in {output}, {size / 1e6:.1f} MB, read back and identical"
    )
    if address is not None:
        print(address)
