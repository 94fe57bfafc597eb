"""Claims about training runs: the label shift, the frozen backbone, Medusa-2, offline mode, resuming, and what stops them."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from medusa import EMBEDDED, MedusaModel, load_tree
from medusa.checkpoints.loading import load_backbone
from medusa.checkpoints.quantization import make_differentiable, quantized
from medusa.checkpoints.reader import load_heads
from medusa.errors import InvalidInput, MedusaError
from medusa.runs.provenance import fingerprint
from medusa.training.config import TrainingConfig, read_options, recipe_names, resolve
from medusa.training.data import Row, Rows, load_rows
from medusa.training.hidden_states import save_hidden_states
from medusa.training.run import train_heads
from tiny import VOCAB, plain_greedy, random_prompt, tiny_backbone

SUCCESSOR = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))  # of one token, the next


def determined_text(path, samples: int, seed: int) -> None:
    """Text in which each token determines the next, hence the next five."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for _ in range(samples):
            ids = [int(torch.randint(VOCAB, (1,), generator=generator))]
            while len(ids) < 24:
                ids.append(int(SUCCESSOR[ids[-1]]))
            file.write(json.dumps({"input_ids": ids}) + "\n")


@pytest.fixture
def data(tmp_path):
    determined_text(tmp_path / "train.jsonl", 64, seed=0)
    determined_text(tmp_path / "eval.jsonl", 16, seed=1)
    return tmp_path


def rows(path, **options) -> Rows:
    return load_rows(path, None, options.pop("max_length", 64), VOCAB, **options)


def masked(found: Rows) -> Rows:
    """The same samples after a beginning that follows another rule and is not to be learnt, nor the change of rules."""
    changed = []
    for row in found:
        beginning = (row.ids[0] + torch.arange(-12, 0, dtype=torch.int32)) % VOCAB
        ids = torch.cat([beginning, row.ids])
        changed.append(Row(ids, torch.arange(len(ids)) >= 12 + 6, (len(ids),)))
    return Rows(changed)


@pytest.mark.parametrize("way", ["online", "shared", "offline", "packed", "masked"])
def test_every_head_learns_the_token_that_is_its_own(data, way):
    backbone = tiny_backbone(gain=1.0, num_hidden_layers=1)  # one whose hidden state still shows the current token
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    config = TrainingConfig(
        num_heads=5,
        max_steps=500 if way == "shared" else 250,
        batch_size=8 if way == "packed" else 16,
        learning_rate=1e-2,
        warmup_steps=5,
        targets="hard",
        shared_lm_head=way == "shared",
    )
    found = rows(data / "train.jsonl", packing=way == "packed")
    if way == "masked":
        found = masked(found)
    if way == "packed":
        assert max(len(row.lengths) for row in found) > 1
    kept = data / "hidden" if way == "offline" else None
    metrics = train_heads(MedusaModel(backbone), found, data / "heads", config, rows(data / "eval.jsonl"), hidden_states=kept)
    assert all(metrics[f"eval_head{k}_top1"] >= 0.99 for k in range(1, 6)), metrics
    assert metrics["eval_acceleration_rate"] > 5.9  # of 6
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    loaded = load_heads(data / "heads")
    assert len(loaded) == 5 and loaded.config.medusa_shared_lm_head is (way == "shared")
    assert load_tree(data / "heads" / "medusa_tree.json").depth == 5
    record = json.loads((data / "heads" / "training.json").read_text())
    assert record["config"]["num_heads"] == 5 and record["metrics"] == metrics
    assert record["data"]["fingerprint"] == found.fingerprint()
    assert "| 5 | token t+6 | " in (data / "heads" / "README.md").read_text()


@pytest.mark.parametrize("backbone", ["frozen", "lora"])
def test_offline_training_gives_the_heads_of_online_training(data, backbone):
    config = TrainingConfig(num_heads=2, max_steps=6, batch_size=8, learning_rate=1e-2, warmup_steps=0, backbone=backbone)
    if backbone == "lora":
        pytest.importorskip("peft")
        config = dataclasses.replace(config, lm_loss="distill", heads_steps=2)
    found, metrics = rows(data / "train.jsonl"), {}
    for name, kept in (("online", None), ("offline", data / "hidden")):
        metrics[name] = train_heads(MedusaModel(tiny_backbone()), found, data / name, config, hidden_states=kept)
    assert metrics["offline"] == pytest.approx(metrics["online"], rel=1e-3, abs=1e-4)
    online, offline = load_heads(data / "online").state_dict(), load_heads(data / "offline").state_dict()
    for name in online:
        torch.testing.assert_close(offline[name], online[name], atol=1e-4, rtol=1e-3)


