"""Fusion: the linear maps and the attention of a compiled step run through the kernels."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn

from medusa.kernels.build import source_digest
from medusa.kernels.joining import calls_of, erase, join_calls

INDUCTOR = {
    # Elements of a loop for each thread: waking a second one for fewer takes longer than they do.
    "cpp.min_chunk_size": 1 << 14,
    # Every intermediate result is rounded as in uncompiled code. Otherwise it is rounded where loops happen to end, which
    # differs between the graphs of one token and of a tree, and so do their results.
    "emulate_precision_casts": True,
    # A graph is found by the layout of its inputs (`compilation.shapes_of`): a thousand checks of it at each step are too many.
    "size_asserts": False,
}
MANY = 8  # uses of an intermediate result: more are by every layer
MOST_ROWS = 64  # with more, a step is bound by arithmetic, and torch's own kernels are faster


def few_rows_backend(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend of torch.compile for a CPU: inductor, for what the kernels do not compute."""
    from torch._inductor.compile_fx import compile_fx

    fuse(graph)
    # Inductor's cache on disk knows a kernel by its name alone: graphs of another version of it must not be taken.
    with torch.compiler.config.patch(cache_key_tag=source_digest()):  # type: ignore[attr-defined]
        return compile_fx(graph, inputs, config_patches=INDUCTOR)


def fuse(graph: fx.GraphModule) -> None:
    """Let the kernels compute what they can of a graph."""
    fuse_linear_maps(graph)
    fuse_gates(graph)
    fuse_norms(graph)
    replace_attention(graph)
    replace_shortlists(graph)
    compute_once(graph)
    fuse_attention(graph)
    join_calls(graph)


def fuse_linear_maps(graph: fx.GraphModule) -> None:
    """Replace linear maps of a few bfloat16 rows by the kernel, and make one call of all maps of the same input."""
    groups: dict[tuple[Any, Any, bool], list[tuple[fx.Node, list[list[Any]]]]] = {}
    for node in graph.graph.nodes:
        if (linear := _map(node)) is not None:
            x, kernel, operands = linear
            groups.setdefault((x, kernel, bool(operands[-1])), []).append((node, operands))
    for (x, kernel, _), maps in groups.items():
        # At the first of them: their operands are inputs of the graph, and so come before, or slices of inputs, made anew.
        with graph.graph.inserting_before(maps[0][0]):
            operands = [
                [graph.graph.node_copy(item) if _is_slice(item) else item for _, each in maps for item in each[place]]
                for place in range(len(maps[0][1]))
            ]
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


def fuse_gates(graph: fx.GraphModule) -> None:
    """Let the kernel that computes two maps of one input also compute silu(first) * second, the inside of a gated MLP."""
    for call in calls_of(graph):
        outputs = {output.args[1]: output for output in call.users}
        gate = next((number for number in outputs if _only_user(outputs[number], nn.functional.silu)), None)
        if len(outputs) != 2 or gate is None or not _is_bfloat16(outputs[gate].meta.get("example_value")):
            continue
        silu, up = next(iter(outputs[gate].users)), outputs[1 - gate]
        product = _only_user(silu, operator.mul)
        if product is None or product is not _only_user(up, operator.mul):
            continue
        x, *operands = call.args
        call.args = (x, *([each[gate], each[1 - gate]] if each else [] for each in operands))
        call.update_kwarg("gated", True)
        _replace(product, operator.getitem, (call, 0))
        erase([silu, outputs[gate], up])
    graph.recompile()


def fuse_norms(graph: fx.GraphModule) -> None:
    """Let the kernel normalise the inputs of its maps (RMSNorm), and first add what a layer adds to them."""
    for call in calls_of(graph):
        if (found := _norm(call.args[0])) is None or len(call.args[0].users) != 1:
            continue
        whole, scale, eps, chain = found
        call.update_arg(0, whole)
        call.kwargs = {**call.kwargs, "scale": scale, "eps": eps}
        erase(chain)
        place = {node: number for number, node in enumerate(graph.graph.nodes)}
        if not _is_sum(whole) or any(place[user] < place[call] for user in whole.users):
            continue
        x, added = whole.args
        number = 1 if call.kwargs.get("gated") else len(call.args[1])
        with graph.graph.inserting_after(call):
            result = graph.graph.call_function(operator.getitem, (call, number))
        result.meta = dict(whole.meta)
        whole.replace_all_uses_with(result)
        call.update_arg(0, x)
        call.update_kwarg("added", added)
        erase([whole])
    graph.recompile()


