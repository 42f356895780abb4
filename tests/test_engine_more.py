"""The engine where several things meet: penalties and accumulation, heads, wrappers, warnings."""

import copy
import pickle
import shutil
import warnings

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import GPT2ForSequenceClassification, TrainerCallback

from mft_nb.bitmask import BitMask, magnitude_mask, random_mask
from mft_nb.mask import MASK_FILE, MFT, MaskConfig
from mft_nb.mask_file import load_mask, mask_sha256
from mft_nb.scores import MaskedWeight, ScoreGroup
from mft_nb.targets import maskable_weights
from tests.models import (
    batch,
    tiny_bart,
    tiny_bert,
    tiny_gpt2_config,
    tiny_llama,
    train_steps,
    trainer_for,
)


class Gradients(TrainerCallback):
    """Keeps the scores' gradient as the optimizer gets it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_the_penalty_counts_once_a_step_however_the_step_is_split(make, tmp_path):
    language = make is tiny_llama
    rows = [
        {"input_ids": [5, 6, 7, 8 + row], "labels": [5, 6, 7, 8] if language else row % 2}
        for row in range(8)
    ]
    pulls = []
    for l1, parts in ((0.0, 1), (0.0, 4), (0.5, 1), (0.5, 4)):
        mft = MFT(make(), MaskConfig(layers="all", l1=l1))
        seen = Gradients()
        options = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        options |= {"max_steps": 1, "max_grad_norm": 0.0, "remove_unused_columns": True}
        data = Dataset.from_list(rows)
        trainer_for(mft.model, tmp_path, rows=data, callbacks=[seen], **options).train()
        pulls.append((l1, parts, seen.found))
    task = {parts: found for l1, parts, found in pulls if not l1}
    for l1, parts, found in pulls:
        if l1:
            assert torch.allclose((found - task[parts]).abs(), torch.tensor(l1), atol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_penalty_is_the_sum_or_the_mean_over_all_scores(reduction):
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    mft = MFT(model, MaskConfig(layers="all", l1=0.5, l1_reduction=reduction))
    with torch.no_grad():
        mft.scores[0].copy_(torch.tensor([[1.0, -2.0, 3.0], [0.0, 1.0, -1.0]]))
        mft.scores[1].copy_(torch.tensor([[-4.0, 4.0]]))
    mft.penalty().backward()
    size = 0.5 if reduction == "sum" else 0.5 / 8  # of each score's gradient
    assert mft.penalty().item() == pytest.approx(size * 16)
    assert torch.allclose(mft.scores[0].grad, size * mft.scores[0].sign())
    assert torch.allclose(mft.scores[1].grad, size * mft.scores[1].sign())


def test_a_loss_in_a_plain_dict_gets_its_penalty():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return {"loss": x.sum() * 0.0}

    model = Wrapped()
    mft = MFT(model, MaskConfig(layers="all", l1=0.1))
    model.train()
    assert model(torch.ones(1, 4))["loss"].item() == pytest.approx(mft.penalty().item())
    model.eval()
    assert model(torch.ones(1, 4))["loss"].item() == 0.0


def test_head_scope_stays_inside_the_layers_and_takes_each_stack_by_its_own_heads():
    model = tiny_bart(decoder_attention_heads=4)
    mft = MFT(model, MaskConfig(layers="all", scope="head", keep=0.5))
    names = list(mft.base_weights())
    assert names and all(".layers." in name for name in names)
    for name, scores in zip(names, mft.scores, strict=True):
        assert scores.numel() == (4 if "decoder" in name else 2), name


@pytest.mark.parametrize("scope", ["2:4", "head", "neuron"])
def test_scopes_on_conv1d_count_along_the_inputs(scope):
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(tiny_gpt2_config())
    mft = MFT(model, MaskConfig(layers="all", scope=scope, keep=0.5))
    for name, mask in mft.bitmask().items():  # (in, out)
        if scope == "2:4":
            assert (mask.reshape(-1, 4, mask.shape[1]).sum(1) == 2).all(), name
        elif scope == "head":
            assert (mask.all(1) | ~mask.any(1)).all(), name
            assert mask[:8].any() != mask[8:].any(), name
        else:
            assert (mask.all(0) | ~mask.any(0)).all(), name


@pytest.mark.parametrize("scope", ["2:4", "tensor", "global"])
@pytest.mark.parametrize("width", [4, 64])  # torch sorts long rows by another algorithm
def test_of_equal_scores_the_first_stay(scope, width):
    config = MaskConfig(layers="all", scope=scope, keep=0.5, init="ones")
    mask = MFT(nn.Sequential(nn.Linear(width, 4)), config).bitmask()["0.weight"]
    groups = mask.reshape(-1, 4) if scope == "2:4" else mask.reshape(1, -1)
    half = groups.shape[1] // 2
    assert groups[:, :half].all() and not groups[:, half:].any()


def test_layers_are_found_inside_an_outer_sequential():
    plain = MFT(tiny_bert(), MaskConfig(layers="all", scope="layer", keep=0.5)).bitmask()
    inside = nn.Sequential(tiny_bert(), nn.Identity())
    wrapped = MFT(inside, MaskConfig(layers="all", scope="layer", keep=0.5)).bitmask()
    assert wrapped == BitMask({f"0.{name}": mask for name, mask in plain.items()})
    assert wrapped.density_by_layer() == plain.density_by_layer()
    assert len(plain.density_by_layer()) == 3


def test_two_stacks_are_two_groups_of_layers():
    mask = MFT(tiny_bart(), MaskConfig(layers="all", keep=0.5)).bitmask()
    layers = mask.density_by_layer()
    assert len(layers) == 4 and all(isinstance(name, str) for name in layers)


def test_a_model_without_save_pretrained_is_told_what_to_save(tmp_path):
    mft = MFT(nn.Sequential(nn.Linear(4, 4)), MaskConfig(layers="all", keep=0.5))
    with pytest.raises(TypeError, match=r"Sequential has no save_pretrained.*plain_state_dict"):
        mft.save_model(tmp_path)
    assert list(mft.plain_state_dict()) == ["0.bias", "0.weight"]


def test_layers_named_by_a_word_compete_as_layers():
    blocks = {f"layer_{i}": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for i in range(3)}
    mft = MFT(nn.ModuleDict(blocks), MaskConfig(layers="all", scope="layer", keep=0.5))
    pruned = {}
    for name, mask in mft.bitmask().items():
        pruned[name.split(".")[0]] = pruned.get(name.split(".")[0], 0) + int((~mask).sum())
    assert pruned == {"layer_0": 16, "layer_1": 16, "layer_2": 16}


def test_magnitude_and_random_masks_by_layer():
    weights = maskable_weights(tiny_bert(), layers="all")
    for mask in (magnitude_mask(weights, 0.7, "layer"), random_mask(weights, 0.7, scope="layer")):
        assert list(mask) == list(weights)
        assert len(set(mask.density_by_tensor().values())) > 3
        assert all(abs(density - 0.7) < 1e-4 for density in mask.density_by_layer().values())


def test_equal_masks_are_equal_in_any_order():
    first = BitMask({"a": torch.tensor([True, False]), "b": torch.tensor([True])})
    second = BitMask({"b": torch.tensor([True]), "a": torch.tensor([True, False])})
    assert first == second and mask_sha256(first) == mask_sha256(second)
    assert first & second == second & first
    assert first != BitMask({"a": torch.tensor([True, False])})


def test_nan_is_named_in_scores_and_weights():
    mft = MFT(tiny_bert(), MaskConfig(layers="all", scope="global"))
    names = list(mft.base_weights())
    with torch.no_grad():
        mft.scores[7][0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"The scores of {names[7]}: 1 of .* scores are NaN"):
        mft.model(**batch())
    model = tiny_bert()
    with torch.no_grad():
        model.get_parameter(names[3])[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"The weight '{names[3]}' holds NaN"):
        MFT(model, MaskConfig(layers="all"))


@pytest.mark.filterwarnings("ignore:The mask leaves neurons without any weight")
@pytest.mark.parametrize("scope", ["tensor", "neuron", "global"])
def test_a_matrix_that_is_pruned_whole_is_allowed_and_warned_of(scope):
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 10, bias=False))
    mft = MFT(model, MaskConfig(layers="all", scope=scope, keep=0.2, exclude_modules=()))
    with torch.no_grad():
        mft.scores[0].fill_(-1.0)
    with pytest.warns(UserWarning, match="The mask prunes all of 0.weight"):
        model = mft.merge_and_unload()
    assert not model[0].weight.any() and model[1].weight.count_nonzero() == 2


@pytest.mark.parametrize("keep, kept", [(1.0, 2), (0.5, 1)])
def test_units_that_a_fraction_cannot_part_are_refused(keep, kept):
    config = MaskConfig(layers="all", scope="neuron", keep=keep)
    mask = MFT(nn.Sequential(nn.Linear(3, 2)), config).bitmask()["0.weight"]
    assert mask.all(1).sum() == kept
    with pytest.raises(ValueError, match="keeps all 2 units of 0.weight. Give 0.5 or less"):
        MFT(nn.Sequential(nn.Linear(3, 2)), MaskConfig(layers="all", scope="neuron", keep=0.9))


def test_save_pretrained_takes_its_arguments_by_place(tmp_path):
    mft = MFT(tiny_bert(), MaskConfig(layers="all"))
    mft.model.save_pretrained(tmp_path / "own", True)
    mft.save_model(tmp_path / "plain", max_shard_size="20KB")
    assert (tmp_path / "own" / "model.safetensors").exists()
    assert (tmp_path / "plain" / "model.safetensors.index.json").exists()


def test_a_pickle_is_no_mask_file_and_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for write in (lambda p: p.write_bytes(pickle.dumps(Trap())), lambda p: torch.save(Trap(), p)):
        write(tmp_path / MASK_FILE)
        with pytest.raises(ValueError, match="is no mask file|is damaged|not a mask file"):
            load_mask(tmp_path / MASK_FILE)
    assert not (tmp_path / "sprung").exists()


SCHEDULE = MaskConfig(layers="all", keep=0.5, schedule=[(0, 1.0), (4, 0.5)])


@pytest.mark.parametrize("rates", [[0.02] * 4, [0, 0, 0.02, 0.02]], ids=["constant", "warm-up"])
def test_a_schedule_counts_steps_that_leave_scores_as_they_are(rates):
    """The first neuron is dead, so its scores never move; in a warm-up from 0 none does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.constant_(model[0].bias[:1], -100.0)
    mft, rows = MFT(model, SCHEDULE), torch.randn(16, 64)
    optimizer = torch.optim.AdamW(mft.trainable, weight_decay=0)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        loss = model(rows).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model(rows).sum()
    optimizer.zero_grad()
    assert mft.bitmask().density_by_tensor() == {"0.weight": 0.5, "2.weight": 0.5}


