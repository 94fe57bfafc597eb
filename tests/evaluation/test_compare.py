"""Claims about comparing decoders: all see the same prompts in turn, and are counted alike."""

import pytest
import torch

from medusa import MedusaTree
from medusa.evaluation.compare import (
    Decoded,
    compare,
    medusa_decoder,
    repeated_ngrams,
    transformers_decoder,
)
from tiny import plain_greedy, random_prompt


def test_decoders_say_the_same_and_are_counted(tiny_model):
    prompts = [random_prompt(7), random_prompt(9, seed=1)]
    decoders = {
        "generate": transformers_decoder(tiny_model, 16),
        "plain": medusa_decoder(tiny_model, 16, MedusaTree([])),
        "medusa": medusa_decoder(tiny_model, 16),
    }
    results = compare(decoders, prompts, rounds=2)
    wanted = [[plain_greedy(tiny_model.backbone, prompt, 16)] for prompt in prompts]
    for name in decoders:
        assert results[name].outputs == wanted and results[name].tokens == 32
        assert [len(rounds) for rounds in results[name].seconds] == [2, 2]
    assert results["plain"].steps == 32 and results["plain"].acceleration_rate == 1
    assert results["medusa"].acceleration_rate == 32 / results["medusa"].steps > 1


def test_every_decoder_takes_its_turn_at_being_first():
    order: list[str] = []

    def decoder(name):
        def decode(ids):
            order.append(name)
            return Decoded([[1]], 1, 1)

        return decode

    compare({name: decoder(name) for name in "abc"}, [torch.zeros(1, 1)] * 3, warmup=0)
    assert order == [*"abc", *"bca", *"cab"]


def test_transformers_output_ends_at_eos_like_ours(tiny_model):
    prompt = random_prompt(7)
    tokens = plain_greedy(tiny_model.backbone, prompt, 16)
    tiny_model.backbone.generation_config.eos_token_id = tokens[5]
    try:
        theirs, ours = transformers_decoder(tiny_model, 16)(prompt), medusa_decoder(tiny_model, 16)(prompt)
    finally:
        tiny_model.backbone.generation_config.eos_token_id = None
    assert theirs.tokens == ours.tokens == [tokens[: tokens.index(tokens[5]) + 1]]


@pytest.mark.parametrize(("tokens", "share"), [([1] * 10, 2 / 3), (list(range(10)), 0.0), ([1, 2], 0.0)])
def test_repeated_ngrams_is_the_share_seen_before(tokens, share):
    assert repeated_ngrams(tokens, n=8) == pytest.approx(share)