def test_hidden_states_once_written_are_not_made_again_and_a_half_written_shard_is(data, monkeypatch):
    model, found = MedusaModel(tiny_backbone()), rows(data / "train.jsonl")
    first = save_hidden_states(model, found, data / "hidden", shard_tokens=300)
    shards = sorted((data / "hidden").glob("*.safetensors"))
    assert len(shards) > 3
    wanted = [first[number][1].hidden for number in range(len(found))]
    with torch.no_grad():
        alone = model.hidden_states(found.rows[5].ids.long()[None])[0]
    torch.testing.assert_close(wanted[5], alone, atol=1e-4, rtol=1e-3)
    shards[1].unlink()
    times = [path.stat().st_mtime_ns for path in shards if path.exists()]
    computed = []
    original = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda *args: computed.append(len(args[0])) or original(*args))
    again = save_hidden_states(model, found, data / "hidden", shard_tokens=300)
    assert 0 < sum(computed) < len(found) / 3
    assert [path.stat().st_mtime_ns for path in shards if path != shards[1]] == times
    assert all(torch.equal(again[number][1].hidden, wanted[number]) for number in range(len(found)))
    with pytest.raises(InvalidInput, match="was made with data"):
        save_hidden_states(model, rows(data / "eval.jsonl"), data / "hidden", shard_tokens=300)
    with pytest.raises(InvalidInput, match="was made with backbone"):
        save_hidden_states(MedusaModel(tiny_backbone(gain=2.0)), found, data / "hidden", shard_tokens=300)


def test_resumed_run_ends_with_the_same_heads_whatever_was_half_written(data):
    config = TrainingConfig(num_heads=2, batch_size=8, warmup_steps=2, save_steps=4, max_steps=12)
    for output in ("whole", "cut"):
        train_heads(MedusaModel(tiny_backbone()), rows(data / "train.jsonl"), data / output, config)
    # As if killed while checkpoint 12 was being written: its last file is not there.
    (data / "cut" / "checkpoint-12" / "trainer_state.json").unlink()
    (data / "cut" / "medusa_lm_head.safetensors").unlink()
    train_heads(MedusaModel(tiny_backbone()), rows(data / "train.jsonl"), data / "cut", config, resume=True)
    whole, cut = load_heads(data / "whole").state_dict(), load_heads(data / "cut").state_dict()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_resuming_says_when_a_run_is_finished_and_when_there_is_nothing_to_resume(data, capsys):
    config = TrainingConfig(num_heads=1, batch_size=8, warmup_steps=1, save_steps=1, max_steps=2)

    def resumed(config: TrainingConfig) -> dict[str, float]:
        return train_heads(MedusaModel(tiny_backbone()), rows(data / "train.jsonl"), data / "out", config, resume=True)

    metrics = resumed(config)
    assert "there is no checkpoint in" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in (data / "out").glob("*.*")}
    assert resumed(config) == metrics and "is finished; raise --epochs or --max-steps" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (data / "out").glob("*.*")} == before
    resumed(dataclasses.replace(config, max_steps=3))
    assert (data / "out" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("method", ["medusa-1", "medusa-2", "medusa-2-self-distill"])
def test_a_run_that_was_killed_resumes_to_the_same_heads(data, method):
    tiny_backbone(gain=1.0).save_pretrained(data / "backbone")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(data / "backbone")
    options = ["--max-steps", "14", "--save-steps", "2", "--batch-size", "4", "--num-heads", "2", "--lora-rank", "2"]
    options += ["--gradient-accumulation", "2", "--warmup-steps", "2", "--max-length", "64", "--held-out", "0.1"]

    def command(output: str, *more: str) -> list[str]:
        given = ["train", str(data / "backbone"), "--data", str(data / "train.jsonl"), "--output", str(data / output)]
        return [sys.executable, "-m", "medusa", *given, "--method", method, *options, *more]

    subprocess.run(command("whole"), check=True, capture_output=True)
    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = data / "killed" / "checkpoint-6"  # of the joint stage, for medusa-2
    while process.poll() is None and not last.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists() and not (data / "killed" / "medusa_lm_head.safetensors").exists(), "killed too late"
    subprocess.run(command("killed", "--resume"), check=True, capture_output=True)
    files = ["medusa_lm_head.safetensors"] + ["adapter_model.safetensors"] * (method != "medusa-1")
    for file in files:
        whole, killed = load_file(data / "whole" / file), load_file(data / "killed" / file)
        assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("tied", [False, True])
def test_medusa_2_trains_an_adapter_that_loads_with_its_heads(data, tied):
    pytest.importorskip("peft")
    backbone = tiny_backbone(gain=1.0, tie_word_embeddings=tied)
    backbone.save_pretrained(data / "backbone")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    config = resolve(
        "medusa-2",
        dict(
            max_steps=10, heads_steps=5, batch_size=8, gradient_accumulation=1, num_heads=2, learning_rate=2e-2, warmup_steps=1
        ),
    )
    model = MedusaModel(load_backbone(data / "backbone"))
    metrics = train_heads(model, rows(data / "train.jsonl"), data / "out", config, rows(data / "eval.jsonl"))
    first = json.loads((data / "out" / "stage-1" / "training.json").read_text())
    assert first["config"]["backbone"] == "frozen" and first["config"]["max_steps"] == 5
    assert metrics["eval_lm_loss"] < 4.0  # it learns: ignorant would be 4.16
    loaded = MedusaModel.from_pretrained(data / "backbone", heads=data / "out")
    # The adapter is in the weights, not beside them, and reproduces the model that was trained.
    assert not any("lora" in name for name, _ in loaded.backbone.named_parameters())
    ids = random_prompt(20)
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(ids).logits, model.backbone(ids).logits, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(loaded.backbone(ids).logits, backbone(ids).logits, atol=1e-2)
    embedding = loaded.backbone.get_input_embeddings().weight
    assert torch.equal(embedding, before["model.embed_tokens.weight"])
    output = loaded.generate(ids, max_new_tokens=30)
    assert output[0, 20:].tolist() == plain_greedy(loaded.backbone, ids, 30)
    # The base weights were not touched by training.
    base = {
        name.replace(".base_layer", ""): tensor for name, tensor in model.backbone.state_dict().items() if "lora" not in name
    }
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())


