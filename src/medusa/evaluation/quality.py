"""Quality without a judge: likelihood under the backbone, variety, repetition, and code that compiles."""

from __future__ import annotations

import codeop
import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from medusa.data.prompt_sets import Prompter, Question
from medusa.model import MedusaModel

LIKELIHOOD = "log_likelihood_per_token"
_FENCED = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(```|\Z)", re.DOTALL)


class Scorer:
    """Quality figures of answers without a judge, with the likelihood under the model's backbone; an answer that several
    decoders gave is scored once."""

    def __init__(self, model: MedusaModel, prompter: Prompter):
        self._prompter = prompter
        self._likelihood = functools.cache(functools.partial(log_likelihood, model))

    def __call__(self, questions: Sequence[Question], answers: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
        """Figures over all answers, which are token ids by question and turn."""
        likelihood, tokens, compiles = 0.0, 0, []
        for question, given in zip(questions, answers, strict=True):
            turns = self._prompter.turns(question)
            for number, answer in enumerate(given):
                prompt = self._prompter.ids(question, given[:number])
                likelihood += self._likelihood(tuple(prompt), tuple(answer))
                tokens += len(answer)
                continues = number == 0 and (bool(question.ids) or not self._prompter.chat)
                compiles.append(code_compiles(turns[number], self._prompter.text(answer), continues))
        code = [good for good in compiles if good is not None]
        rows = [answer for given in answers for answer in given]
        return {
            LIKELIHOOD: likelihood / tokens,
            **{f"distinct_{n}": distinct_ngrams(rows, n) for n in (1, 2, 3)},
            "answers_with_code": len(code),
            "code_that_compiles": sum(code) / len(code) if code else None,
        }


@torch.inference_mode()
def log_likelihood(model: MedusaModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """The answer's log-likelihood under the model's backbone, summed over its tokens (nats)."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    hidden = model.hidden_states(ids)[:, len(prompt) - 1 : -1]
    logits = model.logits(hidden)[0].float()
    return float(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None].to(logits.device)).sum())


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """The share of different n-grams among all n-grams of the texts (distinct-n); 0 if there are none.

    >>> distinct_ngrams([[1, 2, 1, 2], [1, 2]], n=2)
    0.5
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_ngrams(tokens: Sequence[int], n: int = 8) -> float:
    """The share of n-grams that occurred earlier in the sequence: how much a model repeats itself.

    >>> repeated_ngrams([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def code_compiles(prompt: str, answer: str, continues: bool) -> bool | None:
    """Whether the Python code in an answer compiles; None if it holds none.

    The code is the text between ``` fences, or prompt and answer together if the answer continues a prompt of at least two
    lines of Python. Truncated code is not a failure; its incomplete last line is ignored.

    Args:
        continues: whether the answer continues the prompt's text.

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
    """Whether the code is Python, or the beginning of a valid program; if it was cut, its last line may be incomplete."""
    if cut and _is_python(code[: code.rfind("\n") + 1], cut=False):
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd but valid code
        try:
            codeop.compile_command(code, symbol="exec")
        except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
            return False
    return True
