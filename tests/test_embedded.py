"""Claims about the embedded model: Medusa on a real model says what the backbone says, and says it in fewer steps."""

import json

import pytest
import torch

from medusa import EMBEDDED, DynamicTree, MedusaModel, MedusaTree
from medusa.data.prompt_sets import held_out_prompts
from medusa.trees.search import search_joint_tree
from tiny import left_padded

NEW = 48


def test_greedy_output_equals_generates_on_50_held_out_prompts(embedded_model):
    prompts = held_out_prompts()[:50]
    assert len(prompts) == 50 and all(len(prompt.ids) == 256 for prompt in prompts)
    steps, tokens = 0, 0
    for prompt in prompts:
        ids = prompt.ids[None]
        wanted = embedded_model.backbone.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        got = embedded_model.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
        assert torch.equal(got.sequences, wanted), prompt.source
        steps, tokens = steps + got.steps, tokens + sum(got.acceptance_lengths[0])
    assert tokens / steps > 1.5  # trained heads: untrained ones would give 1.0


def test_ragged_batch_of_real_prompts_equals_each_alone(embedded_model):
    prompts = [prompt.ids[None, : 40 + 53 * i] for i, prompt in enumerate(held_out_prompts()[:4])]
    ids, mask = left_padded(prompts)
    batch = embedded_model.generate(ids, mask, max_new_tokens=NEW)
    for row, prompt in enumerate(prompts):
        alone = embedded_model.generate(prompt, max_new_tokens=NEW)[0, prompt.shape[1] :].tolist()
        assert batch[row, ids.shape[1] :].tolist()[: len(alone)] == alone


def test_sampled_output_equals_plain_sampling_of_the_same_seed(embedded_model):
    ids = held_out_prompts()[3].ids[None]
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.8, "seed": 4}
    plain = embedded_model.generate(ids, tree=MedusaTree([]), **options)
    assert torch.equal(embedded_model.generate(ids, **options), plain)


def test_nothing_held_out_is_for_both_calibration_and_test():
    test = {prompt.source for prompt in held_out_prompts("test")}
    calibration = {prompt.source for prompt in held_out_prompts("calibration")}
    assert test and calibration and not test & calibration


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.8, "seed": 1}])
def test_the_dynamic_tree_accepts_more_than_a_static_one_of_its_size(embedded_model, options):
    calibration = json.loads((EMBEDDED / "calibration.json").read_text())
    static = search_joint_tree(calibration["paths"], len(embedded_model.tree))
    prompts = torch.stack([prompt.ids for prompt in held_out_prompts()[::8]])
    rates = []
    for tree in (embedded_model.tree, static):
        output = embedded_model.generate(prompts, max_new_tokens=NEW, tree=tree, return_dict_in_generate=True, **options)
        rates.append(sum(map(sum, output.acceptance_lengths)) / sum(map(len, output.acceptance_lengths)))
    assert isinstance(embedded_model.tree, DynamicTree) and len(static) == len(embedded_model.tree)
    assert rates[0] > 1.06 * rates[1]


def test_embedded_model_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) < 60e6


@pytest.mark.gpu
def test_embedded_model_is_exact_on_a_gpu():
    model = MedusaModel.from_pretrained(EMBEDDED, dtype=torch.float32, device_map="cuda")
    ids = held_out_prompts()[0].ids[None].cuda()
    plain = model.generate(ids, max_new_tokens=NEW, tree=MedusaTree([]))
    assert torch.equal(model.generate(ids, max_new_tokens=NEW), plain)
