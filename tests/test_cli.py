"""The commands as a user types them: help, results, and one clear sentence for bad input."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from mft_nb import cli
from mft_nb.bitmask import load_mask
from mft_nb.data import load_snippets
from mft_nb.mask import MFT
from mft_nb.model import load_classifier

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COMMANDS = ("mft_reproduce", "mft_figures", "mft_results", "mft_fit", "mft_apply")


def call_here(command, capsys, **options):
    """Run a command in this process; its exit status and stderr."""
    try:
        getattr(cli, command)(**options)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def call(command, *arguments, cwd=None, **environment):
    """Run a command; its exit status, stdout and stderr."""
    offline = {"HF_HUB_OFFLINE": "1", "MFT_SST2_DIR": ""} | environment
    done = subprocess.run(
        [BIN / command, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | offline,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder, a table of sentences, and tables with one fault each."""
    folder = tmp_path_factory.mktemp("files")
    model, tokenizer = load_classifier("minilm")  # saved with its head, like a fine-tuned one
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    load_snippets()["train"].select(range(64)).to_csv(folder / "rows.csv", index=False)
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("sentence,label\n")
    (folder / "column.csv").write_text("text,label\ngood,1\n")
    (folder / "labels.csv").write_text("sentence,label\ngood,yes\n")
    (folder / "few.csv").write_text("sentence,label\ngood,1\nbad,0\n")
    (folder / "commas.csv").write_text("sentence,label\ngood, really,1\nbad, bad,0\n")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    three = BertConfig(num_hidden_layers=3, num_labels=3, **sizes)
    for name in ("three", "mute"):
        BertForSequenceClassification(three).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "three")
    (folder / "damaged").mkdir()
    for path in (folder / "model").iterdir():
        (folder / "damaged" / path.name).write_bytes(path.read_bytes()[:1000])
    (folder / "half").mkdir()
    (folder / "half" / "train.tsv").write_text("sentence\tlabel\ngood\t1\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command):
    status, said, _ = call(command, "--help")
    assert status == 0
    assert "usage: " + command in said
    for name, parameter in inspect.signature(getattr(cli, command)).parameters.items():
        shown = name if parameter.default is parameter.empty else f"--{name}"
        assert shown in said


BAD_EXPERIMENTS = [
    ({"profile": "imdb"}, "profile is 'imdb'; known are embedded, sst2, base, bert"),
    ({"seeds": "x"}, "seeds is 'x'"),
    ({"jobs": -2}, "jobs is -2"),
    ({"studies": "magic"}, "studies holds 'magic'; known are sweep, table, controls"),
    ({"shard": "2"}, "shard is '2'; allowed is i/n"),
    ({"shard": "1/2"}, "at most the number of seeds, 1"),
    ({"engine": "slurm"}, "engine is 'slurm'; allowed are processes, ray"),
    ({"profile": "sst2", "data": "no/folder"}, "No folder no/folder"),
    ({"profile": "sst2", "data": "{files}/half"}, "No file"),
    ({"data": "{files}"}, "brings its own"),
]


def filled(options, files):
    """Options with the folder of the test's files put in."""
    return {k: v.format(files=files) if isinstance(v, str) else v for k, v in options.items()}


@pytest.mark.parametrize("options, expected", BAD_EXPERIMENTS, ids=str)
def test_reproduce_refuses(options, expected, files, tmp_path, capsys):
    out = str(tmp_path / "out")
    status, said = call_here("mft_reproduce", capsys, **filled(options, files), out=out)
    check_refusal(status, said, expected)
    assert not (tmp_path / "out").exists()


def test_reproduce_without_data_or_hub(tmp_path):
    empty = {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "hf" / "d")}
    options = ["--profile", "sst2", "--out", tmp_path / "out"]
    status, _, said = call("mft_reproduce", *options, **empty)
    check_refusal(status, said, "could not be loaded from the Hugging Face hub")
    assert not (tmp_path / "out").exists()


