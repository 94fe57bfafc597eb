"""Claims about quality without a judge."""

import pytest
import torch

from medusa.evaluation.quality import code_compiles, distinct_ngrams, log_likelihood, repeated_ngrams
from tiny import plain_greedy, random_prompt


@pytest.mark.parametrize(("tokens", "share"), [([1] * 10, 2 / 3), (list(range(10)), 0.0), ([1, 2], 0.0)])
def test_repeated_ngrams_is_the_share_seen_before(tokens, share):
    assert repeated_ngrams(tokens, n=8) == pytest.approx(share)


def test_distinct_ngrams_count_over_all_texts_and_none_spans_two():
    assert distinct_ngrams([[1, 2, 3], [1, 2, 3]], 2) == 0.5
    assert distinct_ngrams([[1], [2]], 2) == 0.0


def test_likelihood_is_the_product_of_the_tokens_probabilities(tiny_model):
    prompt = random_prompt(6)
    answer = random_prompt(5, seed=3)[0].tolist()
    wanted, ids = 0.0, prompt
    for token in answer:  # a pass a token, by transformers
        with torch.no_grad():
            wanted += float(tiny_model.backbone(ids).logits[0, -1].log_softmax(-1)[token])
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert log_likelihood(tiny_model, prompt[0].tolist(), answer) == pytest.approx(wanted, rel=1e-4)
    greedy = plain_greedy(tiny_model.backbone, prompt, 5)
    assert log_likelihood(tiny_model, prompt[0].tolist(), greedy) > wanted


FUNCTION = "def double(x):\n    # twice\n"


@pytest.mark.parametrize(
    ("prompt", "answer", "continues", "wanted"),
    [
        (FUNCTION, "    return 2 * x\n", True, True),
        (FUNCTION, "    return 2 *\n\nx", True, False),
        (FUNCTION, "    return 2 * x\n\n\ndef again(a, b", True, True),  # cut at the limit
        (FUNCTION, "    return 2 * x\n\n\nname = 'unfinis", True, True),  # in the middle of a line
        (FUNCTION, "return 2 * x\n", True, False),
        (FUNCTION, "    return 2 * x\n", False, None),  # a chat answers in words
        ("Write a poem", " about the sea", True, None),
        ("Dear Sir,\nI write to", " you", True, None),
        ("Double it", "Sure:\n```python\ndef f(x):\n    return 2 * x\n```\nDone.", False, True),
        ("Double it", "```\nx = 1\n```\nand\n```py\nx = = 1\n```", False, False),
        ("Double it", "```python\ndef f(x):\n    return (2 *", False, True),  # cut inside the block
        ("Say hello", "Hello", False, None),
    ],
)
def test_code_that_compiles(prompt, answer, continues, wanted):
    assert code_compiles(prompt, answer, continues) is wanted
