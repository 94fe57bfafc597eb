"""Schemas: the bodies of OpenAI's interface, with vLLM's fields and our own; other fields are ignored, or refused."""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from medusa.runs.files import is_unicode

log = logging.getLogger("medusa.serve")
T = TypeVar("T")
_warned: set[str] = set()  # names of unknown fields that the log has

# Fields that would change the output if they were followed, so a call with one is refused: a value that switches it off is not.
UNSUPPORTED: dict[str, str] = {
    "functions": "pass tools",
    "function_call": "pass tool_choice",
    "audio": "this server writes text",
    "web_search_options": "this server has no search",
    "best_of": "pass n",
    "use_beam_search": "Medusa decodes greedily or by sampling",
    "length_penalty": "it is for beam search",
    "prompt_logprobs": "pass echo and logprobs to /v1/completions",
    "logits_processors": "a request cannot bring code",
    "chat_template": "a request cannot bring a template",
    "documents": "put them into the messages",
    "truncate_prompt_tokens": "shorten the prompt",
    "guided_json": "pass response_format or structured_outputs",
    "guided_regex": "pass structured_outputs",
    "guided_choice": "pass structured_outputs",
    "guided_grammar": "pass structured_outputs",
    "grammar": "pass structured_outputs",
    "json_schema": "pass response_format",
    "bad_words": "pass logit_bias",
    "allowed_token_ids": "pass logit_bias",
    "typical_p": "it is not among this server's settings",
    "top_a": "it is not among this server's settings",
    "tfs_z": "it is not among this server's settings",
    "mirostat": "it is not among this server's settings",
    "dry_multiplier": "it is not among this server's settings",
    "xtc_probability": "it is not among this server's settings",
    "lora": "this server has one model",
    "max_tool_calls": "a server without tools of its own makes no calls",
}
# Fields that change nothing here: accounts, caches and efforts of services, and what clients send back of earlier answers.
# fmt: off
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity",
    "reasoning_effort", "reasoning", "prediction", "refusal", "annotations", "index", "strict", "obfuscation",
})
# fmt: on
NEUTRAL_ONE = {"best_of", "length_penalty", "typical_p", "tfs_z"}  # 1 switches these off, 0 the others


def _asks_for_nothing(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value in (None, False, "", "none", [], {})
    return value == (1 if name in NEUTRAL_ONE else 0)


def _text(value: Any) -> Any:
    if isinstance(value, str) and not is_unicode(value):
        raise ValueError("is not valid Unicode: it has half of a surrogate pair")
    return value


Text = Annotated[str, BeforeValidator(_text)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[Text, Field(min_length=1)]
NotEmpty = Annotated[list[T], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Body(BaseModel):
    """A JSON object. Numbers are numbers and not strings; unknown keys are kept."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())
    supported: ClassVar[frozenset[str]] = frozenset()  # of the fields of UNSUPPORTED, those that this one takes
    unsupported: ClassVar[dict[str, str]] = {}

    @model_validator(mode="after")
    def _refuse_or_warn(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            why = (UNSUPPORTED | self.unsupported).get(name)
            if why is not None and name not in self.supported and not _asks_for_nothing(name, value):
                raise ValueError(f"{name} is not supported; {why}, or leave it out")
            if name not in IGNORED and name not in _warned and len(_warned) < 1000:
                _warned.add(name)
                log.warning("field %.60r is not known and is ignored", name)
        return self


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class MedusaFields(Body):
    """Fields of our own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    plain: bool = False
    tree: Literal["root"] | dict[str, Any] | None = None
    acceptance: Literal["exact", "typical"] = "exact"
    epsilon: Annotated[float, Field(ge=0, le=1)] | None = None
    delta: Annotated[float, Field(ge=0, le=10)] | None = None
    trace: Literal["none", "steps", "tree"] = "none"
    cache_prompt: bool = True


class StructuredOutputs(Body):
    """vLLM's field for output of a given form; exactly one is given."""

    model_config = ConfigDict(extra="forbid", strict=True)
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("json_", "regex", "choice", "grammar", "json_object") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"expected one of json, regex, choice, grammar and json_object, got {len(given)}")
        return self


class JsonSchema(Body):
    name: Name
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None
    description: Text | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    supported = frozenset({"json_schema"})

    @model_validator(mode="after")
    def _schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format of type json_schema needs json_schema")
        return self


class Sampling(Body):
    """The fields that all endpoints with answers share; None: the model's generation config decides."""

    model: Annotated[Text, Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    skip_special_tokens: bool = True
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    medusa: MedusaFields = Field(default_factory=MedusaFields)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; pass stream: true")
        for key in self.logit_bias or {}:
            if not (key.isascii() and key.isdecimal()):
                raise ValueError(f"logit_bias has the key {key[:40]!r}, expected the id of a token")
        if self.structured_outputs is not None and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("pass response_format or structured_outputs, not both")
        if self.medusa.plain and self.medusa.tree is not None:
            raise ValueError("medusa.plain and medusa.tree exclude each other")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ToolFunction(Body):
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Body):
    name: Text


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Body):
    name: Text
    arguments: Text


class ToolCall(Body):
    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: Text


class OtherPart(BaseModel):
    """Any part of a message that is not text; it is refused with its name."""

    type: str

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        raise ValueError(f"a part of type {self.type[:40]!r} is not text, and this model reads text only")


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart | OtherPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if isinstance(part, TextPart))
        return self.content or ""


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    modalities: list[Literal["text"]] | None = None
    unsupported = {"echo": "it is a field of /v1/completions", "suffix": "it is a field of /v1/completions"}

    @model_validator(mode="after")
    def _chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name[:64]!r}, which is not among the tools")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message excludes add_generation_prompt; pass add_generation_prompt: false")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: Text | NotEmpty[Text] | NotEmpty[TokenId] | NotEmpty[NotEmpty[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    add_special_tokens: bool = True
    unsupported = {
        "suffix": "the model continues texts only",
        "tools": "it is a field of /v1/chat/completions",
        "messages": "it is a field of /v1/chat/completions",
    }

    @model_validator(mode="after")
    def _completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which needs echo: true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens


class TokenizeRequest(Body):
    """POST /tokenize"""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected prompt or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: Text | None = None
    tokens: list[TokenId]
