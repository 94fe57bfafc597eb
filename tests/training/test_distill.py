"""Claims about self-distillation: who speaks when, whole samples only, and resuming after any death."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer

from data.test_endpoint import Server
from data.test_templates import CHATML, GEMMA, VICUNA, tokenizer_with
from medusa import EMBEDDED, MedusaModel
from medusa.data.samples import Skips, read_samples
from medusa.errors import InvalidInput
from medusa.training.answerers import EndpointAnswerer, ModelAnswerer
from medusa.training.data import load_rows
from medusa.training.distillation import Distillation, Seed, Shards, answer_seeds, read_seeds
from tiny import plain_greedy, random_heads, random_tree, tiny_backbone

SYSTEM, HI, BYE = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "user", "content": "Bye"},
)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(folder) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(CHATML)


@pytest.fixture(scope="module")
def model(tokenizer):
    backbone = tiny_backbone(vocab_size=len(tokenizer), max_position_embeddings=512)
    return MedusaModel(backbone, random_heads(backbone, 2), random_tree(seed=2, nodes=12, depth=2, ranks=4))


def test_seeds_are_the_users_turns_with_ids_that_survive_reordering(tmp_path):
    answer = {"role": "assistant", "content": "Ho"}
    rows = [{"messages": [SYSTEM, HI, answer, BYE, answer]}, {"messages": [HI, answer]}, {"messages": [HI]}, {"messages": []}]
    skips = Skips()
    seeds = read_seeds(write(tmp_path / "a.jsonl", rows), skips)
    assert [seed.turns for seed in seeds] == [(SYSTEM, HI, BYE), (HI,), (HI,)]
    assert len({seed.id for seed in seeds}) == 3 and len(skips) == 1
    again = read_seeds(write(tmp_path / "b.jsonl", rows[::-1]), Skips())
    assert {seed.id for seed in again} == {seed.id for seed in seeds}
    (text,) = read_seeds(write(tmp_path / "c.jsonl", [{"prompt": "1 +", "completion": "1"}]), Skips())
    assert text.text == "1 +" and not text.turns


PROMPTS = [{"prompt": "Hi"}, {"instruction": "Hi"}, {"turns": ["Hi"]}, {"messages": [HI]}, {"text": "Hi"}]


@pytest.mark.parametrize("record", PROMPTS, ids=lambda record: next(iter(record)))
def test_prompts_of_every_format_are_answered(tmp_path, model, tokenizer, embedded_tokenizer, record):
    (seed,) = read_seeds(write(tmp_path / "a.jsonl", [record]), Skips())
    options = Distillation(temperature=0.0, max_new_tokens=4)
    answer_seeds([seed], ModelAnswerer(model, tokenizer, options), Shards(tmp_path / "chat"))
    (made,) = records(tmp_path / "chat")
    assert "text" in record or made["messages"][0] == HI  # a chat model is asked; a document is continued
    if "messages" not in record:  # a model without a template continues
        answer_seeds([seed], ModelAnswerer(model, embedded_tokenizer, options), Shards(tmp_path / "plain"))
        (made,) = records(tmp_path / "plain")
        assert made["input_ids"][: made["prompt_tokens"]] == embedded_tokenizer("Hi")["input_ids"]


def test_a_line_of_a_text_file_is_a_prompt_and_token_ids_are_continued(tmp_path, model, tokenizer):
    (tmp_path / "a.txt").write_text("Hi\n\nBye\n")
    assert [seed.turns for seed in read_seeds(tmp_path / "a.txt", Skips())] == [(HI,), (BYE,)]
    (seed,) = read_seeds(write(tmp_path / "b.jsonl", [{"input_ids": [5, 6, 7, 8], "prompt_tokens": 3}]), Skips())
    answer_seeds(
        [seed], ModelAnswerer(model, tokenizer, Distillation(temperature=0.0, max_new_tokens=4)), Shards(tmp_path / "ids")
    )
    (made,) = records(tmp_path / "ids")
    assert made["input_ids"][:3] == [5, 6, 7] and made["prompt_tokens"] == 3


def test_greedy_answers_are_the_models_own_turn_by_turn(tmp_path, model, tokenizer):
    seeds = [Seed("a", (SYSTEM, HI, BYE)), Seed("b", (HI,)), Seed("c", (BYE, HI))]
    options = Distillation(temperature=0.0, max_new_tokens=12, batch_size=8)
    done = answer_seeds(seeds, ModelAnswerer(model, tokenizer, options), Shards(tmp_path))
    assert done.made == 3 and not done.failed
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for record in records(tmp_path):
        messages = record["messages"]
        seed = next(seed for seed in seeds if seed.id == record["id"])
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(
                    messages[:place], add_generation_prompt=True, return_tensors="pt", return_dict=True
                )["input_ids"]
                own = plain_greedy(model.backbone, prompt, 12, eos_token_id=ends)
                assert message["content"] == tokenizer.decode(own, skip_special_tokens=True).strip()
        # These random models do not stop by themselves: a turn cut at the limit is the last one.
        assert [m for m in messages if m["role"] != "assistant"] == list(seed.turns)[: len(messages) - 1]


def ends_after(length: int, tokenizer):
    """What decodes, with answers that end by themselves."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def answers(take):
        while request := take():
            yield request.tag, [*tokenizer("ok" + " ok" * (len(request.ids) % length))["input_ids"], end]

    return answers


