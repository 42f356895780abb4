"""Forward passes of smaller models: the same answers, measured whole, drawn and written down."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from mft_nb.applied import AppliedMask
from mft_nb.study import bench, inference
from mft_nb.study.bench_ways import MODELS
from mft_nb.study.inference import (
    first_units,
    latency_figure,
    latency_rows,
    mask_file_bytes,
    measure,
    measure_model,
    models_with_fewer_heads,
    over_allowed,
    shrunk_models,
)
from tests.commands import call_here
from tests.test_families import PRETRAINED
from tests.test_shrink import answer, made

ROOT = Path(__file__).resolve().parent.parent
LIKE_BERT = ("bert", "roberta", "electra")


def tiny():
    """A BERT of two layers with biases that are not zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    sizes["num_hidden_layers"] = 2
    model = BertForSequenceClassification(BertConfig(vocab_size=2000, **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def measured():
    """What `measure` finds for tiny models, in two rounds."""
    few = {"rounds": 2, "batches": {1: 2, 3: 1}, "tokens": 5, "threads": 1}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inference, "REST", 0)
        for name in ("minilm", "bert_base"):
            patched.setitem(MODELS, name, tiny)
        return measure(**few, progress=False)


def wide(family):
    """A tiny model of a family whose weights are so large that a mask is seen."""
    model = made(family)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def check_answers(model, family, models, kind):
    """Each smaller model answers as the whole model with the same units masked."""
    whole = answer(model, family)
    for name, one in models.items():
        if one.kind:
            with AppliedMask(model, first_units(model, kind, one.kept)):
                masked = answer(model, family)
            assert torch.allclose(answer(one.model, family), masked, atol=1e-4), name
            assert not torch.allclose(masked, whole, atol=1e-3), name
    assert torch.equal(answer(model, family), whole)


@pytest.mark.parametrize("family", [*LIKE_BERT, "mpnet", "distilbert", "gpt2_classifier"])
def test_models_with_fewer_neurons_answer_as_masked(family):
    model = wide(family)
    models = shrunk_models(model, (0.75, 0.25))
    assert list(models)[2:] == ["shrunk 75 %", "shrunk 25 %", "one neuron"]
    check_answers(model, family, models, "neurons")
    sizes = [one.model.num_parameters() for one in models.values()]
    assert sizes[0] == sizes[1] and sizes[1:] == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize("family", LIKE_BERT)
def test_models_with_fewer_heads_answer_as_masked(family):
    model = wide(family)
    models = models_with_fewer_heads(model, (0.5,))
    check_answers(model, family, models, "heads")
    assert all(one.model.num_parameters() < model.num_parameters() for one in models.values())


@pytest.mark.parametrize("family", sorted({"mpnet", "distilbert", "llama"} & set(PRETRAINED)))
def test_heads_of_other_models_are_refused(family):
    with pytest.raises(ValueError, match="heads are taken out only of attentions named"):
        models_with_fewer_heads(made(family))


def test_a_single_head_stays():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    one = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **sizes)).eval()
    with pytest.raises(ValueError, match="one head a layer, so none can be taken out"):
        models_with_fewer_heads(one)


def test_masked_models_are_copies_without_a_mask_to_undo():
    model = tiny()
    masked = shrunk_models(model, (0.5,))["masked, not shrunk"].model
    weight = masked.bert.encoder.layer[1].output.dense.weight
    assert not weight[:, 20:].any() and weight[:, :20].all()
    assert model.bert.encoder.layer[1].output.dense.weight.all()
    assert shrunk_models(masked, (0.25,))  # nobody holds its weights


