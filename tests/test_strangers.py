"""What strangers do: masks used by several at once, unseen writes, ties and the mean."""

import asyncio
import copy
import gc
import os
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch
from torch import nn

from mft_nb.applied import AppliedMask
from mft_nb.bitmask import random_mask, top_k_mask
from mft_nb.mask import MFT
from mft_nb.scopes import n_of_m_mask
from mft_nb.scores import MaskedWeight, ScoreGroup
from mft_nb.targets import maskable_weights
from tests.forks import FORKS
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
    switch,
    winners,
)

ROOT = Path(__file__).resolve().parent.parent

# Several at once


def gather(*coroutines):
    """What each gives, or its error."""

    async def main():
        return await asyncio.gather(*coroutines, return_exceptions=True)

    return asyncio.run(main())


def test_two_coroutines_that_wait_inside_their_blocks():
    model, masks, answers = switch()
    base = state(model)

    async def request(name):
        with masks.using(name):
            await asyncio.sleep(0.001)
            return logits(model)

    first, second = gather(request("a"), request("b"))
    assert torch.equal(first, answers["a"])
    assert isinstance(second, RuntimeError) and "Another coroutine of this thread" in str(second)
    assert masks.active is None and same(state(model), base)


def test_two_coroutines_that_wait_outside_of_their_blocks():
    model, masks, answers = switch()

    async def request(name):
        found = []
        for _ in range(3):
            with masks.using(name):
                found.append(torch.equal(logits(model), answers[name]))
            await asyncio.sleep(0)
        return all(found)

    assert gather(request("a"), request("b"), request(None)) == [True] * 3


def test_a_coroutine_that_asks_for_no_mask_does_not_get_one():
    model, masks, answers = switch()

    async def masked():
        with masks.using("a"):
            await asyncio.sleep(0.01)
            return logits(model)

    async def plain():
        await asyncio.sleep(0.001)
        return logits(model)

    first, second = gather(masked(), plain())
    assert torch.equal(first, answers["a"])
    assert "of another thread or coroutine" in str(second)
    assert torch.equal(logits(model), answers[None])


def stream(model, masks, name):
    """A generator that holds a mask for as long as it lives."""
    with masks.using(name):
        while True:
            yield logits(model)


def test_an_abandoned_generator_gives_the_base_back():
    model, masks, answers = switch()
    base = state(model)
    assert torch.equal(next(stream(model, masks, "a")), answers["a"])
    gc.collect()
    assert masks.active is None and same(state(model), base)
    left = stream(model, masks, "b")
    assert torch.equal(next(left), answers["b"])
    closing = threading.Thread(target=left.close)  # a server's clean-up thread
    closing.start()
    closing.join(5)
    assert not closing.is_alive() and masks.active is None and same(state(model), base)


def test_two_generators_that_take_turns_are_told():
    model, masks, answers = switch()
    base = state(model)
    first, second = stream(model, masks, "a"), stream(model, masks, "b")
    assert torch.equal(next(first), answers["a"])
    assert torch.equal(next(second), answers["b"])
    with pytest.raises(RuntimeError, match="left while one that was opened in it is still open"):
        first.close()
    second.close()
    assert masks.active is None and same(state(model), base)


def test_use_from_two_threads_is_told_apart():
    model, masks, answers = switch()
    masks.use("a")
    other = threading.Thread(target=masks.use, args=("b",))
    other.start()
    other.join()
    with pytest.raises(RuntimeError, match="This thread asked for the mask 'a', and another one"):
        logits(model)
    masks.use("a")
    assert torch.equal(logits(model), answers["a"])


def test_coroutines_that_switch_without_a_block_are_told():
    model, masks, answers = switch()

    async def request(name):
        masks.use(name)
        await asyncio.sleep(0.001)
        return torch.equal(logits(model), answers[name])

    first, second = gather(request("a"), request("b"))
    assert "asked for the mask 'a', and another one has put 'b'" in str(first)
    assert second is True


