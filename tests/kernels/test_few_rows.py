"""Kernels: a token's linear maps do not depend on the tokens beside it, in compiled steps as out of them."""

import dataclasses
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, StableLmConfig

from medusa import EMBEDDED, DynamicTree, MedusaModel, MedusaTree, decoding
from medusa.acceptance import accept_drawn, accept_exact
from medusa.backbone.cache import TreeCache
from medusa.batch.rows import DecodingOptions
from medusa.checkpoints.quantization import quantized
from medusa.decoding import prefill, step
from medusa.errors import InvalidInput
from medusa.kernels.build import load_kernels
from medusa.kernels.fusion import compute_once, fuse, fuse_linear_maps, replace_attention
from medusa.kernels.pages import use_large_pages
from medusa.kernels.quantized import QuantizedLinear, quantize_maps
from medusa.processors.warpers import Warpers
from medusa.sampling import Processors, draw, gumbel, keys_after, likeliest, row_keys
from medusa.trees.tensors import Draws, Frame, TreeTensors
from tiny import random_prompt, random_tree

needs_compiler = pytest.mark.skipif(not load_kernels(), reason="there is no C++ compiler")
SIZES = [(1, 32, 16), (3, 40, 17), (4, 64, 48), (7, 100, 33), (16, 576, 192), (18, 1536, 20), (4, 2048, 40), (64, 31, 5)]


def recorded(change):
    """A backend of torch.compile that changes each graph and runs it as it is, and the list of its graphs."""

    def backend(graph, _inputs):
        change(graph)
        graphs.append(graph)
        return graph

    graphs: list = []
    return backend, graphs


@needs_compiler
def test_what_every_layer_reads_is_computed_once():
    def layers(x, slots, weights):
        mask = torch.where(slots <= slots[:, None], 0.0, -torch.inf)[:, None]  # a view of what is computed
        scale = weights[1:]  # of an input, which is in memory
        for _ in range(9):
            x = (x * scale + mask).softmax(-1)
        return x

    backend, graphs = recorded(compute_once)
    args = torch.rand(5, 1, 5), torch.arange(5), torch.rand(6)
    torch.testing.assert_close(torch.compile(layers, backend=backend)(*args), layers(*args))
    (kept,) = [node for node in graphs[0].graph.nodes if node.target is torch.ops.medusa.computed.default]
    assert len(kept.users) == 9


@needs_compiler
@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_each_row_is_the_same_alone_and_among_others(rows, width, outputs, bias):
    torch.manual_seed(0)
    maps = [nn.Linear(width, size, bias, dtype=torch.bfloat16).requires_grad_(False) for size in (outputs, 3, outputs + 1)]
    x = torch.randn(rows, width, dtype=torch.bfloat16)
    weights, biases = [m.weight for m in maps], [m.bias for m in maps if bias]
    together = torch.ops.medusa.linear(x, weights, biases)
    alone = [
        torch.cat(parts) for parts in zip(*(torch.ops.medusa.linear(row[None], weights, biases) for row in x), strict=True)
    ]
    for one, other, linear in zip(together, alone, maps, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, linear(x), rtol=2e-2, atol=2e-2)


@needs_compiler
@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_maps_are_integer_products_of_each_row(rows, width, outputs, bias, dtype, bits):
    torch.manual_seed(0)
    linear = nn.Linear(width, outputs, bias, dtype=dtype).requires_grad_(False)
    mapped, x = QuantizedLinear(linear, bits), torch.randn(rows, width, dtype=dtype)
    x[-1, 1:] = 0  # a row of one number
    together = mapped(x)
    assert torch.equal(together, torch.cat([mapped(row[None]) for row in x]))
    error = (together - linear(x)).float().norm() / linear(x).float().norm()
    assert error < (0.01 if bits == 8 else 0.09)
    mapped._kernel = False
    torch.testing.assert_close(mapped(x), together)
    assert torch.equal(mapped(x), torch.cat([mapped(row[None]) for row in x]))