def compute_once(graph: fx.GraphModule) -> None:
    """Keep what every layer reads in memory: inductor computes it again in each, such as the mask and rotations."""
    for node in list(graph.graph.nodes):
        value = node.meta.get("example_value")
        if node.op not in ("call_function", "call_method") or len(node.users) <= MANY:
            continue
        if node.target is operator.getitem and (_is_slice(node) or "example_value" not in cast(Any, node.args[0]).meta):
            continue  # of an input, or of what a kernel returns
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type == "cpu":
            with graph.graph.inserting_after(node):
                kept = graph.graph.call_function(torch.ops.medusa.computed.default, (node,))
            kept.meta = dict(node.meta)
            node.replace_all_uses_with(kept, lambda user, kept=kept: user is not kept)
    graph.recompile()


def replace_shortlists(graph: fx.GraphModule) -> None:
    """Replace the scores of a few tokens of the vocabulary by the kernel, which reads their rows of the LM head in place."""
    for node in list(graph.graph.nodes):
        if node.target not in (operator.matmul, torch.matmul):
            continue
        x, columns = cast(Any, node.args)
        if columns.target != "transpose" or set(columns.args[1:]) != {1, 2} or columns.args[0].target is not operator.getitem:
            continue
        weight, rows = columns.args[0].args
        values: list[Any] = [each.meta.get("example_value") for each in (x, weight, rows) if isinstance(each, fx.Node)]
        if not _is_input(weight) or [value.dim() for value in values] != [3, 2, 2] or not all(map(_is_bfloat16, values[:2])):
            continue
        _replace(node, torch.ops.medusa.linear_rows.default, (x, weight, rows))
    graph.recompile()


def replace_attention(graph: fx.GraphModule) -> None:
    """Replace the attention of a few bfloat16 queries by the kernel, which reads shared keys and values in place."""
    for node in list(graph.graph.nodes):
        if (operands := _attention(node)) is not None:
            _replace(node, torch.ops.medusa.attention.default, operands)
    graph.recompile()


def fuse_attention(graph: fx.GraphModule) -> None:
    """Let the kernel of an attention also rotate queries and keys, and write keys and values into the cache."""
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.medusa.attention.default or (found := _attended(node)) is None:
            continue
        operands, unused = found
        with graph.graph.inserting_before(unused[0]):
            result = graph.graph.call_function(torch.ops.medusa.attend.default, operands)
        result.meta = dict(unused[0].meta)
        unused[0].replace_all_uses_with(result)
        while unused:
            above = [each for node in unused for each in node.all_input_nodes]
            erase(unused)
            left = [each for each in dict.fromkeys(above) if each not in unused]
            unused = [each for each in left if not each.users and each.op != "placeholder"]
    graph.recompile()


def _attended(node: Any) -> tuple[tuple[Any, ...], list[Any]] | None:
    """The operands of `medusa::attend` for an attention, and the nodes that it replaces, the result first.

    None: its queries and keys are not rotated projections, or `TreeCacheLayer.update` does not write them.
    """
    queries, *seen, mask, scale = node.args
    merged, writes = _merged(node), [_write(each, node) for each in seen]
    if merged is None or None in writes:
        return None
    (keys, _, slots, key_states), (values, _, values_slots, value_states) = (write.args for write in cast(Any, writes))
    asked, given, said = _rotated(queries), _rotated(key_states), _projection(value_states)
    if None in (asked, given, said) or asked[1:] != given[1:] or slots is not values_slots:  # type: ignore[index]
        return None
    if slots.target == "to" and slots.args[1:] == (torch.device("cpu"),):
        slots = slots.args[0]
    operands = asked[0], given[0], said, *asked[1:], slots, keys, values, mask, scale  # type: ignore[index]
    return operands, [*merged, node, *writes]


