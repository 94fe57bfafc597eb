"""Claims about drafts inside vLLM that need no vLLM; `integration/vllm` runs the real one."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medusa import EMBEDDED, MedusaHeads, MedusaTree
from medusa.batch.rows import DecodingOptions
from medusa.checkpoints.writer import save_heads
from medusa.data.prompt_sets import held_out_prompts
from medusa.decoding import prefill
from medusa.engines import vllm
from medusa.engines.vllm import MedusaProposer, draft_chain, hand_on_hidden_states, heads_for
from medusa.errors import CheckpointError, InvalidInput, UnsupportedEngine
from tiny import VOCAB, random_heads, tiny_backbone

PADDING = 24  # rows that vLLM adds to the embeddings and the LM head


class Served(nn.Module):
    """A backbone in the shape that vLLM gives it."""

    def __init__(self, backbone, embedding_factor: float = 1.0):
        super().__init__()
        vocab, width = backbone.get_output_embeddings().weight.shape
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab + PADDING, width)
        self.lm_head = nn.Linear(width, vocab + PADDING, bias=False)
        self.factor = embedding_factor
        with torch.no_grad():
            self.model.embed_tokens.weight[:vocab] = backbone.get_input_embeddings().weight
            self.lm_head.weight[:vocab] = backbone.get_output_embeddings().weight
            self.lm_head.weight[vocab:] = 1e3 * torch.randn(PADDING, width)  # if it were read, it would win

    def embed_input_ids(self, ids):
        return self.factor * self.model.embed_tokens(ids)


class Runner:
    """A runner that asks for drafts as vLLM's V1 runner does."""

    def __init__(self, drafter=None):
        self.drafter = drafter

    def propose_draft_token_ids(
        self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, sample_hidden_states,
        aux_hidden_states, spec_decode_metadata,
    ):  # fmt: skip
        return "the runner's own"


def of_vllm(backbone):
    weight = backbone.get_output_embeddings().weight
    return SimpleNamespace(get_vocab_size=lambda: weight.shape[0], get_hidden_size=lambda: weight.shape[1], dtype=torch.float32)


def configured(backbone, heads, num_drafts: int, world_size: int = 1):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=world_size),
        speculative_config=SimpleNamespace(num_speculative_tokens=num_drafts),
        model_config=of_vllm(backbone),
        additional_config={"medusa_heads": str(heads)} if heads is not None else {},
    )


@pytest.fixture
def runner_class(monkeypatch):
    class Fresh(Runner):
        propose_draft_token_ids = Runner.propose_draft_token_ids

    monkeypatch.setattr(vllm, "runner_class", lambda: Fresh)
    monkeypatch.setattr(vllm, "repair_temperatures", lambda: None)  # of vLLM's sampler, which is not there
    return Fresh


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def saved(folder, backbone, num_heads=3, **options) -> MedusaHeads:
    heads = random_heads(backbone, num_heads, **options)
    save_heads(heads, folder)
    return heads


def greedy_rounds(runner, backbone, prompts, rounds):
    """vLLM's loop: requests in a batch, the last one with half of its prompt in the first round; accepted drafts by round."""
    texts, drafts, accepted = [*prompts[:-1], prompts[-1][:20]], [[] for _ in prompts], [[] for _ in prompts]
    for number in range(rounds):
        sampled, rows = [], []
        for text, drafted in zip(texts, drafts, strict=True):
            out = backbone(torch.tensor([text + drafted]), output_hidden_states=True)
            said = out.logits[0, -len(drafted) - 1 :].argmax(-1).tolist()
            right = next((i for i, token in enumerate(drafted) if token != said[i]), len(drafted))
            sampled.append([*drafted[:right], said[right]])
            rows.append(out.hidden_states[-1][0, -len(drafted) - 1 :])
        if number == 0:
            sampled[-1] = []
        metadata = SimpleNamespace(num_draft_tokens=[len(drafted) for drafted in drafts]) if number else None
        drafts = runner.propose_draft_token_ids(
            None, sampled, None, None, torch.cat(rows), aux_hidden_states=None, spec_decode_metadata=metadata
        )
        for row, tokens in enumerate(sampled):
            texts[row] = texts[row] + tokens if tokens else prompts[row]
            accepted[row].append(len(tokens))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)], accepted


