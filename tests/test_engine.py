"""A masked model is still a model: copies, dtypes, compilers, loops, processes, checkpoints."""

import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
)

from mft_nb.bitmask import BitMask, top_k_mask
from mft_nb.mask import MFT, MaskConfig
from mft_nb.model import fetch_model
from mft_nb.study.datasets import load_snippets
from mft_nb.switch import MaskSwitch
from mft_nb.train import TrainConfig, fit
from mft_nb.trainer import MaskTrainer
from tests import scores_run
from tests.forks import FORKS
from tests.models import (
    CONFIG,
    batch,
    copied_state,
    difference,
    expected,
    same_state,
    tiny_bert,
    tiny_gpt2_config,
    tiny_llama,
    train_steps,
    trainer_for,
)
from tests.two_processes import by_accelerate, by_torchrun, train_epochs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in one order, as in the processes that are compared with this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained():
    """Three plain steps: what every other way of training is compared with."""
    mft = MFT(tiny_bert(), CONFIG)
    first = mft.bitmask()
    train_steps(mft)
    assert difference(first, mft.bitmask()) > 0.01, "too little moved to test anything"
    assert mft.bitmask() == expected(mft)
    return mft


def test_a_deep_copy_goes_its_own_way(trained):
    twin = copy.deepcopy(trained)
    kept = trained.bitmask()
    assert twin.bitmask() == kept
    train_steps(twin, 1)
    assert twin.bitmask() != kept and trained.bitmask() == kept
    model = copy.deepcopy(trained.model)
    assert torch.equal(model(**batch()).logits, trained.model(**batch()).logits)


@pytest.mark.parametrize("way", ["fused", "SGD"])
def test_the_mask_follows_scores_that_other_optimizers_write(way):
    mft = MFT(tiny_bert(), CONFIG)
    first = mft.bitmask()
    fused = torch.optim.AdamW(mft.scores, lr=0.05, fused=True)
    optimizer = fused if way == "fused" else torch.optim.SGD(mft.scores, lr=50.0)
    mft.model.train()(**batch()).loss.backward()
    optimizer.step()
    assert mft.bitmask() == expected(mft)
    assert mft.bitmask() != first


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_a_copy_lives_on_when_the_other_is_unwrapped(leave):
    mft = MFT(tiny_bert(), CONFIG)
    twin = copy.deepcopy(mft)
    logits = mft.model(**batch()).logits
    getattr(mft, leave)()
    assert torch.equal(twin.model(**batch()).logits, logits)
    assert same_state(twin.unload(), tiny_bert().state_dict())


@pytest.mark.parametrize("way", ["model.save_pretrained", "save_model"])
def test_a_masked_model_is_saved_as_a_plain_one(way, trained, tmp_path):
    scores = trained.state_dict().keys() - {"mask_settings"}
    if way == "save_model":
        trained.save_model(tmp_path)
    else:
        trained.model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
    assert names == {*tiny_bert().state_dict(), *(() if way == "save_model" else scores)}
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    mask = trained.bitmask()
    for name, weight in trained.base_weights().items():
        assert torch.equal(loaded.get_parameter(name), torch.where(mask[name], weight, 0))
    assert torch.equal(loaded(**batch()).logits, trained.model(**batch()).logits)
    plain = trained.plain_state_dict()
    assert plain.keys() == loaded.state_dict().keys()
    assert all(torch.equal(plain[name], t) for name, t in loaded.state_dict().items())


