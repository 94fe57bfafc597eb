"""Claims about the engine: whatever joins, leaves and fails beside it, a request gets what it gets alone."""

import json
import queue
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medusa.serving.engine
import medusa.serving.trees
from medusa import DynamicTree, Grammar, MedusaModel, MedusaTree
from medusa.backbone import compilation
from medusa.backbone.compilation import Compiled
from medusa.batch.rows import DecodingOptions
from medusa.decoding import decode
from medusa.errors import ContextOverflow, InvalidInput, InvalidTree
from medusa.generation.mixin import Collected
from medusa.generation.preparation import prepare
from medusa.sampling import Processors
from medusa.serving.engine import Engine
from medusa.serving.memory import pool_size, token_bytes
from medusa.serving.requests import QueueFull, Request
from medusa.serving.trees import TreeByLoad
from medusa.trees.files import TreeChoice
from test_decoding_fake import FakeModel, plain, trees
from tiny import random_heads, random_prompt, random_tree, tiny_backbone

few = settings(max_examples=30, derandomize=True, deadline=None)
CHOICE = TreeChoice({1: random_tree(seed=3, nodes=24), 2: DynamicTree(12, 3, copied=4), 4: MedusaTree([])})


class Received:
    """What a request gets."""

    def __init__(self):
        self.deliveries, self.done = [], threading.Event()

    def __call__(self, delivery):
        self.deliveries.append(delivery)
        if delivery.finish_reason is not None:
            self.done.set()

    def wait(self):
        assert self.done.wait(60), "the engine does not finish a request"
        return self

    @property
    def tokens(self):
        return [token for delivery in self.deliveries for token in delivery.tokens]

    @property
    def reason(self):
        return self.deliveries[-1].finish_reason


@pytest.fixture(scope="module")
def model() -> MedusaModel:
    backbone = tiny_backbone(max_position_embeddings=512)
    return MedusaModel(backbone, random_heads(backbone), CHOICE)


@pytest.fixture
def engine(model):
    made = Engine(model, slots=4, capacity=200, chunk=16)
    yield made
    made.close(drain=False)


def submitted(engine, *requests: Request) -> list[Received]:
    received = [Received() for _ in requests]
    for request, each in zip(requests, received, strict=True):
        engine.submit(request, each)
    return [each.wait() for each in received]


def options_of(model, ids: list[int], **given) -> DecodingOptions:
    """Options as `generate` makes them for a prompt."""
    prompt = torch.tensor([ids])
    given = {"eos_token_id": [], "max_new_tokens": 20, "seed": 0} | given
    return prepare(model, "generate", {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **given}).options


def alone(model, request: Request) -> list[int]:
    """A request's tokens by plain decoding of a batch of one."""
    assert request.number == 0
    collected = Collected()
    for _ in collected.follow(decode(model, torch.tensor([request.ids]), None, MedusaTree([]), request.options)):
        pass
    return collected.tokens[0]


def random_request(model, chance: random.Random) -> Request:
    ids = random_prompt(chance.randrange(1, 60), chance.randrange(10**6))[0].tolist()
    given = {"max_new_tokens": chance.randrange(1, 30), "seed": chance.randrange(100)}
    if chance.random() < 0.6:
        given |= {"do_sample": True}
        for name, values in {"temperature": (0.5, 1.7), "top_k": (3, 20), "top_p": (0.6, 0.95), "min_p": (0.02, 0.1)}.items():
            if chance.random() < 0.4:
                given[name] = chance.choice(values)
    if chance.random() < 0.3:
        given |= {"repetition_penalty": 1.3}
    if chance.random() < 0.3:
        given |= {"eos_token_id": [5, 9, 11, 30]}
    tree = chance.choice([None, None, None, MedusaTree([]), random_tree(seed=5, nodes=9)])
    return Request(ids, options_of(model, ids, **given), tree=tree)


