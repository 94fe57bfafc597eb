"""Claims about the probe: it refuses every mistake in masks, positions and kept caches, and no right model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from medusa.backbone.cache import TreeCache
from medusa.backbone.lm import TreeLM
from medusa.errors import UnsupportedBackbone
from tiny import tiny_backbone

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHALLOW = {"num_hidden_layers": 2}
DEEP = {"num_hidden_layers": 32}
MODELS = {
    "llama": ("llama", SHALLOW),
    "qwen3_moe": ("qwen3_moe", SHALLOW),
    "mixtral": ("mixtral", SHALLOW),
    "gemma2": ("gemma2", SHALLOW),
    "gemma3_text": ("gemma3_text", SHALLOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("gpt2", {"n_layer": 2}),
    "opt": ("opt", SHALLOW),
    "falcon": ("falcon", SHALLOW),
    "deepseek_v3": ("deepseek_v3", SHALLOW),
    "gpt_oss": ("gpt_oss", SHALLOW),
    "deep llama": ("llama", DEEP),
    "deep llama of small weights": ("llama", DEEP | {"gain": 1.0}),  # as transformers makes it: positions hardly matter
}


def each_mask(masks: Tensor | dict[str, Tensor], change: Callable[[Tensor], Tensor]):
    return {kind: change(mask) for kind, mask in masks.items()} if isinstance(masks, dict) else change(masks)


def causal_masks(inputs: dict) -> None:
    """The nodes, which fill the last slots, see all nodes before them."""

    def causal(mask: Tensor) -> Tensor:
        nodes = mask.shape[2]
        earlier = torch.ones(nodes, nodes, dtype=torch.bool).tril()
        tree = torch.zeros_like(mask[..., -nodes:]).masked_fill(~earlier, torch.finfo(mask.dtype).min)
        return torch.cat([mask[..., :-nodes], tree], dim=-1)

    inputs["attention_mask"] = each_mask(inputs["attention_mask"], causal)


def dropped_masks(inputs: dict) -> None:
    inputs["attention_mask"] = each_mask(inputs["attention_mask"], torch.zeros_like)


def positions_by_node(inputs: dict) -> None:
    at = inputs["position_ids"]
    inputs["position_ids"] = at[:, :1] + torch.arange(at.shape[1])


def positions_one_too_far(inputs: dict) -> None:
    inputs["position_ids"] = inputs["position_ids"] + 1


INPUT_MISTAKES = [causal_masks, dropped_masks, positions_by_node, positions_one_too_far]


@contextmanager
def mistaken(lm: TreeLM, mistake: Callable[[dict], None]) -> Iterator[None]:
    """A model that makes a mistake of its own wherever it reads a tree."""

    def change(_module, args, inputs: dict):
        cache = inputs.get("past_key_values")
        if isinstance(cache, TreeCache) and int(cache.cursor.slots[0]) > 0:
            inputs = dict(inputs)
            mistake(inputs)
        return args, inputs

    hook = lm.decoder.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def keep_nothing(cache: TreeCache, source: Tensor, target: Tensor) -> None:
    """What lies behind the committed slots stays there."""


def keep_a_neighbour(cache: TreeCache, source: Tensor, target: Tensor, keep=TreeCache.keep) -> None:
    keep(cache, source.clamp(max=cache.capacity - 2) + 1, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", [*MODELS])
def test_right_model_is_accepted_and_its_mistakes_are_refused(model, dtype, monkeypatch):
    model_type, overrides = MODELS[model]
    lm = TreeLM(tiny_backbone(model_type, dtype=dtype, **overrides))
    lm.probe()
    for mistake in INPUT_MISTAKES:
        with mistaken(lm, mistake):
            assert refused(lm), mistake.__name__
    for keep in (keep_nothing, keep_a_neighbour):
        monkeypatch.setattr(TreeCache, "keep", keep)
        assert refused(lm), keep.__name__


def refused(lm: TreeLM) -> bool:
    try:
        lm.probe()
    except UnsupportedBackbone as error:
        return "is not exact under Medusa" in str(error)
    return False
