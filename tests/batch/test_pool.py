"""Claims about the pool: rows come and go, and every request gets what it would get alone."""

import random

import pytest
import torch

from medusa import DynamicTree, MedusaModel, MedusaTree
from medusa.batch.pool import Request, decode_queue
from medusa.batch.rows import DecodingOptions
from medusa.errors import ContextOverflow
from medusa.generation.preparation import options_of_rows
from tiny import random_heads, random_prompt, random_tree, tiny_backbone

TREES = [MedusaTree([]), random_tree(seed=3, nodes=24), DynamicTree(12, 3, copied=4)]


@pytest.fixture(scope="module")
def model() -> MedusaModel:
    backbone = tiny_backbone(max_position_embeddings=512)
    return MedusaModel(backbone, random_heads(backbone), TREES[1])


def requests(number: int) -> list[Request]:
    chance = random.Random(0)
    return [Request(random_prompt(chance.randrange(1, 40), n)[0].tolist(), 100 + n, n) for n in range(number)]


def taking(waiting: list[Request]):
    left = iter(waiting)
    return lambda: next(left, None)


def options_for(model: MedusaModel, sampled: bool, **more) -> DecodingOptions:
    settings = {"max_new_tokens": 24, "do_sample": sampled, "temperature": 0.8 if sampled else None}
    settings |= {"repetition_penalty": more.pop("penalty", None), "eos_token_id": list(more.pop("eos_token_ids", ()))}
    return options_of_rows(model, "decode", **settings, **more)


@pytest.mark.parametrize("tree", TREES, ids=["plain", "static", "dynamic"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_every_request_gets_what_it_gets_alone(model, tree, sampled, rows):
    waiting = requests(13)
    eos = (5, 9, 11, 30)  # some end early, so that rows are freed at different steps
    options = options_for(model, sampled, eos_token_ids=eos)
    found = {done.request.tag: done for done in decode_queue(model, taking(waiting), rows, tree, options)}
    assert sorted(found) == list(range(13))
    settings = {"do_sample": True, "temperature": 0.8} if sampled else {}
    for request in waiting:
        alone = model.generate(
            torch.tensor([request.ids]),
            max_new_tokens=24,
            eos_token_id=list(eos),
            seed=request.seed,
            tree=MedusaTree([]),
            **settings,
        )
        assert found[request.tag].tokens == alone[0, len(request.ids) :].tolist()
        ended = found[request.tag].tokens[-1] in eos
        assert found[request.tag].finish_reason == ("eos" if ended else "length")


def test_processors_that_read_tokens_see_a_rows_own_alone(model):
    waiting = requests(7)
    options = options_for(model, False, penalty=1.3)
    found = {done.request.tag: done.tokens for done in decode_queue(model, taking(waiting), 3, TREES[1], options)}
    for request in waiting:
        alone = model.generate(torch.tensor([request.ids]), max_new_tokens=24, repetition_penalty=1.3, eos_token_id=[])
        assert found[request.tag] == alone[0, len(request.ids) :].tolist()


def test_requests_that_others_bring_about_join_as_well(model):
    waiting = requests(3)
    answers: dict[int, list[int]] = {}
    for done in decode_queue(model, lambda: waiting.pop(0) if waiting else None, 2, TREES[2], options_for(model, False)):
        answers[done.request.tag] = done.tokens
        if done.request.tag < 6:  # the conversation goes on
            waiting.append(Request(done.request.ids + done.tokens, 0, done.request.tag + 3))
    assert sorted(answers) == list(range(9))
    assert answers[3][:8] and len(answers[8]) == 24


def test_the_cache_grows_for_a_longer_prompt(model):
    waiting = [Request(random_prompt(4, 1)[0].tolist(), 1, 0), Request(random_prompt(300, 2)[0].tolist(), 2, 1)]
    found = {
        done.request.tag: done.tokens for done in decode_queue(model, taking(waiting), 1, TREES[2], options_for(model, False))
    }
    for request in waiting:
        alone = model.generate(torch.tensor([request.ids]), max_new_tokens=24, eos_token_id=[])
        assert found[request.tag] == alone[0, len(request.ids) :].tolist()


def test_a_request_beyond_the_context_is_refused(model):
    with pytest.raises(ContextOverflow):
        list(decode_queue(model, taking([Request([5] * 500)]), 2, TREES[0], options_for(model, False)))


def test_no_request_is_no_work(model, monkeypatch):
    monkeypatch.setattr(model, "new_cache", lambda *_: pytest.fail("work was done"))
    assert list(decode_queue(model, lambda: None, 4, TREES[0], options_for(model, False))) == []