def test_an_adapter_for_another_model_is_refused(data):
    pytest.importorskip("peft")
    config = TrainingConfig(backbone="lora", lora_rank=2, max_steps=1, batch_size=8, num_heads=1)
    train_heads(MedusaModel(tiny_backbone()), rows(data / "train.jsonl"), data / "out", config)
    tiny_backbone(num_hidden_layers=2).save_pretrained(data / "other")
    from medusa.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"is (broken or )?for another model"):
        MedusaModel.from_pretrained(data / "other", heads=data / "out")
    (data / "out" / "adapter_model.safetensors").write_bytes(b"nothing")
    tiny_backbone().save_pretrained(data / "same")
    with pytest.raises(CheckpointError, match="broken"):
        MedusaModel.from_pretrained(data / "same", heads=data / "out")


def test_sft_gives_a_model_with_native_heads(data):
    config = resolve("sft", dict(max_steps=6, batch_size=8, gradient_accumulation=1, num_heads=2, warmup_steps=0, held_out=0.2))
    backbone = tiny_backbone(gain=1.0)
    before = backbone.model.embed_tokens.weight.clone()
    train_heads(MedusaModel(backbone), rows(data / "train.jsonl"), data / "out", config)
    loaded = MedusaModel.from_pretrained(data / "out")
    assert loaded.num_heads == 2 and not torch.equal(loaded.backbone.model.embed_tokens.weight, before)
    prompt = random_prompt(10)
    assert loaded.generate(prompt, max_new_tokens=20)[0, 10:].tolist() == plain_greedy(loaded.backbone, prompt, 20)


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8-dynamic", "int4-dynamic"])
def test_heads_train_and_decode_on_a_quantised_backbone(data, kind):
    if "dynamic" not in kind:
        pytest.importorskip("bitsandbytes")
    tiny_backbone(gain=1.0, intermediate_size=128).save_pretrained(data / "backbone")
    backbone = load_backbone(data / "backbone", torch.float32, device_map="cpu", **quantized(kind, torch.float32))
    assert any(type(module).__name__ in ("Linear4bit", "Linear8bitLt", "QuantizedLinear") for module in backbone.modules())
    if "dynamic" in kind:
        with pytest.raises(InvalidInput, match="quantised weights have no gradients; train on the original, or nf4"):
            train_heads(MedusaModel(backbone), rows(data / "train.jsonl"), data / "joint", TrainingConfig(backbone="lora"))
    config = TrainingConfig(num_heads=2, max_steps=60, batch_size=16, learning_rate=1e-2, warmup_steps=2, targets="hard")
    metrics = train_heads(MedusaModel(backbone), rows(data / "train.jsonl"), data / "heads", config, rows(data / "eval.jsonl"))
    assert metrics["eval_head1_top1"] > 0.5
    model = MedusaModel(backbone, load_heads(data / "heads"), load_tree(data / "heads" / "medusa_tree.json"))
    prompt = rows(data / "eval.jsonl").rows[0].ids.long()[None, :8]
    got = model.generate(prompt, torch.ones_like(prompt), max_new_tokens=40)[0, 8:].tolist()
    assert len(got) == 40
    if kind != "int8":  # whose arithmetic depends on what else is in the pass
        assert got == plain_greedy(backbone, prompt, 40)


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_medusa_2_trains_on_a_quantised_backbone_and_its_adapter_loads_on_it(data, kind):
    pytest.importorskip("bitsandbytes")

    tiny_backbone(gain=1.0, intermediate_size=128).save_pretrained(data / "backbone")
    how = dict(device_map="cpu", **quantized(kind, torch.float32))
    model = MedusaModel(load_backbone(data / "backbone", **how))
    options = dict(max_steps=4, batch_size=8, gradient_accumulation=1, num_heads=1, lambda_0_schedule="sine", lambda_0=0.2)
    config = resolve("medusa-2-self-distill", options | {"quantization": kind, "warmup_steps": 0, "learning_rate": 1e-2})
    expected = pytest.warns(UserWarning, match="teacher is the quantised model") if kind != "none" else nullcontext()
    with expected:
        train_heads(model, rows(data / "train.jsonl"), data / "out", config)
    loaded = MedusaModel.from_pretrained(data / "backbone", heads=data / "out", **how)
    ids = random_prompt(20)
    assert not any(parameter.requires_grad for name, parameter in model.backbone.named_parameters() if "lora" not in name)
    make_differentiable(loaded.backbone)  # the arithmetic that training had
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(ids).logits, model.backbone(ids).logits, atol=1e-3, rtol=1e-3)
    assert loaded.generate(ids, max_new_tokens=20)[0, 20:].tolist() == plain_greedy(loaded.backbone, ids, 20)


