"""Claims about answers of a given form, and about calls of tools."""

import json
import re

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai")

from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from running import byte_tokenizer, serve

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": SCHEMA}}
    for name in ("first", "second")
]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def fits(text):
    found = json.loads(text)
    return found.keys() == {"kind", "count"} and found["kind"] in ("a", "b") and 0 <= found["count"] <= 99


@pytest.mark.parametrize("temperature", [0, 1.0, 1.5])
@pytest.mark.parametrize("plain", [False, True])
def test_json_always_fits_its_schema(client, temperature, plain):
    form = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA, "strict": True}}
    settings = dict(model="tiny", messages=HELLO, temperature=temperature, response_format=form, n=6, seed=3, max_tokens=60)
    answer = client.chat.completions.create(**settings, extra_body={"medusa": {"plain": plain}})
    assert all(choice.finish_reason == "stop" and fits(choice.message.content) for choice in answer.choices)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no", "é"]}, r"yes|no|é"),
        ({"grammar": 'start: "a" "b"+ "c"'}, r"ab+c"),
        ({"json": json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2})}, r"\[\w+,\w+\]"),
    ],
)
def test_other_forms(served, form, pattern):
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 60, "temperature": 1, "seed": 1, "structured_outputs": form}
    choice = served.post("/v1/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and re.fullmatch(pattern, choice["text"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "second"}}])
@pytest.mark.parametrize("parallel", [None, False])
def test_a_call_that_is_asked_for_is_made(client, choice, parallel):
    settings = dict(model="tiny", messages=HELLO, tools=TOOLS, tool_choice=choice, seed=4, temperature=1, max_tokens=90)
    if parallel is not None:
        settings["parallel_tool_calls"] = parallel
    answer = client.chat.completions.create(**settings)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    found = answer.choices[0]
    (call,) = found.message.tool_calls
    assert found.finish_reason == "tool_calls" and found.message.content is None and fits(call.function.arguments)
    assert call.function.name == "second" if choice != "required" else call.function.name in ("first", "second")
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**settings, stream=True)]
    streamed = [each for delta in deltas for each in delta.tool_calls or ()]
    assert [(each.index, each.function.name, each.function.arguments) for each in streamed] == [
        (0, call.function.name, call.function.arguments)
    ]
    assert not any(delta.content for delta in deltas)


def test_several_calls_if_they_are_wanted(client):
    settings = dict(model="tiny", messages=HELLO, tools=TOOLS, tool_choice="required", temperature=1, max_tokens=400)
    counts = set()
    for seed in range(4):
        choice = client.chat.completions.create(**settings, parallel_tool_calls=True, seed=seed).choices[0]
        if choice.finish_reason == "tool_calls":
            counts.add(len(choice.message.tool_calls))
            assert all(fits(call.function.arguments) for call in choice.message.tool_calls)
    assert counts and min(counts) >= 1


def test_responses_call_tools_too(client):
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    settings = dict(model="tiny", input="Hello", tools=tools, tool_choice="required", temperature=1, max_output_tokens=90)
    answer = client.responses.create(**settings, extra_body={"seed": 2})
    Response.model_validate(answer.model_dump(warnings=False))
    (item,) = answer.output
    assert item.type == "function_call" and fits(item.arguments) and answer.status == "completed"
    events = list(client.responses.create(**settings, extra_body={"seed": 2}, stream=True))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [item.arguments] and events[-1].response.output[0].name == item.name


def test_a_conversation_with_calls_reaches_the_template(served, model):
    """A template that knows tools gets them, with the arguments of calls as objects."""
    template = (
        "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}{% for message in messages %}"
        "{{ message['role'] }}:{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
        "<tool_call>{{ call['function']['arguments']['kind'] }}{% endfor %};{% endfor %}"
    )
    call = {"id": "c", "type": "function", "function": {"name": "first", "arguments": '{"kind": "a"}'}}
    said = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "done"}]
    with serve(model, byte_tokenizer(template)) as other:
        ids = other.post("/tokenize", {"messages": said}).json()["tokens"]
        text = other.post("/detokenize", {"tokens": ids}).json()["prompt"]
        assert text == "user:Hello;assistant:<tool_call>a;tool:done;"
        body = {"model": "tiny", "messages": said, "max_tokens": 2, "tools": TOOLS, "temperature": 0}
        with_tools = other.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]  # auto: the family is known
        assert with_tools == len(ids) + len("[first][second]")


def test_a_json_answer_that_is_cut_off_says_so(client):
    form = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA}}
    choice = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, max_tokens=3).choices[0]
    assert choice.finish_reason == "length" and len(choice.message.content) == 3


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("<tool_call>", 'Let me see. <tool_call>{"name": "first", "arguments": {"kind": "a"}}</tool_call>'),
        ('<|python_tag|>"parameters":', '{"name": "first", "parameters": {"kind": "a"}}'),
    ],
)
def test_calls_that_a_model_makes_by_itself_are_read(model, family, said):
    """The text of such a model is written by a random one here, under a grammar that leaves it no choice."""
    template = "{# " + family + " #}{{ tools or 0 }}{{ messages[0]['content'] }}"
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 120, "tools": TOOLS, "structured_outputs": {"choice": [said]}}
    with serve(model, byte_tokenizer(template)) as other:
        choice = other.post("/v1/chat/completions", body).json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and json.loads(call["function"]["arguments"]) == {"kind": "a"}
        deltas = [event["choices"][0]["delta"] for event in other.stream("/v1/chat/completions", body)]
        assert [each["function"]["name"] for delta in deltas for each in delta.get("tool_calls", ())] == ["first"]
        text = "".join(delta.get("content") or "" for delta in deltas)
        assert text == (choice["message"]["content"] or "") and "tool_call" not in text
        without = other.post("/v1/chat/completions", {**body, "tool_choice": "none"}).json()["choices"][0]
        assert without["message"]["content"] == said and "tool_calls" not in without["message"]


@pytest.mark.parametrize("plain", [False, True])
def test_a_stop_token_that_the_form_needs_ends_the_answer(served, plain):
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 20, "medusa": {"plain": plain}, "stop_token_ids": [ord("{")]}
    form = {"structured_outputs": {"json": SCHEMA}}
    choice = served.post("/v1/completions", body | form).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", ord("{"))
    kept = served.post("/v1/completions", body | form | {"include_stop_str_in_output": True, "logprobs": 1}).json()
    assert kept["choices"][0]["text"] == "{" and len(kept["choices"][0]["logprobs"]["tokens"]) == 1
