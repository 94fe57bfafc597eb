"""Quality without a judge: likelihood under the backbone, variety, repetition, and code that compiles."""

from __future__ import annotations

import codeop
import re
import warnings
from collections.abc import Sequence

import torch

from medusa.model import MedusaModel

_FENCED = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(```|\Z)", re.DOTALL)


@torch.inference_mode()
def log_likelihood(model: MedusaModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """The answer's log-likelihood under the model's backbone, summed over its tokens (nats)."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    hidden = model.hidden_states(ids)[:, len(prompt) - 1 : -1]
    logits = model.logits(hidden)[0].float()
    return float(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None].to(logits.device)).sum())


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """The share of different n-grams among those of all texts (distinct-n); 0 where there are none.

    >>> distinct_ngrams([[1, 2, 1, 2], [1, 2]], n=2)
    0.5
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_ngrams(tokens: Sequence[int], n: int = 8) -> float:
    """The share of n-grams that occurred before in the sequence: how much a model repeats itself.

    >>> repeated_ngrams([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def code_compiles(prompt: str, answer: str, continues: bool) -> bool | None:
    """Whether an answer's Python code compiles, as far as it goes; None where it holds none.

    The code is that between ``` fences, or prompt and answer together where the answer continues a prompt of at least two
    lines that is Python itself. Code that merely ends too early, at the limit of tokens, has no fault; of that its last line
    is not looked at where it is unfinished.

    >>> code_compiles("def f(x):\\n    # doubles", "\\n    return 2 * x\\n\\n\\ndef g(", continues=True)
    True
    >>> code_compiles("Double x.", "```python\\nreturn = 2\\n```", continues=False)
    False
    """
    blocks = _FENCED.findall(answer)
    if blocks:
        return all(_is_python(code, cut=not end) for code, end in blocks)
    if continues and "\n" in prompt.strip() and _is_python(prompt, cut=True):
        return _is_python(prompt + answer, cut=True)
    return None


def _is_python(code: str, cut: bool) -> bool:
    """Whether the code is Python, or the beginning of such, but for its last line where it was cut off there."""
    if cut and _is_python(code[: code.rfind("\n") + 1], cut=False):
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd but valid code
        try:
            codeop.compile_command(code, symbol="exec")
        except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
            return False
    return True
