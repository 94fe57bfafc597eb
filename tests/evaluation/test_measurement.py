"""Claims about comparing decoders: all see the same prompts in turn, are counted alike, and ratios are paired."""

import pytest
import torch

from medusa import MedusaTree
from medusa.errors import InvalidInput
from medusa.evaluation.decoders import Decoded, MedusaDecoder, TransformersDecoder
from medusa.evaluation.measurement import Measurement, Totals, compare_decoders, estimate, overhead, time_run
from tiny import plain_greedy, random_prompt, tiny_backbone


def decoders(model, new_tokens: int) -> dict:
    return {
        "generate": TransformersDecoder(model, new_tokens),
        "plain": MedusaDecoder(model, new_tokens, MedusaTree([])),
        "medusa": MedusaDecoder(model, new_tokens),
        "prompt-lookup": TransformersDecoder(model, new_tokens, guesses=4),
        "assisted": TransformersDecoder(model, new_tokens, tiny_backbone(num_hidden_layers=2), guesses=3),
        "assisted by itself": TransformersDecoder(model, new_tokens, model.backbone, guesses=3),
    }


def test_decoders_say_the_same_and_are_counted(tiny_model):
    prompts = [random_prompt(7), random_prompt(9, seed=1)]
    results = compare_decoders(decoders(tiny_model, 16), prompts, rounds=2)
    wanted = [[plain_greedy(tiny_model.backbone, prompt, 16)] for prompt in prompts]
    for name, measured in results.items():
        assert measured.outputs == wanted and measured.tokens == 32, name
        assert [len(rounds) for rounds in measured.items] == [2, 2]
        assert sum(length * steps for length, steps in measured.lengths.items()) == 32, name
        assert 0 < measured.first_seconds < float(measured.totals().seconds)
    assert results["generate"].lengths == results["plain"].lengths == {1: 32}
    assert results["plain"].acceleration_rate == 1
    assert results["medusa"].acceleration_rate == 32 / int(results["medusa"].totals().steps) > 1
    # A draft model that is the model itself is always right: the three guesses and the token after them.
    assert results["assisted by itself"].lengths == {4: 8}


def test_speedup_is_acceleration_over_overhead(tiny_model):
    results = compare_decoders(
        {name: d for name, d in decoders(tiny_model, 16).items() if "assisted" not in name}, [random_prompt(7)]
    )
    plain, medusa = results["plain"].totals(), results["medusa"].totals()
    speedup = medusa.decode_tokens_per_second / plain.decode_tokens_per_second
    assert float(speedup) == pytest.approx(float(medusa.acceleration_rate / overhead(medusa, plain)))


def test_every_decoder_takes_its_turn_at_being_first():
    order: list[str] = []

    class Noting:
        def __init__(self, name):
            self.name = name

        def prepare(self, ids):
            pass

        def __call__(self, ids):
            order.append(self.name)
            return Decoded([[1]], [[1]], 1, 0.0, 0.0, 1)

    compare_decoders({name: Noting(name) for name in "abc"}, [torch.zeros(1, 1)] * 3, warmup=0)
    assert order == [*"abc", *"bca", *"cab"]


def test_transformers_output_ends_at_eos_like_ours(tiny_model):
    prompt = random_prompt(7)
    tokens = plain_greedy(tiny_model.backbone, prompt, 16)
    eos = [tokens[5]]
    wanted = [tokens[: tokens.index(tokens[5]) + 1]]
    for guesses in (None, 4):
        theirs = TransformersDecoder(tiny_model, 16, guesses=guesses, eos_token_id=eos)(prompt)
        assert theirs.tokens == wanted and sum(theirs.lengths[0]) == len(wanted[0])
    ours = MedusaDecoder(tiny_model, 16, eos_token_id=eos)(prompt)
    assert ours.tokens == wanted


def test_a_sampled_baseline_is_the_same_for_a_seed(tiny_model):
    def sampled(seed: int):
        return TransformersDecoder(tiny_model, 16, seed=seed, do_sample=True, temperature=1.0)(random_prompt(7)).tokens

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_draft_model_of_another_vocabulary_is_refused(tiny_model):
    with pytest.raises(InvalidInput, match="the draft model has 80 tokens, the model 64"):
        TransformersDecoder(tiny_model, 8, tiny_backbone(vocab_size=80), guesses=2)


def run(tokens: int, seconds: float) -> list[Decoded]:
    return [Decoded([[1] * tokens], [[1] * tokens], tokens, 0.1, 0.1, 1, seconds)]


def test_intervals_hold_the_figure_and_ratios_are_of_the_same_prompts():
    # Prompts differ greatly in speed, and one decoder is always exactly twice as fast: its speedup is certain.
    slow = Measurement([run(10, 1.0 + n) for n in range(12)])
    fast = Measurement([run(10, (1.0 + n) / 2) for n in range(12)])
    speed = estimate(lambda t: t.tokens_per_second, slow)
    assert speed.value == pytest.approx(120 / 78) and speed.low < speed.value < speed.high
    ratio = estimate(lambda a, b: a.tokens_per_second / b.tokens_per_second, fast, slow)
    assert ratio == pytest.approx((2.0, 2.0, 2.0))
    assert estimate(lambda t: t.tokens_per_second, Measurement([run(10, 1.0)])) == (10.0, None, None)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(100):
        seconds = torch.rand(30, generator=generator).add(0.5).tolist()  # mean 1: ten tokens per second
        found = estimate(lambda t: t.tokens_per_second, Measurement([run(10, s) for s in seconds]))
        covered += found.low <= 10.0 <= found.high
    assert 87 <= covered <= 100


def test_of_several_rounds_the_median_counts():
    rounds = [Decoded([[1, 1]], [[1, 1]], 2, 0.1, 0.5, 1, seconds) for seconds in (9.0, 1.0, 2.0)]
    assert Measurement([rounds]).totals() == Totals(2, 2.0, 1, 1.5, 2, 2)


def test_the_most_memory_is_that_of_the_run(tiny_model):
    class Holding:
        def __init__(self, megabytes):
            self.megabytes = megabytes

        def prepare(self, ids):
            pass

        def __call__(self, ids):
            torch.ones(self.megabytes << 18).sum()  # four bytes each
            return Decoded([[1]], [[1]], 1, 0.0, 0.0, 1)

    large, small = (time_run(Holding(megabytes), random_prompt(3)).peak_bytes for megabytes in (200, 1))
    if large is None:
        pytest.skip("this system does not let a process reset its peak")
    assert large - small > 150 << 20
