"""mft_fit and mft_apply as a user types them: help, results, one clear sentence for bad input."""

import functools
import json
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
)

from mft_nb import cli, train
from mft_nb.config import MaskConfig
from mft_nb.mask import MFT
from mft_nb.mask_file import load_mask
from mft_nb.model import load_classifier
from mft_nb.study.datasets import load_snippets
from tests.commands import call, check_help, check_refusal, filled
from tests.commands import call_here as call_command

COMMANDS = ("mft_fit", "mft_apply")
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def call_here(command, capsys, **options):
    """Call one of the two commands in this process; its exit status and stderr."""
    return call_command(getattr(cli, command), capsys, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder, a table of sentences, and tables with one fault each."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = load_classifier("minilm")[1]
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=6, **SIZES))
    model.save_pretrained(folder / "model")  # with its head, like a fine-tuned one
    tokenizer.save_pretrained(folder / "model")
    load_snippets()["train"].select(range(64)).to_csv(folder / "rows.csv", index=False)
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("sentence,label\n")
    (folder / "column.csv").write_text("film,label\ngood,1\n")
    (folder / "labels.csv").write_text("sentence,label\ngood,yes\n")
    (folder / "few.csv").write_text("sentence,label\ngood,1\nbad,0\n")
    (folder / "commas.csv").write_text("sentence,label\ngood, really,1\nbad, bad,0\n")
    lines = [f"film {number} is fine,1" for number in range(20)]
    (folder / "alike.csv").write_text("\n".join(["text,label", *lines]))
    (folder / "both.csv").write_text("text,sentence,label\ngood,fine,1\n")
    (folder / "twice.csv").write_text("text,label,label\ngood,1,0\n")
    (folder / "semicolon.csv").write_text("text;label\ngood, really;1\n")
    (folder / "latin.csv").write_bytes("text,label\ngood,1\ncafé,1\n".encode("latin-1"))
    (folder / "twice.jsonl").write_text('{"text": "good", "label": 1, "label": 0}\n')
    three = BertConfig(num_hidden_layers=3, num_labels=3, **SIZES)
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
    check_help(getattr(cli, command))


