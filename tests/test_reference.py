"""The base for a moment: bit for bit within the block, and the mask after it; or a refusal."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from mft_nb.mask import MFT
from tests.models import CONFIG, batch, copied_state, same_state, tiny_bert, train_steps

INPUTS = {"input_ids": batch()["input_ids"]}
KINDS = {
    "weights": CONFIG,
    "absolute": replace(CONFIG, ranking="absolute", scope="global"),
    "units": replace(CONFIG, scope="unit", keep=0.5),
    "neighbours": replace(CONFIG, scope="2:4", keep=0.5),
    "head": replace(CONFIG, modules_to_save=("classifier",), l1=1e-3),
}


def logits(model):
    """Answers of a model, without a gradient."""
    with torch.no_grad():
        return model(**INPUTS).logits


def trained(config=CONFIG, **shape):
    """A mask after three steps."""
    mft = MFT(tiny_bert(**shape), config)
    train_steps(mft, model=mft.model.train())
    mft.model.eval()
    return mft


def loaded(mft):
    """The same mask, finished, on a model of its own."""
    return MFT(tiny_bert(), mft.config, mft.bitmask())


@pytest.mark.parametrize("kind", [*KINDS, "loaded"])
def test_the_base_within_and_the_mask_after_an_error_too(kind):
    mft = trained(KINDS.get(kind, CONFIG))
    mft = loaded(mft) if kind == "loaded" else mft
    base, masked, state = logits(tiny_bert()), logits(mft.model), copied_state(mft.model)
    asked = [parameter.requires_grad for parameter in mft.model.parameters()]
    assert not torch.equal(base, masked)
    with pytest.raises(KeyError):
        with mft.disabled() as model:
            with mft.disabled():
                assert torch.equal(logits(model), base)
            assert torch.equal(logits(model), base)  # the inner block has ended
            raise KeyError("a fault")
    assert torch.equal(logits(mft.model), masked)
    assert same_state(mft.model, state)
    assert [parameter.requires_grad for parameter in mft.model.parameters()] == asked
    assert same_state(mft.unload(), copied_state(tiny_bert()))
    with pytest.raises(ValueError, match="was taken off its model"):
        with mft.disabled():
            pytest.fail("the block must not run")


def test_what_would_do_half_of_each_is_refused_within_and_the_mask_can_be_read(tmp_path):
    mft = trained(KINDS["head"])
    state, mask = mft.state_dict(), mft.bitmask()
    for one in (mft, loaded(trained())):
        whole = [one.unload, one.merge_and_unload, one.shrink, one.plain_state_dict]
        whole += [one.state_dict, one.base_weights, lambda one=one: one.trainable]
        whole += [lambda one=one: one.save_pretrained(tmp_path), lambda: mft.load_state_dict(state)]
        with one.disabled(), mft.disabled():
            assert mft.bitmask() == mask and "BitMask" in repr(one)
            for call in whole:
                with pytest.raises(RuntimeError, match="not saved, trained or taken off"):
                    call()
            with pytest.raises(RuntimeError, match="cannot be copied or pickled"):
                copy.deepcopy(one.model)
    assert not list(tmp_path.iterdir())
    assert mft.bitmask() == mask


def test_a_reference_within_a_step_of_training_changes_no_bit_of_it():
    base, results = logits(tiny_bert()), []
    for within in (False, True):
        mft = MFT(tiny_bert(), KINDS["head"])
        optimizer = torch.optim.AdamW(mft.trainable, lr=0.02)
        for _ in range(3):
            student = mft.model.train()(**batch())  # first the student, then the reference
            if within:
                with mft.disabled() as model:
                    reference = model(**INPUTS).logits
                    assert torch.equal(reference, base) and not reference.requires_grad
            (student.loss + mse_loss(student.logits, base)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(mft)
    for one, other in zip(results[0].trainable, results[1].trainable, strict=True):
        assert torch.equal(one, other)


def test_training_within_is_refused_and_the_loss_of_the_base_has_no_penalty():
    mft = trained(KINDS["head"])
    mft.model.train()
    outside = mft.model(**batch()).loss
    with mft.disabled() as model:
        plain = tiny_bert()(**batch()).loss.item()
        assert model(**batch()).loss.item() == plain
        with pytest.raises(RuntimeError, match="A backward pass within a"):
            outside.backward()
    before = logits(mft.model)
    optimizer = torch.optim.SGD(mft.trainable, lr=1.0)
    mft.model(**batch()).loss.backward()
    scores = [score.detach().clone() for score in mft.scores]
    with pytest.raises(RuntimeError, match=r"classifier\.\w+ and 1 more|changed in a block"):
        with mft.disabled():
            optimizer.step()
    assert not all(map(torch.equal, scores, mft.scores))  # these are no part of the base
    assert not torch.equal(logits(mft.model), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_in_a_backward_pass_are_not_those_of_the_base(reentrant):
    mft = trained()
    model = mft.model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    embedded = torch.randn(6, 7, 32).requires_grad_()  # a reentrant checkpoint wants it
    loss = model(inputs_embeds=embedded, labels=batch()["labels"]).loss
    with pytest.raises(RuntimeError, match="A backward pass within a"):
        with mft.disabled():
            loss.backward()


def test_other_threads_are_refused_within_and_waited_for_before():
    mft = trained()
    inside, go_on = threading.Event(), threading.Event()
    masked, base = logits(mft.model), logits(tiny_bert())

    def wait(*_):
        inside.set()
        go_on.wait(10)

    def reference():
        with mft.disabled() as model:
            return logits(model)

    with ThreadPoolExecutor(2) as others:
        hook = mft.model.bert.pooler.register_forward_hook(wait)
        first = others.submit(logits, mft.model)
        assert inside.wait(10)
        second = others.submit(reference)  # waits for the pass of the first
        with pytest.raises(TimeoutError):
            second.result(timeout=0.3)
        go_on.set()
        hook.remove()
        assert torch.equal(first.result(), masked) and torch.equal(second.result(), base)
        with mft.disabled():
            for part in (mft.model, mft.model.bert):  # a part has no hook, its weights ask
                with pytest.raises(RuntimeError, match="block of another thread or coroutine"):
                    others.submit(part, **INPUTS).result()
        assert torch.equal(others.submit(logits, mft.model).result(), masked)


def test_a_loaded_mask_is_disabled_by_the_thread_that_loaded_it_alone():
    mft = loaded(trained())

    def reference():
        with mft.disabled() as model:
            return logits(model)

    with ThreadPoolExecutor(1) as others:
        with pytest.raises(RuntimeError, match="which may be using the weights now"):
            others.submit(reference).result()
        with mft.disabled():
            with pytest.raises(RuntimeError, match="block of another thread or coroutine"):
                others.submit(logits, mft.model).result()
    assert torch.equal(reference(), logits(tiny_bert()))
    assert not mft.model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["trained", "loaded"])
@torch.no_grad()
def test_a_compiled_model_follows(kind):
    rows, model, mask = torch.ones(2, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), None
    base = model(rows)
    config = replace(CONFIG, keep=0.5)
    if kind == "loaded":
        mask = MFT(copy.deepcopy(model), config).bitmask()
    mft = MFT(model, config, mask)
    fast, masked = torch.compile(model, backend="eager"), model(rows)
    for _ in range(2):
        assert torch.equal(fast(rows), masked) and not torch.equal(masked, base)
        with mft.disabled():
            assert torch.equal(fast(rows), base)
    assert torch.equal(fast(rows), masked)


def test_the_mft_of_a_model_is_found_through_what_wraps_it():
    lora = peft.LoraConfig(target_modules=["pooler.dense"], r=2)
    for mft in (trained(), loaded(trained())):
        model = mft.model
        wrapped = [nn.DataParallel(model), torch.compile(model, backend="eager")]
        wrapped += [nn.ModuleDict({"masked": model})]
        for one in (model, *wrapped, peft.get_peft_model(model, lora)):
            assert MFT.of(one) is mft
    assert MFT.of(tiny_bert()) is None and MFT.of(nn.Linear(2, 2)) is None
    both = [trained(), loaded(trained())]
    with pytest.raises(ValueError, match="2 masked models"):
        MFT.of(nn.ModuleList([one.model for one in both]))
    with pytest.raises(ValueError, match="or is str; give the one torch.nn.Module"):
        MFT.of("my-model")


@pytest.mark.parametrize("kind", ["trained", "loaded"])
def test_a_copy_has_an_mft_of_its_own_and_a_plain_model_none(kind):
    mft = trained() if kind == "trained" else loaded(trained())
    twin = copy.deepcopy(mft)
    assert MFT.of(twin.model) is twin and MFT.of(mft.model) is mft
    base = logits(tiny_bert())
    with twin.disabled():
        assert torch.equal(logits(twin.model), base)
        assert not torch.equal(logits(mft.model), base)
    assert MFT.of(twin.unload()) is None and MFT.of(mft.model) is mft
    assert MFT.of(mft.merge_and_unload()) is None
