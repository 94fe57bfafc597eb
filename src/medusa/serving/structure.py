"""Structure: the grammar that a body asks for; made once for each definition."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from medusa.errors import InvalidInput
from medusa.serving.problems import Problem, clean
from medusa.serving.schemas import ChatRequest, Sampling
from medusa.serving.tools import schema_of_calls

KEPT = 64  # grammars that are kept for requests to come
LONGEST = 1 << 18  # characters of a definition


class Grammars:
    """The grammars of a server's requests.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._made: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, body: Sampling) -> Any:
        """The grammar of a body; None: its answer is free text.

        Raises:
            Problem: the definition is malformed, or llguidance is not installed.
        """
        found = _asked(body)
        if found is None:
            return None
        field, kind, definition = found
        key = kind, json.dumps(definition)
        if len(key[1]) > LONGEST:
            raise Problem(f"{field}: has {len(key[1])} characters, expected at most {LONGEST}", param=field)
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
        from medusa.processors.grammar import Grammar

        make: Callable[..., Any] = getattr(Grammar, kind)
        try:
            made = make(definition, self._tokenizer)
        except InvalidInput as error:
            raise Problem(f"{field}: {clean(error)}", param=field) from None
        with self._lock:
            self._made[key] = made
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
        return made


def _asked(body: Sampling) -> tuple[str, str, Any] | None:
    """The field that asks for a grammar, the grammar's kind and its definition."""
    if isinstance(body, ChatRequest) and (calls := schema_of_calls(body)) is not None:
        return "tools", "json", calls
    if (asked := body.structured_outputs) is not None:
        kinds = {"json": asked.json_, "regex": asked.regex, "choice": asked.choice, "lark": asked.grammar}
        kind, definition = next(((kind, value) for kind, value in kinds.items() if value), ("json", {"type": "object"}))
        return "structured_outputs", kind, definition
    if body.response_format is None or body.response_format.type == "text":
        return None
    asked_for = body.response_format.json_schema
    schema = asked_for.schema_ if asked_for is not None and asked_for.schema_ is not None else {"type": "object"}
    return "response_format", "json", schema
