"""The probe: whether a model under tree masks, given positions and a kept cache computes what it computes by itself."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from medusa.backbone.cache import TreeCache
from medusa.errors import UnsupportedBackbone, one_line
from medusa.trees.tensors import Frame, TreeTensors, tree_tensors

# Nodes in an order in which few have only their ancestors before them, so that a wrong mask shows at most of them.
PARENTS = (0, 0, 0, 0, 2, 1, 3, 4, 1, 5)
DEPTH = 3
PATH = (0, 2, 4, 7)  # the path kept: not contiguous, so that keeping it moves it
PROMPT, PADS = 9, (0, 4)  # a row without padding and a row with
CHUNKS = (5, 4, 4, 4)  # the model's second reading: every tree ends with a chunk

NOISE_MULTIPLE = 4.0  # how far from its own pass a right model may be, in differences between its own passes
TELLING = 1.0  # a mistake is looked for where it is at least so many times as large as the noise
NEARER = 0.25  # of the way from right to a mistake, or away from it: right models are within 0.01
LOGITS_LIMIT = 1e-5  # of the logits' spread, where rounding is less
ATTEMPTS = 3

Layers = list[Tensor]  # hidden states (2, 2, N, d) of the nodes after every layer: first and second tree, two rows


class Probed(Protocol):
    """What the probe asks of a backbone; see `Backbone`."""

    module: nn.Module
    decoder: nn.Module
    attention: str
    vocab_size: int

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def new_cache(self, capacity: int) -> TreeCache: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def prefill(self, ids: Tensor, attention_mask: Tensor | None, cache: TreeCache) -> Tensor: ...
    def verify(
        self,
        ids: Tensor,
        tree: TreeTensors,
        frame: Frame,
        cache: TreeCache,
        layers: list[Tensor] | None = None,
    ) -> Tensor: ...


class Reading(NamedTuple):
    """One way of reading the trees: the right one, or one with a mistake."""

    what: str
    tree: TreeTensors  # b = 1
    pads: Tensor  # (2,) long
    path: Tensor  # (n,) long: the nodes kept


class Finding(NamedTuple):
    """What one run of the probe found."""

    fault: str | None
    noise: float  # of the logits, relative to their spread


def probe(backbone: Probed) -> float:
    """Decode two small trees of random ids, one behind the other, on a row with padding and a row without, and compare the
    hidden states after every layer with the model's own on each path alone.

    What is too far is measured, not fixed. The model reads the same paths twice by itself, whole and in chunks: that is its
    noise. The trees are also read with mistakes on purpose. A right model is within a small multiple of its noise, and
    nearer to its own pass than to every mistake, wherever that mistake outgrows the noise. Where one run finds a fault,
    others with other ids have to find one too: experts may have been routed otherwise.

    Returns:
        The noise of the logits, relative to their spread.

    Raises:
        UnsupportedBackbone: tree decoding on this model would not be exact.
    """
    name = type(backbone.module).__name__
    for seed in range(ATTEMPTS):
        try:
            finding = _run(backbone, seed)
        except Exception as error:  # of whatever a model makes of a mask and a cache that are not its own
            raise UnsupportedBackbone(f"{name} cannot run under a tree mask: {one_line(error)}") from error
        if finding.fault is None:
            return finding.noise
    raise UnsupportedBackbone(
        f"{name} with {backbone.attention} attention is not exact under Medusa: {finding.fault}; "
        "try attn_implementation='eager' or float32"
    )


def _run(backbone: Probed, seed: int) -> Finding:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(backbone.vocab_size, (2, PROMPT + len(PARENTS)), generator=generator).to(backbone.device)
    prompts, nodes = ids[:, :PROMPT], ids[:, PROMPT:]
    readings = _readings(backbone.device)
    right, *mistakes = _read_trees(backbone, readings, prompts, nodes)
    whole, chunks = _read_paths(backbone, prompts, nodes)
    own_logits = backbone.module(input_ids=prompts[:1], use_cache=False).logits
    logits = backbone.logits(backbone.decoder(input_ids=prompts[:1], use_cache=False).last_hidden_state)
    # Roundings add up over layers like a random walk. Two passes through the same kernels may show none.
    rounding = torch.finfo(backbone.dtype).eps * math.sqrt(len(whole))
    noise = max(relative_difference(backbone.logits(chunks[-1][0]), backbone.logits(whole[-1][0])), rounding)
    difference = relative_difference(logits, own_logits)
    if not difference <= max(LOGITS_LIMIT, rounding):  # NaN is no match either
        return Finding(f"its logits are not those of its LM head, by {difference:.1e} of their spread", noise)
    multiple = _multiple_of_noise(right, whole, chunks, rounding)
    if not multiple <= NOISE_MULTIPLE:
        fault = f"a tree differs from its paths by {multiple:.1e} times the model's own noise (limit {NOISE_MULTIPLE:.0f})"
        return Finding(fault, noise)
    for reading, mistake in zip(readings[1:], mistakes, strict=True):
        if not _part_of_mistake(right, mistake, whole, chunks, torch.finfo(backbone.dtype).eps) < NEARER:
            return Finding(f"a tree is decoded as if {reading.what}", noise)
    return Finding(None, noise)


def _multiple_of_noise(right: Layers, whole: Layers, chunks: Layers, rounding: float) -> float:
    """How far the last hidden states are from the model's own, in differences between its own two readings."""
    got, one, two = (layers[-1].float() for layers in (right, whole, chunks))
    noise = (two - one).norm(dim=-1).flatten().quantile(0.75)
    floor = one.norm(dim=-1).mean() * rounding / 4
    # Not the greatest error: a mixture of experts may route a few nodes' near-ties the other way.
    error = (got - one).norm(dim=-1).quantile(0.75, dim=-1)  # by tree and row
    return (error.max() / torch.maximum(noise, floor)).item()


