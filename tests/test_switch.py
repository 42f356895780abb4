"""On a real model: any way from mask to mask gives the same bits as a fresh copy."""

import asyncio
import copy
import pickle
import random
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file

import mft_nb.switch
from mft_nb.applied import AppliedMask
from mft_nb.bitmask import BitMask, magnitude_mask, random_mask
from mft_nb.config import MaskConfig
from mft_nb.mask import MFT
from mft_nb.mask_file import save_mask
from mft_nb.model import load_classifier
from mft_nb.sharded import weights_sha256
from mft_nb.switch import MaskSwitch, _Zeroed
from mft_nb.targets import maskable_weights


@pytest.fixture(scope="module")
def model():
    return load_classifier("minilm", seed=3)[0]


@pytest.fixture(scope="module")
def base(model):
    return state(model)


@pytest.fixture(scope="module")
def masks(model):
    """Three masks over different layers: random, magnitude, and one that prunes a whole matrix."""
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
    other = load_classifier("minilm", seed=3)[0]
    applied = AppliedMask(other, mask)
    assert MaskSwitch.of(other) is None  # a mask is in force, but not a switch's
    held = state(other)
    applied.undo()
    return held


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
    whole = _Zeroed.step
    calls = []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        whole(self, *arguments)

    monkeypatch.setattr(_Zeroed, "step", interrupted)
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


