"""Claims about samples: every format gives the same conversations, and bad data is refused or counted, by line."""

import json

import pytest

from medusa.data.samples import Skips, read_samples
from medusa.errors import InvalidInput

TURNS = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": list(TURNS)},
        {"conversations": SHAREGPT},
        {"id": 7, "conversations": SHAREGPT, "text": None},
        {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
        {"conversations": [{"from": "gpt", "value": "cut off"}, *SHAREGPT]},
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "datasets"])
def test_every_format_in_every_file_gives_the_same_conversation(tmp_path, record, kind):
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps([record], indent=2))
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist([record]), path)
    elif kind == "datasets":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list([record]).save_to_disk(str(path))
    elif kind == "folder":
        path.mkdir()
        write(path / "a.jsonl", [record])
    else:
        write(path, [record])
    (sample,) = read_samples(path)
    assert sample.messages == TURNS


def test_prompt_and_completion_text_and_ids(tmp_path):
    (sample,) = read_samples(write(tmp_path / "a.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}]))
    assert (sample.prompt, sample.text) == ("1 + 1 =", " 2")
    (sample,) = read_samples(write(tmp_path / "b.jsonl", [{"text": "x"}]))
    assert sample.text == "x" and sample.source.endswith("b.jsonl:1")
    (sample,) = read_samples(write(tmp_path / "c.jsonl", [{"input_ids": [1, 2]}]))
    assert sample.input_ids == (1, 2)
    half = '{"text": "' + chr(92) + 'ud83d"}'
    (tmp_path / "d.jsonl").write_text('{"text": "x"}' + chr(10) + half + chr(10))
    skips = Skips()
    assert len(list(read_samples(tmp_path / "d.jsonl", skips))) == 1
    assert skips.reasons == {"with text that is not valid Unicode": 1}


def test_unusable_conversations_are_counted_by_reason_and_the_first_is_named(tmp_path):
    records = [
        {"messages": []},
        {"messages": [TURNS[0], TURNS[0]]},
        {"messages": list(TURNS)},
        {"messages": [TURNS[1], TURNS[1]]},
    ]
    skips = Skips()
    assert len(list(read_samples(write(tmp_path / "a.jsonl", records), skips))) == 1
    assert skips.reasons == {"with an empty conversation": 1, "whose turns do not alternate": 2}
    assert "2 whose turns do not alternate (first: " in str(skips) and "a.jsonl:2" in str(skips)
    with pytest.raises(InvalidInput, match=r"a.jsonl:1: with an empty conversation"):
        list(read_samples(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "data.jsonl:1 is not valid JSON"),
        (b'{"text": "\xff"}', "data.jsonl:1 is not valid JSON"),
        (b'{"text": "a"}\n{"messages": []}', "data.jsonl:2 has 'messages', but the records before it have 'text'"),
        (b'{"input_ids": [1, 2]}\n{"answer": "x"}', r"data.jsonl:2 has keys \['answer'\], expected one of messages"),
        (b'{"input_ids": [1, "2"]}', "'input_ids' is not a list of integers"),
        (b'{"text": 5}', "'text' is a int, expected a string"),
        (b'{"prompt": "x"}', "has a 'prompt' and no 'completion'"),
        (b'{"messages": "x"}', "'messages' is a str, expected a list of turns"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "a turn's role is 'tool', expected system, user or assistant"),
        (b'{"messages": [{"role": "user", "content": null}]}', "'content' is a NoneType, expected a string"),
        (b"[1]", "data.jsonl:1 is a list, expected an object"),
        (b"\n\n", "holds no records"),
    ],
)
def test_bad_records_are_refused_with_their_line(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        list(read_samples(tmp_path / "data.jsonl"))


def test_broken_parquet_missing_files_and_empty_folders_are_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InvalidInput, match="broken or not a Parquet file"):
        list(read_samples(tmp_path / "data.parquet"))
    with pytest.raises(InvalidInput, match="no data file"):
        list(read_samples(tmp_path / "absent.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no .jsonl, .json, .parquet file"):
        list(read_samples(tmp_path / "empty"))
    (tmp_path / "data.json").write_text("[{")
    with pytest.raises(InvalidInput, match=r"data\.json is not valid JSON"):
        list(read_samples(tmp_path / "data.json"))


def test_a_data_set_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match=r"nobody/nothing-2\.5 is not a file here and cannot be read as a data set"):
        list(read_samples("nobody/nothing-2.5"))


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_byte_order_mark_before_the_data_is_passed_over(tmp_path, name):
    records = [{"text": "naïve"}, {"text": "b"}]
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [sample.text for sample in read_samples(tmp_path / name)] == ["naïve", "b"]


def test_role_that_is_no_name_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": [{"role": ["user"], "content": "x"}]}))
    with pytest.raises(InvalidInput, match=r"data.jsonl:1: a turn's role is \['user'\], expected"):
        list(read_samples(tmp_path / "data.jsonl"))
