"""Claims about the embedded model: Medusa on a real model says what the backbone says, and says it in fewer steps."""

import json

import pytest
import torch

from medusa import EMBEDDED, MedusaModel, MedusaTree
from medusa.evaluation.prompts import held_out_prompts
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


def test_tree_is_the_searched_one_of_its_calibration():
    from medusa.search import search_joint_tree

    calibration = json.loads((EMBEDDED / "calibration.json").read_text())
    tree = MedusaTree.load(EMBEDDED / "medusa_tree.json")
    assert search_joint_tree(calibration["paths"], len(tree)) == tree


def test_embedded_model_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) < 60e6


@pytest.mark.gpu
def test_embedded_model_is_exact_on_a_gpu():
    model = MedusaModel.from_pretrained(EMBEDDED, dtype=torch.float32, device_map="cuda")
    ids = held_out_prompts()[0].ids[None].cuda()
    plain = model.generate(ids, max_new_tokens=NEW, tree=MedusaTree([]))
    assert torch.equal(model.generate(ids, max_new_tokens=NEW), plain)
