"""Tokens per step with a grammar, with and without the two remedies, beside free text. Counts only, so speed does not matter.

    python benchmarks/grammar.py smollm2

Each prompt asks for a JSON object of its schema. "as drafted" leaves the drafts to the heads; "guided" has forced tokens as a
chain and masked guesses. Both give the tokens of plain decoding, which is checked. Free text is the answer without the schema.
"""

from __future__ import annotations

import argparse
import json
from typing import Any
from unittest import mock

import torch

from medusa import Grammar, MedusaModel, MedusaTree
from medusa.checkpoints.named import load_tokenizer, quiet_transformers
from medusa.data.prompts import as_conversation, prompt_ids

TEXT = {"type": "string", "maxLength": 60}
PERSON = {"first_name": TEXT, "last_name": TEXT, "year_of_birth": {"type": "integer"}, "occupation": TEXT}
BOOK = {
    "title": TEXT,
    "author": TEXT,
    "genre": {"enum": ["novel", "poetry", "essay", "science"]},
    "available": {"type": "boolean"},
}
ORDER = {"customer": TEXT, "quantity": {"type": "integer"}, "product": TEXT, "express_delivery": {"type": "boolean"}}
PLACE = {
    "city": TEXT,
    "country": TEXT,
    "population": {"type": "integer"},
    "sights": {"type": "array", "items": TEXT, "maxItems": 3},
}
TASKS = [
    ("Describe Marie Curie.", PERSON),
    ("Describe Leonardo da Vinci.", PERSON),
    ("Describe a famous book about a whale.", BOOK),
    ("Describe the book Pride and Prejudice.", BOOK),
    ("Anna orders three blue chairs and needs them tomorrow.", ORDER),
    ("Describe the city of Paris.", PLACE),
]


def schema_of(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the backbone, with heads")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--limit", type=int, default=len(TASKS), help="number of tasks")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    args = parser.parse_args()
    quiet_transformers()
    model = MedusaModel.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(args.model)
    sampling = {"do_sample": True, "temperature": args.temperature, "seed": 0} if args.temperature else {}
    counts: dict[str, list[tuple[int, int]]] = {"free text": [], "as drafted": [], "guided": []}
    valid = 0
    for text, properties in TASKS[: args.limit]:
        schema = schema_of(properties)
        grammar = Grammar.json(schema, tokenizer)
        asked = f"{text} Answer with a JSON object with the keys {', '.join(properties)}."

        def decode(text: str, **options: Any) -> tuple[list[int], int]:
            ids = torch.tensor([prompt_ids(tokenizer, as_conversation(tokenizer, text, None, args.model) or text)])
            options |= {"max_new_tokens": args.max_new_tokens, "return_dict_in_generate": True, **sampling}
            output = model.generate(ids, torch.ones_like(ids), **options)
            return output.new_tokens(0).tolist(), output.steps

        plain, _ = decode(asked, grammar=grammar, tree=MedusaTree([]))
        free, steps = decode(text)
        counts["free text"].append((len(free), steps))
        with mock.patch("medusa.state.guided", lambda drafter, *_: drafter):
            unguided, steps = decode(asked, grammar=grammar)
        counts["as drafted"].append((len(unguided), steps))
        guided, steps = decode(asked, grammar=grammar)
        counts["guided"].append((len(guided), steps))
        assert plain == unguided == guided, f"the answers to {text!r} differ"
        try:
            json.loads(tokenizer.decode(guided, skip_special_tokens=True))
            valid += 1
        except json.JSONDecodeError:
            assert len(guided) == args.max_new_tokens, "an answer that ended is not JSON"
    for name, pairs in counts.items():
        tokens, steps = (sum(column) for column in zip(*pairs, strict=True))
        print(f"{name:11} {tokens:5} tokens  {steps:4} steps  {tokens / steps:.2f} tokens per step")
    print(f"{valid} of {len(TASKS[: args.limit])} answers are complete JSON; all equal plain decoding's")


if __name__ == "__main__":
    main()