BAD_FITS = [
    ({"data": "{files}/none.csv"}, "No file"),
    ({"data": "{files}/empty.csv"}, "empty.csv is empty; allowed is a header line"),
    ({"data": "{files}/header.csv"}, "no rows"),
    ({"data": "{files}/column.csv"}, "no column 'sentence' or 'text'; its columns are ['film'"),
    ({"data": "{files}/labels.csv"}, "has the label 'yes' in row 1; allowed is LABEL_0, LABEL_1"),
    ({"data": "{files}/few.csv"}, "give at least 11"),
    ({"validation": "{files}/none.csv"}, "No file"),
    ({"model": "./no/model"}, "No folder ./no/model"),
    ({"model": "{files}/damaged"}, "No model could be loaded"),
    ({"model": "minilm"}, "minilm has no head for a task: its architecture is BertModel"),
    ({"model": "{files}/half"}, "No model could be loaded"),
    ({"model": "{files}/three", "data": "{files}/labels.csv"}, "LABEL_1, LABEL_2"),
    ({"model": "{files}/mute"}, "holds no tokenizer"),
    ({"data": "{files}/commas.csv"}, "more fields than the header"),
    ({"keep": 0.0}, "keep is 0.0; allowed is above 0 and at most 1"),
    ({"keep": 1.5}, "keep is 1.5; allowed is above 0 and at most 1"),
    ({"layers": "6"}, "layers holds 6, but the model's layers are 0 to 5"),
    ({"layers": "last"}, "layers is 'last'"),
    ({"target_modules": "("}, "target_modules has '(', which is not a regular expression"),
    ({"target_modules": "qkv"}, "'qkv', which matches no maskable weight"),
    ({"recipe": "best"}, "recipe is 'best'; allowed are bert_mft, paper, recommended"),
    ({"recipe": "seed"}, "recipe is 'seed'; allowed are bert_mft, paper, recommended"),
    ({"epochs": 0.0}, "epochs is 0.0; allowed is a number, above 0"),
    ({"learning_rate": -1.0}, "learning_rate is -1.0; allowed is a number, above 0"),
    ({"scope": "row"}, "scope is 'row'; allowed are 'tensor', 'layer', 'global'"),
    ({"scope": "2:4"}, "keeps 0.5 of the weights, but keep is 0.9"),
    ({"batch_size": 0}, "batch_size is 0; allowed is a whole number, 1 or more"),
    ({"max_length": 2}, "max_length is 2; allowed is a whole number, 3 or more"),
    ({"seed": -1}, "seed is -1; allowed is a whole number, 0 or more"),
    ({"recipe": "bert_mft", "keep_activations": True}, "but dropout is True"),
    ({"layers": "0-1", "keep_activations": True}, "there is nothing below it to keep"),
    ({"model": "no/such/folder"}, "No folder no/such/folder, and it has not the shape of a hub id"),
    ({"model": "my model"}, "No folder my model, and it has not the shape of a hub id"),
    ({"data": "{files}/both.csv"}, "has the columns 'sentence' and 'text', and which of them is"),
    ({"data": "{files}/twice.csv"}, "twice.csv has 2 columns with the name 'label'"),
    ({"data": "{files}/twice.jsonl"}, "row 1 is not JSON (an object has the name 'label' twice)"),
    ({"data": "{files}/alike.csv"}, "has the label LABEL_1 in all of its 18 rows to learn from"),
    ({"data": "{files}/semicolon.csv"}, "so its separator looks like ';'; allowed are ',' in"),
    ({"data": "{files}/latin.csv"}, "latin.csv is not in UTF-8: line 3 has the byte 0xe9"),
    ({"label": "sentence"}, "label is 'sentence', and so is text"),
    ({"text": "sentence", "text_pair": "sentence"}, "text_pair is 'sentence', and so is text"),
    ({"subset": "sst2"}, "is a file or folder here; allowed for a data set of the hub"),
    ({"out": ""}, "out is '', which is empty"),
    ({"validation": " "}, "validation is ' ', which is empty"),
    ({"out": "{files}/rows.csv/new"}, "rows.csv: Not a directory. Name a folder in another"),
    ({"batch_size": 10**30}, "allowed is a whole number, 1 or more and at most 2147483647"),
    ({"max_length": 10**30}, "allowed is a whole number, 3 or more and at most 2147483647"),
    ({"epochs": 1e30}, "epochs is 1e+30; allowed is a number, above 0 and at most 1000000"),
    ({"layers": "0-999999999999"}, "layers is '0-999999999999'; allowed are middle, all, or whole"),
]


@pytest.mark.parametrize("change, expected", BAD_FITS, ids=str)
def test_fit_refuses(change, expected, files, tmp_path, capsys):
    options = {"model": "{files}/model", "data": "{files}/rows.csv", "out": str(tmp_path / "out")}
    options |= {"quiet": True}
    status, said = call_here("mft_fit", capsys, **filled(options | change, files))
    check_refusal(status, said, expected)
    assert not (tmp_path / "out").exists()


