"""Structured output: a grammar (JSON schema, regex, choice, Lark) that every token of a continuation follows, by llguidance.

A grammar reads a row's tree on the host: it walks down the paths and back, and says for every node which tokens may follow.
Before a step drafts, it also says what must follow the root (`medusa.trees.guidance`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from medusa.errors import InvalidInput, one_line
from medusa.runs.extras import require
from medusa.sampling import NodePaths, RowText
from medusa.trees.guidance import Outlook, unpacked

_vocabularies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # llguidance's form of each tokenizer: a second of work


class Grammar:
    """What a continuation must look like. Made once; any number of calls and requests may use it, also at the same time.

    Args:
        definition: llguidance's form of the grammar; see `json`, `regex`, `choice` and `lark`.
        tokenizer: the model's tokenizer, a fast one.

    Raises:
        InvalidInput: the grammar is malformed, the tokenizer is not a fast one, or llguidance is not installed.
    """

    def __init__(self, definition: str, tokenizer: Any):
        library = _library()
        vocabulary = _vocabulary(tokenizer)
        failed, messages = library.LLMatcher.validate_grammar_with_warnings(definition, vocabulary)
        if failed:
            raise InvalidInput(f"the grammar cannot be used: {one_line(ValueError(messages[0]))}")
        self._start = library.LLMatcher(vocabulary, definition, log_level=0)
        self.width = -(-vocabulary.vocab_size // 32)  # of a mask, in words of 32 tokens

    @classmethod
    def json(cls, schema: str | dict[str, Any], tokenizer: Any, whitespace: bool = False) -> Grammar:
        """JSON that fits a schema.

        Args:
            schema: the JSON schema, as text or as parsed; `{"type": "object"}` allows any object.
            whitespace: allow whitespace between tokens of JSON, as the model likes it; False: none, as in `{"a":1}`.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except json.JSONDecodeError as error:
                raise InvalidInput(f"the JSON schema is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise InvalidInput(f"a JSON schema is an object, got {type(schema).__name__}")
        overrides = {"whitespace_flexible": whitespace}
        return cls(_library().LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides), tokenizer)

    @classmethod
    def regex(cls, pattern: str, tokenizer: Any) -> Grammar:
        """Text that a regular expression (Rust's syntax, without look-around) matches as a whole."""
        return cls(_library().LLMatcher.grammar_from_regex(pattern), tokenizer)

    @classmethod
    def choice(cls, texts: Sequence[str], tokenizer: Any) -> Grammar:
        """One of these texts."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise InvalidInput(f"a choice is among texts that are not empty, got {texts!r}")
        return cls.lark("start: " + " | ".join(json.dumps(text) for text in dict.fromkeys(texts)), tokenizer)

    @classmethod
    def lark(cls, text: str, tokenizer: Any) -> Grammar:
        """Text of a context-free grammar in llguidance's variant of Lark."""
        return cls(_library().LLMatcher.grammar_from_lark(text), tokenizer)

    def start(self) -> Any:
        """A matcher at the start of the grammar."""
        return self._start.deep_copy()


def _library() -> Any:
    return require("llguidance", "serve", "structured output")


