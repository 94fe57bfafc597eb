"""Medusa heads: K small predictors that read the backbone's last hidden state (paper 2.1.1) and, in two kinds, known tokens.

Heads are numbered from 1, as in the paper: at position t the backbone's own LM head predicts token t+1 and head k
predicts token t+k+1. Tensors and files count from 0, so head k is `heads[k - 1]`.

The paper's heads do not know which token t+1 was drawn: the hidden state of position t does not contain it. Heads of kind
"root" also read that token, the root, which is known before the heads run. Heads of kind "path" read all tokens of a node's
path, as Hydra's do (2402.05109): their guesses from the root alone form a shortlist for each depth, and along a path only the
shortlist is scored again (`medusa.shortlist`), never the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medusa.config import HeadsKind, MedusaConfig
from medusa.errors import CheckpointError
from medusa.placement import device_of, dtype_of, is_plain, linear_map


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), the identity when new: W and b start at zero.

    Args:
        read: total width of the embeddings that it reads: x + SiLU(W x + sum_j C_j e(x_j) + b), every C_j zero when new.
    """

    def __init__(self, hidden_size: int, read: int = 0, **factory):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, **factory)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if read:
            self.tokens = nn.Linear(read, hidden_size, bias=False, **factory)
            nn.init.zeros_(self.tokens.weight)

    def forward(
        self,
        x: Tensor,  # (..., d)
        known: Tensor | None = None,  # (..., m E): embeddings of the first m tokens that it reads, end to end
    ) -> Tensor:  # (..., d)
        inner = self.linear(x)
        if known is not None:
            inner = inner + F.linear(known, self.tokens.weight[:, : known.shape[-1]])
        return x + F.silu(inner)


def tokens_read(kind: HeadsKind, k: int) -> int:
    """The maximum number of tokens that head k + 1 reads: none, the root, or the path from the root on."""
    return {"medusa": 0, "root": 1, "path": k + 1}[kind]


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear that holds these tensors, without copying them."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class DraftLMHead(nn.Module):
    """The rows of a draft vocabulary of an LM head that is not a plain matrix: all rows are computed, then these selected."""

    def __init__(self, lm_head: nn.Module, tokens: Tensor):
        super().__init__()
        self._whole = (lm_head,)  # in a tuple, so that it is not a submodule
        self.register_buffer("tokens", tokens, persistent=False)
        self.tokens: Tensor

    @property
    def whole(self) -> nn.Module:
        return self._whole[0]

    def forward(self, h: Tensor) -> Tensor:
        return self.whole(h.to(dtype_of(self.whole))).index_select(-1, self.tokens)