BAD_FITS = [
    ({"data": "{files}/none.csv"}, "No file"),
    ({"data": "{files}/empty.csv"}, "cannot be read"),
    ({"data": "{files}/header.csv"}, "no rows"),
    ({"data": "{files}/column.csv"}, "no column 'sentence'; its columns are ['text', 'label']"),
    ({"data": "{files}/labels.csv"}, "row 1 has label 'yes'; allowed are 0 (negative) and 1"),
    ({"data": "{files}/few.csv"}, "give at least 10"),
    ({"model": "./no/model"}, "No folder ./no/model"),
    ({"model": "{files}/damaged"}, "No model could be loaded"),
    ({"model": "minilm"}, "minilm has no two-class classifier head"),
    ({"model": "{files}/half"}, "No model could be loaded"),
    ({"model": "{files}/three"}, "tells 3 classes apart"),
    ({"model": "{files}/mute"}, "holds no tokenizer"),
    ({"data": "{files}/commas.csv"}, "more fields than the header"),
    ({"keep": 0.0}, "keep is 0.0; allowed is above 0 and at most 1"),
    ({"keep": 1.5}, "keep is 1.5; allowed is above 0 and at most 1"),
    ({"layers": "6"}, "layers holds 6, but the model's layers are 0 to 5"),
    ({"layers": "last"}, "layers is 'last'"),
    ({"target_modules": "qkv"}, "'qkv', which matches no maskable weight"),
    ({"recipe": "best"}, "recipe is 'best'; known are seed, paper, recommended"),
    ({"epochs": 0.0}, "epochs is 0.0; allowed is above 0"),
    ({"scope": "row"}, "scope is 'row'; allowed are 'tensor', 'layer', 'global'"),
    ({"scope": "2:4"}, "keeps 0.5 of the weights, but keep is 0.9"),
    ({"batch_size": 0}, "batch_size is 0; allowed is 1 or more"),
    ({"recipe": "seed", "keep_activations": True}, "but dropout is True"),
    ({"layers": "0-1", "keep_activations": True}, "there is nothing below it to keep"),
    ({"model": "no/such/folder"}, "No folder no/such/folder, and it has not the shape of a hub id"),
    ({"model": "my model"}, "No folder my model, and it has not the shape of a hub id"),
]


@pytest.mark.parametrize("change, expected", BAD_FITS, ids=str)
def test_fit_refuses(change, expected, files, tmp_path, capsys):
    options = {"model": "{files}/model", "data": "{files}/rows.csv", "out": str(tmp_path / "out")}
    status, said = call_here("mft_fit", capsys, **filled(options | change, files))
    check_refusal(status, said, expected)
    assert not (tmp_path / "out").exists()


