"""What people do with models of their own: what works, and what is refused with a next step."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    CanineConfig,
    CanineForSequenceClassification,
    CanineTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    Trainer,
)

from mft_nb.bitmask import random_mask
from mft_nb.evaluate import evaluate
from mft_nb.mask import MASK_FILE, MFT, MaskConfig
from mft_nb.mask_file import load_mask
from mft_nb.model import fetch_model, load_classifier
from mft_nb.study.datasets import load_snippets
from mft_nb.switch import MaskSwitch
from mft_nb.targets import maskable_weights
from mft_nb.train import TrainConfig, fit, predict
from tests.models import (
    CONFIG,
    batch,
    copied_state,
    same_state,
    tiny_bart,
    tiny_bert,
    train_steps,
    trainer_for,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(fetch_model("minilm"))


@pytest.fixture(scope="module")
def rows():
    return load_snippets()["train"].select(range(24))


def bert(**sizes):
    """A tiny classifier for MiniLM's tokenizer."""
    shape = {"vocab_size": 30522, "hidden_size": 16, "intermediate_size": 24}
    return tiny_bert(**shape | {"num_attention_heads": 2} | sizes)


def test_a_model_that_returns_more_than_logits_is_trained_and_measured(tokenizer, rows):
    bart = tiny_bart()
    bart.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    bart.config.eos_token_id = tokenizer.sep_token_id
    bart.config.max_position_embeddings = 32
    mft = MFT(bart, MaskConfig(layers="all"))
    config = TrainConfig(max_steps=2, batch_size=8, max_length=16)
    history = fit(mft, tokenizer, rows, config, validation=rows, eval_every=2, progress=False)
    assert [step for step, _ in history.validation] == [0, 2]
    assert predict(bart, tokenizer, rows, max_length=16).shape == (24, 2)


def test_predictions_are_the_logits_of_the_model(tokenizer, rows):
    model = bert(output_hidden_states=True)
    logits = predict(model, tokenizer, rows, batch_size=1)
    one = tokenizer(rows["sentence"][5], return_tensors="pt", truncation=True, max_length=128)
    with torch.no_grad():
        expected = model(**one).logits[0]
    assert torch.allclose(torch.tensor(logits[5]), expected, atol=1e-5)


def test_more_tokens_are_read_when_asked_for(tokenizer):
    word = "good "
    two = Dataset.from_dict({"sentence": [word * 150 + "bad", word * 150 + "fine"]})
    short = predict(bert(), tokenizer, two)
    long = predict(bert(), tokenizer, two, max_length=256)
    assert (short[0] == short[1]).all() and (long[0] != long[1]).any()


@pytest.mark.parametrize(
    "given, error, said",
    [
        (lambda rows: rows.to_pandas(), TypeError, "rows is a DataFrame; .*Dataset.from_pandas"),
        (lambda rows: rows.to_list(), TypeError, "rows is a list; .*Dataset.from_list"),
        (
            lambda rows: Dataset.from_dict({"sentence": ["a", None], "label": [0, 1]}),
            ValueError,
            "(the sentence None|no sentence) in row 2",
        ),
    ],
)
def test_rows_of_another_kind_are_refused(tokenizer, rows, given, error, said):
    with pytest.raises(error, match=said):
        predict(bert(), tokenizer, given(rows))
    with pytest.raises(error, match=said):
        fit(MFT(bert()), tokenizer, given(rows), progress=False)


def test_predict_reads_texts_alone(tokenizer, rows):
    named = rows.rename_column("sentence", "text").remove_columns("label")
    named = named.add_column("label", ["a name"] * len(rows))
    wanted = predict(bert(), tokenizer, rows)
    for given, task in ((named, None), (named, "classification"), (rows, "classification")):
        assert (predict(bert(), tokenizer, given, task=task) == wanted).all()
    bare = named.remove_columns("label")
    assert (predict(bert(), tokenizer, bare, task="classification") == wanted).all()
    with pytest.raises(ValueError, match="task is 'best'; allowed are classification"):
        predict(bert(), tokenizer, rows, task="best")
    with pytest.raises(ValueError, match="task is 'causal-lm', and the model has a head for"):
        predict(bert(), tokenizer, rows, task="causal-lm")


