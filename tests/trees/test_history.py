"""The history: which runs of tokens it says it has had."""

import pytest
import torch

import medusa.trees.history as context_module
from medusa.kernels.build import load_kernels
from medusa.trees.history import History, pair_end, pair_start, triple_end, triple_start


def runs(tokens: list[int], n: int) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def found(history: History, row: int, vocab: int, n: int) -> set[tuple[int, ...]]:
    every = torch.cartesian_prod(*[torch.arange(vocab)] * n)
    *start, end = (every[:, i].expand(len(history.last), -1) for i in range(n))
    key = pair_start(*start) + pair_end(end) if n == 2 else triple_start(*start) + triple_end(end)
    said = history.contains(key)
    return {tuple(run) for run in every[said[row]].tolist()}


def test_a_context_knows_exactly_the_pairs_and_triples_of_its_text():
    generator = torch.Generator().manual_seed(0)
    vocab, capacity = 12, 1 << 16  # a large table: no collisions among 12 ** 3 runs
    prompts = torch.randint(vocab, (2, 6), generator=generator)
    pads, root = torch.tensor([0, 2]), torch.tensor([3, 4])
    history = History.of(prompts, pads, root, capacity)
    texts = [prompts[0].tolist() + [3], prompts[1, 2:].tolist() + [4]]
    for _ in range(3):
        path = torch.randint(vocab, (2, 4), generator=generator)
        path[:, 0] = torch.tensor([text[-1] for text in texts])  # the root is known already
        length, bonus = torch.tensor([1, 4]), torch.randint(vocab, (2,), generator=generator)
        history.extend(path, length, bonus)
        for row, text in enumerate(texts):
            text += [*path[row, 1 : length[row]].tolist(), int(bonus[row])]
            assert history.last[row] == text[-2]
    for row, text in enumerate(texts):
        assert found(history, row, vocab, 2) == runs(text, 2)
        assert found(history, row, vocab, 3) == runs(text, 3)


def test_collisions_are_rare_in_a_full_table():
    capacity = 500
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(50_000, (1, capacity - 1), generator=generator)
    history = History.of(prompts, torch.tensor([0]), torch.tensor([1]), capacity)
    a, b = torch.randint(50_000, (2, 1, 10_000), generator=generator)
    assert history.contains(pair_start(a) + pair_end(b)).float().mean() < 0.15
    assert history.contains(pair_start(prompts[:, :-1]) + pair_end(prompts[:, 1:])).all()


def test_a_context_goes_on_as_it_did_before():
    texts = [[5, 6, 7, 8, 9, 5, 6, 7], [1, 2, 3, 9, 2, 4, 4, 2], [0, 0, 3, 8, 3, 9, 1, 3]]  # the root last
    prompts, roots = torch.tensor([text[:-1] for text in texts]), torch.tensor([text[-1] for text in texts])
    history = History.of(prompts, torch.tensor([0, 0, 2]), roots, 4096)
    assert history.after[0] == 3 and history.continuation(4)[0].tolist() == [8, 9, 5, 6]  # as after 5 6 7
    assert history.continuation(9)[0].tolist() == [8, 9, 5, 6, 7, 8, 9, 5, 6]  # and so on, behind the root
    assert history.after[1] == 0  # 4 2 is new
    assert history.after[2] == 0  # and 1 3
    path = torch.tensor([[7, 8, 9], [2, 3, 0], [3, 8, 0]])
    history.extend(path, torch.tensor([3, 2, 2]), torch.tensor([1, 9, 3]))
    assert history.continuation(2)[1].tolist() == [2, 4]  # 2 3 9, as before
    assert history.continuation(2)[2].tolist() == [9, 1]  # 3 8 3, as before
    assert history.after[0] == 0  # 9 1 is new
    assert history.tokens[1, :10].tolist() == [1, 2, 3, 9, 2, 4, 4, 2, 3, 9] and history.length.tolist() == [11, 10, 10]


def test_the_latest_of_several_continuations_is_taken():
    prompts = torch.tensor([[1, 2, 7, 1, 2, 8, 1]])
    history = History.of(prompts, torch.tensor([0]), torch.tensor([2]), 64)
    assert history.continuation(2).tolist() == [[8, 1]]
    history.extend(torch.tensor([[2, 8]]), torch.tensor([2]), torch.tensor([1]))
    assert history.continuation(1).tolist() == [[2]]


@pytest.mark.parametrize("slots", [1 << 14, 1])
def test_whatever_collides_what_is_copied_has_followed_the_same_tokens(slots, monkeypatch):
    monkeypatch.setattr(context_module, "SLOTS", slots)
    generator, capacity, vocab = torch.Generator().manual_seed(0), 128, 6
    kept = lost = 0
    for width in (1, 2, 3, 40):
        prompts, root = torch.randint(vocab, (2, width), generator=generator), torch.randint(vocab, (2,), generator=generator)
        pads = torch.tensor([0, min(1, width - 1)])
        history = History.of(prompts, pads, root, capacity)
        texts = [[*prompts[row, pads[row] :].tolist(), int(root[row])] for row in range(2)]
        for _ in range(12):
            path = torch.cat([root[:, None], torch.randint(vocab, (2, 2), generator=generator)], dim=1)
            length, root = torch.randint(1, 4, (2,), generator=generator), torch.randint(vocab, (2,), generator=generator)
            history.extend(path, length, root)
            for row, text in enumerate(texts):
                text += [*path[row, 1 : length[row]].tolist(), int(root[row])]
                wanted = latest(text, 3) or latest(text, 2)
                got = max(0, int(history.after[row] - pads[row]))
                assert got == 0 or text[got - 2 : got] == text[-2:]
                kept, lost = kept + (got == wanted), lost + (got != wanted)
    assert lost == 0 if slots > 1 else lost > 0
    assert kept > 0


def latest(text: list[int], run: int) -> int:
    """Where what followed the last such run as the text ends in stands; 0 where there was none."""
    return next((at for at in range(len(text) - 1, run - 1, -1) if text[at - run : at] == text[-run:]), 0)


@pytest.mark.parametrize("slots", [16, 1])
def test_the_kernel_extends_as_the_definition_does(slots, monkeypatch):
    if not load_kernels():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(context_module, "SLOTS", slots)
    generator, capacity, vocab = torch.Generator().manual_seed(2), 40, 5
    prompts, root = torch.randint(vocab, (3, 6), generator=generator), torch.randint(vocab, (3,), generator=generator)
    both = [History.of(prompts, torch.tensor([0, 2, 5]), root, capacity) for _ in range(2)]
    for _ in range(24):  # beyond the capacity in the end, as rows that have ended are
        path = torch.cat([root[:, None], torch.randint(vocab, (3, 3), generator=generator)], dim=1)
        length, root = torch.randint(1, 5, (3,), generator=generator), torch.randint(vocab, (3,), generator=generator)
        for history, loaded in zip(both, (False, True), strict=True):
            monkeypatch.setattr(context_module, "are_loaded", lambda loaded=loaded: loaded)
            history.part(0, 2).extend(path[:2], length[:2], root[:2])
            history.part(2, 3).extend(path[2:], length[2:], root[2:])
        wanted, got = both
        for name in ("length", "last", "after"):
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name
        # The last slot of each takes what is to be ignored.
        assert torch.equal(got.table[:, :-1], wanted.table[:, :-1]) and torch.equal(got.tokens[:, :-1], wanted.tokens[:, :-1])
