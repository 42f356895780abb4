"""What strangers change beside the masked weights, and losses that must hear of the penalty."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from mft_nb.mask import MFT
from tests.strangers import Stack, batch, bert, by_hand, config, logits, of_scores, same, state
from tests.strangers import steps as train

# State that is no masked weight


class Normed(nn.Module):
    """Three layers with BatchNorm between, a counter that is not saved, and odd buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.register_buffer("odd", torch.tensor([float("nan"), -0.0, float("-inf"), 3.0]))
        self.register_buffer("calls", torch.tensor(0), persistent=False)

    def forward(self, inputs):
        self.calls += 1
        self.odd = self.odd + 1  # another tensor each time
        for layer, norm in zip(self.layers, self.norms, strict=True):
            inputs = torch.tanh(norm(layer(inputs)))
        return self.head(inputs)


INPUTS = torch.randn(12, 8, generator=torch.Generator().manual_seed(2)) + 1


def train_sum(mft, count=3):
    optimizer = torch.optim.SGD([p for p in mft.model.parameters() if p.requires_grad], 0.5)
    for _ in range(count):
        optimizer.zero_grad()
        mft.model(INPUTS).logsumexp(1).sum().backward()
        optimizer.step()


def test_buffers_that_training_changes_are_saved_and_given_back(tmp_path):
    model = Normed()
    base, asked = state(model), [p.requires_grad for p in model.parameters()]
    mft = MFT(model, config(modules_to_save=("head",)))
    train_sum(mft)
    moved = {n for n, t in state(model).items() if n in base and not torch.equal(t, base[n])}
    assert {"norms.0.running_mean", "norms.2.num_batches_tracked", "odd", "calls"} <= moved
    mft.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = MFT.from_pretrained(Normed(), tmp_path)
    given = model.eval()(INPUTS)
    assert torch.equal(loaded.model.eval()(INPUTS), given)
    plain = by_hand(Normed(), of_scores(mft))
    plain.load_state_dict(
        {n: t for n, t in model.state_dict().items() if not n.startswith("layers.")}, strict=False
    )
    assert torch.equal(plain.eval()(INPUTS), given)
    for one in (mft, loaded):
        assert same(state(one.unload()), base)
        assert [p.requires_grad for p in one.model.parameters()] == asked


def test_a_buffer_that_grew_stops_unload_before_anything_happens():
    mft = MFT(Normed(), config())
    mft.model.odd = torch.zeros(9)
    before = state(mft.model)
    with pytest.raises(ValueError, match=r"'odd' had the shape \(4,\).*merge_and_unload"):
        mft.unload()
    assert same(state(mft.model), before) and len(mft.bitmask()) == 3


def test_a_head_unfrozen_by_hand_is_saved_loaded_and_given_back(tmp_path):
    mft = MFT(bert(), config())
    mft.model.classifier.requires_grad_(True)
    train(mft)
    assert not torch.equal(mft.model.classifier.weight, bert().classifier.weight)
    assert "classifier.weight" in mft.state_dict()
    mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(bert(), tmp_path)
    assert torch.equal(loaded.model.classifier.weight, mft.model.classifier.weight)
    assert torch.equal(logits(loaded.model), logits(mft.model))
    for one in (loaded, mft):
        assert same(state(one.unload()), state(bert()))


def train_outside(mft):
    """A head trained on features, so that no forward pass of the model sees it."""
    head = mft.model.classifier.requires_grad_(True)
    optimizer = torch.optim.SGD(head.parameters(), 1.0)
    head(mft.model.bert(batch()["input_ids"])[1]).sum().backward()
    optimizer.step()
    return "classifier.weight"


def replace_head(mft):
    mft.model.classifier = nn.Linear(16, 2)
    train(mft, 1)
    return "classifier.weight"


def add_module(mft):
    mft.model.extra = nn.Linear(2, 2)
    train_extra = torch.optim.SGD(mft.model.extra.parameters(), 1.0)
    mft.model.extra(mft.model(**batch()).logits).sum().backward()
    train_extra.step()
    return "extra.weight"


