"""What `fit` keeps by itself changes nothing that is learned, or is not kept."""

import copy
import threading

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from mft_nb import train as training
from mft_nb.activations import keep_activations
from mft_nb.config import MaskConfig
from mft_nb.mask import MFT
from mft_nb.model import load_classifier
from mft_nb.train import TrainConfig, fit

TWICE = TrainConfig(learning_rate=1e-2, batch_size=16, epochs=2)
SENTENCES = [f"a {'good' if number % 2 else 'bad'} film, number {number}" for number in range(40)]
ROWS = Dataset.from_dict({"sentence": SENTENCES, "label": [number % 2 for number in range(40)]})


@pytest.fixture(scope="module")
def tokenizer():
    return load_classifier("minilm")[1]


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=4, **sizes))


def learned(tokenizer, change=lambda one: None, **options):
    """The mask after two passes over a model that was changed first."""
    one = model()
    change(one)
    mft = MFT(one, MaskConfig(layers=[2, 3]))
    fit(mft, tokenizer, ROWS, TWICE, progress=False, **options)
    return mft.bitmask()


@pytest.fixture
def calls(monkeypatch):
    """How often activations were kept."""
    found = []

    def counted(*given, **options):
        found.append(None)
        kept = keep_activations(*given, **options)
        found[-1] = kept
        return kept

    monkeypatch.setattr(training, "keep_activations", counted)
    return found


def test_it_is_kept_by_itself_and_learns_the_same(tokenizer, calls):
    mask = learned(tokenizer)
    assert len(calls) == 1 and not calls[0].path.exists()  # nothing is left on the disk
    assert (mask ^ learned(tokenizer, kept=False)).kept <= 2 and len(calls) == 1


class Noise(nn.Module):
    """A layer norm that adds noise in training, as NEFTune does to embeddings."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        hidden = self.norm(hidden)
        return hidden + 0.5 * torch.randn_like(hidden) if self.training else hidden


class BatchNorm(nn.Module):
    """Normalizes over the rows, in place of a layer norm."""

    def __init__(self, norm):
        super().__init__()
        self.norm = nn.BatchNorm1d(32)

    def forward(self, hidden):
        return self.norm(hidden.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("kind", [Noise, BatchNorm])
def test_what_differs_in_training_is_not_kept(kind, tokenizer, calls):
    def change(one):
        one.bert.embeddings.LayerNorm = kind(one.bert.embeddings.LayerNorm)

    usual = learned(tokenizer, change, kept=False)
    assert learned(tokenizer, change) == usual and calls == [None]  # tried, and refused
    with pytest.raises(ValueError, match="computes something else in training"):
        learned(tokenizer, change, kept=True)


class Copies(TrainerCallback):
    """Copies the model on the way, as an average of weights does, and changes what lies below."""

    def on_step_end(self, *_, model, **__):
        copy.deepcopy(model)
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.mul_(1.5)


def test_with_callbacks_nothing_is_kept(tokenizer, calls):
    options = {"callbacks": (Copies(),)}
    assert learned(tokenizer, **options) == learned(tokenizer, kept=False, **options)
    assert calls == []


def test_a_training_goes_on_whether_or_not_it_is_kept(tokenizer, tmp_path, monkeypatch):
    whole, folder = learned(tokenizer), {"folder": tmp_path / "run", "save_every": 2}
    stopped = {"measure": Stop(), "eval_every": 1}
    with pytest.raises(KeyboardInterrupt):
        learned(tokenizer, **folder, **stopped)
    monkeypatch.setattr(training, "_MOST_KEPT", 1000)  # now it is too large
    assert (learned(tokenizer, **folder, eval_every=1) ^ whole).kept <= 2


class Stop:
    """Stops at the fifth measurement."""

    calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls == 5:
            raise KeyboardInterrupt
        return {}


WRONG = [
    ({"kept": "no"}, "kept is 'no'; allowed are True, False"),
    ({"eval_every": -1}, "eval_every is -1"),
    ({"save_every": 1}, "save_every is 1, but folder is None"),
    ({"callbacks": (print,)}, "allowed is a tuple of TrainerCallback objects"),
    ({"callbacks": TrainerCallback()}, "allowed is a tuple of TrainerCallback objects"),
    ({"measure": "x"}, "measure is 'x'; allowed is a function"),
    ({"activations": True}, "activations is a bool"),
    ({"context": {"a": object()}}, "allowed is a dict of plain values"),
    ({"folder": __file__}, "which is a file; allowed is a new or empty folder"),
]


@pytest.mark.parametrize("options, said", WRONG, ids=[" ".join(one) for one, _ in WRONG])
def test_options_that_mean_nothing_are_refused(options, said, tokenizer):
    with pytest.raises((ValueError, TypeError), match=said):
        learned(tokenizer, **options)


def test_gradients_that_are_off_and_a_second_training_are_refused(tokenizer):
    with torch.no_grad(), pytest.raises(RuntimeError, match="Gradients are off"):
        learned(tokenizer)
    said = []

    def second():
        with pytest.raises(RuntimeError, match="Another thread of this process is training"):
            learned(tokenizer)
        said.append(True)

    class Second(TrainerCallback):
        def on_train_begin(self, *_, **__):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    learned(tokenizer, callbacks=(Second(),))
    assert said == [True]
