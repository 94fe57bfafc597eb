"""The probe: whether a model computes the same with tree masks, given positions and a kept cache as in its own passes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from medusa.errors import UnsupportedBackbone, one_line
from medusa.trees.tensors import Frame, TreeTensors, tree_tensors

if TYPE_CHECKING:
    from medusa.backbone.lm import TreeLM

# In this order few nodes have only ancestors before them, so that a wrong mask shows at most nodes.
PARENTS = (0, 0, 0, 0, 2, 1, 3, 4, 1, 5)
DEPTH = 3
PATH = (0, 2, 4, 7)  # the kept path: not contiguous, so that it has to move
PROMPT, PADS = 9, (0, 4)  # a row without padding and a row with
CHUNKS = (5, 4, 4, 4)  # token counts of the model's second reading, in chunks: every tree ends with a chunk

NOISE_MULTIPLE = 4.0  # largest error of a right model, in multiples of the difference between its own passes
TELLING = 1.0  # a mistake is looked for where its size is at least this multiple of the noise
NEARER = 0.25  # largest part of the way from right to a mistake; right models are within 0.01
LOGITS_LIMIT = 1e-5  # largest error of logits relative to their spread, if rounding is smaller
ATTEMPTS = 3

Layers = list[Tensor]  # hidden states (2, 2, N, d) of the nodes after every layer: first and second tree, two rows


class Reading(NamedTuple):
    """A way of reading the trees: the right one, or one with a mistake."""

    what: str  # the mistake in words
    tree: TreeTensors  # b = 1
    pads: Tensor  # (2,) long
    path: Tensor  # (n,) long: the kept nodes


class Finding(NamedTuple):
    """The result of one run of the probe."""

    fault: str | None  # None: the model is right
    noise: float  # noise of the logits, relative to their spread


def probe(lm: TreeLM) -> float:
    """Compare two small trees of random ids, one behind the other, with their paths: hidden states after every layer, for a row
    with padding and a row without.

    The limit is measured, not fixed. The model reads the same paths twice by itself, whole and in chunks: the difference is
    its noise. The trees are also read with deliberate mistakes. A right model is within a small multiple of its noise, and
    nearer to its own pass than to any mistake that exceeds the noise. A fault counts only if runs with other ids find one
    too, since experts may have been routed differently.

    Returns:
        The noise of the logits, relative to their spread.

    Raises:
        UnsupportedBackbone: tree decoding on this model would not be exact.
    """
    name = type(lm.backbone).__name__
    for seed in range(ATTEMPTS):
        try:
            finding = _run(lm, seed)
        except Exception as error:  # models raise errors of many kinds on a foreign mask and cache
            raise UnsupportedBackbone(f"{name} cannot run under a tree mask: {one_line(error)}") from error
        if finding.fault is None:
            return finding.noise
    raise UnsupportedBackbone(
        f"{name} with {lm.attention} attention is not exact under Medusa: {finding.fault}; "
        "try attn_implementation='eager' or float32"
    )


def _run(lm: TreeLM, seed: int) -> Finding:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(lm.vocab_size, (2, PROMPT + len(PARENTS)), generator=generator).to(lm.device)
    prompts, nodes = ids[:, :PROMPT], ids[:, PROMPT:]
    readings = _readings(lm.device)
    right, *mistakes = _read_trees(lm, readings, prompts, nodes)
    whole, chunks = _read_paths(lm, prompts, nodes)
    own_logits = lm.backbone(input_ids=prompts[:1], use_cache=False).logits
    logits = lm.logits(lm.decoder(input_ids=prompts[:1], use_cache=False).last_hidden_state)
    # Roundings accumulate over layers like a random walk. Two passes through the same kernels may show none.
    rounding = torch.finfo(lm.dtype).eps * math.sqrt(len(whole))
    noise = max(relative_difference(lm.logits(chunks[-1][0]), lm.logits(whole[-1][0])), rounding)
    difference = relative_difference(logits, own_logits)
    if not difference <= max(LOGITS_LIMIT, rounding):  # so that NaN is a fault too
        return Finding(f"its logits are not those of its LM head, by {difference:.1e} of their spread", noise)
    multiple = _multiple_of_noise(right, whole, chunks, rounding)
    if not multiple <= NOISE_MULTIPLE:
        fault = f"a tree differs from its paths by {multiple:.1e} times the model's own noise (limit {NOISE_MULTIPLE:.0f})"
        return Finding(fault, noise)
    for reading, mistake in zip(readings[1:], mistakes, strict=True):
        if not _part_of_mistake(right, mistake, whole, chunks, torch.finfo(lm.dtype).eps) < NEARER:
            return Finding(f"a tree is decoded as if {reading.what}", noise)
    return Finding(None, noise)


def _multiple_of_noise(right: Layers, whole: Layers, chunks: Layers, rounding: float) -> float:
    """The distance of the last hidden states from the model's own, in multiples of the distance between its two readings."""
    got, one, two = (layers[-1].float() for layers in (right, whole, chunks))
    noise = (two - one).norm(dim=-1).flatten().quantile(0.75)
    floor = one.norm(dim=-1).mean() * rounding / 4
    # Not the largest error: a mixture of experts may break a few nodes' near-ties the other way.
    error = (got - one).norm(dim=-1).quantile(0.75, dim=-1)  # per tree and row
    return (error.max() / torch.maximum(noise, floor)).item()


def relative_difference(
    got: Tensor,  # (..., V)
    wanted: Tensor,  # (..., V)
) -> float:
    """The distance between logits, relative to the spread of the wanted ones around their mean."""
    got, wanted = got.float(), wanted.float()
    return ((got - wanted).norm() / (wanted - wanted.mean(-1, keepdim=True)).norm().clamp(min=1e-9)).item()