def test_a_classifier_without_a_token_to_fill_up_with_is_refused(tokenizer, rows):
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 30522}
    gpt2 = GPT2ForSequenceClassification(GPT2Config(**sizes))
    for ask in (predict, evaluate, lambda *given: fit(MFT(gpt2), *given[1:], progress=False)):
        with pytest.raises(ValueError, match="config has no pad_token_id, .* Set model.config.pad"):
            ask(gpt2, tokenizer, rows)
    assert predict(gpt2, tokenizer, rows.select([0])).shape == (1, 2)
    gpt2.config.pad_token_id = tokenizer.pad_token_id
    assert predict(gpt2, tokenizer, rows).shape == (24, 2)


def test_a_model_whose_embeddings_nobody_can_tell_is_measured():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"num_hash_buckets": 64, "max_position_embeddings": 64, "num_hidden_layers": 1}
    canine = CanineForSequenceClassification(CanineConfig(**sizes)).eval()
    two = Dataset.from_dict({"text": ["a fine film", "a dull one"], "label": [1, 0]})
    assert evaluate(canine, CanineTokenizer(), two, max_length=32)["accuracy"].shape == (2, 1)


def test_a_model_that_the_rows_do_not_fit_is_refused(tokenizer, rows):
    with pytest.raises(ValueError, match="The tokenizer gives the token .* embeddings for 100"):
        fit(MFT(bert(vocab_size=100)), tokenizer, rows, progress=False)
    with pytest.raises(ValueError, match="places for 8. Give max_length=8 or less"):
        predict(bert(max_position_embeddings=8), tokenizer, rows)
    assert predict(bert(max_position_embeddings=8), tokenizer, rows, max_length=8).shape == (24, 2)
    for numbers in ({"max_length": 0}, {"max_length": -5}, {"batch_size": 0}, {"batch_size": 1.5}):
        for ask in (predict, evaluate):
            with pytest.raises((TypeError, ValueError), match=f"{[*numbers][0]} is .*; allowed"):
                ask(bert(), tokenizer, rows, **numbers)
    headless = GPT2Model(GPT2Config(n_embd=16, n_layer=3, n_head=2))
    with pytest.raises(TypeError, match="model is a GPT2Model; .*loop of your own"):
        fit(MFT(headless), tokenizer, rows, progress=False)


