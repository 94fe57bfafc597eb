"""Claims about heads that read the root or the path: they guess otherwise, the output stays the backbone's."""

import heapq
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from medusa import DynamicTree, MedusaHeads, MedusaModel, MedusaTree
from medusa.checkpoints.reader import load_heads, open_checkpoint
from medusa.checkpoints.writer import save_heads, write_checkpoint
from medusa.config import CONFIG_FILE
from medusa.errors import CheckpointError, InvalidInput
from medusa.shortlist import along_paths
from medusa.training.config import TrainingConfig
from medusa.training.data import Row, Rows
from medusa.training.run import train_heads
from medusa.trees.dynamic import LEAST_COST
from medusa.tuning.recording import record
from medusa.tuning.replay import fit_dynamic_tree, fit_temperatures, replay_texts
from tiny import VOCAB, left_padded, plain_greedy, random_heads, random_prompt, tiny_backbone

KINDS = ("root", "path")


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone(eos_token_id=None)


def bound(backbone, kind: str, shared: bool = True, num_layers: int = 1, num_heads: int = 3, **options) -> MedusaHeads:
    heads = random_heads(backbone, num_heads, num_layers, shared, heads_kind=kind, embedding_scale=1.5, **options)
    return heads.bound_to(backbone.get_output_embeddings(), torch.device("cpu"), torch.float32, backbone.get_input_embeddings())


