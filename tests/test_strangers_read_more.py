"""What a strict reader found: in memory, NaN, names, shapes and threads."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import mft_nb.applied
from mft_nb.applied import AppliedMask
from mft_nb.bitmask import BitMask, random_mask
from mft_nb.freeze import Frozen
from mft_nb.holders import holders_of
from mft_nb.mask import MFT
from mft_nb.switch import MaskSwitch
from tests.strangers import Stack, bert, config, same, state


class Attention(nn.Module):
    """Three linear layers whose weights are views of one flat parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.flat = nn.Parameter(torch.randn(3 * 64))
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        for layer, part in zip((self.q, self.k, self.v), self.flat.data.split(64), strict=True):
            layer.weight = nn.Parameter(part.view(8, 8))

    def forward(self, inputs):
        return self.v(self.k(self.q(inputs)))


@pytest.mark.parametrize("name", "qkv")
def test_a_view_anywhere_in_a_flat_parameter_is_refused(name):
    with pytest.raises(ValueError, match=rf"'(flat|{name}.weight)' and '(flat|{name}.weight)' lie"):
        MFT(Attention(), config(target_modules=[f"^{name}.weight"]))


def test_the_flat_parameter_is_found_behind_parameters_that_are_not_masked():
    model = Attention()
    model.whole = nn.Linear(8, 24, bias=False)
    model.whole.weight = nn.Parameter(model.flat.data.view(24, 8))
    del model.flat, model.q
    with pytest.raises(ValueError, match=r"'whole.weight' and '[kv].weight' lie in one memory"):
        MFT(model, config(target_modules=["^whole.weight"]))


def normed():
    """A linear layer and a norm whose running mean is 0."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("before", "after"), [(0.0, "nan"), (torch.finfo().max, "inf"), (torch.finfo().min, "-inf")]
)
def test_a_running_mean_that_became_nan_or_infinite_is_saved(before, after, tmp_path):
    model, loaded = normed(), normed()
    for one in (model, loaded):
        one[1].running_mean.fill_(before)
    mft = MFT(model, config())
    model[1].running_mean.fill_(float(after))
    mft.save_pretrained(tmp_path)
    MFT.from_pretrained(loaded, tmp_path)
    expected = torch.full((8,), float(after))
    assert torch.equal(loaded[1].running_mean.nan_to_num(0), expected.nan_to_num(0))
    assert loaded[1].running_mean.isfinite().any() == expected.isfinite().any()
    assert torch.equal(mft.unload()[1].running_mean, torch.full((8,), before))


def test_a_running_mean_that_stays_nan_is_not_saved(tmp_path):
    model = normed()
    model[1].running_mean.fill_(float("nan"))
    MFT(model, config()).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.safetensors"]


class Counting(Stack):
    """With whole numbers as a parameter, which cannot ask for a gradient."""

    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.drop = nn.Dropout(0.5)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("layers.7.bias", ValueError, "trained has 'layers.7.bias', which is no parameter"),
        ("count", RuntimeError, "floating point"),
    ],
)
def test_a_name_that_cannot_be_trained_leaves_the_model_unfrozen(name, error, said):
    model = Counting()
    model.layers[1].bias.requires_grad_(False)
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=said):
        Frozen(model, trained=["layers.0.bias", name])
    assert asked == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert model.drop.p == 0.5


def test_a_mask_file_of_another_head_leaves_the_model_plain_where_warnings_are_errors(tmp_path):
    MFT(bert(), config()).save_pretrained(tmp_path)
    model = bert()
    model.classifier.weight.data += 1
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="differs from that of the training"):
            MFT.from_pretrained(model, tmp_path)
    assert same(state(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.warns(UserWarning, match="differs from that of the training"):
        MFT.from_pretrained(model, tmp_path)


def test_modules_to_save_without_parameters_are_refused():
    before = state(model := bert())
    with pytest.raises(ValueError, match="'dropout', which matches only modules without"):
        MFT(model, config(modules_to_save=["classifier", "dropout"]))
    assert same(state(model), before)


def test_a_layer_of_another_shape_gets_a_mask_where_that_of_the_old_one_was_removed():
    model = Stack()
    switch, name = MaskSwitch(model), "layers.1.weight"
    for seed, own in enumerate("ab"):
        switch.add(own, random_mask({name: model.get_parameter(name)}, 0.5, seed))
    model.layers[1] = nn.Linear(8, 4)
    new = random_mask({name: model.get_parameter(name)}, 0.5)
    switch.remove("a")
    with pytest.raises(ValueError, match="another shape than its mask"):
        switch.add("new", new)  # b was made for the old layer
    switch.remove("b")
    switch.add("new", new)
    with switch.using("new"):
        assert torch.equal(model.layers[1].weight == 0, ~new[name])


def layer_and_masks():
    """A layer, its state, and two masks that prune some weights both."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    masks = [random_mask({"weight": layer.weight}, 0.5, seed) for seed in (0, 1)]
    assert (~masks[0]["weight"] & ~masks[1]["weight"]).any()
    return layer, state(layer), masks


