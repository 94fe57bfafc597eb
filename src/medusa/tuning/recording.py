"""Recording: the backbone's continuations of prompts, and the guesses of every head along them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medusa.checkpoints.tensors import write_tensors
from medusa.data.prompts import left_padded
from medusa.errors import InvalidInput, one_line
from medusa.generation.mixin import MedusaGenerateOutput
from medusa.heads import MedusaHeads
from medusa.model import MedusaModel
from medusa.runs.console import progress
from medusa.runs.files import digest
from medusa.runs.provenance import fingerprint
from medusa.runs.records import claim
from medusa.sampling import ahead, row_keys
from medusa.trees.tensors import Draws

RECORDED_FILE = "recorded.yaml"


@dataclass(frozen=True)
class Recorded:
    """The backbone's continuation of a prompt, and the heads' guesses at T places in it.

    At place t the last committed token is number `start + t`, the root is the next one, and head k guesses the k-th token after
    the root. The text extends beyond the last place, so that every head can be scored at every place.
    """

    ids: Tensor  # (start + T + K + 1,) long
    start: int  # index of the last token of the prompt
    guesses: Tensor  # (T, K, R) int32: the likeliest tokens of each head, best first
    log_p: Tensor  # (T, K, R) float32
    hidden: Tensor | None = None  # (T, d): at the last committed token, for heads that read paths
    heads: MedusaHeads | None = None  # the heads that guessed
    noise: Tensor | None = None  # (T, K, R) float32: of the guesses, if the text was drawn (see `Guesses`)

    def __len__(self) -> int:
        return self.guesses.shape[0]

    def right(self) -> Tensor:  # (T, K) long
        """The rank, from 0, of the guess of each head that was right; -1 if none was."""
        places = self.start + 2 + torch.arange(len(self))[:, None] + torch.arange(self.guesses.shape[1])
        hits = self.guesses == self.ids[places][..., None]
        return torch.where(hits.any(-1), hits.int().argmax(-1), -1)


def record(
    model: MedusaModel,
    prompts: Sequence[Tensor],  # each (P,) long
    max_new_tokens: int = 128,  # number of places in each text
    ranks: int = 64,  # number of guesses recorded for each head
    temperature: float = 0.0,  # 0 is greedy; above 0 continuations are drawn from the backbone's distribution
    seed: int = 0,
    batch_size: int = 8,  # number of prompts continued together; greedy texts depend on it only through rounding
    folder: Path | None = None,  # folder to save recordings in, batch by batch; batches found there are not recorded again
) -> list[Recorded]:
    """Let the backbone continue the prompts, with Medusa's help, and record the guesses of the heads; InvalidInput if there are
    none, no text is long enough, or the folder has recordings of something else."""
    if model.heads is None:
        raise InvalidInput("this model has no heads to calibrate")
    ranks = min(ranks, model.scored)
    if folder is not None:
        made_with = {
            "backbone": fingerprint(model.backbone),
            "heads": fingerprint(model.heads),
            "settings": [max_new_tokens, ranks, temperature, seed, batch_size, *(["Gumbel"] if temperature else [])],
            "prompts": len(prompts),
            "prompts_digest": digest([prompt.tolist() for prompt in prompts]),
        }
        claim(folder / RECORDED_FILE, made_with)
    texts: list[Recorded] = []
    with progress("recording", len(prompts), "prompts") as bar:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            shard = folder / f"texts-{first:05d}.safetensors" if folder is not None else None
            if shard is not None and shard.is_file():
                texts += _load(shard, model.heads)
            else:
                found = list(_record(model, batch, max_new_tokens, ranks, temperature, seed + first))
                if shard is not None:
                    _save(found, shard)
                texts += found
            bar.update(len(batch))
    if not texts:
        raise InvalidInput(f"no text is longer than {model.num_heads + 1} new tokens; give other prompts or more tokens")
    return texts


@torch.inference_mode()
def _record(
    model: MedusaModel, prompts: Sequence[Tensor], max_new_tokens: int, ranks: int, temperature: float, seed: int
) -> Iterator[Recorded]:
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ids, mask = left_padded(prompts)
    output = model.generate(
        ids, mask, max_new_tokens=max_new_tokens + model.num_heads, seed=seed, return_dict_in_generate=True, **sampling
    )
    assert isinstance(output, MedusaGenerateOutput)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, output.new_tokens(row).to(prompt)])
        found = guesses_along(model, text, len(prompt) - 1, ranks)
        if found is not None:
            yield dataclasses.replace(found, noise=noise_along(found, (seed, row), temperature)) if temperature else found


def noise_along(text: Recorded, stream: tuple[int, int], temperature: float) -> Tensor:
    """What decoding with a seed added to the log-probabilities of the guesses."""
    places = torch.arange(len(text))
    key = row_keys([stream], places.device).expand_as(places)
    draws = Draws(key, torch.zeros_like(places), torch.full(places.shape, temperature))
    return ahead(draws, places, text.guesses.long().transpose(0, 1)).transpose(0, 1)


@torch.inference_mode()
def guesses_along(
    model: MedusaModel,
    text: Tensor,  # (P + N,) long: a prompt and its continuation
    start: int,  # index of the last token of the prompt
    ranks: int,
) -> Recorded | None:
    """The guesses of the heads along a text; None if it is too short for all heads to guess even once."""
    assert model.heads is not None
    text = text.to(model.device)
    places = len(text) - start - model.num_heads - 1
    if places < 1:
        return None
    hidden = model.hidden_states(text[None])[0, start : start + places]
    tokens, log_p = [], []
    roots = text[start + 1 : start + 1 + places]
    for part, root in zip(hidden.split(256), roots.split(256), strict=True):  # logits of a chunk at a time
        top = model.heads(part, root=root).float().log_softmax(-1).topk(ranks, dim=-1)  # (K, chunk, R)
        tokens.append(model.heads.tokens(top.indices).transpose(0, 1).int().cpu())
        log_p.append(top.values.transpose(0, 1).cpu())
    along = (hidden.cpu(), model.heads) if model.heads.kind == "path" else (None, None)
    return Recorded(text.cpu(), start, torch.cat(tokens), torch.cat(log_p), *along)


def _save(texts: Sequence[Recorded], path: Path) -> None:
    tensors = {}
    for number, text in enumerate(texts):
        for field in fields(text):
            value = getattr(text, field.name)
            if value is not None and field.name != "heads":
                tensors[f"{number}.{field.name}"] = torch.as_tensor(value).contiguous().clone()
    write_tensors(tensors, path)


def _load(path: Path, heads: MedusaHeads) -> list[Recorded]:
    try:
        tensors = load_file(path)
        numbers = sorted({int(name.partition(".")[0]) for name in tensors})
        reading = heads if heads.kind == "path" else None
        held = [[tensors[f"{n}.{name}"] for name in ("ids", "start", "guesses", "log_p")] for n in numbers]
        return [
            Recorded(ids, int(start), guesses, log_p, tensors.get(f"{n}.hidden"), reading, tensors.get(f"{n}.noise"))
            for n, (ids, start, guesses, log_p) in zip(numbers, held, strict=True)
        ]
    except (OSError, SafetensorError, ValueError, LookupError, RuntimeError) as error:
        raise InvalidInput(f"{path} is broken: {one_line(error)}; remove it and run the same command again") from None
