"""Reports of a step: log-probabilities of the tokens that it emitted, and the tree that it drafted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medusa.decoding import Stepped
from medusa.serving.pieces import TokenTexts
from medusa.serving.requests import Delivery, TokenLogprobs, TracedNode


@torch.inference_mode()
def logprobs_of(
    logits: Tensor,  # (n, V): the backbone's, before processors
    tokens: Sequence[int],  # n: the tokens in their places
    number: int,  # of likeliest tokens reported
) -> list[TokenLogprobs]:
    """The log-probability of each token and of the likeliest in its place."""
    log_p = logits.float().log_softmax(-1)
    own = log_p.gather(1, torch.tensor(tokens, device=log_p.device)[:, None])[:, 0].tolist()
    values, best = log_p.topk(min(number, log_p.shape[-1]), dim=-1)
    tops = [list(zip(ids, ps, strict=True)) for ids, ps in zip(best.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(token, p, top) for token, p, top in zip(tokens, own, tops, strict=True)]


@torch.inference_mode()
def after_path(
    stepped: Stepped,
    row: int,  # within the step
    root: int,  # the row's next root
    number: int,
) -> list[TokenLogprobs]:
    """Log-probabilities of the tokens after each emitted one: the path without its root, then the next root."""
    assert stepped.drafted is not None and stepped.accepted is not None
    emitted = stepped.tokens[row]
    nodes = stepped.accepted.path[row, : len(emitted)]
    return logprobs_of(stepped.drafted.logits[row, nodes], [*emitted[1:], root], number)


@torch.inference_mode()
def traced(stepped: Stepped, row: int) -> list[TracedNode]:
    """The tree of a row, with what the backbone thinks of every node."""
    emitted = stepped.tokens[row]
    if stepped.drafted is None or stepped.accepted is None:
        return [TracedNode(token, 0, 1.0, True) for token in emitted]
    tokens, tree = stepped.drafted.tokens[row], stepped.drafted.tree
    parents = tree.parents[row if len(tree.parents) > 1 else 0]
    p = stepped.drafted.logits[row].float().softmax(-1)[parents, tokens].tolist()
    accepted = set(stepped.accepted.path[row, : len(emitted)].tolist())
    nodes = zip(tokens.tolist(), parents.tolist(), p, strict=True)
    return [
        TracedNode(token, parent, 1.0 if node == 0 else probability, node in accepted)
        for node, (token, parent, probability) in enumerate(nodes)
    ]


def step_record(delivery: Delivery, pieces: Sequence[str], texts: TokenTexts) -> dict[str, Any]:
    """A step in JSON: its tokens with the text that each completed; if it was traced, their log-probabilities and its tree."""
    record: dict[str, Any] = {
        "ms": round(delivery.seconds * 1000, 3),
        "compiled": delivery.compiled,
        "tokens": delivery.tokens,
        "pieces": [*pieces, *[""] * (len(delivery.tokens) - len(pieces))],
        "depth": delivery.depth,
    }
    if delivery.nodes is not None:
        record["logprobs"] = [round(max(each.logprob, -9999.0), 6) for each in delivery.logprobs or ()]
        record["nodes"] = [
            {
                "token": node.token,
                "text": texts.text(node.token),
                "parent": node.parent,
                "p": round(node.probability, 6),
                "accepted": node.accepted,
            }
            for node in delivery.nodes
        ]
    return record
