"""Text as it comes: incremental detokenising."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LONGEST = 4  # tokens that one character can take: a byte each


class Detokenizer:
    """Turns tokens into text as they come; never decodes the whole text again and never splits a character.

    A token's text can depend on the one before it (a space at the start of a text is dropped) and a character can be spread
    over several tokens. So the last few tokens are decoded again with the new ones, and text is held back while it ends in an
    unfinished character.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Iterable[int] = (), skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context = list(prompt_ids)[-LONGEST:]  # tokens given out, decoded once more for their influence
        self._pending: list[int] = []

    def put(self, tokens: Iterable[int]) -> str:
        """The text that these tokens make complete; "" while a character is unfinished."""
        pieces = []
        for token in tokens:
            self._pending.append(token)
            text = self._text()
            if not text.endswith("\ufffd") or len(self._pending) > LONGEST:  # so many bytes are no character any more
                pieces.append(text)
                self._context = (self._context + self._pending)[-LONGEST:]
                self._pending = []
        return "".join(pieces)

    def end(self) -> str:
        """What was held back, an unfinished character as U+FFFD."""
        text = self._text() if self._pending else ""
        self._pending = []
        return text

    def _text(self) -> str:
        before = self._decode(self._context).rstrip("\ufffd")  # a prompt may end inside a character
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