def test_measured_models_become_rows(measured):
    rows = latency_rows(measured)
    figures = {(row["figure"], row["model"]): row for row in rows}
    assert len(figures) == len(rows) == 2 * (2 * (6 + 3 + 4 + 2) + 2)
    for row in rows:
        assert row["ratio"] > 0
        assert row.get("limit") == (
            1.05
            if "allowed" in row["figure"]
            else 2000
            if (row["figure"], row["model"]) == ("mask file of neurons, bytes", "minilm")
            else None
        )
    timed = measured["models"]["minilm"]["batches"]["3"]
    shown = figures["shrunk 50 % / unmasked", "minilm, batch 3"]
    assert shown["ratio"] == timed["ratios"]["shrunk 50 %"]["ratio"]
    assert json.loads(json.dumps(measured)) == measured


def test_rows_join_the_figures_of_a_record(measured, capsys):
    record = {"happened": {"models": {}, "inference": measured}}
    rows = bench.figures(record)
    assert len(rows) == len(latency_rows(measured))
    assert all((row["met"] is None) == (row["limit"] is None) for row in rows)
    bench.print_figures(record)
    said = capsys.readouterr().out
    assert "shrunk 25 % / allowed" in said and "limit 2000" in said


def test_a_slow_model_exceeds_what_is_allowed():
    kept = {"shrunk 50 %": 0.5, "one neuron": 0.001}
    seconds = {"unmasked": [2.0], "shrunk 50 %": [1.8], "one neuron": [1.0]}
    found = over_allowed(seconds, kept, "shrunk 50 %")
    assert found["ratio"] == pytest.approx(1.2, abs=0.001)


def test_a_record_is_drawn(measured):
    figure = latency_figure({"happened": {"inference": measured}})
    assert [axes.get_title() for axes in figure.axes] == ["1 row a pass", "3 rows a pass"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["MiniLM-L6", "BERT-base shape", "in proportion"]


def test_threads_are_put_back_after_a_failure(monkeypatch):
    before = torch.get_num_threads()
    model = tiny()
    monkeypatch.setattr(type(model), "forward", lambda self, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_model(model, 1, threads=before + 1, progress=False)
    assert torch.get_num_threads() == before


def test_a_mask_file_of_neurons_is_smaller():
    model = tiny()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    sizes = mask_file_bytes(model)
    assert 0 < sizes["units"] < sizes["weights"]
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_command_writes_passes_into_its_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(inference, "REST", 0)
    monkeypatch.setitem(MODELS, "minilm", tiny)
    few = partial(measure, batches={2: 1}, tokens=5, threads=1)
    monkeypatch.setattr(bench, "measure", lambda models, rounds: few(models, 1 + rounds // 20))
    steps = {way: [1.0, 2.0] for way in bench.WAYS}
    step = {"seconds": steps, "share_of_peak": 0.5}
    monkeypatch.setattr(bench, "bench_model", lambda *_: step)
    monkeypatch.setattr(bench, "cost_by_size", lambda sizes: [])
    monkeypatch.setattr(bench, "switch_passes", lambda rounds: {})
    monkeypatch.setattr(bench, "load_data", lambda name: {"train": []})
    monkeypatch.setattr(bench, "load_classifier", lambda name: (None, None))
    monkeypatch.setattr(bench, "tokenise", lambda rows, tokenizer: {"length": [5, 5]})
    status, said = call_here(bench.mft_bench, capsys, out=str(tmp_path), models="minilm")
    assert status == 0, said
    record = json.loads(next(tmp_path.iterdir()).read_text())
    assert record["asked"]["pass_rounds"] == 21
    assert set(record["happened"]["inference"]["models"]) == {"minilm"}
    rows = {row["figure"]: row for row in bench.figures(record)}
    assert rows["masked, not shrunk / unmasked"]["rounds"] == 2
    assert (rows["ours, kept / lora"]["limit"], rows["ours, kept / lora"]["met"]) == (1.0, True)


def test_old_records_have_no_passes():
    for path in ROOT.glob("results/bench/*.json"):
        record = json.loads(path.read_text())
        if "inference" in record["happened"]:
            assert latency_figure(record)
        else:
            with pytest.raises(ValueError, match="no part inference"):
                latency_figure(record)
