"""Fusion: the linear maps of a compiled step run through the kernels, those of one input together."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

MOST_ROWS = 64  # with more, a step is bound by arithmetic, and torch's own kernels are faster


def few_rows_backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile for a CPU: inductor, after `fuse_linear_maps`."""
    from torch._inductor.compile_fx import compile_fx

    fuse_linear_maps(graph)
    return compile_fx(graph, inputs)


def fuse_linear_maps(graph: fx.GraphModule) -> None:
    """Replace linear maps of a few bfloat16 rows by the kernel, one call for all maps of the same input."""
    groups: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is torch._C._nn.linear and _fits(node):
            groups.setdefault((node.args[0], _bias(node) is not None), []).append(node)
    for (x, biased), nodes in groups.items():
        # At the first of them: their weights are inputs of the graph, and so come before.
        with graph.graph.inserting_before(nodes[0]):
            biases = [_bias(node) for node in nodes] if biased else []
            weights = [node.args[1] for node in nodes]
            mapped = graph.graph.call_function(torch.ops.medusa.linear.default, (x, weights, biases))
            found = [graph.graph.call_function(operator.getitem, (mapped, index)) for index in range(len(nodes))]
        for node, output in zip(nodes, found, strict=True):
            output.meta = dict(node.meta)
            node.replace_all_uses_with(output)
            graph.graph.erase_node(node)
    graph.recompile()


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _fits(node: fx.Node) -> bool:
    """Whether a linear map is one for the kernel: a few contiguous bfloat16 rows on a CPU, and weights that are inputs."""
    if len(node.args) < 2:
        return False
    operands = [node.args[0], node.args[1], _bias(node)]
    if any(isinstance(operand, fx.Node) and operand.op not in ("placeholder", "get_attr") for operand in operands[1:]):
        return False
    values = [operand.meta.get("example_value") for operand in operands if isinstance(operand, fx.Node)]
    if not all(
        isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu" for value in values
    ):
        return False
    x, *held = values
    return x.numel() // x.shape[-1] <= MOST_ROWS and all(value.is_contiguous() for value in held)