def test_a_state_is_the_formula(backbone):
    heads = bound(backbone, "path", num_layers=2)
    h, tokens = torch.randn(5, 64), torch.randint(VOCAB, (5, 3))
    known = 1.5 * backbone.get_input_embeddings()(tokens).flatten(1)
    for k in range(3):
        first, second = heads.parts(k)[0], heads.parts(k)[1]
        read = known[:, : (k + 1) * 64]
        inner = h + F.silu(h @ first.linear.weight.T + first.linear.bias + read @ first.tokens.weight.T)
        wanted = inner + F.silu(inner @ second.linear.weight.T + second.linear.bias)
        assert torch.allclose(heads.state(h, k, heads.embed(tokens[:, : k + 1]).flatten(1)), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_new_heads_say_what_plain_ones_say(backbone, kind):
    plain = MedusaHeads.for_lm_head(backbone.get_output_embeddings(), 3, 1, True)
    heads = MedusaHeads.for_lm_head(backbone.get_output_embeddings(), 3, 1, True, heads_kind=kind)
    heads.share(backbone.get_output_embeddings(), backbone.get_input_embeddings())
    h = torch.randn(2, 64)
    assert torch.equal(heads(h, root=torch.tensor([3, 5])), plain(h))


@pytest.mark.parametrize("shared", [True, False])
def test_a_shortlist_of_everything_is_scored_as_the_whole_vocabulary_is(backbone, shared):
    heads = bound(backbone, "path", shared)
    hidden, root = torch.randn(2, 64), torch.tensor([3, 9])
    states = heads.states(hidden, 3, root)
    log_p, places = heads.logits(states).log_softmax(-1).topk(VOCAB, dim=-1)
    along = along_paths(heads, hidden, root, states, places, log_p)
    paths = torch.randint(VOCAB, (2, 4, 2))
    for depth in (1, 2):
        scores = along(depth, paths[..., :depth]).log_softmax(-1)
        for row, width in itertools.product(range(2), range(4)):
            known = heads.embed(torch.cat([root[row, None], paths[row, width, :depth]])).flatten()
            wanted = heads.lm_head(depth)(heads.state(hidden[row], depth, known)).log_softmax(-1)
            assert torch.allclose(scores[row, width], wanted[places[depth, row]], atol=1e-4)


def test_a_dynamic_tree_holds_the_nodes_that_are_likeliest_along_their_paths(backbone):
    heads = bound(backbone, "path")
    tree = DynamicTree(12, 3, ranks=VOCAB, pair_bonus=0.0, triple_bonus=0.0)
    model = MedusaModel(backbone, heads, tree)
    hidden, root = torch.randn(1, 64), torch.tensor([7])
    drafter = tree.drafter()
    states = model.heads.states(hidden, 3, root)
    guesses = drafter.guess(model.heads.logits(states))
    along = along_paths(model.heads, hidden, root, states, guesses.tokens, guesses.log_p)
    tokens, tensors = drafter.assemble(root, guesses._replace(along=along))
    got = {tuple(tokens[0, [n for n in line if n > 0]].tolist()) for line in tensors.lineage[0].tolist()} - {()}

    def log_p(path: tuple[int, ...]) -> list[float]:
        known = model.heads.embed(torch.tensor([7, *path])).flatten()
        scores = model.heads.lm_head(len(path))(model.heads.state(hidden[0], len(path), known))
        return scores.log_softmax(-1).clamp(max=-LEAST_COST).tolist()

    # Best first by a heap, over the whole vocabulary.
    frontier = [(-p + LEAST_COST, (token,)) for token, p in enumerate(log_p(()))]
    heapq.heapify(frontier)
    wanted: set[tuple[int, ...]] = set()
    while len(wanted) < 11:
        cost, path = heapq.heappop(frontier)
        wanted.add(path)
        if len(path) < 3:
            for token, p in enumerate(log_p(path)):
                heapq.heappush(frontier, (cost - p + LEAST_COST, (*path, token)))
    assert got == wanted and all(math.isfinite(p) for p in log_p(()))


TREES = [MedusaTree.dense([3, 3, 2]), DynamicTree(14, 3, 40), DynamicTree(20, 3, 20, (0.7, 1.2, 1.0), copied=5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tree", TREES)
def test_greedy_output_is_the_backbones(backbone, kind, shared, tree):
    model = MedusaModel(backbone, bound(backbone, kind, shared), tree)
    prompts = [random_prompt(length, seed=length) for length in (4, 9, 6)]
    ids, mask = left_padded(prompts)
    output = model.generate(ids, mask, max_new_tokens=25)
    for row, prompt in enumerate(prompts):
        assert output[row, ids.shape[1] :].tolist() == plain_greedy(backbone, prompt, 25)
    penalised = model.generate(prompts[0], max_new_tokens=25, repetition_penalty=1.4)
    assert penalised[0, 4:].tolist() == plain_greedy(backbone, prompts[0], 25, repetition_penalty=1.4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", TREES)
def test_sampled_output_is_plain_sampling_for_a_seed(backbone, kind, tree):
    model = MedusaModel(backbone, bound(backbone, kind), tree)
    ids, mask = left_padded([random_prompt(5), random_prompt(8)])
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 3, "max_new_tokens": 30}
    plain = model.generate(ids, mask, tree=MedusaTree([]), **options)
    assert torch.equal(model.generate(ids, mask, **options), plain)


def test_compiled_steps_are_those_of_uncompiled_ones(backbone):
    model = MedusaModel(backbone, bound(backbone, "path"), DynamicTree(8, 3, 16))
    prompt = random_prompt(6)
    output = model.generate(prompt, max_new_tokens=20, compile=True, return_dict_in_generate=True)
    wanted = model.generate(prompt, max_new_tokens=20, return_dict_in_generate=True)
    assert torch.equal(output.sequences, wanted.sequences) and output.acceptance_lengths == wanted.acceptance_lengths


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_replay_takes_the_steps_that_decoding_takes(backbone, kind, temperature, tmp_path):
    model = MedusaModel(backbone, bound(backbone, kind), MedusaTree([]))
    prompts = [random_prompt(length, seed=length) for length in (5, 11)]
    options = {"ranks": 40, "temperature": temperature, "batch_size": 2, "folder": tmp_path}
    record(model, [prompt[0] for prompt in prompts], 30, **options)
    texts = record(model, [prompt[0] for prompt in prompts], 30, **options)  # from the folder
    ids, mask = left_padded(prompts)
    sampling = {"do_sample": True, "temperature": temperature, "seed": 0} if temperature else {}
    for tree in (DynamicTree(12, 3, 40, (0.9, 1.1, 1.0)), DynamicTree(30, 2, 20, (), 0.0, 0.0), MedusaTree.dense([3, 2])):
        output = model.generate(ids, mask, max_new_tokens=30, tree=tree, return_dict_in_generate=True, **sampling)
        assert replay_texts(texts, tree).steps.tolist() == [len(lengths) for lengths in output.acceptance_lengths]
    assert len(fit_temperatures(texts)) == 3 and fit_dynamic_tree(texts, 8).depth == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["medusa", "merged"])
def test_files_keep_what_heads_read(backbone, kind, to, tmp_path):
    backbone.save_pretrained(tmp_path / "backbone")
    heads = random_heads(backbone, 3, shared=True, heads_kind=kind, embedding_scale=0.3)
    write_checkpoint(heads, tmp_path / "out", to, backbone=tmp_path / "backbone")
    found = load_heads(tmp_path / "out")
    assert found.kind == kind and found.config == heads.config
    assert open_checkpoint(tmp_path / "out").format == to and "version" not in found.config.to_dict()  # TGI's mark of v2
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), heads.parameters(), strict=True))
    for refused in ("v0.1", "v2", "vllm"):
        with pytest.raises(CheckpointError, match=f"these read the {kind}"):
            write_checkpoint(heads, tmp_path / refused, refused, lm_head=backbone.get_output_embeddings())