@torch.inference_mode()
def test_a_runner_that_asks_as_vllm_does_accepts_what_our_chain_accepts(embedded_model, runner_class):
    backbone, chain = embedded_model.backbone, MedusaTree.dense([1] * 5)
    prompts = [prompt.ids[:length].tolist() for prompt, length in zip(held_out_prompts(), (60, 45, 70))]
    proposer = MedusaProposer(configured(backbone, EMBEDDED, 5))
    proposer.load_model(Served(backbone))
    texts, accepted = greedy_rounds(runner_class(proposer), backbone, prompts, rounds=12)
    for row, prompt in enumerate(prompts):
        start = 1 if row < 2 else 2  # the round of the first token, after the prompt, is not a step of ours
        wanted = embedded_model.generate(
            torch.tensor([prompt]), max_new_tokens=len(texts[row]) + 6, tree=chain, return_dict_in_generate=True
        )
        assert texts[row] == wanted.sequences[0, len(prompt) : len(prompt) + len(texts[row])].tolist()
        assert accepted[row][start:] == wanted.acceptance_lengths[0][: 12 - start]
    assert sum(map(sum, accepted)) > 3 * 12  # some drafts are accepted


def test_drafts_are_those_of_our_static_chain(embedded_model):
    prompts = torch.stack([prompt.ids[:50] for prompt in held_out_prompts()[:6]])
    tree = MedusaTree.dense([1] * 5)
    state = prefill(embedded_model, prompts, None, tree, DecodingOptions(max_new_tokens=8))
    guesses = state.drafter.guess(embedded_model.heads(state.hidden, 5, state.root))
    wanted, _ = state.drafter.assemble(state.root, guesses)
    assert torch.equal(draft_chain(embedded_model.heads, state.hidden, state.root, 5), wanted[:, 1:])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scored", [VOCAB, 20])
@pytest.mark.parametrize("kind", ["medusa", "root", "path"])
def test_a_chain_is_the_formula(tmp_path, backbone, kind, scored, shared):
    tokens = torch.arange(VOCAB)[-scored:]
    token_map = tokens if scored < VOCAB else None
    options = {"heads_kind": kind, "embedding_scale": 1.5} if kind != "medusa" else {}
    heads = MedusaHeads.for_lm_head(backbone.get_output_embeddings(), 3, 1, shared, token_map, **options)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    save_heads(heads, tmp_path)
    served = heads_for(Served(backbone), str(tmp_path), 3, of_vllm(backbone))
    hidden, root = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 9, 40, 63])
    drafted = draft_chain(served, hidden, root, 3)
    embed = 1.5 * backbone.get_input_embeddings().weight
    for row in range(4):
        path = [int(root[row])]
        for k in range(3):
            block, lm_head = heads[k][0], backbone.get_output_embeddings() if shared else heads[k][1]
            inner = block.linear(hidden[row])
            for j, token in enumerate(path[: {"medusa": 0, "root": 1, "path": k + 1}[kind]]):
                inner = inner + block.tokens.weight[:, 64 * j : 64 * (j + 1)] @ embed[token]
            scores = lm_head(hidden[row] + F.silu(inner))
            path.append(int(tokens[(scores[tokens] if shared else scores).argmax()]))
        assert drafted[row].tolist() == path[1:]


def test_fewer_drafts_than_heads_are_the_first_heads(tmp_path, backbone):
    saved(tmp_path, backbone)
    heads = heads_for(Served(backbone), str(tmp_path), 2, of_vllm(backbone))
    hidden, root = torch.randn(2, 64), torch.tensor([1, 2])
    assert torch.equal(draft_chain(heads, hidden, root, 2), draft_chain(heads, hidden, root, 3)[:, :2])


