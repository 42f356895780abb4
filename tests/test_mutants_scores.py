"""Holes that the mutants of selection, scores and sharded showed (seed 1)."""

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from mft_nb.mask import MFT
from mft_nb.scopes import find_scope, n_of_m_mask, neuron_units
from mft_nb.scores import MaskedWeight, ScoreGroup, initial_scores
from mft_nb.targets import WeightInfo
from tests.strangers import Stack, config
from tests.test_mutants import drawn


@pytest.mark.parametrize("size", [2, 4])
def test_one_of_some_neighbours_may_stay(size):
    scope = find_scope(f"1:{size}", 1 / size)
    mask = scope.select([drawn(3, 8)], 0, [WeightInfo("w", (3, 8))]).mask(drawn(3, 8))
    assert (mask.view(3, -1, size).sum(-1) == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_scores_is_not_rounded_to_the_dtype_of_the_weight(dtype):
    masked = MaskedWeight(drawn(4, 8), ScoreGroup())
    weight, gradient = drawn(4, 8, seed=1).to(dtype), drawn(4, 8, seed=2).to(dtype)
    masked(weight).backward(gradient)
    assert torch.equal(masked.scores.grad, gradient.float() * weight.float())


def test_a_masked_weight_that_is_told_nothing_is_a_linear_one():
    info = WeightInfo("w", (4, 6), input_dim=0)
    for scores, units in ((drawn(4, 6), None), (drawn(1, 6), neuron_units(info))):
        assert MaskedWeight(scores, ScoreGroup(), units=units).info == WeightInfo("weight", (4, 6))


def test_scores_by_magnitude_of_a_weight_that_is_mostly_zero():
    weight = torch.zeros(3, 4)
    weight[1] = torch.tensor([1.0, -2, 3, -4])
    scores = initial_scores(weight, "magnitude", 0.5, torch.Generator())
    assert torch.equal(scores, 0.5 * weight.abs())
    units = neuron_units(WeightInfo("w", (3, 4)))
    scores = initial_scores(weight, "magnitude", 0.5, torch.Generator(), units)
    assert scores.tolist() == [[0], [1.25], [0]]  # half the mean


def test_a_weight_on_another_device_than_its_scores_is_masked_there():
    masked, weight = MaskedWeight(drawn(4, 8), ScoreGroup()), torch.empty(4, 8, device="meta")
    assert masked(weight).is_meta


@pytest.fixture
def mesh(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_weight_that_is_read_outside_of_a_pass_is_masked(mesh):
    model = MFT(Stack(), config()).model
    masked = [layer.weight.detach().clone() for layer in model.layers]
    fully_shard(model, mesh=mesh)
    for layer, weight in zip(model.layers, masked, strict=True):
        assert torch.equal(layer.weight.full_tensor(), weight)


def test_of_masks_that_were_given_the_first_is_meant():
    scores, weight = drawn(3, 8), drawn(3, 8, seed=1)
    winners = find_scope("2:4").select([scores], 0, [WeightInfo("w", (3, 8))])
    right = torch.where(n_of_m_mask(scores, 2, 4), weight, 0)
    assert torch.equal(winners.masked(weight, scores), right)
