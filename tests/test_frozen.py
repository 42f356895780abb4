"""On real weights: frozen means frozen, and every form of a masked model is the same model."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from mft_nb.applied import AppliedMask
from mft_nb.mask import MFT, MaskConfig
from mft_nb.model import load_classifier
from mft_nb.study.datasets import load_snippets
from mft_nb.targets import maskable_weights
from mft_nb.train import TrainConfig, fit, predict
from tests.models import copied_state, same_state


@pytest.fixture(scope="module")
def rows():
    return load_snippets()["train"].select(range(48))


@pytest.fixture(scope="module")
def base():
    """A real model with a new head, to be copied, and its tokenizer."""
    return load_classifier("minilm", seed=3)


@pytest.fixture(scope="module", params=["bert_mft", "paper", "recommended", "global"])
def trained(request, base, rows):
    """A model after six steps of MFT: the MFT, its tokenizer, and its state before."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    before = copied_state(model)
    if request.param == "global":
        mask_config = MaskConfig(scope="global", init="normal", keep=0.8)
        config = TrainConfig(learning_rate=1e-2, max_steps=6, batch_size=4)
    else:
        mask_config = MaskConfig.recipe(request.param)
        config = replace(TrainConfig.recipe(request.param), max_steps=6, batch_size=4)
    mft = MFT(model, mask_config)
    first = mft.bitmask()
    fit(mft, tokenizer, rows, config, progress=False)
    assert mft.bitmask() != first, "the mask never moved, so this tests nothing"
    return mft, tokenizer, before


def effective(model):
    """The masked matrices as the model uses them, by plain name."""
    return {
        f"{name}.weight": module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def test_base_weights_are_bit_identical_after_training(trained):
    mft, _, before = trained
    for name, weight in mft.base_weights().items():
        assert torch.equal(weight, before[name])
    for name, parameter in mft.model.named_parameters():
        if "parametrizations" not in name:
            assert torch.equal(parameter, before[name]), name
            assert not parameter.requires_grad, name


def test_exactly_k_weights_are_pruned(trained):
    mft, _, _ = trained
    sizes = [weight.numel() for weight in mft.base_weights().values()]
    fraction = round(1 - mft.config.keep, 10)
    each = sum(int(fraction * size + 0.5) for size in sizes)
    whole = int(fraction * sum(sizes) + 0.5)
    assert mft.bitmask().total - mft.bitmask().kept == (
        whole if mft.config.scope == "global" else each
    )


def test_evaluated_merged_and_reloaded_are_the_same_model(trained, base, rows, tmp_path):
    mft, tokenizer, before = trained
    some = rows.select(range(16))
    evaluated, logits = effective(mft.model), predict(mft.model, tokenizer, some)
    mft.save_pretrained(tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a second load with the same seed has the same head
        reloaded = MFT.from_pretrained(load_classifier("minilm", seed=3)[0], tmp_path)
    assert reloaded.bitmask() == mft.bitmask()
    by_hand = copy.deepcopy(base[0])
    AppliedMask(by_hand, mft.bitmask())
    merged = MFT.from_pretrained(copy.deepcopy(base[0]), tmp_path).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    from_disk, _ = load_classifier(tmp_path / "merged", need_head=True)
    mft.save_model(tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()

    for other in (reloaded.model, by_hand, merged, from_disk, plain):
        weights = effective(other)
        assert weights.keys() == evaluated.keys()
        assert all(torch.equal(weights[name], evaluated[name]) for name in evaluated)
        assert np.abs(predict(other, tokenizer, some) - logits).max() <= 1e-5

    assert list(merged.state_dict()) == list(before)
    assert same_state(reloaded.unload(), before)


def test_trained_mft_merges_in_place(base, rows):
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    names = list(maskable_weights(model))
    mft = MFT(model, MaskConfig.recommended())
    config = replace(TrainConfig.recipe("recommended"), max_steps=3, batch_size=4)
    fit(mft, tokenizer, rows, config, progress=False)
    evaluated, mask = effective(mft.model), mft.bitmask()
    merged = mft.merge_and_unload()
    assert merged is model
    assert all(torch.equal(effective(merged)[name], evaluated[name]) for name in names)
    assert all((merged.get_parameter(name)[~mask[name]] == 0).all() for name in names)
