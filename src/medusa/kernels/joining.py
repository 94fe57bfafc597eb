"""Joining: calls of the kernels that follow on one another become one, described by a list of numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from medusa.kernels.build import MOST_RESULTS


def join_calls(graph: fx.GraphModule) -> None:
    """Make one call of those that follow on one another, as all layers of a Llama: between them, Python takes 25 us a layer."""
    place = {node: number for number, node in enumerate(graph.graph.nodes)}
    runs: list[list[Any]] = []
    for call in calls_of(graph, torch.ops.medusa.attend.default):
        run = runs[-1] if runs else []
        made = {node for each in run for node in _outputs(each)}
        others = [node for node in call.all_input_nodes if node not in made]
        follows = run and any(node in _outputs(run[-1]) for node in call.all_input_nodes)
        if follows and all(place[node] < place[run[0]] for node in others):
            run.append(call)
        else:
            runs.append([call])
    for run in runs:
        if len(run) > 1:
            _join(graph.graph, run)
    graph.recompile()


def _join(graph: fx.Graph, run: list[Any]) -> None:
    """Make a call of `medusa::calls` of several calls; the program is described at its definition."""
    made = [output for call in run for output in _outputs(call)]
    attentions = [call for call in run if call.target is torch.ops.medusa.attend.default]
    caches = list(dict.fromkeys(cache for call in attentions for cache in call.args[6:8]))
    given = list(dict.fromkeys(node for call in run for node in call.all_input_nodes if node not in (*made, *caches)))
    number = {None: -1, **{node: n for n, node in enumerate([*given, *caches])}}
    program, tensors, factors = [], len(given) + len(caches), []
    for call in run:
        if call in attentions:
            results, factor, numbers = 1, call.args[-1], [2, *(number[node] for node in call.args[:-1])]
        else:
            results, factor, numbers = _map_numbers(call, number)
        number |= {output: tensors + (0 if output is call else output.args[1]) for output in _outputs(call)}
        tensors += results
        factors.append(factor)
        program += numbers
    wanted = [output for output in made if any(user not in run for user in output.users)]
    if len(wanted) > MOST_RESULTS:
        return
    program += [len(wanted), *(number[output] for output in wanted)]
    with graph.inserting_before(run[0]):
        outputs = graph.call_function(torch.ops.medusa.calls.default, (given, caches, factors, program))
        found = [graph.call_function(operator.getitem, (outputs, n)) for n in range(len(wanted))]
    for output, result in zip(wanted, found, strict=True):
        result.meta = dict(output.meta)
        output.replace_all_uses_with(result, lambda user: user not in run)
    for call in reversed(run):
        erase([*call.users, call])


def _map_numbers(call: Any, number: dict[Any, int]) -> tuple[int, float, list[int]]:
    """The number of results of linear maps, their factor, and the numbers that describe them in a program."""
    rounded = call.target is torch.ops.medusa.linear_rounded.default
    x, weights, *others = call.args
    scales, sizes, biases = others if rounded else ([], [], *others)
    gated, added, scale = (call.kwargs.get(name) for name in ("gated", "added", "scale"))
    numbers = [int(rounded), number[x]]
    for each in ([number[w] for w in weights], [number[s] for s in scales], sizes, [number[b] for b in biases]):
        numbers += [len(each), *each]
    results = (1 if gated else len(weights)) + (added is not None)
    return results, call.kwargs.get("eps", 0.0), [*numbers, int(bool(gated)), number[added], number[scale]]


def _outputs(call: Any) -> list[Any]:
    return [call] if call.target is torch.ops.medusa.attend.default else list(call.users)


def calls_of(graph: fx.GraphModule, *more: Any) -> list[Any]:
    kernels = torch.ops.medusa.linear.default, torch.ops.medusa.linear_rounded.default, *more
    return [node for node in graph.graph.nodes if node.target in kernels]


def erase(nodes: list[Any]) -> None:
    """Remove nodes, each of which only those before it use. What is left would be computed: not all of it without effect."""
    for node in nodes:
        node.graph.erase_node(node)
