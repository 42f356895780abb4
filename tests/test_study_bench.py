"""The benchmark, whole, on a small model."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from mft_nb.study.bench import (
    Bench,
    bench_model,
    figures,
    mft_bench,
    print_figures,
    ratio_figure,
    switch_passes,
)
from mft_nb.study.bench_ways import MODELS, WAYS, make_batches, prepare, random_rows
from tests.commands import call_here

ROOT = Path(__file__).resolve().parent.parent


def tiny():
    """Three layers of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=3, **sizes))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a name that changed
def test_a_model_is_measured_whole(monkeypatch):
    monkeypatch.setitem(MODELS, "minilm", tiny)
    found = bench_model("minilm", rounds=1, progress=False)
    assert set(found["seconds"]) == set(WAYS)
    assert 0 < found["share_of_peak"] < 2
    assert 0 < sum(one["share"] for one in found["profile"]) <= 1
    rows = figures({"happened": {"models": {"bert_base": found}}})
    memory = {row["figure"]: row["ratio"] for row in rows if row["figure"].startswith("memory")}
    assert 0 < memory["memory: ours, adafactor / full"] < memory["memory: ours / full"]
    limited = {row["figure"]: row for row in rows if row["limit"]}
    for name, row in limited.items():
        below = row["ratio"] <= row["limit"]
        assert row["met"] == (row["ratio"] >= row["limit"] if "published" in name else below)
    assert len(limited) == 8


def test_switches_are_compared_with_passes():
    found = switch_passes(rounds=4, layers=1, hidden=16, threads=(1,), progress=False)
    kinds = ("switch", "pass", "pass in place")
    assert {name: len(seconds) for name, seconds in found["1"].items()} == dict.fromkeys(kinds, 4)
    slow = {"switch": [3.1], "pass": [1.0], "pass in place": [0.5]}
    quick = {"switch": [3.0], "pass": [1.0], "pass in place": [0.5]}
    rows = figures({"happened": {"models": {}, "switch": {"1": slow, "2": quick}}})
    assert [(row["figure"], row["model"], row["limit"], row["met"]) for row in rows] == [
        ("switch / pass", "1 thread", 3.0, False),
        ("switch / pass in place", "1 thread", None, None),
        ("switch / pass", "2 threads", 3.0, True),
        ("switch / pass in place", "2 threads", None, None),
    ]


def test_records_draw_with_and_without_switches():
    path = sorted(ROOT.glob("results/bench/cpu-*.json"))[-1]
    record = json.loads(path.read_text())
    without = {**record, "happened": {k: v for k, v in record["happened"].items() if k != "switch"}}
    times = {"switch": [3.1], "pass": [1.0], "pass in place": [0.5]}
    record["happened"]["switch"] = {"1": times}
    labels = [
        [text.get_text() for text in ratio_figure(one).axes[0].get_yticklabels()]
        for one in (without, record)
    ]
    assert labels[0] == labels[1] and labels[0]
    print_figures(record)


def test_an_unknown_model_is_refused(tmp_path, capsys):
    status, said = call_here(mft_bench, capsys, out=tmp_path, models="big")
    assert status == 2 and "models holds 'big'" in said and "minilm" in said
    assert not list(tmp_path.iterdir())


def test_published_records_say_what_was_asked():
    for path in ROOT.glob("results/bench/*.json"):
        record = json.loads(path.read_text())
        assert set(record) == {"asked", "happened", "where"}
        assert figures(record)


def test_a_ratio_lies_between_its_quartiles():
    for path in ROOT.glob("results/bench/*.json"):
        for row in figures(json.loads(path.read_text())):
            low, high = row.get("quartiles", (row["ratio"], row["ratio"]))
            assert low <= row["ratio"] <= high, (path.name, row)


def test_settings_are_checked_before_anything_is_measured():
    for settings, told in [
        ({"models": ("big",)}, "models holds 'big'"),
        ({"rounds": {"minilm": 0, "bert_base": 1}}, "allowed is 1 or more for minilm"),
        ({"sizes": (1500,)}, "multiples of 1000"),
        ({"switch_rounds": 0}, "switch_rounds is 0"),
        ({"pass_rounds": 0}, "pass_rounds is 0"),
        ({"precision": "int8"}, "precision is 'int8'"),
    ]:
        with pytest.raises(ValueError, match=told):
            Bench(**settings)


@pytest.mark.parametrize("way", ["published", "kthvalue"])
def test_the_published_algorithm_may_keep_everything(way):
    rows = random_rows(4, tokens=6)
    with ExitStack() as stack:
        one = prepare(tiny, rows, stack, ways=(way,), keep=1.0)[way]
        assert one.step(make_batches(rows, size=4)[0]) > 0
