"""medusa simulate: whether Medusa pays off for a model, machine, batch size and context length."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medusa.cli import common, showing
from medusa.config import HeadsKind, option
from medusa.errors import InvalidInput
from medusa.runs.console import note

if TYPE_CHECKING:
    from medusa.simulation.fleet import Operating
    from medusa.simulation.hardware import Hardware
    from medusa.simulation.prediction import Acceleration, Setting
    from medusa.simulation.shapes import ModelShape


@dataclasses.dataclass(frozen=True)
class Grid:
    """The batch sizes, context lengths and tree sizes to predict."""

    batches: tuple[int, ...] = option(
        (1, 2, 4, 8, 16, 32, 64), "Batch size; repeatable (default: 1 to 64).", flags=("--batch",), least=1
    )
    lengths: tuple[int, ...] = option(
        (1024,), "Context length in tokens; repeatable (default: 1024).", flags=("--context",), least=1
    )
    sizes: tuple[int, ...] = option(
        (1, 2, 4, 8, 16, 32, 64, 128),
        "Tree size, the root included; repeatable (default: 1 to 128).",
        flags=("--nodes",),
        least=1,
    )


@dataclasses.dataclass(frozen=True)
class Assumed:
    """The numbers and heads that are assumed."""

    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "Data type of weights and activations.")
    weight_bits: int | None = option(None, "Bits per quantised weight, assumed to unpack at no cost (default: the dtype's).")
    num_heads: int = option(5, "Number of Medusa heads that the trees use.", least=0)
    shared_lm_head: bool = option(False, "Assume heads that share the backbone's LM head.")
    heads_kind: HeadsKind = option("medusa", "What the heads read besides the hidden state.")
    gpus: int = option(1, "Number of GPUs that share every layer of one copy of the model (tensor parallel).", least=1)
    launch: float | None = option(
        None, "Microseconds to launch an operator; 0: CUDA graphs hide all launches (default: the machine's).", least=0
    )
    paper_block: bool = option(False, "Simulate only eight operators of one layer, without heads, as the paper does.")

    def setting(self, shape: ModelShape, machine: Hardware) -> Setting:
        from medusa.simulation.prediction import Setting

        given = {name: value for name, value in vars(self).items() if name not in ("shared_lm_head", "launch")}
        if self.launch is not None:
            machine = dataclasses.replace(machine, launch=self.launch / 1e6)
        return Setting(shape, machine, own_lm_heads=not self.shared_lm_head, **given)


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The fleet to predict, if a limit or a load is given."""

    limits: tuple[float, ...] = option(
        (),
        "Predict the load that a fleet can serve at no more than this many milliseconds per token of a request; repeatable.",
        flags=("--limit",),
        above=0,
    )
    loads: tuple[float, ...] = option(
        (),
        "Predict the latency of a fleet that generates this many tokens per second; repeatable.",
        flags=("--load",),
        above=0,
    )
    replicas: int = option(1, "Number of copies of the model in the fleet.", least=1)
    price: float = option(1.0, "Price of one GPU for one hour (default: 1, so that costs are GPU-hours).", above=0)
    prompt_tokens: int = option(1024, "Number of tokens of every prompt, with --limit or --load.", least=1)
    answer_tokens: int = option(256, "Number of tokens of every answer, with --limit or --load.", least=1)


@dataclasses.dataclass(frozen=True)
class Rates:
    """The source of the tokens per step."""

    calibration: str | None = option(
        None, "calibration.json of `medusa tune`, or its folder, for the tokens per step (default: the paper's law)."
    )
    tree: Path | None = option(None, "Predict this tree only, with --calibration or the calibration.json beside it.")

    def acceleration(self, sizes: tuple[int, ...]) -> tuple[Acceleration, tuple[int, ...], str]:
        """Tokens per step by tree size, the sizes to predict, and the name of the source."""
        from medusa.checkpoints.hub import local_model
        from medusa.simulation.prediction import calibrated, log_law
        from medusa.trees.calibration import Calibration

        file = Path(self.calibration) if self.calibration is not None else None
        if self.calibration is not None and (known := local_model(self.calibration)) is not None:
            file = known.heads or known.folder
        if self.tree is not None:
            from medusa.trees.files import load_tree
            from medusa.trees.static import MedusaTree

            chosen = load_tree(self.tree)
            if not isinstance(chosen, MedusaTree):
                raise InvalidInput(f"{self.tree} holds no static tree; give its acceptance with --calibration instead")
            rate = Calibration.load(file or self.tree.parent).expected_acceptance_length(chosen)
            return lambda size: rate if size > 1 else 1.0, (1, len(chosen)), f"{self.tree.name}, calibrated"
        if file is not None:
            return calibrated(Calibration.load(file)), sizes, "calibrated"
        return log_law, sizes, "0.477·log2(nodes), the paper's Vicuna-7B"