@pytest.mark.parametrize("rate", [0.0625, 0.25])  # with 0.25 the scores change places
def test_a_schedule_sees_a_step_whose_changes_cancel(rate):
    group = ScoreGroup(keep=0.5, schedule=((0, 1.0), (1, 0.5)))
    masked = MaskedWeight(torch.tensor([[1.5, 1.25]]), group)
    masked(torch.tensor([[1.0, -1.0]])).sum().backward()
    torch.optim.SGD([masked.scores], lr=rate).step()
    assert masked.mask.sum() == 1 and masked.steps == 1


def test_a_copy_knows_the_steps_of_a_schedule():
    mft = MFT(tiny_bert(), SCHEDULE)
    train_steps(mft, 2)
    twin = copy.deepcopy(mft)
    assert twin.bitmask() == mft.bitmask()
    assert twin.bitmask().density == pytest.approx(0.75, abs=1e-3)


def in_one_graph(model, path):
    torch._dynamo.reset()
    torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 8))


ASKED = {
    "pickle": lambda model, path: pickle.dumps(model),
    "torch.save": lambda model, path: torch.save(model, path),
    "export": lambda model, path: torch.export.export(model, (torch.ones(2, 8),)),
    "one graph": in_one_graph,
    "trace": lambda model, path: torch.jit.trace(model, torch.ones(2, 8)),
    "script": lambda model, path: torch.jit.script(model),
}