def test_fit_without_hub(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    options = {"model": "nobody/no-such-model", "data": str(files / "rows.csv"), "keep": 0.8}
    status, said = call_here("mft_fit", capsys, out=str(tmp_path / "out"), **options)
    check_refusal(status, said, "No model could be loaded from 'nobody/no-such-model'")
    assert "nobody/no-such-model is no folder here" in said and "asking the hub" in said
    assert not (tmp_path / "out").exists()


def test_without_network_a_name_is_refused_at_the_first_try(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9")  # nobody
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited for another try"))
    options = {"model": str(files / "model"), "data": str(files / "rows.csv")}
    for field in options:
        change = {field: "nobody/misspelt", "out": str(tmp_path / "out")}
        status, said = call_here("mft_fit", capsys, **options | change)
        check_refusal(status, said, "the hub cannot be reached (ConnectError), and nobody/misspelt")


def test_a_command_whose_reader_has_gone_ends_without_a_word(tmp_path):
    (tmp_path / "say.py").write_text(
        "from mft_nb.cli import plain_errors\n\n\n@plain_errors\ndef say():\n"
        "    for number in range(9999):\n        print(number)\n\n\nsay()\n"
    )
    command = [sys.executable, str(tmp_path / "say.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_name_that_no_hub_has_is_refused_before_the_loader(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mft_nb.model.load_config", lambda *_: pytest.fail("was loaded"))
    for name in ("no/such/folder", "gone/", "my model"):
        options = {"model": name, "data": str(files / "rows.csv"), "out": str(tmp_path / "out")}
        status, said = call_here("mft_fit", capsys, **options)
        check_refusal(status, said, f"No folder {name}, and it has not the shape of a hub id")
        status, said = call_here("mft_apply", capsys, model=name, mask="any", out="x")
        check_refusal(status, said, f"No folder {name}, and it has not the shape of a hub id")


def test_stopping_and_a_traceback_on_demand(capsys, monkeypatch):
    def fail(error):
        raise error

    command = cli.plain_errors(functools.wraps(cli.mft_fit)(fail))
    for kind in (ValueError, TypeError, FileNotFoundError, ImportError, RuntimeError):
        error = kind("a\nb")
        assert call_command(command, capsys, error=error) == (2, "mft_fit: error: a b\n")
        with monkeypatch.context() as patch:
            patch.setenv("MFT_TRACEBACK", "1")
            with pytest.raises(type(error)):
                command(error=error)
    status, said = call_command(command, capsys, error=KeyboardInterrupt())
    assert status == 130 and "Give the same command again to go on." in said


def test_what_the_file_system_refuses_is_one_line(tmp_path, capsys):
    def write():
        (tmp_path / "none" / "file").write_text("")

    status, said = call_command(cli.plain_errors(write), capsys)
    check_refusal(status, said, "No such file or directory")


@pytest.mark.parametrize(
    "fault",
    [
        lambda: torch.ones(2) @ torch.ones(3),  # a RuntimeError of torch
        lambda: torch.nn.Linear(1, 1).load_state_dict({}),  # raised by a `raise` of torch
        lambda: None + 1,  # a TypeError of Python
        lambda: int("x"),  # a ValueError of Python
        lambda: {}["a"],
    ],
)
def test_a_fault_keeps_its_traceback(fault):
    with pytest.raises((RuntimeError, TypeError, ValueError, KeyError)):
        cli.plain_errors(fault)()


def refuse():
    raise ValueError("number is -1")


def fault():
    return int("x")


@pytest.mark.parametrize("task, is_refusal", [(refuse, True), (fault, False)])
def test_an_error_in_a_worker_process_is_judged_by_where_it_was_raised(task, is_refusal, capsys):
    def command():
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            pool.submit(task).result()

    if is_refusal:
        check_refusal(*call_command(cli.plain_errors(command), capsys), "number is -1")
    else:
        with pytest.raises(ValueError, match="invalid literal"):
            cli.plain_errors(command)()


@pytest.mark.parametrize(
    "command, module, said",
    [
        ("mft_fit", "mft_nb.train.fit", "goes on from the last 100th step, or starts anew."),
        ("mft_apply", "mft_nb.mask.MFT.from_pretrained", "No masked model was written."),
    ],
)
def test_ctrl_c_promises_what_is_true(command, module, said, files, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    options = {"model": str(files / "model"), "out": str(tmp_path / "out")}
    options |= {"data": str(files / "rows.csv")}
    if command == "mft_apply":
        mft = MFT(load_classifier(files / "model")[0], MaskConfig(layers=(2,)))
        options["mask"] = str(mft.save_pretrained(tmp_path / "mask"))
    monkeypatch.setattr(module, stop)
    status, told = call_here(command, capsys, **options)
    assert status == 130 and told.endswith(said + "\n")
    assert not (tmp_path / "out").exists()


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
    options |= {"overwrite": True, "quiet": True, "epochs": 0.1, "layers": "2", "max_length": 64}
    options |= {"batch_size": 8, "scope": "neuron", "keep_activations": True, "seed": 3}
    status, said = call_here("mft_fit", capsys, **options)
    assert status == 0 and "README.md is of an earlier mask" in said
    assert len([*(tmp_path / "cache" / "activations").glob("*.bin")]) == 1
    assert (out / "notes.txt").read_text() == "mine"
    saved = load_mask(out / "mask.safetensors")
    assert saved.config["scope"] == "neuron" and saved.config["init_seed"] == 3
    asked = {"batch_size": 8, "epochs": 0.1, "max_length": 64, "seed": 3, "learning_rate": 1e-3}
    assert saved.training.items() >= asked.items()
    assert not set(asked) & set(saved.config)
    assert all(set(saved.mask.density_by_neuron(name).tolist()) <= {0, 1} for name in saved.mask)
    assert json.loads((out / "history.json").read_text())["steps"] == 1


class Killed(TrainerCallback):
    """Stops a training after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_fit_that_was_killed_goes_on_with_resume(files, tmp_path, capsys, monkeypatch):
    options = {"model": str(files / "model"), "data": str(files / "rows.csv"), "quiet": True}
    options |= {"epochs": 1.0, "layers": "2", "batch_size": 8}

    def fit(out, killed_at=0, **more):
        killed = (Killed(killed_at),) if killed_at else ()
        saving = {"save_every": 3, "callbacks": killed}  # 7 steps in all
        monkeypatch.setattr("mft_nb.train.fit", lambda *a, **given: whole_fit(*a, **given | saving))
        return call_here("mft_fit", capsys, **options | {"out": str(tmp_path / out)} | more)

    whole_fit = train.fit
    assert fit("whole")[0] == 0
    assert fit("stopped", killed_at=5)[0] == 130
    assert fit("early", killed_at=2)[0] == 130
    load_snippets()["train"].select(range(9, 73)).to_csv(tmp_path / "other.csv", index=False)
    for out, more, expected in (
        ("stopped", {"keep": 0.8}, "unfinished run with other mask: keep is 0.8, and it was 0.9"),
        ("stopped", {"seed": 1}, "an unfinished run with other seed: seed is 1, and it was 0"),
        ("stopped", {"data": str(tmp_path / "other.csv")}, "an unfinished run with other rows"),
        ("early", {}, "stopped before its first whole checkpoint"),
        ("new", {}, "holds no unfinished run, so there is nothing to go on from"),
        ("whole", {}, "holds a finished mask and no unfinished run"),
    ):
        check_refusal(*fit(out, resume=True, **more), expected)
    assert not (tmp_path / "new").exists()
    assert fit("stopped", resume=True)[0] == 0
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    for name in ("mask.safetensors", "history.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert not (stopped / "unfinished").exists()


def test_apply_refuses(files, tmp_path, capsys, monkeypatch):
    (tmp_path / "mask.safetensors").write_bytes(b"not a mask")
    options = {"model": str(files / "model"), "out": str(tmp_path / "out")}
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    wrong = [("nowhere", "No mask file"), (tmp_path, "not a mask file")]
    for mask, expected in [*wrong, (f"~/{tmp_path.name}", "not a mask file")]:
        status, said = call_here("mft_apply", capsys, mask=str(mask), **options)
        check_refusal(status, said, expected)
    assert not (tmp_path / "out").exists()
    for change, expected in (
        ({"out": None}, "Neither out nor data is given"),
        ({"out": str(tmp_path / "mask.safetensors")}, "which is a file. Name a folder."),
        ({"out": str(tmp_path)}, "which exists and is not empty"),
        ({"out": ""}, "out is '', which is empty"),
        ({"text": "review"}, "text is 'review', and data is not given, so nothing is measured"),
    ):
        status, said = call_here("mft_apply", capsys, mask=str(tmp_path), **options | change)
        check_refusal(status, said, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.safetensors"]


def test_apply_leaves_what_was_put_in_its_folder_meanwhile(files, tmp_path, capsys, monkeypatch):
    model, out = BertForSequenceClassification(BertConfig(num_hidden_layers=3, **SIZES)), None
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


def test_fit_then_apply(files, tmp_path, capsys):
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
    masked = tmp_path / "masked"
    places = {"mask": tmp_path / "mask", "out": masked, "data": files / "rows.csv"}
    cli.mft_apply(str(files / "model"), **{name: str(place) for name, place in places.items()})
    said = capsys.readouterr().out
    assert "before: " in said and "paired: " in said
    assert (masked / "model.safetensors").exists()
    status, said = call_here(
        "mft_apply", capsys, model=str(masked), mask=str(tmp_path / "mask"), out=str(tmp_path / "x")
    )
    check_refusal(status, said, "belongs to other base weights")
    mask = load_mask(tmp_path / "mask" / "mask.safetensors").mask
    base, plain = (load_classifier(folder)[0].state_dict() for folder in (files / "model", masked))
    assert list(base) == list(plain)
    for name, weight in base.items():
        expected = weight * mask[name] if name in mask else weight
        assert (plain[name] == expected).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing differs from the model of the training
        MFT.from_pretrained(load_classifier(files / "model")[0], tmp_path / "mask")