def test_fit_without_hub(files, tmp_path):
    arguments = ["nobody/no-such-model", files / "rows.csv", tmp_path / "out", "--keep", "0.8"]
    status, _, said = call("mft_fit", *arguments)
    check_refusal(status, said, "No model could be loaded from 'nobody/no-such-model'")
    assert "nobody/no-such-model is no folder here" in said and "asking the hub" in said
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_hub_has_is_refused_before_the_loader(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mft_nb.model.load_classifier", lambda *_: pytest.fail("was loaded"))
    for name in ("no/such/folder", "gone/", "my model"):
        options = {"model": name, "data": str(files / "rows.csv"), "out": str(tmp_path / "out")}
        status, said = call_here("mft_fit", capsys, **options)
        check_refusal(status, said, f"No folder {name}, and it has not the shape of a hub id")
        status, said = call_here("mft_apply", capsys, model=name, mask="any", out="x")
        check_refusal(status, said, f"No folder {name}, and it has not the shape of a hub id")


def test_fit_keeps_the_mask_that_is_there(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "mask"
    out.mkdir()
    (out / "mask.safetensors").write_bytes(b"weeks of work")
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("a card")
    options = {"model": str(files / "model"), "data": str(files / "rows.csv"), "out": str(out)}
    status, said = call_here("mft_fit", capsys, **options)
    check_refusal(status, said, "holds a mask already. Name another folder, or give --overwrite")
    status, said = call_here("mft_fit", capsys, **options | {"out": str(out / "notes.txt")})
    check_refusal(status, said, "which is a file")
    kept = {"README.md", "mask.safetensors", "notes.txt"}
    assert {path.name for path in out.iterdir()} == kept
    assert (out / "mask.safetensors").read_bytes() == b"weeks of work"
    options |= {"overwrite": True, "quiet": True, "epochs": 0.1, "layers": "2"}
    options |= {"batch_size": 8, "scope": "neuron", "keep_activations": True}
    status, said = call_here("mft_fit", capsys, **options)
    assert status == 0 and "README.md is of an earlier mask" in said
    assert len([*(tmp_path / "cache" / "activations").glob("*.bin")]) == 1
    assert (out / "notes.txt").read_text() == "mine"
    saved = load_mask(out / "mask.safetensors")
    assert saved.config["batch_size"] == 8 and saved.config["scope"] == "neuron"
    assert all(set(saved.mask.density_by_neuron(name).tolist()) <= {0, 1} for name in saved.mask)


def check_refusal(status, said, expected):
    """Exit status 2, no traceback, one line, the expected words."""
    assert status == 2, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert ": error: " in last
    assert expected in last


def test_apply_refuses(files, tmp_path, capsys):
    (tmp_path / "mask.safetensors").write_bytes(b"not a mask")
    options = {"model": str(files / "model"), "out": str(tmp_path / "out")}
    for mask, expected in [("nowhere", "No mask file"), (tmp_path, "not a mask file")]:
        status, said = call_here("mft_apply", capsys, mask=str(mask), **options)
        check_refusal(status, said, expected)
    assert not (tmp_path / "out").exists()


def test_apply_leaves_what_was_put_in_its_folder_meanwhile(files, tmp_path, capsys, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    model, out = BertForSequenceClassification(BertConfig(num_hidden_layers=3, **sizes)), None
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(tmp_path / "model")
    MFT(model).save_pretrained(tmp_path / "mask")
    options = {"model": str(tmp_path / "model"), "mask": str(tmp_path / "mask")}
    options |= {"data": str(files / "few.csv")}

    def measure(*_):
        if out.name == "full":
            (out / "thesis.txt").write_text("mine")
        return "measured"

    monkeypatch.setattr(cli, "_describe", measure)
    for out in (tmp_path / "full", tmp_path / "empty"):
        out.mkdir()
        status, said = call_here("mft_apply", capsys, out=str(out), **options)
        if out.name == "full":
            check_refusal(status, said, f"out is {out}, which was empty before and is not now")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert status == 0 and (tmp_path / "empty" / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "mask", "model"]


def test_a_damaged_download_is_refused(tmp_path):
    (tmp_path / "vaderSentiment==3.3.2.sdist").write_bytes(b"half of it")
    status, _, said = call("mft_reproduce", "--out", tmp_path / "out", MFT_CACHE=str(tmp_path))
    check_refusal(status, said, "is damaged or not the file that was published")
    assert not (tmp_path / "out").exists()


def test_no_registry_in_reach_is_one_sentence(tmp_path):
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "MFT_CACHE": str(tmp_path / "c"),
    }
    status, _, said = call("mft_reproduce", "--out", tmp_path / "out", **offline)
    check_refusal(status, said, "Could not fetch vaderSentiment==3.3.2 from the package registry")
    assert list((tmp_path / "c").iterdir()) == []


def test_fit_then_apply(files, tmp_path):
    patterns = r"layer\.\d{1,2}\..*query,value"  # two; the comma in braces is the first one's
    options = ["--epochs", "1", "--target_modules", patterns, "--layers", "0-1", "--quiet"]
    status, said, errors = call(
        "mft_fit", files / "model", files / "rows.csv", tmp_path / "mask", *options
    )
    assert status == 0, errors
    assert "before: " in said and "BitMask(4 tensors" in said
    assert "%|" not in errors  # no bar
    assert sorted(path.name for path in (tmp_path / "mask").iterdir()) == [
        "history.json",
        "mask.safetensors",
    ]
    arguments = [
        files / "model",
        tmp_path / "mask",
        "--out",
        tmp_path / "masked",
        "--data",
        files / "rows.csv",
    ]
    status, said, errors = call("mft_apply", *arguments)
    assert status == 0, errors
    assert (tmp_path / "masked" / "model.safetensors").exists()
    status, _, said = call(
        "mft_apply", tmp_path / "masked", tmp_path / "mask", "--data", files / "rows.csv"
    )
    check_refusal(status, said, "belongs to other base weights")
