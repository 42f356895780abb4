"""Model cards and uploads: true to their counts, refused where wrong."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from mft_nb import card as card_module
from mft_nb.bitmask import BitMask
from mft_nb.card import MaskResult, mask_card, paired_result, push_to_hub, write_card
from mft_nb.config import MaskConfig
from mft_nb.mask import MASK_FILE, MFT, MODULES_FILE
from mft_nb.mask_file import mask_sha256, save_mask

ABOUT = {"repo_id": "me/mask", "base_model": "me/model", "data": "toy: #1", "license": "mit"}
RESULT = MaskResult(total=200, after=180, before=170)


def save_toy(folder, first=False):
    """A mask of four weights that prunes the second (or the first)."""
    mask = BitMask({"layer.weight": torch.tensor([[not first, first], [True, True]])})
    save_mask(mask, folder / MASK_FILE, "0" * 64, MaskConfig(keep=0.75).to_dict(), {"epochs": 3.5})
    return mask


@pytest.fixture
def folder(tmp_path):
    """A folder with a mask, and other files that are nobody's business."""
    save_toy(tmp_path / "mask")
    (tmp_path / "mask" / "secret.txt").write_text("not for the hub")
    (tmp_path / "mask" / "unfinished").mkdir()
    (tmp_path / "mask" / "unfinished" / MASK_FILE).write_text("half a mask")
    return tmp_path / "mask"


@pytest.mark.parametrize("counts", [{"after": 9}, {"after": 6, "before": 9}, {"after": 0.5}])
def test_a_count_that_cannot_be_is_named_as_the_caller_named_it(counts):
    field, value = [*counts.items()][-1]
    with pytest.raises((ValueError, TypeError), match=f"^{field} is {value}"):
        MaskResult(8, **counts)


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes its calls; no token of this machine is used."""
    calls = []

    def create(self, repo_id, **options):
        calls.append(("create", repo_id, self.token, options))
        return f"hub/{repo_id}"

    def upload(self, repo_id, folder_path, **options):
        sent = {p.relative_to(folder_path).as_posix(): p for p in Path(folder_path).rglob("*")}
        calls.append(("upload", repo_id, {name: path.read_bytes() for name, path in sent.items()}))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(card_module, "get_token", lambda: None)
    return calls


def test_front_matter_is_plain_yaml_and_round_trips(folder):
    card = mask_card(folder, **ABOUT, result=RESULT, dataset="stanfordnlp/sst2", split="validation")
    path = write_card(card, folder)
    loaded = ModelCard.load(path)
    assert str(loaded) == path.read_text() == str(card)
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert front == loaded.data.to_dict()
    assert front["license"] == "mit"
    assert front["datasets"] == ["stanfordnlp/sst2"]
    (entry,) = front["model-index"][0]["results"]
    assert entry["dataset"]["name"] == "toy: #1"
    assert entry["dataset"]["split"] == "validation"
    assert entry["metrics"][0]["value"] == 0.9


def test_page_holds_interval_counts_size_hash_config_and_limits(folder):
    page = mask_card(folder, **ABOUT, result=RESULT).text
    for words in (
        "| with the mask | 180 of 200 | 90.00 [85.06, 93.43] |",  # Wilson's, by the formula below
        "was not tested",
        f"{(folder / MASK_FILE).stat().st_size:,} bytes",
        "1 of 4 (matrices: 1)",
        "0" * 64,
        '"keep": 0.75',
        '"epochs": 3.5',
        "inference is not faster",
    ):
        assert words in page, words
    z, part, n = 1.959964, 0.9, 200
    centre = (part + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(part * (1 - part) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert f"[{100 * (centre - half):.2f}, {100 * (centre + half):.2f}]" == "[85.06, 93.43]"


def test_a_result_goes_with_its_own_mask_only(tmp_path):
    measured = paired_result(np.array([0, 1, 1, 1]), np.ones(4))
    assert (measured.before, measured.after, measured.total) == (3, 4, 4)
    result = replace(measured, mask_sha256=mask_sha256(save_toy(tmp_path / "mask")))
    page = mask_card(tmp_path / "mask", **ABOUT, result=result).text
    assert "+25.00 points: 1 fixed, 0 broken of 4; McNemar's exact test p = 1.000" in page
    save_toy(tmp_path / "other", first=True)
    with pytest.raises(ValueError, match="record of another mask"):
        mask_card(tmp_path / "other", **ABOUT, result=result)


def test_a_card_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    (folder / "README.md").write_text("old")
    before = sorted(path.name for path in folder.iterdir())

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_card(mask_card(folder, **ABOUT, result=RESULT), folder)
    assert (folder / "README.md").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("private", [True, False])
def test_only_mask_and_card_go_up(folder, hub, private):
    card = mask_card(folder, **ABOUT, result=RESULT)
    assert push_to_hub(folder, "me/mask", card, private=private, token="t") == "hub/me/mask"
    mask = (folder / MASK_FILE).read_bytes()
    assert hub == [
        ("create", "me/mask", "t", {"private": private, "exist_ok": True}),
        ("upload", "me/mask", {MASK_FILE: mask, "README.md": str(card).encode()}),
    ]
    assert not (folder / "README.md").exists()


def test_nothing_goes_up_with_a_wrong_card_folder_or_token(folder, hub, tmp_path):
    card = mask_card(folder, **ABOUT, result=RESULT)
    save_toy(tmp_path / "other", first=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / MASK_FILE).write_bytes((folder / MASK_FILE).read_bytes()[:-9])
    for place, repo_id, token, expected in (
        (folder, "me/mask", None, "none is saved"),
        (folder, "me/elsewhere", "t", "download from elsewhere"),
        (folder, "mask", "t", "repo_id is 'mask'"),
        (tmp_path / "other", "me/mask", "t", "card was made for another file"),
        (tmp_path / "damaged", "me/mask", "t", "is not a mask file, or it is cut off"),
        (tmp_path / "none", "me/mask", "t", "No mask file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=expected):
            push_to_hub(place, repo_id, card, token=token)
    assert hub == []


def test_without_network_one_sentence_says_so(folder, monkeypatch):
    card = mask_card(folder, **ABOUT, result=RESULT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="could not be reached .*unset HF_HUB_OFFLINE"):
        push_to_hub(folder, "me/mask", card, token="hf_toy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConnectionError, match="could not be reached"):
        push_to_hub(folder, "me/mask", card, token="hf_toy")


def test_a_refusal_by_the_hub_names_its_status(folder, hub, monkeypatch):
    def refuse(self, **_):
        response = SimpleNamespace(headers={}, request=None, status_code=403)
        raise HfHubHTTPError("Forbidden", response=response)

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(ConnectionError, match="refused me/mask with status 403"):
        push_to_hub(folder, "me/mask", mask_card(folder, **ABOUT, result=RESULT), token="t")


def test_modules_trained_with_a_mask_go_up_and_the_card_says_so(hub, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    model["head"] = nn.Linear(4, 2)
    config = MaskConfig(layers="all", keep=0.75, modules_to_save=("head",))
    MFT(model, config).save_pretrained(tmp_path)
    card = mask_card(tmp_path, **ABOUT, result=RESULT)
    assert f'hf_hub_download("{ABOUT["repo_id"]}", "{MODULES_FILE}")' in card.text
    assert "The modules `head` were trained with the mask" in card.text
    assert "No weight is changed otherwise" not in card.text
    push_to_hub(tmp_path, ABOUT["repo_id"], card, token="t")
    assert set(hub[-1][2]) == {MASK_FILE, MODULES_FILE, "README.md"}
    (tmp_path / MODULES_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="modules were trained with it"):
        push_to_hub(tmp_path, ABOUT["repo_id"], card, token="t")


def test_a_card_for_another_kind_of_model(folder):
    about = ABOUT | {"task": "text-generation", "auto_class": "AutoModelForCausalLM"}
    card = mask_card(folder, **about, result=RESULT)
    assert "model = AutoModelForCausalLM.from_pretrained(" in card.text
    assert "SequenceClassification" not in card.text
    assert card.data.to_dict()["pipeline_tag"] == "text-generation"
    with pytest.raises(ValueError, match="auto_class is 'BertModel'"):
        mask_card(folder, **ABOUT | {"auto_class": "BertModel"}, result=RESULT)


def tiny_mask(folder, scope):
    """A mask of half the weights or units of a tiny classifier, by its scope."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_hidden_layers=3, **shape))
    MFT(model, MaskConfig(layers="all", scope=scope, keep=0.5)).save_pretrained(folder)


