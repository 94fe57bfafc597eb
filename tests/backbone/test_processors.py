"""Claims about logits processors: one that nobody knows is followed where that is right, and refused by name where not."""

import functools

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import MinLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from medusa.errors import InvalidInput
from tiny import VOCAB, left_padded, plain_greedy, random_prompt

NEW = 16


class Alternating(LogitsProcessor):
    """Odd and even ids by turns, by its own count of calls: a grammar in small."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return allowed(scores, self.calls % 2)


class OnItsFirstCall(LogitsProcessor):
    fresh = True

    def __call__(self, input_ids, scores):
        fresh, self.fresh = self.fresh, False
        return allowed(scores, 0) if fresh else scores


class SinceItsFirstCall(LogitsProcessor):
    """Takes the length of the first ids it sees for the prompt's, and acts long after it."""

    length = None

    def __call__(self, input_ids, scores):
        if self.length is None:
            self.length = input_ids.shape[1]
        return allowed(scores, 0) if input_ids.shape[1] > self.length + 6 else scores


class GrammarOfOneRow(LogitsProcessor):
    """Goes on from the state after the token before, as matchers of grammars do."""

    def __init__(self):
        self.seen: list[int] = []

    def __call__(self, input_ids, scores):
        self.seen += input_ids[0, len(self.seen) :].tolist()
        return allowed(scores, sum(self.seen) % 2)


class OfItsRow(LogitsProcessor):
    """A bias for each row of the batch."""

    def __init__(self, bias):
        self.bias = bias

    def __call__(self, input_ids, scores):
        return scores + self.bias[: len(scores)]


class OfAClassCounter(LogitsProcessor):
    calls = 0

    def __call__(self, input_ids, scores):
        type(self).calls += 1
        return allowed(scores, 0) if self.calls > 100 else scores


class ByTheLastToken(LogitsProcessor):
    """A function of the path: odd ids after even ones and the other way round; keeps what it has worked out."""

    def __init__(self):
        self.masks: dict[int, torch.Tensor] = {}

    def __call__(self, input_ids, scores):
        rows = []
        for path, row in zip(input_ids.tolist(), scores, strict=True):
            parity = (path[-1] + 1) % 2
            if parity not in self.masks:
                self.masks[parity] = torch.zeros_like(row)
                self.masks[parity][(1 - parity) :: 2] = -torch.inf
            rows.append(row + self.masks[parity])
        return torch.stack(rows)


class Penalty(RepetitionPenaltyLogitsProcessor):
    """A class of its own, which might look at more."""


def allowed(scores, parity):
    """Only the even or the odd ids."""
    scores = scores.clone()
    scores[:, 1 - parity :: 2] = -torch.inf
    return scores


def counted():
    calls = [0]

    def processor(input_ids, scores):
        calls[0] += 1
        return allowed(scores, 0) if calls[0] > 100 else scores

    return processor


def by_chance(input_ids, scores):
    return scores + torch.rand(scores.shape)


def drops_rows(input_ids, scores):
    return scores[:1]


def fails(input_ids, scores):
    raise RuntimeError("no such state\nin the grammar")


def cools(input_ids, scores, by=1.0):
    return scores / by


class Holding(LogitsProcessor):
    """Keeps something that cannot be copied."""

    def __init__(self):
        self.lines = (line for line in ("a", "b"))

    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    "make",
    [
        Alternating,
        OnItsFirstCall,
        SinceItsFirstCall,
        GrammarOfOneRow,
        lambda: OfItsRow(torch.arange(1.0, VOCAB + 1).expand(2, -1) * torch.tensor([[1.0], [-1.0]])),
        OfAClassCounter,
        counted,
        lambda: functools.partial(counted()),
        lambda: Alternating().__call__,
        lambda: by_chance,
        lambda: drops_rows,
        lambda: fails,
        Holding,
    ],
)
def test_processor_that_cannot_follow_a_tree_is_refused_by_its_name(tiny_model, make):
    processor = make()
    name = getattr(processor, "__name__", type(processor).__name__)
    with pytest.raises(InvalidInput, match=rf"^{name} ") as error:
        tiny_model.generate(random_prompt(9), logits_processor=LogitsProcessorList([processor]))
    assert "\n" not in str(error.value)
    prompt = random_prompt(9)
    with pytest.raises(InvalidInput, match=rf"^{name} "):
        tiny_model.backbone.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            logits_processor=LogitsProcessorList([make()]),
            custom_generate=tiny_model.custom_generate,
        )


@pytest.mark.parametrize(
    "make",
    [
        ByTheLastToken,
        lambda: Penalty(1.5),
        lambda: MinLengthLogitsProcessor(14, [1, 3, 5]),
        lambda: lambda ids, scores: scores - 3.0 * torch.nn.functional.one_hot(ids, VOCAB).sum(1).clamp(max=1),
        lambda: functools.partial(cools, by=0.5),
    ],
)
def test_processor_that_is_a_function_of_the_path_is_followed(tiny_model, make):
    prompts = [random_prompt(9), random_prompt(4, seed=1)]
    wanted = [
        plain_greedy(tiny_model.backbone, prompt, NEW, logits_processor=LogitsProcessorList([make()])) for prompt in prompts
    ]
    ids, mask = left_padded(prompts)
    output = tiny_model.generate(ids, mask, max_new_tokens=NEW, logits_processor=[make()])
    assert output[:, 9:].tolist() == wanted


def test_trying_a_processor_out_leaves_it_as_it_was(tiny_model):
    processor = Alternating()
    with pytest.raises(InvalidInput):
        tiny_model.generate(random_prompt(9), logits_processor=[processor])
    assert processor.calls == 0


def test_penalty_that_ignores_a_prompt_counts_its_padding_and_never_punishes_it(tiny_model):
    prompts = [random_prompt(9), random_prompt(4, seed=1)]
    ids, mask = left_padded(prompts)
    wanted = [
        plain_greedy(
            tiny_model.backbone,
            prompt,
            NEW,
            logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=prompt.shape[1])]),
        )
        for prompt in prompts
    ]
    penalty = RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=9)
    assert tiny_model.generate(ids, mask, max_new_tokens=NEW, logits_processor=[penalty])[:, 9:].tolist() == wanted
    with pytest.raises(InvalidInput, match="prompt_ignore_length"):
        penalty = RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=3)
        tiny_model.generate(ids, mask, max_new_tokens=NEW, logits_processor=[penalty])