def _merged(node: Any) -> list[Any] | None:
    """The nodes that make (B, M, H * D) of an attention's result (B, H, M, D), the last first."""
    B, H, M, D = node.meta["example_value"].shape
    chain, transposed = [node], 0
    while len(chain[0].users) == 1:
        at = next(iter(chain[0].users))
        if at.target == "transpose" and at.args[1:] == (1, 2):
            transposed += 1
        elif at.target not in ("reshape", "view", "contiguous"):
            break
        shape = tuple(at.meta["example_value"].shape)
        if shape not in (((B, M, H, D), (B, M, H * D)) if transposed == 1 else ((B, H, M, D),)):
            break
        chain.insert(0, at)
    return chain[:-1] if tuple(chain[0].meta["example_value"].shape) == (B, M, H * D) else None


def _write(seen: Any, attention: Any) -> Any:
    """What writes into the cache of which this attention reads the first slots, and no other; None: there is no such cache."""
    cache, part = _args(seen, operator.getitem) or (None, None)
    slots = part[2] if isinstance(part, tuple) and len(part) == 3 else None
    first = isinstance(slots, slice) and part == (slice(None), slice(None), slice(slots.stop))
    if not first or not _is_input(cache) or len(cast(Any, cache).users) != 2:
        return None
    readers = [user for user in seen.users if user.target is attention.target]
    write = next(user for user in cast(Any, cache).users if user is not seen)
    return write if readers == [attention] and write.target == "index_copy_" and write.args[1] == 2 else None


def _rotated(node: Any) -> tuple[Any, Any, Any] | None:
    """The projection, cosines and sines of a rotary embedding as transformers computes it; None: it is not one."""
    products: list[Any] = [_args(each, operator.mul) for each in _args(node, operator.add)]
    if [len(each) for each in products] != [2, 2]:
        return None
    (x, cos), (turned, sin) = products
    halves: Any = next(iter(_args(turned, torch.cat)), ())
    angles: list[Any] = [_args(each, "unsqueeze") for each in (cos, sin)]
    if (projection := _projection(x)) is None or len(halves) != 2 or any(each[1:] != (1,) for each in angles):
        return None
    half = x.meta["example_value"].shape[-1] // 2
    negated = next(iter(_args(halves[0], operator.neg)), None)
    second, first = _args(negated, operator.getitem), _args(halves[1], operator.getitem)
    whole = second == (x, (..., slice(half, None, None))) and first == (x, (..., slice(None, half, None)))
    found = projection, angles[0][0], angles[1][0]
    return found if whole and all(_is_bfloat16(each.meta.get("example_value")) for each in found) else None


def _projection(node: Any) -> Any:
    """The (B, M, heads * D) that a node shows as (B, heads, M, D); None: it does not."""
    viewed = _args(node, "transpose")
    projection = _args(viewed[0], "view", "reshape")[:1] if viewed[1:] == (1, 2) else ()
    if not projection:
        return None
    B, heads, M, D = node.meta["example_value"].shape
    return projection[0] if tuple(projection[0].meta["example_value"].shape) == (B, M, heads * D) else None


def _args(node: Any, *targets: Any) -> tuple[Any, ...]:
    """The arguments of a node if it is a call of one of the targets, else none."""
    return node.args if isinstance(node, fx.Node) and node.target in targets else ()


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Let a call of `target` take the place of a node."""
    with node.graph.inserting_before(node):
        result = node.graph.call_function(target, args)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _only_user(node: Any, target: Any) -> Any:
    """The user of a node that has no other, if it is a call of `target`."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.target is target and not user.kwargs.get("inplace") else None


def _is_sum(node: Any) -> bool:
    """Whether a node is the sum of two bfloat16 tensors of one shape."""
    if node.target is not operator.add or not all(isinstance(arg, fx.Node) for arg in node.args):
        return False
    values = [arg.meta.get("example_value") for arg in node.all_input_nodes]
    return len(values) == 2 and all(map(_is_bfloat16, values)) and values[0].shape == values[1].shape


