"""Claims about draft vocabularies: heads score some tokens alone, and nothing else changes."""

import pytest
import torch

from medusa import DynamicTree, MedusaHeads, MedusaModel, MedusaTree
from medusa.checkpoints.reader import load_heads
from medusa.checkpoints.writer import save_heads, write_checkpoint
from medusa.errors import CheckpointError, InvalidInput
from medusa.training.config import TrainingConfig
from medusa.training.data import Row, Rows, draft_vocabulary
from medusa.training.run import train_heads
from tiny import plain_greedy, random_prompt, tiny_backbone

TOKENS = torch.tensor([1, 3, 4, 9, 17, 30, 31, 40, 55, 62])


def heads_for(backbone, shared: bool) -> MedusaHeads:
    heads = MedusaHeads.for_lm_head(backbone.get_output_embeddings(), 3, 1, shared, TOKENS)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return heads


@pytest.mark.parametrize("shared", [True, False])
def test_scores_are_those_of_the_tokens_that_the_draft_vocabulary_names(shared):
    backbone = tiny_backbone()
    lm_head = backbone.get_output_embeddings()
    small = MedusaHeads.for_lm_head(lm_head, 2, 1, shared, TOKENS)
    whole = MedusaHeads.for_lm_head(lm_head, 2, 1, shared)
    h = torch.randn(3, 64)
    assert torch.allclose(small(h), whole(h)[..., TOKENS])
    assert small.scored == 10 and small.tokens(torch.tensor([3, 9])).tolist() == [9, 62]
    assert small.places(torch.tensor([9, 62, 0, 63, 2])).tolist() == [3, 9, -1, -1, -1]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "tree", [MedusaTree([(0,), (1,), (0, 0), (0, 1), (9,)]), DynamicTree(12, 3, 10), DynamicTree(12, 3, copied=4)]
)
def test_output_is_the_backbones_whatever_heads_may_say(shared, tree):
    backbone = tiny_backbone()
    model = MedusaModel(backbone, heads_for(backbone, shared), tree)
    prompt = random_prompt(9)
    output = model.generate(prompt, max_new_tokens=40, eos_token_id=[])
    assert output[0, 9:].tolist() == plain_greedy(backbone, prompt, 40)
    if shared:  # a loaded backbone's parameters ask for gradients, and still only the rows named are computed
        assert type(model.heads.lm_head(0)) is torch.nn.Linear and model.heads.lm_head(0).out_features == 10
    drafted = {token for step in _drafts(model, prompt) for token in step}
    assert drafted and ((tree.depth == 3 and getattr(tree, "copied", 0)) or drafted <= set(TOKENS.tolist()))


def _drafts(model, prompt):
    from medusa.batch.rows import DecodingOptions
    from medusa.decoding import prefill

    state = prefill(model, prompt, None, model.tree, DecodingOptions(max_new_tokens=8))
    assert model.heads is not None
    guesses = state.drafter.guess(model.heads(state.hidden, state.drafter.num_heads))
    yield model.heads.tokens(guesses.tokens).flatten().tolist()


def test_ranks_beyond_the_draft_vocabulary_are_refused():
    backbone = tiny_backbone()
    with pytest.raises(Exception, match="rank 10"):
        MedusaModel(backbone, heads_for(backbone, True), MedusaTree([(10,)]))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("to", ["medusa", "merged"])
def test_files_keep_the_draft_vocabulary(tmp_path, shared, to):
    backbone = tiny_backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    heads = heads_for(backbone, shared)
    write_checkpoint(heads, tmp_path / "out", to, backbone=tmp_path / "backbone")
    found = load_heads(tmp_path / "out")
    assert torch.equal(found.token_map, TOKENS) and found.config.vocab_size == 64
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), heads.parameters(), strict=True))


def test_other_formats_get_the_whole_vocabulary_or_refuse(tmp_path):
    backbone = tiny_backbone()
    lm_head = backbone.get_output_embeddings()
    for to in ("v0.1", "v2", "vllm"):
        write_checkpoint(heads_for(backbone, True), tmp_path / to, to, lm_head=lm_head)
        found = load_heads(tmp_path / to, backbone=None) if to != "v2" else load_heads(tmp_path / to)
        assert found.config.medusa_draft_vocabulary is None and found.config.vocab_size == 64
        with pytest.raises(CheckpointError, match="no draft vocabulary"):
            write_checkpoint(heads_for(backbone, False), tmp_path / f"own-{to}", to, lm_head=lm_head)


def test_a_draft_vocabulary_of_nonsense_is_refused(tmp_path):
    heads = heads_for(tiny_backbone(), True)
    for tokens in ([3, 3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 11, 64]):
        heads.token_map = torch.tensor(tokens)
        save_heads(heads, tmp_path)
        with pytest.raises(CheckpointError, match="token_map"):
            load_heads(tmp_path)


def test_the_commonest_tokens_are_chosen():
    ids = torch.tensor([5] * 97 + [7] * 2 + [9] + [1] * 50, dtype=torch.int32)
    loss_mask = torch.tensor([True] * 100 + [False] * 50)
    rows = Rows([Row(ids, loss_mask, (150,))])
    assert draft_vocabulary(rows, "all", 64) is None
    assert draft_vocabulary(rows, "auto", 64).tolist() == [5, 7]
    assert draft_vocabulary(rows, "3", 64).tolist() == [5, 7, 9]
    for nonsense in ("many", "0", "-3"):
        with pytest.raises(InvalidInput, match="draft_vocabulary"):
            TrainingConfig(draft_vocabulary=nonsense)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_heads_learn_within_their_draft_vocabulary(tmp_path, shared, targets):
    backbone = tiny_backbone()
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(24):
        text = backbone.generate(torch.randint(64, (1, 4), generator=generator), max_new_tokens=40, do_sample=False)[0]
        rows.append(Row(text.int(), torch.ones(len(text), dtype=torch.bool), (len(text),)))
    config = TrainingConfig(
        num_heads=2, shared_lm_head=shared, draft_vocabulary="16", targets=targets, max_steps=30, batch_size=8, warmup_steps=2,
        learning_rate=1e-2,
    )  # fmt: skip
    metrics = train_heads(MedusaModel(backbone), Rows(rows), tmp_path, config)
    heads = load_heads(tmp_path)
    assert heads.scored == 16 and heads.config.vocab_size == 64
    assert metrics["eval_head1_top1"] > 0.3
    model = MedusaModel.from_pretrained  # and they load as any others
    backbone.save_pretrained(tmp_path / "backbone")
    assert model(tmp_path / "backbone", tmp_path).heads.scored == 16


def test_heads_learn_within_it_through_an_lm_head_that_learns_too(tmp_path):
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (24, 30), generator=generator)
    rows = Rows([Row(text.int(), torch.ones(30, dtype=torch.bool), (30,)) for text in ids])
    config = TrainingConfig(
        num_heads=2, shared_lm_head=True, draft_vocabulary="16", backbone="lora", max_steps=2, batch_size=8, warmup_steps=1
    )
    metrics = train_heads(MedusaModel(tiny_backbone(dtype=torch.bfloat16)), rows, tmp_path, config)
    assert "eval_head1_top1" in metrics and load_heads(tmp_path).scored == 16