@pytest.mark.parametrize("change", [train_outside, replace_head, add_module])
def test_what_no_file_holds_is_named_when_it_is_saved(change, tmp_path):
    mft = MFT(bert(), config())
    name = change(mft)
    with pytest.warns(UserWarning, match=f"{name}.* mask file does not hold"):
        mft.save_pretrained(tmp_path)


def test_another_head_is_warned_of_once(tmp_path):
    MFT(bert(), config()).save_pretrained(tmp_path)
    other = bert()
    nn.init.normal_(other.classifier.weight)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mft = MFT.from_pretrained(other, tmp_path)
        logits(mft.model)
        mft.bitmask()
        mft.unload()
    assert len(said) == 1
    assert "differs from that of the training" in str(said[0].message)
    assert "classifier" in str(said[0].message) and "bert" not in str(said[0].message)


def test_other_parts_are_named_by_part(tmp_path):
    MFT(Normed(), config()).save_pretrained(tmp_path)
    other = Normed()
    other.norms[1].running_var.mul_(2)
    with pytest.warns(UserWarning, match=r"does not cover: norms\.1\. "):
        MFT.from_pretrained(other, tmp_path)


def test_another_precision_is_named():
    mft = MFT(bert(), config())
    mask = mft.bitmask()
    mft.model.half().float()  # rounds all weights
    assert mft.bitmask() == mask
    with pytest.warns(UserWarning, match="changed .*since the mask was put on"):
        mft.unload()


# A penalty that a loss hears of, or not


def arguments(folder, **more):
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    quiet |= {"logging_strategy": "no", "max_steps": 6, "learning_rate": 0.05, "optim": "sgd"}
    quiet |= {"lr_scheduler_type": "constant", "max_grad_norm": 0, "weight_decay": 0.0}
    return TrainingArguments(str(folder), per_device_train_batch_size=6, **(quiet | more))


ROWS = [dict(zip(batch(), row, strict=True)) for row in zip(*batch(36).values(), strict=True)]
L1 = 0.01


def scores_after(folder, l1, kind=Trainer, model=None, **more):
    """The scores after a few steps of a Trainer."""
    mft = MFT(model or bert(), config(l1=l1))
    trainer = kind(model=mft.model, args=arguments(folder, **more), train_dataset=ROWS)
    trainer.mft = mft
    trainer.train()
    return [score.detach().clone() for score in mft.scores]


class ClassWeights(Trainer):
    """Weighs the classes, and may add the penalty."""

    add = False

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(**inputs)
        weights = torch.tensor([1.0, 3.0])
        loss = nn.functional.cross_entropy(output.logits, inputs["labels"], weights)
        loss = loss + self.mft.penalty() if self.add else loss
        return (loss, output) if return_outputs else loss


class ClassWeightsAndPenalty(ClassWeights):
    add = True


def plain_tuples():
    model = bert()
    model.config.return_dict = False
    return model