def test_replayed_conversations_have_every_turn_and_self_talk_its_rounds(tmp_path, model, tokenizer, monkeypatch):
    for self_talk, wanted in ((0, ["system", "user", "assistant", "user", "assistant"]), (2, None)):
        answerer = ModelAnswerer(model, tokenizer, Distillation(self_talk=self_talk, batch_size=2, max_new_tokens=32))
        monkeypatch.setattr(answerer, "_answers", ends_after(3, tokenizer))
        answer_seeds([Seed("a", (SYSTEM, HI, BYE))], answerer, Shards(tmp_path / str(self_talk)))
        (record,) = records(tmp_path / str(self_talk))
        roles = [message["role"] for message in record["messages"]]
        if wanted:
            assert roles == wanted and record["messages"][3] == BYE
        else:  # the model writes the user's turns, after the first
            assert roles == ["system", *["user", "assistant"] * 3] and record["messages"][3] != BYE
    (sample,) = read_samples(tmp_path / "2")  # and the folder is training data
    assert len(sample.messages) == 7


def test_plain_text_is_continued_as_token_ids(tmp_path, model, tokenizer):
    options = Distillation(temperature=0.0, max_new_tokens=9, prompt_tokens=5)
    answer_seeds(
        [Seed("a", text="import os\nimport sys\nimport json\n")], ModelAnswerer(model, tokenizer, options), Shards(tmp_path)
    )
    (record,) = records(tmp_path)
    prompt = tokenizer("import os\nimport sys\nimport json\n")["input_ids"][:5]
    assert record["input_ids"][:5] == prompt and len(record["input_ids"]) == 14
    assert record["input_ids"][5:] == plain_greedy(model.backbone, torch.tensor([prompt]), 9)
    (row,) = load_rows(tmp_path, tokenizer, 64, len(tokenizer))
    assert row.loss_mask.tolist() == [False] * 5 + [True] * 9  # the prompt is not the model's speech


def test_an_answer_that_was_cut_off_does_not_teach_to_stop(tmp_path, model, tokenizer):
    options = Distillation(temperature=0.0, max_new_tokens=3)
    answer_seeds([Seed("a", (HI, BYE))], ModelAnswerer(model, tokenizer, options), Shards(tmp_path))
    (record,) = records(tmp_path)
    assert record["cut"] and len(record["messages"]) == 2
    (row,) = load_rows(tmp_path, tokenizer, 64, len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row.loss_mask.sum() >= 1 and not any(
        loss_mask and token == end for token, loss_mask in zip(row.ids, row.loss_mask, strict=True)
    )


def test_one_seed_that_the_template_refuses_fails_alone(tmp_path, model):
    tokenizer = tokenizer_with(GEMMA)
    answerer = ModelAnswerer(model, tokenizer, Distillation(temperature=0.0, max_new_tokens=4))
    done = answer_seeds([Seed("a", (SYSTEM, HI)), Seed("b", (HI,))], answerer, Shards(tmp_path))
    assert done.made == 1 and "System role not supported" in next(iter(done.failed))


def test_self_talk_needs_turns_that_end(model):
    with pytest.raises(InvalidInput, match="ends the user's turns with a special token"):
        ModelAnswerer(model, tokenizer_with(VICUNA), Distillation(self_talk=1))


def test_a_folder_made_otherwise_is_refused(tmp_path):
    Shards(tmp_path, {"model": "m", "temperature": 0.1})  # which made nothing, and so holds nothing
    Shards(tmp_path, {"model": "m", "temperature": 0.3}).add("a", {"text": "x"})
    Shards(tmp_path, {"model": "m", "temperature": 0.3})
    with pytest.raises(InvalidInput, match=r"was made with temperature 0\.3, not 0\.7"):
        Shards(tmp_path, {"model": "m", "temperature": 0.7})
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot write to"):
        Shards(tmp_path / "file")


def test_sampled_answers_are_the_same_for_the_same_seed(tmp_path, model, tokenizer):
    def run(seed: int):
        options = Distillation(temperature=1.0, max_new_tokens=12, seed=seed)
        answer_seeds(
            [Seed("a", (HI,)), Seed("b", (BYE,))], ModelAnswerer(model, tokenizer, options), Shards(tmp_path / str(seed))
        )
        return records(tmp_path / str(seed))

    first = run(1)
    (tmp_path / "1" / "samples-00000.jsonl").unlink()
    assert run(1) == first and run(2) != first


def test_a_prompt_that_does_not_fit_fails_alone(tmp_path, model, tokenizer):
    long = {"role": "user", "content": "import os\n" * 400}
    answerer = ModelAnswerer(model, tokenizer, Distillation(temperature=0.0, max_new_tokens=8))
    done = answer_seeds([Seed("a", (long,)), Seed("b", (HI,))], answerer, Shards(tmp_path))
    assert done.made == 1 and done.failed == {"whose prompt is empty or does not fit the context": 1}
    assert [record["id"] for record in records(tmp_path)] == ["b"]


def test_shards_repair_a_half_written_line_and_write_nothing_twice(tmp_path):
    shards = Shards(tmp_path, per_shard=2)
    for number in range(5):
        shards.add(f"s{number}", {"text": "é"})
    shard_names = [f"samples-0000{n}.jsonl" for n in range(3)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".samples.lock", *shard_names]
    with (tmp_path / "samples-00002.jsonl").open("ab") as file:
        file.write('{"id": "s5", "text": "é'.encode()[:-1])
    again = Shards(tmp_path, per_shard=2)
    assert again.done == {f"s{n}" for n in range(5)}
    again.add("s4", {"text": "twice"})
    again.add("s5", {"text": "whole"})
    again.add("s6", {"text": "next"})
    assert [record["id"] for record in records(tmp_path)] == [f"s{n}" for n in range(7)]
    assert len((tmp_path / "samples-00002.jsonl").read_text().splitlines()) == 2
    (tmp_path / "samples-00000.jsonl").write_text("something else\n")
    with pytest.raises(InvalidInput, match=r"samples-00000.jsonl:1 is not a sample of a distillation"):
        Shards(tmp_path)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path):
    code = """
import resource, sys
from medusa.training.distillation import Shards
from medusa.errors import InvalidInput
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
shards = Shards(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
try:
    for n in range(100):
        shards.add(f"s{n}", {"text": "x" * 50})
except InvalidInput as error:
    print(n, error)
"""
    output = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    number = int(output.split()[0])
    assert "make room and run the same command again" in output and number > 0
    again = Shards(tmp_path)
    assert again.done == {f"s{n}" for n in range(number)}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 300


