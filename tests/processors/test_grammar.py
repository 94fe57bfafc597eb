"""Claims about structured output: it is valid, plain decoding says the same, and forced tokens save steps."""

import json
import re

import pytest
import torch

from medusa import DynamicTree, Grammar, MedusaHeads, MedusaModel, MedusaTree
from medusa.batch.pool import Request, decode_queue
from medusa.errors import InvalidInput
from medusa.generation.preparation import options_of_rows
from tiny import random_heads, tiny_backbone

pytest.importorskip("llguidance")

PROMPT = "# a record\nrecord = "
NAMED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "args": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
        "line": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["function", "class", "module"]},
    },
    "required": ["name", "args", "line", "kind"],
    "additionalProperties": False,
}
SCHEMAS = [
    NAMED,
    {"type": "boolean"},
    {"const": {"a_rather_long_key_that_is_forced": [1, 2, {"nothing": None}], 'é\n"': "日本"}},
    {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"x": {"type": "null"}}, "additionalProperties": False}]},
    {"type": "string", "pattern": "^[a-f]{3}-[0-9]{2}$"},
]
SAMPLED = dict(do_sample=True, temperature=0.9, seed=3)
TREES = [
    MedusaTree([]),
    None,
    MedusaTree.dense([4, 2, 2]),
    DynamicTree(16, 5),
    DynamicTree(8, 1),
]


@pytest.fixture(scope="module")
def ids(embedded_tokenizer):
    return embedded_tokenizer(PROMPT, return_tensors="pt").input_ids


def continuation(model, ids, grammar, **options):
    output = model.generate(ids, max_new_tokens=160, grammar=grammar, return_dict_in_generate=True, **options)
    return output.new_tokens(0).tolist(), output.steps, output.finish_reasons[0]


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_json_is_valid_ends_and_is_the_same_for_every_tree(embedded_model, embedded_tokenizer, ids, schema, sampling):
    grammar = Grammar.json(schema, embedded_tokenizer)
    found = [continuation(embedded_model, ids, grammar, tree=tree, **sampling) for tree in TREES]
    assert all(tokens == found[0][0] for tokens, _, _ in found)
    assert {reason for _, _, reason in found} == {"eos"}
    text = embedded_tokenizer.decode(found[0][0], skip_special_tokens=True)
    value = json.loads(text)
    assert text.encode().decode() == text
    if "const" in schema:
        assert value == schema["const"]
    if schema is NAMED:
        assert list(value) == ["name", "args", "line", "kind"] and value["kind"] in ("function", "class", "module")
    assert not re.search(r"[,:{\[]\s", re.sub(r'"(\\.|[^"\\])*"', '""', text))  # compact


def test_forced_tokens_longer_than_the_heads_reach_take_one_step(embedded_model, embedded_tokenizer, ids):
    grammar = Grammar.json(SCHEMAS[2], embedded_tokenizer)
    tokens, steps, _ = continuation(embedded_model, ids, grammar, tree=DynamicTree(16, 2))
    assert len(tokens) > 20 and len(tokens) / steps > 5


def test_whitespace_is_free_if_asked_for(embedded_model, embedded_tokenizer):
    grammar = Grammar.json(NAMED, embedded_tokenizer, whitespace=True)
    place = grammar.start()
    assert place.try_consume_tokens(embedded_tokenizer("{\n  ", add_special_tokens=False).input_ids) > 1
    assert (
        Grammar.json(NAMED, embedded_tokenizer)
        .start()
        .try_consume_tokens(embedded_tokenizer("{\n  ", add_special_tokens=False).input_ids)
        == 1
    )


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_regex_choice_and_lark_are_followed(embedded_model, embedded_tokenizer, ids, sampling):
    choices = ["return None", 'say "é\\n"\n', "return"]
    for grammar, right in (
        (Grammar.regex(r"[a-c]{2,5}=\d\d?", embedded_tokenizer), lambda text: re.fullmatch(r"[a-c]{2,5}=[0-9]{1,2}", text)),
        (Grammar.choice(choices, embedded_tokenizer), lambda text: text in choices),
        (Grammar.lark('start: "f(" arg ("," arg){0,3} ")"\narg: /[a-z]{1,3}/', embedded_tokenizer), lambda t: t[:2] == "f("),
    ):
        plain = continuation(embedded_model, ids, grammar, tree=MedusaTree([]), **sampling)
        found = continuation(embedded_model, ids, grammar, **sampling)
        assert found[0] == plain[0] and found[2] == "eos"
        assert right(embedded_tokenizer.decode(found[0], skip_special_tokens=True))


def test_grammar_combines_with_penalties_and_typical_acceptance_stays_valid(embedded_model, embedded_tokenizer, ids):
    grammar = Grammar.json(NAMED, embedded_tokenizer)
    options = dict(presence_penalty=0.8, frequency_penalty=0.5, repetition_penalty=1.2, **SAMPLED)
    plain = continuation(embedded_model, ids, grammar, tree=MedusaTree([]), **options)
    assert continuation(embedded_model, ids, grammar, **options)[0] == plain[0]
    typical = continuation(embedded_model, ids, grammar, acceptance="typical", **SAMPLED)
    json.loads(embedded_tokenizer.decode(typical[0], skip_special_tokens=True))