def _norm(node: Any) -> tuple[Any, Any, float, list[Any]] | None:
    """What `weight * (x * rsqrt(mean(x^2) + eps))` normalises, its weight and eps, and the nodes that compute it."""
    at: Any = node
    chain: list[Any] = []
    for target, place in (
        (operator.mul, 1),  # of the weight and what is normalised
        ("to", 0),
        (operator.mul, 1),  # of the whole and the inverse
        (torch.rsqrt, 0),
        (operator.add, 0),  # eps
        ("mean", 0),
        ("pow", 0),
        ("to", 0),
    ):
        if not isinstance(at, fx.Node) or at.target not in (target,):
            return None
        chain.append(at)
        at = at.args[place]
    scaled, narrowed, product, _, shifted, mean, square, wide = chain
    weight, eps = scaled.args[0], shifted.args[1]
    fits = [
        isinstance(at, fx.Node) and _is_bfloat16(at.meta.get("example_value")),
        _is_input(weight) and _is_bfloat16(weight.meta.get("example_value")),
        product.args[0] is wide and square.args[1] == 2 and mean.args[1:] == (-1,) and mean.kwargs == {"keepdim": True},
        narrowed.args[1:] == (torch.bfloat16,) and wide.args[1:] == (torch.float32,) and isinstance(eps, float),
        set(wide.users) == {square, product} and all(len(each.users) == 1 for each in chain[1:-1]),
    ]
    return (at, weight, eps, chain) if all(fits) else None


def _attention(node: fx.Node) -> tuple[Any, ...] | None:
    """The kernel's operands for an attention: queries, keys, values, mask and scale; None: it is not one, or does not fit."""
    if node.op != "call_function" or node.target is not torch._C._nn.scaled_dot_product_attention:
        return None
    mask, known = node.kwargs.get("attn_mask"), {"attn_mask", "dropout_p", "scale", "is_causal", "enable_gqa"}
    if len(node.args) != 3 or not isinstance(mask, fx.Node) or node.kwargs.keys() - known:
        return None
    if node.kwargs.get("dropout_p", 0.0) != 0.0 or node.kwargs.get("is_causal", False):
        return None
    queries, keys, values = node.args[0], *map(_unrepeated, node.args[1:])
    nodes: tuple[Any, ...] = (queries, keys, values, mask)
    q, k, v, m = (operand.meta["example_value"] for operand in nodes)
    if not all(_is_bfloat16(tensor) and tensor.dim() == 4 for tensor in (q, k, v, m)):
        return None
    in_place = all(tensor.stride()[2:] == (tensor.shape[3], 1) for tensor in (k, v))  # rows of a head, one behind the other
    if q.shape[2] > MOST_ROWS or not in_place or v.shape != k.shape or m.stride(3) != 1 or m.shape[0] != q.shape[0]:
        return None
    return queries, keys, values, mask, node.kwargs.get("scale") or q.shape[-1] ** -0.5


def _unrepeated(node: Any) -> Any:
    """Keys or values before transformers repeated each head for the queries that share it."""
    expand = node.args[0] if node.target == "reshape" else None
    if expand is None or expand.target != "expand" or expand.args[0].target is not operator.getitem:
        return node
    whole, repeated = expand.args[0].args[0], expand.meta["example_value"]
    if repeated.dim() != 5 or repeated.stride(2) != 0 or whole.meta["example_value"].dim() != 4:
        return node
    same = repeated[:, :, 0].shape == whole.meta["example_value"].shape
    return whole if same and repeated[:, :, 0].stride() == whole.meta["example_value"].stride() else node


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _map(node: fx.Node) -> tuple[Any, Any, list[list[Any]]] | None:
    """A linear map that a kernel computes: its input, the kernel and the kernel's lists of operands, with one item each."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        call = node.args[0]
        if call.target in (torch.ops.medusa.linear_rounded, torch.ops.medusa.linear_rounded.default):
            x, *operands = call.args
            return x, torch.ops.medusa.linear_rounded.default, [list(operand) for operand in operands]  # type: ignore[arg-type]
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
    if not all(operand is None or _is_input(operand) or _is_slice(operand) for operand in operands[1:]):
        return False
    values: list[Any] = [operand.meta.get("example_value") for operand in operands if isinstance(operand, fx.Node)]
    if not all(map(_is_bfloat16, values)):
        return False
    x, *held = values
    return x.numel() // x.shape[-1] <= MOST_ROWS and all(value.stride(-1) == 1 for value in held)


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _is_slice(node: Any) -> bool:
    """Whether a tensor is a slice of an input of the graph, as a path head's weights of the tokens that it has seen."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return False
    return _is_input(node.args[0]) and len(node.all_input_nodes) == 1
