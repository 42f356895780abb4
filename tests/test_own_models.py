"""What people do with models of their own: what works, and what is refused with a next step."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from mft_nb.bitmask import load_mask, random_mask
from mft_nb.data import load_snippets
from mft_nb.mask import MASK_FILE, MFT, MaskConfig
from mft_nb.model import load_classifier, maskable_weights
from mft_nb.switch import MaskSwitch
from mft_nb.train import predict
from tests.test_engine import batch, tiny_bert
from tests.test_engine_more import tiny_bart


@pytest.fixture(scope="module")
def tokenizer():
    return load_classifier("minilm")[1]


@pytest.fixture(scope="module")
def rows():
    return load_snippets()["train"].select(range(24))


def bert(**sizes):
    """A tiny classifier for MiniLM's tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3} | sizes
    return BertForSequenceClassification(BertConfig(num_attention_heads=2, **shape)).eval()


def test_a_model_that_returns_more_than_logits_is_trained_and_measured(tokenizer, rows):
    bart = tiny_bart()
    bart.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    bart.config.eos_token_id = tokenizer.sep_token_id
    bart.config.max_position_embeddings = 32
    mft = MFT(bart, MaskConfig(layers="all", batch_size=8, max_length=16))
    history = mft.fit(tokenizer, rows, max_steps=2, validation=rows, eval_every=2, progress=False)
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
            "the sentence None in row 1; allowed is text",
        ),
    ],
)
def test_rows_of_another_kind_are_refused(tokenizer, rows, given, error, said):
    with pytest.raises(error, match=said):
        predict(bert(), tokenizer, given(rows))
    with pytest.raises(error, match=said):
        MFT(bert()).fit(tokenizer, given(rows), progress=False)


def test_a_model_that_the_rows_do_not_fit_is_refused(tokenizer, rows):
    with pytest.raises(ValueError, match="The tokenizer gives the token .* embeddings for 100"):
        MFT(bert(vocab_size=100)).fit(tokenizer, rows, progress=False)
    with pytest.raises(ValueError, match="places for 8. Give max_length=8 or less"):
        predict(bert(max_position_embeddings=8), tokenizer, rows)
    assert predict(bert(max_position_embeddings=8), tokenizer, rows, max_length=8).shape == (24, 2)
    language = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2))
    with pytest.raises(TypeError, match="model is a GPT2LMHeadModel; .*loop of your own"):
        MFT(language).fit(tokenizer, rows, progress=False)


def test_a_training_that_knows_nothing_of_the_penalty_is_warned_of():
    mft = MFT(tiny_bert().train(), MaskConfig(layers="all", l1=0.1))
    inputs = {"input_ids": batch()["input_ids"]}
    with pytest.warns(UserWarning, match="l1. was not added. Add mft.penalty"):
        for _ in range(9):
            mft.model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        careful = MFT(tiny_bert().train(), MaskConfig(layers="all", l1=0.1))
        for _ in range(9):
            careful.model(**inputs).logits.sum() + careful.penalty()


def test_an_adapter_is_to_be_merged_first():
    adapted = get_peft_model(bert(), LoraConfig(target_modules=["query", "value"]))
    with pytest.raises(ValueError, match="wrapped by an adapter .*merge_and_unload"):
        MFT(adapted)


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
    with pytest.raises(ValueError, match="trained along with other modules .modules.safetensors"):
        switch.add("with head", tmp_path)
    switch.add("mask alone", load_mask(tmp_path / MASK_FILE).mask)
    assert switch.names == ["mask alone"]


def test_a_second_switch_does_not_take_a_masked_model_for_the_base():
    model = bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = MaskSwitch(model)
    first.add("a", random_mask(maskable_weights(model), 0.9, seed=0))
    first.use("a")
    with pytest.raises(ValueError, match="The mask 'a' of another MaskSwitch is in force"):
        MaskSwitch(model)
    first.use(None)
    second = MaskSwitch(model)
    second.add("a", random_mask(maskable_weights(model), 0.8, seed=1))
    with second.using("a"), pytest.raises(ValueError, match="another MaskSwitch"):
        first.use("a")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="which is a file. Name a folder"):
        MFT(bert()).save_pretrained(tmp_path / "file")
    along = MFT(bert(), MaskConfig(modules_to_save=("classifier",)))
    with pytest.raises(ValueError, match="which is a file. Name a folder"):
        along.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