def test_the_scheduler_may_want_fewer_drafts(tmp_path, backbone, runner_class):
    saved(tmp_path, backbone)
    drafter = MedusaProposer(configured(backbone, tmp_path, 3))
    drafter.load_model(Served(backbone))
    hidden, sampled = torch.randn(2, 64), [[5], [6]]
    whole = drafter.draft(SimpleNamespace(num_spec_tokens_to_schedule=3), sampled, hidden, None)
    assert whole == drafter.draft(None, sampled, hidden, None) and [len(chain) for chain in whole] == [3, 3]
    for number in (2, 0):
        wanted = [chain[:number] for chain in whole]
        assert drafter.draft(SimpleNamespace(num_spec_tokens_to_schedule=number), sampled, hidden, None) == wanted


def test_other_proposers_are_asked_as_before(runner_class):
    hand_on_hidden_states(runner_class)
    once = runner_class.propose_draft_token_ids
    hand_on_hidden_states(runner_class)
    assert runner_class.propose_draft_token_ids is once and inspect.signature(once) == inspect.signature(
        Runner.propose_draft_token_ids
    )
    assert runner_class("another").propose_draft_token_ids(*range(7)) == "the runner's own"


def test_an_engine_without_what_is_needed_is_refused_by_name(backbone):
    with pytest.raises(UnsupportedEngine, match=r"vLLM.* no V1 model runner"):
        MedusaProposer(configured(backbone, EMBEDDED, 3))  # no vLLM is installed where these tests run

    class Blind:
        def propose_draft_token_ids(self, scheduler_output, sampled_token_ids):
            return []

    with pytest.raises(UnsupportedEngine, match="does not pass sample_hidden_states, spec_decode_metadata"):
        hand_on_hidden_states(Blind)
    with pytest.raises(UnsupportedEngine, match="does not pass"):
        hand_on_hidden_states(object)


def test_settings_that_cannot_be_followed_are_refused(runner_class, backbone):
    with pytest.raises(UnsupportedEngine, match="one process, this one has 2"):
        MedusaProposer(configured(backbone, EMBEDDED, 3, world_size=2))
    with pytest.raises(InvalidInput, match="medusa_heads"):
        MedusaProposer(configured(backbone, None, 3))
    with pytest.raises(UnsupportedEngine, match="without hidden states"):
        MedusaProposer(configured(backbone, EMBEDDED, 3)).propose([[1]], None, None)
    drafter = MedusaProposer(configured(backbone, EMBEDDED, 3))
    with pytest.raises(UnsupportedEngine, match=r"5 hidden states for 2 tokens"):
        drafter.draft(None, [[1], [2]], torch.randn(5, 64), None)


def test_heads_that_do_not_fit_are_refused(tmp_path, backbone):
    saved(tmp_path, backbone)
    with pytest.raises(InvalidInput, match=r"num_speculative_tokens is 4, .* has 3 heads"):
        heads_for(Served(backbone), str(tmp_path), 4, of_vllm(backbone))
    with pytest.raises(CheckpointError, match="use heads trained on this model"):
        heads_for(Served(backbone), str(EMBEDDED), 3, of_vllm(backbone))


def test_an_lm_head_or_embeddings_that_cannot_be_read_are_refused(tmp_path, backbone):
    saved(tmp_path, backbone, shared=True, heads_kind="root")
    served = Served(backbone)
    served.lm_head = nn.Module()
    served.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedEngine, match="without a matrix of floats"):
        heads_for(served, str(tmp_path), 3, of_vllm(backbone))
    with pytest.raises(UnsupportedEngine, match=r"no token embeddings .* uses as they are"):
        heads_for(Served(backbone, embedding_factor=8.0), str(tmp_path), 3, of_vllm(backbone))


def test_what_is_not_read_is_said(tmp_path, backbone):
    saved(tmp_path, backbone)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"the adapter in .* is not read"):
        heads_for(Served(backbone), str(tmp_path), 3, of_vllm(backbone))