def _vocabulary(tokenizer: Any) -> Any:
    """llguidance's form of a tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        name = type(tokenizer).__name__
        raise InvalidInput(f"structured output needs a fast tokenizer, got {name}; load it with AutoTokenizer")
    if tokenizer not in _vocabularies:
        bridge = require("llguidance.hf", "serve", "structured output")
        eos = None if tokenizer.eos_token_id is not None else 0  # which ids end a text is decided per call
        _vocabularies[tokenizer] = bridge.from_tokenizer(tokenizer, eos_token=eos)
    return _vocabularies[tokenizer]


@dataclass(frozen=True)
class GrammarMask:
    """The logits processor of a grammar: a row's continuation follows it, and ends exactly where it may end.

    Args:
        grammar: the grammar.
        eos_token_ids: the ids that end the row.
    """

    grammar: Grammar
    eos_token_ids: tuple[int, ...]

    def __post_init__(self):
        if not self.eos_token_ids:
            raise InvalidInput("a grammar needs a token that ends the text, and there is none; pass eos_token_id")

    def __call__(
        self,
        scores: Tensor,  # (N, V) float32
        text: RowText,
        paths: NodePaths | None,  # None: N = 1, and the scores follow the text
    ) -> Tensor:  # (N, V)
        """The scores of tokens that the grammar allows after each node; -inf for all others."""
        place = self._place(text)
        if paths is None:
            place.follow(text.generated)
            bits = place.mask()[None]
        else:
            tokens, parents = paths.on_host()
            place.follow([*text.generated, tokens[0]])
            bits = place.masks(tokens, parents)
        allowed = unpacked(bits.to(scores.device), scores.shape[1])
        scores = scores.masked_fill(~allowed, -torch.inf)
        # Where another processor has excluded all tokens that are left, the grammar wins.
        lost = (scores == -torch.inf).all(-1, keepdim=True)
        return torch.where(lost & allowed, 0.0, scores)

    def outlook(
        self,
        text: RowText,
        root: int,
        most: int,  # of forced tokens
    ) -> Outlook:
        """What may follow the root."""
        place = self._place(text)
        place.follow([*text.generated, root])
        return place.outlook(most)

    def _place(self, text: RowText) -> _Place:
        if self not in text.memory:
            text.memory[self] = _Place(self.grammar, self.eos_token_ids)
        return text.memory[self]


class _Place:
    """Where a row stands in its grammar: a function of its tokens, of which each is consumed once."""

    def __init__(self, grammar: Grammar, eos_token_ids: tuple[int, ...]):
        self._matcher = grammar.start()
        self._eos = eos_token_ids
        self._consumed = 0
        self._ended = False  # by an eos
        self._width = grammar.width
        self._ends = torch.zeros(max(self._width, max(eos_token_ids) // 32 + 1), dtype=torch.int32)
        for token in eos_token_ids:
            self._ends[token // 32] |= torch.tensor(1 << token % 32).to(torch.int32)  # bit 31 is the sign

    def follow(self, tokens: Sequence[int]) -> None:
        """Go on to the end of these tokens, which begin with those followed before."""
        for token in tokens[self._consumed :]:
            self._consumed += 1
            if self._ended or token in self._eos:
                self._ended = True
            elif not self._down(token):
                raise InvalidInput(
                    f"token {token} does not follow the grammar: {self._error() or 'another processor chose it'}"
                )

    def mask(self) -> Tensor:  # (W,) int32
        """A bit for each token that may come next, eos among them where the text may end; all bits after an eos."""
        bits = torch.full_like(self._ends, -1)
        if not self._ended:
            self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), 4 * self._width)
            if error := self._error():
                raise InvalidInput(f"the grammar cannot be followed further: {error}")
            bits[self._width :] = 0
            others = bits & ~self._ends
            if self._matcher.is_accepting():
                bits = others | self._ends
            elif others.any():
                bits = others
            # Else only tokens that end the row fit the grammar, as text: the row ends with one, cut off.
        return bits

    def masks(
        self,
        tokens: Sequence[int],  # N: of a tree's nodes, of which the root has been followed
        parents: Sequence[int],  # N
    ) -> Tensor:  # (N, W) int32
        """The mask after every node; nodes that the grammar forbids, and those below, get all bits, since none is reached."""
        masks = self._ends.new_full((len(tokens), len(self._ends)), -1)
        below: list[list[int]] = [[] for _ in tokens]
        for node, parent in enumerate(parents[1:], start=1):
            below[parent].append(node)

        def visit(node: int) -> None:
            masks[node] = self.mask()
            for child in below[node]:
                if tokens[child] not in self._eos and self._down(tokens[child]):
                    visit(child)
                    self._matcher.rollback(1)

        if not self._ended:
            visit(0)
        return masks

    def outlook(self, most: int) -> Outlook:
        """What must follow, up to `most` tokens, and what may follow after that."""
        forced: list[int] = []
        if not self._ended:
            for token in self._matcher.compute_ff_tokens()[:most]:
                if token in self._eos or not self._down(token):
                    break
                forced.append(token)
        allowed = self.mask()
        self._matcher.rollback(len(forced))
        return Outlook(forced, allowed)

    def _down(self, token: int) -> bool:
        return self._matcher.try_consume_tokens([token]) == 1

    def _error(self) -> str:
        return one_line(ValueError(self._matcher.get_error())) if self._matcher.is_error() else ""
