"""What strangers put over a mask or under it: right, or refused by name."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from mft_nb.applied import AppliedMask
from mft_nb.bitmask import random_mask
from mft_nb.mask import MFT
from mft_nb.targets import maskable_weights
from tests.strangers import (
    Stack,
    batch,
    bert,
    by_hand,
    config,
    logits,
    of_scores,
    same,
    state,
    steps,
    uses,
)


@pytest.fixture
def saved(tmp_path):
    """A folder with a mask of the classifier."""
    MFT(bert(), config()).save_pretrained(tmp_path / "mask")
    return tmp_path / "mask"


LORA = LoraConfig(target_modules=["query"], init_lora_weights=False)


def test_a_merged_lora_is_a_plain_base():
    torch.manual_seed(1)
    adapted = get_peft_model(bert(), LORA)
    with pytest.raises(ValueError, match="wrapped by an adapter .*merge_and_unload"):
        MFT(adapted, config())
    plain = adapted.merge_and_unload()
    twin = copy.deepcopy(plain)
    mft = MFT(plain, config())
    assert torch.equal(logits(plain), logits(by_hand(twin, of_scores(mft))))
    assert same(state(mft.unload()), state(twin))


def test_a_lora_on_the_whole_of_a_masked_part_is_refused():
    model = bert()
    mft = MFT(model.bert.encoder, config())
    adapted = get_peft_model(model, LORA)
    for ask in (lambda: model(**batch()), mft.bitmask, mft.unload, mft.state_dict):
        with pytest.raises(RuntimeError, match="'layer.0.attention.self.query' was wrapped"):
            ask()
    adapted.unload()
    assert torch.equal(logits(model), logits(by_hand(bert(), whole_names(mft))))


def whole_names(mft):
    """The mask of a classifier's encoder by the classifier's names."""
    return {f"bert.encoder.{name}": kept for name, kept in of_scores(mft).items()}


def test_a_mask_on_a_part_of_a_model(tmp_path):
    model = bert()
    mft = MFT(model.bert.encoder, config())
    steps(mft, model=model)
    mask = whole_names(mft)
    right = logits(by_hand(bert(), mask))
    model.eval()
    assert not torch.equal(right, logits(bert()))
    with torch.no_grad():  # the rest is the caller's own and was trained
        model.load_state_dict(bert().state_dict() | mask_scores(model), strict=False)
    assert torch.equal(logits(model), right)
    with pytest.raises(ValueError, match="already carries a mask"):
        MFT(model, config())
    with pytest.raises(RuntimeError, match="cannot be pickled.*merge_and_unload"):
        torch.save(model, tmp_path / "model.pt")
    mft.unload()
    assert same(state(model), state(bert()))


def test_masks_on_two_parts_of_a_model():
    model = bert()
    first = MFT(model.bert.encoder.layer[0], config())
    second = MFT(model.bert.encoder.layer[2], config(keep=0.5))
    mask = {f"bert.encoder.layer.0.{name}": kept for name, kept in of_scores(first).items()}
    mask |= {f"bert.encoder.layer.2.{name}": kept for name, kept in of_scores(second, 0.5).items()}
    assert torch.equal(logits(model), logits(by_hand(bert(), mask)))
    for mft in (first, second):
        mft.unload()
    assert same(state(model), state(bert()))


def mask_scores(model):
    """What the masked layers of a model hold, to put beside the state of a plain one."""
    names = [name for name in model.state_dict() if "encoder.layer" in name]
    return {name: model.state_dict()[name] for name in names}


def test_a_model_compiled_in_place_before_the_mask():
    model, inputs = Stack(), torch.ones(2, 8)
    model.compile(backend="eager")
    right = model(inputs)
    mft = MFT(model, config())
    for _ in range(2):
        masked = by_hand(Stack(), of_scores(mft))
        assert torch.allclose(model(inputs), masked(inputs), atol=1e-6)
        mft.scores[0].data.neg_()
    assert torch.allclose(mft.unload()(inputs), right, atol=1e-6)
    with pytest.raises(ValueError, match="OptimizedModule.*_orig_mod"):
        MFT(torch.compile(Stack(), backend="eager"), config())


def replace_linear(model):
    model.bert.encoder.layer[0].intermediate.dense = nn.Linear(16, 24)


def drop_layer(model):
    model.bert.encoder.layer = model.bert.encoder.layer[1:]


def norm_weight(model):
    parametrizations.weight_norm(model.bert.encoder.layer[1].output.dense)


def norm_spectrum(model):
    parametrizations.spectral_norm(model.bert.encoder.layer[1].output.dense)


def merge_lora(model):
    get_peft_model(model, LORA).merge_and_unload()


def wrap_lora(model):
    get_peft_model(model, LORA)


CHANGES = [replace_linear, drop_layer, norm_weight, norm_spectrum]


@pytest.mark.parametrize("change", CHANGES)
def test_scores_that_lost_their_layer_say_so(change, tmp_path):
    mft = MFT(bert(), config())
    change(mft.model)
    for ask in (*uses(mft, tmp_path / "mask"), mft.state_dict):
        with pytest.raises(RuntimeError, match="The masked layer 'bert.encoder.layer.* changed"):
            ask()
    assert any(parametrize.is_parametrized(m) for m in mft.model.modules())
    assert not (tmp_path / "mask").exists()


@pytest.mark.parametrize("change", [replace_linear, drop_layer, norm_weight])
def test_a_loaded_mask_that_lost_its_layer_says_so(change, saved, tmp_path):
    mft = MFT.from_pretrained(bert(), saved)
    change(mft.model)
    for ask in (
        mft.bitmask,
        mft.unload,
        mft.merge_and_unload,
        lambda: mft.save_pretrained(tmp_path / "again"),
    ):
        with pytest.raises(RuntimeError, match="'bert.encoder.layer"):
            ask()


@pytest.mark.parametrize("change", [norm_spectrum, wrap_lora, merge_lora])
def test_a_loaded_mask_says_what_unload_does_not_do(change, saved):
    mft = MFT.from_pretrained(bert(), saved)
    change(mft.model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            mft.unload()
            told = " ".join(str(one.message) for one in said)
        except (RuntimeError, ValueError) as error:
            told = str(error)
    changed = "layer.1.output.dense" if change is norm_spectrum else "layer.0.attention.self.query"
    assert changed in told


def test_a_lora_on_a_loaded_mask_adds_to_the_masked_weights(saved):
    mft = MFT.from_pretrained(bert(), saved)
    mask = mft.bitmask()
    plain = by_hand(bert(), mask)
    torch.manual_seed(1)
    adapted = get_peft_model(mft.model, LORA)
    torch.manual_seed(1)
    right = get_peft_model(plain, LORA).eval()
    assert torch.equal(logits(adapted.eval()), logits(right)) and mft.bitmask() == mask
    adapted.unload()
    assert same(state(mft.unload()), state(bert()))


def test_a_loaded_mask_that_was_trained_over_says_so(saved, tmp_path):
    mft = MFT.from_pretrained(bert(), saved)
    mft.model.requires_grad_(True)
    steps(mft, 1, rate=0.1)
    for ask in (
        mft.bitmask,
        mft.merge_and_unload,
        lambda: mft.save_pretrained(tmp_path / "again"),
    ):
        with pytest.raises(RuntimeError, match="'bert.encoder.layer.*zero"):
            ask()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_base_that_changed_under_the_mask_is_named(loaded, saved):
    mft = MFT.from_pretrained(bert(), saved) if loaded else MFT(bert(), config())
    name = "bert.encoder.layer.1.output.dense.weight"
    weight = mft.model.get_parameter(name) if loaded else mft.base_weights()[name]
    weight.data.mul_(0.5)  # leaves zeros where they are
    with pytest.warns(UserWarning, match=name.replace(".", r"\.") + ".* changed"):
        mft.unload()


@pytest.mark.parametrize("norm", [norm_weight, norm_spectrum])
def test_a_chosen_weight_that_is_computed_is_refused(norm):
    model = bert()
    norm(model)
    before = state(model)
    with pytest.raises(ValueError, match="layer.1.output.dense.weight.*computed from other"):
        MFT(model, config())
    assert same(state(model), before)
    mft = MFT(model, config(layers=[0, 2]))  # elsewhere it does no harm
    assert len(mft.scores) == 12


def test_resized_embeddings_are_named():
    mft = MFT(bert(), config())
    mft.model.resize_token_embeddings(60, mean_resizing=False)
    assert torch.equal(logits(mft.model), logits(by_hand(bert(), of_scores(mft))))
    with pytest.warns(UserWarning, match="word_embeddings.weight changed"):
        model = mft.unload()
    assert torch.equal(logits(model), logits(bert()))


def test_resized_embeddings_that_are_trained_along_stop_unload():
    mft = MFT(bert(), config(modules_to_save=("word_embeddings",)))
    mft.model.resize_token_embeddings(60, mean_resizing=False)
    before, given = state(mft.model), logits(mft.model)
    with pytest.raises(ValueError, match=r"\(50, 16\).*\(60, 16\) now"):
        mft.unload()
    assert same(state(mft.model), before) and torch.equal(logits(mft.model), given)
    assert torch.equal(logits(mft.merge_and_unload()), given)


class Tied(Stack):
    """Layers 0 and 2 share a weight."""

    def __init__(self):
        super().__init__()
        self.layers[2].weight = self.layers[0].weight


def test_a_tied_weight_is_left_whole_and_named():
    with pytest.warns(UserWarning, match="left whole") as said:
        mft = MFT(Tied(), config())
    assert len(said) == 1 and list(mft.bitmask()) == ["layers.1.weight"]
    with pytest.raises(ValueError, match="one tensor with 'layers.2.weight'"):
        MFT(Tied(), config(target_modules=(r"layers\.0",)))


class Shared(Stack):
    """Layer 2 is layer 0 again."""

    def __init__(self):
        super().__init__()
        self.layers[2] = self.layers[0]


def test_a_layer_that_is_used_twice_is_left_whole_and_named():
    with pytest.warns(UserWarning, match="layers.0.weight.*two places share"):
        mft = MFT(Shared(), config())
    inputs = torch.ones(1, 8)
    assert torch.equal(mft.model(inputs), by_hand(Shared(), of_scores(mft))(inputs))


class Twice(nn.Module):
    def forward(self, values):
        return 2 * values


@pytest.mark.parametrize("before", [False, True])
def test_another_parametrization_of_the_same_layer(before):
    model, base, inputs = Stack(), Stack(), torch.ones(2, 8)
    base.layers[0].bias.data.mul_(2)
    if before:
        parametrize.register_parametrization(model.layers[0], "bias", Twice())
    mft = MFT(model, config())
    mask = of_scores(mft)
    if not before:
        parametrize.register_parametrization(model.layers[0], "bias", Twice())
    assert torch.equal(model(inputs), by_hand(base, mask)(inputs))
    assert torch.equal(mft.unload()(inputs), base(inputs))
    assert not any(parametrize.is_parametrized(layer, "weight") for layer in model.layers)
    assert parametrize.is_parametrized(model.layers[0], "bias")


def test_a_finished_mask_that_its_owner_writes_later():
    weights = maskable_weights(Stack(), layers="all")
    for put_on in (AppliedMask, lambda model, mask: MFT(model, config(), mask)):
        model, mask = Stack(), random_mask(weights, 0.5)
        right = by_hand(Stack(), mask)
        one = put_on(model, mask)
        for kept in mask.values():
            kept.logical_not_()
        assert same(state(model), state(right))
        (one.undo if isinstance(one, AppliedMask) else one.unload)()
        assert same(state(model), state(Stack()))


def test_a_checkpoint_loaded_over_a_mask(saved):
    other = bert()
    for parameter in other.parameters():
        parameter.data.add_(1)
    mft = MFT(bert(), config())
    before = state(mft.model)
    with pytest.raises(RuntimeError, match="not the weight that the mask was put on"):
        mft.model.load_state_dict(other.state_dict(), strict=False)
    assert mft.bitmask() == of_scores(mft)
    assert all(torch.equal(before[n], t) for n, t in state(mft.model).items() if "original" in n)
    loaded = MFT.from_pretrained(bert(), saved)
    loaded.model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="no longer zero where the mask prunes"):
        loaded.merge_and_unload()
    with pytest.warns(UserWarning, match="changed .*since the mask was put on"):
        loaded.unload()


def test_parameters_that_become_others_with_their_type(saved):
    """A setting of torch that makes new parameters in each conversion."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        mft, loaded = MFT(bert(), config()), MFT.from_pretrained(bert(), saved)
        mft.model.double()
        loaded.model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    mask = of_scores(mft)
    assert mft.bitmask() == mask and mft.scores[0].dtype == torch.float32
    assert torch.equal(logits(mft.model), logits(by_hand(bert().double(), mask)))
    with pytest.raises(RuntimeError, match="its weight is gone"):
        loaded.unload()