@dataclasses.dataclass(frozen=True)
class Task:
    """What to do besides or instead of predicting step times."""

    roofline: bool = option(False, "Show a layer's operators on the roofline, by phase.")
    paper_table: int | None = option(None, "Predict Table 6, 7 or 8 of the paper.", least=6, most=8)
    plots: Path | None = option(None, "Draw the paper's figures into this folder, as PNG and SVG.")
    measure: bool = option(False, "Measure this machine, instead of predicting.")
    name: str = option("here", "Name of the measured machine.")
    output: Path | None = option(None, "File that --measure adds the machine to.", flags=("--output", "-o"))
    validate: bool = option(False, "Run the operators on this machine and compare their times with the prediction.")

    def __post_init__(self) -> None:
        if self.measure + self.validate + self.roofline + (self.paper_table is not None) > 1:
            raise InvalidInput("give one of --measure, --validate, --roofline and --paper-table")


@common.with_options(Rates, Grid, Assumed, Fleet, Task, common.Locating)
def simulate_command(
    model: Annotated[
        str,
        typer.Argument(
            help="llama-7b, llama-13b, llama-33b, llama-3-8b, llama-3-70b, `embedded`, or a folder or hub id with a config."
        ),
    ] = "llama-7b",
    hardware: Annotated[
        str, typer.Option(help="A known machine, or a file written by --measure (FILE or FILE:NAME).")
    ] = "a100-80gb-pcie",
    device: common.DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
    **options: Any,
) -> None:
    """Predict step time and speedup from the model's operators and the hardware (paper, Appendix G)."""
    rates, task, fleet = common.take(Rates, options), common.take(Task, options), common.take(Fleet, options)
    grid, assumed = common.take(Grid, options), common.take(Assumed, options)
    if task.measure:
        return measure_here(task.name, task.output, device, assumed.dtype, as_json)
    from medusa.simulation.hardware import load_hardware
    from medusa.simulation.shapes import load_shape

    machine = load_hardware(hardware)
    if task.paper_table is not None:
        return show_paper_table(task.paper_table, machine, as_json)
    model = common.full_name(model, options)
    setting = assumed.setting(load_shape(model, options["trust_remote_code"]), machine)
    if task.roofline:
        return show_roofline(setting, grid, as_json)
    if task.validate:
        return validate_here(setting, device, grid, as_json)
    acceleration, sizes, source = rates.acceleration(grid.sizes)
    if task.plots is not None:
        draw_figures(setting, acceleration, task.plots)
    names = {"model": model, "hardware": hardware, "acceleration": source}
    if fleet.limits or fleet.loads:
        return show_fleet(setting, names, fleet, sizes, acceleration, as_json)
    return show_predictions(setting, names, dataclasses.replace(grid, sizes=sizes), acceleration, as_json)


def draw_figures(setting: Setting, acceleration: Acceleration, folder: Path) -> None:
    from medusa.simulation.plots import save_figures

    for file in save_figures(setting, acceleration, folder):
        note(str(file))


