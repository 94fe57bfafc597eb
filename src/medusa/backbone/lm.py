"""TreeLM: any transformers causal LM as hidden states and logits under a tree attention mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa.backbone.cache import TreeCache
from medusa.backbone.probe import hidden_states_of, probe
from medusa.backbone.ranks import ranks_of, repeated
from medusa.errors import UnsupportedBackbone, one_line
from medusa.kernels.quantized import shared_map
from medusa.placement import device_of, linear_sizes
from medusa.trees.tensors import Frame, TreeTensors

# What a causal LM does to the output of its LM head, by config field.
LOGIT_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2-4
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
}
MASK_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
ATTENTION = ("sdpa", "eager")  # the implementations that add a float mask of four dimensions

Masks = Tensor | dict[str, Tensor] | None


class TreeLM:
    """A causal LM that reads trees of tokens. It does not change after construction: requests can run in parallel.

    Args:
        backbone: a loaded transformers causal LM; put into eval mode.

    Raises:
        UnsupportedBackbone: it is not a causal LM, or its attention or its logits cannot be reproduced.
    """

    def __init__(self, backbone: PreTrainedModel):
        self.backbone = backbone.eval()
        name = type(backbone).__name__
        if getattr(backbone.config, "is_encoder_decoder", False):
            raise UnsupportedBackbone(f"{name} is an encoder-decoder; Medusa needs a causal language model")
        lm_head = backbone.get_output_embeddings() if hasattr(backbone, "get_output_embeddings") else None
        if lm_head is None:
            raise UnsupportedBackbone(f"{name} has no LM head; load it with AutoModelForCausalLM")
        self.lm_head: nn.Module = shared_map(lm_head)
        self._scores: nn.Module = lm_head
        decoder = backbone.get_decoder()
        self.decoder: nn.Module = getattr(backbone, "model", backbone) if decoder is backbone else decoder  # Llama 4
        if self.decoder is backbone:
            raise UnsupportedBackbone(f"{name} does not say which part of it is its decoder")
        names = inspect.signature(self.decoder.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # its name from transformers 5.24 on, and before
        self.config = backbone.config.get_text_config(decoder=True)
        self.attention = getattr(self.config, "_attn_implementation", "eager")
        if self.attention not in ATTENTION:
            raise UnsupportedBackbone(
                f"{name} runs {self.attention} attention, which does not take a tree mask; load it with "
                "attn_implementation='sdpa' or 'eager'"
            )
        try:
            self.vocab_size, self.hidden_size = linear_sizes(lm_head, self.config.hidden_size)
        except Exception as error:
            raise UnsupportedBackbone(f"{name} has an LM head that does not run: {one_line(error)}") from error
        self.num_layers: int = self.config.num_hidden_layers
        self.max_length = max_length_of(self.config)
        self.lm_head_device = device_of(lm_head)
        if hasattr(self.config, "attention_types"):
            raise UnsupportedBackbone(f"{name} keeps its attention window in a buffer of fixed size (GPT-Neo)")
        self._rules = [
            (rule, getattr(self.config, field))
            for field, rule in LOGIT_RULES.items()
            if isinstance(getattr(self.config, field, None), int | float)
        ]
        self._window: int = getattr(self.config, "sliding_window", None) or 0
        self._chunk: int = getattr(self.config, "attention_chunk_size", None) or 0
        self.mask_kinds = self._mask_kinds(name)
        self.ranks = ranks_of(backbone)
        if self.ranks is not None:
            self.ranks.enter(self)
            self.ranks.repeat(lm_head)  # heads call both of them as well
            self.ranks.repeat(backbone.get_input_embeddings())

    def _mask_kinds(self, name: str) -> tuple[str, ...]:
        """The kinds of attention mask that the layers take; if there are several, masks come as a dict."""
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types is None:
            return ("sliding_attention",) if self._window else ("full_attention",)
        kinds = tuple(dict.fromkeys(layer_types))
        for kind in kinds:
            if kind not in MASK_KINDS:
                raise UnsupportedBackbone(
                    f"{name} has {kind} layers: a recurrent state cannot hold the branches of a tree"
                    if "linear" in kind or kind in ("mamba", "recurrent", "conv")
                    else f"{name} has {kind} layers, which are not supported"
                )
        return kinds

    @property
    def device(self) -> torch.device:
        """The device of the input embeddings, which token ids are expected on."""
        return device_of(self.backbone.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and masks."""
        return self.backbone.dtype

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, from the generation config."""
        config = getattr(self.backbone, "generation_config", None) or self.config
        return token_ids(config.eos_token_id)

    @repeated
    def new_cache(self, capacity: int) -> TreeCache:
        return TreeCache(self.num_layers, capacity, self.ranks)

    def logits(
        self,
        hidden: Tensor,  # (..., d)
        lm_head: nn.Module | None = None,  # a part of the model's LM head; None: all of it
    ) -> Tensor:  # (..., V)
        """The model's logits, with the cap or scale that its own forward applies after the LM head."""
        logits = (lm_head or self._scores)(hidden)
        for rule, value in self._rules:
            logits = rule(logits, value)
        return logits

    @property
    def logits_of(self) -> Callable[[Tensor], Tensor]:
        """What makes logits of hidden states: the LM head itself, unless a cap or scale follows it."""
        return self.logits if self._rules else self._scores

    @repeated
    def hidden_states(
        self,
        ids: Tensor,  # (B, T) long, possibly right-padded
        segments: Tensor | None = None,  # (B, T) long: number of the text that each token belongs to; None: one per row
    ) -> Tensor:  # (B, T, d)
        """The last hidden state of every position in one causal pass, without a cache.

        Texts packed into one row do not see one another; the positions of each start from 0.
        """
        if segments is None:
            return self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        slot = torch.arange(ids.shape[1], device=ids.device)
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        positions = slot - torch.where(begins, slot, 0).cummax(-1).values
        allowed = (segments[:, :, None] == segments[:, None]) & (slot[:, None] >= slot)
        masks = self._masks(allowed, positions, positions)
        output = self.decoder(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=False)
        return output.last_hidden_state

    @repeated
    def prefill(
        self,
        ids: Tensor,  # (B, P) long, left-padded
        attention_mask: Tensor | None,  # (B, P), 1 for tokens; None: no padding
        cache: TreeCache,
        embeds: Tensor | None = None,  # (B, P, d): input embeddings that replace those of the ids
    ) -> Tensor:  # (B, d)
        """Process the prompts into slots 0 .. P-1 and return the last hidden state."""
        length = ids.shape[1]
        slots = torch.arange(length, device=ids.device)
        positions = slots.expand_as(ids)
        if attention_mask is not None:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        cache.aim(slots, visible=length)
        soft: dict[str, Any] = {} if embeds is None else {"inputs_embeds": embeds}
        hidden = self._decode(None if soft else ids, attention_mask, positions, cache, **soft)
        # A clone, since compiled steps are specialised to the strides of a contiguous row.
        return hidden[:, -1].clone(memory_format=torch.contiguous_format)

    @repeated
    def verify(
        self,
        ids: Tensor,  # (B, N) long: the tokens of the tree
        tree: TreeTensors,
        frame: Frame,
        cache: TreeCache,
        layers: list[Tensor] | None = None,  # for the probe: receives the hidden states after every layer
    ) -> Tensor:  # (B, N, d)
        """Hidden states of all nodes in one pass: each sees the committed tokens, its ancestors and itself."""
        slots = frame.base + torch.arange(tree.num_nodes, device=ids.device)
        positions = (frame.lengths - frame.pads)[:, None] + tree.depths
        if self.max_length is not None:  # nodes beyond it are never emitted, but must not index past a table
            positions = positions.clamp(max=self.max_length - 1)
        cache.aim(slots, frame.visible)
        return self._decode(ids, self._tree_masks(tree, frame, positions), positions, cache, layers)

    def _decode(
        self,
        ids: Tensor | None,
        masks: Masks,
        positions: Tensor,
        cache: TreeCache,
        layers: list[Tensor] | None = None,
        **inputs: Any,
    ) -> Tensor:
        inputs[self._cache_name] = cache
        if layers is not None:
            inputs["output_hidden_states"] = True
        output = self.decoder(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=True, **inputs)
        if layers is not None:
            layers += hidden_states_of(output)
        return output.last_hidden_state

    def _tree_masks(self, tree: TreeTensors, frame: Frame, positions: Tensor) -> Masks:
        """The masks of every kind of layer, (B, 1, N, visible), to be added to attention scores."""
        base, lengths, pads, visible, _ = frame
        slot = torch.arange(visible, device=base.device)
        committed = (slot < lengths[:, None]) & (slot >= pads[:, None])  # (B, visible)
        # A gather instead of index_copy, which inductor gets wrong for bool on a CPU (torch 2.13).
        node = (slot - base).clamp(0, tree.num_nodes - 1)  # the node in each slot, if it has one
        in_tree = (slot >= base) & (slot < base + tree.num_nodes)
        allowed = committed[:, None] | (tree.ancestors.index_select(2, node) & in_tree)  # (B, N, visible)
        at = torch.where(in_tree, positions.index_select(1, node), slot - pads[:, None])  # position in each slot
        return self._masks(allowed, positions, at)

    def _masks(
        self,
        allowed: Tensor,  # (B, N, S) bool: the keys that each query may see, windows aside
        positions: Tensor,  # (B, N) long: positions of the queries
        at: Tensor,  # (B, S) long: positions of the keys
    ) -> Masks:
        """The masks of every kind of layer, (B, 1, N, S), to be added to attention scores."""
        masks = {}
        for kind in self.mask_kinds:
            seen, query, key = allowed, positions[..., None], at[:, None]
            if kind == "sliding_attention":
                seen = allowed & (query - key < self._window)
            elif kind == "chunked_attention":
                seen = allowed & (query // self._chunk == key // self._chunk)
            # float, not bool: eager attention adds the mask. finfo.min, not -inf: a row of -inf is NaN
            bias = torch.zeros((), dtype=self.dtype, device=allowed.device)
            masks[kind] = torch.where(seen, bias, torch.finfo(self.dtype).min)[:, None]
        return masks if len(masks) > 1 else masks[self.mask_kinds[0]]

    @torch.inference_mode()
    def probe(self) -> float:
        """Compare trees of random ids with their paths (`medusa.backbone.probe`); returns the noise of the model's own logits,
        relative to their spread. UnsupportedBackbone if tree decoding would not be exact."""
        return probe(self)


def max_length_of(
    config: Any,  # config of the text model
) -> int | None:
    """The longest text of a model, in tokens; None if its config does not say."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic") and rope.get("original_max_position_embeddings"):
        # Beyond this length the rotation depends on the longest row and on the depth of the tree.
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None)


def token_ids(given: int | Sequence[int] | Tensor | None) -> tuple[int, ...]:
    """Token ids as a tuple, from any form that transformers' configurations use: none, one or several."""
    if given is None:
        return ()
    return tuple(int(token) for token in torch.as_tensor(given).flatten())
