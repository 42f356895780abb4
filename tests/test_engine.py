"""A masked model is still a model: copies, dtypes, compilers, loops, processes, checkpoints."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from mft_nb.bitmask import magnitude_mask, random_mask, top_k_mask
from mft_nb.data import load_snippets
from mft_nb.mask import MFT, MaskConfig, plain_state_dict
from mft_nb.model import load_classifier, maskable_weights
from mft_nb.selection import scoped_mask

ROOT = Path(__file__).resolve().parent.parent
CONFIG = MaskConfig(layers="all", start="normal", keep=0.8)


def tiny_bert(dropout=0.0):
    """A classifier with random weights, the same each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=50, num_hidden_layers=3, num_labels=2, **sizes, **rates)
    return BertForSequenceClassification(config).eval()


def batch(rows=6, seed=1):
    """Token ids and labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(5, 50, (rows, 7), generator=generator),
        "labels": torch.randint(0, 2, (rows,), generator=generator),
    }


def expected(mft):
    """The mask that the present scores ask for, found by a plain search."""
    ranked = dict(zip(mft.base_weights(), mft.scores, strict=True))
    return top_k_mask(ranked, mft.config.keep, mft.config.scope)


def train_steps(mft, steps=3, model=None, accumulate=1, context=None):
    """Some steps of AdamW in plain PyTorch, each on the same six rows."""
    optimizer = torch.optim.AdamW(mft.trainable, lr=0.02, weight_decay=0)
    inputs = batch()
    for _ in range(steps):
        for part in range(accumulate):
            size = 6 // accumulate
            rows = {k: v[part * size : (part + 1) * size] for k, v in inputs.items()}
            with context or torch.enable_grad():
                loss = (mft.model if model is None else model)(**rows).loss / accumulate
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def share_of_bits(first, second):
    """Share of the bits in which two masks differ."""
    return (first ^ second).kept / first.total


@pytest.fixture(scope="module")
def trained():
    """Three plain steps: what every other way of training is compared with."""
    mft = MFT(tiny_bert(), CONFIG)
    first = mft.bitmask()
    train_steps(mft)
    assert share_of_bits(first, mft.bitmask()) > 0.01, "too little moved to test anything"
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


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_a_copy_lives_on_when_the_other_is_unwrapped(leave):
    mft = MFT(tiny_bert(), CONFIG)
    twin = copy.deepcopy(mft)
    logits = mft.model(**batch()).logits
    getattr(mft, leave)()
    assert torch.equal(twin.model(**batch()).logits, logits)
    base = twin.unload().state_dict()
    assert all(torch.equal(base[name], t) for name, t in tiny_bert().state_dict().items())


def test_save_pretrained_writes_a_plain_model_with_masked_weights(trained, tmp_path):
    trained.model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(tiny_bert().state_dict())
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    mask = trained.bitmask()
    for name, weight in trained.base_weights().items():
        assert torch.equal(loaded.get_parameter(name), torch.where(mask[name], weight, 0))
    assert torch.equal(loaded(**batch()).logits, trained.model(**batch()).logits)
    plain = plain_state_dict(trained.model)
    assert all(torch.equal(plain[name], t) for name, t in loaded.state_dict().items())


def test_unloaded_model_saves_itself_as_ever(tmp_path):
    model = tiny_bert()
    own = type(model)
    mft = MFT(model, CONFIG)
    assert type(model) is not own and type(model).__name__ == own.__name__
    mft.unload()
    assert type(model) is own
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "config.json").exists()


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
    plain, compiled = MFT(tiny_bert(), CONFIG), MFT(tiny_bert(), CONFIG)
    fast = torch.compile(compiled.model, backend="aot_eager")
    train_steps(plain)
    train_steps(compiled, model=fast)
    assert compiled.bitmask() == expected(compiled)
    assert share_of_bits(plain.bitmask(), compiled.bitmask()) < 0.002
    with torch.no_grad():
        assert torch.allclose(fast(**batch()).logits, compiled.model(**batch()).logits, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_mask(trained, reentrant):
    mft = MFT(tiny_bert(), CONFIG)
    mft.model.train()
    mft.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        mft.model.enable_input_require_grads()
    train_steps(mft)
    assert mft.bitmask() == trained.bitmask()


def test_bfloat16_autocast_trains_float32_scores(trained):
    mft = MFT(tiny_bert(), CONFIG)
    train_steps(mft, context=torch.autocast("cpu", torch.bfloat16))
    assert all(score.dtype == torch.float32 for score in mft.scores)
    assert mft.bitmask() == expected(mft)
    assert 0 < share_of_bits(mft.bitmask(), trained.bitmask()) < 0.05


def test_gradient_accumulation_is_one_step(trained):
    mft = MFT(tiny_bert(), CONFIG)
    train_steps(mft, accumulate=2)
    one = mft.model.bert.encoder.layer[0].attention.self.query.parametrizations.weight[0]
    assert one.group.finder.calls == 3  # for three steps of two backward passes each
    assert share_of_bits(mft.bitmask(), trained.bitmask()) < 0.002


def test_inference_mode_before_training_does_no_harm(trained):
    mft = MFT(tiny_bert(), CONFIG)
    with torch.inference_mode():
        mft.model(**batch())
    train_steps(mft)
    assert mft.bitmask() == trained.bitmask()


def test_schedule_closes_in_on_keep():
    config = MaskConfig(layers="all", keep=0.5, schedule=[(0, 1.0), (4, 0.5)])
    mft = MFT(tiny_bert(), config)
    densities = [mft.bitmask().density]
    for _ in range(5):
        train_steps(mft, 1)
        densities.append(mft.bitmask().density)
    assert np.allclose(densities, [1, 0.875, 0.75, 0.625, 0.5, 0.5], atol=1e-3)
    resumed = MFT(tiny_bert(), config)
    resumed.load_state_dict(mft.state_dict())
    assert resumed.bitmask() == mft.bitmask()


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
    other = MFT(tiny_bert(), replace(CONFIG, **change, start_seed=1))
    before = other.bitmask()
    with pytest.raises(ValueError, match=expected):
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other.bitmask() == before


def test_a_state_from_before_settings_were_in_it_loads():
    source, other = MFT(tiny_bert(), CONFIG), MFT(tiny_bert(), replace(CONFIG, start_seed=1))
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
    config = MaskConfig(layers="all", scope=scope, keep=0.5, start="normal", spread=0.002)
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


def test_head_scope_cuts_the_whole_head():
    """With a head cut, its value weights no longer matter."""
    mft = MFT(tiny_bert(), MaskConfig(layers=[1], scope="head", keep=0.5))
    name, mask = next(iter(mft.bitmask().items()))
    cut = next(head for head in range(4) if not mask[0, 8 * head])
    value = mft.model.bert.encoder.layer[1].attention.self.value.weight
    before = mft.model(**batch()).logits
    with torch.no_grad():
        value[8 * cut : 8 * cut + 8] += 1.0
    assert torch.allclose(mft.model(**batch()).logits, before, atol=1e-6)


def test_gpt2_neurons_are_columns():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    mft = MFT(GPT2LMHeadModel(sizes), MaskConfig(layers="all", scope="neuron", keep=0.5))
    for mask in mft.bitmask().values():
        assert (mask.all(0) | ~mask.any(0)).all()


class Rows(torch.utils.data.Dataset):
    """Rows for transformers.Trainer."""

    def __init__(self, count=48):
        self.rows = batch(count, seed=3)

    def __len__(self):
        return len(self.rows["labels"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.rows.items()}


def trainer_for(model, folder, **options):
    """transformers.Trainer with nothing but a model."""
    from transformers import Trainer, TrainingArguments

    settings = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 0.02}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), **(settings | options))
    return Trainer(model=model, args=arguments, train_dataset=Rows())


def test_a_plain_trainer_needs_only_the_model(tmp_path):
    mft = MFT(tiny_bert(dropout=0.1), CONFIG)
    base = {name: weight.clone() for name, weight in mft.base_weights().items()}
    first = mft.bitmask()
    trainer_for(mft.model, tmp_path).train()
    assert mft.bitmask() == expected(mft) and mft.bitmask() != first
    assert all(torch.equal(weight, base[name]) for name, weight in mft.base_weights().items())


def test_checkpoints_hold_scores_only_and_resume_is_exact(tmp_path):
    whole = MFT(tiny_bert(dropout=0.1), CONFIG)
    trainer_for(whole.model, tmp_path / "whole").train()
    folder = tmp_path / "cut"
    first = MFT(tiny_bert(dropout=0.1), CONFIG)
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer_for(first.model, folder, **options).train()
    with safe_open(folder / "checkpoint-4" / "model.safetensors", "pt") as saved:
        assert sorted(saved.keys()) == sorted(first.state_dict().keys() - {"mask_settings"})
        assert all(name.endswith("scores") for name in saved.keys())
    resumed = MFT(tiny_bert(dropout=0.1), CONFIG)
    trainer = trainer_for(resumed.model, folder, **options)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert resumed.bitmask() == whole.bitmask()
    assert all(torch.equal(a, b) for a, b in zip(resumed.scores, whole.scores, strict=True))


def test_a_killed_run_resumes_to_the_identical_mask(tmp_path):
    run = [sys.executable, "-m", "tests.scores_run", str(tmp_path)]
    slow = subprocess.Popen([*run, "slow"], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("run/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and slow.poll() is None
        time.sleep(0.05)
    os.killpg(slow.pid, signal.SIGKILL)
    slow.wait()
    assert not (tmp_path / "scores.pt").exists()
    subprocess.run([*run, "resume"], cwd=ROOT, check=True, timeout=300)
    subprocess.run([*run, "whole"], cwd=ROOT, check=True, timeout=300)
    resumed, whole = (torch.load(tmp_path / f"{name}.pt") for name in ("resume", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


def test_two_processes_end_with_the_same_mask(tmp_path):
    """By `accelerate launch`, which needs mpirun for several CPU processes, and by torchrun."""
    (tmp_path / "hosts").write_text("localhost\n")
    options = ["--mpirun_hostfile", str(tmp_path / "hosts"), "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    ways = {
        "alone": [*torchrun, "1"],
        "torchrun": [*torchrun, "2"],
        "accelerate": [*accelerate, "--num_processes", "2"],
    }
    script = ROOT / "tests" / "two_processes.py"
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # mpirun
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    masks = {}
    for way, launch in ways.items():
        folder = tmp_path / way
        folder.mkdir()
        rows = 12 if way == "alone" else 6
        done = subprocess.run(
            [*launch, str(script), str(folder), str(rows)],
            env=os.environ | settings | {"PATH": tools},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        masks[way] = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
    (alone,), (first, second) = masks["alone"], masks["accelerate"]
    for other in (second, *masks["torchrun"]):
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    different = sum(int((first[name] ^ alone[name]).sum()) for name in first)
    total = sum(mask.numel() for mask in first.values())
    moved = json.loads((tmp_path / "alone" / "moved.json").read_text())
    assert (
        different / total < 0.002 < moved / total
    )  # reduction order alone, against all that moved


def test_a_decoder_with_tied_words_trains_and_saves(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=3, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    mft = MFT(LlamaForCausalLM(config), CONFIG)
    inputs = batch()["input_ids"]
    mft.model(input_ids=inputs, labels=inputs).loss.backward()
    mft.model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=inputs).logits, mft.model(input_ids=inputs).logits)


def test_a_module_trained_along_is_saved_and_taken_back(tmp_path):
    config = MaskConfig(layers="all", start="normal", modules_to_save=["classifier"])
    mft = MFT(tiny_bert(), config)
    train_steps(mft)
    base = tiny_bert()
    assert not torch.equal(mft.model.classifier.weight, base.classifier.weight)
    mft.save_pretrained(tmp_path)
    loaded = MFT.from_pretrained(base, tmp_path)
    assert torch.equal(loaded.model(**batch()).logits, mft.model(**batch()).logits)
    state = loaded.unload().state_dict()
    assert all(torch.equal(state[name], t) for name, t in tiny_bert().state_dict().items())
    (tmp_path / "modules.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="does not belong to the mask"):
        MFT.from_pretrained(tiny_bert(), tmp_path)


def test_a_mask_is_refused_where_two_places_share_a_weight(tmp_path):
    shared = nn.Linear(4, 4)
    apart = nn.Sequential(copy.deepcopy(shared), nn.Tanh(), copy.deepcopy(shared))
    MFT(apart, MaskConfig(layers=[0], keep=0.5)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one tensor with '2.weight'"):
        MFT.from_pretrained(nn.Sequential(shared, nn.Tanh(), shared), tmp_path)


def test_a_model_under_a_switch_is_refused():
    from mft_nb.switch import MaskSwitch

    model = tiny_bert()
    mft = MFT(model, CONFIG)
    mask = mft.bitmask()
    mft.unload()
    switch = MaskSwitch(model)
    switch.add("one", mask)
    switch.use("one")
    with pytest.raises(ValueError, match=r"Call model.mask_switch.use\(None\) first"):
        MFT(model, CONFIG)
    switch.use(None)
    assert MFT(model, CONFIG).bitmask() == mask


def test_layers_named_by_a_word_compete_as_layers():
    blocks = {f"layer_{i}": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for i in range(3)}
    mft = MFT(nn.ModuleDict(blocks), MaskConfig(layers="all", scope="layer", keep=0.5))
    cut = {}
    for name, mask in mft.bitmask().items():
        cut[name.split(".")[0]] = cut.get(name.split(".")[0], 0) + int((~mask).sum())
    assert cut == {"layer_0": 16, "layer_1": 16, "layer_2": 16}


@pytest.mark.parametrize("scope, keep", [("tensor", 0.9), ("2:4", 0.5), ("neuron", 0.75)])
def test_a_mask_of_magnitudes_is_where_training_starts(scope, keep):
    mft = MFT(tiny_bert(), MaskConfig(scope=scope, keep=keep, start="magnitude"))
    sizes = {name: weight.detach().abs() for name, weight in mft.base_weights().items()}
    assert scoped_mask(sizes, keep, scope) == mft.bitmask()


def test_magnitude_and_random_masks_by_layer():
    weights = maskable_weights(tiny_bert(), layers="all")
    for mask in (magnitude_mask(weights, 0.7, "layer"), random_mask(weights, 0.7, scope="layer")):
        assert list(mask) == list(weights)
        assert len(set(mask.density_by_tensor().values())) > 3
        assert all(abs(share - 0.7) < 1e-4 for share in mask.density_by_layer().values())


def test_training_in_bfloat16_keeps_scores_in_float32_and_evaluates_as_before():
    model, tokenizer = load_classifier("minilm")
    rows = load_snippets()["train"].select(range(16))
    losses = {}
    for precision in ("float32", "bfloat16"):
        mft = MFT(model, MaskConfig(precision=precision, epochs=1.0, batch_size=8))
        losses[precision] = np.array(mft.fit(tokenizer, rows, progress=False).loss)[:, 1]
        assert {scores.dtype for scores in mft.scores} == {torch.float32}
        assert not torch.is_autocast_enabled("cpu")
        mft.unload()
    assert (losses["float32"] != losses["bfloat16"]).any()
    assert np.allclose(losses["float32"], losses["bfloat16"], atol=1e-2)
    with pytest.raises(ValueError, match="precision is 'half'; allowed are float32, bfloat16"):
        MaskConfig(precision="half")