@pytest.mark.parametrize("unpack", [fingerprint, make_differentiable])
def test_a_used_4_bit_backbone_computes_the_same_after_it_is_unpacked(data, unpack):
    pytest.importorskip("bitsandbytes")
    tiny_backbone(hidden_size=192, intermediate_size=256).save_pretrained(data / "backbone")  # several scales in a row
    backbone = load_backbone(data / "backbone", device_map="cpu", **quantized("nf4", torch.bfloat16))
    MedusaModel(backbone)  # its probe packs the weights, where the CPU can use that
    ids = random_prompt(20)
    with torch.no_grad():
        before = backbone(ids).logits.float()
        unpack(backbone)
        after = backbone(ids).logits.float()
    assert (after - before).norm() < 0.05 * before.norm()


def test_gradients_through_a_4_bit_backbone_are_right(data):
    pytest.importorskip("bitsandbytes")

    tiny_backbone(gain=1.0, intermediate_size=128).save_pretrained(data / "backbone")
    backbone = load_backbone(data / "backbone", device_map="cpu", **quantized("nf4", torch.float32))
    MedusaModel(backbone)  # its probe runs without gradients
    make_differentiable(backbone)
    direction = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    embedded = backbone.model.embed_tokens(random_prompt(6)).detach()

    def loss(step) -> torch.Tensor:
        return backbone(inputs_embeds=embedded + step * direction).logits[0, -1].logsumexp(-1)

    step = torch.zeros((), requires_grad=True)
    (got,) = torch.autograd.grad(loss(step), step)
    with torch.no_grad():
        wanted = (loss(1e-3) - loss(-1e-3)) / 2e-3
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["medusa-1", "medusa-2", "medusa-2-self-distill"])
@pytest.mark.parametrize("shared", [False, True])
def test_bfloat16_backbones_train_with_own_and_shared_lm_heads(data, method, shared):
    pytest.importorskip("peft")
    tiny_backbone(gain=1.0, dtype=torch.bfloat16).save_pretrained(data / "backbone")
    options = dict(max_steps=4, heads_steps=0, batch_size=8, gradient_accumulation=1, num_heads=2, shared_lm_head=shared)
    config = resolve(method, options | {"learning_rate": 2e-2, "warmup_steps": 0, "held_out": 0.1})
    model = MedusaModel(load_backbone(data / "backbone"))
    metrics = train_heads(model, rows(data / "train.jsonl"), data / "out", config)
    loaded = MedusaModel.from_pretrained(data / "backbone", heads=data / "out")
    assert loaded.heads.dtype == torch.bfloat16
    # What decodes is what was trained: the heads' losses after loading are those of the run.
    from medusa.training.data import collate
    from medusa.training.objective import Objective
    from medusa.training.run import hold_out

    _, held = hold_out(rows(data / "train.jsonl"), 0.1, 0)
    objective = Objective(loaded, loaded.heads, resolve("medusa-1", {"num_heads": 2}))
    with torch.no_grad():
        again = objective(**collate(list(enumerate(held))))["head_losses"]
    wanted = metrics["eval_loss"] - metrics.get("eval_lm_loss", 0.0)
    got = (torch.tensor([0.8, 0.64]) * again).sum().item() * (config.lambda_0 if config.joint else 1.0)
    assert got == pytest.approx(wanted, rel=0.02)


