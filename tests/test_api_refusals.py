"""Never silently wrong: each kind of slip in the Python API is refused in one sentence."""

import math
import re
import time
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import PeftModel, get_peft_model
from safetensors.torch import load, save_file

from mft_nb.cli import parse_layers, plain_errors
from mft_nb.evaluate import Counts, accuracy, compare_all
from mft_nb.mask import MFT, MaskConfig
from mft_nb.peft import MftConfig, adapter_to_mask
from mft_nb.scopes import SCOPES
from mft_nb.switch import MaskSwitch
from mft_nb.tasks import find_task
from mft_nb.train import TrainConfig, fit, train
from tests.models import CONFIG, tiny_bert

ROWS = Dataset.from_dict({"sentence": ["a b", "c d"] * 4, "label": [0, 1] * 4})


def tokenizer(*texts, **options):
    raise AssertionError("asked for tokens before the arguments were checked")


@pytest.fixture(scope="module")
def mft():
    return MFT(tiny_bert(), CONFIG)


WRONG = {  # what is asked of an MFT: the sentence
    "no such method": (lambda m: m.fit(ROWS), "MFT has no 'fit'.* trained by fit\\(mft, tokenizer"),
    "nothing": (lambda m: fit(m), "tokenizer is a NoneType; allowed is a tokenizer of"),
    "no rows": (lambda m: fit(m, tokenizer), "rows is a NoneType; allowed is a datasets.Dataset"),
    "swapped": (lambda m: fit(m, ROWS, tokenizer), "tokenizer is a Dataset; allowed is a tokeni"),
    "a model": (lambda m: fit(m.model, tokenizer, ROWS), "mft is a BertFor.*; allowed is a MFT"),
    "config": (lambda m: fit(m, tokenizer, ROWS, CONFIG), "config is a MaskConfig; allowed is a T"),
    "a dict": (lambda m: fit(m, tokenizer, ROWS, {}), "config is a dict; allowed is a TrainConfig"),
    "to train": (lambda m: train(m.model, tokenizer, ROWS, CONFIG), "config is a MaskConfig"),
    "a list": (lambda m: fit(m, tokenizer, [("a", 1)]), "rows is a list; allowed is a datasets.Da"),
    "validation": (
        lambda m: fit(m, tokenizer, ROWS, validation=[1], kept=True),
        "validation is a list; allowed is a datasets.Dataset",
    ),
    "option": (
        lambda m: fit(m, tokenizer, ROWS, epochs=3, kept=True),
        r"fit has no 'epochs'; allowed are mft, .*progress.* config: TrainConfig\(epochs=\.\.\.\)",
    ),
    "task": (lambda m: fit(m, tokenizer, ROWS, task=["ner"]), "task is .'ner'.; allowed are clas"),
    "folder": (lambda m: m.save_pretrained(None), "folder is a NoneType; allowed is the path"),
    "switch": (lambda m: MaskSwitch(m), "model is a MFT; allowed is a Module"),
    "peft": (lambda m: get_peft_model(tiny_bert(), CONFIG), "For get_peft_model give mft_nb.peft"),
    "LoRA": (lambda m: MftConfig(r=8), "MftConfig has no field 'r'; its .* keep,.* LoRA's"),
    "field": (lambda m: MaskConfig(epochs=2), "no field 'epochs'; its .* Give it to TrainConfig"),
    "other": (lambda m: TrainConfig(keep=0.5), "no field 'keep'; its .* Give it to MaskConfig"),
    "scope": (lambda m: MaskConfig(scope=["tensor"]), "scope is .'tensor'.; allowed are 'tensor'"),
    "seed": (lambda m: MaskConfig(init_seed=2**64), "init_seed is .* at most 18446744073709551615"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_object_of_another_kind_is_refused_before_any_work(kind, mft):
    ask, sentence = WRONG[kind]
    with pytest.raises((AttributeError, TypeError, ValueError), match=sentence) as error:
        ask(mft)
    assert "\n" not in str(error.value)


def test_a_property_that_fails_says_its_own_error(mft, monkeypatch):
    monkeypatch.setattr(mft._rest, "trained", {"gone.weight": None})
    with pytest.raises(AttributeError, match="gone"):
        mft.trainable  # noqa: B018


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_refused_by_name(odd):
    mft = MFT(tiny_bert(), CONFIG)
    before, state = mft.bitmask(), mft.state_dict()
    name = [name for name in state if name.endswith("scores")][2]
    state[name].view(-1)[3] = odd
    sentence = f"'{re.escape(name)}' in the state holds NaN or infinity"
    with pytest.raises(ValueError, match=sentence):
        mft.load_state_dict(state)
    whole = {key: tensor.clone() for key, tensor in mft.model.state_dict().items()}
    with pytest.raises(RuntimeError, match=sentence):
        mft.model.load_state_dict(whole | {name: state[name]})
    assert mft.bitmask() == before


def test_an_empty_state_is_refused_by_name(mft):
    with pytest.raises(ValueError, match=r"differ in 'bert.*scores'"):
        mft.load_state_dict({})
    with pytest.raises(RuntimeError, match="The state is empty, so nothing would be loaded"):
        mft.model.load_state_dict({}, strict=False)
    model = tiny_bert()
    MFT(model, CONFIG).unload()
    model.load_state_dict({}, strict=False)  # the hook is off with the mask


def test_an_adapter_without_its_masks_is_refused_by_name(tmp_path):
    get_peft_model(tiny_bert(), MftConfig(layers="all")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load(file.read_bytes())  # not as a view of the file, which is written again below
    name = sorted(whole)[0]
    short = re.escape(name.removeprefix("base_model.model.").removesuffix("scores"))
    spoiled = {**whole, name: whole[name] * math.nan}
    missing = {key: tensor for key, tensor in whole.items() if key != name}
    for tensors, sentence in (
        (spoiled, f"'{short}.*scores' in the state holds NaN"),
        (missing, f"The adapter's file lacks '{short}.*scores'"),
        ({}, "The adapter's file lacks 'bert.*scores'"),
    ):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=sentence):
            PeftModel.from_pretrained(tiny_bert(), tmp_path)
    save_file(spoiled, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        adapter_to_mask(tmp_path, tmp_path / "mask", tiny_bert())


def test_the_page_of_an_adapter_begins_its_example_with_the_import(tmp_path):
    model = get_peft_model(tiny_bert(), MftConfig(layers="all"))
    model.add_adapter("other", MftConfig(layers="all", keep=0.5))
    for _ in range(2):  # saved again, it is said once
        model.save_pretrained(tmp_path)
        for folder in (tmp_path, tmp_path / "other"):
            page = (folder / "README.md").read_text()
            assert page.count("```python\nimport mft_nb.peft\n") == page.count("KeyError") == 1


def test_what_may_be_given_is_listed_whole():
    for ask in (lambda: parse_layers("foo"), lambda: MaskConfig(layers="foo")):
        with pytest.raises(ValueError, match="layers is 'foo'.*middle.*all.*number"):
            ask()
    with pytest.raises(ValueError, match="layers are 0 to 2. Choose among .* 'middle' or 'all'"):
        MFT(tiny_bert(), MaskConfig(layers=[7]))
    with pytest.raises(ValueError, match=".*".join(SCOPES)):
        MaskConfig(scope="foo")


def read(labels, names=("1", "2", "3"), **task):
    """Labels of a table as a model with these names of classes reads them."""
    model = tiny_bert(num_labels=len(names), num_hidden_layers=1)
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.config.id2label = dict(enumerate(names))
    rows = Dataset.from_dict({"text": ["a"] * len(labels), "label": labels})
    found = find_task(model, rows)
    checked = found.checked(rows, model)
    again = found.of_checked.checked(checked.select([0]), model)["label"][:]
    assert again == checked["label"][:1]  # what is read once is not read anew
    return checked["label"][:]


def test_digits_are_names_or_numbers_as_the_whole_column_says():
    for labels in (["1", "3", "2"], [1, 3, 2], [1.0, 3.0, 2.0], ["1.0", "3.0", "2.0"]):
        assert read(labels) == [0, 2, 1]
    for labels in (["2", "0"], [2, 0], [2.0, 0.0]):
        assert read(labels) == [2, 0]
    for labels in (["0", "1"], [0.0, 1.0], ["0.0", "1.0"], [False, True]):
        assert read(labels, names=("bad", "good")) == [0, 1]
    for labels in (["1", "2"], [2, 1], [1, 0, 3]):
        with pytest.raises(ValueError, match=r"by its name, and class . by its number\. Rename"):
            read(labels)
    for labels in ([0.5, 1.0], [0.0, 2.0], ["0.5", "1"]):
        with pytest.raises(ValueError, match="allowed is bad, good, or a whole number from 0 to 1"):
            read(labels, names=("bad", "good"))


def read_lists(labels, count=3, name="LABEL_{}"):
    """Lists of labels as a model reads them."""
    model = tiny_bert(num_hidden_layers=1, num_labels=count)
    model.config.id2label = {number: name.format(number) for number in range(count)}
    model.config.label2id = {name.format(number): number for number in range(count)}
    rows = Dataset.from_dict({"text": ["a"] * len(labels), "label": labels})
    return find_task(model, rows, "multi-label").checked(rows, model)["label"][:]


def test_lists_of_digits_are_zeros_and_ones_or_labels_as_the_whole_column_says():
    bits = [[0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0]]
    texts = [[str(one) for one in row] for row in bits]
    cells = [",".join(row) for row in texts]
    for labels in (bits, texts, cells, ["0, 0,0.0", *map(str, bits[1:])]):
        assert read_lists(labels) == bits
    assert read_lists(["0,1", "1,1"], count=2) == [[0, 1], [1, 1]]
    assert read_lists(["0,2", "1", "[]"]) == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert read_lists(["0,0,1", "1,0,0"], name="{}") == [[0, 0, 1], [1, 0, 0]]
    for labels in (["0,0,1", "2"], ["LABEL_1", "1,0,1"], [["0", "0", "1"], ["0", "1"]]):
        with pytest.raises(ValueError, match="row [12]: the label .* is in one column with"):
            read_lists(labels)
    with pytest.raises(ValueError, match="row 1: the label '0,1' .* 2 zeros and ones or"):
        read_lists(["0,1", "1,0"], count=2, name="{}")
    with pytest.raises(ValueError, match="label '1,1' in row 1; allowed is a list of 3 zeros"):
        read_lists(["1,1", "0,1"])


def test_accuracy_reads_digits_and_refuses_other_labels():
    logits = np.array([[1.0, 2.0], [2.0, 1.0]])
    for labels in ([1, 0], ["1", "0"], [1.0, 0.0], torch.tensor([1, 0]), [True, False]):
        assert accuracy(logits, labels) == 1.0
    for labels in (["good", "bad"], [1, 2], [0.5, 1], [[1], [0]], [1, None]):
        with pytest.raises(ValueError, match=r"row [12]; allowed are .* to 1\. .* call evaluate\("):
            accuracy(logits, labels)
    for wrong in (logits[:, :1], logits[:1], logits[0]):
        with pytest.raises(ValueError, match=r"logits has the shape \(.*call evaluate\("):
            accuracy(wrong, [1, 0])


def test_an_adapter_that_is_nowhere_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9")  # nobody
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited for another try"))
    for adapter in ("nope", tmp_path, "me/nope"):
        with pytest.raises(FileNotFoundError, match="No adapter .*Name a folder that PeftModel"):
            adapter_to_mask(adapter, tmp_path / "mask", tiny_bert())


def test_a_block_that_nobody_enters_warns(mft):
    switch = MaskSwitch(torch.nn.Linear(2, 2))
    for call in (mft.disabled, lambda: switch.using(None)):
        with pytest.warns(UserWarning, match=r"(disabled|using)\(.* was called without `with`, so"):
            call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with call():
                pass


def test_measurements_of_different_rows_are_no_pairs():
    right, other = np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])
    assert len(compare_all(Counts({"accuracy": right}, "a"), Counts({"accuracy": other}, "a"))) == 1
    with pytest.raises(ValueError, match="measured on different rows, or on rows in another order"):
        compare_all(Counts({"accuracy": right}, "a"), Counts({"accuracy": other}, "b"))
    tokens = np.array([[1.0, 5], [2.0, 6]])  # a loss and its number of tokens
    with pytest.raises(ValueError, match="loss were measured on different rows: in row 1"):
        compare_all({"loss": tokens}, {"loss": tokens[::-1]})
    with pytest.raises(ValueError, match="metrics accuracy and after loss; allowed are the"):
        compare_all({"accuracy": right}, {"loss": tokens})


def test_a_command_shows_a_warning_as_one_line(capsys):
    @plain_errors
    def command():
        warnings.warn("The mask prunes\nall of it.", stacklevel=1)

    command()
    assert capsys.readouterr().err == "command: warning: The mask prunes all of it.\n"
    with pytest.warns(UserWarning, match="outside"):  # as before, once the command has ended
        warnings.warn("outside", stacklevel=1)