def plain_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("ask", ASKED)
def test_what_torch_cannot_do_with_scores_names_the_next_step_and_works_after_it(ask, tmp_path):
    mft = MFT(plain_layers(), MaskConfig(layers="all", keep=0.5))
    mft.save_pretrained(tmp_path)
    logits = mft.model(torch.ones(2, 8))
    with pytest.raises(Exception, match=r"merge_and_unload\(\)"):
        ASKED[ask](mft.model, tmp_path / "model.pt")
    assert torch.equal(mft.model(torch.ones(2, 8)), logits), "the refusal did no harm"
    loaded = MFT.from_pretrained(plain_layers(), tmp_path)
    for model in (loaded.model, mft.merge_and_unload()):
        ASKED[ask](model, tmp_path / "model.pt")
        assert torch.equal(model(torch.ones(2, 8)), logits)
    assert torch.equal(pickle.loads(pickle.dumps(loaded.model))(torch.ones(2, 8)), logits)


def test_torch_func_is_right_or_refused():
    mft, rows = MFT(plain_layers(), MaskConfig(layers="all", keep=0.5)), torch.randn(4, 8)
    call, scores = torch.func.functional_call, {n: -t for n, t in mft.state_dict().items()}
    scores.pop("mask_settings")
    with pytest.raises(RuntimeError, match=r"merge_and_unload\(\)"):
        torch.func.grad(lambda own: call(mft.model, own, (rows,)).sum())(scores)
    with pytest.raises(RuntimeError, match=r"merge_and_unload\(\)"):
        torch.func.jacrev(mft.model)(rows[0])
    assert torch.allclose(torch.func.vmap(mft.model)(rows), mft.model(rows), atol=1e-6)
    swapped = call(mft.model, scores, (rows,))
    assert not torch.allclose(swapped, mft.model(rows))
    with torch.no_grad():
        torch._foreach_neg_(mft.scores)
    assert torch.equal(swapped, mft.model(rows))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch's default compiler needs g++")
