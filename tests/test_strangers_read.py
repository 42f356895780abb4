"""What a strict reader of the engine found: layers of a model, and what a choice may be."""

import re

import pytest
import torch
from torch import nn

from mft_nb.bitmask import BitMask, magnitude_mask, random_mask
from mft_nb.carriers import choose_weights
from mft_nb.mask import MFT, MaskConfig
from mft_nb.scopes import find_scope
from mft_nb.targets import (
    describe_weights,
    find_layers,
    layer_names,
    maskable_weights,
    unreached_weights,
    warn_unreached,
)
from tests.strangers import Stack, bert


def block():
    """Two linears, as in a layer; the second has the larger weights."""
    found = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    found[2].weight.data += 10
    return found


class Inside(nn.Module):
    """A model of blocks behind a number that is no layer."""

    def __init__(self):
        super().__init__()
        inner = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(3))})
        self.model = nn.Sequential(inner, nn.Linear(4, 2))


class Towers(nn.Module):
    """A stack of layers that hold lists called layers, and nothing else."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(Inside().model[0] for _ in "ab")


def pruned_by(key, mask):
    """How many weights a mask prunes, by a key of their names."""
    found = {}
    for name, one in mask.items():
        found[key(name)] = found.get(key(name), 0) + int((~one).sum())
    return found


MODELS = {
    "blocks": (lambda: nn.Sequential(block(), block(), block()), "middle", r"(\d)\."),
    "inside": (Inside, "all", r"layers\.(\d)\."),
    "towers": (Towers, [1], r"towers\.(\d)\."),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_scope_layer_takes_the_layers_of_the_model(kind):
    build, layers, number = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    weights = maskable_weights(model, layers)
    infos = describe_weights(model, weights)
    expected = {name: int(re.search(number, name)[1]) for name in weights}
    assert set(expected.values()) <= set(sum(find_layers(model).values(), ()))
    by_name = magnitude_mask(weights, 0.5, "layer", infos)
    mft = MFT(model, MaskConfig(layers=layers, scope="layer", keep=0.5))
    with torch.no_grad():
        for name, scores in zip(mft.base_weights(), mft.scores, strict=True):
            scores += 10 * name.endswith("2.weight")
    for mask in (by_name, mft.bitmask()):
        counts = pruned_by(expected.get, mask)
        half = len(weights) * 8 // len(counts)
        assert set(counts.values()) == {half}, "half of each layer"
        assert pruned_by(str, mask) != dict.fromkeys(weights, 8), "its matrices compete"
        assert mask.density_by_layer(model) == dict.fromkeys(sorted(counts), 0.5)


@pytest.mark.parametrize(
    "names, layers",
    [
        (["1.0.weight", "1.2.weight"], ["1", "1"]),
        (["1.net.0.weight", "1.net.2.weight"], ["1", "1"]),
        (["model.0.layers.4.x", "model.0.layers.5.x"], ["model.0.layers.4", "model.0.layers.5"]),
        (["0.0.encoder.layer.3.x"], ["0.0.encoder.layer.3"]),
        (["h.3.experts.0.w", "h.3.experts.1.w"], ["h.3", "h.3"]),
        (["encoder.block.3.layer.0.q"], ["encoder.block.3"]),
        (["0.encoder.block.3.layer.0.q"], ["0.encoder.block.3"]),
        (["0.encoder.layers.encoder_layer_4.mlp.0.x"], ["0.encoder.layers.encoder_layer_4"]),
        (["0.weight", "2.weight", "head.weight"], ["0", "2", None]),
        (["0.h.1.weight", "1.h.1.weight"], ["0", "1"]),
    ],
)
def test_where_names_alone_are_known_the_layer_is_the_likely_one(names, layers):
    assert list(layer_names(names).values()) == layers


def test_a_weight_outside_of_all_layers_competes_alone():
    model = bert()
    model.classifier = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 2))
    weights = maskable_weights(model, "all", ["layer", "classifier"], ())
    infos = describe_weights(model, weights)
    mask = random_mask(weights, 0.5, 0, "layer", infos)
    assert mask.density_by_tensor()["classifier.0.weight"] == 0.5
    assert mask.density_by_layer(model) == {0: 0.5, 1: 0.5, 2: 0.5, None: 0.5}


@pytest.mark.parametrize("scope", ["1:3", "2:3", "1:7", "6:7"])
def test_the_fraction_that_a_scope_advises_is_taken(scope):
    with pytest.raises(ValueError, match="Give keep=") as refusal:
        find_scope(scope, 0.9)
    keep = float(re.search(r"Give keep=([\d.]*\d)", str(refusal.value))[1])
    width = int(scope[2:])
    config = MaskConfig(layers="all", scope=scope, keep=keep)
    mask = MFT(Stack(2 * width), config).bitmask()
    assert mask.density == int(scope[0]) / width
    with pytest.raises(ValueError, match="Give keep="):
        find_scope(scope, keep + 1e-4)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("wrong", ["query", None, 5, 0.5])
def test_patterns_are_a_list_wherever_they_are_given(field, wrong):
    with pytest.raises(TypeError, match=f"{field} is {wrong!r}; give a list of regular expr"):
        maskable_weights(bert(), **{field: wrong})
    with pytest.raises(TypeError, match=f"{field} is {wrong!r}; give a list of regular expr"):
        MaskConfig(**{field: wrong})


@pytest.mark.parametrize("function", [unreached_weights, warn_unreached])
def test_what_is_left_whole_is_asked_for_with_lists(function):
    model = bert()
    weights = maskable_weights(model)
    with pytest.raises(TypeError, match="exclude_modules is 'query'; give a list"):
        function(model, weights, exclude_modules="query")
    with pytest.raises(TypeError, match="layers is 1; allowed are"):
        function(model, weights, layers=1)


LAYERS = {
    "midle": ValueError,
    "": ValueError,
    (): ValueError,
    (1.5,): TypeError,
    (True,): TypeError,
    ("4",): TypeError,
    (-1,): ValueError,
    4.5: TypeError,
    4: TypeError,
    None: TypeError,
    True: TypeError,
}


@pytest.mark.parametrize("wrong, error", LAYERS.items(), ids=map(repr, LAYERS))
def test_layers_are_refused_when_they_are_set(wrong, error):
    with pytest.raises(error, match="^layers (is|holds) .*; allowed are .*such as"):
        MaskConfig(layers=wrong)
    with pytest.raises(error, match="^layers (is|holds) "):
        maskable_weights(bert(), layers=wrong)


def test_layers_that_are_right_are_taken():
    for layers in ("all", "middle", [0], range(2), {1, 2}, (n for n in (0, 2))):
        MaskConfig(layers=layers)
    assert MaskConfig(layers=range(2)).layers == (0, 1)


@pytest.mark.parametrize("layers", ["all", [1]])
def test_a_scope_with_matrices_of_its_own_is_named_where_there_are_none(layers):
    config = MaskConfig(layers=layers, scope="head", keep=0.5)
    with pytest.raises(ValueError, match=r"^scope is 'head'.*layers.\d.weight") as refusal:
        choose_weights(Stack(), config)
    assert "target_modules has" not in str(refusal.value) and "c_proj" not in str(refusal.value)
    assert "target_modules" in str(refusal.value), "the next step"


def test_heads_that_are_left_whole_name_the_scope_too():
    output = r"attention\.output"
    config = MaskConfig(layers="all", scope="head", keep=0.5, exclude_modules=[output])
    with pytest.raises(ValueError, match="^scope is 'head'"):
        choose_weights(bert(), config)


def test_a_mask_without_its_model_is_read_by_its_names():
    kept = torch.ones(2, 2, dtype=torch.bool)
    mask = BitMask({"1.0.weight": kept, "1.2.weight": ~kept})
    assert mask.density_by_layer() == {1: 0.5}
