"""Claims about sampling: the output has the backbone's distribution, and a seed repeats it."""

import itertools

import pytest
import torch
from scipy import stats
from torch import Tensor

import medusa.sampling
from medusa import DynamicTree, MedusaModel, MedusaTree
from medusa.batch.state import DecodingState
from medusa.errors import InvalidInput
from medusa.kernels.build import load_kernels
from medusa.sampling import draw, gumbel, likeliest, position_keys, row_keys
from tiny import left_padded, random_heads, random_prompt, random_tree, tiny_backbone

VOCAB, LENGTH, ROWS = 4, 3, 6000


def random_toy() -> MedusaModel:
    """A backbone of four tokens whose every continuation of three tokens can be enumerated; its heads know nothing."""
    backbone = tiny_backbone(vocab_size=VOCAB, pad_token_id=None, bos_token_id=None)
    return MedusaModel(backbone, random_heads(backbone, num_heads=2))


def bigram_toy(right: bool) -> MedusaModel:
    """A backbone whose next token depends on the last alone and is mostly its successor; heads that know it, or its reverse."""
    backbone = tiny_backbone(vocab_size=VOCAB, pad_token_id=None, bos_token_id=None)
    with torch.no_grad():
        for layer in backbone.model.layers:  # nothing is added to the token's own embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        h = backbone.model(torch.arange(VOCAB)[:, None]).last_hidden_state[:, 0]  # (V, d), by token
        noise = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        logits = noise + 5 * torch.eye(VOCAB).roll(1, dims=1)
        to_hidden = torch.linalg.pinv(h.T)  # W h[x] = rows of choice
        backbone.lm_head.weight.copy_(logits.T @ to_hidden)
        heads = random_heads(backbone, num_heads=2)
        p = logits.softmax(-1)
        for k, ahead in enumerate((p @ p, p @ p @ p)):
            heads[k][0].linear.weight.zero_()
            heads[k][0].linear.bias.zero_()
            heads[k][1].weight.copy_((ahead if right else -ahead).T @ to_hidden)
    return MedusaModel(backbone, heads)


TOYS = {"random": random_toy, "nearly always right": lambda: bigram_toy(True), "nearly always wrong": lambda: bigram_toy(False)}


def exact_distribution(backbone, prompt: Tensor, temperature: float) -> dict[tuple[int, ...], float]:
    """The probability of every continuation, by enumeration."""
    paths = list(itertools.product(range(VOCAB), repeat=LENGTH))
    ids = torch.cat([prompt.expand(len(paths), -1), torch.tensor(paths)], dim=1)
    with torch.no_grad():
        p = (backbone(ids).logits[:, prompt.shape[1] - 1 : -1].double() / temperature).softmax(-1)
    chosen = p.gather(2, torch.tensor(paths)[..., None]).squeeze(-1).prod(-1)
    return dict(zip(paths, chosen.tolist(), strict=True))


TREES = {
    "chain": MedusaTree([(0,), (0, 0)]),
    "wide": MedusaTree([(0,), (1,), (2,), (3,), (0, 0), (3, 2)]),
    "full": MedusaTree.dense([4, 4]),
    "dynamic": DynamicTree(3, depth=2, ranks=3),  # which reads ahead in the numbers that decide the draws
}


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("tree", [*TREES])
@pytest.mark.parametrize("toy", [*TOYS])
def test_sampled_output_has_the_backbones_distribution(toy, tree, temperature):
    model = TOYS[toy]()
    prompt = torch.tensor([[1, 2, 3]])
    output = model.generate(
        prompt.expand(ROWS, -1),
        max_new_tokens=LENGTH,
        do_sample=True,
        temperature=temperature,
        tree=TREES[tree],
        seed=11,
        return_dict_in_generate=True,
    )
    wanted = exact_distribution(model.backbone, prompt, temperature)
    counts = dict.fromkeys(wanted, 0)
    for row in output.sequences[:, 3:].tolist():
        counts[tuple(row)] += 1
    if tree == "chain" and temperature < 1 and toy != "random":
        accepted = sum(lengths[0] > 1 for lengths in output.acceptance_lengths) / ROWS
        assert accepted > 0.9 if "right" in toy else accepted < 0.1
    # Continuations expected fewer than five times are counted together, as the test asks.
    rare = [path for path, p in wanted.items() if p * ROWS < 5]
    observed = [n for path, n in counts.items() if path not in rare] + [sum(counts[path] for path in rare)]
    expected = [p * ROWS for path, p in wanted.items() if path not in rare] + [sum(wanted[path] for path in rare) * ROWS]
    if expected[-1] < 1e-9:
        observed, expected = observed[:-1], expected[:-1]
    assert len(observed) > 3
    scale = sum(observed) / sum(expected)
    assert stats.chisquare(observed, [value * scale for value in expected]).pvalue > 1e-3


