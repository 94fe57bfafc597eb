"""Tokens per step with a grammar, with and without the two remedies, beside free text. Counts only, so speed does not matter.

    python benchmarks/grammar.py smollm2

Each prompt asks for JSON of its schema. "as drafted" leaves the drafts to the heads; "guided" has forced tokens as a
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


def record(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has all these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TEXT, WHOLE, FLAG = {"type": "string", "maxLength": 60}, {"type": "integer"}, {"type": "boolean"}
DATE = {"type": "string", "pattern": r"^(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$"}
PERSON = record(first_name=TEXT, last_name=TEXT, year_of_birth=WHOLE, occupation=TEXT)
BOOK = record(title=TEXT, author=TEXT, genre={"enum": ["novel", "poetry", "essay", "science"]}, available=FLAG)
PLACE = record(city=TEXT, country=TEXT, population=WHOLE, sights={"type": "array", "items": TEXT, "maxItems": 3})
TASKS = [
    ("Describe Marie Curie.", PERSON),
    ("Describe Leonardo da Vinci.", PERSON),
    ("Describe a famous book about a whale.", BOOK),
    ("Describe the book Pride and Prejudice.", BOOK),
    ("Describe the city of Paris.", PLACE),
    (
        "Anna orders three blue chairs and needs them tomorrow.",
        record(customer=TEXT, quantity=WHOLE, product=TEXT, express_delivery=FLAG),
    ),
    (
        "Plan a meeting with Tom and Mary about the budget.",
        record(title=TEXT, date=DATE, participants={"type": "array", "items": record(name=TEXT, required=FLAG), "maxItems": 3}),
    ),
    (
        "The film was too long, but I loved the music.",
        record(sentiment={"enum": ["positive", "mixed", "negative"]}, score={"type": "integer", "minimum": 1, "maximum": 5}),
    ),
    (
        "Give a recipe for pancakes.",
        record(
            name=TEXT,
            minutes=WHOLE,
            ingredients={"type": "array", "items": record(ingredient=TEXT, grams={"type": "number"}), "maxItems": 4},
        ),
    ),
    (
        "What will the weather in London be like tomorrow? Call the function.",
        record(name={"const": "get_weather"}, arguments=record(city=TEXT, day={"enum": ["today", "tomorrow"]}, metric=FLAG)),
    ),
    (
        "John Smith lives at 12 Oak Street in Boston. His phone number is 617-555-0123.",
        record(name=TEXT, address=record(street=TEXT, number=WHOLE, city=TEXT), phone={"type": ["string", "null"]}),
    ),
    (
        "A server has to listen on port 8080, log warnings and use four workers.",
        record(
            server=record(host=TEXT, port=WHOLE),
            logging=record(level={"enum": ["debug", "info", "warning", "error"]}, to_file=FLAG),
            number_of_workers=WHOLE,
        ),
    ),
    (
        "Name three planets with their distances from the sun.",
        {
            "type": "array",
            "items": record(planet=TEXT, millions_of_kilometers={"type": "number"}, has_rings=FLAG),
            "minItems": 3,
            "maxItems": 3,
        },
    ),
    (
        "Is a tomato a fruit? Explain it.",
        record(answer={"anyOf": [FLAG, {"const": "unknown"}]}, explanation={"type": "string", "maxLength": 200}),
    ),
]


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
    for text, schema in TASKS[: args.limit]:
        grammar = Grammar.json(schema, tokenizer)
        keys = schema.get("items", schema)["properties"]
        form = "a JSON list of objects" if "items" in schema else "a JSON object"
        asked = f"{text} Answer with {form} with the keys {', '.join(keys)}."

        def decode(text: str, **options: Any) -> tuple[list[int], int]:
            ids = torch.tensor([prompt_ids(tokenizer, as_conversation(tokenizer, text, None, args.model) or text)])
            options |= {"max_new_tokens": args.max_new_tokens, "return_dict_in_generate": True, **sampling}
            output = model.generate(ids, torch.ones_like(ids), **options)
            return output.new_tokens(0).tolist(), output.steps

        plain, _ = decode(asked, grammar=grammar, tree=MedusaTree([]))
        free, steps = decode(text)
        counts["free text"].append((len(free), steps))
        with mock.patch("medusa.batch.state.guided", lambda drafter, *_: drafter):
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
        rates = ", ".join(f"{name} {pairs[-1][0] / pairs[-1][1]:.2f}" for name, pairs in counts.items())
        print(f"{len(guided):4} tokens; tokens per step: {rates}; {text}", flush=True)
    for name, pairs in counts.items():
        tokens, steps = (sum(column) for column in zip(*pairs, strict=True))
        print(f"{name:11} {tokens:5} tokens  {steps:4} steps  {tokens / steps:.2f} tokens per step")
    print(f"{valid} of {len(TASKS[: args.limit])} answers are complete JSON; all equal plain decoding's")


if __name__ == "__main__":
    main()