@pytest.mark.parametrize(
    "how",
    [{"kind": ClassWeights}, {"label_smoothing_factor": 0.1}, {"model": plain_tuples()}],
    ids=["own loss", "label smoothing", "tuples"],
)
def test_a_trainer_that_uses_another_loss_is_warned_within_the_first_steps(how, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scores_after(tmp_path, L1, **how)
    told = [str(one.message) for one in said if "penalty on the scores" in str(one.message)]
    assert len(told) == 1 and told[0].startswith("In 3 backward passes")


@pytest.mark.parametrize(
    "kind, parts", [(Trainer, 1), (Trainer, 2), (ClassWeightsAndPenalty, 1)]
)
def test_a_penalty_that_is_heard_pulls_once_a_step(kind, parts, tmp_path):
    """With a huge l1 each SGD step moves a score by rate * l1 towards 0, whatever the loss says."""
    huge, rate = 1000.0, 1e-5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*penalty on the scores")
        how = {"gradient_accumulation_steps": parts, "max_steps": 1, "learning_rate": rate}
        after = scores_after(tmp_path, huge, kind, **how)
    for score, before in zip(after, MFT(bert(), config()).scores, strict=True):
        moved = (before - score).detach() / (huge * rate)
        assert torch.allclose(moved, before.sign(), atol=2e-3)


def test_a_preference_loss_of_two_passes_hears_of_the_penalty_if_it_is_added():
    plain, held = MFT(bert(), config()), MFT(bert(), config(l1=L1))
    for mft in (plain, held):
        chosen, rejected = (mft.model.train()(batch(6)["input_ids"] + k).logits for k in (0, -1))
        loss = -nn.functional.logsigmoid(chosen[:, 1] - rejected[:, 1]).mean()
        (loss + mft.penalty()).backward()
    for with_it, without in zip(held.scores, plain.scores, strict=True):
        pull = (with_it.grad - without.grad) / L1
        assert torch.allclose(pull, with_it.sign(), atol=1e-3)


def loop(mft, loss_of, count=6):
    """Backward passes of a loss; the warnings of the penalty."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(count):
            loss_of(mft.model).backward()
    return [str(one.message) for one in said if "penalty" in str(one.message)]


def preference(model):
    ids = batch()["input_ids"]
    return -nn.functional.logsigmoid(model(ids).logits[:, 1] - model(ids - 1).logits[:, 1]).mean()


@pytest.mark.parametrize(
    "loss_of, mode",
    [
        (preference, True),
        (lambda model: model(**batch()).loss, False),  # in evaluation mode
        (lambda model: model.bert(batch()["input_ids"])[1].sum(), True),  # a part of the model
    ],
    ids=["two passes", "evaluation mode", "a part"],
)
def test_a_loop_without_the_penalty_is_warned_once(loss_of, mode):
    mft = MFT(bert().train(mode), config(l1=L1))
    said = loop(mft, loss_of)
    assert len(said) == 1 and "mft.penalty()" in said[0]


class TwoTowers(nn.Module):
    """Two stacks of layers, of which only the second is used."""

    def __init__(self):
        super().__init__()
        self.query, self.document = Stack(), Stack()

    def forward(self, inputs):
        return self.document(inputs)


def test_a_penalty_is_missed_also_where_the_first_weights_are_not_used():
    said = loop(MFT(TwoTowers().train(), config(l1=L1)), lambda m: m(torch.ones(2, 8)).sum())
    assert len(said) == 1


class Pair(NamedTuple):
    loss: Any
    other: Any = None


@dataclass(frozen=True)
class Fixed:
    loss: Any


@dataclass
class Open:
    loss: Any


class Slots:
    __slots__ = ("loss",)

    def __init__(self, loss):
        self.loss = loss


class Returns(Stack):
    """A stack that returns its loss in some form."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, inputs):
        return self.form(super().forward(inputs).sum())


FORMS = {
    "NamedTuple": (Pair, lambda output: output.loss),
    "frozen": (Fixed, lambda output: output.loss),
    "attribute": (Open, lambda output: output.loss),
    "slots": (Slots, lambda output: output.loss),
    "dict": (lambda loss: {"loss": loss}, lambda output: output["loss"]),
    "tuple": (lambda loss: (loss, None), lambda output: output[0]),
    "tensor": (lambda loss: loss, lambda output: output),
}


@pytest.mark.parametrize("form, take", FORMS.values(), ids=FORMS)
def test_a_loss_in_any_form_has_the_penalty_or_a_warning(form, take):
    mft = MFT(Returns(form).train(), config(l1=L1))
    twin = MFT(Returns(form).train(), config())
    inputs = torch.ones(2, 8)
    added = take(mft.model(inputs)) - take(twin.model(inputs))
    said = loop(mft, lambda model: take(model(inputs)))
    if said:
        assert added == 0 and len(said) == 1 and form not in (Pair, Open, Slots)
    else:
        assert torch.isclose(added, mft.penalty(), rtol=1e-3) and added > 0


def test_evaluation_has_no_penalty_and_no_warning():
    mft = MFT(bert(), config(l1=L1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            with torch.no_grad():
                given = mft.model(**batch()).loss
    assert torch.equal(given, by_hand(bert(), of_scores(mft))(**batch()).loss)
    assert copy.deepcopy(mft.model)(**batch()).loss == given
