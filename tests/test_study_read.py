"""The study's functions, as a strict reader tried them."""

import shutil

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from mft_nb.config import MaskConfig
from mft_nb.study.bench_ways import WAYS
from mft_nb.study.cli import grid_status, mft_results, print_results
from mft_nb.study.methods import treat
from mft_nb.study.plan import PROFILES, Run, Workspace
from mft_nb.study.records import MissingRecords
from mft_nb.study.runner import run_missing
from mft_nb.study.tables import results_frame
from tests.outputs import ROOT


def tiny():
    """A small BERT."""
    torch.manual_seed(0)
    shape = {"num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_hidden_layers=3, **shape))


def test_a_method_without_a_branch_is_refused():
    run = Run("embedded", 0, "90", "pull", 1.0, "inspections")
    rows = Dataset.from_dict({"sentence": ["good"], "label": [1]})
    with pytest.raises(ValueError, match="method is 'pull', which treats no checkpoint"):
        treat(run, tiny(), None, rows, rows, PROFILES["embedded"], {})


@pytest.fixture
def only_controls(tmp_path):
    """Records of a new experiment that was asked for controls alone."""
    old, new = ROOT / "results" / "sst2", tmp_path / "results" / "sst2"
    (new / "controls").mkdir(parents=True)
    shutil.copy(old / "seed0-fine_tuning.json", new)
    for path in (old / "controls").glob("seed0-*"):
        shutil.copy(path, new / "controls")
    return new


def test_controls_alone_end_in_a_sentence(only_controls, capsys):
    with pytest.raises(MissingRecords, match="holds no evaluated run"):
        results_frame(only_controls)
    print_results(only_controls)
    said = capsys.readouterr().out
    assert "holds no run of the table (other studies with records: controls)" in said
    assert "add table to --studies" in said


def test_the_results_of_controls_alone_are_told_to_the_end(only_controls, tmp_path, capsys):
    mft_results(results=str(only_controls.parent), figures=str(tmp_path / "figures"))
    assert "No treated runs" in capsys.readouterr().out
    assert any((tmp_path / "figures").glob("*.svg"))


def test_the_grid_is_counted_in_the_folder_that_is_named(tmp_path):
    run = Run("sst2", 0, "90", "none", 1.0)
    for folder, files in (("results", ()), ("mine", (run.name,))):
        (tmp_path / folder / "sst2").mkdir(parents=True)
        for name in files:
            (tmp_path / folder / "sst2" / f"{name}.json").touch()
    assert grid_status(tmp_path / "results").done.sum() == 0
    assert grid_status(tmp_path / "mine").done.sum() == 1


@pytest.mark.parametrize("way", [way for way in WAYS if way != "full"])
def test_every_way_trains_the_layers_that_are_asked(way):
    if way == "lora":
        pytest.importorskip("peft")
    trainee = WAYS[way](tiny(), MaskConfig(layers="all"))
    usual = WAYS[way](tiny(), MaskConfig())
    count = [sum(p.numel() for p in one.trained) for one in (trainee, usual)]
    assert count[0] == 3 * count[1]


def test_no_runs_are_nothing_to_do(tmp_path):
    assert run_missing([], Workspace(str(tmp_path))) == 0


def test_a_mask_that_keeps_everything_has_a_record_of_its_own():
    names = [Run("sst2", 0, "90", "mft_recommended", keep).name for keep in (0.9, 1.0)]
    assert names == ["seed0-90-mft_recommended", "seed0-90-mft_recommended-keep1"]
    assert Run("sst2", 0, "90", "none", 1.0).name == "seed0-90-none"