def in_a_thread(work):
    """A thread that runs, and the list that gets its result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    return thread, found


def test_zeros_of_another_thread_that_are_taken_off_before_a_mask_holds_are_not_saved(monkeypatch):
    layer, before, masks = layer_and_masks()
    first, real = AppliedMask(layer, masks[0]), mft_nb.applied.hold
    meeting = threading.Barrier(2, timeout=20)

    def waiting(*arguments):
        meeting.wait()
        meeting.wait()  # meanwhile the first mask is taken off
        real(*arguments)

    monkeypatch.setattr(mft_nb.applied, "hold", waiting)
    thread, found = in_a_thread(lambda: AppliedMask(layer, masks[1]))
    meeting.wait()
    first.undo()
    meeting.wait()
    thread.join(20)
    found[0].undo()
    assert same(state(layer), before)


def test_a_mask_is_let_go_only_when_its_values_are_back(monkeypatch):
    layer, before, masks = layer_and_masks()
    first, real, done = AppliedMask(layer, masks[0]), mft_nb.applied.release, []
    meeting = threading.Barrier(2, timeout=20)

    def waiting(*arguments):
        real(*arguments)
        if not done:
            done.append(True)
            meeting.wait()
            meeting.wait()  # meanwhile another thread puts its mask on

    def other():
        meeting.wait()
        applied = AppliedMask(layer, masks[1])
        meeting.wait()
        return applied

    monkeypatch.setattr(mft_nb.applied, "release", waiting)
    thread, found = in_a_thread(other)
    first.undo()
    thread.join(20)
    assert torch.equal(layer.weight == 0, ~masks[1]["weight"])
    found[0].undo()
    assert same(state(layer), before)


def test_a_mask_of_a_thread_that_has_ended_holds_nobody_up():
    layer, before, masks = layer_and_masks()
    thread, found = in_a_thread(lambda: AppliedMask(layer, masks[0]))
    thread.join(20)
    later = AppliedMask(layer, masks[1])
    with pytest.raises(ValueError, match="Undo the later one first"):
        found[0].undo()
    later.undo()
    later.undo()
    found[0].undo()
    assert same(state(layer), before)


def test_a_copy_belongs_to_the_thread_that_made_it():
    layer, before, masks = layer_and_masks()
    applied = AppliedMask(layer, masks[0])

    def work():
        own, copied = copy.deepcopy((layer, applied))
        AppliedMask(own, masks[1]).undo()
        copied.undo()
        return own

    thread, found = in_a_thread(work)
    thread.join(20)
    assert same(state(found[0]), before)


def test_a_mask_that_cannot_save_values_lets_go_of_the_weights(monkeypatch):
    layer, before, masks = layer_and_masks()

    def faulty(self):
        yield from ()
        raise MemoryError

    monkeypatch.setattr(AppliedMask, "_zeros", faulty)
    with pytest.raises(MemoryError):
        AppliedMask(layer, masks[0])
    assert holders_of(layer.weight) == []
    assert same(state(layer), before)


def test_a_later_undo_of_what_is_undone_is_no_error():
    layer, before, masks = layer_and_masks()
    first = AppliedMask(layer, masks[0])
    first.undo()
    with AppliedMask(layer, BitMask(dict(masks[1]))):
        first.undo()
        assert torch.equal(layer.weight == 0, ~masks[1]["weight"])
    assert same(state(layer), before)


def test_a_new_thread_with_the_number_of_one_that_has_ended_holds_nobody_up():
    layer, before, masks = layer_and_masks()
    ended, found = in_a_thread(lambda: AppliedMask(layer, masks[0]))
    ended.join(20)

    class SameNumber(threading.Thread):
        ident = ended.ident

    done = threading.Event()
    thread = SameNumber(target=done.wait, daemon=True)
    thread.start()
    try:
        AppliedMask(layer, masks[1]).undo()
    finally:
        done.set()
        thread.join(20)
    found[0].undo()
    assert same(state(layer), before)


def test_a_pickled_mask_belongs_to_the_thread_that_reads_it():
    layer, before, masks = layer_and_masks()
    own, copied = pickle.loads(pickle.dumps((layer, AppliedMask(layer, masks[0]))))
    AppliedMask(own, masks[1]).undo()
    copied.undo()
    assert same(state(own), before)


def test_zeros_are_not_asked_of_a_mask_that_is_off():
    layer, _, masks = layer_and_masks()
    with AppliedMask(layer, masks[0]) as applied:
        applied.check_zeros()
    with pytest.raises(RuntimeError, match="no longer in force"):
        applied.check_zeros()
    kept = AppliedMask(layer, masks[0])
    kept.keep()
    kept.check_zeros()