def test_a_tree_that_reads_ahead_in_the_draws_accepts_more_of_the_same_text(monkeypatch):
    model = bigram_toy(right=True)
    options = {"max_new_tokens": 60, "do_sample": True, "temperature": 3.0, "seed": 1, "tree": DynamicTree(3, 2, ranks=4)}
    prompts = torch.tensor([[1, 2, 3]]).expand(20, -1)
    ahead = model.generate(prompts, **options, return_dict_in_generate=True)
    frame = DecodingState.frame
    monkeypatch.setattr(DecodingState, "frame", lambda state, static_shapes: frame(state, static_shapes)._replace(draws=None))
    blind = model.generate(prompts, **options, return_dict_in_generate=True)
    assert torch.equal(ahead.sequences, blind.sequences)
    assert 1.05 * sum(map(len, ahead.acceptance_lengths)) < sum(map(len, blind.acceptance_lengths))


def test_sampled_medusa_equals_sampled_plain_decoding_for_one_seed(tiny_model):
    prompt = random_prompt(9)
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 1.2, "seed": 5}
    plain = tiny_model.generate(prompt, tree=MedusaTree([]), **options)
    for seed in range(3):
        assert torch.equal(tiny_model.generate(prompt, tree=random_tree(seed, 60), **options), plain)


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"repetition_penalty": 1.5}])
def test_processors_shape_the_distribution_alike_with_and_without_a_tree(tiny_model, settings):
    prompt = random_prompt(9)
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 1.5, "seed": 5, **settings}
    plain = tiny_model.generate(prompt, tree=MedusaTree([]), **options)
    assert torch.equal(tiny_model.generate(prompt, **options), plain)
    free = tiny_model.generate(prompt, max_new_tokens=30, do_sample=True, temperature=1.5, seed=5)
    assert not torch.equal(free, plain)


def test_top_k_of_one_is_greedy(tiny_model):
    prompt = random_prompt(9)
    sampled = tiny_model.generate(prompt, max_new_tokens=30, do_sample=True, top_k=1, seed=1)
    assert torch.equal(sampled, tiny_model.generate(prompt, max_new_tokens=30))