class Weighted(Trainer):
    """Weighs the classes, so that the loss in the model's output is not used."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(**inputs)
        weights = torch.tensor([1.0, 3.0])
        loss = torch.nn.functional.cross_entropy(output.logits, inputs["labels"], weights)
        return (loss, output) if return_outputs else loss


def test_a_training_that_knows_nothing_of_the_penalty_is_warned_of_once(tmp_path):
    mft = MFT(tiny_bert(), MaskConfig(layers="all", l1=0.1))
    with pytest.warns(UserWarning, match=r"l1=0.1. had no part .*Add mft.penalty\(\)") as told:
        trainer_for(mft.model, tmp_path, Weighted, max_steps=6).train()
    assert sum("penalty" in str(one.message) for one in told) == 1
    with pytest.warns(UserWarning, match="the model is in evaluation mode"):
        train_steps(MFT(tiny_bert(), MaskConfig(layers="all", l1=0.1)), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        inputs = {"input_ids": batch()["input_ids"]}
        careful = MFT(tiny_bert().train(), MaskConfig(layers="all", l1=0.1))
        for _ in range(6):
            (careful.model(**inputs).logits.sum() + careful.penalty()).backward()
        evaluated = MFT(tiny_bert(), MaskConfig(layers="all", l1=0.1))
        for _ in range(6):
            evaluated.model(**inputs)
        trainer_for(MFT(tiny_bert(), CONFIG).model, tmp_path, Weighted, max_steps=4).train()


def test_an_adapter_is_to_be_merged_first():
    adapted = get_peft_model(bert(), LoraConfig(target_modules=["query", "value"]))
    with pytest.raises(ValueError, match="wrapped by an adapter .*merge_and_unload"):
        MFT(adapted)
    plain = adapted.merge_and_unload()
    mft = MFT(plain, CONFIG)
    train_steps(mft, 1)


@pytest.mark.parametrize("put_on", [get_peft_model, lambda model, lora: model.add_adapter(lora)])
@pytest.mark.parametrize("ask", ["forward", "bitmask", "state_dict", "unload", "merge_and_unload"])
def test_an_adapter_on_a_masked_model_is_refused_by_name(put_on, ask):
    model = tiny_bert()
    before = copied_state(model)
    mft = MFT(model, CONFIG)
    kept = mft.bitmask()
    adapted = put_on(model, LoraConfig(target_modules=["query", "value"])) or model
    said = "bert.encoder.layer.0.attention.self.query.* was wrapped.*merge_and_unload"
    with pytest.raises(RuntimeError, match=said):
        model(**batch()) if ask == "forward" else getattr(mft, ask)()
    if put_on is get_peft_model:  # what the message tells to do
        adapted.unload()
        assert mft.bitmask() == kept
        assert same_state(mft.unload(), before)


def test_a_masked_layer_that_was_replaced_is_refused_by_name():
    mft = MFT(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), CONFIG)
    mft.model[1] = torch.nn.Linear(4, 4)
    for ask in (lambda: mft.model(torch.ones(1, 4)), mft.unload, mft.merge_and_unload):
        with pytest.raises(RuntimeError, match="masked layer '1' was .*now Linear"):
            ask()


@pytest.mark.parametrize("unfrozen", [False, True])
def test_embeddings_that_were_resized_are_named_by_unload(unfrozen):
    model = tiny_bert()
    mft = MFT(model, CONFIG)
    model.get_input_embeddings().weight.requires_grad_(unfrozen)
    train_steps(mft, 1)
    model.resize_token_embeddings(60, mean_resizing=False)
    name = "bert.embeddings.word_embeddings.weight"
    if not unfrozen:
        with pytest.warns(UserWarning, match=f"{name} changed .* unload.. leaves such changes"):
            assert mft.unload().get_input_embeddings().num_embeddings == 60
        return
    with pytest.raises(ValueError, match=f"'{name}' had the shape .50, 32.*and has .60, 32. now"):
        mft.unload()
    mft.merge_and_unload()(**batch())


def test_a_known_name_that_is_a_folder_too_is_asked_about(tokenizer, tmp_path, monkeypatch):
    bert().save_pretrained(tmp_path / "minilm")
    tokenizer.save_pretrained(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Write ./minilm for the folder"):
        load_classifier("minilm")
    for mine in ("./minilm", tmp_path / "minilm"):
        assert load_classifier(mine)[0].config.hidden_size == 16


def test_weights_of_another_shape_say_so(tokenizer, tmp_path):
    bert().save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    config = tmp_path / "mine" / "config.json"
    text = config.read_text()
    assert '"hidden_size": 16' in text
    config.write_text(text.replace('"hidden_size": 16', '"hidden_size": 18'))
    with pytest.raises(FileNotFoundError, match="other shapes than its config.json says"):
        load_classifier(tmp_path / "mine")


def test_a_switch_leaves_no_module_behind(tmp_path):
    mft = MFT(bert(), MaskConfig(layers="all", modules_to_save=("classifier",)))
    mft.save_pretrained(tmp_path)
    switch = MaskSwitch(bert())
    with pytest.raises(ValueError, match="together with other modules .modules.safetensors"):
        switch.add("with head", tmp_path)
    switch.add("mask alone", load_mask(tmp_path / MASK_FILE).mask)
    assert switch.names == ["mask alone"]


def test_a_second_switch_does_not_take_a_masked_model_for_the_base():
    model = bert()
    before = copied_state(model)
    first = MaskSwitch(model)
    first.add("a", random_mask(maskable_weights(model), 0.9, seed=0))
    first.use("a")
    with pytest.raises(ValueError, match=r"mask 'a' is a MaskSwitch's; call MaskSwitch.of"):
        MaskSwitch(model)
    first.use(None)
    second = MaskSwitch(model)
    second.add("a", random_mask(maskable_weights(model), 0.8, seed=1))
    with second.using("a"), pytest.raises(ValueError, match="one MaskSwitch"):
        first.use("a")
    assert same_state(model, before)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="which is a file. Name a folder"):
        MFT(bert()).save_pretrained(tmp_path / "file")
    with_head = MFT(bert(), MaskConfig(modules_to_save=("classifier",)))
    with pytest.raises(ValueError, match="which is a file. Name a folder"):
        with_head.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
