"""Kept activations change what is computed, not what comes out, on any family that takes them."""

import gc
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    T5Config,
    T5ForTokenClassification,
    TrainerCallback,
)

from mft_nb.activations import keep_activations, kept_files, remove_activations
from mft_nb.config import MaskConfig
from mft_nb.freeze import dropout_rates
from mft_nb.mask import MFT
from mft_nb.model import load_classifier
from mft_nb.study.datasets import load_snippets
from mft_nb.survey import lowest_layer
from mft_nb.targets import maskable_weights
from mft_nb.train import TrainConfig, fit, predict, train

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4}
SMALL |= {"intermediate_size": 32, "vocab_size": 30600, "pad_token_id": 0}
FAMILIES = {
    "distilbert": DistilBertConfig(
        dim=16, n_heads=2, n_layers=4, hidden_dim=32, vocab_size=30600, pad_token_id=0
    ),
    "gpt2": GPT2Config(n_embd=16, n_head=2, n_layer=4, vocab_size=30600, pad_token_id=0),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1),
    "modernbert": ModernBertConfig(**SMALL, global_attn_every_n_layers=2, local_attention=4),
    "mpnet": MPNetConfig(**SMALL),
    "deberta": DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"]),
}


@pytest.fixture(scope="module")
def minilm():
    return load_classifier("minilm")


@pytest.fixture(scope="module")
def rows():
    return load_snippets()["train"].select(range(48))