def test_training_goes_on_from_given_heads(data):
    config = TrainingConfig(num_heads=2, max_steps=150, batch_size=8, learning_rate=1e-2, warmup_steps=0)
    found = rows(data / "train.jsonl")
    train_heads(MedusaModel(tiny_backbone(gain=1.0)), found, data / "first", config)
    start = load_heads(data / "first")
    more = TrainingConfig(num_heads=2, max_steps=1, batch_size=8, learning_rate=1e-9, warmup_steps=0, logging_steps=1)
    for name, heads in (("further", start), ("anew", None)):
        train_heads(MedusaModel(tiny_backbone(gain=1.0), heads), found, data / name, more)
    logs = [json.loads((data / name / "training.json").read_text())["log"] for name in ("further", "anew")]
    assert logs[0][0]["loss"] < 0.95 * logs[1][0]["loss"]
    with pytest.raises(InvalidInput, match="the sizes of the heads"):
        train_heads(MedusaModel(tiny_backbone(), start), found, data / "second", TrainingConfig(num_heads=3, max_steps=1))


def test_exploding_loss_stops_the_run_and_names_step_and_sample(data):
    backbone = tiny_backbone()
    model = MedusaModel(backbone)
    with torch.no_grad():
        backbone.lm_head.weight[0, 0] = torch.nan
    config = TrainingConfig(num_heads=1, max_steps=3, batch_size=8, targets="hard")
    with pytest.raises(MedusaError, match=r"loss is nan at step 1, on .*train.jsonl:\d+"):
        train_heads(model, rows(data / "train.jsonl"), data / "heads", config)
    with pytest.raises(MedusaError, match=r"loss is \S+ at step \d+, on "):
        wild = TrainingConfig(
            num_heads=1,
            max_steps=30,
            batch_size=2,
            gradient_accumulation=4,
            targets="hard",
            learning_rate=50.0,
            warmup_steps=0,
        )
        train_heads(MedusaModel(tiny_backbone()), rows(data / "train.jsonl"), data / "wild", wild)


def test_a_cut_batch_gives_the_gradient_of_the_whole(data):
    found = masked(rows(data / "train.jsonl"))
    for name, size, accumulation in (("one", 16, 1), ("four", 4, 4)):
        config = TrainingConfig(
            num_heads=2, max_steps=3, batch_size=size, gradient_accumulation=accumulation, warmup_steps=0, held_out=0.0
        )
        train_heads(MedusaModel(tiny_backbone()), found, data / name, config)
    one, four = load_heads(data / "one").state_dict(), load_heads(data / "four").state_dict()
    for name in one:
        torch.testing.assert_close(four[name], one[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"held_out": 1.0}, "held_out"),
        ({"max_steps": 0}, "max_steps"),
        ({"heads_steps": -2, "backbone": "lora"}, "heads_steps"),
        ({"loss_chunk": -1}, "loss_chunk"),
        ({"backbone_learning_rate": -1.0}, "backbone_learning_rate"),
        ({"backbone": "full", "quantization": "nf4"}, "backbone=full cannot train nf4"),
        ({"backbone": "full", "lm_loss": "distill"}, "needs the original model"),
        ({"heads_steps": 5}, "heads_steps needs a trained backbone"),
    ],
)
def test_nonsense_configuration_is_refused(changes, message):
    with pytest.raises(InvalidInput, match=message):
        TrainingConfig(**changes)


