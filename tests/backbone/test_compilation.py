"""Claims about compiled decoding: the same output, one graph for many steps, and a fallback that says so."""

import os
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from medusa import DynamicTree, MedusaModel
from medusa.backbone import compilation
from medusa.backbone.compilation import _check
from medusa.backbone.lm import TreeLM
from medusa.batch.rows import DecodingOptions
from medusa.decoding import prefill, step
from medusa.generation.preparation import options_of_rows
from medusa.kernels import graphs
from medusa.kernels.cuda_graphs import CudaGraph
from medusa.trees.files import Tree
from medusa.trees.tensors import Drafted
from tiny import VOCAB, plain_greedy, random_heads, random_prompt, random_tree, tiny_backbone


@pytest.fixture(autouse=True)
def graphs_on_disk(tmp_path, monkeypatch):
    """A folder of this test alone: graphs of other tests must not be found."""
    monkeypatch.setattr(graphs, "cache_folder", lambda _name: tmp_path)
    return tmp_path


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
        monkeypatch.setattr(torch, "compile", None)  # a second request, of another length, compiles nothing
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
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    model = compiled_model()
    prompt = random_prompt(9)
    with pytest.warns(RuntimeWarning, match="decoding continues uncompiled: no compiler here") as caught:
        output = model.generate(prompt, max_new_tokens=20, compile=True)
        model.generate(prompt, max_new_tokens=20, compile=True)
    assert len([w for w in caught if issubclass(w.category, RuntimeWarning)]) == 1
    assert output[0, 9:].tolist() == plain_greedy(model.backbone, prompt, 20)


def test_a_request_takes_over_the_cache_of_one_that_has_ended(monkeypatch):
    monkeypatch.setattr(compilation, "compile_graph", lambda *args, **options: args[0])
    model = compiled_model().compiled
    options, prompts = DecodingOptions(max_new_tokens=20), [random_prompt(9), random_prompt(11, seed=1)]

    def begin(prompt):
        state = prefill(model, prompt, None, model.tree, options)
        step(model, state)
        return state, state.cache.layers[0].keys.data_ptr()

    first, at = begin(prompts[0])
    second, elsewhere = begin(prompts[1])
    assert at != elsewhere  # both are being decoded
    del first
    third, again = begin(prompts[1])
    assert again == at
    while not (second.finished and third.finished):
        for state in (second, third):
            step(model, state)
    wanted = plain_greedy(model.backbone, prompts[1], 20)
    assert [state.rows[0].generated for state in (second, third)] == [wanted, wanted]


def model_on_gpu(tree) -> MedusaModel:
    backbone = tiny_backbone().cuda()
    return MedusaModel(backbone, random_heads(backbone), tree)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree", TREES, ids=["static", "dynamic"])