def test_files_without_the_scale_of_embeddings_are_refused(backbone, tmp_path):
    save_heads(random_heads(backbone, 2, heads_kind="root"), tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(CheckpointError, match="medusa_embedding_scale"):
        open_checkpoint(tmp_path)


def test_heads_without_a_block_to_read_with_are_refused(backbone):
    with pytest.raises(InvalidInput, match="num_layers is 0"):
        random_heads(backbone, 2, num_layers=0, heads_kind="root")


def sampled_rows(backbone) -> Rows:
    generator, rows = torch.Generator().manual_seed(1), []
    for _ in range(24):
        text = torch.randint(3, VOCAB, (40,), generator=generator)
        text[1::2] = (text[0::2] * 5 + 1) % VOCAB  # every second token follows from the one before it
        rows.append(Row(text.int(), torch.ones(len(text), dtype=torch.bool), (len(text),)))
    return Rows(rows)


def test_heads_that_read_learn_what_plain_ones_cannot(backbone, tmp_path):
    rows, losses = sampled_rows(backbone), {}
    options = {"num_heads": 2, "shared_lm_head": True, "targets": "hard", "max_steps": 60, "warmup_steps": 2, "held_out": 0.0}
    for kind in ("medusa", *KINDS):
        config = TrainingConfig(heads_kind=kind, learning_rate=1e-2, **options)
        metrics = train_heads(MedusaModel(tiny_backbone(eos_token_id=None)), rows, tmp_path / kind, config)
        losses[kind] = metrics["eval_loss"]
        assert load_heads(tmp_path / kind).kind == kind
    assert losses["root"] < losses["medusa"] - 0.1 and losses["path"] < losses["root"] - 0.1


@pytest.mark.parametrize("start, kind", [("medusa", "root"), ("medusa", "path"), ("root", "path"), ("path", "path")])
def test_training_starts_from_heads_that_read_less(start, kind, tmp_path):
    backbone = tiny_backbone(eos_token_id=None)
    given = bound(backbone, start, num_heads=2)
    config = TrainingConfig(num_heads=2, shared_lm_head=True, heads_kind=kind, max_steps=1, learning_rate=1e-12, held_out=0.0)
    train_heads(MedusaModel(backbone, given), sampled_rows(backbone), tmp_path, config)
    found = bound_again(backbone, load_heads(tmp_path))
    h, root = torch.randn(4, 64), torch.tensor([3, 4, 5, 6])
    assert torch.allclose(found(h, root=root), given(h, root=root), atol=1e-4)


def bound_again(backbone, heads: MedusaHeads) -> MedusaHeads:
    return heads.bound_to(backbone.get_output_embeddings(), torch.device("cpu"), torch.float32, backbone.get_input_embeddings())


def test_heads_that_read_more_than_is_asked_for_are_no_start(tmp_path):
    backbone = tiny_backbone(eos_token_id=None)
    config = TrainingConfig(num_heads=2, shared_lm_head=True, heads_kind="medusa", max_steps=1, held_out=0.0)
    with pytest.raises(InvalidInput, match="of kind root, expected medusa"):
        train_heads(MedusaModel(backbone, bound(backbone, "root", num_heads=2)), sampled_rows(backbone), tmp_path, config)
