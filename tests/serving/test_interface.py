"""Claims about the whole interface: what schemathesis finds, and the endpoint of responses."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("schemathesis")
openai = pytest.importorskip("openai")

from openai.types.responses import Response

HELLO = [{"role": "user", "content": "Hello"}]


def test_schemathesis_finds_no_fault(served, tmp_path):
    interface = served.get("/openapi.json").json()
    for body in interface["components"]["schemas"].values():
        fields = body.get("properties", {})
        if "model" in body.get("required", ()):  # so that most bodies get past their name, and answers are short
            fields["model"] = {"type": "string", "enum": ["tiny"]}
            for limit in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
                if limit in fields:
                    fields[limit] = {"type": "integer", "minimum": 1, "maximum": 2}
                    body["required"] = [*body["required"], limit]
    (tmp_path / "openapi.json").write_text(json.dumps(interface))
    # Not that every body of the right types is accepted: ids have to be in the vocabulary, and some fields exclude others.
    command = ["--phases", "coverage,fuzzing", "-n", "12", "--exclude-checks", "positive_data_acceptance", "--seed", "1"]
    found = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", served.url, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_a_response(client):
    settings = {"model": "tiny", "input": "Hello", "max_output_tokens": 12, "temperature": 0, "instructions": "Be brief."}
    answer = client.responses.create(**settings)
    Response.model_validate(answer.model_dump(warnings=False))
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, *HELLO],
        max_tokens=12,
        temperature=0,
    )
    assert answer.output_text == chat.choices[0].message.content and answer.usage.output_tokens == 12
    events = list(client.responses.create(**settings, stream=True))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == answer.output_text == events[-1].response.output_text and events[-1].type == "response.incomplete"


def test_responses_keep_no_state(client):
    for fields in ({"previous_response_id": "resp_1"}, {"background": True}, {"conversation": "c"}):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="tiny", input="Hello", **fields)
        assert "state" in error.value.message


def test_a_conversation_with_calls_is_understood(client):
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": "5"}
    answer = client.responses.create(model="tiny", input=[*HELLO, call, output], max_output_tokens=3, temperature=0)
    assert answer.usage.input_tokens > len("Hello")
    for bad in ([{"type": "computer_call"}], [{"role": "user", "content": [{"type": "input_image"}]}], []):
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="tiny", input=bad)


def test_the_interface_names_the_fields_of_requests(served):
    found = served.get("/openapi.json").json()
    assert json.dumps(found).count("422") == 0
    assert {"messages", "logit_bias", "medusa"} <= found["components"]["schemas"]["ChatRequest"]["properties"].keys()
