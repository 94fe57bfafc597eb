"""This machine: its measured speed, and the times of its operators compared with their prediction."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear as apply_linear

from medusa.errors import InvalidInput
from medusa.runs.provenance import cpu_name
from medusa.simulation.hardware import Hardware
from medusa.simulation.operators import Operator, layers
from medusa.simulation.prediction import Setting, check_positive
from medusa.simulation.shapes import BUILT_IN

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def measure_machine(
    device: str, dtype: str = "bfloat16", megabytes: int = 256, widths: Sequence[int] = (512, 2048), rounds: int = 5
) -> Hardware:
    """Measure this machine: copy bandwidth, linear layers by width and rows, elementwise passes, launches, fixed costs.

    Args:
        megabytes: size of a copy, and of the weights that linear layers use in turn: more than any cache holds.
        widths: widths of the linear layers' square weights; narrow ones were found to take longer per weight.
        rounds: number of times that everything is timed.
    """
    check_positive(megabytes=megabytes, rounds=rounds, width=min(widths))
    kind = getattr(torch, dtype)
    bandwidth = copy_bandwidth(device, megabytes)
    small = torch.ones(1, 8, device=device).to(kind), torch.ones(8, 8, device=device).to(kind)  # too small to compute much
    launch = timed(lambda: [apply_linear(*small) for _ in range(256)], device, rounds) / 256
    samples = []
    for width in sorted(widths):
        weight = torch.randn(width, width, device=device).to(kind)
        weights = [weight.clone() for _ in range(max(2, megabytes * 2**20 // (weight.numel() * weight.element_size())))]
        for rows in ROWS:
            x = torch.randn(rows, width, device=device).to(kind)
            seconds = timed(partial(_apply_all, x, weights), device, rounds) / len(weights)
            samples.append([width, rows, max(seconds - launch, seconds / 10) / width**2])
    per_step, per_layer = _fixed(device, kind, launch, rounds)
    best = max(2 * rows / seconds for _, rows, seconds in samples)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory
    return Hardware(
        peak={dtype: best},
        bandwidth=bandwidth,
        memory=float(memory),
        source=f"measured: {device_name(device)}, torch {torch.__version__}",
        compute_share=1.0,
        bandwidth_share=1.0,
        launch=launch,
        layer=per_layer,
        step=per_step,
        pointwise=_pointwise(device, kind, max(widths), rounds),
        linear={dtype: samples},
        asynchronous=not device.startswith("cpu"),
    )


@dataclass(frozen=True)
class Validation:
    """Measured and predicted seconds of an operator."""

    operator: str
    phase: str  # prefill, decoding or medusa
    candidates: int  # new tokens of a sequence
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over measured seconds, minus 1."""
        return self.predicted / self.measured - 1


def validate(
    setting: Setting, device: str, batch: int, length: int, candidates: list[int], megabytes: int = 256, rounds: int = 3
) -> list[Validation]:
    """Run each operator in a prefill of `length` tokens and in a step at every number of candidates; InvalidInput for quantised
    weights and experts."""
    kind = getattr(torch, setting.dtype)
    if setting.weight_bits is not None or setting.shape.experts:
        raise InvalidInput("validation supports only dense layers without quantised weights")
    prefill = layers(setting.shape, batch, length, length, setting.element, setting.weight_bytes)
    phases = [("prefill", length, prefill)]
    phases += [("medusa" if q > 1 else "decoding", q, setting.operators(batch, length, q)) for q in candidates]
    found = []
    for phase, q, operators in phases:
        for operator in operators:
            if operator.flops:
                run, runs = _real(operator, kind, device, megabytes)
                predicted = setting.hardware.seconds(operator, setting.dtype)
                found.append(Validation(operator.name, phase, q, timed(run, device, rounds) / runs, predicted))
    return found


def _apply_all(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        apply_linear(x, weight)


def _real(operator: Operator, kind: torch.dtype, device: str, megabytes: int) -> tuple[Callable[[], object], int]:
    """The operator on random data, with enough operands to come from memory as in a model; and how often one call runs it."""
    count = max(1, min(1024, round(megabytes * 2**20 / operator.bytes)))
    if operator.weights:
        inputs, outputs = operator.dims
        x = torch.randn(int(operator.rows), inputs, device=device).to(kind)
        weight = torch.randn(outputs, inputs, device=device).to(kind)
        weights = [weight.clone() for _ in range(count)]
        return partial(_apply_all, x, weights), count
    b, n, n_kv, q, s, d = operator.dims
    inner = d if operator.name == "qk" else s
    x = torch.randn(b * n_kv, q * n // n_kv, inner, device=device).to(kind)  # queries that share keys, in one product
    held = torch.randn(b * n_kv, s, d, device=device).to(kind)
    sides = [held.clone() for _ in range(count)]
    if operator.name == "qk":
        sides = [keys.transpose(1, 2) for keys in sides]
    return lambda: [torch.bmm(x, side) for side in sides], count


def timed(run: Callable[[], object], device: str, rounds: int) -> float:
    """Seconds of a call: the minimum over rounds, since other work on the machine only adds time; one more round warms up."""
    seconds = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            start = now(device)
            run()
            seconds.append(now(device) - start)
    return min(seconds[1:])


def now(device: str) -> float:
    """The clock, after the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device.startswith("mps"):
        torch.mps.synchronize()
    return time.perf_counter()


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes per second, read and written, of a large copy: the best of eight."""
    source = torch.ones(megabytes * 2**20 // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * source.numel() * source.element_size() / min(seconds)


def _pointwise(device: str, kind: torch.dtype, width: int, rounds: int) -> float:
    """Bytes per second of a norm as transformers writes it, on activations that fit in a cache."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    rows = 64
    norm, x = LlamaRMSNorm(width).to(device, kind), torch.randn(rows, width, device=device).to(kind)
    empty = torch.randn(1, 8, device=device).to(kind)
    small = LlamaRMSNorm(8).to(device, kind)
    large = timed(lambda: [norm(x) for _ in range(32)], device, rounds) / 32
    fixed = timed(lambda: [small(empty) for _ in range(32)], device, rounds) / 32
    return 36 * x.element_size() / 2 * x.numel() / max(large - fixed, large / 10)


def _fixed(device: str, kind: torch.dtype, launch: float, rounds: int) -> tuple[float, float]:
    """Fixed seconds of a decoding step, and of a layer besides its operators, by Llamas too small to compute much."""
    shallow, deep = (_small_step(depth, device, kind, rounds) for depth in (2, 8))
    whole = max(0.0, (deep - shallow) / 6)
    operators = len([o for o in layers(BUILT_IN["llama-7b"], 1, 1, 1) if o.flops])
    return max(0.0, shallow - 2 * whole), max(0.0, whole - operators * launch)


def _small_step(depth: int, device: str, kind: torch.dtype, rounds: int) -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    from medusa.batch.rows import DecodingOptions
    from medusa.decoding import prefill, step
    from medusa.model import MedusaModel
    from medusa.trees.static import MedusaTree

    width = dict(vocab_size=256, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    backbone = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **width)).to(device, kind).eval()
    model, steps = MedusaModel(backbone), 16
    options = DecodingOptions(max_new_tokens=(rounds + 1) * steps + 2)
    state = prefill(model, torch.ones(1, 16, dtype=torch.long, device=device), None, MedusaTree([]), options)
    return timed(lambda: [step(model, state) for _ in range(steps)], device, rounds) / steps


def device_name(device: str) -> str:
    """The name of a GPU, or of the CPU with its number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
