"""Write what the commands in docs/scale.md print, and draw its picture: `python docs/scale.py` (tests/test_docs.py checks)."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from medusa import EMBEDDED
from medusa.cli import app
from medusa.runs.plotting import new_figure, save_plot
from medusa.simulation.fleet import Replica
from medusa.simulation.hardware import load_hardware
from medusa.simulation.prediction import Acceleration, Setting, calibrated, log_law
from medusa.simulation.shapes import BUILT_IN
from medusa.trees.calibration import Calibration

PAGE = Path(__file__).with_name("scale.md")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
PANELS = (("llama-3-8b", "h100-sxm", 1), ("llama-3-70b", "h100-sxm", 8))
LIMITS = [2 * 2 ** (step / 8) for step in range(45)]  # 2 to 90 ms per token


SERIES: dict[str, tuple[str, Acceleration, tuple[int, ...]]] = {
    "plain": ("black", log_law, (1,)),
    "Medusa, rates of Vicuna-7B by the paper's law": ("tab:orange", log_law, SIZES),
    "Medusa, rates of the embedded model": ("tab:green", calibrated(Calibration.load(EMBEDDED)), SIZES),
}


def draw() -> None:
    figure = new_figure(9, 4)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (model, hardware, gpus) in zip(panels, PANELS, strict=True):
        machine = load_hardware(hardware)
        for launch, style in ((0.0, "-"), (machine.launch, ":")):
            given = Setting(BUILT_IN[model], replace(machine, launch=launch), own_lm_heads=False, gpus=gpus)
            for name, (colour, rate, sizes) in SERIES.items():
                limits, costs = costs_by_limit(Replica(given, 1024, 256, rate, sizes))
                label = name if launch == 0 else f"{1e6 * launch:.0f} µs per operator" if name == "plain" else None
                axes.plot(limits, costs, style, color=colour, label=label, linewidth=1.2)
        axes.set(xscale="log", yscale="log", title=f"{model} on {gpus} x {hardware}")
        axes.set_xlabel("greatest milliseconds per token of a request")
        axes.grid(which="both", linewidth=0.3)
    panels[0].set_ylabel("GPU-hours per million tokens")
    panels[0].legend(fontsize="x-small")
    save_plot(figure, PAGE.with_suffix(".svg"))


def costs_by_limit(replica: Replica) -> tuple[list[float], list[float]]:
    """The limits in milliseconds that the replica can meet, and the GPU-hours of a million tokens within each."""
    found = {limit: replica.within(limit / 1e3) for limit in LIMITS}
    met = {limit: point.cost(1.0, replica.setting.gpus) for limit, point in found.items() if point is not None}
    return [*met], [*met.values()]


def page() -> str:
    """The page with what its commands print now, each below its line `$ medusa …`."""
    return re.sub(r"(?<=```console\n).*?(?=```)", lambda block: printed(block[0]), PAGE.read_text(), flags=re.DOTALL)


def printed(block: str) -> str:
    commands = re.findall(r"^\$ medusa (.*)$", block.replace("\\\n", ""), re.MULTILINE)
    shown = re.findall(r"^\$ (?:.*\\\n)*.*\n", block, re.MULTILINE)
    said = []
    for lines, command in zip(shown, commands, strict=True):
        command, _, last = command.partition(" | tail -n ")
        done = CliRunner().invoke(app, shlex.split(command), env={"COLUMNS": None}, catch_exceptions=False)
        output = [line.rstrip() for line in done.stdout.splitlines()]
        said.append(lines + "".join(f"{line}\n" for line in output[-int(last or 0) :]))
    return "".join(said)


if __name__ == "__main__":
    PAGE.write_text(page())
    draw()
