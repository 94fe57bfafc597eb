"""Claims about `medusa.tune`: it does what the command does, from Python."""

import json

import pytest
import torch
from typer.testing import CliRunner

import medusa
from medusa import MedusaModel, MedusaTree, load_tree
from medusa.cli import app
from medusa.errors import MedusaError
from medusa.trees.calibration import Calibration
from medusa.tuning.config import TREE_KINDS
from medusa.tuning.verbs import TuningConfig, tune, tune_model
from tiny import random_heads, random_prompt, tiny_backbone

QUICK = {"nodes": [4], "kinds": ["static"], "rounds": 1, "max_new_tokens": 4, "always": True}


def test_the_embedded_model_is_tuned_and_a_second_call_records_nothing_again(tmp_path, monkeypatch):
    tuned = medusa.tune(output=tmp_path / "medusa_tree.json", limit=2, prompt_tokens=16, **QUICK)
    assert load_tree(tmp_path / "medusa_tree.json") == tuned.tree and len(tuned.tree) <= 4
    assert json.loads((tmp_path / "tuning.json").read_text()) == json.loads(json.dumps(tuned.to_dict()))
    assert Calibration.load(tmp_path) == tuned.calibration
    assert tuned.choices.recommended_heads == tuned.tree.depth in (1, 2, 3)

    def refuse(*args, **kwargs):
        raise AssertionError("nothing is left to record")

    monkeypatch.setattr("medusa.tuning.recording._record", refuse)
    medusa.tune(output=tmp_path / "medusa_tree.json", limit=2, prompt_tokens=16, **QUICK)


def test_a_loaded_model_is_tuned_for_each_size_of_batch():
    backbone = tiny_backbone(eos_token_id=None)
    model = MedusaModel(backbone, random_heads(backbone, 2), MedusaTree([]))
    config = TuningConfig(
        nodes=(4,), kinds=("dynamic",), batches=(1, 2), contexts=(6,), rounds=1, max_new_tokens=8, always=True
    )
    tuned = tune_model(model, [random_prompt(6, seed=seed)[0] for seed in range(4)], config=config, source="random")
    assert set(tuned.choices.chosen) == {1, 2} and tuned.made_with["contexts"] == [6]
    plain, ids = (model.generate(random_prompt(5), max_new_tokens=4, tree=tree) for tree in (MedusaTree([]), tuned.tree))
    assert torch.equal(plain, ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": [1]}, "nodes of tuning are .1,., expected at least 2"),
        ({"kinds": ["sparse"]}, "contain 'sparse', expected static, dynamic, copying, independent"),
        ({"rounds": 0}, "rounds of tuning is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"node": [4]}, "unknown key 'node'; did you mean 'nodes'"),
        ({"model": "some/model"}, "no prompts; pass --prompts"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(MedusaError, match=message):
        tune(**options)


def test_the_command_offers_every_kind_and_refuses_others():
    done = CliRunner().invoke(app, ["tune", "embedded", "--kind", "sparse"], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and all(f"'{kind}'" in done.output for kind in TREE_KINDS)
    assert CliRunner().invoke(app, ["tune", "embedded", "--nodes", "1"]).exit_code == 2
