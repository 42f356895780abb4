"""The study's commands as a user types them: help, and one clear sentence for bad input."""

import os

import pytest

from mft_nb.study import cli, runner
from mft_nb.study.datasets import load_once
from mft_nb.study.figures import draw
from tests.commands import call, call_here, check_help, check_refusal, filled

COMMANDS = ("mft_reproduce", "mft_figures", "mft_results")


@pytest.fixture(autouse=True)
def nothing_loaded():
    """Data that an earlier test of this process loaded are forgotten."""
    load_once.cache_clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder that holds half of SST-2."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "half").mkdir()
    (folder / "half" / "train.tsv").write_text("sentence\tlabel\ngood\t1\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command):
    check_help(getattr(cli, command))


@pytest.mark.parametrize("command", COMMANDS[1:])  # the first one's process is below
def test_each_command_is_installed(command):
    status, said, errors = call(command, "--help")
    assert status == 0, errors
    check_help(getattr(cli, command), said)


BAD_EXPERIMENTS = [
    ({"profile": "imdb"}, "profile is 'imdb'; known are embedded, sst2, base, bert"),
    ({"seeds": "x"}, "seeds is 'x'"),
    ({"jobs": -2}, "jobs is -2"),
    ({"studies": "magic"}, "studies holds 'magic'; known are sweep, table, controls"),
    ({"shard": "2"}, "shard is '2'; allowed is i/n"),
    ({"shard": "1/2"}, "at most the number of seeds, 1"),
    ({"engine": "slurm"}, "engine is 'slurm'; allowed are processes, ray"),
    ({"precision": "float8"}, "precision is 'float8'; allowed are float32, bfloat16"),
    ({"profile": "sst2", "data": "no/folder"}, "No folder no/folder"),
    ({"profile": "sst2", "data": "{files}/half"}, "No file"),
    ({"data": "{files}"}, "brings its own"),
]


@pytest.mark.parametrize("options, expected", BAD_EXPERIMENTS, ids=str)
def test_reproduce_refuses(options, expected, files, tmp_path, capsys):
    out = str(tmp_path / "out")
    status, said = call_here(cli.mft_reproduce, capsys, **filled(options, files), out=out)
    check_refusal(status, said, expected)
    assert not (tmp_path / "out").exists()


def test_reproduce_without_data_or_hub(tmp_path):
    empty = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "hf" / "d")}
    options = ["--profile", "sst2", "--out", tmp_path / "out"]
    status, _, said = call("mft_reproduce", *options, **empty)
    check_refusal(status, said, "could not be loaded from the Hugging Face hub")
    assert not (tmp_path / "out").exists()


def test_a_damaged_download_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path))
    (tmp_path / "vaderSentiment==3.3.2.sdist").write_bytes(b"half of it")
    status, said = call_here(cli.mft_reproduce, capsys, out=str(tmp_path / "out"))
    check_refusal(status, said, "is damaged or not the file that was published")
    assert not (tmp_path / "out").exists()


def test_no_registry_in_reach_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "c"))
    status, said = call_here(cli.mft_reproduce, capsys, out=str(tmp_path / "out"))
    check_refusal(status, said, "Could not fetch vaderSentiment==3.3.2 from the package registry")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_newer_record_of_a_study_draws_the_figures_again(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(cli, "print_results", lambda *_: None)
    monkeypatch.setattr(runner, "run_missing", lambda *_, **__: None)
    monkeypatch.setattr(draw, "draw_all", lambda *_, **__: drawn.append(True))
    table = tmp_path / "results" / "embedded" / "seed9-90-none.json"
    study = table.parent / "controls" / "seed9-90-lora.json"
    for path, second in ((table, 5), (study, 5), (tmp_path / "figures" / "one.svg", 10)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (second, second))
    for second, times in ((5, 0), (15, 1)):
        os.utime(study, (second, second))
        call_here(cli.mft_reproduce, capsys, out=str(tmp_path))
        assert len(drawn) == times
