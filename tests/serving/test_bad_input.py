"""Claims about bad input: each call of this table is refused, in OpenAI's shape, with a message that names what is wrong."""

import json

import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**fields):
    return CHAT, {"model": "tiny", "messages": HELLO, "max_tokens": 1, **fields}


def text(**fields):
    return TEXT, {"model": "tiny", "prompt": "Hello", "max_tokens": 1, **fields}


# Path, body, and a word of the message.
BAD = [
    # Types.
    *[
        (*make(**{field: value}), field)
        for make in (chat, text)
        for field, value in {
            "model": 5,
            "max_tokens": "10",
            "temperature": "hot",
            "top_p": [],
            "top_k": 1.5,
            "min_p": "0",
            "n": "2",
            "seed": 0.5,
            "stream": "yes",
            "stop": 7,
            "presence_penalty": {},
            "frequency_penalty": "1",
            "repetition_penalty": [1],
            "logit_bias": [1],
            "min_tokens": "1",
            "ignore_eos": "no",
            "stop_token_ids": 3,
            "stream_options": True,
            "response_format": "json",
            "medusa": "plain",
        }.items()
    ],
    # Ranges.
    *[
        (*make(**{field: value}), field)
        for make in (chat, text)
        for field, value in (
            ("max_tokens", -1),
            ("temperature", -0.1),
            ("temperature", 2.5),
            ("top_p", 0),
            ("top_p", 1.1),
            ("top_k", -2),
            ("min_p", 1.5),
            ("n", 0),
            ("n", 1000),
            ("seed", 2**63),
            ("presence_penalty", 3),
            ("frequency_penalty", -2.1),
            ("repetition_penalty", 0),
            ("stop", [""]),
            ("stop", ["a"] * 17),
            ("logit_bias", {"5": 101}),
            ("logit_bias", {"word": 1}),
            ("logit_bias", {"999999": 1}),
            ("logit_bias", {"-1": 1}),
            ("min_tokens", -1),
            ("min_tokens", 2),
            ("stop_token_ids", [-1]),
            ("stop_token_ids", [999999]),
        )
    ],
    # Fields that exclude or need one another, and those that this server does not have.
    *[
        (*make(**fields), word)
        for make in (chat, text)
        for fields, word in (
            ({"stream_options": {"include_usage": True}}, "stream_options"),
            ({"best_of": 3}, "best_of"),
            ({"guided_json": {"type": "object"}}, "guided_json"),
            ({"use_beam_search": True}, "use_beam_search"),
            ({"logits_processors": ["x"]}, "logits_processors"),
            ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
            ({"medusa": {"plain": True, "tree": "root"}}, "medusa"),
            ({"medusa": {"tree": {"paths": [[9, 9]]}}}, "tree"),
            ({"medusa": {"tree": {"paths": "x"}}}, "tree"),
            ({"medusa": {"tree": {"paths": [[0] * 50]}}}, "tree"),
            ({"medusa": {"tree": {"dynamic": {"num_nodes": 10**6}}}}, "tree"),
            ({"medusa": {"tree": "/etc/passwd"}}, "tree"),
            ({"medusa": {"acceptance": "loose"}}, "acceptance"),
            ({"medusa": {"acceptance": "typical"}, "temperature": 0}, "acceptance"),
            ({"medusa": {"epsilon": 0.5}, "temperature": 1}, "epsilon"),
            ({"medusa": {"trace": "all"}}, "trace"),
            ({"medusa": {"speed": 2}}, "speed"),
            ({"model": "other"}, "other"),
            ({"model": ""}, "model"),
            ({"max_tokens": 10**6}, "context"),
        )
    ],
    # Messages.
    (*chat(messages=[]), "messages"),
    (*chat(messages=None), "messages"),
    (*chat(messages="Hello"), "messages"),
    (*chat(messages=[5]), "messages"),
    (*chat(messages=[{"content": "Hello"}]), "role"),
    (*chat(messages=[{"role": "king", "content": "Hello"}]), "role"),
    (*chat(messages=[{"role": "user"}]), "content"),
    (*chat(messages=[{"role": "user", "content": None}]), "content"),
    (*chat(messages=[{"role": "user", "content": 5}]), "content"),
    (*chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]), "image_url"),
    (*chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]), "input_audio"),
    (*chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "text"),
    (*chat(messages=[{"role": "user", "content": "x", "tool_calls": []}, {"role": "tool"}]), "content"),
    (*chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]), "arguments"),
    (*chat(messages=[{"role": "user", "content": "x" * 5000}]), "context"),
    # Fields of chat completions.
    (*chat(max_completion_tokens=0), "max_completion_tokens"),
    (*chat(top_logprobs=2), "top_logprobs"),
    (*chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (*chat(logprobs=1), "logprobs"),
    (*chat(functions=[{"name": "f"}]), "functions"),
    (*chat(audio={"voice": "a"}), "audio"),
    (*chat(modalities=["audio"]), "modalities"),
    (*chat(chat_template="{{ 1 }}"), "chat_template"),
    (*chat(chat_template_kwargs={"chat_template": "x"}), "chat_template_kwargs"),
    (*chat(chat_template_kwargs={"tokenize": True}), "chat_template_kwargs"),
    (*chat(chat_template_kwargs={"a": {"b": 1}}), "chat_template_kwargs"),
    (*chat(documents=[{"text": "x"}]), "documents"),
    (*chat(echo=True), "echo"),
    (*chat(continue_final_message=True), "continue_final_message"),
    (*chat(tool_choice="required"), "tool_choice"),
    (*chat(tools=[TOOL]), "tool_choice"),
    (*chat(tools=[TOOL, TOOL], tool_choice="none"), "name"),
    (*chat(tools=[{"type": "web_search"}], tool_choice="none"), "tools"),
    (*chat(tools=[{"type": "function"}], tool_choice="none"), "function"),
    (*chat(tools=[{"type": "function", "function": {"name": "a b"}}], tool_choice="none"), "name"),
    (*chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), "g"),
    (*chat(tools=[TOOL], tool_choice="always"), "tool_choice"),
    (*chat(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"}), "response_format"),
    (*chat(response_format={"type": "json_object"}, ignore_eos=True), "ignore_eos"),
    (*chat(structured_outputs={"regex": "("}), "structured_outputs"),
    (*chat(structured_outputs={"grammar": "start: nothing"}), "structured_outputs"),
    (*chat(structured_outputs={"json": "{"}), "structured_outputs"),
    (*chat(structured_outputs={"json": {"type": "nothing"}}), "structured_outputs"),
    (*chat(structured_outputs={"choice": [""]}), "structured_outputs"),
    (*chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}), "response_format"),
    (*chat(tools=[{**TOOL, "function": {"name": "f", "parameters": {"type": "x"}}}], tool_choice="required"), "tools"),
    (*chat(response_format={"type": "xml"}), "response_format"),
    (*chat(response_format={"type": "json_schema"}), "json_schema"),
    (*chat(response_format={"type": "json_schema", "json_schema": {"schema": {}}}), "name"),
    (*chat(structured_outputs={}), "structured_outputs"),
    (*chat(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs"),
    (*chat(structured_outputs={"xml": "a"}), "structured_outputs"),
    # Fields of completions.
    (*text(prompt=None), "prompt"),
    (*text(prompt=[]), "prompt"),
    (*text(prompt=[[]]), "prompt"),
    (*text(prompt=[1.5]), "prompt"),
    (*text(prompt=["a", 5]), "prompt"),
    (*text(prompt=[999999]), "prompt"),
    (*text(prompt=[-1]), "prompt"),
    (*text(prompt={"a": 1}), "prompt"),
    (*text(prompt=["a"] * 65), "prompt"),
    (*text(prompt="x" * 5000), "context"),
    (*text(logprobs=21), "logprobs"),
    (*text(logprobs=True), "logprobs"),
    (*text(max_tokens=0), "max_tokens"),
    (*text(suffix="end"), "suffix"),
    (*text(tools=[TOOL]), "tools"),
    # Other endpoints.
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "1"}, "tokens"),
    ("/detokenize", {"tokens": [999999]}, "tokens"),
    ("/detokenize", {"tokens": [-5]}, "tokens"),
]
# Bodies that are not objects of JSON, with their type of content.
RAW = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"[]", "application/json"),
    (b"null", "application/json"),
    (b'"text"', "application/json"),
    (b"\xff\xfe", "application/json"),
    (b"[" * 100_000, "application/json"),
    (b'{"model": "tiny", "temperature": NaN}', "application/json"),
    (b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}", "application/json"),
    (b'{"model": "tiny", "prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}', "application/json"),
    (b'{"model": "tiny"}', "text/plain"),
    (b"model=tiny", "application/x-www-form-urlencoded"),
]