def test_a_switch_waits_for_a_forward_pass_of_another_thread():
    model, masks, answers = switch()
    inside, right = threading.Event(), []

    def slow(*_):
        inside.set()
        time.sleep(0.1)

    model.dropout.register_forward_pre_hook(slow)
    masks.use("a")
    other = threading.Thread(target=lambda: right.append(torch.equal(logits(model), answers["a"])))
    other.start()
    assert inside.wait(5)
    masks.use("b")
    other.join()
    assert right == [True] and torch.equal(logits(model), answers["b"])


def test_an_error_within_a_forward_pass_holds_nobody_up():
    model, masks, answers = switch()
    for _ in range(2):
        with pytest.raises((AttributeError, TypeError)), masks.using("a"):
            model(input_ids="no tokens")
    other = threading.Thread(target=masks.use, args=("b",))
    other.start()
    other.join(5)
    assert not other.is_alive() and torch.equal(logits(model), answers["b"])


def test_a_mask_of_another_thread_is_refused_and_the_base_comes_back():
    model, said = bert(), []
    base, weights = state(model), maskable_weights(model, layers="all")
    applied = AppliedMask(model, random_mask(weights, 0.5))
    under = state(model)

    def other():
        for put_on in (
            lambda: AppliedMask(model, random_mask(weights, 0.5, seed=1)),
            lambda: MFT(model, config()),
        ):
            try:
                put_on()
            except (RuntimeError, ValueError) as error:
                said.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "A mask of another thread is in force" in said[0]
    assert "The model already carries a mask" in said[1]
    assert same(state(model), under)
    applied.undo()
    assert same(state(model), base)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_threads_run_a_masked_model_while_another_looks_at_the_mask(scope):
    mft = MFT(bert(), config(scope=scope))
    mask = mft.bitmask()
    right, wrong = logits(by_hand(bert(), mask)), []

    def run(ask, times):
        for _ in range(times):
            if not ask():
                wrong.append(ask)

    jobs = [lambda: torch.equal(logits(mft.model), right)] * 3 + [lambda: mft.bitmask() == mask]
    threads = [threading.Thread(target=run, args=(job, 12)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_evaluates_does_not_disturb_the_training():
    settings = config(keep=0.5, schedule=[(0, 1.0), (4, 0.5)])
    alone, watched = MFT(bert(), settings), MFT(bert(), settings)
    steps(alone, 6)
    done, kept = threading.Event(), []

    def evaluate():
        while not done.is_set():
            logits(watched.model)
            kept.append(watched.bitmask().density)

    other = threading.Thread(target=evaluate)
    other.start()
    steps(watched, 6)
    done.set()
    other.join()
    assert watched.bitmask() == alone.bitmask()
    assert kept == sorted(kept, reverse=True)


def test_a_thread_that_evaluates_amid_a_backward_pass_counts_no_step():
    mft = MFT(Stack(), config(keep=0.5, schedule=[(0, 1.0), (4, 0.5)], scope="global"))
    mft.model.layers[2].parametrizations.weight.original.data.zero_()  # the first gradient is 0
    optimizer = torch.optim.SGD(mft.scores, lr=0.1)

    def evaluate(gradient):
        with torch.no_grad():
            mft.model(torch.ones(2, 8))

    def evaluate_elsewhere(gradient):
        other = threading.Thread(target=evaluate, args=(gradient,))
        other.start()
        other.join()

    for done in (1, 2):
        outputs = [layer(torch.ones(2, 8)) for layer in mft.model.layers]
        for output in outputs:
            output.register_hook(evaluate_elsewhere)
        sum(outputs).sum().backward()
        assert steps_of(mft) == done - 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert steps_of(mft) == done


def test_after_a_backward_pass_that_failed_steps_are_counted():
    mft = MFT(Stack(), config(keep=0.5, schedule=[(0, 1.0), (4, 0.5)], scope="global"))
    hidden = mft.model.layers[0](torch.ones(2, 8))
    hidden.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mft.model.layers[1](hidden).sum().backward()
    optimizer = torch.optim.SGD(mft.scores, lr=0.1)
    optimizer.step()  # of the gradients that had come
    assert steps_of(mft) == 1


def steps_of(mft):
    """Optimizer steps counted, as the mask tells another thread."""
    with futures.ThreadPoolExecutor(1) as pool:
        density = pool.submit(mft.bitmask).result().density
    return round((1 - density) / 0.5 * 4)


def test_switching_within_autocast_does_not_keep_the_mask_of_before():
    model, masks, _ = switch()
    given, right = [], []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for name in ("a", "b", None):
            masks.use(name)
            given.append(model(**batch()).logits)
    for name in ("a", "b", None):
        masks.use(name)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            right.append(model(**batch()).logits)
    assert all(torch.equal(*pair) for pair in zip(given, right, strict=True))


def test_a_mask_put_on_and_off_within_autocast_is_seen():
    mask = random_mask(maskable_weights(bert(), layers="all"), 0.5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model = bert()
        base = model(**batch()).logits
        with AppliedMask(model, mask):
            assert torch.equal(model(**batch()).logits, by_hand(bert(), mask)(**batch()).logits)
        assert torch.equal(model(**batch()).logits, base)


# Writes that nothing counts


def negate_data(mft):
    for score in mft.scores:
        score.data.neg_()


def average(mft):
    first = [score.detach().clone() for score in mft.scores]
    steps(mft, 2)
    with torch.no_grad():
        for score, before in zip(mft.scores, first, strict=True):
            score.lerp_(before, 0.4)


def by_hand_sgd(mft):
    for _ in range(3):
        mft.model(**batch()).loss.backward()
        for score in mft.scores:
            score.data = score.data - 2 * score.grad
            score.grad = None


def through_numpy(mft):
    for score in mft.scores:
        score.detach().numpy()[:] *= -1


def from_a_vector(mft):
    count = sum(score.numel() for score in mft.scores)
    torch.nn.utils.vector_to_parameters(torch.linspace(-1, 1, count).cos(), mft.scores)


def in_another_process(mft):
    mft.model.share_memory()
    child = os.fork()
    if not child:
        negate_data(mft)
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    "write", [negate_data, average, by_hand_sgd, through_numpy, from_a_vector, in_another_process]
)
def test_mask_and_forward_pass_follow_a_write(write):
    mft = MFT(bert(), config())
    first = mft.bitmask()
    logits(mft.model)
    write(mft)
    given = logits(mft.model)  # before anybody asks for the mask
    right = of_scores(mft)
    assert right != first
    assert mft.bitmask() == right
    assert torch.equal(given, logits(by_hand(bert(), right)))


def test_scores_written_between_two_passes_of_one_autocast_block():
    mft = MFT(bert(), config())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(2):
            given = mft.model(**batch()).logits
            assert torch.equal(given, by_hand(bert(), of_scores(mft))(**batch()).logits)
            negate_data(mft)


def test_an_averaged_model_has_the_mask_of_the_mean_scores():
    mft, seen = MFT(bert(), config()), []
    averaged = torch.optim.swa_utils.AveragedModel(mft.model)
    for _ in range(3):
        steps(mft, 1, rate=5.0)
        averaged.update_parameters(mft.model)
        seen.append([score.detach().clone() for score in mft.scores])
    means = [torch.stack(own).mean(0) for own in zip(*seen, strict=True)]
    mask = winners(dict(zip(mft.base_weights(), means, strict=True)))
    right = by_hand(bert(), mask)
    assert mask != mft.bitmask() == of_scores(mft)
    assert torch.allclose(logits(averaged), logits(right), atol=1e-6)


def test_a_copy_of_the_model_follows_its_own_scores():
    mft = MFT(bert(), config())
    twin = copy.deepcopy(mft.model)
    mask = mft.bitmask()
    negate_data(mft)
    assert torch.equal(logits(twin), logits(by_hand(bert(), mask)))
    assert torch.equal(logits(mft.model), logits(by_hand(bert(), of_scores(mft))))


def replica(model):
    """What nn.DataParallel gives to each device: modules that hold tensors, not parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        twin._former_parameters = {}
        for name, child in module._modules.items():
            setattr(twin, name, copies.get(child))
        for name, tensor in module._parameters.items():
            setattr(twin, name, None if tensor is None else tensor.clone())
    return copies[model]


def test_replicas_follow_unseen_writes_and_train_the_scores():
    mft = MFT(bert(), config())
    for _ in range(2):
        output = replica(mft.model)(**batch())
        right = by_hand(bert(), of_scores(mft))(**batch())
        assert torch.equal(output.logits, right.logits)
        output.loss.backward()
        given = [score.grad for score in mft.scores]
        for score in mft.scores:
            score.grad = None
        mft.model(**batch()).loss.backward()
        assert all(torch.allclose(a, s.grad) for a, s in zip(given, mft.scores, strict=True))
        by_hand_sgd(mft)


def test_a_model_that_comes_at_the_address_of_another_is_its_own():
    for seed in range(3):  # freed memory, and with it ids, is used again
        mft = MFT(bert(), config(init_seed=seed))
        mask = of_scores(mft)
        assert mft.bitmask() == mask
        assert torch.equal(logits(mft.model), logits(by_hand(bert(), mask)))
        del mft
        gc.collect()


def test_a_switch_sees_no_base_in_weights_at_an_old_address():
    for seed in range(2):
        model, masks, answers = switch()
        with torch.no_grad():
            model.classifier.bias.add_(seed)
        masks.use("a")
        assert torch.allclose(logits(model), answers["a"] + seed)
        del model, masks
        gc.collect()


def test_steps_of_a_schedule_are_counted_without_an_optimizer():
    mft, densities = MFT(bert(), config(keep=0.5, schedule=[(0, 1.0), (4, 0.5)])), []
    for _ in range(5):
        for _ in range(2):  # gradients add up over two batches
            mft.model(**batch()).loss.backward()
            densities.append(round(mft.bitmask().density, 3))
        for score in mft.scores:
            score.data.sub_(score.grad, alpha=0.1)
            score.grad = None
    assert densities[::2] == densities[1::2] == [1, 0.875, 0.75, 0.625, 0.5]


def test_a_schedule_does_not_count_batches_whose_gradients_are_added_up_by_hand():
    mft, densities = MFT(bert(), config(keep=0.5, schedule=[(0, 1.0), (4, 0.5)])), []
    for _ in range(3):
        total = [torch.zeros_like(score) for score in mft.scores]
        for _ in range(2):
            found = torch.autograd.grad(mft.model(**batch()).loss, mft.scores)
            total = [one + more for one, more in zip(total, found, strict=True)]
        densities.append(round(mft.bitmask().density, 3))
        for score, gradient in zip(mft.scores, total, strict=True):
            score.data.sub_(gradient, alpha=0.1)
    assert densities == [1, 0.875, 0.75]


# Equal scores, and the mean


def test_equal_scores_of_a_group_leave_the_first():
    ones = n_of_m_mask(torch.ones(2, 8), 2, 4)
    assert ones.tolist() == [[True, True, False, False] * 2] * 2
    part = torch.tensor([[1.0, 3, 2, 2], [5, 5, 0, 5], [0, 0, 0, 1], [-2, -1, -1, -1]])
    kept = [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]]
    assert n_of_m_mask(part, 2, 4).int().tolist() == kept
    assert n_of_m_mask(part.T.contiguous(), 2, 4, dim=0).int().T.tolist() == kept
    assert n_of_m_mask(part, 3, 4).int().tolist() == [
        [0, 1, 1, 1],
        [1, 1, 0, 1],
        [1, 1, 0, 1],
        [0, 1, 1, 1],
    ]
    wide = n_of_m_mask(torch.zeros(3, 64), 5, 32)  # long enough for an unstable sort to show
    assert (wide.view(3, 2, 32).nonzero()[:, 2].view(6, 5) == torch.arange(5)).all()


@pytest.mark.parametrize("absolute", [False, True])
def test_equal_scores_of_a_training_leave_the_first(absolute):
    group = ScoreGroup(0.5, "2:4", absolute)
    masked = MaskedWeight(torch.tensor([[1.0, -1, 1, -1, 2, 2, 2, 2]]), group)
    given = masked(torch.full((1, 8), 3.0))
    kept = [3.0, 3, 0, 0, 3, 3, 0, 0] if absolute else [3.0, 0, 3, 0, 3, 3, 0, 0]
    assert given.tolist() == [kept]
    ties = top_k_mask({"weight": torch.ones(2, 4)}, 0.5, scope="2:4")
    assert ties["weight"].int().tolist() == [[1, 1, 0, 0]] * 2
    whole = top_k_mask({"weight": torch.ones(2, 4), "other": torch.ones(2, 4)}, 0.75, "global")
    assert whole["weight"].all() and whole["other"].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


class Two(nn.Module):
    """Two layers with 8 and 2 weights; the loss does not depend on the scores."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 2), nn.Linear(2, 1)])

    def forward(self, inputs):
        for layer in self.layers:
            inputs = layer(inputs)
        return {"loss": 0 * inputs.sum()}


@pytest.mark.parametrize("reduction, share", [("sum", 1.0), ("mean", 0.1)])
def test_the_penalty_by_hand(reduction, share):
    mft = MFT(Two().train(), config(keep=0.5, l1=0.3, l1_reduction=reduction))
    mft.scores[0].data = torch.tensor([[1.0, -2, 3, -4], [5, -6, 7, -8]])
    mft.scores[1].data = torch.tensor([[9.0, -1]])
    total = 36 + 10  # of |scores|, over 8 + 2 of them
    assert torch.isclose(mft.penalty(), torch.tensor(0.3 * total * share))
    loss = mft.model(torch.ones(1, 4))["loss"]
    assert torch.isclose(loss, torch.tensor(0.3 * total * share))
    loss.backward()
    for score in mft.scores:
        assert torch.allclose(score.grad, 0.3 * share * score.detach().sign())


def test_a_thread_that_evaluates_leaves_gradients_alone_and_the_trainer_counts_the_step():
    mft = MFT(Stack(), config(keep=0.5, schedule=[(0, 1.0), (4, 0.5)]))
    mft.model(torch.ones(2, 8)).sum().backward()
    torch.optim.SGD(mft.scores, lr=0.0).zero_grad()  # a step that changed no score
    assert steps_of(mft) == 0  # asked from another thread
    assert mft.bitmask().density == 0.875
    assert steps_of(mft) == 1


def train_while_another_thread_looks(answer):
    """Leave the density of the mask after 1,500 steps in a file."""
    torch.set_num_threads(1)
    mft, done = MFT(Stack(), config(keep=0.5, schedule=[(0, 1.0), (4000, 0.5)])), threading.Event()

    def look():
        while not done.is_set():
            mft.bitmask()

    other = threading.Thread(target=look)
    other.start()
    optimizer = torch.optim.SGD(mft.scores, lr=0.1)
    for _ in range(1500):
        optimizer.zero_grad()
        mft.model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    done.set()
    other.join()
    answer.write_text(str(mft.bitmask().density))


def test_a_thread_that_looks_all_the_time_does_not_crash_the_training(tmp_path):
    answer = tmp_path / "density"
    process = FORKS.Process(target=train_while_another_thread_looks, args=(answer,))
    process.start()
    process.join(timeout=240)
    process.kill()  # if it hangs
    process.join()
    assert process.exitcode == 0
    assert float(answer.read_text()) == 0.8125  # 1,500 of 4,000 steps on the way from 1 to 0.5