def test_a_folder_of_another_run_is_not_resumed_nor_begun_anew_unasked(data):
    found = rows(data / "train.jsonl")
    config = TrainingConfig(num_heads=1, max_steps=2, save_steps=1, batch_size=8)
    train_heads(MedusaModel(tiny_backbone()), found, data / "out", config)
    with pytest.raises(InvalidInput, match="holds checkpoints of a run; continue it with --resume"):
        train_heads(MedusaModel(tiny_backbone()), found, data / "out", config)
    for changed, message in (
        (lambda: (MedusaModel(tiny_backbone(gain=2.0)), found, config), "made with backbone weights"),
        (lambda: (MedusaModel(tiny_backbone()), rows(data / "eval.jsonl"), config), "made with data"),
        (lambda: (MedusaModel(tiny_backbone()), found, TrainingConfig(num_heads=2, max_steps=2)), "num_heads 1, not 2"),
    ):
        model, data_, config_ = changed()
        with pytest.raises(InvalidInput, match=message):
            train_heads(model, data_, data / "out", config_, resume=True)


def test_nothing_of_an_earlier_run_is_taken_for_this_ones(data):
    pytest.importorskip("peft")
    found, backbone = rows(data / "train.jsonl"), tiny_backbone()
    joint = TrainingConfig(num_heads=2, max_steps=1, batch_size=8, backbone="lora", held_out=0.1, save_steps=100)
    train_heads(MedusaModel(tiny_backbone()), found, data / "out", joint)
    shutil.rmtree(data / "out" / "checkpoint-1")
    train_heads(
        MedusaModel(backbone), found, data / "out", TrainingConfig(num_heads=1, max_steps=1, batch_size=8, held_out=0.0)
    )
    names = {path.name for path in (data / "out").iterdir() if path.is_file()}
    made = {"config.json", "medusa_lm_head.safetensors", "medusa_tree.json", "run.json", "training.json", "README.md"}
    assert names == {".run.json.lock", *made}  # no adapter
    assert json.loads((data / "out" / "training.json").read_text())["config"]["num_heads"] == 1


def test_rates_written_the_usual_way_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-3\nwarmup_steps: 5\n")
    assert resolve("medusa-1", read_options(tmp_path / "a.yaml")).learning_rate == 2e-3


def test_recipes_are_the_papers():
    assert set(recipe_names()) == {"medusa-1", "medusa-2", "medusa-1-self-distill", "medusa-2-self-distill", "sft"}
    one, two, distill = (resolve(name, {}) for name in ("medusa-1", "medusa-2", "medusa-2-self-distill"))
    # Appendix B.2, B.3
    assert (one.num_heads, one.num_layers, one.lambda_base, one.learning_rate, one.warmup_steps) == (5, 1, 0.8, 2e-3, 40)
    assert one.batch_size * one.gradient_accumulation == two.batch_size * two.gradient_accumulation == 64 and one.epochs == 2
    assert (two.backbone, two.lora_rank, two.lora_alpha, two.lora_dropout, two.lambda_0) == ("lora", 32, 16, 0.05, 0.2)
    assert two.backbone_learning_rate is None and two.heads_steps == -1
    # Appendix B.4
    assert (distill.lm_loss, distill.lambda_0, distill.lambda_0_schedule, distill.warmup_steps) == ("distill", 0.01, "sine", 20)
    assert distill.learning_rate / 4 == pytest.approx(1e-4) and distill.batch_size * distill.gradient_accumulation == 128
    with pytest.raises(ValueError, match="no method 'medusa-3'; there are medusa-1"):
        resolve("medusa-3", {})
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        resolve("medusa-1", {"learning_rat": 1.0})


def test_hidden_states_for_a_backbone_trained_on_labels_are_refused(data):
    with pytest.raises(InvalidInput, match="uses no stored hidden states"):
        config = TrainingConfig(backbone="lora", max_steps=1)
        train_heads(MedusaModel(tiny_backbone()), rows(data / "train.jsonl"), data / "o", config, hidden_states=data / "h")
