"""Fusion: the linear maps of a compiled step run through the kernels, those of one input together."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

MOST_ROWS = 64  # with more, a step is bound by arithmetic, and torch's own kernels are faster


def few_rows_backend(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend of torch.compile for a CPU: inductor, after `fuse_linear_maps`."""
    from torch._inductor.compile_fx import compile_fx

    fuse_linear_maps(graph)
    return compile_fx(graph, inputs)


def fuse_linear_maps(graph: fx.GraphModule) -> None:
    """Replace linear maps of a few bfloat16 rows by the kernel, and make one call of all maps of the same input."""
    groups: dict[tuple[Any, Any, bool], list[tuple[fx.Node, list[list[Any]]]]] = {}
    for node in graph.graph.nodes:
        if (linear := _map(node)) is not None:
            x, kernel, operands = linear
            groups.setdefault((x, kernel, bool(operands[-1])), []).append((node, operands))
    for (x, kernel, _), maps in groups.items():
        # At the first of them: their operands are inputs of the graph, and so come before.
        with graph.graph.inserting_before(maps[0][0]):
            operands = [[item for _, each in maps for item in each[place]] for place in range(len(maps[0][1]))]
            outputs = graph.graph.call_function(kernel, (x, *operands))
            found = [graph.graph.call_function(operator.getitem, (outputs, number)) for number in range(len(maps))]
        for (node, _), output in zip(maps, found, strict=True):
            output.meta = dict(node.meta)
            node.replace_all_uses_with(output)
            alone: Any = node.args[0] if node.target is operator.getitem else None  # a call of the kernel for this map alone
            graph.graph.erase_node(node)
            if alone is not None:
                graph.graph.erase_node(alone)
    graph.recompile()


def _map(node: fx.Node) -> tuple[Any, Any, list[list[Any]]] | None:
    """A linear map that a kernel computes: its input, the kernel and the kernel's lists of operands, with one item each."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        call = node.args[0]
        if call.target in (torch.ops.medusa.linear_int8, torch.ops.medusa.linear_int8.default):
            x, *operands = call.args
            return x, torch.ops.medusa.linear_int8.default, [list(operand) for operand in operands]  # type: ignore[arg-type]
    if node.target is torch._C._nn.linear and _fits(node):
        bias = _bias(node)
        return node.args[0], torch.ops.medusa.linear.default, [[node.args[1]], [] if bias is None else [bias]]
    return None


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _fits(node: fx.Node) -> bool:
    """Whether a linear map is one for the kernel: a few contiguous bfloat16 rows on a CPU, and weights that are inputs."""
    if len(node.args) < 2:
        return False
    operands = [node.args[0], node.args[1], _bias(node)]
    if any(isinstance(operand, fx.Node) and operand.op not in ("placeholder", "get_attr") for operand in operands[1:]):
        return False
    values: list[Any] = [operand.meta.get("example_value") for operand in operands if isinstance(operand, fx.Node)]
    if not all(
        isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu" for value in values
    ):
        return False
    x, *held = values
    return x.numel() // x.shape[-1] <= MOST_ROWS and all(value.is_contiguous() for value in held)
