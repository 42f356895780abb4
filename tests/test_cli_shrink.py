"""`mft_apply --shrink`: a smaller plain model with the masked one's answers, or nothing at all."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers import BertForSequenceClassification as Bert

from mft_nb import cli
from mft_nb.config import MaskConfig
from mft_nb.mask import MFT
from mft_nb.model import load_classifier
from mft_nb.study.datasets import load_snippets
from tests.commands import call_here, call_typed, check_refusal

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder and a table of sentences."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = Bert(BertConfig(num_hidden_layers=3, **SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "model")
    load_classifier("minilm")[1].save_pretrained(folder / "model")
    load_snippets()["train"].select(range(32)).to_csv(folder / "rows.csv", index=False)
    return folder


@pytest.fixture
def apply(files, tmp_path, capsys):
    """Put a mask with some settings on the model by the command; exit status and stderr."""

    def call(out="small", **settings):
        model = load_classifier(files / "model")[0]
        mask = MFT(model, MaskConfig(init="normal", **settings)).save_pretrained(tmp_path / "mask")
        options = {"model": str(files / "model"), "mask": str(mask), "shrink": True}
        if out:
            options["out"] = str(tmp_path / out)
        return call_here(cli.mft_apply, capsys, **options, data=str(files / "rows.csv"))

    return call


def logits(model):
    """Of two short texts."""
    with torch.no_grad():
        return model.eval()(torch.arange(1000, 1012).reshape(2, 6)).logits


def test_fit_shrink_and_load_without_the_library(files, tmp_path, capsys):
    chosen = ["--scope", "ffn", "--layers", "all", "--keep", "0.25", "--epochs", "1", "--quiet"]
    places = [files / "model", files / "rows.csv", tmp_path / "mask"]
    status, said, errors = call_typed("mft_fit", capsys, *places, *chosen)
    assert status == 0, errors
    assert "trainable scores: 192," in said  # 64 neurons in each of 3 layers
    small = tmp_path / "small"
    chosen = ["--out", small, "--data", files / "rows.csv", "--shrink"]
    given = [files / "model", tmp_path / "mask", *chosen]
    status, said, errors = call_typed("mft_apply", capsys, *given)
    assert status == 0, errors
    loaded = AutoModelForSequenceClassification.from_pretrained(small)
    base, tokenizer = load_classifier(files / "model")
    before, after = base.num_parameters(), loaded.num_parameters()
    assert before - after == 3 * 48 * (32 + 1 + 32)  # row, bias and column of each neuron
    assert f"{before:,} parameters before, {after:,} after" in said
    assert "paired: " in said and f"smaller model in {small}" in said
    assert loaded.config.intermediate_size == 16
    masked = MFT.from_pretrained(base, tmp_path / "mask").model
    assert torch.allclose(logits(masked), logits(loaded), atol=1e-5)
    assert load_classifier(small)[1]("a joy") == tokenizer("a joy")


REFUSED_BEFORE_LOADING = [
    ({"scope": "ffn", "layers": "all", "out": None}, "but out is not; name a folder"),
    ({"scope": "tensor", "layers": "all"}, "--layers all and --scope ffn (or unit"),
    ({"scope": "2:4", "layers": "all", "keep": 0.5}, "prunes no neuron or head as a whole"),
    ({"scope": "ffn", "layers": "all", "keep": 1.0}, "prunes no neuron or head as a whole"),
]
REFUSED_BEFORE_MEASURING = [
    ({"scope": "ffn", "layers": (1,), "keep": 0.5}, "Prune neurons in every layer"),
    ({"scope": "head", "layers": "all", "keep": 0.5}, "with another number of heads"),
]


@pytest.mark.parametrize("settings, expected", REFUSED_BEFORE_LOADING, ids=str)
def test_refused_before_the_model_is_loaded(settings, expected, apply, tmp_path, monkeypatch):
    monkeypatch.setattr("mft_nb.model.load_model", lambda *_, **__: pytest.fail("was loaded"))
    check_refusal(*apply(**settings), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]


@pytest.mark.parametrize("settings, expected", REFUSED_BEFORE_MEASURING, ids=str)
def test_refused_before_anything_is_measured(settings, expected, apply, tmp_path, monkeypatch):
    monkeypatch.setattr("mft_nb.evaluate.evaluate", lambda *_, **__: pytest.fail("was measured"))
    check_refusal(*apply(**settings), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]


def test_heads_that_must_stay_are_named(apply, tmp_path):
    status, said = apply(scope="unit", layers="all", keep=0.5)
    assert status == 0 and "Pruned heads stay as zeros" in said
    assert "mft_apply: warning: A Bert" in said
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert (small.config.intermediate_size, small.config.num_attention_heads) == (32, 2)