def layer_with_switch():
    """A small layer with the mask 'half' in force, the layer's base, and the mask."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    mask = random_mask({"weight": before}, 0.5)
    switch = MaskSwitch(layer)
    switch.add("half", mask)
    switch.use("half")
    return layer, before, mask


def test_training_under_a_mask_keeps_what_the_mask_keeps():
    layer, before, mask = layer_with_switch()
    layer(torch.ones(3, 6)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    trained = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="changed while the mask 'half' was in force: weight"):
        MaskSwitch.of(layer).use(None)
    kept = mask["weight"]
    assert torch.equal(layer.weight[kept], trained[kept])
    assert torch.equal(layer.weight[~kept], before[~kept])
    assert not torch.equal(trained[kept], before[kept])


def test_a_model_whose_switch_is_lost_still_has_its_base():
    layer, before, mask = layer_with_switch()
    for _ in range(20):  # any of them might get the address of the first one
        with pytest.raises(ValueError, match=r"'half' .*MaskSwitch\.of\(model\)\.use\(None\)"):
            MaskSwitch(layer)
    assert MaskSwitch.of(layer).active == "half"
    MaskSwitch.of(layer).use(None)
    assert torch.equal(layer.weight, before)
    assert MaskSwitch.of(layer) is None
    MaskSwitch(layer).add("half", mask)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("of", ["model", "switch"])
def test_a_copy_made_under_a_mask_goes_back_to_its_own_base(copied, of):
    layer, before, mask = layer_with_switch()
    original = MaskSwitch.of(layer)
    with original.using(None), original.using("half"):
        twin = copied(layer) if of == "model" else copied(original).model
    assert twin is not layer and MaskSwitch.of(twin).model is twin
    with pytest.raises(ValueError, match="Another mask is in force"):
        MaskSwitch(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switch = MaskSwitch.of(twin)
        switch.use(None)
    switch.remove("half")
    assert torch.equal(twin.weight, before)
    assert torch.equal(layer.weight, before * mask["weight"])
    original.use(None)
    assert torch.equal(layer.weight, before)


def test_a_switch_is_no_part_of_what_a_model_saves(tmp_path):
    layer, _, _ = layer_with_switch()
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in layer.named_modules()] == [""]
    MaskSwitch.of(layer).use(None)
    assert b"MaskSwitch" not in pickle.dumps(layer)
    model = load_classifier("minilm", seed=3)[0]
    switch = MaskSwitch(model)
    switch.add("one", random_mask(maskable_weights(model), 0.9))
    switch.use("one")
    model.save_pretrained(tmp_path / "saved")
    assert same_bits(load_file(tmp_path / "saved" / "model.safetensors"), state(model))


def failing(monkeypatch, calls, error):
    """Let those calls of the step for one piece fail, counted from 1."""
    whole = _Zeroed.step
    count = 0

    def step(self, part, key, places, *scratch):
        nonlocal count
        count += 1
        if count in calls:
            raise error
        whole(self, part, key, places, *scratch)

    monkeypatch.setattr(_Zeroed, "step", step)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "random"])
def test_a_switch_that_fails_halfway_puts_all_back(model, base, switch, monkeypatch, error, before):
    switch.use(before)
    failing(monkeypatch, {4}, error)
    with pytest.raises(error):
        switch.use("magnitude")
    monkeypatch.undo()
    assert same_bits(state(model), base)
    assert switch.active is None and MaskSwitch.of(model) is None
    switch.use("magnitude")


def test_what_could_not_be_put_back_keeps_the_model_refused(model, base, switch, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    failing(monkeypatch, {4, 6}, RuntimeError("no memory"))  # the 6th call is the way back
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            switch.use("magnitude")
    finally:
        torch.set_num_threads(threads)
    monkeypatch.undo()
    assert not same_bits(state(model), base)
    for refused in (lambda: MaskSwitch(model), lambda: MFT(model, MaskConfig())):
        with pytest.raises(ValueError, match="[Tt]he mask 'magnitude'.*use\\(None\\)"):
            refused()
    MaskSwitch.of(model).use(None)
    assert same_bits(state(model), base)
    MaskSwitch(model)


def unchangeable(kind):
    """Three layers, the last of which has a weight that cannot be changed in place."""
    torch.manual_seed(0)
    stack = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with torch.inference_mode(kind == "inference"):
        last = torch.nn.Linear(4, 4)
    if kind == "strided":
        last.weight.data = last.weight.data.T
    stack.append(last)
    return stack, random_mask({f"{i}.weight": stack[i].weight for i in range(3)}, 0.5)


REASONS = {
    "inference": "made under torch.inference_mode",
    "strided": "is not contiguous.*contiguous",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_weight_that_cannot_be_changed_is_named_before_any_is_touched(kind):
    stack, mask = unchangeable(kind)
    before = state(stack)
    with pytest.raises(ValueError, match=f"'2.weight' .*{REASONS[kind]}"):
        AppliedMask(stack, mask)
    switch = MaskSwitch(stack)
    with pytest.raises(ValueError, match=f"'2.weight' .*{REASONS[kind]}"):
        switch.add("half", mask)
    switch.add("fewer", BitMask({name: mask[name] for name in ("0.weight", "1.weight")}))
    switch.use("fewer")
    switch.use(None)
    assert all(torch.equal(before[name], one) for name, one in stack.state_dict().items())


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_a_weight_that_became_unchangeable_is_named_by_use(threads):
    whole = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    switch = MaskSwitch(whole)
    switch.add("half", random_mask({f"{i}.weight": whole[i].weight for i in range(3)}, 0.5))
    with torch.inference_mode():
        whole[2] = torch.nn.Linear(4, 4)
    before = state(whole)
    with pytest.raises(ValueError, match="'2.weight' was made under torch.inference_mode"):
        switch.use("half")
    assert all(torch.equal(before[name], one) for name, one in whole.state_dict().items())
    assert MaskSwitch.of(whole) is None
    with torch.inference_mode():
        switch.use("half")
        assert not torch.equal(whole[2].weight, before["2.weight"])
        switch.use(None)
        assert torch.equal(whole[2].weight, before["2.weight"])


@pytest.mark.parametrize("way", ["counted", "uncounted"])
def test_what_was_written_under_a_mask_is_named_and_does_not_stay_where_the_next_one_prunes(way):
    stack = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    first = random_mask({f"{i}.weight": stack[i].weight for i in (0, 1)}, 0.5)
    switch = MaskSwitch(stack)
    switch.add("one", first)
    second = dict(first) | {"1.weight": ~first["1.weight"]}  # 0.weight as before
    switch.add("other", BitMask(second))
    before = state(stack)
    switch.use("one")
    with torch.no_grad():
        if way == "counted":
            stack[0].weight.fill_(7)
        else:
            stack[0].weight.detach().numpy()[:] = 7
    with pytest.warns(UserWarning, match="'one' was in force: 0.weight. Where it prunes"):
        switch.use("other")
    assert not stack[0].weight[~first["0.weight"]].any()
    switch.use(None)
    pruned = ~first["0.weight"]
    assert torch.equal(stack[0].weight[pruned], before["0.weight"][pruned])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_applied_mask_that_fails_halfway_puts_all_back(error, monkeypatch):
    stack, mask = unchangeable("no")
    before = state(stack)
    set_item = torch.Tensor.__setitem__
    calls = []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        set_item(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "__setitem__", interrupted)
    with pytest.raises(error):
        AppliedMask(stack, mask)
    assert same_bits(state(stack), before)


def test_masks_on_one_weight_are_undone_from_the_last_to_the_first():
    layer = torch.nn.Linear(6, 4)
    before = state(layer)
    first, second = (
        AppliedMask(layer, random_mask({"weight": layer.weight}, 0.5, seed)) for seed in (0, 1)
    )
    both = state(layer)
    with pytest.raises(ValueError, match="later mask .* 'weight'.*undo"):
        first.undo()
    assert same_bits(state(layer), both)
    second.undo()
    first.undo()
    assert same_bits(state(layer), before)
    second.undo()  # does nothing, as ever
    first.undo()
    assert same_bits(state(layer), before)


def test_masks_on_other_weights_are_undone_in_any_order():
    stack, mask = unchangeable("no")
    before = state(stack)
    first, second = (AppliedMask(stack, BitMask({name: mask[name]})) for name in list(mask)[:2])
    first.undo()
    third = AppliedMask(stack, BitMask({"0.weight": mask["0.weight"]}))
    second.undo()
    third.undo()
    assert same_bits(state(stack), before)


def test_a_mask_that_nobody_can_undo_any_more_blocks_no_other():
    layer = torch.nn.Linear(6, 4)
    before = state(layer)
    with AppliedMask(layer, BitMask({"weight": torch.zeros(4, 6, dtype=torch.bool)})):
        AppliedMask(layer, random_mask({"weight": layer.weight}, 0.5))
    assert same_bits(state(layer), before)


def in_a_thread(work):
    """What some work returns or raises in a thread of its own; None while it has not ended."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(0.3)
    return thread, found