def problem(response):
    """The error of an answer, which has OpenAI's shape."""
    assert 400 <= response.status_code < 500 and response.status_code != 422, response.text
    found = response.json()
    assert found.keys() == {"error"} and found["error"].keys() == {"message", "type", "param", "code"}
    message = found["error"]["message"]
    assert isinstance(message, str) and message and "\n" not in message and len(message) <= 400
    assert "pydantic" not in message and "Traceback" not in message and "/src/" not in message
    return found["error"]


def test_the_table_is_long():
    assert len(BAD) + len(RAW) > 150


@pytest.mark.parametrize(("path", "body", "word"), BAD, ids=[f"{path}-{json.dumps(body)[:80]}" for path, body, _ in BAD])
def test_it_is_refused(served, path, body, word):
    error = problem(served.post(path, body))
    assert word in f"{error['message']} {error['param']}", error


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("body", "kind"), RAW, ids=[repr(body[:40]) for body, _ in RAW])
def test_a_body_that_is_no_json_object_is_refused(served, path, body, kind):
    problem(served.post(path, content=body, headers={"content-type": kind}))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("PUT", TEXT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/x", 404),
    ],
)
def test_wrong_paths_and_methods(served, method, path, status):
    import httpx

    response = httpx.request(method, served.url + path)
    assert response.status_code == status
    problem(response)


def test_the_server_still_answers_after_all_that(served):
    assert served.get("/ready").status_code == 200
    assert served.post(*chat(temperature=0)).status_code == 200
