"""Claims about the Medusa-1 trainer: the label shift, the frozen backbone, resuming, and clear errors on bad data."""

import json
import shutil

import pytest
import torch

from medusa import MedusaModel
from medusa.errors import InvalidInput, MedusaError
from medusa.heads import load_heads
from medusa.training.data import collate, load_blocks
from medusa.training.losses import IGNORED
from medusa.training.trainer import Medusa1Objective, TrainingConfig, train
from tiny import random_heads, random_prompt, tiny_backbone

VOCAB = 64
SUCCESSOR = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))  # of one token, the next


def determined_text(path, samples: int, seed: int) -> None:
    """Text in which each token determines the next, hence the next five."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for _ in range(samples):
            ids = [int(torch.randint(VOCAB, (1,), generator=generator))]
            while len(ids) < 24:
                ids.append(int(SUCCESSOR[ids[-1]]))
            file.write(json.dumps({"input_ids": ids}) + "\n")


@pytest.fixture
def data(tmp_path):
    determined_text(tmp_path / "train.jsonl", 64, seed=0)
    determined_text(tmp_path / "eval.jsonl", 16, seed=1)
    return tmp_path


@pytest.mark.parametrize("shared", [False, True])
def test_every_head_learns_the_token_that_is_its_own(data, shared):
    backbone = tiny_backbone(gain=1.0, num_hidden_layers=1)  # one whose hidden state still shows the current token
    model = MedusaModel(backbone)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    config = TrainingConfig(
        num_heads=5,
        max_steps=500 if shared else 250,
        batch_size=16,
        learning_rate=1e-2,
        warmup_steps=5,
        targets="hard",
        shared_lm_head=shared,
    )
    metrics = train(model, None, data / "train.jsonl", data / "heads", config, data / "eval.jsonl")
    assert all(metrics[f"eval_head{k}_top1"] >= 0.99 for k in range(1, 6)), metrics
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    loaded = load_heads(data / "heads")
    assert len(loaded) == 5 and loaded.config.medusa_shared_lm_head is shared
    record = json.loads((data / "heads" / "training.json").read_text())
    assert record["config"]["num_heads"] == 5 and record["metrics"] == metrics


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_loss_is_equation_1_with_each_heads_own_shift(targets):
    model = MedusaModel(tiny_backbone())
    heads = random_heads(model.backbone, 3)
    config = TrainingConfig(num_heads=3, targets=targets, soft_top=VOCAB, loss_chunk=7)
    objective = Medusa1Objective(model, heads, config)
    batch = collate([random_prompt(20, seed=1)[0], random_prompt(13, seed=2)[0]])
    with torch.no_grad():
        got = objective(**batch)
        hidden = model.hidden_states(batch["input_ids"])
        p = model.logits(hidden).softmax(-1)
        wanted = 0.0
        for k in range(1, 4):  # the paper's numbering: head k at t predicts token t + k + 1
            log_p, losses = heads(hidden)[k - 1].log_softmax(-1), []
            for row, length in enumerate((20, 13)):
                for t in range(length - k - 1):
                    if targets == "hard":
                        losses.append(-log_p[row, t, batch["input_ids"][row, t + k + 1]])
                    else:
                        losses.append(-(p[row, t + k] * log_p[row, t]).sum())
            torch.testing.assert_close(got["head_losses"][k - 1], torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)
            wanted += 0.8**k * torch.stack(losses).mean()
    torch.testing.assert_close(got["loss"], wanted, atol=1e-3, rtol=1e-4)


def test_resumed_run_ends_with_the_same_heads(data):
    config = TrainingConfig(num_heads=2, batch_size=8, warmup_steps=2, save_steps=4, max_steps=8)
    for output in ("whole", "cut"):
        train(MedusaModel(tiny_backbone()), None, data / "train.jsonl", data / output, config)
    # As if killed after step 4: only that checkpoint is left.
    shutil.rmtree(data / "cut" / "checkpoint-8")
    (data / "cut" / "medusa_lm_head.safetensors").unlink()
    train(MedusaModel(tiny_backbone()), None, data / "train.jsonl", data / "cut", config, resume=True)
    whole, cut = load_heads(data / "whole").state_dict(), load_heads(data / "cut").state_dict()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_training_goes_on_from_given_heads(data):
    config = TrainingConfig(num_heads=2, max_steps=2, batch_size=8, learning_rate=1e-3)
    train(MedusaModel(tiny_backbone()), None, data / "train.jsonl", data / "first", config)
    start = load_heads(data / "first")
    with pytest.raises(InvalidInput, match="other sizes"):
        train(
            MedusaModel(tiny_backbone(), start),
            None,
            data / "train.jsonl",
            data / "second",
            TrainingConfig(num_heads=3, max_steps=1),
        )


def test_exploding_loss_stops_the_run(data):
    backbone = tiny_backbone()
    model = MedusaModel(backbone)
    with torch.no_grad():
        backbone.lm_head.weight[0, 0] = torch.nan
    config = TrainingConfig(num_heads=1, max_steps=3, batch_size=8, logging_steps=1, targets="hard")
    with pytest.raises(MedusaError, match="loss is nan at step 1"):
        train(model, None, data / "train.jsonl", data / "heads", config)


def test_padding_is_no_label():
    batch = collate([torch.tensor([1, 2, 3]), torch.tensor([4])])
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "data.jsonl:1 is not valid JSON"),
        (b'{"text": "\xff"}', "data.jsonl:1 is not valid JSON"),
        (b'{"input_ids": [1, 2]}\n{"prompt": "x"}', "data.jsonl:2 has neither 'text' nor 'input_ids'"),
        (b'{"input_ids": [1, 99]}', "sample 1 has ids outside the vocabulary of 64"),
        (b"", "holds no sample of at least 4 tokens"),
    ],
)
def test_bad_data_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        load_blocks(tmp_path / "data.jsonl", None, 16, VOCAB, 4)


@pytest.mark.parametrize("changes", [{"num_heads": 0}, {"learning_rate": -1.0}, {"batch_size": 0}])
def test_nonsense_configuration_is_refused(changes):
    with pytest.raises(InvalidInput, match=next(iter(changes))):
        TrainingConfig(**changes)