def test_a_model_keeps_its_class_and_saves_itself_as_ever_after_unload(tmp_path):
    model = tiny_bert()
    own = type(model)
    mft = MFT(model, CONFIG)
    assert type(model) is own
    mft.unload()
    assert type(model) is own and not model._forward_hooks and not model._forward_pre_hooks
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert same_state(own.from_pretrained(tmp_path / "checkpoint-1"), tiny_bert().state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_keeps_scores_and_mask(dtype):
    mft = MFT(tiny_bert(), CONFIG)
    kept, scores = mft.bitmask(), [score.detach().clone() for score in mft.scores]
    mft.model.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(scores, mft.scores, strict=True))
    assert mft.bitmask() == kept
    effective = mft.model.bert.encoder.layer[0].intermediate.dense.weight
    assert effective.dtype == dtype
    mft.model(**batch()).loss.backward()
    assert all(score.grad.dtype == torch.float32 for score in mft.scores)
    assert torch.equal(
        mft.merge_and_unload().bert.encoder.layer[0].intermediate.dense.weight, effective
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_move_to_a_gpu_and_back_keeps_the_mask():
    mft = MFT(tiny_bert(), CONFIG)
    kept = mft.bitmask()
    mft.model.to("cuda")
    assert mft.bitmask() == kept
    mft.model(**{name: value.cuda() for name, value in batch().items()}).loss.backward()
    mft.model.to("cpu")
    assert mft.bitmask() == kept


def test_compiled_model_follows_the_mask():
    plain, compiled = (MFT(tiny_bert(num_hidden_layers=1), CONFIG) for _ in range(2))
    fast = torch.compile(compiled.model, backend="aot_eager")
    train_steps(plain)
    train_steps(compiled, model=fast)
    assert compiled.bitmask() == expected(compiled)
    assert difference(plain.bitmask(), compiled.bitmask()) < 0.002
    with torch.no_grad():
        assert torch.allclose(fast(**batch()).logits, compiled.model(**batch()).logits, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_mask(trained, reentrant):
    mft = MFT(tiny_bert(), CONFIG)
    mft.model.train()
    model = mft.model  # transformers 5 has a new name for it
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        mft.model.enable_input_require_grads()
    train_steps(mft)
    assert mft.bitmask() == trained.bitmask()


def test_bfloat16_autocast_trains_float32_scores(trained):
    mft = MFT(tiny_bert(), CONFIG)
    train_steps(mft, context=torch.autocast("cpu", torch.bfloat16))
    assert all(score.dtype == torch.float32 for score in mft.scores)
    assert mft.bitmask() == expected(mft)
    assert 0 < difference(mft.bitmask(), trained.bitmask()) < 0.05


def finders(mft):
    """What finds the masks of each matrix, and counts how."""
    return [m.parametrizations.weight[0].group.finder for m in mft._modules.values()]


def test_gradient_accumulation_is_one_step_and_the_mask_is_proved_not_searched_again(trained):
    mft = MFT(tiny_bert(), CONFIG)
    before = [(one.calls, one.proved) for one in finders(mft)]
    train_steps(mft, accumulate=2)
    for one, (calls, proved) in zip(finders(mft), before, strict=True):
        assert one.calls - calls == 6  # for three steps of two forward passes each
        assert one.proved - proved >= 3  # the second pass of a step sees the scores of the first
    assert difference(mft.bitmask(), trained.bitmask()) < 0.002


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_writes_that_no_version_counter_sees_are_seen(scope, tmp_path):
    mft = MFT(tiny_bert(), replace(CONFIG, scope=scope))
    before = mft.bitmask()
    average = [score.detach().clone().neg() for score in mft.scores]
    mft.model(**batch())
    for score, other in zip(mft.scores, average, strict=True):
        score.data.copy_(other)  # as a moving average is put in for an evaluation
    logits = mft.model(**batch()).logits
    assert mft.bitmask() == expected(mft) != before
    mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(tiny_bert(), tmp_path)
    assert loaded.bitmask() == mft.bitmask()
    assert torch.equal(loaded.model(**batch()).logits, logits)
    for score, other in zip(mft.scores, average, strict=True):
        score.data = -other  # another tensor
    mft.model(**batch())
    assert mft.bitmask() == before


def test_inference_mode_before_training_does_no_harm(trained):
    mft = MFT(tiny_bert(), CONFIG)
    with torch.inference_mode():
        mft.model(**batch())
    train_steps(mft)
    assert mft.bitmask() == trained.bitmask()


SCHEDULE = MaskConfig(layers="all", keep=0.5, schedule=[(0, 1.0), (4, 0.5)])
DENSITIES = [1, 0.875, 0.75, 0.625, 0.5, 0.5]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedule_closes_in_on_keep(accumulate):
    mft = MFT(tiny_bert(), SCHEDULE)
    densities = [mft.bitmask().density]
    for _ in range(5):
        train_steps(mft, 1, accumulate=accumulate)
        densities.append(mft.bitmask().density)
        with torch.no_grad():
            mft.model(**batch())  # is no step
    assert np.allclose(densities, DENSITIES, atol=1e-3)
    resumed = MFT(tiny_bert(), SCHEDULE)
    resumed.load_state_dict(mft.state_dict())
    assert resumed.bitmask() == mft.bitmask()


def own_write(scores):
    for score in scores:
        score.data.sub_(0.02 * score.grad.sign())


@pytest.mark.parametrize("clear", ["before forward", "before backward", "after step", "to zero"])
@pytest.mark.parametrize("own", [False, True], ids=["torch's optimizer", "one of our own"])
def test_a_schedule_counts_steps_of_any_loop_and_of_no_other_model(clear, own):
    mft, other = MFT(tiny_bert(), SCHEDULE), MFT(tiny_bert(), SCHEDULE)
    optimizer = torch.optim.AdamW(mft.trainable, lr=0.02, weight_decay=0)
    densities = []
    for _ in range(6):
        densities.append(mft.bitmask().density)
        if clear == "before forward":
            optimizer.zero_grad()
        loss = mft.model(**batch()).loss
        if clear == "before backward":
            optimizer.zero_grad()
        loss.backward()
        own_write(mft.scores) if own else optimizer.step()
        if clear in ("after step", "to zero"):
            optimizer.zero_grad(set_to_none=clear == "after step")
    assert np.allclose(densities, DENSITIES, atol=1e-3)
    assert other.bitmask().density == 1.0


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"keep": 0.7}, "keep is 0.8 in the state and 0.7 in this MFT"),
        ({"scope": "global"}, "scope is 'tensor' in the state and 'global' in this MFT"),
        ({"ranking": "absolute"}, "ranking is 'signed' in the state and 'absolute'"),
    ],
    ids=str,
)
def test_a_state_with_other_settings_is_refused(change, expected, tmp_path):
    torch.save(MFT(tiny_bert(), CONFIG).state_dict(), tmp_path / "state.pt")
    other = MFT(tiny_bert(), replace(CONFIG, **change, init_seed=1))
    before = other.bitmask()
    with pytest.raises(ValueError, match=expected):
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other.bitmask() == before