class MedusaHeads(nn.ModuleList):
    """K heads: L residual blocks each, then an LM head of the head's own or the backbone's (paper 2.1.1).

    The module's parameter names are those of the v0.1 files: `{k}.{l}.linear.weight`, `{k}.{L}.weight`.

    Args:
        hidden_size: width d of the hidden states.
        vocab_size: V, the rows of the backbone's LM head.
        num_heads: K, number of heads.
        num_layers: L, number of residual blocks per head.
        shared_lm_head: predict through the backbone's LM head; `share` must then be called before use.
        lm_head_bias: the heads' own LM heads have a bias, as the backbone's has.
        more: the other fields of `MedusaConfig`, without `medusa_`.

    >>> heads = MedusaHeads(hidden_size=8, vocab_size=32, num_heads=3)
    >>> heads(torch.zeros(2, 8)).shape
    torch.Size([3, 2, 32])
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        num_heads: int,
        num_layers: int = 1,
        shared_lm_head: bool = False,
        lm_head_bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **more: Any,
    ):
        options = {f"medusa_{name}": value for name, value in more.items()}
        config = MedusaConfig(hidden_size, vocab_size, num_heads, num_layers, shared_lm_head, lm_head_bias, **options)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        heads = []
        for k in range(num_heads):
            read = tokens_read(config.medusa_heads_kind, k) * (config.medusa_embedding_size or 0)
            parts: list[nn.Module] = [  # the first block reads
                ResidualBlock(hidden_size, 0 if layer else read, **factory) for layer in range(num_layers)
            ]
            if not shared_lm_head:
                parts.append(nn.Linear(hidden_size, config.scored, bias=lm_head_bias, **factory))
            heads.append(nn.Sequential(*parts))
        super().__init__(heads)
        self.config = config
        if config.medusa_draft_vocabulary is not None:  # (V',) long, rising: the token that each score is of
            self.register_buffer("token_map", torch.arange(config.scored, device=device))
        self.token_map: Tensor
        # In tuples, so that they are not submodules: they belong to the backbone.
        self._shared: tuple[nn.Module, ...] = ()
        self._embedding: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, config: MedusaConfig) -> MedusaHeads:
        """New heads as a configuration describes them."""
        options = {name.removeprefix("medusa_"): value for name, value in vars(config).items()}
        del options["base_model_name_or_path"]
        heads = cls(**options)
        heads.config = config
        return heads

    @classmethod
    def around(cls, config: MedusaConfig, tensors: Mapping[str, Tensor]) -> MedusaHeads:
        """Heads around the tensors of their state dict, which are not copied."""
        with torch.device("meta"):
            heads = cls.of(config)
        heads.load_state_dict(tensors, assign=True)
        return heads

    @classmethod
    def for_lm_head(
        cls,
        lm_head: nn.Module,
        num_heads: int,
        num_layers: int = 1,
        shared: bool = False,
        token_map: Tensor | None = None,  # (V',) long, rising: the tokens that heads are to score; None: all
        **reads: Any,  # heads_kind, embedding_size, embedding_scale
    ) -> MedusaHeads:
        """New heads for a backbone: W1 = 0 and W2 a copy of its LM head, so that each predicts what the LM head predicts."""
        weight, bias = linear_map(lm_head)
        vocab_size, hidden_size = weight.shape
        reads |= {"draft_vocabulary": None if token_map is None else len(token_map)}
        sizes = hidden_size, vocab_size, num_heads, num_layers, shared, bias is not None
        heads = cls(*sizes, device=weight.device, dtype=weight.dtype, **reads)
        if token_map is not None:
            heads.token_map = token_map.to(weight.device)
            weight, bias = weight[heads.token_map], bias[heads.token_map] if bias is not None else None
        heads.share(lm_head)
        if not shared:
            with torch.no_grad():
                for k in range(num_heads):
                    heads.lm_head(k).weight.copy_(weight)  # type: ignore[operator]
                    if bias is not None:
                        heads.lm_head(k).bias.copy_(bias)  # type: ignore[operator]
        return heads

    @property
    def num_layers(self) -> int:
        return self.config.medusa_num_layers

    def bound_to(
        self, lm_head: nn.Module, device: torch.device, dtype: torch.dtype, embedding: nn.Module | None = None
    ) -> MedusaHeads:
        """These heads for one backbone: the same tensors where device and dtype agree, the given ones left as they are.

        Args:
            embedding: the backbone's input embeddings, for heads that read tokens.
        """
        held = {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in self.state_dict().items()}
        bound = MedusaHeads.around(self.config, held)
        rows = self.config.medusa_draft_vocabulary is not None and is_plain(lm_head)
        if self.config.medusa_shared_lm_head and (rows or self.kind == "path"):
            lm_head = frozen_linear(*linear_map(lm_head))  # some of its rows are taken, of one that is not trained here
        bound.share(lm_head, embedding)
        return bound.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def parts(self, k: int) -> nn.Sequential:
        """Head k + 1: its residual blocks, then its own LM head if it has one."""
        return cast(nn.Sequential, self[k])

    def share(self, lm_head: nn.Module, embedding: nn.Module | None = None) -> None:
        """Set the backbone's LM head (d -> V), for heads without one, and its token embedding, for heads that read tokens. With
        a draft vocabulary only its rows of the LM head are used."""
        self._embedding = (embedding,) if embedding is not None and self.kind != "medusa" else ()
        if self.config.medusa_draft_vocabulary is not None and self.config.medusa_shared_lm_head:
            lm_head = self.rows_of(lm_head)
        self._shared = (lm_head,) if self.config.medusa_shared_lm_head else ()

    def rows_of(
        self,
        lm_head: nn.Module,  # d -> V
    ) -> nn.Module:  # d -> V'
        """The rows of an LM head for the tokens of the draft vocabulary; a separate matrix if the head is a frozen matrix."""
        tokens = self.token_map.to(device_of(lm_head))
        if not is_plain(lm_head) or lm_head.weight.requires_grad:
            return DraftLMHead(lm_head, tokens)
        weight, bias = linear_map(lm_head)
        return frozen_linear(weight[tokens], bias[tokens] if bias is not None else None)

    @property
    def kind(self) -> HeadsKind:
        """What heads read besides the hidden state."""
        return self.config.medusa_heads_kind

    def embed(
        self,
        tokens: Tensor,  # (...) long
    ) -> Tensor:  # (..., E), the dtype of the heads
        """The backbone's embeddings of tokens, scaled to the size of its hidden states."""
        if not self._embedding:
            raise CheckpointError("these heads read tokens, but no embedding is set; call heads.share(lm_head, embedding)")
        found = self._embedding[0](tokens.to(device_of(self._embedding[0])))
        assert self.config.medusa_embedding_scale is not None
        return found.detach().to(tokens.device, self.dtype) * self.config.medusa_embedding_scale

    @property
    def scored(self) -> int:
        """V', the number of tokens that each head scores."""
        return self.config.scored

    def tokens(
        self,
        places: Tensor,  # (...) long, below V': places among the scores
    ) -> Tensor:  # (...) long
        """The tokens at places among the scores."""
        return places if self.config.medusa_draft_vocabulary is None else self.token_map[places]

    def places(
        self,
        tokens: Tensor,  # (...) long
    ) -> Tensor:  # (...) long
        """The places of tokens among the scores; -1 for a token outside the draft vocabulary."""
        if self.config.medusa_draft_vocabulary is None:
            return tokens
        at = torch.searchsorted(self.token_map, tokens.contiguous()).clamp(max=self.scored - 1)
        return at.where(self.token_map[at] == tokens, -1)

    def lm_head(self, k: int) -> nn.Module:
        """The (d -> V') map of head k + 1: its own or the backbone's."""
        if not self.config.medusa_shared_lm_head:
            return self.parts(k)[self.num_layers]
        if not self._shared:
            raise CheckpointError("these heads share the backbone's LM head, which is not set; call heads.share(lm_head)")
        return self._shared[0]

    def state(
        self,
        h: Tensor,  # (..., d)
        k: int,
        known: Tensor
        | None = None,  # (..., m E): embeddings of the root and of m - 1 tokens of the path, for heads that read them
    ) -> Tensor:  # (..., d)
        """The hidden state of head k + 1, before its LM head."""
        assert (known is None) == (self.kind == "medusa"), f"heads that read the {self.kind}"
        for block in islice(self.parts(k), self.num_layers):  # a slice would build a module at every step
            h, known = block(h, known), None
        return h

    def forward(
        self,
        h: Tensor,  # (..., d), the dtype of the heads
        num_heads: int | None = None,
        root: Tensor | None = None,  # (...) long: the token after h, for heads that read it
    ) -> Tensor:  # (num_heads, ..., V)
        """Logits of the first `num_heads` heads (default: all), so that heads a tree does not use cost nothing. With a draft
        vocabulary, only its V' tokens have logits."""
        return self.logits(self.states(h, num_heads, root))

    def states(self, h: Tensor, num_heads: int | None = None, root: Tensor | None = None) -> Tensor:  # (num_heads, ..., d)
        """The hidden states of the first heads, given the root alone; arguments as for `forward`."""
        known = self.embed(root) if root is not None and self.kind != "medusa" else None
        return torch.stack([self.state(h, k, known) for k in range(len(self) if num_heads is None else num_heads)])

    def logits(
        self,
        states: Tensor,  # (num_heads, ..., d)
    ) -> Tensor:  # (num_heads, ..., V)
        if self.config.medusa_shared_lm_head:
            return self.lm_head(0)(states)  # the LM head's weights are read once for all heads
        return torch.stack([self.lm_head(k)(state) for k, state in enumerate(states)])