@few
@given(
    st.integers(0, 1000),
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 10), min_size=1, max_size=9),
            st.builds(
                DecodingOptions,
                max_new_tokens=st.integers(1, 14),
                do_sample=st.booleans(),
                eos_token_ids=st.lists(st.integers(0, 10), max_size=2).map(tuple),
                seed=st.integers(0, 100),
            ),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=8,
    ),
    trees,
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_requests_get_what_plain_decoding_gives_on_a_model_of_tables(seed, asked, tree, slots, chunk):
    fake = FakeModel(seed)
    engine = Engine(fake, slots, capacity=60, tree=tree, chunk=chunk)
    requests = [Request(ids, options, number) for ids, options, number in asked]
    found = submitted(engine, *requests)
    engine.close()
    for request, got in zip(requests, found, strict=True):
        wanted = plain(fake, request.ids, request.options, (request.options.seed, request.number))
        assert (got.tokens, got.reason) == wanted


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_any_company_and_settings_give_what_a_request_gets_alone(model, slots):
    chance = random.Random(slots)
    requests = [random_request(model, chance) for _ in range(24)]
    engine = Engine(model, slots, capacity=200, chunk=16)
    found = submitted(engine, *requests)
    engine.close()
    for request, got in zip(requests, found, strict=True):
        assert got.tokens == alone(model, request)


def test_real_prompts_in_a_crowd_get_what_plain_decoding_gives_them(embedded_model):
    text = "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n"
    ids = [3 + ord(letter) % 90 for letter in text]
    requests = []
    for number in range(8):
        prompt = ids[: 20 + 11 * number]
        sampled = {"do_sample": True, "temperature": 0.3 + 0.1 * number, "top_p": 0.9} if number % 2 else {}
        requests.append(Request(prompt, options_of(embedded_model, prompt, max_new_tokens=24, seed=number, **sampled)))
    engine = Engine(embedded_model, slots=3, capacity=256, chunk=32)
    found = submitted(engine, *requests)
    engine.close()
    assert sum(len(got.tokens) for got in found) > 1.3 * sum(len(got.deliveries) for got in found)  # drafts were accepted
    for request, got in zip(requests, found, strict=True):
        assert got.tokens == alone(embedded_model, request)


def test_grammars_and_penalties_in_a_crowd(embedded_model, embedded_tokenizer):
    pytest.importorskip("llguidance")
    ids = embedded_tokenizer("# a record\nrecord = ")["input_ids"]
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "line": {"enum": [1, 20]}}}
    strict = {**schema, "required": ["name", "line"], "additionalProperties": False}
    grammars = Grammar.json(strict, embedded_tokenizer), Grammar.choice(["left", "right"], embedded_tokenizer), None
    requests = []
    for number in range(9):
        given = {"grammar": grammars[number % 3], "do_sample": number > 3, "seed": number, "max_new_tokens": 48}
        given |= {"eos_token_id": None, "frequency_penalty": 0.5 if number % 2 else None}
        requests.append(Request(ids, options_of(embedded_model, ids, **given)))
    engine = Engine(embedded_model, slots=4, capacity=256)
    found = submitted(engine, *requests)
    engine.close()
    for number, (request, got) in enumerate(zip(requests, found, strict=True)):
        assert got.tokens == alone(embedded_model, request)
        text = embedded_tokenizer.decode(got.tokens, skip_special_tokens=True)
        if number % 3 == 0:
            assert got.reason == "eos" and set(json.loads(text)) == {"name", "line"}
        if number % 3 == 1:
            assert text in ("left", "right")


def test_a_random_life_loses_no_slot(model):
    chance = random.Random(0)
    engine = Engine(model, slots=3, capacity=200, queue=6, chunk=8)
    requests = [random_request(model, chance) for _ in range(40)]
    refused, running = 0, []
    for number in range(300):
        request = chance.choice(requests)
        received = Received()
        try:
            ticket = engine.submit(request, received)
        except QueueFull:
            refused += 1
            chance.choice(running)[1].wait()
            continue
        running.append((request, received))
        if chance.random() < 0.3:
            ticket.cancel()
            ticket.cancel()
        if number % 7 == 0:
            received.wait()
        assert engine.load().waiting <= 9
    ends = {"eos": 0, "length": 0, "cancelled": 0}
    for request, received in running:
        received.wait()
        ends[received.reason] += 1
        wanted = request_tokens(model, request)
        assert received.tokens == (wanted[: len(received.tokens)] if received.reason == "cancelled" else wanted)
        assert [delivery.finish_reason is not None for delivery in received.deliveries].count(True) == 1
    assert refused and all(ends.values())
    load = engine.load()
    assert (load.running, load.waiting) == (0, 0)
    assert len(submitted(engine, *requests[:4])) == 4  # all slots still serve
    engine.close()
    assert not engine.alive()


