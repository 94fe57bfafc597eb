"""Claims about calibration."""

from collections import Counter

import pytest
import torch

from medusa import MedusaModel, MedusaTree
from medusa.errors import InvalidInput
from medusa.trees.calibration import Calibration, wilson
from medusa.tuning import recording as module
from medusa.tuning.recording import record
from tiny import VOCAB, plain_greedy, random_heads, random_prompt, tiny_backbone


@pytest.fixture(scope="module")
def model() -> MedusaModel:
    backbone = tiny_backbone()
    return MedusaModel(backbone, random_heads(backbone, 2), MedusaTree([(0,)]))


def test_calibration_counts_each_guess_where_decoding_asks_for_it(model):
    prompt, new = random_prompt(6), 12
    calibration = Calibration.of(record(model, [prompt[0]], max_new_tokens=new, ranks=VOCAB))
    full = prompt[0].tolist() + plain_greedy(model.backbone, prompt, new + 2)
    hits, together = [[0] * VOCAB for _ in range(2)], Counter()
    with torch.no_grad():
        for t in range(5, 5 + new):  # the last committed token, from the end of the prompt on
            h, path = model.hidden_states(torch.tensor([full[: t + 1]]))[0, -1], ()
            for k in range(2):
                rank = model.heads(h)[k].topk(VOCAB).indices.tolist().index(full[t + k + 2])
                hits[k][rank] += 1
                path = (*path, rank)
                together[path] += 1
    assert calibration.hits == hits and calibration.positions == new
    assert dict(calibration.paths) == together


def test_conditional_accuracies_are_of_the_places_where_the_path_came_true():
    calibration = Calibration([[6, 2], [5, 3]], 10, [((0,), 6), ((0, 0), 3), ((1,), 2), ((0, 1), 1)])
    assert calibration.conditional(()) == [0.6, 0.2]
    assert calibration.conditional((0,)) == [0.5, 1 / 6]
    assert calibration.conditional((1,)) == [0.0, 0.0]
    low, high = calibration.intervals()[0][0]
    assert low < 0.6 < high and wilson(0, 0) == (0.0, 1.0)


def test_batches_of_any_size_record_the_same(model):
    prompts = [random_prompt(length, seed=length)[0] for length in (4, 9, 6)]
    alone, together = (record(model, prompts, 8, ranks=5, batch_size=size) for size in (1, 3))
    for a, b in zip(alone, together, strict=True):
        assert a.ids.equal(b.ids) and a.start == b.start and a.guesses.equal(b.guesses)
        torch.testing.assert_close(a.log_p, b.log_p, rtol=1e-4, atol=1e-4)


def test_recording_goes_on_from_what_a_folder_holds(model, tmp_path, monkeypatch):
    prompts = [random_prompt(6, seed=seed)[0] for seed in range(4)]
    options = {"max_new_tokens": 8, "ranks": 5, "temperature": 0.9, "batch_size": 2}
    wanted = record(model, prompts, **options)
    real, calls = module._record, []

    def dies_at_the_second_batch(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_record", dies_at_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        record(model, prompts, **options, folder=tmp_path)
    got = record(model, prompts, **options, folder=tmp_path)
    assert len(calls) == 3  # the first batch was not recorded again
    assert all(a.ids.equal(b.ids) and a.log_p.equal(b.log_p) for a, b in zip(got, wanted, strict=True))
    with pytest.raises(InvalidInput, match="was made with"):
        record(model, prompts, **options | {"ranks": 4}, folder=tmp_path)
    (tmp_path / "texts-00002.safetensors").write_bytes(b"broken")
    with pytest.raises(InvalidInput, match="is broken"):
        record(model, prompts, **options, folder=tmp_path)


def test_calibration_without_heads_is_refused():
    with pytest.raises(InvalidInput, match="no heads"):
        record(MedusaModel(tiny_backbone()), [random_prompt(4)[0]])
