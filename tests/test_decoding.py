"""Claims about the loop: Medusa's greedy output is the backbone's own, whatever the tree, the batch or the ending."""

import threading

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxTimeCriteria, RepetitionPenaltyLogitsProcessor, StoppingCriteria

from medusa import MedusaModel, MedusaTree
from tiny import (
    ARCHITECTURES,
    VOCAB,
    WINDOWED,
    left_padded,
    plain_greedy,
    random_heads,
    random_prompt,
    random_tree,
    tiny_backbone,
)

NEW = 24
LENGTHS = (17, 5, 1, 11)


def new_tokens(output: torch.Tensor, prompt_length: int) -> list[list[int]]:
    return output[:, prompt_length:].tolist()


@pytest.mark.parametrize("model_type", [*ARCHITECTURES])
def test_greedy_medusa_matches_greedy_backbone(model_type):
    backbone = tiny_backbone(model_type)
    model = MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=48))
    prompts = [random_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    wanted = [plain_greedy(backbone, prompt, NEW) for prompt in prompts]
    alone = model.generate(prompts[0], max_new_tokens=NEW, return_dict_in_generate=True)
    assert new_tokens(alone.sequences, 17) == [wanted[0]]
    ids, mask = left_padded(prompts)
    batch = model.generate(ids, mask, max_new_tokens=NEW, return_dict_in_generate=True, tree=random_tree(2, 40))
    assert new_tokens(batch.sequences, ids.shape[1]) == wanted
    # Some path beyond the root was accepted, or the case would show nothing.
    assert max(max(lengths) for lengths in [*alone.acceptance_lengths, *batch.acceptance_lengths]) > 1


@pytest.mark.parametrize("model_type", [*WINDOWED])
def test_greedy_medusa_matches_greedy_backbone_past_the_window(model_type):
    backbone = tiny_backbone(model_type, **WINDOWED[model_type])
    model = MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=48))
    prompts = [random_prompt(length, seed) for seed, length in enumerate((30, 9))]
    ids, mask = left_padded(prompts)
    output = model.generate(ids, mask, max_new_tokens=NEW)
    assert new_tokens(output, 30) == [plain_greedy(backbone, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize(
    "tree",
    [
        MedusaTree([]),
        MedusaTree([(0,)]),
        MedusaTree([(rank,) for rank in range(VOCAB)]),
        MedusaTree([(30,), (30, 20), (30, 20, 10), (10,), (10, 63)]),
        random_tree(seed=4, nodes=256),
    ],
    ids=["root only", "one guess", "whole vocabulary", "ranks of ten and more", "256 nodes"],
)
def test_any_tree_gives_the_same_output(tiny_model, tree):
    prompt = random_prompt(9, seed=3)
    output = tiny_model.generate(prompt, max_new_tokens=40, tree=tree)
    assert new_tokens(output, 9) == [plain_greedy(tiny_model.backbone, prompt, 40)]


@pytest.mark.parametrize(("num_heads", "num_layers", "shared"), [(1, 1, False), (5, 2, False), (4, 1, True)])
def test_any_heads_give_the_same_output(num_heads, num_layers, shared):
    backbone = tiny_backbone()
    model = MedusaModel(
        backbone,
        random_heads(backbone, num_heads, num_layers, shared),
        random_tree(seed=6, nodes=50, depth=num_heads),
    )
    prompt = random_prompt(7, seed=8)
    assert new_tokens(model.generate(prompt, max_new_tokens=30), 7) == [plain_greedy(backbone, prompt, 30)]


def test_whole_vocabulary_at_depth_one_is_always_accepted(tiny_model):
    tree = MedusaTree([(rank,) for rank in range(VOCAB)])
    output = tiny_model.generate(random_prompt(5), max_new_tokens=20, tree=tree, return_dict_in_generate=True)
    assert output.acceptance_lengths == [[2] * 10] and output.steps == 10


def test_acceptance_lengths_count_the_tokens_and_plain_decoding_accepts_one_a_step(tiny_model):
    output = tiny_model.generate(random_prompt(5), max_new_tokens=21, return_dict_in_generate=True)
    assert sum(output.acceptance_lengths[0]) == 21 and len(output.acceptance_lengths[0]) == output.steps
    plain = tiny_model.generate(random_prompt(5), max_new_tokens=21, tree=MedusaTree([]), return_dict_in_generate=True)
    assert plain.acceptance_lengths == [[1] * 21]


def test_id_zero_is_a_token_and_is_kept():
    backbone = tiny_backbone()
    with torch.no_grad():  # a backbone whose argmax is always id 0
        backbone.lm_head.weight.zero_()
        backbone.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
        backbone.lm_head.bias[0] = 5.0
    model = MedusaModel(backbone, random_heads(backbone), MedusaTree([(rank,) for rank in range(VOCAB)]))
    output = model.generate(random_prompt(4), max_new_tokens=11, return_dict_in_generate=True)
    assert new_tokens(output.sequences, 4) == [[0] * 11] and output.steps == 6


TWO_A_STEP = MedusaTree([(rank,) for rank in range(VOCAB)])  # the whole vocabulary: a guess is always right


@pytest.mark.parametrize("seed", [1, 2, 4])  # those whose output has such a token
def test_output_ends_at_eos_inside_an_accepted_path(tiny_model, seed):
    prompt = random_prompt(6, seed)
    full = plain_greedy(tiny_model.backbone, prompt, 30)
    # A token that first comes as the root of a step of two: the path goes on behind it.
    eos = next(token for i, token in enumerate(full) if i % 2 == 0 and full.index(token) == i and i)
    wanted = full[: full.index(eos) + 1]
    options = {"max_new_tokens": 30, "tree": TWO_A_STEP, "return_dict_in_generate": True}
    output = tiny_model.generate(prompt, eos_token_id=[eos, VOCAB - 1 if VOCAB - 1 not in full else eos], **options)
    assert new_tokens(output.sequences, 6) == [wanted] and output.finish_reasons == ["eos"]
    assert output.acceptance_lengths[0][:-1] == [2] * (len(wanted) // 2)


def test_a_stop_inside_an_accepted_path_leaves_nothing_behind_it(tiny_model):
    prompt = random_prompt(6, seed=1)
    full = plain_greedy(tiny_model.backbone, prompt, 20)
    index = next(i for i, token in enumerate(full) if i % 2 == 0 and full.index(token) == i and i)
    stop = StoppingCriteriaList([_StopAt(full[index])])
    output = tiny_model.generate(
        prompt, max_new_tokens=20, stopping_criteria=stop, tree=TWO_A_STEP, return_dict_in_generate=True
    )
    assert new_tokens(output.sequences, 6) == [full[: index + 1]]
    assert output.acceptance_lengths == [[2] * (index // 2) + [1]]


def test_prompt_of_one_token(tiny_model):
    prompt = random_prompt(1)
    assert new_tokens(tiny_model.generate(prompt, max_new_tokens=20), 1) == [plain_greedy(tiny_model.backbone, prompt, 20)]


@pytest.mark.parametrize("limit", range(1, 9))
def test_max_new_tokens_cuts_inside_an_accepted_path(tiny_model, limit):
    tree = MedusaTree([(rank,) for rank in range(VOCAB)])  # two tokens per step
    prompt = random_prompt(6, seed=1)
    output = tiny_model.generate(prompt, max_new_tokens=limit, tree=tree, return_dict_in_generate=True)
    assert new_tokens(output.sequences, 6) == [plain_greedy(tiny_model.backbone, prompt, limit)]
    assert output.finish_reasons == ["length"]


def test_rows_finish_on_their_own_and_are_padded(tiny_model):
    prompts = [random_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    full = [plain_greedy(tiny_model.backbone, prompt, NEW) for prompt in prompts]
    eos = full[0][3]
    wanted = [row[: row.index(eos) + 1] if eos in row else row for row in full]
    ids, mask = left_padded(prompts)
    output = tiny_model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=2)
    for row, tokens in zip(new_tokens(output, ids.shape[1]), wanted, strict=True):
        assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {2}


class _StopAt(StoppingCriteria):
    """Stops after a token, like plain decoding would."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_are_asked_after_every_token(tiny_model):
    prompt = random_prompt(6, seed=2)
    stop = StoppingCriteriaList([_StopAt(plain_greedy(tiny_model.backbone, prompt, 20)[9])])
    wanted = plain_greedy(tiny_model.backbone, prompt, 20, stopping_criteria=stop)
    output = tiny_model.generate(prompt, max_new_tokens=20, stopping_criteria=stop, return_dict_in_generate=True)
    assert new_tokens(output.sequences, 6) == [wanted] and output.finish_reasons == ["stop"]


def test_time_limit_ends_a_run(tiny_model):
    stop = StoppingCriteriaList([MaxTimeCriteria(max_time=0.0)])
    assert tiny_model.generate(random_prompt(6), max_new_tokens=20, stopping_criteria=stop).shape[1] == 7


@pytest.mark.parametrize("penalty", [1.3, 2.0])
def test_processors_see_the_prefix_of_each_nodes_own_path(tiny_model, penalty):
    prompts = [random_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    wanted = [plain_greedy(tiny_model.backbone, prompt, NEW, repetition_penalty=penalty) for prompt in prompts]
    assert wanted[0] != plain_greedy(tiny_model.backbone, prompts[0], NEW)
    ids, mask = left_padded(prompts)
    output = tiny_model.generate(ids, mask, max_new_tokens=NEW, repetition_penalty=penalty, return_dict_in_generate=True)
    assert new_tokens(output.sequences, ids.shape[1]) == wanted
    assert max(map(max, output.acceptance_lengths)) > 1
    listed = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    assert new_tokens(tiny_model.generate(prompts[0], max_new_tokens=NEW, logits_processor=listed), 17) == [wanted[0]]


def test_two_threads_decode_on_one_model(tiny_model):
    prompts = [random_prompt(8 + seed, seed) for seed in range(4)]
    wanted = [plain_greedy(tiny_model.backbone, prompt, 40) for prompt in prompts]
    got: dict[int, list[int]] = {}

    def run(number: int) -> None:
        prompt = prompts[number]
        got[number] = new_tokens(tiny_model.generate(prompt, max_new_tokens=40), prompt.shape[1])[0]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(4)] == wanted


def test_interleaved_streams_do_not_touch_each_other(tiny_model):
    prompts = [random_prompt(8, 1), random_prompt(13, 2)]
    wanted = [plain_greedy(tiny_model.backbone, prompt, 20) for prompt in prompts]
    streams = [tiny_model.stream(prompt, max_new_tokens=20) for prompt in prompts]
    got: list[list[int]] = [[], []]
    for _ in range(20):
        for number, stream in enumerate(streams):
            for step in [next(stream, None)]:
                got[number] += step.tokens[0] if step else []
    assert got == wanted


def test_generation_fills_the_context_to_its_last_token():
    backbone = tiny_backbone("gpt2", n_positions=40)  # learned positions: an index past the table would fail
    model = MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=48))
    prompt = random_prompt(10)
    assert new_tokens(model.generate(prompt, max_new_tokens=30), 10) == [plain_greedy(backbone, prompt, 30)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_decodes_the_tokens_asked_for(dtype):
    backbone = tiny_backbone(dtype=dtype)
    model = MedusaModel(backbone, random_heads(backbone), random_tree(seed=1, nodes=32))
    assert model.generate(random_prompt(9), max_new_tokens=15).shape == (1, 24)
