"""Any task from any table: learned, measured, applied; or refused with file and row."""

import json
import warnings

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from mft_nb import cli, data
from mft_nb.card import mask_card
from mft_nb.config import MaskConfig
from mft_nb.evaluate import _written, compare_all, evaluate
from mft_nb.mask import MFT
from mft_nb.mask_file import load_mask
from mft_nb.metrics import METRICS
from mft_nb.model import fetch_model, load_model
from mft_nb.tasks import Task, find_task
from mft_nb.train import TrainConfig, fit, train
from tests.commands import call_here, check_refusal

KINDS = {0: "praise", 1: "blame", 2: "neither"}
TAGS = {0: "O", 1: "B-place", 2: "I-place"}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
SIZES |= {"num_hidden_layers": 3, "initializer_range": 0.3}
SPECIAL = {"vocab_size": 30522, "bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}
ROWS = 40


def models():
    """A tiny model with random weights for each task."""
    torch.manual_seed(0)
    bert = BertForSequenceClassification
    yield "three", bert(BertConfig(id2label=KINDS, **SIZES))
    yield "score", bert(BertConfig(num_labels=1, **SIZES))
    yield "tagger", BertForTokenClassification(BertConfig(id2label=TAGS, **SIZES))
    heads = {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": 48}
    heads |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    yield "writer", GPT2LMHeadModel(GPT2Config(initializer_range=0.3, **heads, **SPECIAL))
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 3, "decoder_layers": 3}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
    bart = BartConfig(decoder_start_token_id=101, forced_bos_token_id=101, **sizes, **SPECIAL)
    yield "summary", BartForConditionalGeneration(bart)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the models, and a table of its own kind for each task."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = AutoTokenizer.from_pretrained(fetch_model("minilm"), eos_token="[SEP]")
    for name, model in models():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    texts = [f"film {number} is a {'very ' * (number % 4)}good one" for number in range(ROWS)]
    kinds = [KINDS[number % 3] for number in range(ROWS)]
    frame = Dataset.from_dict({"text": texts, "label": kinds}).to_pandas()
    frame.to_csv(folder / "reviews.csv", index=False)
    pairs = {"premise": texts, "hypothesis": texts[::-1], "label": [n % 3 for n in range(ROWS)]}
    Dataset.from_dict(pairs).to_parquet(folder / "pairs.parquet")
    scores = frame.assign(label=[f"{number / 8}" for number in range(ROWS)])
    scores.rename(columns={"label": "score"}).to_csv(folder / "scores.TSV", sep="\t", index=False)
    several = frame.assign(label=["praise,neither" if n % 2 else "[]" for n in range(ROWS)])
    several.to_csv(folder / "several.csv.gz", index=False)
    words = {"tokens": [["in", "New", "York"], ["at", "home"]], "tags": [[0, 1, 2], [0, 0]]}
    words = Dataset.from_dict({name: rows * (ROWS // 2) for name, rows in words.items()})
    words.to_json(folder / "names.jsonl")
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "texts.json").write_text(f"[{', '.join(lines)}]")
    asked = {"ask": [f"{text}? " for text in texts], "said": ["yes", "oh no"] * (ROWS // 2)}
    asked = Dataset.from_dict(asked)
    DatasetDict({"train": asked, "test": asked.select(range(12))}).save_to_disk(folder / "answers")
    news = frame.rename(columns={"text": "article", "label": "summary"})
    news.to_csv(folder / "news.csv.bz2", index=False)
    return folder


RUNS = {
    "classes": ("three", "reviews.csv", {}, "accuracy"),
    "pairs": ("three", "pairs.parquet", {"text": "premise", "text_pair": "hypothesis"}, "macro F1"),
    "regression": ("score", "scores.TSV", {"label": "score"}, "Spearman"),
    "multi-label": ("three", "several.csv.gz", {"task": "multi-label"}, "exact match"),
    "tags": ("tagger", "names.jsonl", {}, "entity F1"),
    "texts": ("writer", "texts.json", {}, "loss"),
    "answers": ("writer", "answers", {"text": "ask", "label": "said"}, "exact match"),
    "summaries": ("summary", "news.csv.bz2", {"text": "article", "label": "summary"}, "loss"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_task_from_its_table(name, place, tmp_path, capsys):
    model, table, columns, metric = RUNS[name]
    out, split = tmp_path / "mask", "train,test" if table == "answers" else None
    options = {"epochs": 1, "batch_size": 16, "learning_rate": 0.1, "quiet": True}
    about = {"model": str(place / model), "data": str(place / table), **columns}
    cli.mft_fit(out=str(out), split=split, **about, **options)
    said = capsys.readouterr().out
    held = 12 if table == "answers" else 4
    assert f"{held} rows to measure on, {40 if table == 'answers' else 36} trained on" in said
    assert f"\n{metric} (" in said and said.count("before: ") == said.count("paired: ") >= 1
    history = json.loads((out / "history.json").read_text())
    assert history["measured"] == [] and all(np.isfinite(loss) for _, loss in history["loss"])
    assert load_mask(out / "mask.safetensors").training.items() >= columns.items()
    kept = {field: about[field] for field in ("model", "data")}  # the mask knows its columns
    cli.mft_apply(mask=str(out), split="test" if split else None, **kept)
    applied = capsys.readouterr().out
    assert applied.splitlines()[0] == said.splitlines()[0]  # what is read
    assert "max_length: 128 tokens, as in the training" in applied
    assert f"\n{metric} (" in applied and "n = " in applied
    base = MFT(load_model(place / model)[0], MaskConfig.recommended()).bitmask()
    assert (base ^ load_mask(out / "mask.safetensors").mask).kept > 0  # something was learned


@pytest.mark.parametrize("name", ["pairs", "texts", "answers", "tags"])
def test_from_python_with_and_without_kept_activations(name, place, tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path))
    model, table, columns, _ = RUNS[name]
    rows = data.read_rows(place / table, "test" if table == "answers" else None)
    settings = TrainConfig(learning_rate=0.01, max_steps=3, batch_size=4, max_grad_norm=0)
    masks = []
    for kept in (False, True):
        base, tokenizer = load_model(place / model)
        mft = MFT(base, MaskConfig(layers=(1, 2)))
        held = rows.select(range(4))
        options = {"validation": held, "progress": False, "kept": kept}
        history = fit(mft, tokenizer, rows, settings, **columns, **options)
        masks.append(mft.bitmask())
        assert [step for step, _ in history.validation] == [0, 1, 2, 3]
        assert history.measured[-1][1]["changed"] > 0
    assert (masks[0] ^ masks[1]).kept <= 0.002 * masks[0].total


def test_a_language_model_learns_answers_and_stops_after_them(place):
    model, tokenizer = load_model(place / "writer")
    rows = Dataset.from_dict(
        {"ask": ["one and one is ", "the capital of Peru is "], "said": ["two", "lima, of course"]}
    )
    task = find_task(model, rows, text="ask", label="said")
    before = evaluate(model, tokenizer, rows, task)
    settings = TrainConfig(learning_rate=0.01, max_steps=100, batch_size=2)
    train(model, tokenizer, rows, settings, task=task, progress=False)
    after = evaluate(model, tokenizer, rows, task)
    assert before["exact_match"].sum() == 0 and after["exact_match"].sum() == 2
    assert METRICS["loss"].value(after["loss"]) < 0.1
    first, second = compare_all(before, after, task.name)
    assert first.flips == (2, 0) and second.difference.estimate < 0


def test_padding_changes_nothing(place):
    """A row by itself has the loss, the tags and the answer that it has among longer ones."""
    rows = Dataset.from_dict({"text": ["in Rome ", "at home in the old town ", "no "] * 2})
    answers = rows.add_column("label", ["is it", "or", "not"] * 2)
    for name, task, table in (
        ("writer", Task("causal-lm", "text", label=None), rows),
        ("writer", Task("causal-lm", "text"), answers),
        ("summary", Task("seq2seq", "text"), answers),
    ):
        model, tokenizer = load_model(place / name)
        together = evaluate(model, tokenizer, table, task)["loss"]
        alone = [evaluate(model, tokenizer, table.select([n]), task)["loss"][0] for n in range(6)]
        assert np.allclose(together, alone, atol=1e-4)
        prompts = tokenizer(rows["text"][:])["input_ids"]
        written = _written(model, tokenizer, task, prompts, 5)
        assert written == [_written(model, tokenizer, task, [one], 5)[0] for one in prompts]
        assert any(written)


def test_a_language_model_needs_no_padding_token(place):
    model, tokenizer = load_model(place / "writer")
    rows = Dataset.from_dict({"text": ["in Rome ", "at home "], "label": ["is it", "or"]})
    task = Task("causal-lm", "text")
    with_token = evaluate(model, tokenizer, rows, task)
    tokenizer.pad_token = None  # as that of GPT-2
    without = evaluate(model, tokenizer, rows, task)
    assert all(np.allclose(with_token[name], without[name], atol=1e-5) for name in with_token)


def test_a_column_with_names_of_its_own_is_matched_by_name(place):
    names = ClassLabel(names=["neither", "Praise", "blame"])
    features = Features({"text": Value("string"), "label": names})
    rows = Dataset.from_dict({"text": ["fine"] * 3, "label": [0, 1, 2]}, features=features)
    model, _ = load_model(place / "three")
    assert find_task(model, rows).checked(rows, model)["label"][:] == [2, 0, 1]


BAD = [
    ("three", "label", [0, 0.7], {}, "table has the label 0.7 in row 2; allowed is praise, blame"),
    ("three", "label", [0, 3], {}, "has the label 3 in row 2; allowed is praise,"),
    ("three", "label", ["blame", "bad"], {}, "has the label 'bad' in row 2"),
    ("three", "label", [0, None], {}, "has no label in row 2"),
    ("three", "text", ["fine", " "], {}, "has an empty text in row 2"),
    ("three", "text", ["fine", None], {}, "has no text in row 2"),
    ("three", "label", [0, 1], {"text_pair": "other"}, "text_pair is 'other', which is no column"),
    ("three", "label", [0, 1], {"label": "stars"}, "label is 'stars', which is no column of"),
    ("three", "label", [0, 1], {"task": "regression"}, "num_labels is 3; allowed is 1"),
    ("three", "label", [0, 1], {"task": "causal-lm"}, "the model has a head for classification"),
    ("three", "label", [0, 1], {"task": "ner"}, "task is 'ner'; allowed are classification,"),
    ("three", "label", [[0, 1, 0], [0, 2, 0]], {}, "has the label [0, 2, 0] in row 2; allowed"),
    ("score", "label", ["0.5", "good"], {}, "has the label 'good' in row 2; allowed is a finite"),
    ("tagger", "label", ["O", "O O"], {}, "has 1 words and 2 tags in row 2"),
    ("writer", "text", ["fine", "x " * 60], {"max_length": 64}, "has places for 48. Give max"),
    ("writer", "said", ["a", "b " * 60], {"label": "said"}, "of answer in row 2; allowed are 40"),
    ("summary", "text", ["fine", "dull"], {}, "has no column 'label' or 'labels'"),
    ("three", "label", [0, 1], {"split": "test"}, "has no splits"),
    ("minilm", "label", [0, 1], {}, "no head for a task: its architecture is BertModel"),
]


def test_what_does_not_go_together_is_refused_before_any_work(place, tmp_path, capsys):
    for model, column, values, options, expected in BAD:
        columns = {"text": ["fine"] * 12} | ({"label": [0] * 12} if model == "three" else {})
        columns[column] = [values[0], values[1], *[values[0]] * 10]
        Dataset.from_dict(columns).to_parquet(tmp_path / "table.parquet")
        source = str(place / model) if (place / model).exists() else model
        about = {"model": source, "data": str(tmp_path / "table.parquet"), "max_length": 40}
        about |= {"quiet": True, "out": str(tmp_path / "out")} | options
        status, said = call_here(cli.mft_fit, capsys, **about)
        check_refusal(status, said.replace("table.parquet", "table"), expected)
        assert not (tmp_path / "out").exists()


def test_a_data_set_of_the_hub(place, monkeypatch, capsys):
    asked = []

    def from_hub(source, subset):
        asked.append((source, subset))
        if subset is None:
            raise ValueError("Config name is missing.\nPick one.")
        return DatasetDict({"test": Dataset.from_dict({"text": ["fine"], "label": [0]})})

    monkeypatch.setattr(data, "load_dataset", from_hub)
    monkeypatch.setattr(data, "ask_hub", lambda *_: None)
    assert data.read_rows("nyu-mll/glue", subset="sst2")["text"][:] == ["fine"]
    options = {"model": str(place / "three"), "data": "nyu-mll/glue", "out": "nowhere"}
    status, said = call_here(cli.mft_fit, capsys, **options)
    check_refusal(status, said, "the hub gave no data set of that name (Config name is missing.)")
    assert asked == [("nyu-mll/glue", "sst2"), ("nyu-mll/glue", None)]


def test_a_card_names_the_task_and_its_metric(place, tmp_path):
    mft = MFT(load_model(place / "writer")[0], MaskConfig.recommended())
    mft.trained_with = Task("causal-lm", "ask", label="said").as_settings
    tokens = np.ones((9, 1))
    losses = [{"loss": np.concatenate([np.full((9, 1), loss), tokens], 1)} for loss in (4.0, 3.0)]
    (result,) = compare_all(*losses, task="causal-lm")
    about = {"repo_id": "me/mask", "base_model": "me/writer", "data": "texts", "license": "mit"}
    card = mask_card(mft.save_pretrained(tmp_path), **about, result=result)
    front = yaml.safe_load(str(card).split("---")[1])
    assert front["pipeline_tag"] == "text-generation" and front["metrics"] == ["loss"]
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 3.0
    assert "| with the mask | 3.000 [3.000, 3.000], 95 % interval, n = 9 |" in card.text
    assert "The difference is -1.000" in card.text and "better with the mask" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    assert "| trained for | causal-lm, on the columns `ask` -> `said` |" in card.text


def test_a_command_says_what_it_reads_and_when_rows_are_on_both_sides(place, tmp_path, capsys):
    table, options = str(place / "reviews.csv"), {"epochs": 0.5, "quiet": True}
    about = {"model": str(place / "three"), "data": table}
    cli.mft_fit(out=str(tmp_path / "mask"), validation=table, **about, **options)
    said = capsys.readouterr()
    assert "reviews.csv: reads text -> label\n" in said.out
    assert f"{ROWS} of the {ROWS} rows to measure on are among those to learn from" in said.out
    pairs = {"data": str(place / "pairs.parquet"), "text": "premise"}
    cli.mft_fit(out=str(tmp_path / "half"), **about | pairs, **options)
    said = capsys.readouterr()
    assert "reads premise -> label; not read: hypothesis" in said.out


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"out": "three"}, "the folder of the model. Name another folder."),
        ({"seed": 2**32}, "seed is 4294967296; allowed is a whole number, 0 or more and at most"),
        ({"data": "pairs.parquet"}, "name the second one too: text_pair, --text_pair."),
    ],
)
def test_what_new_users_got_wrong_is_refused(wrong, told, place, tmp_path, capsys):
    asked = {"model": str(place / "three"), "data": "reviews.csv", "out": str(tmp_path / "new")}
    asked |= wrong
    places = {name: str(place / asked[name]) for name in ("data", "out")}
    with pytest.raises(SystemExit):
        cli.mft_fit(**asked | places)
    assert told in capsys.readouterr().err


def test_rows_that_are_cut_are_counted(place):
    long, words = "very " * 60, ["very"] * 60
    for name, task, rows in (
        ("three", Task("classification", text_pair="pair"), {"sentence": ["a", "a"]}),
        ("three", Task("classification"), {"sentence": [long, "a"]}),
        ("tagger", Task("token-classification"), {"sentence": [words, ["a"]]}),
        ("writer", Task("causal-lm", label=None), {"sentence": [long, "a b"]}),
        ("summary", Task("seq2seq"), {"sentence": ["a", "a"], "label": [long, "a"]}),
    ):
        rows |= {"pair": [long, "a"]} if task.text_pair else {}
        tokenizer = AutoTokenizer.from_pretrained(place / name)
        with pytest.warns(data.CutWarning, match="t.csv: 1 of 2 rows are longer than max"):
            tokens = task.tokens(Dataset.from_dict(rows), tokenizer, 9, "t.csv")
        assert max(tokens["length"]) <= 9
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # as long as allowed is not too long
            task.tokens(Dataset.from_dict(rows), tokenizer, 200)


def test_rows_with_one_label_are_not_trained_on(place):
    model, tokenizer = load_model(place / "three")
    rows = Dataset.from_dict({"text": ["fine", "dull"], "label": [1, 1]})
    with pytest.raises(ValueError, match="rows has the label blame in all of its 2 rows"):
        fit(MFT(model), tokenizer, rows)
    alike = Dataset.from_dict({"sentence": [["a"], ["b", "c"]], "label": [[0], [0, 0]]})
    assert Task("token-classification").only_label(alike, load_model(place / "tagger")[0]) == "O"
    texts = Dataset.from_dict({"sentence": ["a", "b"], "label": ["yes", "yes"]})
    assert Task("causal-lm").only_label(texts, model) is None


def test_a_model_without_names_of_its_own_is_told_where_to_set_them():
    model = BertForSequenceClassification(BertConfig(num_labels=3, **SIZES))
    rows = Dataset.from_dict({"text": ["a", "b"], "label": ["refund", "praise"]})
    with pytest.raises(ValueError, match="set id2label and label2id of its config"):
        find_task(model, rows).checked(rows, model)
