"""MedusaModel: a backbone, its heads and a tree, used like a transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from medusa.acceptance import TypicalAcceptance
from medusa.backbone.backbone import Backbone
from medusa.backbone.cache import TreeCache
from medusa.backbone.compilation import Compiled
from medusa.checkpoints.adapter import has_adapter, load_adapter
from medusa.checkpoints.hub import HUB_KEYWORDS, Source, find_heads, find_model
from medusa.checkpoints.loading import load_backbone
from medusa.checkpoints.publish import push_to_hub
from medusa.checkpoints.reader import load_heads
from medusa.checkpoints.writer import save_heads
from medusa.config import TREE_FILE
from medusa.decoding import DecodingStep, check_prompts
from medusa.errors import CheckpointError, InvalidInput, UnsupportedBackbone
from medusa.heads import MedusaHeads
from medusa.output import MedusaGenerateOutput, collect
from medusa.preparation import OwnOptions, Prepared, handed_over, prepare
from medusa.shortlist import along_paths
from medusa.trees.dynamic import DynamicTree
from medusa.trees.files import Tree, load_tree, save_tree
from medusa.trees.history import Context
from medusa.trees.static import MedusaTree
from medusa.trees.tensors import Drafted, Drafter, Frame


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
            heads = heads.bound_to(
                self._backbone.lm_head, self._backbone.lm_head_device, self._backbone.dtype, backbone.get_input_embeddings()
            )
        self.heads = heads
        if tree is None:
            nodes = 64 if self.device.type == "cuda" else 16
            tree = DynamicTree(nodes, self.num_heads) if self.num_heads else MedusaTree([])
        self.scored = heads.scored if heads is not None else self.vocab_size
        tree.check(self.num_heads, self.scored)
        self.tree = tree
        self.compiled = Compiled(self, noise=self._backbone.probe())  # for the loop: the same steps through torch.compile

    @classmethod
    def from_pretrained(
        cls,
        backbone: Source | str | Path,
        heads: str | Path | None = None,
        tree: str | Path | Tree | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        gguf_file: str | None = None,
        heads_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> MedusaModel:
        """Load a backbone with its heads and tree.

        Args:
            backbone: a local folder, a GGUF file, a hub id, or a model known by name: `embedded`, `smollm2`;
                or what `find_model` found.
            heads: a folder or hub id with the heads, in any format (docs/serving.md), and the adapter of a backbone
                trained with them (Medusa-2); None where the backbone's folder holds them too.
            tree: a tree, a tree file, or None for the `medusa_tree.json` beside the heads.
            dtype: of backbone and heads; None keeps the backbone's own, and unpacks a GGUF file to bfloat16.
            gguf_file: the GGUF file to take of a folder or hub id.
            heads_options: `revision`, `subfolder`, `token`, … of the heads, where theirs are not the backbone's.
            device_map, kwargs: passed on to transformers (`trust_remote_code` is off unless given). Those that say where a
                hub id's files are hold for backbone and heads alike: `revision` (or a hub id with @ and a revision behind it),
                `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            CheckpointError: something is missing, broken or unsafe.
            InvalidInput: a keyword that cannot be followed.
            UnsupportedBackbone: see the class.
        """
        if kwargs.get("proxies"):
            raise InvalidInput("proxies cannot be passed on to the hub; set HTTPS_PROXY in the environment")
        hub = {name: kwargs[name] for name in (*HUB_KEYWORDS, "subfolder") if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}  # in the source
        source = find_model(backbone, gguf_file, code=bool(kwargs.get("trust_remote_code")), **hub)
        if heads is not None:
            heads_folder = find_heads(heads, **{**hub, **(heads_options or {})})
        elif heads_options:
            raise InvalidInput("heads_options are for heads that lie elsewhere; pass heads=..., or leave heads_options out")
        else:
            heads_folder = source.heads or source.folder
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

    static_shapes = False

    def new_cache(self, capacity: int) -> TreeCache:
        return self._backbone.new_cache(capacity)

    def prefill(
        self, ids: Tensor, attention_mask: Tensor | None, cache: TreeCache, embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The last position's hidden state (B, d) and logits (B, V)."""
        hidden = self._backbone.prefill(ids, attention_mask, cache, embeds)
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
        lm_head: Any = None,  # some rows of the backbone's own; None: all
    ) -> Tensor:  # (..., V)
        """The backbone's logits of hidden states."""
        return self._backbone.logits(hidden, lm_head)

    def draft_and_verify(
        self,
        root: Tensor,  # (B,) long
        hidden: Tensor,  # (B, d)
        drafter: Drafter,
        history: Context | None,
        frame: Frame,
        cache: TreeCache,
    ) -> Drafted:
        """Fill the drafter's trees from the heads and read them in one pass of the backbone."""
        with _span("medusa.heads"):
            guesses = None
            if drafter.num_heads and self.heads is not None:
                states = self.heads.states(hidden, drafter.num_heads, root)
                guesses = drafter.guess(self.heads.logits(states))
                along = None
                if self.heads.kind == "path" and guesses.log_p is not None:
                    along = along_paths(self.heads, hidden, root, states, guesses.tokens, guesses.log_p)
                guesses = guesses._replace(tokens=self.heads.tokens(guesses.tokens), along=along)
            tokens, tree = drafter.assemble(root, guesses, history)
        with _span("medusa.backbone"):
            states = self._backbone.verify(tokens, tree, frame, cache)
            return Drafted(tokens, tree, states, self._backbone.logits(states))

    # What a user calls.

    def stream(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Iterator[DecodingStep]:
        """Decode step by step; arguments as for `generate`. Bad ones are refused here, before the first step."""
        return self._prepare("stream", input_ids, attention_mask, options).decode(self)

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        streamer: Any = None,
        **options: Any,
    ) -> Tensor | MedusaGenerateOutput:
        """Generate as transformers' `generate` does, which prepares the call; see `docs/architecture.md` for what is exact.

        Every key of transformers' `GenerationConfig` and every argument of its `generate` is followed or refused by name.
        None is not given: the key is the generation config's. (Two departures: a top-k of 50 that nobody asked for is not
        applied, and where nothing says how many, there are 256 new tokens or what the context leaves.)

        Args:
            input_ids: (B, P) long, left-padded.
            attention_mask: (B, P), 1 for tokens; None: transformers tells padding by the pad id.
            streamer: gets the prompt, then tokens as they come, as in transformers; batch of one.
            max_new_tokens, do_sample, temperature, repetition_penalty, eos_token_id, …: keys of a generation config.
            generation_config: a whole one.
            stop_strings: strings that end a row, with `tokenizer`.
            stopping_criteria, logits_processor: transformers' lists. A processor that nobody knows is tried out, and refused
                where it keeps state from call to call.
            inputs_embeds: (B, L, d), a soft prompt to be read in the place of `input_ids`.
            acceptance: "exact" (lossless) or "typical" (paper 2.3.1; only where do_sample is set).
            epsilon, delta: thresholds of typical acceptance.
            seed: of the draws; default: drawn from torch's generator, so that `torch.manual_seed` governs it.
            tree: another tree for this call: a `MedusaTree` (`MedusaTree([])` decodes plainly), `DynamicTree` or `TreeChoice`.
            compile: run each step through `torch.compile` with static shapes.

        Returns:
            (B, P + new) long, right-padded; or MedusaGenerateOutput where return_dict_in_generate is set.

        Raises:
            InvalidInput, ContextOverflow, InvalidTree: before any work is done.
        """
        prepared = self._prepare("generate", input_ids, attention_mask, options)
        if streamer is not None and len(prepared.input_ids) > 1:
            raise InvalidInput(f"a streamer takes one row, got {len(prepared.input_ids)}; use model.stream for batches")
        return self._collect(prepared, streamer, home=input_ids.device if input_ids is not None else None)

    def custom_generate(
        self,
        backbone: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        acceptance: Literal["exact", "typical"] = "exact",
        epsilon: float = TypicalAcceptance.epsilon,
        delta: float = TypicalAcceptance.delta,
        seed: int | None = None,
        tree: Tree | None = None,
        compile: bool = False,
        **model_kwargs: Any,  # transformers would give an attention_mask named here twice
    ) -> Tensor | MedusaGenerateOutput:
        """For `backbone.generate(..., custom_generate=model.custom_generate)`: transformers prepares, Medusa decodes.

        Takes Medusa's own keywords of `generate` besides. transformers hands neither a streamer nor a tokenizer on: use
        `MedusaModel.generate` to stream, or for stop strings.

        Raises:
            InvalidInput: a setting, processor or model input that a tree cannot follow, by name.
        """
        if backbone is not self.backbone:
            raise InvalidInput("this Medusa model was made for another backbone object")
        own = OwnOptions(acceptance, epsilon, delta, seed, tree, compile)
        return self._collect(
            handed_over(self, own, backbone, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        )

    def _prepare(
        self, method: str, input_ids: Tensor | None, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> Prepared:
        """What transformers prepares of a call of ours, with prompts and settings checked."""
        if input_ids is not None and "inputs_embeds" not in options:
            input_ids, mask = check_prompts(self, input_ids, attention_mask)
            attention_mask = mask if mask is not None or attention_mask is None else torch.ones_like(input_ids)
        return prepare(self, method, {"input_ids": input_ids, "attention_mask": attention_mask, **options})

    def _collect(self, prepared: Prepared, streamer: Any = None, home: torch.device | None = None) -> Any:
        """The output of a call, on the device that its ids came from."""
        steps = prepared.decode(self)
        output = collect(steps, prepared.input_ids.to(home or prepared.input_ids.device), prepared.pad_token_id, streamer)
        return output if prepared.return_dict else output.sequences


def _span(name: str) -> AbstractContextManager:
    """A named stretch for the profiler; compiled code has none."""
    return nullcontext() if torch.compiler.is_compiling() else record_function(name)