def test_grammar_wins_where_another_processor_excludes_all_that_is_left(embedded_model, embedded_tokenizer, ids):
    grammar = Grammar.choice(["no"], embedded_tokenizer)
    tokens, _, reason = continuation(embedded_model, ids, grammar, min_new_tokens=20)
    assert reason == "eos" and embedded_tokenizer.decode(tokens, skip_special_tokens=True) == "no"


def test_processors_see_the_paths_of_a_tree_that_a_grammar_changed(embedded_model, embedded_tokenizer, ids):
    text = "return perhaps_it_is_so"
    grammar = Grammar.choice([text], embedded_tokenizer)
    forced = continuation(embedded_model, ids, grammar)[0][:-1]
    ends = [*embedded_model.eos_token_ids, *embedded_tokenizer("\n:)").input_ids]
    given = {"do_sample": True, "temperature": 2.0, "eos_token_id": ends, "min_new_tokens": len(forced)}
    for seed in range(12):  # with the wrong path, an end seems to come too early, and all ends are as likely
        plain, fixed = (
            continuation(embedded_model, ids, grammar, tree=tree, seed=seed, **given)[0]
            for tree in (MedusaTree([]), MedusaTree.dense([4, 2, 2]))
        )
        assert plain == fixed and plain[:-1] == forced


def test_rows_of_a_queue_start_their_grammar_anew(embedded_model, embedded_tokenizer):
    grammar = Grammar.json(NAMED, embedded_tokenizer)
    options = options_of_rows(embedded_model, "test", grammar=grammar, max_new_tokens=120, **SAMPLED)
    prompts = [embedded_tokenizer(f"{PROMPT}{'x' * n}").input_ids for n in range(5)]
    waiting = [Request(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    take = iter(waiting)
    found = decode_queue(embedded_model, lambda: next(take, None), 2, embedded_model.tree, options)
    for finished in found:
        prompt = torch.tensor([finished.request.ids])
        sampling = SAMPLED | {"seed": finished.request.seed}
        alone = continuation(embedded_model, prompt, grammar, tree=MedusaTree([]), **sampling)[0]
        assert finished.tokens == alone
        json.loads(embedded_tokenizer.decode(finished.tokens, skip_special_tokens=True))


@pytest.mark.filterwarnings("error:torch.compile failed")
def test_guided_steps_compile_and_say_the_same(embedded_tokenizer, ids):
    backbone = tiny_backbone(vocab_size=4096, num_hidden_layers=1)
    model = MedusaModel(backbone, random_heads(backbone), DynamicTree(12, 3))
    grammar = Grammar.json(SCHEMAS[0], embedded_tokenizer)
    options = dict(eos_token_id=embedded_tokenizer.eos_token_id, max_new_tokens=60)
    wanted = model.generate(ids, grammar=grammar, tree=MedusaTree([]), **options)
    assert torch.equal(model.generate(ids, grammar=grammar, compile=True, **options), wanted)


def test_heads_with_a_draft_vocabulary_and_path_heads_are_guided(embedded_tokenizer, ids):
    backbone = tiny_backbone(vocab_size=4096, num_hidden_layers=1)
    grammar = Grammar.json(SCHEMAS[0], embedded_tokenizer)
    options = dict(eos_token_id=embedded_tokenizer.eos_token_id, max_new_tokens=60, grammar=grammar)
    for given in (dict(token_map=torch.arange(0, 4096, 3)), dict(shared=True, heads_kind="path")):
        heads = MedusaHeads.for_lm_head(backbone.get_output_embeddings(), 3, **given)
        model = MedusaModel(backbone, heads, DynamicTree(12, 3))
        plain, guided = (model.generate(ids, tree=tree, **options) for tree in (MedusaTree([]), None))
        assert torch.equal(plain, guided)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda tokenizer: Grammar.json({"type": "strin"}, tokenizer), "strin"),
        (lambda tokenizer: Grammar.json("{", tokenizer), "not JSON"),
        (lambda tokenizer: Grammar.json("[1]", tokenizer), "is an object"),
        (lambda tokenizer: Grammar.json({"type": "array", "uniqueItems": True}, tokenizer), "uniqueItems"),
        (lambda tokenizer: Grammar.json({"enum": []}, tokenizer), "Unsatisfiable"),
        (lambda tokenizer: Grammar.regex("(", tokenizer), "unclosed"),
        (lambda tokenizer: Grammar.lark("start: foo", tokenizer), "foo"),
        (lambda tokenizer: Grammar.choice([], tokenizer), "choice"),
        (lambda tokenizer: Grammar.choice("yes", tokenizer), "choice"),
        (lambda tokenizer: Grammar.regex("a", object()), "fast tokenizer"),
    ],
)
def test_bad_grammar_is_refused_in_one_line(embedded_tokenizer, make, says):
    with pytest.raises(InvalidInput, match=says) as error:
        make(embedded_tokenizer)
    assert "\n" not in str(error.value)


def test_grammar_without_an_end_or_of_another_kind_is_refused(embedded_model, embedded_tokenizer, ids):
    with pytest.raises(InvalidInput, match="eos_token_id"):
        embedded_model.generate(ids, grammar=Grammar.regex("a", embedded_tokenizer), eos_token_id=[])
    with pytest.raises(InvalidInput, match="expected a Grammar"):
        embedded_model.generate(ids, grammar='{"type": "object"}')