def show_predictions(setting: Setting, names: dict[str, str], grid: Grid, acceleration: Acceleration, as_json: bool) -> None:
    """Print the speedup of every setting, its best tree size, and the batch size from which no tree pays off. `names` are those
    of the model, the hardware and the source of the acceleration rates."""
    from medusa.simulation.prediction import best, predict, stops_paying

    settings = [(b, s) for b in grid.batches for s in grid.lengths]
    points = [predict(setting, b, s, q, acceleration) for b, s in settings for q in grid.sizes]
    bests = [best(setting, b, s, acceleration, grid.sizes) for b, s in settings]
    stops = {s: stops_paying(setting, s, acceleration, grid.sizes) for s in grid.lengths}
    held = setting.memory(max(grid.batches), max(grid.lengths))
    if held > setting.gpus * setting.hardware.memory:
        has = f"{names['hardware']} has {setting.gpus * setting.hardware.memory / 1e9:.0f} GB"
        note(f"the largest setting needs {held / 1e9:.0f} GB, {has}")
    if as_json:
        record = {
            **names,
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
    title = f"{names['model']} on {names['hardware']}: speedup by tree size; tokens per step: {names['acceleration']}"
    showing.print_table(["batch", "length", "plain ms", "best size", *map(str, grid.sizes)], rows, title, keys=2)
    for s, stop in stops.items():
        gain = "trees pay off at every batch size tried" if stop is None else f"no tree pays off from batch size {stop} on"
        print(f"length {s}: {gain}")


def show_fleet(
    setting: Setting, names: dict[str, str], fleet: Fleet, sizes: tuple[int, ...], acceleration: Acceleration, as_json: bool
) -> None:
    """Print what the fleet serves within every limit, and how fast it is under every load: plain, and with the best trees."""
    from medusa.simulation.fleet import Replica

    pair = [Replica(setting, fleet.prompt_tokens, fleet.answer_tokens, acceleration, among) for among in ((1,), (1, *sizes))]
    asked = [(f"{limit:g} ms", [replica.within(limit / 1e3) for replica in pair]) for limit in fleet.limits]
    asked += [(f"{load:g} tokens/s", [replica.under(load / fleet.replicas) for replica in pair]) for load in fleet.loads]
    found = [(question, [figures(point, fleet, setting.gpus) for point in points]) for question, points in asked]
    if as_json:
        record = [{"asked": question, "plain": plain, "medusa": medusa} for question, (plain, medusa) in found]
        print(json.dumps({**names, "most_requests": [replica.most_requests for replica in pair], "rows": record}))
        return
    columns = ("requests", "nodes", "ms/token", "tokens/s", "cost/M")
    rows = []
    for question, points in found:
        plain, medusa = (
            [f"{figure:.{digits}f}" for figure, digits in zip(point.values(), (0, 0, 1, 0, 3), strict=True)]
            if point
            else ["-"] * 5
            for point in points
        )
        rows.append([question, *plain[:1], *plain[2:], *medusa])
    machines = f"{setting.gpus} {names['hardware']}" if setting.gpus > 1 else names["hardware"]
    title = f"{names['model']} on {fleet.replicas} x {machines}: plain, then Medusa; tokens per step: {names['acceleration']}"
    showing.print_table(["", *columns[:1], *columns[2:], *columns], rows, title)
    most = " plain and ".join(str(replica.most_requests) for replica in pair)
    size = f"{fleet.prompt_tokens} + {fleet.answer_tokens} tokens"
    print(f"memory of a replica: for {most} Medusa requests of {size}")


def figures(point: Operating | None, fleet: Fleet, gpus: int) -> dict[str, float] | None:
    """Requests at a time on a replica, its tree's nodes, milliseconds per token, the fleet's tokens per second, cost."""
    if point is None:
        return None
    return {
        "requests": point.requests,
        "nodes": point.candidates,
        "milliseconds_per_token": 1e3 * point.seconds_per_token,
        "tokens_per_second": fleet.replicas * point.tokens_per_second,
        "cost": point.cost(fleet.price, gpus),
    }


def show_paper_table(number: int, machine: Any, as_json: bool) -> None:
    """Print the predicted cells of a table of the paper."""
    from medusa.simulation.roofline import paper_table

    names = ("row", "candidates", "tflops", "operational_intensity")
    cells = (
        (cell.length if number == 6 else cell.batch, cell.candidates, cell.predicted / 1e12, cell.intensity)
        for cell in paper_table(number, machine)
    )
    show_rows([dict(zip(names, cell, strict=True)) for cell in cells], as_json)


def show_roofline(setting: Setting, grid: Grid, as_json: bool) -> None:
    """Print the operators of a layer on the roofline; equal ones of several settings only once."""
    from medusa.simulation.roofline import points

    shape, machine, dtype = setting.shape, setting.hardware, setting.dtype
    found = [p for b in grid.batches for s in grid.lengths for q in grid.sizes for p in points(shape, machine, b, s, q, dtype)]
    show_rows([dataclasses.asdict(p) for p in dict.fromkeys(found)], as_json)


def measure_here(name: str, output: Path | None, device: str | None, dtype: str, as_json: bool) -> None:
    """Measure this machine, print the results, and add it to a file."""
    from medusa.checkpoints.named import device_named
    from medusa.simulation.hardware import save_hardware
    from medusa.simulation.machine import measure_machine

    found = measure_machine(device_named(device), dtype)
    if output is not None:
        save_hardware(found, name, output)
        note(f"{name} added to {output}")
    if as_json:
        print(json.dumps({name: dataclasses.asdict(found)}))
        return
    print(f"{name}: {found.source}")
    print(f"copy {found.bandwidth / 1e9:.1f} GB/s, elementwise passes {(found.pointwise or 0) / 1e9:.1f} GB/s, launch ", end="")
    print(f"{1e6 * found.launch:.1f} µs, besides {1e6 * found.layer:.0f} µs per layer and {1e6 * found.step:.0f} µs per step")
    for width, rows, seconds in found.linear[dtype]:
        print(f"linear layers {width:g} wide, {rows:g} rows: {2 * rows / seconds / 1e9:.1f} GFLOP/s")


def validate_here(setting: Setting, device: str | None, grid: Grid, as_json: bool) -> None:
    """Run the operators on this machine, and print their times beside the prediction."""
    from medusa.checkpoints.named import device_named
    from medusa.simulation.machine import validate

    found = [
        {"batch": b, "length": s, **dataclasses.asdict(v), "error": v.error}
        for b in grid.batches
        for s in grid.lengths
        for v in validate(setting, device_named(device), b, s, list(grid.sizes))
    ]
    show_rows(found, as_json)
    if not as_json:
        errors = sorted(abs(row["error"]) for row in found)
        print(f"median error {errors[len(errors) // 2]:.0%}, greatest {errors[-1]:.0%}")


def show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows of equal keys as JSON, or as a table with four digits."""
    if as_json:
        print(json.dumps(rows))
        return
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    showing.print_table([key.replace("_", " ") for key in rows[0]], cells)
