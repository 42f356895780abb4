"""On a real model: any way from mask to mask gives the same bits as a fresh copy."""

import random

import pytest
import torch

from mft_nb.bitmask import (
    AppliedMask,
    BitMask,
    magnitude_mask,
    random_mask,
    save_mask,
    weights_sha256,
)
from mft_nb.mask import MFT, MaskConfig
from mft_nb.model import load_classifier, maskable_weights
from mft_nb.switch import MaskSwitch


@pytest.fixture(scope="module")
def model():
    return load_classifier("minilm", seed=3)[0]


@pytest.fixture(scope="module")
def base(model):
    return state(model)


@pytest.fixture(scope="module")
def masks(model):
    """Three masks over different layers: random, magnitude, and one with a matrix cut whole."""
    last = random_mask(maskable_weights(model, layers=[2, 5]), 0.5, seed=1)
    whole = dict(last)
    whole[next(iter(whole))] = torch.zeros_like(whole[next(iter(whole))])
    return {
        "random": random_mask(maskable_weights(model), 0.9, seed=0),
        "magnitude": magnitude_mask(maskable_weights(model), 0.8, scope="global"),
        "whole": BitMask(whole),
    }


@pytest.fixture
def switch(model, base, masks):
    """A switch with the three masks; afterwards the model is the base again."""
    one = MaskSwitch(model)
    for name, mask in masks.items():
        one.add(name, mask)
    yield one
    one.use(None)
    assert same_bits(state(model), base)


def state(model):
    """A copy of all that a model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(first, second):
    """Whether two states are equal bit for bit, so -0.0 is not 0.0."""
    return all(
        torch.equal(first[name].reshape(-1).view(torch.uint8), one.reshape(-1).view(torch.uint8))
        for name, one in second.items()
    )


def fresh(mask):
    """The state of a newly loaded model with a mask applied."""
    copy = load_classifier("minilm", seed=3)[0]
    AppliedMask(copy, mask)
    return state(copy)


@pytest.fixture(scope="module")
def expected(base, masks):
    """The state of a fresh copy with each mask, and without."""
    return {name: fresh(mask) for name, mask in masks.items()} | {None: base}


@pytest.mark.parametrize("threads", [1, 2])
def test_random_order_equals_fresh_copies(model, switch, masks, expected, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in random.Random(threads).choices([*masks, None], k=10):
            switch.use(name)
            assert switch.active == name
            assert same_bits(state(model), expected[name]), name
    finally:
        torch.set_num_threads(before)


def test_negative_zeros_and_nan_come_back():
    layer = torch.nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[-0.0, float("nan")], [float("-inf"), 1e-45]])
    bits = layer.weight.detach().view(torch.int32).clone()
    switch = MaskSwitch(layer)
    switch.add("none kept", BitMask({"weight": torch.zeros(2, 2, dtype=torch.bool)}))
    switch.use("none kept")
    assert not layer.weight.detach().view(torch.int32).any()
    switch.use(None)
    assert torch.equal(layer.weight.detach().view(torch.int32), bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    layer = torch.nn.Linear(30, 20).to(dtype)
    before = layer.weight.detach().clone()
    switch = MaskSwitch(layer)
    mask = random_mask({"weight": before}, 0.7)
    switch.add("one", mask)
    with switch.using("one"):
        assert torch.equal(layer.weight, before * mask["weight"])
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_using_restores_what_was_active(model, base, switch, error):
    for before in (None, "random"):
        switch.use(before)
        state_before = state(model)
        with pytest.raises(error), switch.using("magnitude"), switch.using("whole"):
            assert switch.active == "whole"
            raise error
        assert switch.active == before
        assert same_bits(state(model), state_before)
    with pytest.raises(ValueError, match="There is no mask 'unknown'"), switch.using("unknown"):
        pytest.fail("the block must not run")
    assert switch.active == "random"


def test_an_interrupted_switch_loses_nothing(model, base, switch, monkeypatch):
    switch.use("random")
    whole = MaskSwitch._switch
    calls = []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        whole(self, *arguments)

    monkeypatch.setattr(MaskSwitch, "_switch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        switch.use("magnitude")
    monkeypatch.undo()
    assert switch.active is None
    switch.use(None)
    assert same_bits(state(model), base)


def test_files_are_checked_against_the_base_even_under_another_mask(model, base, switch, tmp_path):
    weights = maskable_weights(model)
    mask = random_mask(weights, 0.9, seed=7)
    path = save_mask(mask, tmp_path / "mask.safetensors", weights_sha256(weights))
    other = save_mask(mask, tmp_path / "other.safetensors", "0" * 64)
    switch.use("random")
    switch.add("file", path)
    switch.add("folder", tmp_path)
    assert switch.active == "random"
    with pytest.raises(ValueError, match="other base weights"):
        switch.add("other", other)
    assert switch.active == "random" and "other" not in switch.names
    switch.use("file")
    assert same_bits(state(model), fresh(mask))
    switch.remove("folder")
    with pytest.raises(ValueError, match="is in force"):
        switch.remove("file")


def test_an_mft_on_the_model_is_refused(switch):
    model = load_classifier("minilm", seed=3)[0]
    later = MaskSwitch(model)
    later.add("one", random_mask(maskable_weights(model), 0.9))
    mft = MFT(model, MaskConfig())
    for refused in (lambda: MaskSwitch(model), lambda: later.use("one")):
        with pytest.raises(ValueError, match="carries a mask of an MFT"):
            refused()
    mft.unload()
    later.use("one")


def test_training_under_a_mask_keeps_what_the_mask_keeps():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    mask = random_mask({"weight": before}, 0.5)
    switch = MaskSwitch(layer)
    switch.add("one", mask)
    switch.use("one")
    layer(torch.ones(3, 6)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    trained = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="changed while the mask 'one' was in force: weight"):
        switch.use(None)
    kept = mask["weight"]
    assert torch.equal(layer.weight[kept], trained[kept])
    assert torch.equal(layer.weight[~kept], before[~kept])
    assert not torch.equal(trained[kept], before[kept])
