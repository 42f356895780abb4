"""A training that goes on from a mask file begins with that very mask, and keeps as much."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from mft_nb.bitmask import BitMask
from mft_nb.config import MaskConfig
from mft_nb.mask import MFT
from tests.models import CONFIG, copied_state, same_state, tiny_bert, train_steps
from tests.strangers import Stack

CASES = [("tensor", 0.8, "signed"), ("tensor", 0.8, "absolute"), ("layer", 0.8, "signed")]
CASES += [("global", 0.8, "absolute"), ("neuron", 0.75, "signed"), ("head", 0.5, "absolute")]
CASES += [("ffn", 0.5, "signed"), ("unit", 0.5, "absolute"), ("2:4", 0.5, "signed")]
CASES += [("2:4", 0.5, "absolute")]


def counts(mft):
    """How many scores each group keeps."""
    groups = {id(one.group): one.group for one in mft._masked.values()}
    return [sum(int(mask.sum()) for mask in group.masks()) for group in groups.values()]


@pytest.mark.parametrize("scope, keep, ranking", CASES)
def test_the_first_mask_is_that_of_the_file_and_the_count_stays(scope, keep, ranking, tmp_path):
    config = replace(CONFIG, scope=scope, keep=keep, ranking=ranking)
    config = replace(config, init={"signed": "magnitude", "absolute": "normal"}[ranking])
    first = MFT(tiny_bert(), config)
    train_steps(first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matrices and neurons that are pruned whole
        first.save_pretrained(tmp_path)
        mft = MFT.from_pretrained(tiny_bert(), tmp_path, trainable=True)
    mask = first.bitmask()
    assert mft.bitmask() == mask and mft.config == config
    assert not torch.equal(mft.scores[0], first.scores[0])  # these are lost
    kept = counts(mft)
    assert kept == counts(first)
    train_steps(mft, optimizer=torch.optim.AdamW(mft.trainable, lr=0.5))
    assert counts(mft) == kept
    assert scope == "head" or mft.bitmask() != mask  # of four heads the same two may stay
    assert same_state(mft.unload(), copied_state(tiny_bert()))


def test_what_was_trained_with_the_mask_is_trained_further(tmp_path):
    config = MaskConfig(layers="all", keep=0.5, schedule=((0, 1.0), (2, 0.5)))
    config = replace(config, modules_to_save=("1",))

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval()

    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))

    def step(mft):
        optimizer = torch.optim.SGD(mft.trainable, lr=0.1)
        mft.model.train()(rows).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    mft = MFT(model(), config)
    mft.model[2].bias.requires_grad_()  # by hand
    step(mft)
    with pytest.warns(UserWarning, match="training has not come that far"):
        mft.save_pretrained(tmp_path / "early")
    with pytest.raises(ValueError, match="a schedule must have come to its end"):
        MFT.from_pretrained(model(), tmp_path / "early", trainable=True)
    for _ in range(3):
        step(mft)
    mft.save_pretrained(tmp_path / "done")
    further = MFT.from_pretrained(model(), tmp_path / "done", trainable=True)
    assert further.bitmask() == mft.bitmask() and further.config.schedule == ()
    assert torch.equal(further.model.eval()(rows), mft.model.eval()(rows))
    asked = [name for name, one in further.model.named_parameters() if one.requires_grad]
    assert {"1.weight", "1.bias", "2.bias"} < set(asked) and len(further.trainable) == 2 + 3
    bias = further.model[2].bias.detach().clone()
    step(further)
    assert not torch.equal(further.model[2].bias, bias)
    assert same_state(further.unload(), copied_state(model()))


def test_a_mask_that_its_config_would_not_choose_is_not_trained_further(tmp_path):
    model = Stack()
    untouched = copied_state(model)
    name = next(iter(MFT(Stack(), MaskConfig(layers="all")).bitmask()))
    mask = BitMask({name: torch.rand(model.get_parameter(name).shape) < 0.9})
    MFT(Stack(), MaskConfig(layers="all"), mask).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="choose different weights"):
        MFT.from_pretrained(model, tmp_path, trainable=True)
    with pytest.raises(ValueError, match="mask and start are both given"):
        MFT(model, None, mask, mask)
    assert same_state(model, untouched)