@needs_compiler
def test_four_bits_hold_what_was_in_four_bits():
    torch.manual_seed(0)
    numbers = torch.randint(16, (48, 3, 32))
    numbers[..., 0], numbers[..., 1] = 0, 15
    linear = nn.Linear(96, 48, False).requires_grad_(False)
    linear.weight.copy_((numbers * torch.rand(48, 3, 1).half().float() - torch.rand(48, 3, 1).half().float()).flatten(1))
    x = torch.randint(-127, 128, (5, 96)).float()
    x[:, ::32] = 127.0  # the scales are 1
    torch.testing.assert_close(QuantizedLinear(linear, 4)(x), linear(x), rtol=1e-3, atol=0.05)


@needs_compiler
def test_maps_of_one_input_run_as_one_and_give_the_same():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, size, False, dtype=torch.bfloat16) for size in (64, 32, 32, 64))

        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.o(q + torch.cat([k, v], -1))

    backend, graphs = recorded(fuse_linear_maps)

    block, x = Block().requires_grad_(False), torch.randn(2, 5, 64, dtype=torch.bfloat16)
    fused = torch.compile(block, backend=backend)(x)
    calls = [node for node in graphs[0].graph.nodes if node.target is torch.ops.medusa.linear.default]
    assert [len(call.args[1]) for call in calls] == [3, 1]
    torch.testing.assert_close(fused, block(x), rtol=2e-2, atol=2e-2)
    assert torch.equal(fused[:, 2:3], torch.compile(block, backend=backend)(x[:, 2:3]))


@needs_compiler
def test_a_slice_of_weights_is_read_in_place():
    backend, graphs = recorded(fuse_linear_maps)

    def head(x, first, tokens):
        return nn.functional.linear(x, first) + nn.functional.linear(x, tokens[:, :64])

    x, first, tokens = (torch.randn(rows, width, dtype=torch.bfloat16) for rows, width in ((2, 64), (24, 64), (24, 192)))
    fused = torch.compile(head, backend=backend)(x, first, tokens)
    calls = [node for node in graphs[0].graph.nodes if node.target is torch.ops.medusa.linear.default]
    assert [len(call.args[1]) for call in calls] == [2]
    torch.testing.assert_close(fused, head(x, first, tokens), rtol=2e-2, atol=0.2)


@needs_compiler
def test_slots_are_all_read_before_any_is_written():
    cache = TreeCache(1, 12)
    cache.layers[0].allocate(torch.randn(2, 3, 1, 5), torch.randn(2, 3, 1, 4, dtype=torch.bfloat16), 2)
    layer = cache.layers[0]
    layer.keys.copy_(torch.randn_like(layer.keys))
    source, target = torch.tensor([[4, 6, 4], [9, 8, 7]]), torch.tensor([[4, 5, 6], [7, 8, 9]])
    wanted = layer.keys.clone()
    for row in range(2):
        wanted[row, :, target[row]] = layer.keys[row, :, source[row]]
    cache.keep(source, target)
    assert torch.equal(layer.keys, wanted)


@needs_compiler
@pytest.mark.parametrize(("rows", "slots", "width"), [(1, 16, 64), (3, 300, 40), (16, 256, 64), (11, 33, 7)])
@pytest.mark.parametrize("shared_by", [1, 3])
def test_attention_is_torchs_and_each_query_is_the_same_alone(rows, slots, width, shared_by):
    torch.manual_seed(0)
    q = torch.randn(2, rows, 2 * shared_by, width, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(2, 2, 400, width, dtype=torch.bfloat16)[:, :, :slots] for _ in range(2))
    mask = torch.zeros(2, 1, rows, slots, dtype=torch.bfloat16)
    mask = mask.masked_fill(torch.rand(mask.shape) < 0.4, torch.finfo(mask.dtype).min)
    mask[..., 0] = 0
    got = torch.ops.medusa.attention(q, k, v, mask, width**-0.5)
    repeated = [tensor.repeat_interleave(shared_by, 1).float() for tensor in (k, v)]
    wanted = nn.functional.scaled_dot_product_attention(q.float(), *repeated, attn_mask=mask.float())
    torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)
    alone = [torch.ops.medusa.attention(q[:, :, n : n + 1], k, v, mask[:, :, n : n + 1], width**-0.5) for n in range(rows)]
    assert torch.equal(torch.cat(alone, 2), got)