def test_step_on_a_gpu_launches_two_graphs_and_synchronises_once(tree, sampling):
    model = model_on_gpu(tree)
    options = options_of_rows(model, "generate", max_new_tokens=80, seed=3, **sampling)
    model = model.compiled
    state = prefill(model, random_prompt(9).cuda(), None, tree, options)
    for _ in range(4):  # recorded in the second step that is like the one before
        step(model, state)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            step(model, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchronizing" in str(warning.message)]) == 1
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step(model, state)
    counts = {event.key: event.count for event in profiled.key_averages()}
    assert counts["cudaGraphLaunch"] == 2
    assert sum(count for name, count in counts.items() if "LaunchKernel" in name) <= 8  # arguments copied for the graph


@pytest.mark.gpu
@pytest.mark.parametrize("tree", TREES, ids=["static", "dynamic"])
def test_cuda_graphs_give_the_same_output(tree):
    model = model_on_gpu(tree)
    several = torch.cat([random_prompt(9), random_prompt(9, seed=1)]).cuda()
    for prompt in (several[:1], several):
        for sampling in ({}, {"do_sample": True, "temperature": 0.7, "seed": 1}, {"do_sample": True, "top_k": 5, "seed": 2}):
            wanted = model.generate(prompt, max_new_tokens=40, **sampling)
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                assert torch.equal(model.generate(prompt, max_new_tokens=40, compile=True, **sampling), wanted)


@pytest.mark.gpu
def test_a_request_on_a_gpu_replays_the_graphs_of_one_that_has_ended(monkeypatch):
    recorded = []

    class Counted(CudaGraph):
        def __init__(self, *args):
            recorded.append(1)
            super().__init__(*args)

    monkeypatch.setattr(compilation, "CudaGraph", Counted)
    model = model_on_gpu(TREES[1])
    for seed in range(3):
        prompt = random_prompt(9, seed=seed).cuda()
        wanted = model.generate(prompt, max_new_tokens=40)
        assert torch.equal(model.generate(prompt, max_new_tokens=40, compile=True), wanted)
    assert len(recorded) == 1


def wrong(graph):
    """A graph that computes something else."""

    def run(*args):
        drafted = graph(*args)
        return drafted._replace(logits=drafted.logits.roll(1, dims=-1))

    return run


def test_compiled_step_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(compilation, "compile_graph", lambda *args, **options: wrong(graphs.compile_graph(*args, **options)))
    model = small_model()
    prompt = random_prompt(9)
    with pytest.warns(RuntimeWarning, match="differ from the uncompiled one's"):
        output = model.generate(prompt, max_new_tokens=20, compile=True)
    assert output[0, 9:].tolist() == plain_greedy(model.backbone, prompt, 20)


def small_model(**overrides) -> MedusaModel:
    return compiled_model(**{"num_hidden_layers": 1} | overrides)


def compiles(model: MedusaModel, prompt: torch.Tensor) -> int:
    """The number of graphs that a request compiles; its output is checked."""
    made = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(
            compilation, "compile_graph", lambda *args, **options: made.append(1) or graphs.compile_graph(*args, **options)
        )
        warnings.simplefilter("error", RuntimeWarning)
        output = model.generate(prompt, max_new_tokens=20, compile=True)
    assert output[0, prompt.shape[1] :].tolist() == plain_greedy(model.backbone, prompt, 20)
    return len(made)


def test_graph_on_disk_is_used_by_other_models_of_the_same_form_alone():
    prompt = random_prompt(9)
    first = small_model()
    assert compiles(first, prompt) == 1
    assert compiles(first, prompt) == 0
    other = small_model()  # other weights, so that a graph that held those of the first would be noticed
    with torch.no_grad():
        for parameter in other.backbone.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    assert compiles(other, prompt) == 0
    assert compiles(small_model(rms_norm_eps=1e-3), prompt) == 1
    assert compiles(small_model(tree=TREES[1]), prompt) == 1
    assert compiles(small_model(num_hidden_layers=2), prompt) == 1


def test_graph_on_disk_that_is_damaged_or_of_another_model_is_made_again(graphs_on_disk):
    prompt = random_prompt(9)
    assert compiles(small_model(), prompt) == 1
    (kept,) = graphs_on_disk.glob("*.graph")
    assert compiles(small_model(rms_norm_eps=1e-1), prompt) == 1
    (other,) = set(graphs_on_disk.glob("*.graph")) - {kept}
    kept.write_bytes(other.read_bytes())
    assert compiles(small_model(), prompt) == 1
    kept.write_bytes(kept.read_bytes()[:1000])
    assert compiles(small_model(), prompt) == 1
    assert compiles(small_model(), prompt) == 0


def test_graphs_on_disk_that_were_used_longest_ago_make_room(graphs_on_disk, monkeypatch):
    prompt = random_prompt(9)
    assert compiles(small_model(), prompt) == 1
    (first,) = graphs_on_disk.glob("*.graph")
    os.utime(first, (0, 0))
    monkeypatch.setattr(graphs, "MOST_BYTES", int(1.5 * first.stat().st_size))
    assert compiles(small_model(rms_norm_eps=1e-3), prompt) == 1
    assert len(list(graphs_on_disk.glob("*.graph"))) == 1 and not first.exists()


def test_graphs_that_cannot_be_kept_are_used(graphs_on_disk, monkeypatch):
    monkeypatch.setattr(graphs, "cache_folder", lambda _name: graphs_on_disk / "missing")
    assert compiles(small_model(), random_prompt(9)) == 1


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