def test_seed_reproduces_a_run_and_another_differs(tiny_model):
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 1.5}
    first, again, other = (tiny_model.generate(random_prompt(9), seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(3)
    unseeded = tiny_model.generate(random_prompt(9), **options)
    torch.manual_seed(3)
    assert torch.equal(tiny_model.generate(random_prompt(9), **options), unseeded)


def test_a_rows_draws_do_not_depend_on_its_company(tiny_model):
    prompts = [random_prompt(length, seed) for seed, length in enumerate((12, 7, 3))]
    options = {"max_new_tokens": 25, "do_sample": True, "temperature": 1.3, "seed": 9}
    ids, mask = left_padded(prompts)
    batch = tiny_model.generate(ids, mask, **options)
    alone = tiny_model.generate(prompts[0], **options)
    assert batch[0, 12:].tolist() == alone[0, 12:].tolist()
    fewer = tiny_model.generate(*left_padded(prompts[:2]), **options)
    assert batch[:2, 12:].tolist() == fewer[:, 12:].tolist()
    same = tiny_model.generate(prompts[1].expand(2, -1), **options)
    assert same[0].tolist() != same[1].tolist()


def test_typical_acceptance_with_a_seed_repeats_and_accepts_more(tiny_model):
    options = {"max_new_tokens": 60, "do_sample": True, "temperature": 1.5, "seed": 2, "return_dict_in_generate": True}
    exact = tiny_model.generate(random_prompt(9), **options)
    typical = [tiny_model.generate(random_prompt(9), acceptance="typical", **options) for _ in range(2)]
    assert torch.equal(typical[0].sequences, typical[1].sequences)
    assert typical[0].steps < exact.steps


def test_typical_acceptance_without_sampling_is_greedy(tiny_model):
    prompt = random_prompt(9)
    greedy = tiny_model.generate(prompt, max_new_tokens=30)
    assert torch.equal(tiny_model.generate(prompt, max_new_tokens=30, acceptance="typical"), greedy)


@pytest.mark.parametrize("width", [1, 255, 256, 259, 1024, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_first_with_the_greatest_score(width, dtype):
    scores = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width)).mul(2).round().to(dtype)  # many ties
    scores[0, 0] = -torch.inf
    scores[1, 1, : width // 2] = -torch.inf
    best = scores.amax(-1, keepdim=True)
    first = torch.where(scores == best, torch.arange(width), width).amin(-1)
    assert torch.equal(likeliest(scores), first)


def test_token_without_probability_is_never_drawn():
    scores = torch.full((1, 5, 7), -torch.inf)
    scores[..., [2, 5]] = 0.0
    drawn = draw(scores.expand(100, -1, -1), keys_of(100, 5))
    assert drawn.unique().tolist() == [2, 5]


def test_streams_of_near_seeds_and_rows_share_nothing():
    cpu = torch.device("cpu")
    rows = row_keys([(seed, row) for seed in range(4) for row in range(4)], cpu)
    keys = position_keys(rows[:, None], torch.arange(50))
    assert keys.unique().numel() == keys.numel() and keys.min() >= 0
    assert torch.equal(row_keys([(1, 0), (1, 1)], cpu), rows[4:6])
    numbers = gumbel(keys[..., None], torch.arange(20)).flatten(0, 1)  # (keys, tokens)
    apart = torch.corrcoef(torch.cat([numbers[:-1], numbers[1:]], 1).T)  # tokens of a position, and of the next one
    assert (apart - torch.eye(40)).abs().max() < 0.16  # of 780 coefficients with a deviation of 0.035


def test_numbers_of_tokens_are_distributed_as_gumbels():
    across = gumbel(keys_of(1, 30_000)[0], torch.tensor(7)), gumbel(keys_of(30_000, 1)[:, 0], torch.tensor(7))
    for numbers in (*across, gumbel(keys_of(1, 1)[0], torch.arange(30_000))):
        assert stats.kstest(numbers.numpy(), "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize("loaded", [True, False])
def test_draws_have_the_probabilities_of_the_softmax(loaded, monkeypatch):
    monkeypatch.setattr(medusa.sampling, "are_loaded", lambda: loaded and load_kernels())
    scores = 3 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    drawn = draw(scores.expand(60_000, 1, -1), keys_of(60_000, 1)).flatten()
    expected = scores.double().softmax(-1) * len(drawn)
    counted = drawn.bincount(minlength=40)
    often = expected > 5
    rest = (counted[~often].sum()[None], expected[~often].sum()[None])
    observed, wanted = (torch.cat([of[often], other]) for of, other in zip((counted, expected), rest, strict=True))
    assert stats.chisquare(observed.numpy(), (wanted * observed.sum() / wanted.sum()).numpy()).pvalue > 1e-3


def keys_of(rows: int, positions: int) -> Tensor:
    """Keys of some positions, (rows, positions)."""
    return position_keys(row_keys([(3, row) for row in range(rows)], torch.device("cpu"))[:, None], torch.arange(positions))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected more than 0"),
        ({"temperature": 0.0}, "do_sample=False"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"acceptance": "loose"}, "expected 'exact' or 'typical'"),
    ],
)
def test_nonsense_setting_is_refused(tiny_model, settings, message):
    with pytest.raises(InvalidInput, match=message):
        tiny_model.generate(random_prompt(5), do_sample=True, **settings)
