"""A recorded run as one HTML file: the server's views Race and Steps, with their modules and the record inside."""

from __future__ import annotations

import base64
import json
import queue
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from medusa.generation.text import Detokenizer

if TYPE_CHECKING:
    from medusa.model import MedusaModel

Steps = Sequence[tuple[float, list[int]]]  # of a run: seconds since its start, and tokens


def recorded_page(
    model: MedusaModel,
    tokenizer: Any,
    name: str,
    prompt: str,
    ids: list[int],
    runs: Mapping[str, Steps],
    limits: dict[str, Any],
) -> str:
    """The file's text. The trees are recorded here, by decoding once more: the runs themselves were not to be slowed down.

    Args:
        ids: the prompt's token ids.
        runs: "plain" and "medusa", as they were watched.
        limits: `max_new_tokens`, and the ids that end an answer.
    """
    card = {"heads": model.num_heads, "dtype": str(model.backbone.dtype).removeprefix("torch."), "device": str(model.device)}
    race = {run: {"steps": _raced(tokenizer, ids, steps)} for run, steps in runs.items()}
    record = {"model": {"id": name, "medusa": card}, "prompt": prompt, "race": race}
    return _inlined({**record, "steps": _traced(model, tokenizer, ids, limits)})


def _raced(tokenizer: Any, ids: list[int], steps: Steps) -> list[dict[str, Any]]:
    text = Detokenizer(tokenizer, ids)
    return [
        {"at": (at - steps[0][0]) * 1000, "tokens": tokens, "pieces": [text.put([token]) for token in tokens]}
        for at, tokens in steps
    ]


def _traced(model: MedusaModel, tokenizer: Any, ids: list[int], limits: dict[str, Any]) -> dict[str, Any]:
    """The steps of the answer with their trees, from the server's engine."""
    from medusa.batch.rows import DecodingOptions
    from medusa.batch.state import overhang
    from medusa.serving.engine import Engine
    from medusa.serving.pieces import TokenTexts
    from medusa.serving.reports import step_record
    from medusa.serving.requests import Delivery, Request

    ends = limits.get("eos_token_id") or model.eos_token_ids
    options = DecodingOptions(limits["max_new_tokens"], eos_token_ids=tuple(ends))
    tree = model.tree.for_batch(1)
    room = len(ids) + options.max_new_tokens + overhang(tree.drafter(model.device))
    engine = Engine(model, slots=1, capacity=room, tree=tree)
    delivered: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    engine.submit(Request(ids, options, logprobs=0, trace=True), delivered.put)
    texts, text, steps = TokenTexts(tokenizer), Detokenizer(tokenizer, ids), []
    last = None
    while last is None:
        found = delivered.get()
        last = found.finish_reason
        if found.error is not None:
            raise found.error
        if not found.tokens:
            continue
        steps.append(step_record(found, [text.put([token]) for token in found.tokens], texts))
    engine.close()
    return {"steps": steps}


def _inlined(record: dict[str, Any]) -> str:
    """The server's page with its style, its modules (as an import map of data addresses) and a record inside."""
    folder = files("medusa") / "serving" / "page"
    modules = [each for each in folder.iterdir() if each.name.endswith(".js")]
    imports = {}
    for module in modules:
        code = re.sub(r'from "\./([\w.]+)"', r'from "medusa/\1"', module.read_text(encoding="utf-8"))
        imports[f"medusa/{module.name}"] = f"data:text/javascript;base64,{base64.b64encode(code.encode()).decode()}"
    inside = json.dumps(record).replace("<", "\\u003c")  # a text cannot end the element that it is in
    scripts = (
        f'<script type="application/json" id="recorded">{inside}</script>\n'
        f'<script type="importmap">{json.dumps({"imports": imports})}</script>\n'
        '<script type="module">import "medusa/app.js";</script>'
    )
    page = (folder / "index.html").read_text(encoding="utf-8")
    style = (folder / "style.css").read_text(encoding="utf-8")
    page = page.replace('<link rel="stylesheet" href="page/style.css">', f"<style>\n{style}</style>")
    return page.replace('<script type="module" src="page/app.js"></script>', scripts)
