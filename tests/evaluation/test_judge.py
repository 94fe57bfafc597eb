"""Claims about the judge, against a server on this machine: each answer graded once, failures counted and never lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("httpx")

import medusa
from data.test_endpoint import Server
from medusa.cli import main
from medusa.data.endpoint import Endpoint, EndpointRefused
from medusa.errors import InvalidInput
from medusa.evaluation.grading import grade_tasks, grades, read_grade, read_tasks, spent
from medusa.runs.records import Journal

MATH = {
    "id": "m",
    "category": "math",
    "turns": ["What is 2 + 2?", "And doubled?"],
    "answers": {"plain": ["4", "8"], "medusa": ["4", "8"], "typical": ["4", "9"]},
    "references": ["four", "eight"],
}
POEM = {
    "id": "p",
    "category": "writing",
    "turns": ["A poem"],
    "answers": {"plain": ["Roses"], "medusa": ["Roses"], "typical": [""]},
    "references": ["never shown"],
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def said(text: str) -> dict:
    message = {"message": {"content": text}, "finish_reason": "stop"}
    return {"choices": [message], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


def by_its_words(body: dict) -> dict:
    """A judge that likes 8 and dislikes 9."""
    answer = body["messages"][-1]["content"].rpartition("[Assistant]\n")[2].splitlines()[0]
    return said(f"Hm.\nGrade: {({'8': 10, '9': 2}).get(answer, 6)}")


@pytest.fixture
def server():
    found = Server(by_its_words)
    yield found
    found.close()


def journal(tmp_path) -> Journal:
    return Journal(tmp_path / "grades.jsonl", "grade of a judge")


def test_an_answer_that_several_decoders_gave_is_graded_once_and_counts_for_each(tmp_path, server):
    tasks = read_tasks(write(tmp_path / "answers.jsonl", MATH, POEM))
    kept = journal(tmp_path)
    assert not grade_tasks(tasks, Endpoint(server.url, "j"), kept, at_once=2)
    # First turn alike; second turn and poem in two versions each.
    assert len(server.requests) == len(tasks) == 5 and server.most_under_way <= 2
    found = grades(tasks, kept)
    assert found["plain"] == found["medusa"]
    assert found["plain"]["math"] == {"grade": 8.0, "by_turn": [6.0, 10.0], "graded": 2, "failed": 0}
    assert found["typical"]["math"]["by_turn"] == [6.0, 2.0] and found["typical"]["overall"]["grade"] == pytest.approx(14 / 3)
    used = spent(kept)
    assert (used.prompt_tokens, used.completion_tokens) == (500, 50)
    assert used.cost(price_in=2.0, price_out=10.0) == pytest.approx(500 * 2e-6 + 50 * 1e-5)


def test_the_judge_sees_what_it_needs_and_no_more(tmp_path):
    tasks = {(task.turn, task.decoders): task.messages for task in read_tasks(write(tmp_path / "a.jsonl", MATH, POEM))}
    first = tasks[0, ("plain", "medusa", "typical")][-1]["content"]
    assert "four" in first and "eight" not in first and "doubled" not in first
    second = tasks[1, ("typical",)][-1]["content"]
    assert re.search(r"2 \+ 2.*\b4\b.*doubled.*\b9\b.*eight.*Grade the last answer alone", second, re.DOTALL)
    assert "never shown" not in str(tasks)  # a poem is not right or wrong
    assert "(said nothing)" in tasks[0, ("typical",)][-1]["content"]
    assert not any(name in str(tasks.values()) for name in ("medusa", "typical"))  # blind


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Good.\nGrade: 7", 7.0),
        ("I would not grade: 3. Grade: 9", 9.0),
        ("**Grade**: **10**/10", 10.0),
        ("grade: 6.5", 6.5),
        ("Grade: 0", None),
        ("Grade: -5", None),
        ("Grade (1-10): five", None),
        ("Grade: 70", None),
        ("Grade: seven", None),
        ("7", None),
        ("", None),
    ],
)
def test_a_grade_is_read_where_there_is_one(text, grade):
    assert read_grade(text) == grade


def test_nonsense_is_asked_again_then_counted_and_tried_by_the_next_run(tmp_path, server):
    tasks = read_tasks(write(tmp_path / "answers.jsonl", POEM))
    server.script = [(200, {}, said("Nice.")), (200, {}, said("Grade: 77")), (200, {}, said("Nice.\nGrade: 5"))]
    kept = journal(tmp_path)
    assert not grade_tasks(tasks[:1], Endpoint(server.url, "j"), kept)
    assert len(server.requests) == 3 and server.requests[0][1]["temperature"] == 0.0 < server.requests[1][1]["temperature"]
    assert kept.records[tasks[0].id]["grade"] == 5.0 and spent(kept).prompt_tokens == 300

    server.script = [(200, {}, said("Nice.")) for _ in range(3)]
    kept = journal(tmp_path)
    failed = grade_tasks(tasks, Endpoint(server.url, "j"), kept)
    assert failed == {"no grade from 1 to 10 in 3 verdicts": 1} and grades(tasks, kept)["typical"]["overall"]["failed"] == 1
    kept = journal(tmp_path)
    assert not grade_tasks(tasks, Endpoint(server.url, "j"), kept)
    assert grades(tasks, kept)["typical"]["overall"]["grade"] == 6.0
    assert spent(kept).prompt_tokens == 700  # the tries that failed were paid for too


def test_failures_of_the_endpoint_are_waited_out_or_counted(tmp_path, server):
    tasks = read_tasks(write(tmp_path / "answers.jsonl", POEM))
    server.script = [(429, {"Retry-After": "0.05"}, "slow down"), (503, {}, "busy")]
    kept = journal(tmp_path)
    assert not grade_tasks(tasks[:1], Endpoint(server.url, "j", sleep=lambda _: None), kept)
    server.script = [(200, {}, b"<html>")]
    (reason,) = grade_tasks(tasks, Endpoint(server.url, "j"), kept)
    assert "something other than a chat completion" in reason


def test_a_refused_key_stops_the_run_and_keeps_the_grades(tmp_path, server):
    tasks = read_tasks(write(tmp_path / "answers.jsonl", MATH, POEM))
    server.script = [(200, {}, said("Grade: 4")), (401, {}, "bad key")]
    with pytest.raises(EndpointRefused, match="bad key"):
        grade_tasks(tasks, Endpoint(server.url, "j"), journal(tmp_path), at_once=1)
    assert [record["grade"] for record in journal(tmp_path).records.values()][:1] == [4.0]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no answers"),
        ([{"id": "x", "turns": ["a"]}], "answers.jsonl:1 is not an answer of `medusa bench`"),
        ([{**POEM, "answers": {"plain": ["a", "b"]}}], "the answers of 'plain' are not a list of strings, one per turn"),
        ([{**POEM, "answers": {"plain": [1]}}], "are not a list of strings"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, records, message):
    with pytest.raises(InvalidInput, match=message):
        read_tasks(write(tmp_path / "answers.jsonl", *records))


def arguments(answers, server, *more: str) -> list[str]:
    return ["judge", str(answers), "--endpoint", server.url, "--judge-model", "a/j", *more]


def test_a_judging_that_was_killed_goes_on_with_nothing_lost_and_nothing_twice(tmp_path):
    def slowly(body):
        time.sleep(0.02)
        return said("Grade: 6")

    server = Server(slowly)
    try:
        poems = [{**POEM, "id": str(n), "turns": [f"Poem {n}"]} for n in range(40)]
        given = arguments(write(tmp_path / "answers.jsonl", *poems), server, "--batch-size", "2", "--json", "--price-in", "1")
        command, environment = [sys.executable, "-m", "medusa", *given], os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        path = tmp_path / "judge-a-j" / "grades.jsonl"
        while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 9):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = path.read_bytes().count(b"\n")
        assert 9 <= before < 80, "killed too late"
        asked = len(server.requests)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 80 and len(server.requests) - asked == 80 - before
    record = json.loads(done.stdout)
    assert record["decoders"]["plain"]["writing"] == {"grade": 6.0, "by_turn": [6.0], "graded": 40, "failed": 0}
    assert record["cost"] == pytest.approx(80 * 100 * 1e-6) and json.loads((path.parent / "judge.json").read_text()) == record


def test_the_command_shows_a_table_and_says_what_failed(tmp_path, server, monkeypatch, capsys):
    answers = write(tmp_path / "answers.jsonl", MATH, POEM)
    server.script = [(200, {}, b"<html>")]
    monkeypatch.setattr(sys, "argv", ["medusa", *arguments(answers, server, "--batch-size", "1", "--price-out", "5")])
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr()
    assert stop.value.code == 1 and "1 answers have no grade; the same command tries them again" in shown.err
    assert re.search(r"writing\W+6\.00", shown.out) and "cost 0.0002" in shown.err
    monkeypatch.setattr(sys, "argv", ["medusa", *arguments(answers, server, "--price-in", "-1")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--price-in" in capsys.readouterr().err


def test_judge_from_python_returns_the_record_that_it_saves(tmp_path, server):
    answers = write(tmp_path / "answers.jsonl", MATH, POEM)
    record = medusa.judge(answers, server.url, "a/j", tmp_path / "grades", price_out=5.0)
    assert json.loads((tmp_path / "grades" / "judge.json").read_text()) == record
    assert record["failed"] == {} and record["decoders"]["plain"]["writing"]["grade"] == 6.0
    asked = len(server.requests)
    assert medusa.judge(answers, server.url, "a/j", tmp_path / "grades", price_out=5.0) == record
    assert len(server.requests) == asked
