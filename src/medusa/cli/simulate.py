"""medusa simulate: whether Medusa will pay on a model, a machine, a batch and a context."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medusa.cli import common, showing
from medusa.errors import InvalidInput

if TYPE_CHECKING:
    from medusa.simulation.prediction import Acceleration, Setting

DTYPES = ("bfloat16", "float16", "float32")


def simulate_command(
    model: Annotated[
        str, typer.Argument(help="llama-7b, llama-13b, llama-33b, `embedded`, or a folder or hub id with a config.")
    ] = "llama-7b",
    hardware: Annotated[
        str, typer.Option("--hardware", help="A known machine, or a file that --measure wrote (FILE or FILE:NAME).")
    ] = "a100-80gb-pcie",
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, with commas between.")] = "1,2,4,8,16,32,64",
    length: Annotated[str, typer.Option("--length", help="Context lengths in tokens.")] = "1024",
    candidates: Annotated[str, typer.Option("--candidates", help="Tree sizes, the root included.")] = "1,8,16,32,48,64,96,128",
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    weight_bits: Annotated[
        int | None, typer.Option("--weight-bits", help="Bits of quantised weights, unpacked at no cost (default: the dtype's).")
    ] = None,
    num_heads: Annotated[int, typer.Option("--num-heads", help="Medusa heads that the trees use.")] = 5,
    shared_lm_head: Annotated[bool, typer.Option("--shared-lm-head", help="The heads share the backbone's LM head.")] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            help="Tokens a step from this calibration.json of medusa tune (or its folder), not from the paper's law.",
        ),
    ] = None,
    tree: Annotated[
        Path | None, typer.Option("--tree", help="This tree alone, by --calibration or the calibration.json beside it.")
    ] = None,
    paper_block: Annotated[
        bool, typer.Option("--paper-block", help="Only what the paper simulates: eight operators of one layer, no heads.")
    ] = False,
    roofline: Annotated[bool, typer.Option("--roofline", help="The operators of a layer on the roofline, by phase.")] = False,
    paper_table: Annotated[int | None, typer.Option("--paper-table", help="Table 6, 7 or 8 of the paper, predicted.")] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Draw the paper's figures into this folder, PNG and SVG.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine.")] = False,
    name: Annotated[str, typer.Option("--name", help="What --measure calls it.")] = "here",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file that --measure adds it to.")] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Run the operators on this machine beside their prediction (see --hardware).")
    ] = False,
    device: common.DeviceOption = None,
    trust_remote_code: common.TrustOption = False,
    gguf_file: common.GgufOption = None,
    revision: common.RevisionOption = None,
    offline: common.OfflineOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Predict step time and speedup from the model's operators and the hardware (paper G)."""
    model = common.with_file(model, gguf_file, revision)
    if dtype not in DTYPES:
        raise InvalidInput(f"dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if measure + validate + roofline + (paper_table is not None) > 1:
        raise InvalidInput("give one of --measure, --validate, --roofline and --paper-table")
    if measure:
        return measure_here(name, output, device, dtype, as_json)
    from medusa.simulation import roofline as rooflines
    from medusa.simulation.hardware import load_hardware
    from medusa.simulation.prediction import Setting
    from medusa.simulation.shapes import load_shape

    machine = load_hardware(hardware)
    if paper_table is not None:
        cells = rooflines.paper_table(paper_table, machine)
        return show(
            [
                {
                    "row": cell.length if paper_table == 6 else cell.batch,
                    "candidates": cell.candidates,
                    "tflops": cell.predicted / 1e12,
                    "operational_intensity": cell.intensity,
                }
                for cell in cells
            ],
            as_json,
        )
    shape = load_shape(model, trust_remote_code)
    setting = Setting(shape, machine, dtype, num_heads, not shared_lm_head, weight_bits, paper_block)
    batches, lengths = common.integers("batch", batch), common.integers("length", length)
    sizes = common.integers("candidates", candidates)
    if roofline:
        found = [p for b in batches for s in lengths for q in sizes for p in rooflines.points(shape, machine, b, s, q, dtype)]
        return show([dataclasses.asdict(p) for p in dict.fromkeys(found)], as_json)  # prefill and decoding once
    if validate:
        return validate_here(setting, device, batches, lengths, sizes, as_json)
    acceleration, sizes, source = acceleration_of(calibration, tree, sizes)
    if plots is not None:
        from medusa.simulation.plots import save_figures

        for file in save_figures(setting, acceleration, plots):
            common.note(str(file))
    return predictions(setting, model, hardware, batches, lengths, sizes, acceleration, source, as_json)


def predictions(
    setting: Setting,
    model: str,
    hardware: str,
    batches: list[int],
    lengths: list[int],
    sizes: list[int],
    acceleration: Acceleration,
    source: str,
    as_json: bool,
) -> None:
    """Print the speedup of every setting, the best tree size of each, and where trees stop paying."""
    from medusa.simulation.operators import memory
    from medusa.simulation.prediction import best, predict, stops_paying

    points = [predict(setting, b, s, q, acceleration) for b in batches for s in lengths for q in sizes]
    bests = [best(setting, b, s, acceleration, sizes) for b in batches for s in lengths]
    stops = {s: stops_paying(setting, s, acceleration, sizes) for s in lengths}
    held = memory(setting.shape, max(batches), max(lengths), setting.element, setting.weight_bytes)
    if held > setting.hardware.memory:
        common.note(f"the largest setting holds {held / 1e9:.0f} GB, {hardware} has {setting.hardware.memory / 1e9:.0f} GB")
    if as_json:
        record = {
            "model": model,
            "hardware": hardware,
            "acceleration": source,
            "points": [dataclasses.asdict(p) for p in points],
            "best": [dataclasses.asdict(p) for p in bests],
            "stops_paying": [{"length": s, "batch": b} for s, b in stops.items()],
            "memory_bytes": held,
        }
        print(json.dumps(record))
        return
    rows = []
    for top in bests:
        speedups = [f"{p.speedup:.2f}" for p in points if (p.batch, p.length) == (top.batch, top.length)]
        plain = f"{1e3 * top.seconds / top.overhead:.2f}"
        rows.append([str(top.batch), str(top.length), plain, f"{top.candidates} ({top.speedup:.2f})", *speedups])
    title = f"{model} on {hardware}: speedup by tree size; tokens a step: {source}"
    showing.print_table(["batch", "length", "plain ms", "best size", *map(str, sizes)], rows, title, keys=2)
    for s, stop in stops.items():
        print(f"length {s}: " + ("trees pay at every batch tried" if stop is None else f"no tree pays from batch {stop} on"))


def acceleration_of(calibration: str | None, tree: Path | None, sizes: list[int]) -> tuple[Acceleration, list[int], str]:
    """Tokens a step by tree size, the sizes to look at, and where the figures come from."""
    from medusa.checkpoints.hub import local_model
    from medusa.simulation.prediction import calibrated, log_law
    from medusa.trees.calibration import Calibration

    file = Path(calibration) if calibration is not None else None
    if calibration is not None and (known := local_model(calibration)) is not None:
        file = known.heads or known.folder
    if tree is not None:
        from medusa.trees.files import load_tree
        from medusa.trees.static import MedusaTree

        chosen = load_tree(tree)
        if not isinstance(chosen, MedusaTree):
            raise InvalidInput(f"{tree} holds no static tree; give its acceptance with --calibration instead")
        rate = Calibration.load(file or tree.parent).expected_acceptance_length(chosen)
        return lambda size: rate if size > 1 else 1.0, [1, len(chosen)], f"{tree.name}, calibrated"
    if file is not None:
        return calibrated(Calibration.load(file)), sizes, "calibrated"
    return log_law, sizes, "0.477·log2(nodes), the paper's Vicuna-7B"


def measure_here(name: str, output: Path | None, device: str | None, dtype: str, as_json: bool) -> None:
    from medusa.simulation.hardware import save_hardware
    from medusa.simulation.machine import measure

    found = measure(common.default_device(device), dtype)
    if output is not None:
        save_hardware(found, name, output)
        common.note(f"{name} added to {output}")
    if as_json:
        print(json.dumps({name: dataclasses.asdict(found)}))
        return
    print(f"{name}: {found.source}")
    print(f"copy {found.bandwidth / 1e9:.1f} GB/s, elementwise passes {(found.pointwise or 0) / 1e9:.1f} GB/s, launch ", end="")
    print(f"{1e6 * found.launch:.1f} µs, besides {1e6 * found.layer:.0f} µs a layer and {1e6 * found.step:.0f} µs a step")
    for width, rows, seconds in found.linear[dtype]:
        print(f"linear layers {width:g} wide, {rows:g} rows: {2 * rows / seconds / 1e9:.1f} GFLOP/s")


def validate_here(
    setting: Setting, device: str | None, batches: list[int], lengths: list[int], sizes: list[int], as_json: bool
) -> None:
    from medusa.simulation.machine import validate

    found = [
        {"batch": b, "length": s, **dataclasses.asdict(v), "error": v.error}
        for b in batches
        for s in lengths
        for v in validate(setting, common.default_device(device), b, s, sizes)
    ]
    show(found, as_json)
    if not as_json:
        errors = sorted(abs(row["error"]) for row in found)
        print(f"median error {errors[len(errors) // 2]:.0%}, greatest {errors[-1]:.0%}")


def show(rows: list[dict], as_json: bool) -> None:
    """Rows of equal keys: as JSON, or as a table of four digits."""
    if as_json:
        print(json.dumps(rows))
        return
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    showing.print_table([key.replace("_", " ") for key in rows[0]], cells)
