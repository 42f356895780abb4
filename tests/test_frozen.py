"""On real weights: frozen means frozen, and every form of a masked model is the same model."""

import numpy as np
import pytest
import torch

from mft_nb.bitmask import AppliedMask
from mft_nb.data import load_snippets
from mft_nb.mask import MFT, MaskConfig
from mft_nb.model import load_classifier, maskable_weights
from mft_nb.train import predict


@pytest.fixture(scope="module")
def rows():
    return load_snippets()["train"].select(range(96))


@pytest.fixture(scope="module", params=["seed", "paper", "recommended", "global"])
def trained(request, rows):
    """A model after six steps of MFT: the MFT, its tokenizer, and its state before."""
    model, tokenizer = load_classifier("minilm", seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if request.param == "global":
        config = MaskConfig(scope="global", start="normal", keep=0.8, learning_rate=1e-2)
    else:
        config = MaskConfig.recipe(request.param)
    mft = MFT(model, config)
    first = mft.bitmask()
    mft.fit(tokenizer, rows, max_steps=6, progress=False)
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


def test_exactly_k_weights_are_cut(trained):
    mft, _, _ = trained
    sizes = [weight.numel() for weight in mft.base_weights().values()]
    share = round(1 - mft.config.keep, 10)
    each = sum(int(share * size + 0.5) for size in sizes)
    whole = int(share * sum(sizes) + 0.5)
    assert mft.bitmask().total - mft.bitmask().kept == (
        whole if mft.config.scope == "global" else each
    )


def test_evaluated_merged_and_reloaded_are_the_same_model(trained, rows, tmp_path):
    mft, tokenizer, before = trained
    evaluated, logits = effective(mft.model), predict(mft.model, tokenizer, rows)
    mft.save_pretrained(tmp_path)

    base, _ = load_classifier("minilm", seed=3)
    reloaded = MFT.from_pretrained(base, tmp_path)
    assert reloaded.bitmask() == mft.bitmask()
    by_hand, _ = load_classifier("minilm", seed=3)
    AppliedMask(by_hand, mft.bitmask())
    baked, _ = load_classifier("minilm", seed=3)
    merged = MFT.from_pretrained(baked, tmp_path).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    from_disk, _ = load_classifier(tmp_path / "merged")

    for other in (reloaded.model, by_hand, merged, from_disk):
        weights = effective(other)
        assert weights.keys() == evaluated.keys()
        assert all(torch.equal(weights[name], evaluated[name]) for name in evaluated)
        assert np.abs(predict(other, tokenizer, rows) - logits).max() <= 1e-5

    plain = load_classifier("minilm", seed=3)[0]
    assert list(merged.state_dict()) == list(plain.state_dict())
    undone = reloaded.unload().state_dict()
    assert all(torch.equal(undone[name], before[name]) for name in before)


def test_trained_mft_merges_in_place(rows):
    model, tokenizer = load_classifier("minilm", seed=3)
    names = list(maskable_weights(model))
    mft = MFT(model, MaskConfig.recommended())
    mft.fit(tokenizer, rows, max_steps=3, progress=False)
    evaluated, mask = effective(mft.model), mft.bitmask()
    merged = mft.merge_and_unload()
    assert merged is model
    assert all(torch.equal(effective(merged)[name], evaluated[name]) for name in names)
    assert all((merged.get_parameter(name)[~mask[name]] == 0).all() for name in names)
