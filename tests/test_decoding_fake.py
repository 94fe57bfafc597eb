"""Claims about the loop on a model of a few tables, without transformers: whatever the tree, the rows and the endings, it gives
what plain decoding gives."""

import itertools
import subprocess
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot, pad

from medusa import DynamicTree, MedusaTree
from medusa.batch.pool import Request, decode_queue, left_padded
from medusa.batch.rows import DecodingOptions
from medusa.decoding import decode
from medusa.sampling import Processors, ahead, draw, position_keys, row_keys
from medusa.trees.tensors import Drafted

VOCAB, STATES, HEADS = 11, 47, 3
few = settings(max_examples=60, derandomize=True, deadline=None)


class FakeCache:
    """Keeps the token of every slot, so that a slot kept wrongly, or seen by the wrong row, shows."""

    def __init__(self, capacity: int):
        self.capacity, self.tokens = capacity, None

    @property
    def bytes(self) -> int:
        return 0 if self.tokens is None else self.tokens.numel()

    def write(self, slots: range, tokens: torch.Tensor) -> None:
        if self.tokens is None:
            self.tokens = torch.full((len(tokens), self.capacity), -1)
        self.tokens[:, slots.start : slots.stop] = tokens

    def keep(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.tokens.scatter_(1, target, self.tokens.gather(1, source))

    def place(self, other: "FakeCache", rows: torch.Tensor, batch: int) -> None:
        if self.tokens is None:
            self.tokens = torch.full((batch, self.capacity), -1)
        self.tokens[rows, : other.capacity] = other.tokens

    def rows(self, start: int, stop: int) -> "FakeCache":
        part = FakeCache(self.capacity)
        part.tokens = self.tokens[start:stop]
        return part

    def swap(self, row: int, other: int, slots: int) -> None:
        self.tokens[[row, other], :slots] = self.tokens[[other, row], :slots]

    def grow(self, capacity: int) -> None:
        self.tokens, self.capacity = pad(self.tokens, (0, capacity - self.capacity), value=-1), capacity


class FakeModel:
    """All the tokens of a text, in order, lead to one of a few states, on which the next token depends, and so do guesses."""

    num_heads, max_length, vocab_size, scored, device = HEADS, None, VOCAB, VOCAB, torch.device("cpu")
    draft_vocabulary = None

    def __init__(self, seed: int, static_shapes: bool = False):
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(STATES, VOCAB, generator=generator)
        # Heads that are often right: they know the likeliest continuation, and are unsure of it.
        self.heads = torch.randn(HEADS, STATES, VOCAB, generator=generator)
        for state in range(STATES):
            follows = self.state([self.table[state].argmax().item()], state)
            for head in range(HEADS):
                token = self.table[follows].argmax().item()
                self.heads[head, state, token] += 3
                follows = self.state([token], follows)
        self.static_shapes = static_shapes

    @staticmethod
    def state(text: list[int], state: int = 0) -> int:
        for token in text:
            state = (5 * state + token + 1) % STATES
        return state

    def new_cache(self, capacity: int, rows: int | None = None) -> FakeCache:
        return FakeCache(capacity)

    def prefill(self, ids, attention_mask, cache):
        cache.write(range(ids.shape[1]), ids)
        rows = ids if attention_mask is None else [row[mask.bool()] for row, mask in zip(ids, attention_mask)]
        return self._read([self.state(row.tolist()) for row in rows])

    def extend(self, ids, frame, cache):
        (base, length), (row,) = (int(frame.base), int(frame.lengths[0])), ids.tolist()
        assert base == length and base + len(row) <= frame.visible <= cache.capacity
        cache.write(range(base, base + len(row)), ids)
        return self._read([self.state(cache.tokens[0, : base + n + 1].tolist()) for n in range(len(row))])[0][None]

    def logits(self, hidden):
        return self.table[hidden.argmax(-1)]

    def draft_and_verify(self, root, hidden, drafter, history, frame, cache):
        guesses = None
        if drafter.num_heads:
            guesses = drafter.guess(self.heads[: drafter.num_heads, hidden.argmax(-1)])
            if frame.draws is not None:
                guesses = guesses._replace(noise=ahead(frame.draws, frame.lengths, guesses.tokens))
        tokens, tree = drafter.assemble(root, guesses, history)
        base = int(frame.base)
        assert base + tokens.shape[1] <= frame.visible <= cache.capacity
        cache.write(range(base, base + tokens.shape[1]), tokens)
        states = []
        for row, (length, padding) in enumerate(zip(frame.lengths.tolist(), frame.pads.tolist())):
            committed = self.state(cache.tokens[row, padding:length].tolist())
            for lineage in tree.lineage[row if len(tree.lineage) > 1 else 0]:
                states.append(self.state(cache.tokens[row, base + lineage[lineage >= 0]].tolist(), committed))
        hidden, logits = self._read(states)
        return Drafted(tokens, tree, hidden.view(*tokens.shape, -1), logits.view(*tokens.shape, -1))

    def _read(self, states: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return one_hot(torch.tensor(states), STATES).float(), self.table[states]


def plain(model: FakeModel, prompt: list[int], options: DecodingOptions, stream: tuple[int, int]) -> tuple[list[int], str]:
    """The model's own continuation, a token at a time, and why it ends."""
    keys = position_keys(row_keys([stream], model.device), torch.arange(options.max_new_tokens))
    new: list[int] = []
    while True:
        scores, key = model.table[model.state(prompt + new)].float(), keys[len(new)]
        new.append(int(draw(scores[None, None], key[None, None]) if options.do_sample else scores.argmax()))
        if new[-1] in options.eos_token_ids:
            return new, "eos"
        if len(new) == options.max_new_tokens:
            return new, "length"


def prefix_closed(paths: list[list[int]]) -> MedusaTree:
    return MedusaTree({tuple(path[: end + 1]) for path in paths for end in range(len(path))})


path = st.lists(st.integers(0, 3), min_size=1, max_size=HEADS)
trees = st.one_of(
    st.lists(path, max_size=8).map(prefix_closed),
    st.builds(
        DynamicTree,
        num_nodes=st.integers(5, 12),
        depth=st.integers(1, HEADS),
        pair_bonus=st.sampled_from([0.0, 2.0]),
        copied=st.integers(0, 3),
    ),
)
texts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=7), min_size=1, max_size=5)
requests = st.builds(
    DecodingOptions,
    max_new_tokens=st.integers(1, 14),
    do_sample=st.booleans(),
    eos_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2).map(tuple),
    seed=st.integers(0, 1000),
)
models = st.builds(FakeModel, st.integers(0, 1000), st.booleans())


