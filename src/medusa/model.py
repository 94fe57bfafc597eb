"""MedusaModel: a backbone with heads and a tree, used like a transformers model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa.backbone.cache import TreeCache
from medusa.backbone.compilation import Compiled
from medusa.backbone.lm import TreeLM
from medusa.backbone.ranks import Ranks
from medusa.checkpoints.adapter import has_adapter
from medusa.checkpoints.hub import HUB_KEYWORDS, Source, find_heads, find_model
from medusa.checkpoints.loading import load_backbone
from medusa.checkpoints.publish import push_to_hub
from medusa.checkpoints.quantization import unpack_in_order
from medusa.checkpoints.reader import load_heads
from medusa.checkpoints.writer import save_heads
from medusa.config import TREE_FILE
from medusa.errors import CheckpointError, InvalidInput, UnsupportedBackbone
from medusa.generation.mixin import MedusaGenerationMixin
from medusa.heads import MedusaHeads
from medusa.kernels.workers import release_workers
from medusa.runs.spans import span
from medusa.sampling import ahead
from medusa.shortlist import along_paths
from medusa.trees.dynamic import DynamicTree
from medusa.trees.files import Tree, load_tree, save_tree
from medusa.trees.history import History
from medusa.trees.static import MedusaTree
from medusa.trees.tensors import Drafted, Drafter, Frame, chain


class MedusaModel(MedusaGenerationMixin):
    """A causal LM that decodes several tokens per step with Medusa heads and a candidate tree.

    The model does not change while decoding, and all state belongs to the request: threads can share it.

    Args:
        backbone: a loaded transformers causal LM with sdpa or eager attention.
        heads: the heads; None: plain decoding.
        tree: the candidate tree; None: a dynamic tree of all heads, with 64 nodes on a GPU and 16 elsewhere. `medusa tune`
            finds the fastest.

    Raises:
        UnsupportedBackbone: tree decoding would not be exact with this backbone (probed here, with random ids).
        CheckpointError: the heads have another hidden size or vocabulary.
        InvalidTree: the tree is deeper than the heads.
    """

    def __init__(self, backbone: PreTrainedModel, heads: MedusaHeads | None = None, tree: Tree | None = None):
        if not isinstance(backbone, PreTrainedModel):
            raise UnsupportedBackbone(
                f"backbone is a {type(backbone).__name__}, expected a transformers causal LM; "
                "pass a folder or hub id to MedusaModel.from_pretrained"
            )
        unpack_in_order(backbone)
        self.lm = TreeLM(backbone)
        self.backbone = backbone
        self.num_heads = len(heads) if heads is not None else 0
        self.max_length = self.lm.max_length
        self.vocab_size = self.lm.vocab_size
        if heads is not None:
            wanted = (self.lm.hidden_size, self.vocab_size)
            got = (heads.config.hidden_size, heads.config.vocab_size)
            if got != wanted:
                raise CheckpointError(
                    f"heads are for hidden size {got[0]} and {got[1]} tokens, the backbone has {wanted[0]} and "
                    f"{wanted[1]}; use heads trained on this backbone"
                )
            embedding = backbone.get_input_embeddings()
            heads = heads.bound_to(self.lm.lm_head, self.lm.lm_head_device, self.lm.dtype, embedding)
        self.heads = heads
        if tree is None:
            nodes = 64 if self.device.type == "cuda" else 16
            tree = DynamicTree(nodes, self.num_heads) if self.num_heads else MedusaTree([])
        self.scored = heads.scored if heads is not None else self.vocab_size
        self.draft_vocabulary = heads.token_map if heads is not None and self.scored < self.vocab_size else None
        tree.check(self.num_heads, self.scored)
        self.tree = tree
        self._compiled = Compiled(self, noise=self.lm.probe())
        release_workers()  # it may decode in another thread

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
            backbone: a local folder, a GGUF file, a hub id, the name of a known model (`embedded`, `smollm2`), or a
                `Source` from `find_model`.
            heads: a folder or hub id with the heads, in any format (docs/serving.md), and the adapter of a backbone
                trained with them (Medusa-2); None: the backbone's folder holds the heads too.
            tree: a tree or a tree file; None: the `medusa_tree.json` beside the heads.
            dtype: dtype of backbone and heads; None: the backbone's own, or bfloat16 for a GGUF file.
            gguf_file: the GGUF file to use, if a folder or hub id has several.
            heads_options: `revision`, `subfolder`, `token`, … for the heads, if they differ from the backbone's.
            device_map, kwargs: passed on to transformers (`trust_remote_code` is off by default). Those that locate a hub id's
                files apply to backbone and heads: `revision` (or `ID@REVISION` as the hub id), `subfolder`, `token`,
                `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            CheckpointError: something is missing, broken or unsafe.
            InvalidInput: a keyword is not supported.
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
            raise InvalidInput("heads_options are for heads in another place; pass heads=..., or leave heads_options out")
        else:
            heads_folder = source.heads or source.folder
        if isinstance(tree, str | Path):
            tree = load_tree(tree)
        elif tree is None and (heads_folder / TREE_FILE).is_file():
            tree = load_tree(heads_folder / TREE_FILE)
        loaded = load_heads(heads_folder, backbone=source.folder)
        adapters = [heads_folder] if heads is not None and has_adapter(heads_folder) else []
        module = load_backbone(source, dtype, adapters, device_map=device_map, **kwargs)
        try:
            return cls(module, loaded, tree)
        except UnsupportedBackbone:
            # Some models (Gemma 2 with its capped scores, GPT-J) add the mask only under eager attention.
            if "attn_implementation" in kwargs or not hasattr(module, "set_attn_implementation"):
                raise
            module.set_attn_implementation("eager")
            return cls(module, loaded, tree)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the heads, their config and the tree, but not the backbone."""
        if self.heads is None:
            raise InvalidInput("this model has no heads to save")
        save_heads(self.heads, folder, base_model=self.backbone.config._name_or_path or None)
        save_tree(self.tree, Path(folder) / TREE_FILE)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Publish the files of `save_pretrained` with a model card; returns their address."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_to_hub(folder, repo_id, private, token)

    @property
    def compiled(self) -> Compiled:
        """The same model, with compiled steps."""
        if self.ranks is not None:
            raise InvalidInput("steps of a tensor-parallel model cannot be compiled; leave compile out")
        return self._compiled

    @property
    def ranks(self) -> Ranks | None:
        """The processes that share this model; None: this one alone."""
        return self.lm.ranks

    @property
    def device(self) -> torch.device:
        """The device that token ids are expected on."""
        return self.lm.device

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, from the backbone's generation config."""
        return self.lm.eos_token_ids

    # The decoding loop's protocol, `Decodable`.

    static_shapes = False

    def new_cache(self, capacity: int, rows: int | None = None) -> TreeCache:
        return self.lm.new_cache(capacity)

    def prefill(
        self, ids: Tensor, attention_mask: Tensor | None, cache: TreeCache, embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Process prompts into a cache; returns hidden state (B, d) and logits (B, V) of the last position."""
        hidden = self.lm.prefill(ids, attention_mask, cache, embeds)
        return hidden, self.lm.logits(hidden)

    def hidden_states(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """The last hidden state of every position, as the heads read it; see `TreeLM.hidden_states`."""
        return self.lm.hidden_states(ids, segments)

    def logits(self, hidden: Tensor, lm_head: Any = None) -> Tensor:
        """The backbone's logits of hidden states; see `TreeLM.logits`."""
        return self.lm.logits(hidden, lm_head)

    def extend(
        self,
        ids: Tensor,  # (B, T) long
        frame: Frame,
        cache: TreeCache,
    ) -> Tensor:  # (B, T, d)
        """Process more tokens of texts whose beginnings are in a cache; returns their last hidden states."""
        return self.lm.verify(ids, chain(ids.shape[1], ids.device), frame, cache)

    def draft_and_verify(
        self,
        root: Tensor,  # (B,) long
        hidden: Tensor,  # (B, d)
        drafter: Drafter,
        history: History | None,
        frame: Frame,
        cache: TreeCache,
    ) -> Drafted:
        """Fill the drafter's trees from the heads and read them in one pass of the backbone."""
        with span("medusa.heads"):
            guesses = None
            if drafter.num_heads and self.heads is not None:
                states = self.heads.states(hidden, drafter.num_heads, root)
                guesses = drafter.guess(self.heads.logits(states))
                along = None
                if self.heads.kind == "path" and guesses.log_p is not None:
                    along = along_paths(self.heads, hidden, root, states, guesses.tokens, guesses.log_p)
                tokens = self.heads.tokens(guesses.tokens)
                noise = ahead(frame.draws, frame.lengths, tokens) if frame.draws is not None else None
                guesses = guesses._replace(tokens=tokens, along=along, noise=noise)
            tokens, tree = drafter.assemble(root, guesses, history)
        with span("medusa.backbone"):
            states = self.lm.verify(tokens, tree, frame, cache)
            return Drafted(tokens, tree, states, self.lm.logits(states))
