"""Runs that prune whole neurons or heads, and what is said of them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from mft_nb.model import load_classifier
from mft_nb.study.curve import (
    PassTime,
    curve_points,
    equivalence,
    fastest,
    pass_times,
    smallest_margin,
    with_times,
)
from mft_nb.study.methods import evaluate
from mft_nb.study.names import UNIT_NAMES, UNITS
from mft_nb.study.plan import STUDIES, Run, get_profile
from mft_nb.study.recording import write_record
from mft_nb.study.records import MissingRecords, prediction_rows, summary
from mft_nb.study.units import run_units, switch_gradients, unit_sizes, unit_weights

PROFILE = replace(get_profile("units"), gradient_rows=16, precision="float32")
WORDS = ("a fine film", "a dull film", "warm and funny", "long and dull", "so bad", "so good")
ROWS = Dataset.from_dict({"sentence": WORDS * 6, "label": [1, 0, 1, 0, 0, 1] * 6})
SPLITS = {"test": ROWS.select(range(6)), "held": ROWS.select(range(6)), "watched": ROWS.select([0])}
QUIET = {"progress": False, "position": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return load_classifier("minilm")[1]


def tiny():
    """A BERT of two layers whose biases are not zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def done(method, variant, tokenizer, keep=0.5):
    """What a run on the tiny model gives, and the model."""
    run, model = Run("units", 0, "90", method, keep, "units", variant), tiny()
    return *run_units(run, model, tokenizer, ROWS, SPLITS, PROFILE, QUIET), model


@pytest.mark.parametrize("method", UNIT_NAMES)
@pytest.mark.parametrize("variant", ["neurons", "heads"])
def test_each_method_keeps_half_of_each_layer(method, variant, tokenizer):
    happened, settings, predictions, model = done(method, variant, tokenizer)
    assert set(happened["mask"]["density_by_tensor"].values()) == {0.5}
    fewer = happened["parameters"]["after"] < happened["parameters"]["before"]
    assert fewer == (variant == "neurons")
    assert bool(settings) == (method == "units_trained")
    masked = evaluate(model, tokenizer, SPLITS["test"])  # the mask is on it
    assert (masked.positive - predictions.positive).abs().max() < 1e-4


@pytest.mark.parametrize("after", ["continued", "lora", "mft"])
def test_the_smaller_model_is_trained(after, tokenizer):
    frozen = done("units_random", "neurons", tokenizer)
    trained = done("units_random", f"neurons_{after}", tokenizer)
    assert trained[1]["after"]["epochs"] == 1.0
    assert trained[0]["mask"]["sha256"] == frozen[0]["mask"]["sha256"]
    assert (trained[2].positive - frozen[2].positive).abs().max() > 1e-6


def test_the_switch_is_that_of_each_sentence(tokenizer):
    model = tiny()
    names = list(unit_weights(model, "neurons"))
    together = switch_gradients(model, tokenizer, ROWS, names, batch_size=36)
    apart = switch_gradients(model, tokenizer, ROWS, names, batch_size=5)
    for name in names:  # batches go by length, the same for both
        assert torch.allclose(together[name], apart[name], atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_size_counts_what_goes_with_a_unit():
    model = tiny()
    layer = model.bert.encoder.layer[1]
    sizes = unit_sizes(model, "heads")["bert.encoder.layer.1.attention.output.dense.weight"]
    inputs = [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
    rows = sum(one.weight[4:8].abs().sum() + one.bias[4:8].abs().sum() for one in inputs)
    columns = layer.attention.output.dense.weight[:, 4:8].abs().sum()
    assert torch.isclose(sizes[4:8].sum(), rows + columns)


def test_kinds_of_units_are_checked():
    with pytest.raises(ValueError, match="kind is 'rows'; allowed are neurons, heads"):
        unit_weights(tiny(), "rows")


def test_the_study_compares_equal_budgets():
    cells = STUDIES["units"]
    kept = {(method, keep) for _, method, keep, variant in cells if variant == "neurons"}
    assert kept == {(method, keep) for method in UNIT_NAMES for keep in (0.9, 0.75, 0.5, 0.25)}
    assert {variant for *_, variant in cells} <= {*UNITS, "epochs_1"}


def test_equivalence_is_the_interval_within_the_margin():
    draw = np.random.default_rng(0)
    for _ in range(200):
        differences = draw.normal(draw.uniform(-0.01, 0.01), 0.004, size=4)
        tested = equivalence(differences, 0.005)
        inside = -0.005 < tested.difference.low and tested.difference.high < 0.005
        assert tested.holds == inside
        assert (smallest_margin(differences) < 0.005) == inside


def write(folder, seed, method, right, **asked):
    """A record with so many of 100 sentences right."""
    labels = np.array([0, 1] * 50)
    said = np.where(np.arange(100) < right, labels, 1 - labels)
    rows = prediction_rows(np.stack([1 - said, said], axis=1) * 4.0, labels)
    asked = {"seed": seed, "method": method, "keep": 1.0, "variant": ""} | asked
    where = folder / "units" if method in UNIT_NAMES else folder
    name = f"seed{seed}-90-{method}-{asked['keep']}-{asked['variant']}"
    write_record(where, name, asked, {"test": summary(rows)}, {}, rows)


def test_the_fastest_that_is_equivalent_is_found(tmp_path):
    for seed, right in ((0, 90), (1, 91), (2, 92)):
        write(tmp_path, seed, "none", right)
        write(tmp_path, seed, "units_fisher", right, keep=0.5, variant="neurons")
        write(tmp_path, seed, "units_random", right - 9 - seed, keep=0.25, variant="neurons")
    times = {("neurons", 0.5, "32"): PassTime(0.7, 0.6, 0.8)}
    times[("neurons", 0.25, "32")] = PassTime(0.5, 0.4, 0.6)
    points = with_times(curve_points(tmp_path), times)
    assert points.seeds.map(len).tolist() == [3, 3, 3]
    assert fastest(points, 0.005).method == "units_fisher"
    assert fastest(points, 0.2).method == "units_random"
    assert points[points.method == "units_random"].difference.item() == pytest.approx(-0.10)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(MissingRecords, match="no record of the method 'none'"):
        curve_points(tmp_path)
    with pytest.raises(MissingRecords, match="`make bench` measures them"):
        pass_times(tmp_path, "minilm")
    few = pd.DataFrame({"units": ["neurons"], "keep": [0.4]})
    assert with_times(few, {}).time_32.isna().all()
