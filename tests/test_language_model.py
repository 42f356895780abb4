"""A masked decoder generates, trains and keeps activations as an unmasked one does."""

import importlib.util
import sys

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from mft_nb.activations import keep_activations
from mft_nb.config import MaskConfig
from mft_nb.mask import MFT
from mft_nb.model import fetch_model
from mft_nb.survey import lowest_layer
from tests.models import CONFIG, batch, difference, expected, tiny_llama


def decoder():
    """A tiny LLaMA with grouped heads, whose answers differ from prompt to prompt."""
    model = tiny_llama(num_key_value_heads=1, tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def rows():
    """Six prompts with the loss on their last two tokens."""
    ids = batch()["input_ids"]
    labels = ids.clone()
    labels[:, :-2] = -100
    return {"input_ids": ids, "labels": labels}


def step(mft, **options):
    """One step of training on the rows; the loss."""
    optimizer = torch.optim.AdamW(mft.scores, lr=0.02, weight_decay=0)
    loss = mft.model(**rows(), **options).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def answers(model, use_cache=True, padded=False):
    """Eight greedy tokens for each prompt; some prompts are shorter and padded on the left."""
    ids = batch()["input_ids"]
    attention = torch.ones_like(ids)
    if padded:
        attention[::2, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs = {"input_ids": ids, "attention_mask": attention}
    return model.generate(**inputs, **options, use_cache=use_cache)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_greedy_answers_are_those_without_a_cache_and_those_of_the_merged_model(padded):
    mft = MFT(decoder(), CONFIG)
    step(mft)
    cached = answers(mft.model, padded=padded)
    assert cached == answers(mft.model, use_cache=False, padded=padded)
    assert cached != answers(decoder(), padded=padded), "the mask changes no answer"
    assert len({tuple(answer) for answer in cached}) > 1
    assert cached == answers(mft.merge_and_unload(), padded=padded)


def test_scores_that_change_between_two_generations_change_the_answers():
    mft = MFT(decoder(), CONFIG)
    before = answers(mft.model)
    for score in mft.scores:
        score.data.neg_()
    assert before != answers(mft.model) == answers(mft.model, use_cache=False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_decoder_gives_the_same_mask(reentrant):
    plain, mft = MFT(decoder(), CONFIG), MFT(decoder(), CONFIG)
    first = mft.bitmask()
    model = mft.model.train()  # transformers 5 has a new name for it
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        mft.model.enable_input_require_grads()
    for _ in range(2):
        assert step(mft, use_cache=False) == pytest.approx(step(plain), rel=1e-6)
        for one, other in zip(mft.scores, plain.scores, strict=True):
            assert torch.equal(one.grad, other.grad)
            one.grad = other.grad = None
    assert mft.bitmask() == plain.bitmask() == expected(mft) != first


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_a_decoder_in_bfloat16_trains_float32_scores(way):
    plain, mft = MFT(decoder(), CONFIG), MFT(decoder(), CONFIG)
    if way == "weights":
        mft.model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss = step(mft)
    assert loss == pytest.approx(step(plain), rel=0.02)
    assert {score.dtype for score in mft.scores} == {torch.float32}
    assert {score.grad.dtype for score in mft.scores} == {torch.float32}
    assert mft.bitmask() == expected(mft)
    assert 0 < difference(mft.bitmask(), plain.bitmask()) < 0.1
    assert answers(mft.model) == answers(mft.model, use_cache=False)


def test_kept_activations_of_a_decoder_change_nothing(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(fetch_model("minilm"))
    mft = MFT(decoder(), MaskConfig(layers=[1, 2], init="normal"))
    model, first = mft.model, lowest_layer(mft.base_weights())
    lists = {name: values.tolist() for name, values in rows().items()}
    for values in lists.values():
        values[0] = values[0][-5:]  # a shorter one, which is padded
    tokens = Dataset.from_dict(lists)
    kept = keep_activations(model, tokenizer, tokens, first, folder=tmp_path, progress=False)
    pad = DataCollatorForSeq2Seq(tokenizer)
    runs, found = [], []
    inner = model.model.layers[0].self_attn.q_proj
    counter = inner.register_forward_hook(lambda *_: runs.append(1))
    for collate in (pad, kept.collator(pad)):
        runs.clear()
        with kept.skipping(model):
            for inputs in DataLoader(list(tokens), batch_size=3, collate_fn=collate):
                model(**inputs).loss.backward()
        found.append((len(runs), [score.grad.clone() for score in mft.scores]))
        model.zero_grad()
    counter.remove()
    (usual_runs, usual), (kept_runs, skipped) = found
    assert (usual_runs, kept_runs) == (2, 0)
    for one, other in zip(usual, skipped, strict=True):
        assert one.abs().max() > 0
        assert (one - other).abs().max() < 1e-4 * one.abs().max()
    with kept.skipping(model):  # generation has no kept activations: all layers run
        inside = answers(model)
    assert inside == answers(model)


def test_a_packed_model_without_its_extra_names_it_before_any_download(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "gguf" and find(name))
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(ImportError, match="smollm2 needs gguf.*Install the extra 'lm'"):
        fetch_model("smollm2", folder=tmp_path)
    assert not [*tmp_path.iterdir()]
