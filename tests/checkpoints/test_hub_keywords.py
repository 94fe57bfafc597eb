"""Claims about models by name: the keywords of transformers' from_pretrained hold for backbone, heads and tokenizer alike."""

import pytest

import medusa.checkpoints.hub
from medusa import MedusaModel
from medusa.checkpoints.hub import at, find_model, with_file
from medusa.cli import common
from medusa.errors import CheckpointError, InvalidInput
from tiny import random_heads, tiny_backbone

HUB = {"token": "secret", "cache_dir": "there", "local_files_only": True, "force_download": False}


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """A hub with a backbone and heads under two ids; what was asked of it."""
    backbone = tiny_backbone(num_hidden_layers=1)
    backbone.save_pretrained(tmp_path / "me" / "model" / "inner")
    MedusaModel(backbone, random_heads(backbone)).save_pretrained(tmp_path / "me" / "heads")
    for file in (tmp_path / "me" / "model" / "inner").iterdir():
        (tmp_path / "me" / "model" / file.name).write_bytes(file.read_bytes())
    asked: list[tuple[str, dict]] = []

    def snapshot_download(name, allow_patterns, **hub):
        asked.append((name, hub))
        return str(tmp_path / name)

    monkeypatch.setattr(medusa.checkpoints.hub, "snapshot_download", snapshot_download)
    return asked


def test_keywords_that_say_where_files_are_hold_for_backbone_and_heads(repositories):
    model = MedusaModel.from_pretrained("me/model", "me/heads", revision="old", **HUB)
    assert model.num_heads == 3
    assert {name for name, _ in repositories} == {"me/model", "me/heads"}
    for _, hub in repositories:
        assert {name: hub.get(name) for name in ("revision", *HUB)} == {"revision": "old", **HUB}


def test_heads_may_have_their_own(repositories):
    MedusaModel.from_pretrained(
        "me/model@old", "me/heads", subfolder="inner", heads_options={"subfolder": "", "revision": "new"}
    )
    assert {(name, hub["revision"]) for name, hub in repositories} == {("me/model", "old"), ("me/heads", "new")}
    with pytest.raises(InvalidInput, match="heads_options"):
        MedusaModel.from_pretrained("me/model", heads_options={"revision": "new"})


def test_subfolder_that_is_not_there_is_named_with_those_that_are(repositories, tmp_path):
    for name in ("me/model", tmp_path / "me" / "model"):
        with pytest.raises(CheckpointError, match="no folder outer; its folders: inner"):
            MedusaModel.from_pretrained(name, subfolder="outer")
    assert find_model(tmp_path / "me" / "model", subfolder="inner").folder == tmp_path / "me" / "model" / "inner"


def test_proxies_are_refused():
    with pytest.raises(InvalidInput, match="HTTPS_PROXY"):
        MedusaModel.from_pretrained("me/model", proxies={"https": "there"})


def test_command_line_names_a_revision_of_a_hub_id_alone(tmp_path):
    assert with_file("me/model", None, "old") == "me/model@old"
    assert with_file("me/model", "q8.gguf", "old") == "me/model@old/q8.gguf"
    assert with_file("embedded", None, "old") == "embedded"
    assert at(str(tmp_path), "old") == str(tmp_path)
    assert at("me/model@new", "old") == "me/model@new"


def test_offline_reaches_the_hubs_client(monkeypatch):
    from huggingface_hub import constants, is_offline_mode

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    common._go_offline(False)
    assert not is_offline_mode()
    common._go_offline(True)
    assert is_offline_mode()


@pytest.mark.parametrize("setting", ["top_k", "top_p", "min_p"])
def test_sampling_option_at_temperature_0_is_refused_by_its_flag(setting):
    values = {"top_k": None, "top_p": None, "min_p": None, setting: 0.5}
    rest = dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"))
    rest |= {"acceptance": "exact", "epsilon": 0.09, "delta": 0.3}
    with pytest.raises(InvalidInput, match="--" + setting.replace("_", "-")):
        common.sampling_options({"temperature": 0.0, **values, **rest})
    assert common.sampling_options({"temperature": 0.7, **values, **rest})[setting] == 0.5