def test_a_state_from_before_settings_were_in_it_loads():
    source, other = MFT(tiny_bert(), CONFIG), MFT(tiny_bert(), replace(CONFIG, init_seed=1))
    old = {name: t for name, t in source.state_dict().items() if name.endswith("scores")}
    assert len(old) == len(source.scores)
    other.load_state_dict(old)
    assert other.bitmask() == source.bitmask()


def test_swapped_arguments_are_named(tmp_path):
    first = r"is a torch.nn.Module, and it is the first argument: MFT\(model, config\)"
    with pytest.raises(TypeError, match="model is a MaskConfig; allowed " + first):
        MFT(CONFIG, tiny_bert())
    with pytest.raises(TypeError, match="model is a PosixPath; allowed " + first):
        MFT.from_pretrained(tmp_path, tiny_bert())
    with pytest.raises(TypeError, match="folder is a MaskConfig; allowed is the path"):
        MFT.from_pretrained(tiny_bert(), CONFIG)


def test_a_schedule_that_was_not_reached_is_warned_of(tmp_path):
    mft = MFT(tiny_bert(), MaskConfig(layers="all", keep=0.5, schedule=[(0, 1.0), (300, 0.5)]))
    train_steps(mft, 1)
    with pytest.warns(UserWarning, match="not come that far"):
        mft.save_pretrained(tmp_path)


@pytest.mark.parametrize("scope", ["layer", "global", "2:4", "neuron", "head"])
def test_other_scopes_train_save_and_merge(scope, tmp_path):
    config = MaskConfig(layers="all", scope=scope, keep=0.5, init="normal", init_scale=0.002)
    mft = MFT(tiny_bert(), config)
    first = mft.bitmask()
    train_steps(mft, 5)
    mask = mft.bitmask()
    assert mask != first
    assert mask.density == 0.5
    if scope == "head":
        assert all(name.endswith("attention.output.dense.weight") for name in mask)
        assert all(m.view(32, 4, 8).all(2).all(0).sum() == 2 for m in mask.values())
    if scope == "neuron":
        assert all((m.all(1) | ~m.any(1)).all() for m in mask.values())
    if scope == "2:4":
        assert all((m.view(-1, 4).sum(1) == 2).all() for m in mask.values())
    mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(tiny_bert(), tmp_path)
    logits = mft.model(**batch()).logits
    assert loaded.bitmask() == mask
    assert torch.equal(loaded.model(**batch()).logits, logits)
    assert torch.equal(mft.merge_and_unload()(**batch()).logits, logits)