@pytest.mark.parametrize("scope", ["ffn", "head", "unit", "neuron"])
@pytest.mark.filterwarnings("ignore:The mask prunes all of")
def test_a_card_of_whole_units_says_how_they_are_taken_out(scope, tmp_path):
    tiny_mask(tmp_path, scope)
    page = mask_card(tmp_path, **ABOUT, result=RESULT).text
    use, _, limits = page.partition("## Limits")
    assert "`mft.shrink()` gives a smaller and faster plain model" in use
    assert "`mft_nb.shrink.shrink(model)` after a merge" in limits
    assert "scattered" not in page and "inference is not faster" not in page


@pytest.mark.parametrize("scope", ["tensor", "layer", "global", "2:4"])
def test_a_card_of_single_weights_promises_no_speed(scope, tmp_path):
    tiny_mask(tmp_path, scope)
    page = mask_card(tmp_path, **ABOUT, result=RESULT).text
    assert "The zeros are scattered, so inference is not faster" in page
    assert "shrink" not in page


def test_a_card_asks_the_mask_and_not_its_settings(tmp_path):
    row = torch.tensor([[True, True], [False, False]])
    single = torch.tensor([[True, True], [True, False]])
    for name, mask in (("whole", row), ("single", single)):
        mask = BitMask({"layer.weight": mask, "next.weight": row.T})
        save_mask(mask, tmp_path / name / MASK_FILE, "0" * 64, MaskConfig().to_dict())
        page = mask_card(tmp_path / name, **ABOUT, result=RESULT).text
        assert ("mft.shrink()" in page) == (name == "whole")