def _readings(device: torch.device) -> list[Reading]:
    """The right reading, then the mistakes."""
    tree = tree_tensors(torch.tensor([PARENTS], device=device), DEPTH)
    pads, path = torch.tensor(PADS, device=device), torch.tensor(PATH, device=device)
    slots = torch.arange(len(PARENTS), device=device)
    everything = torch.ones_like(tree.ancestors)
    return [
        Reading("", tree, pads, path),
        Reading("every node saw all nodes before it", tree._replace(ancestors=everything.tril()), pads, path),
        Reading("every node saw all nodes", tree._replace(ancestors=everything), pads, path),
        Reading("positions were counted by node, not by depth", tree._replace(depths=slots[None]), pads, path),
        Reading("positions were one too far", tree._replace(depths=tree.depths + 1), pads, path),
        Reading("padding was seen and counted", tree, torch.zeros_like(pads), path),
        Reading("another path had been kept", tree, pads, slots[: len(PATH)]),
    ]


def _read_trees(lm: TreeLM, readings: list[Reading], prompts: Tensor, nodes: Tensor) -> list[Layers]:
    """Both trees under every reading, all in one batch."""
    device = lm.device
    trees = TreeTensors(*(torch.cat(tensors).repeat_interleave(2, dim=0) for tensors in zip(*(r.tree for r in readings))))
    pads = torch.cat([reading.pads for reading in readings])
    paths = torch.stack([reading.path for reading in readings]).repeat_interleave(2, dim=0)
    prompts, nodes = prompts.repeat(len(readings), 1), nodes.repeat(len(readings), 1)
    padding = torch.tensor(PADS, device=device).repeat(len(readings))
    cache = lm.new_cache(PROMPT + len(PATH) + len(PARENTS))
    lm.prefill(prompts, (torch.arange(PROMPT, device=device) >= padding[:, None]).long(), cache)
    lengths = torch.full_like(pads, PROMPT)
    both: list[list[Tensor]] = []
    for _ in range(2):
        layers: list[Tensor] = []
        base = lengths[0]
        lm.verify(nodes, trees, Frame(base, lengths, pads, int(base) + len(PARENTS)), cache, layers)
        both.append(layers)
        cache.keep(base + paths, base + torch.arange(len(PATH), device=device).expand_as(paths))
        lengths = lengths + len(PATH)
    stacked = [torch.stack(pair).unflatten(1, (len(readings), 2)) for pair in zip(*both, strict=True)]
    return [[states[:, index] for states in stacked] for index in range(len(readings))]


def _read_paths(lm: TreeLM, prompts: Tensor, nodes: Tensor) -> tuple[Layers, Layers]:
    """The model's own readings of every path as a separate text: in one pass, and in chunks with its own cache."""
    lineages = tree_tensors(torch.tensor([PARENTS]), DEPTH).lineage[0]
    leaves = sorted(set(range(len(PARENTS))) - set(PARENTS))
    texts: list[Tensor] = []
    text_of, place = torch.zeros(2, 2, 2, len(PARENTS), dtype=torch.long)  # for every node, by tree and row
    for turn in range(2):
        for row, pad in enumerate(PADS):
            prefix = torch.cat([prompts[row, pad:], nodes[row, list(PATH)]]) if turn else prompts[row, pad:]
            for leaf in leaves:
                path = lineages[leaf][lineages[leaf] >= 0]
                text_of[turn, row, path] = len(texts)
                place[turn, row, path] = len(prefix) + torch.arange(len(path))
                texts.append(torch.cat([prefix, nodes[row, path]]))
    # Right padding, which a causal model does not see.
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0)
    output = lm.decoder(input_ids=ids, use_cache=False, output_hidden_states=True)
    whole = [states[text_of, place] for states in hidden_states_of(output)]
    cache, parts = None, []
    for part in ids.split(CHUNKS, dim=1):
        output = lm.decoder(input_ids=part, past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache = output.past_key_values
        parts.append(hidden_states_of(output))
    return whole, [torch.cat(states, dim=1)[text_of, place] for states in zip(*parts, strict=True)]


def hidden_states_of(output) -> list[Tensor]:
    """Hidden states (B, T, d) after every layer, as far as the decoder gives them; the LM head reads the last."""
    last = output.last_hidden_state
    return [states for states in output.hidden_states or () if states.shape == last.shape] + [last]


def _part_of_mistake(right: Layers, mistake: Layers, whole: Layers, chunks: Layers, eps: float) -> float:
    """The part of the way from the model's own pass to a mistake that the right reading has gone, where the mistake exceeds
    the noise; 0 if it does so nowhere.

    Projected on the mistake, noise in many dimensions almost vanishes, which reveals mistakes too small for distances.
    The two own readings keep the noise of either from counting as a mistake; the quartile over layers and nodes leaves out
    nodes that a mixture of experts routed differently under tree masks.
    """
    parts, places = [], 0
    for got, wrong, one, two in zip(right, mistake, whole, chunks, strict=True):
        got, wrong, one, two = got.float(), wrong.float(), one.float(), two.float()
        noise = (one - two).square().sum(-1).flatten().quantile(0.75) + (one * eps / 4).square().sum(-1).mean()
        size = ((wrong - one) * (wrong - two)).sum(-1)  # (2, 2, N)
        along = ((got - one) * (wrong - two)).sum(-1)
        telling = ~(size <= TELLING**2 * noise)  # NaN tells
        parts.append((along / size)[telling].abs().cpu())
        places += size.numel()
    part = torch.cat(parts)
    return part.quantile(0.25).item() if len(part) > places / 20 else 0.0