@few
@given(models, texts, trees, requests)
def test_every_row_gets_what_plain_decoding_gives_it(model, prompts, tree, options):
    ids, mask = left_padded(prompts)
    rows: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, ids, mask, tree, options):
        for row, tokens in zip(rows, step.tokens):
            row += tokens
    for number, (prompt, got) in enumerate(zip(prompts, rows)):
        assert (got, step.finish_reasons[number]) == plain(model, prompt, options, (options.seed, number))


@few
@given(models, texts, trees, requests, st.integers(1, 3))
def test_requests_that_join_get_what_they_get_alone(model, prompts, tree, options, rows):
    waiting = iter([Request(prompt, seed=number, tag=number) for number, prompt in enumerate(prompts)])
    found = {}
    for done in decode_queue(model, lambda: next(waiting, None), rows, tree, options):
        found[done.request.tag] = done.tokens, done.finish_reason
    assert found == {n: plain(model, prompt, options, (n, 0)) for n, prompt in enumerate(prompts)}


@few
@given(models, texts, trees, requests)
def test_processors_see_the_path_of_every_node(model, prompts, tree, options):
    """One that forbids the last token: no token is ever said twice in a row."""

    def no_repetition(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, ids[:, -1:], -torch.inf)

    options = DecodingOptions(options.max_new_tokens, options.do_sample, processors=Processors(((no_repetition, "tokens"),)))
    ids, mask = left_padded(prompts)
    rows = [prompt[-1:] for prompt in prompts]
    for step in decode(model, ids, mask, tree, options):
        for row, tokens in zip(rows, step.tokens):
            row += tokens
    for row in rows:
        assert len(row) == options.max_new_tokens + 1 and all(a != b for a, b in itertools.pairwise(row))


def test_heads_that_know_are_believed():
    """The fake is no straw man: trees save steps on it."""
    options = DecodingOptions(max_new_tokens=60)
    ids = torch.tensor([[1, 2, 3]])
    model = FakeModel(0)
    assert len(list(decode(model, ids, None, MedusaTree.dense([2, 2, 2]), options))) < 30
    assert len(list(decode(model, ids, None, MedusaTree([]), options))) == 60


def test_loop_is_free_of_transformers():
    program = "import sys, medusa.decoding, medusa.batch.pool; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
