"""Pieces: the text of single tokens, and the text of an answer as its tokens arrive, up to a stop string."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medusa.generation.text import Detokenizer


class TokenTexts:
    """The bytes and the text of each token alone, for log-probabilities and traces.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._decoders = _decoders(tokenizer)
        self._added = {token: added.content for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        self.bytes = functools.lru_cache(maxsize=65536)(self._bytes)

    def text(self, token: int) -> str:
        """The token's text; bytes that are not text become U+FFFD."""
        return self.bytes(token).decode("utf-8", errors="replace")

    def name(self, token: int) -> str:
        r"""The token's text, or `bytes:\x…` if its bytes are not text, as OpenAI's interface has it."""
        raw = self.bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        if self._decoders:
            piece = self._tokenizer.convert_ids_to_tokens(token)
            if piece is None:  # a row of the LM head without a token
                return b""
            if "ByteLevel" in self._decoders:
                table = _byte_level()
                if all(character in table for character in piece):
                    return bytes(table[character] for character in piece)
            if "ByteFallback" in self._decoders and len(piece) == 6 and piece.startswith("<0x"):
                return bytes([int(piece[3:5], 16)])
            if "Metaspace" in self._decoders or "Replace" in self._decoders:
                return piece.replace("▁", " ").encode()
        before = self._tokenizer.decode([token])
        return before.encode()


def _decoders(tokenizer: Any) -> frozenset[str]:
    """The kinds of decoder of a fast tokenizer; empty for another."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset()
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return frozenset(part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part)


@functools.cache
def _byte_level() -> dict[str, int]:
    """The byte of each character in GPT-2's alphabet: printable bytes stand for themselves, others for 256 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


@dataclass(frozen=True)
class Piece:
    """A token of an answer and the text that it completed."""

    token: int
    start: int  # characters of the answer before it
    text: str


def settled(text: str, awaited: Sequence[str]) -> int:
    """The number of characters of a text before an end that may become one of the awaited strings."""
    longest = max(map(len, awaited), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(each.startswith(text[start:]) for each in awaited):
            return start
    return len(text)


class AnswerText:
    """The text of an answer as its tokens arrive: it ends before a stop string, and holds back what may become one.

    Args:
        detokenizer: turns the tokens into text.
        stops: stop strings.
        include_stop: whether the stop string is part of the text.
        min_tokens: number of tokens before which no stop string counts.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0):
        self._detokenizer, self._stops, self._include, self._least = detokenizer, list(stops), include_stop, min_tokens
        self.pieces: list[Piece] = []
        self.text = ""
        self.stopped: str | None = None  # the stop string that was found

    def put(self, token: int) -> bool:
        """Take the next token; returns whether a stop string is complete."""
        if self.stopped is None:
            new = self._detokenizer.put([token])
            self.pieces.append(Piece(token, len(self.text), new))
            self._add(new)
        return self.stopped is not None

    def end(self) -> None:
        """No token follows: what was held back is text."""
        if self.stopped is None:
            new = self._detokenizer.end()
            if new and self.pieces:
                last = self.pieces.pop()
                self.pieces.append(Piece(last.token, last.start, last.text + new))
            self._add(new)

    def _add(self, new: str) -> None:
        before = len(self.text)
        self.text += new
        if not new or len(self.pieces) <= self._least:
            return
        found = [(at, stop) for stop in self._stops if (at := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if found:
            at, self.stopped = min(found)
            self.text = self.text[: at + len(self.stopped) if self._include else at]

    @property
    def safe(self) -> int:
        """The number of characters that no later token can take back."""
        return settled(self.text, self._stops) if self.stopped is None else len(self.text)
