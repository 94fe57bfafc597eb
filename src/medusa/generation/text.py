"""Incremental detokenising: text from tokens as they arrive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LONGEST = 4  # most tokens of one character: one per byte
WINDOW = 8  # most tokens decoded together while no character ends between them
PROMPT = 16  # tokens of the prompt that can influence what follows


class Detokenizer:
    """Turns tokens into text as they arrive, without decoding the whole text again or splitting a character.

    The text of a token can depend on the one before it (a space at the start of a text is dropped), and a character can be
    spread over several tokens. So new tokens are decoded together with those since the last complete character but one, and
    what can still become another character is held back: a final U+FFFD, or the byte pieces (`<0xE4>`) of an unfinished
    character, if the tokenizer spells rare characters in them. Tokenizers decode a run of byte pieces as a whole or not at
    all, so a broken byte would spoil its neighbours; here it becomes one U+FFFD, and the neighbours are decoded.

    Args:
        tokenizer: an object with transformers' `decode`.
        prompt_ids: the tokens before the first.
        skip_special_tokens: as in `decode`.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Iterable[int] = (), skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._byte_pieces = _byte_pieces(tokenizer)
        self._special = _special_tokens(tokenizer) if skip_special_tokens else frozenset()
        self._window: list[int] = []  # the tokens decoded: some whose text is out already, for their influence, then new ones
        self._old = 0  # number of tokens in the window when a character last ended
        self._given = 0  # number of characters of the window's text that are out
        self._held: list[int] = []  # byte pieces of an unfinished character
        self.put(list(prompt_ids)[-PROMPT:])  # not returned, but it may leave a character unfinished

    def put(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete; "" while a character is unfinished."""
        return "".join([self._put(token) for token in tokens])

    def end(self) -> str:
        """The text held back; an unfinished character is U+FFFD."""
        text = self._broken() + self._decode(self._window)[self._given :]
        self._window, self._old, self._given = [], 0, 0
        return text

    def _put(self, token: int) -> str:
        if token in self._special and not self._decode([token]):
            return ""  # skipped
        if token not in self._byte_pieces:
            return self._broken() + self._add([token])
        self._held.append(token)
        text = ""
        while self._held:
            try:
                bytes(self._byte_pieces[held] for held in self._held).decode("utf-8")
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                text += "\ufffd"  # no character begins with this byte
                del self._held[0]
            else:
                text += self._add(self._held)
                self._held = []
        return text

    def _broken(self) -> str:
        """The text of byte pieces that are never completed."""
        if not self._held:
            return ""
        self._window, self._old, self._held = self._held, len(self._held), []
        self._given = len(self._decode(self._window))
        return "\ufffd" * self._old

    def _add(self, tokens: list[int]) -> str:
        self._window += tokens
        text = self._decode(self._window)
        # With byte-level tokens, only the last U+FFFD can become something else.
        end = len(text) - (text.endswith("\ufffd") and not self._byte_pieces)
        new, self._given = text[self._given : end], max(self._given, end)
        if new and end == len(text):
            self._window = self._window[self._old :]
            self._old = len(self._window)
            self._given = len(self._decode(self._window))
        elif len(self._window) > WINDOW:  # every token ends inside a character, or has no text
            self._window, self._old = self._window[-LONGEST:], 0
            self._given = max(0, len(self._decode(self._window)) - (len(text) - self._given))
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)


def _byte_pieces(tokenizer: Any) -> dict[int, int]:
    """The byte of every byte piece; empty if the tokenizer has none."""
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        return {}
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = tokenizer.convert_tokens_to_ids(names)
    found = {  # without those that are the unknown token
        byte: token
        for byte, (name, token) in enumerate(zip(names, tokens, strict=True))
        if token is not None and tokenizer.convert_ids_to_tokens(token) == name
    }
    spelt = [found[byte] for byte in "é".encode() if byte in found]
    return {token: byte for byte, token in found.items()} if spelt and tokenizer.decode(spelt) == "é" else {}


def _special_tokens(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(getattr(tokenizer, "all_special_ids", ())) | {token for token, of in added.items() if of.special}