def relative_difference(
    got: Tensor,  # (..., V)
    wanted: Tensor,  # (..., V)
) -> float:
    """How far logits are from others, relative to how far these are spread around their mean."""
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


def _read_trees(backbone: Probed, readings: list[Reading], prompts: Tensor, nodes: Tensor) -> list[Layers]:
    """Both trees under every reading, all in one batch."""
    device = backbone.device
    trees = TreeTensors(*(torch.cat(tensors).repeat_interleave(2, dim=0) for tensors in zip(*(r.tree for r in readings))))
    pads = torch.cat([reading.pads for reading in readings])
    paths = torch.stack([reading.path for reading in readings]).repeat_interleave(2, dim=0)
    prompts, nodes = prompts.repeat(len(readings), 1), nodes.repeat(len(readings), 1)
    padding = torch.tensor(PADS, device=device).repeat(len(readings))
    cache = backbone.new_cache(PROMPT + len(PATH) + len(PARENTS))
    backbone.prefill(prompts, (torch.arange(PROMPT, device=device) >= padding[:, None]).long(), cache)
    lengths = torch.full_like(pads, PROMPT)
    both: list[list[Tensor]] = []
    for _ in range(2):
        layers: list[Tensor] = []
        base = lengths[0]
        backbone.verify(nodes, trees, Frame(base, lengths, pads, int(base) + len(PARENTS)), cache, layers)
        both.append(layers)
        cache.keep(base + paths, base + torch.arange(len(PATH), device=device).expand_as(paths))
        lengths = lengths + len(PATH)
    stacked = [torch.stack(pair).unflatten(1, (len(readings), 2)) for pair in zip(*both, strict=True)]
    return [[states[:, index] for states in stacked] for index in range(len(readings))]


def _read_paths(backbone: Probed, prompts: Tensor, nodes: Tensor) -> tuple[Layers, Layers]:
    """The model's own readings of every path as a text of its own: in one pass, and in chunks by a cache of its own."""
    lineages = tree_tensors(torch.tensor([PARENTS]), DEPTH).lineage[0]
    leaves = sorted(set(range(len(PARENTS))) - set(PARENTS))
    texts: list[Tensor] = []
    text_of, place = torch.zeros(2, 2, 2, len(PARENTS), dtype=torch.long)  # of every node, by tree and row
    for turn in range(2):
        for row, pad in enumerate(PADS):
            prefix = torch.cat([prompts[row, pad:], nodes[row, list(PATH)]]) if turn else prompts[row, pad:]
            for leaf in leaves:
                path = lineages[leaf][lineages[leaf] >= 0]
                text_of[turn, row, path] = len(texts)
                place[turn, row, path] = len(prefix) + torch.arange(len(path))
                texts.append(torch.cat([prefix, nodes[row, path]]))
    # padded at the right, which a causal model does not see
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0)
    output = backbone.decoder(input_ids=ids, use_cache=False, output_hidden_states=True)
    whole = [states[text_of, place] for states in hidden_states_of(output)]
    cache, parts = None, []
    for part in ids.split(CHUNKS, dim=1):
        output = backbone.decoder(input_ids=part, past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache = output.past_key_values
        parts.append(hidden_states_of(output))
    return whole, [torch.cat(states, dim=1)[text_of, place] for states in zip(*parts, strict=True)]


def hidden_states_of(output) -> list[Tensor]:
    """The hidden states (B, T, d) after every layer, as far as the decoder tells them; the last is what the LM head reads."""
    last = output.last_hidden_state
    return [states for states in output.hidden_states or () if states.shape == last.shape] + [last]


def _part_of_mistake(right: Layers, mistake: Layers, whole: Layers, chunks: Layers, eps: float) -> float:
    """Which part of the way from the model's own pass to a mistake the right reading is, where the mistake outgrows the noise;
    0 where it does so nowhere.

    Projected on the mistake, noise of many dimensions all but vanishes, so small mistakes show that distances would not.
    Two readings of its own keep the noise of either from being counted as a mistake, and the quartile over layers and nodes
    keeps out the nodes that a mixture of experts routed otherwise under tree masks, right or mistaken.
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