_alone: dict[int, list[int]] = {}


def request_tokens(model, request: Request) -> list[int]:
    if id(request) not in _alone:
        _alone[id(request)] = alone(model, request)
    return _alone[id(request)]


def test_a_request_cancelled_while_its_prompt_is_read_leaves_its_neighbours_as_they_are(model, engine):
    ids = random_prompt(50, 1)[0].tolist()
    long = Request(random_prompt(150, 2)[0].tolist(), options_of(model, ids))
    neighbour = Request(ids, options_of(model, ids, max_new_tokens=60))
    beside = Received()
    ticket_of_long: queue.Queue = queue.Queue()

    def deliver(delivery):
        beside(delivery)
        if len(beside.deliveries) == 3:  # two chunks of the other prompt have been read
            ticket_of_long.get().cancel()

    engine.submit(neighbour, deliver)
    gone = Received()
    ticket_of_long.put(engine.submit(long, gone))
    assert beside.wait().tokens == alone(model, neighbour)
    assert gone.wait().reason == "cancelled" and gone.tokens == []


def test_prompts_that_begin_like_earlier_texts_are_read_from_there(model, engine):
    ids = random_prompt(60, 4)[0].tolist()
    first = Request(ids, options_of(model, ids, max_new_tokens=10))
    (got,) = submitted(engine, first)
    assert got.deliveries[0].cached == 0
    more = ids + got.tokens + [7, 8, 9]
    second = Request(more, options_of(model, more, do_sample=True))
    other = Request([3, *ids], options_of(model, [3, *ids]))
    again, elsewhere = submitted(engine, second, other)
    assert again.deliveries[0].cached == len(ids) + 9  # the last token is not trusted to be in the cache
    assert elsewhere.deliveries[0].cached == 0
    assert again.tokens == alone(model, second) and elsewhere.tokens == alone(model, other)
    (same,) = submitted(engine, first)
    assert same.deliveries[0].cached == len(ids) - 1 and same.tokens == got.tokens
    (anew,) = submitted(engine, replace(first, reuse=False))
    assert anew.deliveries[0].cached == 0 and anew.tokens == got.tokens


def test_log_probabilities_are_those_of_a_fresh_pass(model, engine):
    ids = random_prompt(40, 5)[0].tolist()
    options = options_of(model, ids, do_sample=True, temperature=1.3, top_k=9)
    asked = Request(ids, options, logprobs=3, prompt_logprobs=2)
    (got,) = submitted(engine, asked)
    text = torch.tensor([ids + got.tokens])
    with torch.no_grad():
        log_p = model.backbone(text).logits[0].log_softmax(-1)
    given = [one for delivery in got.deliveries for one in delivery.logprobs]
    assert [one.token for one in given] == got.tokens
    for place, one in enumerate(given, len(ids)):
        assert one.logprob == pytest.approx(float(log_p[place - 1, one.token]), abs=1e-4)
        assert [token for token, _ in one.top] == log_p[place - 1].topk(3).indices.tolist()
    prompt = got.deliveries[0].prompt_logprobs
    assert prompt[0] is None and [one.token for one in prompt[1:]] == ids[1:]
    for place, one in enumerate(prompt[1:], 1):
        assert one.logprob == pytest.approx(float(log_p[place - 1, one.token]), abs=1e-4)


@pytest.mark.parametrize("tree", [random_tree(seed=3, nodes=24), DynamicTree(12, 3, copied=4), MedusaTree([])])
def test_a_trace_is_a_tree_whose_accepted_path_is_what_was_delivered(model, engine, tree):
    ids = random_prompt(40, 6)[0].tolist()
    options = options_of(model, ids, eos_token_id=[5, 9, 11, 30], do_sample=True)
    (got,) = submitted(engine, Request(ids, options, tree=tree, trace=True))
    for delivery in got.deliveries:
        nodes = delivery.nodes
        assert [node.token for node in nodes if node.accepted] == delivery.tokens
        assert nodes[0].parent == 0 and nodes[0].probability == 1
        assert all(node.parent < number for number, node in enumerate(nodes[1:], 1))
        assert all(nodes[node.parent].accepted for node in nodes if node.accepted)
        assert len(nodes) in (delivery.drafted + 1, 1)
        for parent in range(len(nodes)):
            children = {node.token: node.probability for node in nodes[1:] if node.parent == parent}
            assert sum(children.values()) <= 1 + 1e-5
    plain_steps = [delivery for delivery in got.deliveries if len(delivery.tokens) > 1]
    assert tree != MedusaTree([]) or not plain_steps