def test_a_mask_under_the_default_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = MaskConfig(layers="all", keep=0.5, target_modules=("query", "intermediate"))
    mft = MFT(tiny_bert(num_hidden_layers=1), config)
    compiled = torch.compile(mft.model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        first = compiled(**batch()).logits
        assert torch.allclose(first, mft.model(**batch()).logits, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
        torch._foreach_neg_(mft.scores)
        assert not torch.allclose(mft.model(**batch()).logits, first, atol=1e-4)
        assert torch.allclose(compiled(**batch()).logits, mft.model(**batch()).logits, atol=1e-5)
        for scores in mft.scores:
            scores.data.neg_()  # as a moving average writes, which no version counter sees
        assert torch.allclose(compiled(**batch()).logits, first, atol=1e-5)


def test_each_argument_of_the_wrong_type_is_told_what_is_right_for_it():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"a MaskConfig, such as MaskConfig\(keep=0.8\)\."):
        MFT(model, {"keep": 0.8})
    with pytest.raises(TypeError, match=r"a BitMask, such as what bitmask\(\) gives\."):
        MFT(model, None, torch.ones(2, 2))


def test_of_many_scores_that_differ_the_first_is_named():
    parts = {f"part{number:02}": nn.Linear(2, 2) for number in range(40)}
    mft = MFT(nn.ModuleDict(parts), MaskConfig(layers="all", keep=0.5))
    with pytest.raises(ValueError, match=r"differ in 'part00\."):
        mft.load_state_dict({})


def test_of_many_modules_that_differ_the_first_is_named(tmp_path):
    heads = [nn.Linear(2, 2) for _ in range(39)]
    body = nn.Linear(2, 2)
    config = MaskConfig(layers=[0], keep=0.5, modules_to_save=[r"^[1-9]"])
    MFT(nn.Sequential(copy.deepcopy(body), *heads), config).save_pretrained(tmp_path)
    wider = [nn.Linear(2, 3) for _ in range(39)]
    with pytest.raises(ValueError, match=r"differ in '1\.bias'"):
        MFT.from_pretrained(nn.Sequential(body, *wider), tmp_path)