def test_an_endpoint_is_asked_with_bounded_concurrency_and_failures_leave_no_half_conversation(tmp_path):
    pytest.importorskip("httpx")
    from medusa.data.endpoint import Endpoint

    def reply(body):
        time.sleep(0.02)
        said = body["messages"][-1]["content"]
        if said == "fail":
            return {"choices": []}
        return {
            "choices": [{"message": {"content": f"re: {said}"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        }

    server = Server(reply)
    server.script = [(503, {}, "busy")]
    try:
        fail = {"role": "user", "content": "fail"}
        seeds = [Seed(f"s{n}", (HI, {"role": "user", "content": f"and {n}?"})) for n in range(12)] + [Seed("bad", (HI, fail))]
        answerer = EndpointAnswerer(Endpoint(server.url, "m", sleep=lambda _: None), Distillation(batch_size=3))
        done = answer_seeds(seeds, answerer, Shards(tmp_path))
    finally:
        server.close()
    assert done.made == 12 and done.tokens == 12 * 4 + 2 and done.failed.total() == 1
    assert 1 < server.most_under_way <= 3
    found = {record["id"]: record["messages"] for record in records(tmp_path)}
    assert "bad" not in found and len(found) == 12
    assert [m["content"] for m in found["s5"]] == ["Hi", "re: Hi", "and 5?", "re: and 5?"]
    assert not answer_seeds(seeds[:12], answerer, Shards(tmp_path)).made


@pytest.mark.parametrize("moment", [3, 11])
def test_a_distillation_that_was_killed_goes_on_with_nothing_lost_and_nothing_twice(tmp_path, moment):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tiny_backbone(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seeds = write(tmp_path / "seeds.jsonl", [{"text": f"import os\nx = {n}\n"} for n in range(24)])
    given = ["distill", str(tmp_path / "model"), "--data", str(seeds), "--output", str(tmp_path / "out")]
    given += ["--max-new-tokens", "40", "--batch-size", "1", "--json"]
    command = [sys.executable, "-m", "medusa", *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    shard = tmp_path / "out" / "samples-00000.jsonl"
    while process.poll() is None and not (shard.exists() and shard.read_bytes().count(b"\n") >= moment):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(records(tmp_path / "out"))
    assert moment <= before < 24, "killed too late"
    again = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    report = json.loads(again.stdout)
    assert report["already"] == before and report["made"] == 24 - before
    ids = [record["id"] for record in records(tmp_path / "out")]
    assert len(ids) == len(set(ids)) == 24


def test_nonsense_is_refused(tmp_path):
    for changes, message in (({"batch_size": 0}, "batch_size"), ({"temperature": -1.0}, "temperature")):
        with pytest.raises(InvalidInput, match=message):
            Distillation(**changes)
    with pytest.raises(InvalidInput, match="cannot write the user's turns"):
        EndpointAnswerer(None, Distillation(self_talk=1))
