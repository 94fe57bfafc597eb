"""Calls: from the fields of a body to what the engine is asked for, as transformers' `generate` prepares it."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

import medusa
from medusa.backbone.processors import LogitBias
from medusa.batch.rows import DecodingOptions
from medusa.decoding import check_prompts
from medusa.errors import InvalidInput, MedusaError
from medusa.generation.preparation import prepare
from medusa.generation.text import Detokenizer
from medusa.model import MedusaModel
from medusa.runs.files import digest
from medusa.serving.metrics import Metrics
from medusa.serving.pieces import AnswerText, TokenTexts
from medusa.serving.problems import Problem, clean
from medusa.serving.prompts import ends_of_turns, longest_token
from medusa.serving.requests import Request, Serves
from medusa.serving.schemas import ChatRequest, CompletionRequest, Sampling
from medusa.serving.settings import ServerSettings
from medusa.serving.structure import Grammars
from medusa.trees.files import Tree, tree_from
from medusa.trees.static import MedusaTree

LARGEST_TREE = 128  # nodes of a tree that a request may bring
DEFAULT_COMPLETION = 16  # tokens of a completion without a limit, as in OpenAI's interface


@dataclass
class Service:
    """What the endpoints share: the engine, the model and its tokenizer, the settings."""

    engine: Serves
    model: MedusaModel
    tokenizer: Any
    name: str  # of the model, for clients
    settings: ServerSettings
    metrics: Metrics
    texts: TokenTexts = field(init=False)
    pool: ThreadPoolExecutor = field(init=False)  # tokenising and preparing, off the event loop
    turn_ends: tuple[int, ...] = field(init=False)
    grammars: Grammars = field(init=False)
    fingerprint: str = field(init=False)  # of what decides the output
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False  # no new requests are taken
    held: Counter[str] = field(default_factory=Counter)  # number of answers that each client has running or waiting

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.tokenizer)
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="medusa-prepare")
        self.turn_ends = ends_of_turns(self.tokenizer)
        self.grammars = Grammars(self.tokenizer)
        self._longest_token = longest_token(self.tokenizer)
        self.fingerprint = f"medusa-{medusa.__version__}-{digest([self.name, str(self.model.backbone.dtype)])[:8]}"

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer."""
        room = self.engine.room()
        return room if self.model.max_length is None else min(room, self.model.max_length)

    @property
    def most_characters(self) -> int:
        """The most characters of a prompt: a longer one does not fit, whatever its tokens are."""
        return self.longest * self._longest_token

    def card(self) -> dict[str, Any]:
        """The model for clients."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "medusa",
            "root": self.name,
            "max_model_len": self.longest,
            "medusa": {
                "heads": self.model.num_heads,
                "chat": self.tokenizer.chat_template is not None,
                "tree": self.model.tree.to_dict(),
                "dtype": str(self.model.backbone.dtype).removeprefix("torch."),
                "device": str(self.model.device),
            },
        }

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise Problem(f"there is no model {name[:100]!r}, only {self.name!r}", 404, "model", "model_not_found")


@dataclass(frozen=True)
class Call:
    """A prompt with the requests that continue it."""

    ids: list[int]
    requests: list[Request]  # one per answer
    texts: list[AnswerText]  # of the answers
    text: str | None = None  # of the prompt, if it is to be echoed
    stops: Sequence[str] = ()
    include_stop: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: bool = False  # whether the answer has them: a trace asks the engine for some too
    trace: str = "none"
    drops_answer: bool = False  # the prompt alone is wanted: max_tokens is 0

    def answer_text(self, tokenizer: Any) -> AnswerText:
        detokenizer = Detokenizer(tokenizer, self.ids, self.skip_special_tokens)
        return AnswerText(detokenizer, self.stops, self.include_stop, self.min_tokens)


def make_call(service: Service, body: ChatRequest | CompletionRequest, ids: list[int], grammar: Any = None) -> Call:
    """The call for one prompt.

    Args:
        grammar: what the answer must look like; None: free text.

    Raises:
        Problem: a field cannot be followed, or prompt and answer do not fit.
    """
    tensor = torch.tensor([ids], device=service.model.device)
    try:
        check_prompts(service.model, tensor, None)
    except InvalidInput as error:
        raise Problem(f"prompt: {clean(error)}", param="prompt") from None
    tree = _tree(service, body)
    limit = _limit(service, body, len(ids), tree)
    options = _prepared(service, body, tensor, limit, grammar)
    logprobs = body.logprobs if isinstance(body, CompletionRequest) else (body.top_logprobs or 0) if body.logprobs else None
    echo = isinstance(body, CompletionRequest) and bool(body.echo)
    call = Call(
        ids,
        [],
        [],
        text=service.tokenizer.decode(ids, skip_special_tokens=False) if echo else None,
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        min_tokens=body.min_tokens,
        skip_special_tokens=body.skip_special_tokens,
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        logprobs=logprobs is not None,
        trace=body.medusa.trace,
        drops_answer=body.limit == 0,
    )
    for number in range(body.n or 1):
        request = Request(
            ids,
            options,
            number=number,
            tree=tree,
            logprobs=0 if logprobs is None and body.medusa.trace == "tree" else logprobs,
            prompt_logprobs=logprobs if echo else None,
            trace=body.medusa.trace == "tree",
            reuse=body.medusa.cache_prompt,
            ends=call.answer_text(service.tokenizer).put if body.stops else None,
        )
        call.requests.append(request)
        call.texts.append(call.answer_text(service.tokenizer))
    return call


def _limit(service: Service, body: ChatRequest | CompletionRequest, prompt: int, tree: Tree | None) -> int:
    """The greatest number of new tokens."""
    # Without a tree of the request's own the same as for any other, so that plain decoding has the same limits.
    room = min(service.longest, service.engine.room(tree)) - prompt
    asked = body.limit
    if room < (asked or 1):
        most = room + prompt
        wanted = f"{prompt} in the prompt and {asked} new ones" if asked else f"{prompt} in the prompt"
        raise Problem(
            f"this model's maximum context length is {most} tokens, but {wanted} were requested; shorten the prompt or lower "
            "max_tokens",
            400,
            "messages" if isinstance(body, ChatRequest) else "prompt",
            "context_length_exceeded",
        )
    if asked is not None:
        limit = max(1, asked)
    else:
        usual = service.model.backbone.generation_config.max_new_tokens  # type: ignore[union-attr]
        limit = min(room, usual or (room if isinstance(body, ChatRequest) else DEFAULT_COMPLETION))
    if body.min_tokens > limit:
        raise Problem(f"min_tokens: {body.min_tokens} is more than the limit of {limit} tokens", 400, "min_tokens")
    return limit


def _prepared(service: Service, body: Sampling, ids: Any, limit: int, grammar: Any) -> DecodingOptions:
    """The options of decoding, made by transformers' `generate` from the model's generation config and the body."""
    if grammar is not None and body.ignore_eos:
        raise Problem("ignore_eos: an answer of a given form ends with the form; leave ignore_eos out", param="ignore_eos")
    # Preparing for one prompt is the same for every tree; the seed is drawn here, since torch's generator has no lock.
    keywords: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": limit,
        "min_new_tokens": body.min_tokens or None,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty or None,
        "frequency_penalty": body.frequency_penalty or None,
        "grammar": grammar,
        "seed": secrets.randbits(62) if body.seed is None else body.seed,
        "eos_token_id": _ends(service, body),
        "acceptance": body.medusa.acceptance,
        "epsilon": body.medusa.epsilon,
        "delta": body.medusa.delta,
        **_sampling(body),
    }
    if body.logit_bias:
        keywords["logits_processor"] = [LogitBias(_bias(service, body.logit_bias))]
    try:
        options = prepare(service.model, "the request", keywords).options
    except Problem:
        raise
    except MedusaError as error:
        raise Problem(clean(error)) from None
    if options.typical is not None and not options.do_sample:
        raise Problem("medusa.acceptance: typical acceptance needs a temperature above 0", param="medusa.acceptance")
    return options


def _sampling(body: Sampling) -> dict[str, Any]:
    """Whether and how to draw. Without a temperature, a field that shapes the distribution asks for drawing."""
    if body.temperature == 0:
        return {"do_sample": False}
    top_k = None if body.top_k is None else max(0, body.top_k)
    shaped = bool(top_k) or (body.top_p or 1) < 1 or bool(body.min_p) or body.temperature is not None
    shape = {"temperature": body.temperature, "top_k": top_k, "top_p": body.top_p, "min_p": body.min_p}
    return {"do_sample": True, **shape} if shaped else {}


def _ends(service: Service, body: Sampling) -> list[int]:
    vocab_size = service.model.vocab_size
    for token in body.stop_token_ids or ():
        if token >= vocab_size:
            raise Problem(f"stop_token_ids: {token} is not one of the model's {vocab_size} tokens", 400, "stop_token_ids")
    ends = () if body.ignore_eos else service.model.eos_token_ids
    turns = () if body.ignore_eos or not isinstance(body, ChatRequest) else service.turn_ends
    return sorted({*ends, *turns, *(body.stop_token_ids or ())})


def _bias(service: Service, given: dict[str, float]) -> Any:
    vocab_size = service.model.vocab_size
    if wrong := [key for key in given if int(key) >= vocab_size]:
        raise Problem(f"logit_bias: {wrong[0][:20]} is not one of the model's {vocab_size} tokens", 400, "logit_bias")
    bias = torch.zeros(vocab_size, device=service.model.device)
    bias[torch.tensor([int(key) for key in given])] = torch.tensor(list(given.values()), device=bias.device)
    return bias


def _tree(service: Service, body: Sampling) -> Tree | None:
    """The tree that a request asks for; None: the engine chooses."""
    if body.medusa.plain or body.medusa.tree == "root":
        return MedusaTree([])
    if body.medusa.tree is None:
        return None
    try:
        tree = tree_from(body.medusa.tree, "medusa.tree")
        if len(tree) > LARGEST_TREE:
            raise InvalidInput(f"medusa.tree has {len(tree)} nodes, expected at most {LARGEST_TREE}")
        tree.check(service.model.num_heads, service.model.scored)
    except MedusaError as error:
        raise Problem(clean(error), param="medusa.tree") from None
    return tree