def test_a_thread_waits_for_the_block_of_another():
    layer, before, mask = layer_with_switch()
    switch, ones = MaskSwitch.of(layer), torch.ones(1, 6)
    usual = torch.nn.functional.linear(ones, before, layer.bias)

    def plain():
        with switch.using(None):
            return layer(ones)

    with switch.using("half"):
        masked = layer(ones)
        thread, found = in_a_thread(plain)
        assert not found  # it waits
        _, (refused,) = in_a_thread(lambda: layer(ones))
        assert isinstance(refused, RuntimeError) and "which waits" in str(refused)
        assert torch.equal(layer(ones), masked)
    thread.join(10)
    assert torch.equal(found[0], usual) and not torch.equal(usual, masked)
    assert switch.active == "half"
    _, found = in_a_thread(lambda: switch.use(None))
    assert found == [None] and switch.active is None
    switch.use("half")
    in_a_thread(lambda: switch.use(None))
    with pytest.raises(RuntimeError, match="another one has put None in force since"):
        layer(ones)


def test_coroutines_are_refused_where_waiting_would_stop_both():
    layer, before, _ = layer_with_switch()
    switch, ones, refused = MaskSwitch.of(layer), torch.ones(1, 6), []

    async def first():
        with switch.using("half"):
            await asyncio.sleep(0)
            return layer(ones)

    async def second():
        for work in (lambda: layer(ones), lambda: switch.use(None)):
            with pytest.raises(RuntimeError, match="coroutine") as caught:
                work()
            refused.append(str(caught.value))

    async def both():
        return (await asyncio.gather(first(), second()))[0]

    masked = layer(ones)
    assert torch.equal(asyncio.run(both()), masked)
    assert "which waits" in refused[0] and "Do not await inside of a block" in refused[1]
    switch.use(None)
    assert torch.equal(layer.weight, before)


def test_no_switch_within_a_forward_pass():
    stack, mask = unchangeable("no")
    before = state(stack)
    switch, ones = MaskSwitch(stack), torch.ones(1, 4)
    switch.add("half", mask)
    switch.use("half")
    hook = stack[0].register_forward_hook(lambda *_: switch.use(None))
    with pytest.raises(RuntimeError, match="cannot be switched within a forward pass"):
        stack(ones)
    hook.remove()
    assert switch.active == "half"
    switch.use(None)  # the pass that ended with an error is over
    assert same_bits(state(stack), before)


def test_an_applied_mask_and_another_thread_do_not_mix_their_zeros():
    layer = torch.nn.Linear(6, 4)
    before = state(layer)
    first = AppliedMask(layer, random_mask({"weight": layer.weight}, 0.5))
    other = random_mask({"weight": layer.weight}, 0.5, seed=1)
    _, (refused,) = in_a_thread(lambda: AppliedMask(layer, other))
    assert isinstance(refused, RuntimeError) and "mask of another thread" in str(refused)
    first.undo()
    _, (applied,) = in_a_thread(lambda: AppliedMask(layer, other))
    applied.undo()
    assert same_bits(state(layer), before)


@pytest.mark.parametrize("name", ["half", None])
def test_a_mask_is_not_removed_in_the_middle_of_a_switch(name, monkeypatch):
    layer, before, mask = layer_with_switch()
    switch, step, removals = MaskSwitch.of(layer), _Zeroed.step, []
    if name:
        switch.use(None)

    def meanwhile_removed(self, *arguments):
        if not removals:
            removals.append(in_a_thread(lambda: switch.remove("half")))
        step(self, *arguments)

    monkeypatch.setattr(_Zeroed, "step", meanwhile_removed)
    with switch.using(name):  # to 'half', or from it and back
        thread, found = removals[0]
        thread.join(10)
        assert isinstance(found[0], ValueError) and "is in force, or will be" in str(found[0])
        assert switch.names == ["half"] and switch.active == name
    switch.use(None)
    assert torch.equal(layer.weight, before)


def test_two_threads_cannot_add_two_masks_under_one_name(monkeypatch):
    layer, check, both = torch.nn.Linear(6, 4), mft_nb.switch.check_same_shapes, []
    switch, meeting = MaskSwitch(layer), threading.Barrier(2, timeout=10)

    def meet(*arguments):
        meeting.wait()
        check(*arguments)

    monkeypatch.setattr(mft_nb.switch, "check_same_shapes", meet)
    masks = [random_mask({"weight": layer.weight}, 0.5, seed) for seed in (0, 1)]
    for mask in masks:
        both.append(in_a_thread(lambda mask=mask: switch.add("one", mask)))
    for thread, _ in both:
        thread.join(10)
    results = [found for _, (found,) in both]
    assert results.count(None) == 1  # the other is refused
    assert "not taken yet" in str(results[results[0] is None])
    switch.use("one")
    assert torch.equal(layer.weight == 0, ~masks[results.index(None)]["weight"])
    switch.use(None)
