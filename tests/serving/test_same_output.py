"""The promise of the server: every field means the same with and without Medusa, alone and among others, streamed or not."""

import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from running import SPECIAL, Served, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REQUESTS = int(os.environ.get("MEDUSA_REQUESTS", "40"))  # 500 for the whole claim
WORDS = ["alpha", "beta", "gamma", "délta", "😀", "the", "a", "of", "to", "and", "code", "{", "}", "\n\n", ":"]


def random_text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))


def random_request(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body with random fields out of the whole interface."""

    def maybe(share: float) -> bool:
        return chance.random() < share

    path = chance.choice((CHAT, TEXT))
    body: dict[str, Any] = {"model": "tiny", "seed": chance.randrange(2**40), "max_tokens": chance.randint(1, 40)}
    if path == CHAT:
        roles = ["system"] * maybe(0.3) + ["user", "assistant"] * maybe(0.3) + ["user"]
        body["messages"] = [{"role": role, "content": random_text(chance)} for role in roles]
    else:
        prompts = [random_text(chance) for _ in range(chance.choice((1, 1, 2)))]
        body["prompt"] = prompts if len(prompts) > 1 or maybe(0.3) else prompts[0]
    ranges = {
        "temperature": (0.6, lambda: chance.choice((0, 0.5, 1.0, 1.5))),
        "top_p": (0.3, lambda: chance.choice((0.3, 0.9, 1))),
        "top_k": (0.3, lambda: chance.choice((-1, 0, 1, 5, 40))),
        "min_p": (0.2, lambda: chance.choice((0, 0.05, 0.3))),
        "presence_penalty": (0.2, lambda: chance.uniform(-2, 2)),
        "frequency_penalty": (0.2, lambda: chance.uniform(-2, 2)),
        "repetition_penalty": (0.2, lambda: chance.uniform(0.8, 1.5)),
        "logit_bias": (0.2, lambda: {str(chance.randrange(259)): chance.choice((-100, -5, 5, 100)) for _ in range(3)}),
        "stop": (0.4, lambda: chance.choice(("e", [" ", "\n"], ["a", "b", "é"], "zz"))),
        "stop_token_ids": (0.2, lambda: [chance.randrange(259) for _ in range(3)]),
        "include_stop_str_in_output": (0.2, lambda: True),
        "ignore_eos": (0.3, lambda: True),
        "min_tokens": (0.2, lambda: chance.randint(0, body["max_tokens"])),
        "skip_special_tokens": (0.2, lambda: False),
        "n": (0.3, lambda: chance.randint(1, 3)),
    }
    body |= {name: make() for name, (share, make) in ranges.items() if maybe(share)}
    if maybe(0.3):
        body |= {"logprobs": True, "top_logprobs": chance.randint(0, 4)} if path == CHAT else {"logprobs": chance.randint(0, 4)}
    if path == TEXT and maybe(0.3):
        body["echo"] = True
    if maybe(0.15):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        kinds = ({"regex": "[a-f]{2,9}"}, {"choice": ["yes", "no", "perhaps"]}, {"json": schema})
        body["structured_outputs"] = chance.choice(kinds)
        body.pop("ignore_eos", None)
    return path, body


def without_names(found: Any) -> Any:
    """An answer without ids, times and the counts of drafts."""
    if isinstance(found, dict):
        dropped = {"id", "created", "completion_tokens_details", "prompt_tokens_details"}
        return {key: without_names(value) for key, value in found.items() if key not in dropped}
    if isinstance(found, list):
        return [without_names(each) for each in found]
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, but for the rounding of log-probabilities."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return math.isclose(one, other, abs_tol=1e-4) if isinstance(one, float) and isinstance(other, float) else one == other


def streamed(served: Served, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A streamed answer, put together."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for event in served.stream(path, {**body, "stream_options": {"include_usage": True}}):
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            own = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "finish_reason": None, "stop_reason": None})
            own["text"] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
            if choice["logprobs"] is not None:
                own["logprobs"].append(choice["logprobs"])
            if choice["finish_reason"] is not None:
                own |= {"finish_reason": choice["finish_reason"], "stop_reason": choice["stop_reason"]}
    return {"choices": [choices[index] for index in sorted(choices)], "usage": without_names(usage)}


def together(logprobs: list[dict[str, Any]]) -> Any:
    """Log-probabilities of chunks as those of a whole answer."""
    found: dict[str, list[Any]] = {}
    for each in logprobs:
        for key, values in each.items():
            found.setdefault(key, []).extend(values or [])
    return without_names(found)


def whole(served: Served, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = served.post(path, body)
    assert response.status_code == 200, (body, response.text)
    return without_names(response.json())


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, dict[str, Any]]]:
    chance = random.Random(int(os.environ.get("MEDUSA_SEED", "0")))
    return [random_request(chance) for _ in range(REQUESTS)]


@pytest.fixture(scope="module")
def plain(served, requests) -> list[dict[str, Any]]:
    """What each request is answered by plain decoding, alone."""
    return [whole(served, path, {**body, "medusa": {"plain": True}}) for path, body in requests]


def test_medusa_says_what_plain_decoding_says(served, requests, plain):
    for (path, body), wanted in zip(requests, plain, strict=True):
        assert same(whole(served, path, body), wanted), json.dumps(body)


def test_a_crowd_changes_no_answer(served, requests, plain):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda request: whole(served, *request), requests))
    for (_, body), answer, wanted in zip(requests, answers, plain, strict=True):
        assert same(answer, wanted), json.dumps(body)


def test_trees_that_are_chosen_by_time_change_no_answer(model, tokenizer, requests, plain):
    with serve(model, tokenizer, engine={"measured": True, "slots": 6}) as served:
        test_a_crowd_changes_no_answer(served, requests, plain)
        nodes = {speed.nodes for speed in served.service.engine.load().speeds}
    assert nodes == {1, 48}  # plain decoding was tried beside the tree


def test_streams_say_the_same(served, requests, plain):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: streamed(served, *request), requests))
    for (path, body), answer, wanted in zip(requests, answers, plain, strict=True):
        assert answer["usage"] == wanted["usage"], json.dumps(body)
        for got, choice in zip(answer["choices"], wanted["choices"], strict=True):
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            assert got["text"] == text, json.dumps(body)
            assert (got["finish_reason"], got["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
            if choice["logprobs"] is not None:
                lists = {key: values or [] for key, values in choice["logprobs"].items()}
                assert same(together(got["logprobs"]), {key: lists[key] for key in together(got["logprobs"])}), json.dumps(body)
                assert got["logprobs"] or not any(lists.values())


def test_stop_strings_and_limits_hold(requests, plain):
    for (path, body), answer in zip(requests, plain, strict=True):
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
        for choice in answer["choices"]:
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            if stops and not body.get("include_stop_str_in_output") and not body.get("min_tokens") and not body.get("echo"):
                assert not any(stop in text for stop in stops), json.dumps(body)
            if body.get("skip_special_tokens", True) and not body.get("echo"):
                assert not any(token in text for token in SPECIAL)
        assert answer["usage"]["completion_tokens"] <= body["max_tokens"] * len(answer["choices"])


def test_the_other_kinds_of_tree_say_the_same(served, requests, plain):
    trees = [{"tree": "root"}, {"tree": {"paths": [[0], [0, 0], [1]]}}, {"tree": {"dynamic": {"num_nodes": 12, "depth": 3}}}]
    for number, ((path, body), wanted) in enumerate(zip(requests[:18], plain, strict=False)):
        assert same(whole(served, path, {**body, "medusa": trees[number % 3]}), wanted), json.dumps(body)