@needs_compiler
def test_attention_does_not_depend_on_where_the_slots_of_a_path_are():
    torch.manual_seed(0)
    q = torch.randn(1, 6, 1, 64, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 3, 90, 64, dtype=torch.bfloat16) for _ in range(2))
    seen = torch.cat([torch.arange(50), torch.arange(50, 90, 3)])  # of a tree of 40 nodes, every third
    mask = torch.full((1, 1, 1, 90), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16)
    mask[..., seen] = 0
    together = torch.ops.medusa.attention(q, k[:, :, seen], v[:, :, seen], mask[..., seen], 0.125)
    assert torch.equal(torch.ops.medusa.attention(q, k, v, mask, 0.125), together)


@needs_compiler
@pytest.mark.parametrize("vocabulary", [7, 513, 5000])
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_a_draw_is_the_token_with_the_greatest_sum_of_score_and_gumbel_number(vocabulary, spread):
    torch.manual_seed(0)
    scores = spread * torch.randn(vocabulary, 300).T  # not contiguous, as the keys
    scores = scores.masked_fill(torch.rand(scores.shape) < 0.3, -torch.inf)
    scores[:, 2] = 1.0
    keys = torch.randint(0, 2**63 - 1, (300, 2))[:, 0]
    sums = scores + gumbel(keys[:, None], torch.arange(vocabulary))
    got = torch.ops.medusa.draw(scores, keys)
    assert (scores.gather(1, got[:, None]) > -torch.inf).all()
    assert (sums.amax(-1) - sums.gather(1, got[:, None])[:, 0] < 1e-4).all()
    assert (got == sums.argmax(-1)).float().mean() > 0.99


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_acceptance_is_torchs_for_rows_that_draw_and_rows_that_do_not(seed, dtype):
    torch.manual_seed(seed)
    each = [random_tree(3 * seed + row, nodes=40, depth=4, ranks=4).tensors() for row in range(3)]
    tree = TreeTensors(*(torch.cat(parts) for parts in zip(*each, strict=True)))
    tokens = torch.randint(0, 3, (3, 40))  # some siblings are the same
    logits = (2 * torch.randn(3, 40, 700)).to(dtype).sort(-1, descending=True).values  # the greatest is often repeated
    keys, temperatures = row_keys([(seed, row) for row in range(3)], tokens.device), torch.tensor([0.0, 0.7, 0.05])
    draws, lengths = Draws(keys, torch.tensor([4, 5, 6]), temperatures), torch.tensor([9, 50, 7])

    def drawn(node):
        depth = tree.depths.gather(1, node[:, None])[:, 0]
        scores = logits[torch.arange(3), node].float() / temperatures[:, None]
        return draw(scores[:, None], keys_after(draws, lengths, depth)[:, None])[:, 0]

    wanted = accept_drawn(tree, tokens, drawn).replaced(temperatures == 0, accept_exact(tree, tokens, likeliest(logits)))
    got = torch.ops.medusa.accept(logits, tokens, *tree[:3], *draws, lengths)
    assert all(map(torch.equal, got, vars(wanted).values()))
    assert wanted.length[0] > 1 or seed


