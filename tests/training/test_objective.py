"""Claims about the objective: Eq. 1 and Eq. 2 with each head's own shift, under masks and packing."""

import pytest
import torch

from medusa import MedusaModel
from medusa.training.config import TrainingConfig
from medusa.training.data import Row, collate, pack
from medusa.training.objective import Objective, count_asked
from tiny import VOCAB, WINDOWED, random_heads, random_prompt, tiny_backbone


def rows_of(*lengths: int) -> list[Row]:
    """Random rows, each with random tokens of it to be learnt."""
    rows = []
    for seed, length in enumerate(lengths):
        loss_mask = torch.rand(length, generator=torch.Generator().manual_seed(seed)) > 0.4
        rows.append(Row(random_prompt(length, seed=seed)[0].int(), loss_mask, (length,)))
    return rows


def batch_of(rows: list[Row]) -> dict[str, torch.Tensor]:
    return collate(list(enumerate(rows)))


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_is_equation_1_with_each_heads_own_shift(targets, packed):
    model = MedusaModel(tiny_backbone())
    heads = random_heads(model.backbone, 3)
    config = TrainingConfig(num_heads=3, targets=targets, soft_top=VOCAB, loss_chunk=7)
    rows = rows_of(20, 13, 9)
    with torch.no_grad():
        got = Objective(model, heads, config)(**batch_of(pack(rows, 30) if packed else rows))
        wanted = 0.0
        for k in range(1, 4):  # the paper's numbering: head k at t predicts token t + k + 1
            losses = []
            for row in rows:  # each alone, whatever it was packed with
                ids = row.ids.long()
                hidden = model.hidden_states(ids[None])[0]
                p, log_p = model.logits(hidden).softmax(-1), heads(hidden)[k - 1].log_softmax(-1)
                for t in range(len(ids) - k - 1):
                    if row.loss_mask[t + k + 1]:
                        hard = -log_p[t, ids[t + k + 1]]
                        losses.append(hard if targets == "hard" else -(p[t + k] * log_p[t]).sum())
            torch.testing.assert_close(got["head_losses"][k - 1], torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)
            wanted += 0.8**k * torch.stack(losses).mean()
    torch.testing.assert_close(got["loss"], wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gpt_neox", "opt", *WINDOWED])
def test_packed_samples_see_nothing_of_one_another(model_type):
    overrides = WINDOWED.get(model_type, {})
    model = MedusaModel(tiny_backbone(model_type, attention="eager" if model_type == "gemma2" else None, **overrides))
    rows = rows_of(20, 17, 9)
    batch = batch_of(pack(rows, 48))
    with torch.no_grad():
        hidden = model.hidden_states(batch["input_ids"], batch["segments"])[0]
        start = 0
        for row in sorted(rows, key=len, reverse=True):
            alone = model.hidden_states(row.ids.long()[None])[0]
            torch.testing.assert_close(hidden[start : start + len(row)], alone, atol=2e-4, rtol=1e-3)
            start += len(row)


@pytest.mark.parametrize("lm_loss", ["labels", "distill"])
def test_joint_loss_is_equation_2(lm_loss):
    pytest.importorskip("peft")
    from medusa.checkpoints.adapter import attach_adapter, without_adapter

    backbone = tiny_backbone()
    attach_adapter(backbone, rank=4, alpha=16, dropout=0.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:  # as if trained
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    model, heads = MedusaModel(backbone), random_heads(backbone, 2)
    config = TrainingConfig(num_heads=2, backbone="lora", lm_loss=lm_loss, lambda_0=0.3, loss_chunk=7, soft_top=VOCAB)
    rows = rows_of(20, 13)
    got = Objective(model, heads, config)(**batch_of(rows))
    losses, counted = [], 0
    with torch.no_grad():
        for row in rows:
            ids = row.ids.long()
            log_p = backbone(ids[None]).logits[0].log_softmax(-1)
            with without_adapter(backbone):
                teacher = backbone(ids[None]).logits[0].log_softmax(-1)
            assert not torch.allclose(log_p, teacher, atol=1e-2)
            for t in range(len(ids) - 1):
                if row.loss_mask[t + 1]:
                    counted += 1
                    kl = (teacher[t].exp() * (teacher[t] - log_p[t])).sum()
                    losses.append(-log_p[t, ids[t + 1]] if lm_loss == "labels" else kl)
    lm = torch.stack(losses).sum() / counted
    torch.testing.assert_close(got["lm_loss"], lm, atol=1e-4, rtol=1e-4)
    eq_1 = 0.8 * got["head_losses"][0] + 0.64 * got["head_losses"][1]
    torch.testing.assert_close(got["loss"].detach(), lm + 0.3 * eq_1, atol=1e-4, rtol=1e-4)
    got["loss"].backward()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert {"lm_head", "q_proj", "down_proj"} <= {name.split(".lora_")[0].rpartition(".")[2] for name in trained}


def test_a_shared_lm_head_with_an_adapter_is_asked_with_it():
    pytest.importorskip("peft")
    from medusa.checkpoints.adapter import attach_adapter

    backbone = tiny_backbone()
    attach_adapter(backbone, rank=4, alpha=16, dropout=0.0)
    with torch.no_grad():
        backbone.get_output_embeddings().lora_B["default"].weight.fill_(0.1)
    model, heads = MedusaModel(backbone), random_heads(backbone, 1, shared=True)
    config = TrainingConfig(num_heads=1, shared_lm_head=True, backbone="lora", targets="hard")
    (row,) = rows_of(12)
    with torch.no_grad():
        got = Objective(model, heads, config)(**batch_of([row]))["head_losses"][0]
        ids = row.ids.long()
        log_p = backbone.get_output_embeddings()(heads.state(model.hidden_states(ids[None])[0], 0)).log_softmax(-1)
        wanted = torch.stack([-log_p[t, ids[t + 2]] for t in range(10) if row.loss_mask[t + 2]]).mean()
    torch.testing.assert_close(got, wanted)


def test_counts_given_divide_the_loss_of_parts_into_that_of_the_whole():
    model, rows = MedusaModel(tiny_backbone()), rows_of(20, 13, 9, 11)
    heads, config = random_heads(model.backbone, 2), TrainingConfig(num_heads=2)
    objective, whole = Objective(model, heads, config), batch_of(rows)
    counts = count_asked(whole["labels"], whole["segments"], 2)
    with torch.no_grad():
        parts = [objective(**batch_of(part), counts=counts)["loss"] for part in (rows[:1], rows[1:])]
        torch.testing.assert_close(sum(parts), objective(**whole)["loss"], atol=1e-4, rtol=1e-4)


def test_where_path_heads_read_the_root_alone_is_up_to_seed_step_and_row_not_to_the_batch():
    backbone, rows = tiny_backbone(), rows_of(20, 13, 9, 11)
    heads = random_heads(backbone, 3, heads_kind="path", embedding_size=backbone.config.hidden_size, embedding_scale=1.0)
    heads.share(backbone.get_output_embeddings(), backbone.get_input_embeddings())
    objective = Objective(MedusaModel(backbone), heads, TrainingConfig(num_heads=3, seed=7)).train()
    whole, numbered = batch_of(rows), list(enumerate(rows))
    counts = count_asked(whole["labels"], whole["segments"], 3)
    with torch.no_grad():
        losses = [objective(**whole, step=step)["head_losses"] for step in (4, 5)]
        parts = [objective(**collate(part), counts=counts, step=4)["head_losses"] for part in (numbered[2:], numbered[:2])]
        torch.testing.assert_close(sum(parts), losses[0], atol=1e-4, rtol=1e-4)
        read_all = objective.eval()(**whole)["head_losses"]
    reads_path = [bool(first != second) for first, second in zip(*losses, strict=True)]
    assert reads_path == [False, True, True]  # head 1's path is the root alone
    assert losses[0][0] == read_all[0] and (losses[0][1:] != read_all[1:]).all()


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("length", range(3, 8))
def test_rows_shorter_than_the_heads_reach_ask_only_the_heads_that_can_answer(length, targets):
    model = MedusaModel(tiny_backbone())
    row = Row(random_prompt(length)[0].int(), torch.ones(length, dtype=torch.bool), (length,))
    objective = Objective(model, random_heads(model.backbone, 5), TrainingConfig(targets=targets))
    with torch.no_grad():
        losses = objective(**batch_of([row]))["head_losses"]
    assert [bool(loss > 0) for loss in losses] == [k + 1 < length for k in range(1, 6)]


def test_an_untrained_adapter_is_no_distance_from_the_original_whatever_dropout_the_model_has():
    pytest.importorskip("peft")
    from medusa.checkpoints.adapter import attach_adapter

    backbone = tiny_backbone("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    attach_adapter(backbone, rank=2, alpha=4, dropout=0.5)
    config = TrainingConfig(num_heads=1, backbone="lora", lm_loss="distill")
    objective = Objective(MedusaModel(backbone), random_heads(backbone, 1), config).train()
    assert any(module.training for name, module in backbone.named_modules() if name.endswith("lora_dropout"))
    assert objective(**batch_of(rows_of(20)))["lm_loss"].abs() < 1e-5


def test_adapters_are_trained_in_float32():
    pytest.importorskip("peft")
    from medusa.checkpoints.adapter import attach_adapter

    backbone = tiny_backbone(dtype=torch.bfloat16)
    attach_adapter(backbone, rank=2, alpha=4, dropout=0.0)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    config = TrainingConfig(num_heads=1, backbone="lora", lm_loss="distill")
    heads = random_heads(backbone, 1).float().requires_grad_(True)
    Objective(MedusaModel(backbone), heads, config)(**batch_of(rows_of(20)))["loss"].backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in trained)