def family(name):
    """A small random model; its weights are large enough for its outputs to differ."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(FAMILIES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


def masked(model):
    """The MFT of a model, and its first masked layer."""
    mft = MFT(model, MaskConfig(init="normal"))
    return mft, lowest_layer(mft.base_weights())


def traces(model):
    """What a context might leave behind: own attributes and hooks of every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return {
        name: (
            sorted(vars(module)),
            vars(module).get("forward"),
            module.training,
            [len(getattr(module, hook)) for hook in hooks],
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_same_logits_and_gradients_on_every_family(name, minilm, rows, tmp_path):
    tokenizer, model = minilm[1], family(name)
    mft, first = masked(model)
    usual = predict(model, tokenizer, rows)
    before = traces(model)
    kept = keep_activations(model, tokenizer, rows, first, folder=tmp_path, progress=False)
    skipped = predict(model, tokenizer, rows, activations=kept)
    assert np.abs(usual - skipped).max() < 1e-5 * max(1, np.abs(usual).max())
    assert usual.std(axis=0).min() > 1e-3, "all rows look the same, so this tests nothing"

    pad = DataCollatorWithPadding(tokenizer)
    features = [tokenizer(sentence) for sentence in rows["sentence"][:8]]
    gradients = []
    for collate in (pad, kept.collator(pad)):
        with kept.skipping(model):
            batch = collate([{"input_ids": f["input_ids"]} for f in features])
            model(**batch).logits[:, 0].sum().backward()
        gradients.append([score.grad.clone() for score in mft.scores])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        assert (one - other).abs().max() < 1e-4 * one.abs().max()
    assert traces(model) == before


def fit_steps(model, tokenizer, rows, kept_in=None, max_steps=6, **options):
    """Some steps of MFT, with kept activations where a folder for them is given."""
    config = TrainConfig(learning_rate=1e-2, batch_size=8, max_steps=max_steps, max_grad_norm=0.0)
    mft, first = masked(model)
    kept = None
    if kept_in:
        look = options.get("validation")
        sources = [rows] if look is None else [rows, look]
        kept = keep_activations(model, tokenizer, sources, first, folder=kept_in, progress=False)
    history = fit(mft, tokenizer, rows, config, activations=kept, progress=False, **options)
    return mft, history


def test_training_minilm_learns_the_same_mask(rows, tmp_path):
    untrained, _ = masked(load_classifier("minilm")[0])
    start = untrained.bitmask()
    usual, usual_history = fit_steps(*load_classifier("minilm"), rows, max_steps=6)
    skipped, history = fit_steps(*load_classifier("minilm"), rows, tmp_path, max_steps=6)
    moved = sum((start[n] ^ usual.bitmask()[n]).sum().item() for n in start)
    apart = sum((skipped.bitmask()[n] ^ usual.bitmask()[n]).sum().item() for n in start)
    assert moved > 10_000
    assert apart < 1e-3 * moved
    for zero, one, other in zip(untrained.scores, usual.scores, skipped.scores, strict=True):
        assert (one - other).abs().mean() < 1e-2 * (one - zero).abs().mean()
    for one, other in zip(history.loss, usual_history.loss, strict=True):
        assert one[0] == other[0] and abs(one[1] - other[1]) < 1e-4


class Crash(TrainerCallback):
    """Stops a run after its eighth step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 8:
            raise KeyboardInterrupt


def test_a_training_with_kept_activations_resumes(minilm, rows, tmp_path):
    look = load_snippets()["validation"].select(range(16))
    options = {"validation": look, "eval_every": 6, "max_steps": 12}
    whole, history = fit_steps(family("gpt2"), minilm[1], rows, tmp_path, **options)
    folder = tmp_path / "unfinished"
    options |= {"folder": folder, "save_every": 3}
    with pytest.raises(KeyboardInterrupt):
        fit_steps(family("gpt2"), minilm[1], rows, tmp_path, callbacks=(Crash(),), **options)
    with pytest.raises(ValueError, match="holds an unfinished run with other activations"):
        fit_steps(family("gpt2"), minilm[1], rows, None, **options)
    resumed, resumed_history = fit_steps(family("gpt2"), minilm[1], rows, tmp_path, **options)
    assert resumed.bitmask() == whole.bitmask()
    assert resumed_history == history


@pytest.fixture
def gpt2(minilm, rows, tmp_path):
    """A small masked model, its tokenizer, its first masked layer, and options to keep with."""
    mft, first = masked(family("gpt2"))
    options = {"folder": tmp_path / "kept", "progress": False}
    return SimpleNamespace(
        model=mft.model, tokenizer=minilm[1], first=first, options=options, rows=rows
    )


def keep(setting, **more):
    return keep_activations(
        setting.model, setting.tokenizer, setting.rows, setting.first, **setting.options | more
    )


def test_a_file_is_reused_whatever_the_order_and_made_anew_when_damaged(gpt2):
    kept = keep(gpt2)
    number = kept.path.stat().st_ino  # another one if the file were written anew
    gpt2.rows = gpt2.rows.select(range(len(gpt2.rows))[::-1])
    assert keep(gpt2).path.stat().st_ino == number
    with open(kept.path, "r+b") as file:
        file.truncate(100)
    assert keep(gpt2).path.stat().st_size > 100
    gpt2.model.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1
    assert keep(gpt2).path != kept.path


def test_an_interrupted_pass_leaves_nothing(gpt2, monkeypatch):
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    before = traces(gpt2.model)
    monkeypatch.setattr("mft_nb.activations._write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        keep(gpt2, batch_size=8)
    assert len(calls) == 3
    assert list(gpt2.options["folder"].iterdir()) == []
    assert traces(gpt2.model) == before


def test_too_small_a_disk_is_refused_before_the_pass(gpt2, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"need 0 MB, but .* has 0 MB free\. Free some space"):
        keep(gpt2)
    assert list(gpt2.options["folder"].iterdir()) == []


def test_an_error_within_leaves_the_model_as_it_was(gpt2):
    before = traces(gpt2.model)
    kept = keep(gpt2)
    batch = kept.collator(DataCollatorWithPadding(gpt2.tokenizer))(
        [{"input_ids": gpt2.tokenizer(gpt2.rows["sentence"][0])["input_ids"]}]
    )
    with pytest.raises(ValueError, match="Pad each batch with the collator"):
        with kept.skipping(gpt2.model):
            gpt2.model(**batch | {"kept_activations": batch["kept_activations"][:, 1:]})
    assert traces(gpt2.model) == before


def test_a_damaged_file_is_made_anew(gpt2):
    path = keep(gpt2).path
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 3] ^= 255
    path.write_bytes(damaged)
    assert keep(gpt2).path.read_bytes() == whole


def test_half_precision_is_kept_as_it_is(gpt2):
    digest = 32  # bytes
    full = keep(gpt2).path.stat().st_size - digest
    gpt2.model.to(torch.bfloat16)
    kept = keep(gpt2)
    assert (kept.path.stat().st_size - digest) * 2 == full
    assert kept._values.dtype == torch.bfloat16


def test_what_would_be_lost_is_refused(gpt2, minilm, tmp_path):
    kept = keep(gpt2)
    tokens = [{"input_ids": gpt2.tokenizer(text)["input_ids"]} for text in gpt2.rows["sentence"]]
    collate = kept.collator(DataCollatorWithPadding(gpt2.tokenizer))
    batch = next(iter(DataLoader(tokens, batch_size=4, collate_fn=collate)))
    gpt2.model.transformer.wte.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="wte.weight lies below transformer.h.1 and is trained"):
        with kept.skipping(gpt2.model):
            gpt2.model(**batch)
    gpt2.model.requires_grad_(False)
    gpt2.model.transformer.drop.p = 0.5
    with kept.skipping(gpt2.model):
        gpt2.model.eval()(**batch)  # drops nothing
        with pytest.raises(ValueError, match=r"transformer.drop.p is 0.5: dropout below"):
            gpt2.model.train()(**batch)
    gpt2.model.transformer.drop.p = 0.0
    gpt2.model.transformer.h[3].resid_dropout = 0.5  # above: its own affair
    with kept.skipping(gpt2.model):
        gpt2.model(**batch)


def test_rows_that_are_not_kept_are_refused_before_training(gpt2):
    mft_rows = load_snippets()["test"].select(range(8))
    kept = keep(gpt2)
    settings = TrainConfig.recipe("recommended")
    with pytest.raises(ValueError, match="activations does not hold all training rows"):
        train(gpt2.model, gpt2.tokenizer, mft_rows, settings, activations=kept, progress=False)


def test_left_padding_is_refused(gpt2):
    _, gpt2.tokenizer = load_classifier("minilm")
    gpt2.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="Set tokenizer.padding_side = 'right'"):
        keep(gpt2)


def test_models_whose_layers_cannot_be_left_out_are_refused(gpt2):
    shared = AlbertConfig(**SMALL, embedding_size=16, inner_group_num=2)
    gpt2.model = AutoModelForSequenceClassification.from_config(shared).requires_grad_(False)
    gpt2.first = "albert.encoder.albert_layer_groups.0.albert_layers.1"
    with pytest.raises(ValueError, match=r"\(AlbertLayer\) do not run once each, in order"):
        keep(gpt2)
    t5 = T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, vocab_size=30600, pad_token_id=0
    )
    gpt2.model = T5ForTokenClassification(t5).requires_grad_(False)
    names = maskable_weights(gpt2.model, layers=[1], exclude_modules=())
    gpt2.first = lowest_layer(names)
    with pytest.raises(ValueError, match="T5.*return more than hidden states|encoder-decoder"):
        keep(gpt2)


def test_dropout_that_stops_kept_activations_is_what_a_mask_silences():
    model = family("gpt2").requires_grad_(False)
    model.transformer.h[0].attn.attention_dropout = 0.3  # a setting, not a module
    found = [rate for module in model.modules() for rate in dropout_rates(module).values()]
    assert 0.3 in found and len(found) > 3
    tokenizer, rows = load_classifier("minilm")[1], load_snippets()["train"].select(range(8))
    with pytest.raises(ValueError, match="dropout below transformer.h.2 changes"):
        keep_activations(model, tokenizer, rows, "transformer.h.2", progress=False)
    mft = MFT(model, MaskConfig(layers=[2]))
    assert not any(dropout_rates(module) for module in model.modules())
    mft.unload()
    assert [r for module in model.modules() for r in dropout_rates(module).values()] == found


def test_no_rows_are_refused(gpt2):
    gpt2.rows = Dataset.from_dict({"sentence": []})
    with pytest.raises(ValueError, match="rows is empty"):
        keep(gpt2)


def kept_parts(gpt2, count, **options):
    """Activations of different rows, in the order in which they were used."""
    rows = load_snippets()["train"]
    for index in range(count):
        gpt2.rows = rows.select(range(8 * index, 8 * index + 8))
        one = keep(gpt2, **options)
        os.utime(one.path, (1000 + index, 1000 + index))
        yield one


def test_files_are_listed_and_removed_by_their_last_use(gpt2):
    kept = list(kept_parts(gpt2, 3))
    folder = kept[0].path.parent
    (folder / "notes.bin").write_text("not ours")
    assert kept_files(folder) == [one.path for one in kept]
    again = keep(gpt2)  # the last rows once more: its file is used now, not new
    assert again.path == kept[2].path and kept_files(folder)[-1] == again.path
    sizes = [one.path.stat().st_size for one in kept]
    assert f"the folder holds {sum(sizes) / 1e6:.1f} MB" in repr(again)
    assert remove_activations(folder, older_than=1) == sizes[0] + sizes[1]
    assert kept_files(folder) == [again.path]
    kept[1].collator(DataCollatorWithPadding(gpt2.tokenizer))  # what reads a file goes on
    assert kept[1]._values.isfinite().all()
    assert remove_activations(folder) == sizes[2]
    assert kept_files(folder) == [] and (folder / "notes.bin").exists()
    assert remove_activations(folder / "none") == 0


def test_a_limit_evicts_what_was_used_longest_ago_but_not_what_is_in_use(gpt2):
    first, second, third = kept_parts(gpt2, 3)
    folder, paths = first.path.parent, [one.path for one in (first, second, third)]
    total = sum(path.stat().st_size for path in paths)
    del second, third
    gc.collect()
    gpt2.rows = load_snippets()["train"].select(range(24, 32))
    room = total + 1
    with pytest.raises(ValueError, match="limit is 1 bytes, but the kept activations need"):
        keep(gpt2, limit=1)
    assert kept_files(folder) == paths  # a refusal deletes nothing
    fourth = keep(gpt2, limit=room)
    assert kept_files(folder)[0] == first.path  # the oldest, but in use
    assert not paths[1].exists() and fourth.path.exists()
    assert sum(path.stat().st_size for path in kept_files(folder)) <= room
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="allowed is a whole number of bytes"):
            keep(gpt2, limit=wrong)


def masked_below(model, **settings):
    """A mask on the lowest layer of a model, with scores of its own."""
    return MFT(model, MaskConfig(layers=[0], init="normal", **settings))


def test_activations_under_a_loaded_mask_are_not_those_under_another(gpt2, tmp_path):
    gpt2.first, models, kept = "transformer.h.2", [], []
    for seed in (0, 1):
        folder = tmp_path / f"mask{seed}"
        masked_below(family("gpt2"), keep=0.5, init_seed=seed).save_pretrained(folder)
        gpt2.model = MFT.from_pretrained(family("gpt2"), folder).model
        models.append(gpt2.model)
        kept.append(keep(gpt2))
    usual = [predict(model, gpt2.tokenizer, gpt2.rows) for model in models]
    assert np.abs(usual[0] - usual[1]).max() > 1e-2, "both masks do the same"
    assert kept[0].path != kept[1].path
    for one, other in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="weights below transformer.h.2 are not those"):
            predict(models[one], gpt2.tokenizer, gpt2.rows, activations=kept[other])
        skipped = predict(models[one], gpt2.tokenizer, gpt2.rows, activations=kept[one])
        assert np.abs(skipped - usual[one]).max() < 1e-5 * np.abs(usual[one]).max()
    again = MFT.from_pretrained(family("gpt2"), tmp_path / "mask0").model
    predict(again, gpt2.tokenizer, gpt2.rows, activations=kept[0])  # the same mask, loaded anew
    gpt2.model = family("gpt2").requires_grad_(False).eval()
    assert keep(gpt2, training=False).path not in (kept[0].path, kept[1].path)  # no mask


def test_activations_under_scores_depend_on_what_makes_the_mask(gpt2):
    gpt2.first, paths = "transformer.h.2", []
    for change in ({}, {"keep": 0.5}, {"scope": "global"}, {"ranking": "absolute"}):
        gpt2.model = masked_below(family("gpt2"), **change).model
        paths.append(keep(gpt2, training=False).path)
    assert len(set(paths)) == 4
    gpt2.model = masked_below(family("gpt2")).model
    assert keep(gpt2, training=False).path == paths[0]
