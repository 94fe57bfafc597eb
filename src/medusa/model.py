"""MedusaModel: a backbone, its heads and a tree, used like a transformers model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from medusa.acceptance import TypicalAcceptance
from medusa.adapter import has_adapter, load_adapter
from medusa.backbone import Backbone, token_ids
from medusa.cache import TreeCache
from medusa.checkpoints import load_heads, push_to_hub, save_heads
from medusa.compilation import CompiledStep
from medusa.config import TREE_FILE
from medusa.context import Context
from medusa.decoding import DecodingOptions, DecodingStep, decode
from medusa.dynamic import DynamicTree
from medusa.errors import CheckpointError, InvalidInput, UnsupportedBackbone
from medusa.heads import MedusaHeads
from medusa.hub import find_heads, find_model
from medusa.loading import load_backbone
from medusa.output import MedusaGenerateOutput, collect
from medusa.processors import check_sampling, classify, processors_for
from medusa.tree import Drafter, MedusaTree, TreeTensors
from medusa.trees import Tree, load_tree, save_tree

DEFAULT_MAX_NEW_TOKENS = 256


class MedusaModel:
    """A causal LM that decodes several tokens a step with Medusa heads and a candidate tree.

    The model never changes while decoding, and state lives in the request: threads may share it.

    Args:
        backbone: a loaded transformers causal LM with sdpa or eager attention.
        heads: its heads; None decodes plainly.
        tree: the candidate tree; None takes a dynamic one of all heads, of 64 nodes on a GPU and 16 elsewhere: `medusa tune`
            finds the fastest.

    Raises:
        UnsupportedBackbone: tree decoding on this backbone would not be exact (probed here, on random ids).
        CheckpointError: the heads are for another hidden size or vocabulary.
        InvalidTree: the tree is deeper than the heads.
    """

    def __init__(self, backbone: PreTrainedModel, heads: MedusaHeads | None = None, tree: Tree | None = None):
        if not isinstance(backbone, PreTrainedModel):
            raise UnsupportedBackbone(
                f"backbone is a {type(backbone).__name__}, wanted a transformers causal LM; "
                "pass a folder or hub id to MedusaModel.from_pretrained"
            )
        self._backbone = Backbone(backbone)
        self.backbone = backbone
        self.num_heads = len(heads) if heads is not None else 0
        self.context = self._backbone.context
        self.vocab_size = self._backbone.vocab_size
        if heads is not None:
            wanted = (self._backbone.hidden_size, self.vocab_size)
            got = (heads.config.hidden_size, heads.config.vocab_size)
            if got != wanted:
                raise CheckpointError(
                    f"heads are for hidden size {got[0]} and {got[1]} tokens, the backbone has {wanted[0]} and "
                    f"{wanted[1]}; use heads trained on this backbone"
                )
            heads = heads.bound_to(self._backbone.lm_head, self._backbone.lm_head_device, self._backbone.dtype)
        self.heads = heads
        if tree is None:
            nodes = 64 if self.device.type == "cuda" else 16
            tree = DynamicTree(nodes, self.num_heads) if self.num_heads else MedusaTree([])
        tree.check(self.num_heads, self.vocab_size)
        self.tree = tree
        self._compiled_step = CompiledStep(self._draft_and_verify)
        self._backbone.probe()

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | Path,
        heads: str | Path | None = None,
        tree: str | Path | Tree | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        gguf_file: str | None = None,
        **kwargs: Any,
    ) -> MedusaModel:
        """Load a backbone with its heads and tree.

        Args:
            backbone: a local folder, a GGUF file, a hub id, or a model known by name: `embedded`, `smollm2`.
            heads: a folder or hub id with the heads, in any format (docs/serving.md), and the adapter of a backbone
                trained with them (Medusa-2); None where the backbone's folder holds them too.
            tree: a tree, a tree file, or None for the `medusa_tree.json` beside the heads.
            dtype: of backbone and heads; None keeps the backbone's own, and unpacks a GGUF file to bfloat16.
            gguf_file: the GGUF file to take of a folder or hub id.
            device_map, kwargs: passed on to transformers (`trust_remote_code` is off unless given).

        Raises:
            CheckpointError: something is missing, broken or unsafe.
            UnsupportedBackbone: see the class.
        """
        source = find_model(backbone, gguf_file, code=bool(kwargs.get("trust_remote_code")))
        heads_folder = find_heads(heads) if heads is not None else source.heads or source.folder
        if isinstance(tree, str | Path):
            tree = load_tree(tree)
        elif tree is None and (heads_folder / TREE_FILE).is_file():
            tree = load_tree(heads_folder / TREE_FILE)
        loaded = load_heads(heads_folder, backbone=source.folder)
        module = load_backbone(source, dtype=dtype, device_map=device_map, **kwargs)
        if heads is not None and has_adapter(heads_folder):
            load_adapter(module, heads_folder)
        try:
            return cls(module, loaded, tree)
        except UnsupportedBackbone:
            # Some models (Gemma 2 with its capped scores, GPT-J) add no mask under sdpa but do so under eager attention.
            if "attn_implementation" in kwargs or not hasattr(module, "set_attn_implementation"):
                raise
            module.set_attn_implementation("eager")
            return cls(module, loaded, tree)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the heads, their config and the tree; the backbone stays where it is."""
        if self.heads is None:
            raise InvalidInput("this model has no heads to save")
        save_heads(self.heads, folder, base_model=self.backbone.config._name_or_path or None)
        save_tree(self.tree, Path(folder) / TREE_FILE)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Publish what `save_pretrained` writes, with a model card, and return its address."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_to_hub(folder, repo_id, private, token)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self._backbone.device

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, by the backbone's generation config."""
        return self._backbone.eos_token_ids

    # What the decoding loop asks for.

    def new_cache(self, capacity: int) -> TreeCache:
        return self._backbone.new_cache(capacity)

    def prefill(self, ids: Tensor, attention_mask: Tensor | None, cache: TreeCache) -> tuple[Tensor, Tensor]:
        """The last position's hidden state (B, d) and logits (B, V)."""
        hidden = self._backbone.prefill(ids, attention_mask, cache)
        return hidden, self._backbone.logits(hidden)

    def hidden_states(
        self,
        ids: Tensor,  # (B, T) long, padded at the right if at all
        segments: Tensor | None = None,  # (B, T) long: the text each token belongs to, where rows hold several
    ) -> Tensor:  # (B, T, d)
        """The last hidden state of every position, as the heads read it."""
        return self._backbone.hidden_states(ids, segments)

    def logits(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (..., V)
        """The backbone's logits of hidden states."""
        return self._backbone.logits(hidden)

    def draft_and_verify(self, compiled: bool, *args) -> tuple[Tensor, TreeTensors, Tensor, Tensor]:
        """The tree's tokens (B, N), the tree, hidden states (B, N, d) and logits (B, N, V), compiled if asked and possible."""
        return self._compiled_step(*args) if compiled else self._draft_and_verify(*args)

    def _draft_and_verify(
        self,
        root: Tensor,  # (B,) long
        hidden: Tensor,  # (B, d)
        drafter: Drafter,
        context: Context | None,
        base: Tensor,
        lengths: Tensor,
        pads: Tensor,
        visible: int,
        cache: TreeCache,
    ) -> tuple[Tensor, TreeTensors, Tensor, Tensor]:
        with _span("medusa.heads"):
            guesses = None
            if drafter.num_heads and self.heads is not None:
                guesses = drafter.guess(self.heads(hidden, drafter.num_heads))
            tokens, tree = drafter.assemble(root, guesses, context)
        with _span("medusa.backbone"):
            states = self._backbone.verify(tokens, tree, base, lengths, pads, visible, cache)
            return tokens, tree, states, self._backbone.logits(states)

    # What a user calls.

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        acceptance: Literal["exact", "typical"] = "exact",
        epsilon: float = TypicalAcceptance.epsilon,
        delta: float = TypicalAcceptance.delta,
        seed: int | None = None,
        eos_token_id: int | list[int] | Tensor | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: Any = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        tree: Tree | None = None,
        compile: bool = False,
    ) -> Iterator[DecodingStep]:
        """Decode step by step; arguments as for `generate`. Bad ones are refused here, before the first step."""
        if tree is not None and not isinstance(tree, Tree):
            raise InvalidInput(
                f"tree is a {type(tree).__name__}, wanted a MedusaTree or DynamicTree; load a file with load_tree"
            )
        warpers = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        check_sampling(**warpers, repetition_penalty=repetition_penalty)
        if not do_sample and any(value is not None for value in warpers.values()):
            warnings.warn("temperature, top_k, top_p and min_p do nothing without do_sample=True", stacklevel=2)
        eos = self.eos_token_ids if eos_token_id is None else token_ids(eos_token_id)
        changes = {**warpers, "repetition_penalty": repetition_penalty, "do_sample": do_sample, "eos_token_id": list(eos)}
        length = input_ids.shape[-1] if isinstance(input_ids, Tensor) and input_ids.ndim else 0
        criteria = [*(stopping_criteria or [])]
        if stop_strings is not None:
            given = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
            if not all(given):
                raise InvalidInput("a stop string is empty and would end every text at once")
            if tokenizer is None:
                raise InvalidInput("stop_strings needs the tokenizer; pass tokenizer=...")
            criteria.append(StopStringCriteria(tokenizer, given))
        options = DecodingOptions(
            max_new_tokens=self._max_new_tokens(length, attention_mask, max_new_tokens),
            do_sample=do_sample,
            typical=typical_thresholds(acceptance, epsilon, delta),
            processors=processors_for(self.backbone, changes, length, logits_processor, self.device),
            eos_token_ids=eos,
            stopping_criteria=criteria,
            seed=_seed(seed),
            compiled=compile,
        )
        return decode(self, input_ids, attention_mask, self.tree if tree is None else tree, options)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        streamer: Any = None,
        pad_token_id: int | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Tensor | MedusaGenerateOutput:
        """Generate in the conventions of transformers; see `docs/architecture.md` for what is exact.

        Args:
            input_ids: (B, P) long, left-padded.
            attention_mask: (B, P), 1 for tokens; None where nothing is padded.
            max_new_tokens: default: the backbone's generation config, else 256 or what its context leaves.
            do_sample: sample from the backbone's distribution; greedy otherwise.
            temperature, top_k, top_p, min_p, repetition_penalty: default: the backbone's generation config.
            acceptance: "exact" (lossless) or "typical" (paper 2.3.1; only where do_sample is set).
            epsilon, delta: thresholds of typical acceptance.
            seed: of the draws; default: drawn from torch's generator, so that `torch.manual_seed` governs it.
            eos_token_id: one or several; default: the backbone's.
            stop_strings: strings that end a row, with `tokenizer`.
            stopping_criteria, logits_processor: transformers' lists.
            streamer: gets the prompt, then tokens as they come, as in transformers; batch of one.
            tree: another tree for this call: a `MedusaTree` (`MedusaTree([])` decodes plainly), `DynamicTree` or `TreeChoice`.
            compile: run each step through `torch.compile` with static shapes.
            pad_token_id: fills rows that finished early; default: the backbone's, else eos, else 0.

        Returns:
            (B, P + new) long, right-padded; or MedusaGenerateOutput where return_dict_in_generate is set.

        Raises:
            InvalidInput, ContextOverflow, InvalidTree: before any work is done.
        """
        if streamer is not None and len(input_ids) > 1:
            raise InvalidInput(f"a streamer takes one row, got {len(input_ids)}; use model.stream for batches")
        steps = self.stream(input_ids, attention_mask, **options)
        eos = self.eos_token_ids if options.get("eos_token_id") is None else token_ids(options["eos_token_id"])
        output = collect(steps, input_ids, self._pad(pad_token_id, eos), streamer)
        return output if return_dict_in_generate else output.sequences  # type: ignore[return-value]

    def custom_generate(
        self,
        backbone: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,  # transformers would give an attention_mask named here twice
    ) -> Tensor | MedusaGenerateOutput:
        """For `backbone.generate(..., custom_generate=model.custom_generate)`: transformers prepares, Medusa decodes.

        transformers does not hand the streamer on; use `MedusaModel.generate` to stream.
        """
        if backbone is not self.backbone:
            raise InvalidInput("this Medusa model was made for another backbone object")
        if generation_config.num_beams not in (None, 1) or generation_config.num_return_sequences not in (None, 1):
            raise InvalidInput("Medusa decodes greedily or by sampling, one sequence a prompt; unset num_beams")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(generation_config, name, None):
                raise InvalidInput(f"{name} is not there under Medusa; unset it")
        criteria = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        eos = [token for c in stopping_criteria if isinstance(c, EosTokenCriteria) for token in token_ids(c.eos_token_id)]
        options = DecodingOptions(
            max_new_tokens=min(limits) - input_ids.shape[1],
            do_sample=bool(generation_config.do_sample),
            processors=classify(logits_processor),
            eos_token_ids=tuple(eos),
            stopping_criteria=criteria,
            seed=_seed(None),
        )
        pad = next(iter(token_ids(generation_config.pad_token_id)), None)
        steps = decode(self, input_ids, model_kwargs.get("attention_mask"), self.tree, options)
        output = collect(steps, input_ids, self._pad(pad, options.eos_token_ids))
        return output if generation_config.return_dict_in_generate else output.sequences  # type: ignore[return-value]

    def _max_new_tokens(self, length: int, attention_mask: Tensor | None, given: int | None) -> int:
        config = self.backbone.generation_config
        if given is not None:
            return given
        if config.max_new_tokens is not None:
            return config.max_new_tokens
        if config.max_length is not None:
            return config.max_length - length
        longest = length if attention_mask is None or not length else int(attention_mask.sum(-1).amax())
        left = DEFAULT_MAX_NEW_TOKENS if self.context is None else self.context - longest
        return max(1, min(DEFAULT_MAX_NEW_TOKENS, left))

    def _pad(self, given: int | None, eos: tuple[int, ...]) -> int:
        """The id that fills rows which finished early."""
        default = self.backbone.generation_config.pad_token_id
        return next((token for token in (given, default, *eos) if token is not None), 0)


def typical_thresholds(acceptance: str, epsilon: float, delta: float) -> TypicalAcceptance | None:
    if acceptance not in ("exact", "typical"):
        raise InvalidInput(f"acceptance is {acceptance!r}, wanted 'exact' or 'typical'")
    return TypicalAcceptance(epsilon, delta) if acceptance == "typical" else None


def _span(name: str) -> AbstractContextManager:
    """A named stretch for the profiler; compiled code has none."""
    return nullcontext() if torch.compiler.is_compiling() else record_function(name)


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**62, ())) if seed is None else seed