def test_a_request_that_raises_ends_alone(model, engine):
    ids = random_prompt(30, 7)[0].tolist()

    def broken(text, scores):
        if text.shape[1] > len(ids) + 4:
            raise ZeroDivisionError("a processor is broken")
        return scores

    def at_once(text, scores):
        raise ZeroDivisionError("it never worked")

    def stops(token):
        raise KeyError(token)

    good = Request(ids, options_of(model, ids, max_new_tokens=40))
    bad = Request(ids, DecodingOptions(40, processors=Processors(((broken, "tokens"),))))
    worse = Request(ids, DecodingOptions(40, processors=Processors(((at_once, "tokens"),))))
    ending = Request(ids, options_of(model, ids), ends=stops)
    fine, failed, failed_at_once, failed_to_end = submitted(engine, good, bad, worse, ending)
    assert fine.tokens == alone(model, good) and fine.reason == "length"
    for got, kind in ((failed, ZeroDivisionError), (failed_at_once, ZeroDivisionError), (failed_to_end, KeyError)):
        assert got.reason == "error" and isinstance(got.deliveries[-1].error, kind)
    assert engine.alive() and submitted(engine, good)[0].tokens == fine.tokens


def test_a_step_that_fails_ends_its_requests_and_no_others(model, engine, monkeypatch):
    ids = random_prompt(30, 8)[0].tolist()
    request = Request(ids, options_of(model, ids))
    wanted = alone(model, request)

    def broken(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "draft_and_verify", broken)
        (got,) = submitted(engine, request)
        assert got.reason == "error" and "out of memory" in str(got.deliveries[-1].error)
    with monkeypatch.context() as patch:
        patch.setattr(model, "extend", broken)
        assert submitted(engine, request)[0].reason == "error"
    assert submitted(engine, request)[0].tokens == wanted


def test_ends_stops_a_request_inside_a_path(model, engine):
    ids = random_prompt(30, 9)[0].tolist()
    wanted = alone(model, Request(ids, options_of(model, ids)))
    seen = []

    def ends(token):
        seen.append(token)
        return len(seen) == 5

    (got,) = submitted(engine, Request(ids, options_of(model, ids), ends=ends))
    assert got.tokens == wanted[:5] == seen and got.reason == "stop"


def test_a_receiver_that_fails_is_gone(model, engine):
    ids = random_prompt(30, 10)[0].tolist()

    def gone(delivery):
        raise ConnectionError

    engine.submit(Request(ids, options_of(model, ids, max_new_tokens=100)), gone)
    request = Request(ids, options_of(model, ids))
    assert submitted(engine, request)[0].tokens == alone(model, request)


def test_requests_that_do_not_fit_are_refused_at_once(model, engine):
    options = DecodingOptions(20)
    with pytest.raises(ContextOverflow, match="that a slot of 200"):
        engine.submit(Request([5] * 190, options), print)
    with pytest.raises(ContextOverflow, match="context of 512"):
        engine.submit(Request([5] * 510, options), print)
    with pytest.raises(InvalidInput, match="empty"):
        engine.submit(Request([], options), print)
    with pytest.raises(InvalidInput, match="vocabulary"):
        engine.submit(Request([64], options), print)
    with pytest.raises(InvalidTree):
        engine.submit(Request([5], options, tree=MedusaTree([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)])), print)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_finishes_or_cancels_what_there_is(model, drain):
    engine = Engine(model, slots=2, capacity=200)
    ids = random_prompt(30, 11)[0].tolist()
    requests = [Request(ids, options_of(model, ids, max_new_tokens=100, seed=n, do_sample=True)) for n in range(5)]
    received = [Received() for _ in requests]
    for request, each in zip(requests, received, strict=True):
        engine.submit(request, each)
    engine.close(drain)
    assert {each.reason for each in received} == ({"length"} if drain else {"cancelled"})
    with pytest.raises(QueueFull, match="shutting down"):
        engine.submit(requests[0], print)


