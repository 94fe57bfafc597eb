"""Claims about calibration."""

from collections import Counter

import pytest
import torch

from medusa import MedusaModel, MedusaTree
from medusa.errors import InvalidInput
from medusa.tuning.calibrate import calibrate
from tiny import VOCAB, plain_greedy, random_heads, random_prompt, tiny_backbone


def test_calibration_counts_each_guess_where_decoding_asks_for_it():
    backbone = tiny_backbone()
    model = MedusaModel(backbone, random_heads(backbone, 2), MedusaTree([(0,)]))
    prompt, new = random_prompt(6), 12
    calibration = calibrate(model, [prompt[0]], max_new_tokens=new, ranks=VOCAB)
    tokens = plain_greedy(backbone, prompt, new)
    full = prompt[0].tolist() + tokens
    hits = [[0] * VOCAB for _ in range(2)]
    asked, together = [0, 0], Counter()
    with torch.no_grad():
        for t in range(5, len(full)):  # the last committed token, from the end of the prompt on
            h, path = model.hidden_states(torch.tensor([full[: t + 1]]))[0, -1], ()
            for k in range(2):
                if t + k + 2 < len(full):
                    rank = model.heads(h)[k].topk(VOCAB).indices.tolist().index(full[t + k + 2])
                    hits[k][rank] += 1
                    asked[k] += 1
                    path = (*path, rank)
                    together[path] += 1
    assert calibration.asked == asked
    assert dict(calibration.paths) == together and calibration.positions == asked[0]
    assert sum(abs(a - b) for x, y in zip(calibration.hits, hits, strict=True) for a, b in zip(x, y, strict=True)) == 0


def test_calibration_without_heads_is_refused():
    with pytest.raises(InvalidInput, match="no heads"):
        calibrate(MedusaModel(tiny_backbone()), [random_prompt(4)[0]])
