"""Claims about compiled decoding: the same output, one graph for many steps, and a fallback that says so."""

import warnings
from contextlib import nullcontext

import pytest
import torch

from medusa import DynamicTree, MedusaModel
from medusa.backbone.compilation import _check
from medusa.backbone.lm import TreeLM
from medusa.decoding import prefill, step
from medusa.rows import DecodingOptions
from medusa.trees.files import Tree
from medusa.trees.tensors import Drafted
from tiny import VOCAB, plain_greedy, random_heads, random_prompt, random_tree, tiny_backbone

TREES = [random_tree(seed=1, nodes=24), DynamicTree(24, 3, copied=5)]


def compiled_model(model_type: str = "llama", tree: Tree = TREES[0], **overrides) -> MedusaModel:
    backbone = tiny_backbone(model_type, **overrides)
    return MedusaModel(backbone, random_heads(backbone), tree)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tree": TREES[1]}),
        ("mistral", {"sliding_window": 12}),
        ("gemma3_text", {"sliding_window": 12, "query_pre_attn_scalar": 16}),
    ],
)
def test_compiled_output_is_the_same_and_shapes_stay_static(model_type, overrides, monkeypatch):
    # The eager backend traces like the default one, which is what recompiles, but needs no C++ compiler's minutes.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compile_(fn, **{**options, "mode": None, "backend": "eager"}))
    model = compiled_model(model_type, **overrides)
    prompt = random_prompt(20)
    wanted = plain_greedy(model.backbone, prompt, 24)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert model.generate(prompt, max_new_tokens=24, compile=True)[0, 20:].tolist() == wanted
        with torch._dynamo.config.patch(error_on_recompile=True):  # a second request, of another length
            other = random_prompt(31, seed=1)
            output = model.generate(other, max_new_tokens=17, compile=True)
    assert output[0, 31:].tolist() == plain_greedy(model.backbone, other, 17)


@pytest.mark.parametrize("tree", TREES, ids=["static", "dynamic"])
def test_inductor_gives_the_same_output(tree):
    model = compiled_model(tree=tree, num_hidden_layers=1)
    prompt = random_prompt(9)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a fallback would show nothing
        output = model.generate(prompt, max_new_tokens=12, compile=True)
    assert output[0, 9:].tolist() == plain_greedy(model.backbone, prompt, 12)


def test_failing_compiler_warns_once_and_decoding_goes_on(monkeypatch):
    def broken(*_args, **_options):
        def run(*_):
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    model = compiled_model()
    prompt = random_prompt(9)
    with pytest.warns(RuntimeWarning, match="decoding continues uncompiled: no compiler here") as caught:
        output = model.generate(prompt, max_new_tokens=20, compile=True)
        model.generate(prompt, max_new_tokens=20, compile=True)
    assert len([w for w in caught if issubclass(w.category, RuntimeWarning)]) == 1
    assert output[0, 9:].tolist() == plain_greedy(model.backbone, prompt, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("tree", TREES, ids=["static", "dynamic"])
def test_step_synchronises_once(tree):
    backbone = tiny_backbone().cuda()
    model = MedusaModel(backbone, random_heads(backbone), tree)
    options = DecodingOptions(max_new_tokens=40)
    state = prefill(model, random_prompt(9).cuda(), None, model.tree, options)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            step(model, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("tree", TREES, ids=["static", "dynamic"])
def test_cuda_graphs_give_the_same_output(tree):
    backbone = tiny_backbone().cuda()
    model = MedusaModel(backbone, random_heads(backbone), tree)
    prompt = random_prompt(9).cuda()
    wanted = model.generate(prompt, max_new_tokens=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(model.generate(prompt, max_new_tokens=40, compile=True), wanted)


def test_compiled_step_that_computes_something_else_is_not_used(monkeypatch):
    def wrong(fn, **_options):
        def run(*args):
            drafted = fn(*args)
            return drafted._replace(logits=drafted.logits.roll(1, dims=-1))

        return run

    monkeypatch.setattr(torch, "compile", wrong)
    model = compiled_model()
    prompt = random_prompt(9)
    with pytest.warns(RuntimeWarning, match="differ from the uncompiled one's"):
        output = model.generate(prompt, max_new_tokens=20, compile=True)
    assert output[0, 9:].tolist() == plain_greedy(model.backbone, prompt, 20)


@pytest.mark.parametrize(("dtype", "used"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_compiled_step_may_differ_by_the_noise_of_the_model(dtype, used):
    tree = TREES[0].tensors()
    tokens, logits = torch.zeros(1, tree.num_nodes), torch.randn(1, tree.num_nodes, VOCAB)
    with nullcontext() if used else pytest.raises(RuntimeError, match="differ from the uncompiled one's by 4"):
        _check(
            Drafted(tokens, tree, logits, 1.04 * logits),
            Drafted(tokens, tree, logits, logits),
            TreeLM(tiny_backbone(dtype=dtype)).probe(),
        )