def test_head_scope_prunes_the_whole_head():
    """With a head pruned, its value weights no longer matter."""
    mft = MFT(tiny_bert(), MaskConfig(layers=[1], scope="head", keep=0.5))
    name, mask = next(iter(mft.bitmask().items()))
    pruned = next(head for head in range(4) if not mask[0, 8 * head])
    value = mft.model.bert.encoder.layer[1].attention.self.value.weight
    before = mft.model(**batch()).logits
    with torch.no_grad():
        value[8 * pruned : 8 * pruned + 8] += 1.0
    assert torch.allclose(mft.model(**batch()).logits, before, atol=1e-6)


def test_gpt2_neurons_are_columns():
    model = GPT2LMHeadModel(tiny_gpt2_config())
    mft = MFT(model, MaskConfig(layers="all", scope="neuron", keep=0.5))
    for mask in mft.bitmask().values():
        assert (mask.all(0) | ~mask.any(0)).all()


def test_a_plain_trainer_needs_only_the_model(tmp_path):
    mft = MFT(tiny_bert(dropout=0.1), CONFIG)
    base = {name: weight.clone() for name, weight in mft.base_weights().items()}
    first = mft.bitmask()
    trainer_for(mft.model, tmp_path).train()
    assert mft.bitmask() == expected(mft) and mft.bitmask() != first
    assert all(torch.equal(weight, base[name]) for name, weight in mft.base_weights().items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The scores after twelve steps of a Trainer in one go."""
    mft = MFT(tiny_bert(dropout=0.1), CONFIG)
    trainer_for(mft.model, tmp_path_factory.mktemp("whole")).train()
    return mft


@pytest.mark.parametrize("kind", [Trainer, MaskTrainer])
def test_a_resume_from_a_checkpoint_is_exact(kind, uninterrupted, tmp_path):
    first = MFT(tiny_bert(dropout=0.1), CONFIG)
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer_for(first.model, tmp_path, kind, **options).train()
    with safe_open(tmp_path / "checkpoint-4" / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
    trained = first.state_dict().keys() - {"mask_settings"}
    assert all(name.endswith("scores") for name in trained)
    assert names == (trained if kind is MaskTrainer else trained | set(first.plain_state_dict()))
    resumed = MFT(tiny_bert(dropout=0.1), CONFIG)
    trainer = trainer_for(resumed.model, tmp_path, kind, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.bitmask() == uninterrupted.bitmask()
    pairs = zip(resumed.scores, uninterrupted.scores, strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    mask = resumed.bitmask()
    trainer.save_model(tmp_path / "model")  # what a Trainer saves in the end is the whole model
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    for name, weight in resumed.base_weights().items():
        assert torch.equal(loaded.get_parameter(name), torch.where(mask[name], weight, 0))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda state: state, "comes without scores"),
        (lambda state: {n: t + 1 for n, t in state.items()}, "is not the weight that the mask"),
    ],
    ids=["plain", "other base"],
)
def test_a_state_that_is_no_masked_models_is_refused(spoil, said):
    mft = MFT(tiny_bert(), CONFIG)
    kept = mft.bitmask()
    with pytest.raises(RuntimeError, match=said):
        mft.model.load_state_dict(spoil(tiny_bert().state_dict()), strict=False)
    assert mft.bitmask() == kept


def test_a_killed_run_resumes_to_the_identical_mask(uninterrupted, tmp_path):
    slow = FORKS.Process(target=scores_run.train, args=(tmp_path, True))
    slow.start()
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("run/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and slow.is_alive()
        time.sleep(0.05)
    slow.kill()
    slow.join()
    assert not (tmp_path / "scores.pt").exists()
    resumed = FORKS.Process(target=scores_run.train, args=(tmp_path, False))
    resumed.start()
    resumed.join(timeout=300)
    assert resumed.exitcode == 0
    pairs = zip(torch.load(tmp_path / "scores.pt"), uninterrupted.scores, strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_two_processes_end_with_the_same_mask(tmp_path):
    masks = []
    for launch in (by_torchrun, by_accelerate):
        folder = tmp_path / launch.__name__
        folder.mkdir()
        process = FORKS.Process(target=launch, args=(folder,))
        process.start()
        process.join(timeout=280)
        assert process.exitcode == 0
        masks += [BitMask(torch.load(folder / f"{rank}.pt")) for rank in (0, 1)]
    assert all(mask == masks[0] for mask in masks)
    alone = MFT(tiny_bert(), CONFIG)
    first = alone.bitmask()
    train_epochs(alone, 12)
    # the order of a sum alone, against all that moved
    moved = difference(alone.bitmask(), first)
    assert difference(masks[0], alone.bitmask()) < 0.002 < moved


def test_a_decoder_with_tied_words_trains_and_saves(tmp_path):
    mft = MFT(tiny_llama(tie_word_embeddings=True), CONFIG)
    inputs = batch()["input_ids"]
    mft.model(input_ids=inputs, labels=inputs).loss.backward()
    for way, save in {"own": mft.model.save_pretrained, "plain": mft.save_model}.items():
        save(tmp_path / way)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / way)
        assert torch.equal(loaded(input_ids=inputs).logits, mft.model(input_ids=inputs).logits)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_module_trained_with_the_mask_is_saved_and_taken_back(by_hand, tmp_path):
    config = MaskConfig(layers="all", init="normal", modules_to_save=["classifier"])
    mft = MFT(tiny_bert(), CONFIG if by_hand else config)
    if by_hand:
        mft.model.classifier.requires_grad_(True)
        mft.model(**batch())  # from here on it is known
    assert len(mft.trainable) == len(mft.scores) + 2
    train_steps(mft)
    base = tiny_bert()
    assert not torch.equal(mft.model.classifier.weight, base.classifier.weight)
    mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(base, tmp_path)
    assert torch.equal(loaded.model(**batch()).logits, mft.model(**batch()).logits)
    assert same_state(loaded.unload(), tiny_bert().state_dict())
    (tmp_path / "modules.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="does not belong to the mask"):
        MFT.from_pretrained(tiny_bert(), tmp_path)
    assert same_state(mft.unload(), tiny_bert().state_dict())


def test_a_mask_is_refused_where_two_places_share_a_weight(tmp_path):
    shared = nn.Linear(4, 4)
    apart = nn.Sequential(copy.deepcopy(shared), nn.Tanh(), copy.deepcopy(shared))
    MFT(apart, MaskConfig(layers=[0], keep=0.5)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one tensor with '2.weight'"):
        MFT.from_pretrained(nn.Sequential(shared, nn.Tanh(), shared), tmp_path)


def test_a_model_under_a_switch_is_refused():
    model = tiny_bert()
    mft = MFT(model, CONFIG)
    mask = mft.bitmask()
    mft.unload()
    switch = MaskSwitch(model)
    switch.add("one", mask)
    switch.use("one")
    with pytest.raises(ValueError, match=r"MaskSwitch.of\(model\).use\(None\) first"):
        MFT(model, CONFIG)
    switch.use(None)
    assert MFT(model, CONFIG).bitmask() == mask


@pytest.mark.parametrize("scope, keep", [("tensor", 0.9), ("2:4", 0.5), ("neuron", 0.75)])
def test_a_mask_of_magnitudes_is_where_training_starts(scope, keep):
    mft = MFT(tiny_bert(), MaskConfig(scope=scope, keep=keep, init="magnitude"))
    sizes = {name: weight.detach().abs() for name, weight in mft.base_weights().items()}
    assert top_k_mask(sizes, keep, scope) == mft.bitmask()


def test_training_in_bfloat16_keeps_scores_in_float32_and_evaluates_as_before():
    tokenizer = AutoTokenizer.from_pretrained(fetch_model("minilm"))
    rows = load_snippets()["train"].select(range(16))
    losses, trained, before = {}, {}, copied_state(tiny_bert(vocab_size=len(tokenizer)))
    for precision in ("float32", "bfloat16"):
        mft = MFT(tiny_bert(vocab_size=len(tokenizer)), MaskConfig())
        config = TrainConfig(precision=precision, epochs=1.0, batch_size=8)
        losses[precision] = np.array(fit(mft, tokenizer, rows, config, progress=False).loss)[:, 1]
        assert {scores.dtype for scores in mft.scores} == {torch.float32}
        trained[precision] = torch.cat([scores.detach().flatten() for scores in mft.scores])
        assert not torch.is_autocast_enabled("cpu")
        assert same_state(mft.unload(), before)
    assert not torch.equal(trained["float32"], trained["bfloat16"])
    assert np.allclose(losses["float32"], losses["bfloat16"], atol=1e-2)
    with pytest.raises(ValueError, match="precision is 'half'; allowed are float32, bfloat16"):
        TrainConfig(precision="half")