@needs_compiler
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.5}, {"do_sample": True, "top_k": 3}])
@pytest.mark.parametrize("tree", [None, DynamicTree(8, 2, copied=2)])
def test_rows_decode_alike_with_and_without_kernels(tiny_model, monkeypatch, tree, sampling):
    ids = torch.cat([random_prompt(9), random_prompt(9, seed=1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 40, "seed": 3, **sampling}
    got = list(tiny_model.stream(ids, mask, tree=tree, **options))
    monkeypatch.setattr(decoding, "are_loaded", lambda: False)
    wanted = list(tiny_model.stream(ids, mask, tree=tree, **options))
    assert [each.tokens for each in got] == [each.tokens for each in wanted]
    assert max(len(row) for each in got for row in each.tokens) > 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems choose the size of pages themselves")
def test_large_pages_keep_what_they_hold():
    held = [torch.randn(1 << 20) for _ in range(3)]
    wanted, addresses = [tensor.clone() for tensor in held], [tensor.data_ptr() for tensor in held]
    use_large_pages([*held, torch.empty(0), torch.empty(3, device="meta")])
    assert addresses == [tensor.data_ptr() for tensor in held]
    assert all(map(torch.equal, held, wanted))


@needs_compiler
def test_a_compiled_step_reads_shared_keys_in_place():
    backend, graphs = recorded(replace_attention)

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    model = MedusaModel(backbone, None, MedusaTree([]))
    ids, cache = torch.arange(5)[None], model.new_cache(32)
    model.prefill(ids, None, cache)
    frame = Frame(torch.tensor(5), torch.tensor([5]), torch.tensor([0]), 32)
    verify = torch.compile(model.lm.verify, backend=backend, fullgraph=True)
    with torch.inference_mode():
        got = verify(ids[:, :1], MedusaTree([]).tensors(), frame, cache)
        wanted = model.lm.verify(ids[:, :1], MedusaTree([]).tensors(), frame, cache)
    calls = [node for node in graphs[0].graph.nodes if node.target is torch.ops.medusa.attention.default]
    assert [tuple(call.args[1].meta["example_value"].shape) for call in calls] == [(1, 2, 32, 8)] * 2
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def llama(kind, **more):
    """A small random backbone in bfloat16, two heads of queries for each of keys."""
    sizes = {"vocab_size": 64, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 10}
    config = kind(**sizes | more, num_attention_heads=4, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


@needs_compiler
@pytest.mark.parametrize(
    ("backbone", "calls"),
    [
        (llama(LlamaConfig), 1),
        (llama(LlamaConfig, head_dim=96, rope_parameters={"rope_type": "default", "rope_theta": 100.0}), 1),
        (llama(MistralConfig, sliding_window=4), 1),
        (
            llama(Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=1),
            1,
        ),  # biases, and two kinds of mask
        (llama(Qwen3Config), 3),  # queries and keys are normalised before they are rotated
        (llama(StableLmConfig, hidden_size=64, head_dim=16, partial_rotary_factor=0.5), 3),  # half of a head is rotated
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_layers_are_one_call_where_queries_and_keys_are_rotated_projections(monkeypatch, backbone, calls):
    model = MedusaModel(backbone, None, MedusaTree([]))
    ids, tree = torch.randint(0, 64, (2, 14)), MedusaTree([(0,), (1,), (0, 0), (1, 2)]).tensors()

    def passed(backend):
        cache = model.new_cache(48)
        mask = torch.ones(2, 14).long()
        mask[1, :3] = 0
        model.prefill(ids, mask, cache)
        frame = Frame(torch.tensor(15), torch.tensor([14, 13]), torch.tensor([0, 3]), 40)
        torch.compiler.reset()
        run = torch.compile(model.lm.verify, backend=backend, fullgraph=True, dynamic=False) if backend else model.lm.verify
        with torch.inference_mode():
            states = run(ids[:, :5], tree, frame, cache)
        return states, [held for layer in cache.layers for held in (layer.keys, layer.values)]

    backend, graphs = recorded(fuse)
    got, cache = passed(backend)
    with monkeypatch.context() as patch:
        patch.setattr("medusa.kernels.fusion.fuse_attention", lambda graph: None)
        apart, apart_cache = passed(recorded(fuse)[0])
    wanted, _ = passed(None)
    assert torch.equal(got, apart) and all(map(torch.equal, cache, apart_cache))
    torch.testing.assert_close(got, wanted, rtol=5e-2, atol=5e-2)
    found = [node for node in graphs[0].graph.nodes if node.target is torch.ops.medusa.calls.default]
    assert len(found) == calls


@needs_compiler
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_norms_and_gates_are_part_of_the_maps_that_they_surround_and_those_between_attentions_are_one_call(bits, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 9}
    config = LlamaConfig(**sizes, num_attention_heads=2)
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for norm in (module for name, module in backbone.named_modules() if name.endswith("norm")):
        norm.weight.copy_(torch.rand(36) + 0.5)
    if bits:
        quantize_maps(backbone, bits)
    ids = torch.arange(7)[None]
    joined, joined_graphs = recorded(fuse)
    with torch.inference_mode():
        together = torch.compile(backbone, backend=joined)(ids, use_cache=False).logits
        torch.compiler.reset()
        monkeypatch.setattr("medusa.kernels.fusion.join_calls", lambda graph: None)
        backend, graphs = recorded(fuse)
        got = torch.compile(backbone, backend=backend)(ids, use_cache=False).logits
        wanted = backbone(ids, use_cache=False).logits
    assert torch.equal(together, got)
    runs = [node for node in joined_graphs[0].graph.nodes if node.target is torch.ops.medusa.calls.default]
    assert [len(run.args[2]) for run in runs] == [4] * 8 + [3]  # the last of a run is the next layer's
    kernel = torch.ops.medusa.linear_rounded.default if bits else torch.ops.medusa.linear.default
    calls = [node for node in graphs[0].graph.nodes if node.target is kernel]
    assert sum("scale" in call.kwargs for call in calls) >= 18  # of queries, keys and values, and of the MLP
    assert sum("added" in call.kwargs for call in calls) >= 17  # nothing is added to the embeddings
    assert sum(call.kwargs.get("gated", False) for call in calls) == 9
    computed = [node for node in graphs[0].graph.nodes if node.target is torch.ops.medusa.computed.default]
    assert len(computed) == 2  # sines and cosines
    torch.testing.assert_close(got, wanted, rtol=5e-2, atol=5e-2)


@needs_compiler
@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
def test_what_surrounds_a_map_is_the_same_for_a_row_alone_and_is_the_models(rows, width, outputs):
    torch.manual_seed(0)
    x, added = (torch.randn(rows, width, dtype=torch.bfloat16) * 3 for _ in range(2))
    scale = torch.randn(width, dtype=torch.bfloat16)
    gate, up = (torch.randn(outputs, width, dtype=torch.bfloat16) for _ in range(2))

    def run(x, added):
        return torch.ops.medusa.linear(x, [gate, up], [], gated=True, added=added, scale=scale, eps=1e-5)

    got, total = run(x, added)
    alone = [run(one[None], other[None]) for one, other in zip(x, added, strict=True)]
    assert torch.equal(got, torch.cat([each[0] for each in alone])) and torch.equal(total, x + added)
    whole = (x + added).float()
    normed = scale * (whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    wanted = nn.functional.silu(normed @ gate.T) * (normed @ up.T)
    assert (got - wanted).float().norm() < 0.02 * wanted.float().norm()


@needs_compiler
def test_chosen_rows_of_the_weights_give_what_all_give():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 40, dtype=torch.bfloat16), torch.randn(300, 40, dtype=torch.bfloat16)
    rows = torch.randint(300, (2, 37))
    every = torch.stack([torch.ops.medusa.linear(part, [weight], [])[0] for part in x])
    assert torch.equal(torch.ops.medusa.linear_rows(x, weight, rows), every.gather(2, rows[:, None].expand(-1, 9, -1)))


@needs_compiler
def test_slots_that_no_query_sees_are_not_read():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.bfloat16) for n in (3, 100, 100))
    mask = torch.zeros(1, 1, 3, 100, dtype=torch.bfloat16)
    mask[..., 40:] = torch.finfo(mask.dtype).min
    got = torch.ops.medusa.attention(q, k, v, mask, 0.25)
    assert torch.equal(got, torch.ops.medusa.attention(q, k[:, :, :48], v[:, :, :48], mask[..., :48], 0.25))
    v[:, :, 48:] = torch.nan
    assert torch.equal(got, torch.ops.medusa.attention(q, k, v, mask, 0.25))


@pytest.fixture(scope="module", params=["int8-dynamic", "int4-dynamic"])
def rounded_model(request):
    return MedusaModel.from_pretrained(EMBEDDED, dtype=torch.float32, **quantized(request.param))


@pytest.fixture(scope="module", params=["none", "int8-dynamic", "int4-dynamic"])
def bfloat16_model(request):
    return MedusaModel.from_pretrained(EMBEDDED, dtype=torch.bfloat16, **quantized(request.param))


@needs_compiler
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_compiled_tree_computes_the_bits_of_compiled_plain_decoding_in_bfloat16(bfloat16_model, temperature):
    """Though bfloat16 has eight bits, and int8 inputs seven: nothing computed for a node depends on the tokens beside it."""

    def decoded(tree):
        processors = Processors(warpers=Warpers(temperature=temperature or None))
        options = DecodingOptions(60, do_sample=temperature > 0, processors=processors, seed=3)
        state, states = prefill(bfloat16_model.compiled, torch.arange(300, 340)[None], None, tree, options), []
        while not state.finished:
            _, drafted, accepted = step(bfloat16_model.compiled, state)
            if drafted is not None:
                states.append(drafted.hidden[0, accepted.path[0, : accepted.length]])
        return state.rows[0].generated, torch.cat(states)

    tokens, states = decoded(MedusaTree([]))
    drafted_tokens, drafted_states = decoded(dataclasses.replace(bfloat16_model.tree.for_batch(1), num_nodes=12, copied=4))
    assert drafted_tokens == tokens
    assert torch.equal(drafted_states[: len(states)], states)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_two_models_in_one_process_have_graphs_of_their_own(rounded_model):
    ids = torch.arange(300, 320)[None]
    other = MedusaModel.from_pretrained(EMBEDDED, dtype=torch.float32)
    for model in (rounded_model, other, rounded_model):
        wanted = model.generate(ids, max_new_tokens=12, tree=MedusaTree([]))
        assert torch.equal(model.generate(ids, max_new_tokens=12, tree=MedusaTree([]), compile=True), wanted)


def test_rounding_replaces_every_map_and_keeps_the_lm_head_for_those_who_share_it(rounded_model):
    decoder = [
        type(module) for module in rounded_model.backbone.model.modules() if isinstance(module, nn.Linear | QuantizedLinear)
    ]
    assert decoder and set(decoder) == {QuantizedLinear}
    assert type(rounded_model.lm.lm_head) is nn.Linear
    hidden = torch.randn(3, rounded_model.lm.hidden_size)
    logits = rounded_model.logits(hidden)
    assert torch.equal(logits, rounded_model.backbone.lm_head(hidden))  # transformers' own
    difference = (logits - rounded_model.lm.lm_head(hidden)).norm() / logits.norm()
    assert 0 < difference < 0.03


@pytest.mark.parametrize("kind", ["int8-dynamic", "int4-dynamic"])
def test_rounding_refuses_a_dtype_that_the_kernels_do_not_take(kind):
    with pytest.raises(InvalidInput, match=rf"{kind} is for bfloat16 or float32 models on a CPU, got torch\.float16"):
        MedusaModel.from_pretrained(EMBEDDED, dtype=torch.float16, **quantized(kind))
