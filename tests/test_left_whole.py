"""What a mask leaves as it was: other parametrizations, earlier files, the base after a fault."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import (
    FalconConfig,
    FalconForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from mft_nb.bitmask import BitMask, save_mask, weights_sha256
from mft_nb.mask import MFT, MaskConfig, plain_state_dict
from mft_nb.model import dropout_rates
from tests.test_engine import batch, tiny_bert

ALL = MaskConfig(layers="all", keep=0.5)


def small(bias=True):
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=bias), nn.Tanh(), nn.Linear(8, 2, bias=bias))


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_other_parametrizations_are_in_the_plain_state(norm):
    model = nn.Sequential(small(), norm(nn.Conv1d(2, 2, 1)))
    before = {name for name in model.state_dict()}
    MFT(model, ALL)
    assert set(plain_state_dict(model)) == before


def test_a_masked_model_with_weight_norm_is_saved_whole(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolution = {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (2,)}
    groups = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(
        intermediate_size=24, classifier_proj_size=8, **sizes, **convolution, **groups
    )
    model = Wav2Vec2ForSequenceClassification(config).eval()
    MFT(model, ALL)
    sound = torch.randn(1, 64)
    expected = model(sound).logits
    model.save_pretrained(tmp_path)
    loaded = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(sound).logits, expected)


@pytest.mark.parametrize("name", ["0.bias", "1.in_proj_weight"])
def test_a_saved_mask_of_what_is_no_linear_weight_is_refused(name, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights = {key: model.get_parameter(key) for key in ("0.weight", name)}
    mask = BitMask({key: torch.rand(weight.shape) > 0.5 for key, weight in weights.items()})
    path = save_mask(mask, tmp_path / "mask.safetensors", weights_sha256(weights), ALL.to_dict())
    with pytest.raises(ValueError, match="no weight of a linear module.*AppliedMask"):
        MFT.from_pretrained(model, path)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_fault_while_a_mask_is_put_on_leaves_the_model_plain(monkeypatch):
    model, real = small(), parametrize.register_parametrization
    names = list(model.state_dict())

    def faulty(module, *arguments, **options):
        if module is model[2]:
            raise RuntimeError("no memory")
        return real(module, *arguments, **options)

    monkeypatch.setattr(parametrize, "register_parametrization", faulty)
    with pytest.raises(RuntimeError, match="no memory"):
        MFT(model, ALL)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.undo()
    MFT(model, ALL)


class OwnConv1D(Conv1D):
    """GPT-2's layer under another name."""


def own_conv():
    """One such layer, 8 inputs and 4 outputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(OwnConv1D(4, 8), nn.Tanh()), nn.Sequential(OwnConv1D(4, 4)))


def test_units_and_groups_of_a_subclass_of_conv1d():
    mask = MFT(own_conv(), MaskConfig(layers="all", keep=0.5, scope="neuron")).bitmask()[
        "0.0.weight"
    ]
    assert (mask.all(0) | ~mask.any(0)).all() and (~mask).any()  # whole outputs, which are columns
    mask = MFT(own_conv(), MaskConfig(layers="all", keep=0.5, scope="2:4")).bitmask()["0.0.weight"]
    assert (mask.reshape(2, 4, 4).sum(1) == 2).all()  # groups along the inputs, which are rows


@pytest.mark.parametrize(("cut", "warned"), [("outputs", True), ("inputs", False)])
def test_the_warning_of_dead_neurons_looks_along_the_outputs_of_gpt2(cut, warned):
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    mft = MFT(model, MaskConfig(layers=[1], keep=0.875, target_modules=["attn.c_attn"]))
    with torch.no_grad():
        scores = mft.scores[0].fill_(1.0)
        (scores[:, :6] if cut == "outputs" else scores[:2]).fill_(-1.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mft.merge_and_unload()
    assert any("neurons" in str(one.message) for one in told) == warned


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path):
    base = tiny_bert()
    mft = MFT(tiny_bert(), MaskConfig(layers="all", modules_to_save=["classifier"]))
    mft.save_pretrained(tmp_path)
    expected = mft.model(**batch()).logits
    with torch.no_grad():
        mft.model.classifier.weight.add_(1)
        mft.scores[0].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(base, tmp_path)
    assert torch.equal(loaded.model(**batch()).logits, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"mask.safetensors", "modules.safetensors"}


def test_a_tied_module_is_not_trained_along_alone():
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    with pytest.raises(ValueError, match="'lm_head.weight', which is one tensor with 'transformer"):
        MFT(GPT2LMHeadModel(GPT2Config(**sizes)), MaskConfig(modules_to_save=["lm_head"]))
    mft = MFT(GPT2LMHeadModel(GPT2Config(**sizes)), MaskConfig(modules_to_save=["lm_head", "wte"]))
    assert len(mft.trainable) == len(mft.scores) + 1  # both names are one tensor


def test_after_merging_there_is_no_state_and_no_base():
    mft = MFT(small(), ALL)
    mft.merge_and_unload()
    for ask in (mft.state_dict, mft.base_weights, lambda: mft.load_state_dict({})):
        with pytest.raises(ValueError, match="was taken off its model"):
            ask()


def test_dropout_that_is_read_from_the_config_is_silenced_and_comes_back():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = FalconConfig(hidden_dropout=0.5, attention_dropout=0.0, pad_token_id=0, **sizes)
    model = FalconForSequenceClassification(config).train()
    inputs = batch()["input_ids"] % 50
    assert any(dropout_rates(module) for module in model.modules())
    mft = MFT(model, MaskConfig(layers="all"))
    assert torch.equal(model(inputs).logits, model(inputs).logits)
    assert model.config.hidden_dropout == 0.5  # what is saved
    mft.unload()
    assert not torch.equal(model(inputs).logits, model(inputs).logits)


def test_a_model_that_grew_is_given_back():
    model = small()
    mft = MFT(model, MaskConfig(layers="all", keep=0.5, l1=0.1))
    model.append(nn.Linear(2, 2))
    mft.unload()
    assert not model._forward_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_folder_called_like_a_checkpoint_gets_the_whole_model(tmp_path):
    mft = MFT(tiny_bert(), MaskConfig(layers="all"))
    mft.model.save_pretrained(tmp_path / "checkpoint-1")
    loaded = type(tiny_bert()).from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(loaded(**batch()).logits, mft.model(**batch()).logits)


def test_a_weight_without_elements_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    with pytest.raises(ValueError, match="The weight '1.weight' has no elements"):
        MFT(model, MaskConfig(layers="all"))
