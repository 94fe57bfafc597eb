"""Claims about training data: what is learnt of each format, cutting, packing, batches, and what is skipped."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from data.test_templates import CHATML, tokenizer_with
from medusa import EMBEDDED
from medusa.errors import InvalidInput
from medusa.training.data import Row, collate, load_rows, masked_runs, pack
from medusa.training.losses import IGNORED

VOCAB = 5000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


def load(tmp_path, records, tokenizer, max_length=64, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_rows(path, tokenizer, max_length, VOCAB, **options)


def row(*lengths: int) -> Row:
    total = sum(lengths)
    return Row(torch.arange(total, dtype=torch.int32), torch.ones(total, dtype=torch.bool), lengths)


def test_a_completion_is_learnt_and_its_prompt_is_not(tmp_path, tokenizer):
    (found,) = load(tmp_path, [{"prompt": "def f(x):\n", "completion": "    return x + 1"}], tokenizer)
    runs = [(loss_mask, tokenizer.decode(ids)) for loss_mask, ids in masked_runs(found)]
    assert [loss_mask for loss_mask, _ in runs] == [False, True]
    assert runs[1][1].replace(tokenizer.eos_token or "", "").strip() == "return x + 1"
    if tokenizer.eos_token_id is not None:
        assert found.ids[-1] == tokenizer.eos_token_id and found.loss_mask[-1]


def test_text_is_cut_into_rows_and_conversations_at_their_end(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    rows = load(tmp_path, [{"text": "import os\n" * 30}], tokenizer, max_length=16)
    assert len(rows) > 3 and all(len(found) <= 16 for found in rows) and rows.cut == 0
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "import os\n" * 30}]
    rows = load(tmp_path, [{"messages": turns}], tokenizer, max_length=16)
    (found,) = rows
    assert len(found) == 16 and rows.cut == 1 and found.loss_mask[-1] and not found.loss_mask[0]


def test_samples_that_teach_nothing_are_counted(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    question = {"role": "user", "content": "import os\n" * 30}
    answer = {"role": "assistant", "content": "yes"}
    records = [
        {"messages": [question]},
        {"messages": [question, answer]},
        {"messages": []},
        {"messages": [{"role": "user", "content": "?"}, answer]},
    ]
    rows = load(tmp_path, records, tokenizer, max_length=32)
    assert len(rows) == 1
    assert rows.skips.reasons == {
        "with no assistant text": 1,
        "whose assistant text begins past the 32 tokens of a row": 1,
        "with an empty conversation": 1,
    }
    with pytest.raises(InvalidInput, match=r"nothing to learn: 1 with no assistant text \(first: .*data.jsonl:1\)"):
        load(tmp_path, records[:1], tokenizer, max_length=32)
    with pytest.raises(InvalidInput, match="nothing to learn: 1 of fewer than 3 tokens"):
        load(tmp_path, [{"input_ids": [1, 2]}], tokenizer)


def test_ids_outside_the_vocabulary_and_a_missing_template_are_refused_with_their_line(tmp_path, tokenizer):
    with pytest.raises(InvalidInput, match=r"data.jsonl:2 has ids outside the vocabulary of 5000"):
        load(tmp_path, [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 5000]}], tokenizer)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    with pytest.raises(InvalidInput, match=r"data.jsonl:1: the tokenizer has no chat template"):
        load(tmp_path, [{"messages": turns}], tokenizer)


def test_packing_keeps_every_sample_whole_and_wastes_little():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (200,), generator=generator).tolist()
    packed = pack([row(length) for length in lengths], 64)
    assert sorted(length for found in packed for length in found.lengths) == sorted(lengths)
    assert all(len(found) == sum(found.lengths) <= 64 for found in packed)
    assert sum(lengths) / (64 * len(packed)) > 0.95
    for found in packed:  # each sample's own ids, in order
        assert found.ids.tolist() == [i for length in found.lengths for i in range(length)]


def test_batches_pad_at_the_right_and_number_the_samples():
    first = Row(torch.tensor([1, 2, 3, 4]).int(), torch.tensor([False, True, True, True]), (3, 1))
    batch = collate([(7, first), (2, row(2))])
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, 4], [0, 1, IGNORED, IGNORED]]
    assert batch["segments"].tolist() == [[1, 1, 1, 2], [1, 1, 0, 0]]
    assert batch["rows"].tolist() == [7, 2] and "hidden" not in batch


def test_fingerprint_sees_every_token_label_and_border(tmp_path, tokenizer):
    records = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6, 7]}]
    base = load(tmp_path, records, tokenizer).fingerprint()
    assert base == load(tmp_path, records, tokenizer).fingerprint()
    assert base != load(tmp_path, records[::-1], tokenizer).fingerprint()
    assert base != load(tmp_path, records, tokenizer, packing=True).fingerprint()
    assert base != load(tmp_path, [{"input_ids": [1, 2, 3, 5]}, records[1]], tokenizer).fingerprint()
