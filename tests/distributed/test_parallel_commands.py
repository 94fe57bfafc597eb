"""Claims about `--tp`: one command starts all ranks, answers as plain decoding does, and leaves no rank behind."""

import os
import signal
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from serving.test_serve_command import started  # noqa: E402

SERVER = ("embedded", "--tp", 2, "--dtype", "float32", "--slots", 2, "--capacity", 256)


def rank_1(pid: int) -> int:
    """The process id of the other rank that a server has started."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            return int(child)
    raise AssertionError("no other rank")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of child processes")
@pytest.mark.parametrize(("rank", "said"), [(0, "rank 0 has ended"), (1, "rank 1 of 2 has ended, and the others with it")])
def test_a_server_on_two_ranks_answers_exactly_and_a_rank_that_dies_ends_it_with_one_line(rank, said):
    with started(*SERVER) as (process, url):
        for sampling in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}):
            body = {"model": "embedded", "prompt": ["def add(a, b):", "import os\n"], "max_tokens": 12, **sampling}
            answers = [
                httpx.post(f"{url}/v1/completions", json={**body, "medusa": {"plain": plain}}, timeout=200).json()
                for plain in (True, False)
            ]
            plain, medusa = ([choice["text"] for choice in answer["choices"]] for answer in answers)
            assert plain == medusa and all(medusa)
            assert answers[1]["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
        os.kill(process.pid if rank == 0 else rank_1(process.pid), signal.SIGKILL)
        left = [line for line in process.stderr if line.startswith("medusa: ")]  # ends when no process writes to it
        assert len(left) == 1 and said in left[0]
        assert process.wait(100) == (-signal.SIGKILL if rank == 0 else 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tp", 4], "6 key/value heads cannot be shared out among 4 ranks; choose 2 or 3 or 6"),
        (["--tp", 2, "--quantization", "int8"], "leave --quantization out"),
        (["--tp", 2, "--device", "cpu"], "leave --device out"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_is_loaded(medusa, options, said):
    ran = medusa("generate", "embedded", "x = ", *options)
    assert ran.returncode == 1 and said in ran.stderr and ran.stderr.count("\n") == 1
