"""Claims about prompt sets: every published format is read as it is, and what is no prompt is named."""

import json

import pytest

from medusa.data.prompt_sets import Question, held_out_prompts, read_questions, select
from medusa.errors import InvalidInput

MT_BENCH = {"question_id": 7, "category": "math", "turns": ["What is 2 + 2?", "And doubled?"], "reference": ["4", "8"]}
SPEC_BENCH = {"question_id": 8, "category": "rag", "turns": ["Who wrote it?"]}
ALPACA_EVAL = {"instruction": "Name a tree.", "dataset": "oasst"}
HUMAN_EVAL = {
    "task_id": "Set/0",
    "prompt": "def one():\n",
    "canonical_solution": "    return 1\n",
    "entry_point": "one",
    "test": "assert one() == 1",
}


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (MT_BENCH, Question("7", "math", ("What is 2 + 2?", "And doubled?"), references=("4", "8"))),
        (SPEC_BENCH, Question("8", "rag", ("Who wrote it?",))),
        (ALPACA_EVAL, Question("1", "oasst", ("Name a tree.",))),
        ({"instruction": "Add.", "input": "1 2"}, Question("1", "all", ("Add.\n\n1 2",))),
        (HUMAN_EVAL, Question("Set/0", "code", ("def one():\n",), references=("    return 1\n",))),
        ({"prompt": ["Hi", "Bye"], "prompt_id": 3, "category": "chat"}, Question("3", "chat", ("Hi", "Bye"))),
        ({"prompt": "1 +", "completion": " 1"}, Question("1", "all", ("1 +",))),
        ({"text": "Once upon"}, Question("1", "all", ("Once upon",))),
        ({"input_ids": [4, 5, 6], "prompt_tokens": 2}, Question("1", "all", ids=(4, 5))),
        (
            {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]},
            Question("1", "all", ("Hi",), "Be kind."),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Ho"},
                    {"from": "human", "value": "Bye"},
                ]
            },
            Question("1", "all", ("Hi", "Bye")),
        ),
    ],
)
def test_every_format_is_read_from_every_kind_of_file(tmp_path, suffix, record, wanted):
    assert read_questions(write(tmp_path / f"set.{suffix}", [record])) == [wanted]


def test_a_line_of_a_text_file_is_a_prompt(tmp_path):
    (tmp_path / "set.txt").write_text("Once upon a time\n\nimport os\n")
    assert [question.turns for question in read_questions(tmp_path / "set.txt")] == [("Once upon a time",), ("import os",)]


def test_the_held_out_set_is_the_embedded_models():
    questions = read_questions("held-out")
    assert [list(q.ids) for q in questions] == [p.ids.tolist() for p in held_out_prompts()]
    assert len({q.id for q in questions}) == len(questions) > 50


def test_references_come_from_a_file_of_their_own(tmp_path):
    questions = write(tmp_path / "set.jsonl", [{**MT_BENCH, "reference": None}, SPEC_BENCH])
    choices = {"question_id": 7, "choices": [{"index": 0, "turns": ["four", "eight"]}]}
    found = read_questions(questions, write(tmp_path / "answers.jsonl", [choices, {"question_id": 99, "reference": "no"}]))
    assert [question.references for question in found] == [("four", "eight"), ()]
    with pytest.raises(InvalidInput, match="has no answer to any of these questions, whose ids are '7'"):
        read_questions(questions, write(tmp_path / "other.jsonl", [{"question_id": 99, "reference": "no"}]))
    with pytest.raises(InvalidInput, match=r"bad.jsonl:1 is not a reference answer"):
        read_questions(questions, write(tmp_path / "bad.jsonl", [{"question_id": 7, "choices": []}]))


def test_a_limit_is_spread_over_the_set_and_categories_are_chosen():
    questions = [Question(f"{category}{n}", category, ("x",)) for category in "abcd" for n in range(10)]
    assert [question.category for question in select(questions, limit=4)] == ["a", "b", "c", "d"]
    assert [question.id for question in select(questions, ["b", "d"], limit=2)] == ["b0", "d0"]
    assert select(questions, limit=100) == questions
    with pytest.raises(InvalidInput, match="there are no questions of category 'e'; the categories are a, b, c, d"):
        select(questions, ["e"])
    with pytest.raises(InvalidInput, match="limit of prompts is 0"):
        select(questions, limit=0)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no prompts"),
        ([{**MT_BENCH, "category": " "}], r"set.jsonl:1 has the category ' ', expected a name"),
        ([{**MT_BENCH, "category": None}, {**SPEC_BENCH, "category": 3}], r"set.jsonl:2 has the category 3"),
        ([{**MT_BENCH, "category": "overall"}], "has the category 'overall'"),
        ([{**MT_BENCH, "turns": []}], "set.jsonl:1 has an empty prompt"),
        ([{**MT_BENCH, "turns": ["Hi", ""]}], "set.jsonl:1 has an empty prompt"),
        ([{**MT_BENCH, "turns": [1]}], r"set.jsonl:1: its turns are '\[1\]', expected a list of strings"),
        ([{**MT_BENCH, "reference": [4]}], "its references are"),
        ([MT_BENCH, MT_BENCH], "'7' as the id of several questions"),
        ([{"question": "x"}], r"set.jsonl:1 has keys \['question'\], expected turns, instruction"),
        (["x"], "set.jsonl:1 is a str, expected an object"),
        ([{"messages": []}], "set.jsonl:1 is a record with an empty conversation"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}], "whose turns do not alternate"),
        ([{"input_ids": ["a"]}], "is not a list of integers"),
    ],
)
def test_what_is_no_prompt_set_is_named(tmp_path, records, message):
    with pytest.raises(InvalidInput, match=message):
        read_questions(write(tmp_path / "set.jsonl", records))


def test_a_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"no data file nothing.jsonl"):
        read_questions("nothing.jsonl")
    with pytest.raises(InvalidInput, match=r"no data file nothing.txt"):
        read_questions("nothing.txt")
    (tmp_path / "set.jsonl").write_text("{broken\n")
    with pytest.raises(InvalidInput, match=r"set.jsonl:1 is not valid JSON"):
        read_questions(tmp_path / "set.jsonl")
