"""Loading and training, as a strict reader tried them."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from mft_nb import train, trainer
from mft_nb.config import MaskConfig
from mft_nb.data import check_rows, read_table
from mft_nb.mask import MFT
from mft_nb.model import _reason, load_classifier

ROWS = Dataset.from_dict({"sentence": ["a joy", "dull"] * 4, "label": [1, 0] * 4})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with MiniLM's tokenizer, saved."""
    place = tmp_path_factory.mktemp("models") / "mine"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(num_hidden_layers=3, **sizes)).save_pretrained(place)
    load_classifier("minilm")[1].save_pretrained(place)
    return place


@pytest.fixture
def without(folder):
    """Leave out the weights whose name starts in some way, and put them back afterwards."""
    file = folder / "model.safetensors"
    # copies: the tensors of an older safetensors lie in the file that is written over
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}

    def leave_out(start):
        left = {name: tensor for name, tensor in whole.items() if not name.startswith(start)}
        assert len(left) < len(whole)
        save_file(left, file, {"format": "pt"})

    yield leave_out
    save_file(whole, file, {"format": "pt"})


def test_an_encoder_without_its_weights_is_refused(folder, without):
    without("bert.encoder.layer.1.")
    with pytest.raises(ValueError, match="lacks 16 weights of the encoder, such as bert.encoder"):
        load_classifier(folder)


@pytest.mark.parametrize("start", ("classifier", "bert.pooler"))
def test_a_head_may_be_new(folder, without, start):
    without(start)
    assert load_classifier(folder)[0].config.num_labels == 2


@pytest.mark.parametrize(
    "column, second, said",
    [
        ("sentence", " ", "empty sentence"),
        ("sentence", "", "empty sentence"),
        ("label", 2, "label"),
    ],
)
def test_rows_are_refused_as_in_a_file_and_counted_from_one(column, second, said, tmp_path):
    columns = {"sentence": ["fine", "dull"], "label": [1, 0]}
    columns[column] = [columns[column][0], second]
    rows = Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=f"rows has .*{said}.* in row 2"):
        check_rows(rows, "rows")
    rows.to_pandas().to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(ValueError, match=f"row 2 has .*{said}"):
        read_table(tmp_path / "rows.csv")


@pytest.mark.parametrize("headless", [False, True])
def test_loading_leaves_every_generator_as_it_was(folder, without, headless):
    if headless:
        without("classifier")
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = states()
    first = load_classifier(folder, seed=3)[0].classifier.weight
    assert states() == before
    torch.rand(1)
    again = load_classifier(folder, seed=3)[0].classifier.weight
    assert torch.equal(first, again)  # the seed alone decides a new head
    other = load_classifier(folder, seed=4)[0].classifier.weight
    assert torch.equal(first, other) != headless


def test_an_error_without_a_message_has_a_reason():
    assert _reason(OSError()) == "OSError"


def test_no_rows_are_refused_by_name(folder):
    model, tokenizer = load_classifier(folder)
    with pytest.raises(ValueError, match="rows is empty; give at least one sentence"):
        train.predict(model, tokenizer, ROWS.select([]))
    with pytest.raises(ValueError, match="rows is empty; give at least one sentence"):
        train.check_fits(model, Dataset.from_dict({"input_ids": [], "length": []}))


def test_a_context_of_the_user_does_not_replace_the_settings_of_the_mask(folder, monkeypatch):
    model, tokenizer = load_classifier(folder)
    mft = MFT(model, MaskConfig.recommended())
    seen = {}

    def note(*_, context, **__):
        seen.update(context)
        return train.History()

    monkeypatch.setattr(train, "train", note)
    train.fit(mft, tokenizer, ROWS, context={"mine": 1})
    assert seen == {"mine": 1, "mask": mft.config.to_dict()}


def states():
    """The states of the three generators, as plain values."""
    of_numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return random.getstate(), of_numpy, torch.get_rng_state().tolist()


def test_evaluation_leaves_every_generator_as_it_was(folder):
    model, tokenizer = load_classifier(folder)
    before = states()
    train.predict(model, tokenizer, ROWS)
    assert states() == before


def test_the_generators_of_every_card_are_put_back(monkeypatch):
    asked = []
    cuda = SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 2)
    monkeypatch.setattr(trainer.torch, "cuda", cuda)
    fork = torch.random.fork_rng

    def note(cards):
        asked.extend(cards)
        return fork(())

    monkeypatch.setattr(trainer.torch.random, "fork_rng", note)
    with trainer.same_random_state():
        pass
    assert asked == [0, 1]
