"""Claims about what OpenAI's own Python client sees."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai")

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from running import serve

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def strict(kind, answer):
    """The answer read with a model of OpenAI's that accepts no other types."""
    return kind.model_validate(answer, strict=True)


def test_models(client, served):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == served.service.longest


def test_a_chat_completion(client):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, seed=1, temperature=1)
    strict(ChatCompletion, answer.model_dump())
    assert answer.choices[0].message.role == "assistant" and answer._request_id in answer.id
    usage = answer.usage
    assert 1 <= usage.completion_tokens <= 12 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens < usage.completion_tokens and details.rejected_prediction_tokens > 0


@pytest.mark.parametrize("continuous", [False, True])
def test_a_stream_says_the_same_as_the_whole_answer(client, continuous):
    settings = dict(model="tiny", messages=HELLO, max_tokens=40, seed=5, temperature=1.0, n=2)
    whole = client.chat.completions.create(**settings)
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options=options))
    for chunk in chunks:
        strict(ChatCompletionChunk, chunk.model_dump())
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        assert [each.finish_reason for each in own if each.finish_reason] == [choice.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all((chunk.usage is not None) == continuous for chunk in chunks[:-1])


def test_chat_logprobs_are_of_the_text(client):
    settings = dict(model="tiny", messages=HELLO, max_tokens=10, temperature=0, logprobs=True, top_logprobs=3)
    settings["extra_body"] = {"skip_special_tokens": False}
    answer = strict(ChatCompletion, client.chat.completions.create(**settings).model_dump())
    entries = answer.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert text == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob <= 0
        assert math.isclose(entry.logprob, entry.top_logprobs[0].logprob, abs_tol=1e-5)  # greedy
    streamed = []
    for chunk in client.chat.completions.create(**settings, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_a_completion_of_several_prompts(client):
    settings = dict(model="tiny", prompt=["One", "Two"], n=2, max_tokens=6, temperature=0.9, seed=2)
    answer = strict(Completion, client.completions.create(**settings).model_dump())
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = client.completions.create(**{**settings, "prompt": "Two"})
    assert [choice.text for choice in answer.choices[2:]] == [choice.text for choice in alone.choices]
    streamed = [""] * 4
    for chunk in client.completions.create(**settings, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_token_ids_as_prompts(client, tokenizer):
    ids = tokenizer("Words").input_ids
    settings = dict(model="tiny", max_tokens=6, temperature=0)
    by_text = client.completions.create(prompt="Words", **settings).choices[0].text
    assert client.completions.create(prompt=ids, **settings).choices[0].text == by_text
    assert [choice.text for choice in client.completions.create(prompt=[ids, ids], **settings).choices] == [by_text] * 2


def test_echo_gives_the_prompts_log_probabilities(client, model, tokenizer):
    import torch

    prompt = "The quick brown fox"
    answer = client.completions.create(model="tiny", prompt=prompt, echo=True, max_tokens=1, logprobs=2, temperature=0)
    choice = answer.choices[0]
    ids = tokenizer(prompt).input_ids
    assert choice.text.startswith(prompt) and choice.logprobs.token_logprobs[0] is None
    with torch.inference_mode():
        logits = model.backbone(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert torch.allclose(torch.tensor(choice.logprobs.token_logprobs[1 : len(ids)]), wanted, atol=1e-4)
    assert choice.logprobs.text_offset[: len(ids)] == list(range(len(ids)))
    assert "".join(choice.logprobs.tokens[: len(ids)]) == prompt
    only = client.completions.create(model="tiny", prompt=prompt, echo=True, max_tokens=0, logprobs=1)
    assert only.choices[0].text == prompt and len(only.choices[0].logprobs.tokens) == len(ids)
    assert only.usage.completion_tokens == 0


def test_errors_are_those_of_openai(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="other", messages=HELLO)
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=10**6)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=[])


def test_an_async_client(served):
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            tasks = [
                client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, temperature=0) for _ in range(6)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*tasks)]

    assert len(set(asyncio.run(ask()))) == 1


@pytest.mark.parametrize("settings", [{"max_per_client": 2}, {"engine": {"slots": 1, "queue": 1}}])
def test_the_client_tries_again_when_its_share_or_the_queue_is_full(model, tokenizer, settings):
    with serve(model, tokenizer, **settings) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=50)
        long = {"model": "tiny", "messages": HELLO, "max_tokens": 500, "extra_body": {"ignore_eos": True}}
        streams = [client.chat.completions.create(**long, stream=True) for _ in range(2)]
        with pytest.raises((openai.RateLimitError, openai.InternalServerError)) as refused:
            client.with_options(max_retries=0).chat.completions.create(**long)
        assert refused.value.status_code == (429 if "max_per_client" in settings else 503)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(client.chat.completions.create, **{**long, "max_tokens": 20})
            for stream in streams:
                list(stream)
            assert waiting.result().usage.completion_tokens == 20
