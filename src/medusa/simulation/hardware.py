"""Hardware: the FLOPs and bytes per second of a machine, and the time that it takes for an operator."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np

from medusa.config import from_mapping, read_json_object
from medusa.errors import CheckpointError, InvalidInput
from medusa.runs.files import write_text
from medusa.simulation.operators import Operator

ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Hardware:
    """A machine. The defaults are the terms fitted to the paper's measurements on an A100 (docs/simulation.md)."""

    peak: dict[str, float]  # FLOP/s by dtype: dense, accumulated in float32
    bandwidth: float  # bytes per second of the memory
    memory: float  # size of the memory in bytes
    source: str
    compute_share: float = 0.89  # share of the FLOP/s that operators reach
    bandwidth_share: float = 0.96  # and of the bandwidth
    launch: float = 34e-6  # additional seconds of every operator
    layer: float = 0.0  # seconds per layer that do not grow with size; measured machines only
    step: float = 0.0  # and per step
    pointwise: float | None = None  # bytes per second of elementwise passes over activations; None: not counted
    # By dtype, [inputs, rows, seconds per weight] of linear layers with weights from memory, inputs and rows rising; measured
    # machines only, and used instead of peak and bandwidth.
    linear: dict[str, list[list[float]]] = field(default_factory=dict)
    link: float | None = None  # bytes per second that each of several GPUs sends while it receives as many; None: not known
    asynchronous: bool = True  # the host runs ahead of the device: a step takes the longer of fixed costs and work

    def __post_init__(self) -> None:
        rates = [self.bandwidth, self.memory, self.compute_share, self.bandwidth_share, *self.peak.values()]
        if not self.peak or not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
            raise InvalidInput("hardware needs its bandwidth, memory, shares and peak of every dtype to be numbers above 0")
        for dtype, samples in self.linear.items():
            if not samples or any(len(sample) != 3 or min(sample) <= 0 for sample in samples):
                raise InvalidInput(f"linear layers in {dtype} need samples [inputs, rows, seconds per weight], all above 0")

    def flops(self, dtype: str) -> float:
        if dtype not in self.peak:
            raise InvalidInput(f"no FLOP/s known for {dtype}; this hardware has {', '.join(self.peak)}")
        return self.peak[dtype]

    def attainable(self, intensity: float, dtype: str = "bfloat16") -> float:
        """The roofline: greatest FLOP/s of an operator of this intensity.

        >>> load_hardware("a100-80gb-pcie").attainable(100) / 1e12
        193.5
        """
        return min(self.flops(dtype), self.bandwidth * intensity)

    def seconds(self, operator: Operator, dtype: str = "bfloat16") -> float:
        """Predicted seconds of one run of an operator: launch, then memory, then arithmetic, one after another."""
        if not operator.flops:
            return operator.bytes / self.pointwise if self.pointwise else 0.0
        moving = self.bandwidth * self.bandwidth_share
        if operator.weights and dtype in self.linear:
            unread = operator.weights * ELEMENT[dtype] - operator.weight_bytes  # of quantised weights
            streamed = operator.weights * _seconds_a_weight(self.linear[dtype], operator.dims[0], operator.rows)
            return self.launch + max(streamed - unread / moving, operator.weight_bytes / moving)
        return self.launch + operator.bytes / moving + operator.flops / (self.flops(dtype) * self.compute_share)


def _seconds_a_weight(samples: Sequence[Sequence[float]], inputs: int, rows: float) -> float:
    """Interpolated between samples on logarithmic axes; with more rows than sampled the FLOP/s stay the same."""
    curves: dict[float, list[tuple[float, float]]] = {}
    for width, sampled_rows, seconds in samples:
        curves.setdefault(width, []).append((sampled_rows, seconds))
    most = max(sampled_rows for _, sampled_rows, _ in samples)
    by_width = [(width, _interpolate(curve, rows)) for width, curve in curves.items()]
    return _interpolate(by_width, inputs) * max(1.0, rows / most)


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    xs, ys = np.log(np.array(points)).T
    return math.exp(np.interp(math.log(x), xs, ys))


def known_hardware() -> dict[str, Hardware]:
    """The machines in `hardware.json`, by name."""
    return read_hardware(Path(str(files(__package__) / "hardware.json")))


def read_hardware(path: Path) -> dict[str, Hardware]:
    """The machines in a file as `medusa simulate --measure --output` writes it."""
    found = read_json_object(path)
    for name, entry in found.items():
        if not isinstance(entry, dict):
            raise CheckpointError(f"hardware {name} is {entry!r}, expected an object")
    return {name: from_mapping(Hardware, entry, f"{path}: {name}") for name, entry in found.items()}


def load_hardware(name: str) -> Hardware:
    """A known machine, or a measured one: `FILE`, or `FILE:NAME` of several; InvalidInput if there is none."""
    known = known_hardware()
    if name in known:
        return known[name]
    file, _, entry = name.partition(":")
    if not Path(file).is_file():
        raise InvalidInput(f"no hardware {name!r}; known: {', '.join(known)}; or give a file that --measure wrote")
    found = read_hardware(Path(file))
    if entry not in found and (entry or len(found) != 1):
        raise InvalidInput(f"{file} holds {', '.join(found) or 'nothing'}; name one as {file}:NAME")
    return found[entry] if entry else next(iter(found.values()))


def save_hardware(hardware: Hardware, name: str, path: Path) -> None:
    """Add a machine to a file, one line per machine, with numbers to four digits."""
    held = read_json_object(path) if path.exists() else {}
    entry = {key: value for key, value in dataclasses.asdict(hardware).items() if value is not None}
    held[name] = json.loads(json.dumps(entry), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"  {json.dumps(machine)}: {json.dumps(facts)}" for machine, facts in held.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