def test_closing_cancels_what_takes_too_long(model):
    engine = Engine(model, slots=1, capacity=500)
    ids = random_prompt(30, 11)[0].tolist()
    received, begun = Received(), threading.Event()

    def slow(delivery):
        received(delivery)
        begun.set()
        time.sleep(0.02)

    engine.submit(Request(ids, options_of(model, ids, max_new_tokens=400), tree=MedusaTree([])), slow)
    assert begun.wait(60)
    engine.close(drain=True, timeout=0.05)
    assert received.wait().reason == "cancelled"


def test_trees_that_change_with_measured_times_change_no_output(model, monkeypatch):
    chance = random.Random(3)
    requests = [random_request(model, chance) for _ in range(40)]
    monkeypatch.setattr(medusa.serving.trees, "LEAST_STEPS", 4)
    monkeypatch.setattr(TreeByLoad, "note", lambda self, _, tokens, note=TreeByLoad.note: note(self, chance.random(), tokens))
    engine = Engine(model, slots=4, capacity=200, chunk=16, measured=True)
    found = submitted(engine, *requests)
    speeds = engine.load().speeds
    engine.close()
    assert {speed.rows for speed in speeds} >= {1, 2, 3} and len({speed.nodes for speed in speeds}) == 3
    assert {delivery.drafted for got in found for delivery in got.deliveries} >= {0, 11, 23}
    for request, got in zip(requests, found, strict=True):
        assert got.tokens == alone(model, request)


def test_one_request_costs_what_a_batch_of_one_costs(model, monkeypatch):
    engine, batches = Engine(model, slots=8, capacity=200), []
    verified = model.draft_and_verify

    def noted(root, *args):
        batches.append(len(root))
        return verified(root, *args)

    monkeypatch.setattr(model, "draft_and_verify", noted)
    ids = random_prompt(30, 12)[0].tolist()
    steps = submitted(engine, Request(ids, options_of(model, ids)))[0].deliveries
    assert set(batches) == {1} and len(batches) in (len(steps), len(steps) - 1)
    engine.close()


def test_compiled_steps_of_a_few_shapes_give_the_same(model, monkeypatch):
    monkeypatch.setattr(compilation, "load_graph", None)
    monkeypatch.setattr(compilation, "compile_graph", lambda step, *_, **__: step)
    monkeypatch.setattr(medusa.serving.engine, "PAUSE", 0.01)
    monkeypatch.setattr(model, "_compiled", Compiled(model, noise=0.0))
    chance = random.Random(5)
    requests = [random_request(model, chance) for _ in range(24)]
    engine = Engine(model, slots=6, capacity=400, chunk=16, compiled=True)
    first = submitted(engine, requests[0])[0]  # uncompiled, if no graph is ready yet
    while engine.load().graphs_left:
        time.sleep(0.01)
    shapes = set(model.compiled._graphs)
    found = [first, *submitted(engine, *requests[1:])]
    unguided = replace(requests[0], tree=None, options=options_of(model, requests[0].ids))
    for tree in (None, MedusaTree([])):  # plain decoding is compared with the tree: neither may be the only one compiled
        assert all(each.compiled for each in submitted(engine, replace(unguided, tree=tree))[0].deliveries)
    engine.close()
    # For 1 row a tree and none, for 2 a tree, for 4 the trees of 3 rows and of 4, one for 6; each sees 256 slots or all.
    assert len(shapes) == 2 * 6 and shapes == set(model.compiled._graphs)
    for request, got in zip(requests, found, strict=True):
        assert got.tokens == alone(model, request)


def test_the_pool_takes_half_of_what_is_free(model):
    each = token_bytes(model)
    assert each == 2 * 4 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    size = pool_size(model, free=512 * each * 10)
    assert size.capacity == 512 and size.slots == 5 and size.bytes == 5 * 512 * each
    assert pool_size(model, free=10**12).slots == 16
    assert pool_size(model, slots=3, free=900 * each).capacity == 256
    with pytest.raises(InvalidInput, match=r"are free; lower --slots or --capacity: 100 tokens fit"):
        pool_size(model, slots=2, capacity=512, free=100 * each)
