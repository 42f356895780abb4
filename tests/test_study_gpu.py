"""What is measured on a GPU, dry on a CPU: every part, a second start, and the record."""

import json

import pytest
import torch

from mft_nb.study import gpu
from mft_nb.study.bench import figures, ratio_figure
from mft_nb.study.bench_ways import WAYS
from mft_nb.study.gpu import all_parts, full_bench, gpu_table, mft_gpu, run_parts, tiny_bench
from tests.commands import call_here, check_help, check_refusal

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a name that changed


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a dry run, in which every part was to be done."""
    folder = tmp_path_factory.mktemp("gpu")
    mft_gpu(out=str(folder), dry_run=True)
    return folder


@pytest.fixture
def record(first):
    """Its record."""
    (path,) = first.glob("dry-bfloat16-*.json")
    return json.loads(path.read_text())


def test_a_dry_run_goes_through_every_part(record):
    happened = record["happened"]
    assert happened["failed"] == happened["partly"] == {}
    for name in ("bert_base", "llama_1b"):
        assert list(happened["models"][name]["seconds"]) == list(WAYS)
        assert list(happened["sparse"][name]["seconds"]) == ["dense", "sparse"]
        assert happened["sparse"][name]["difference"] == 0
        assert happened["models"][name]["drift"] > 0
    (language,) = happened["language"].values()
    assert list(language["seconds"]) == ["full", "floor", "ours"] and language["tokens"] == 32
    ways = {tuple(one["seconds"]) for one in happened["selection"]}
    assert ways == {("sort", "kthvalue", "bisection", "ours")}


def test_the_record_has_the_form_of_the_others(record):
    assert set(record) == {"asked", "happened", "where"}
    assert record["asked"]["device"] == "cpu" and record["asked"]["precision"] == "bfloat16"
    assert {"commit", "versions", "device", "threads", "started"} <= set(record["where"])
    named = {row["figure"] for row in figures(record)}
    assert {"ours / floor", "published / ours", "ours, kept / full", "ours / lora"} <= named
    assert ratio_figure(record).axes
    table = gpu_table(record["happened"])
    assert len(table) == 2 * 7 + 3 + 2 * 4 + 2 * 2
    assert set(table[table.way == "ours"].ratio) == {"1.00"}


def test_a_dry_run_leaves_no_parts_and_touches_no_records(first):
    assert [path.name[:13] for path in first.iterdir()] == ["dry-bfloat16-"]


@pytest.fixture
def quick(monkeypatch):
    """Parts that are done at once, and how often each was done."""
    counts = dict.fromkeys((part.name for part in all_parts(tiny_bench())), 0)
    way = {"seconds": [0.1], "memory": None, "loss": [1, 1], "trained": 1, "step_flops": 1}

    def stand_in(name):
        def measure(until):
            counts[name] += 1
            kinds = {"peak": {"peak_flops": 1.0}, "selection": {"by_size": []}}
            return kinds.get(name, {} if name.endswith("2:4") else way)

        return measure

    def quick_parts(bench):
        return [part._replace(measure=stand_in(part.name)) for part in all_parts(bench)]

    monkeypatch.setattr(gpu, "all_parts", quick_parts)
    return counts


def test_a_second_start_does_what_is_missing(quick, tmp_path, capsys):
    assert call_here(mft_gpu, capsys, out=str(tmp_path), dry_run=True, minutes=1e-9)[0] == 0
    assert sum(quick.values()) == 1, "one part is always done"
    assert not list(tmp_path.glob("*.json"))
    mft_gpu(out=str(tmp_path), dry_run=True, minutes=1e-9)
    said = capsys.readouterr().out
    assert sum(quick.values()) == 2 and "No record yet. 22 parts are left for the next" in said
    (tmp_path / "dry-parts" / "peak.json").unlink()
    mft_gpu(out=str(tmp_path), dry_run=True)
    assert quick.pop("peak") == 2 and set(quick.values()) == {1}
    (path,) = tmp_path.iterdir()
    assert set(json.loads(path.read_text())["happened"]["models"]) == {"bert_base", "llama_1b"}


def test_a_part_that_failed_is_named_and_tried_again(quick, tmp_path, capsys, monkeypatch):
    usual = gpu.all_parts

    def one_fails(bench):
        fails = {"measure": lambda until: torch.empty(2, 3) @ torch.empty(2, 3)}
        return [one._replace(**fails) if "lora" in one.name else one for one in usual(bench)]

    monkeypatch.setattr(gpu, "all_parts", one_fails)
    mft_gpu(out=str(tmp_path), dry_run=True)
    said = capsys.readouterr().out
    assert "failed: bert_base, lora: RuntimeError: mat1 and mat2 shapes" in said
    (path,) = tmp_path.glob("*.json")
    happened = json.loads(path.read_text())["happened"]
    assert set(happened["failed"]) == {"bert_base, lora", "llama_1b, lora"}
    assert set(happened["partly"]) == {"bert_base", "llama_1b"}
    path.unlink()
    monkeypatch.setattr(gpu, "all_parts", usual)
    mft_gpu(out=str(tmp_path), dry_run=True)
    assert set(quick.values()) == {1}
    assert [one.name[:4] for one in tmp_path.iterdir()] == ["dry-"], "the parts are gone"


def test_parts_of_another_machine_are_refused(quick, tmp_path, capsys):
    call_here(mft_gpu, capsys, out=str(tmp_path), dry_run=True, minutes=1e-9)
    (path,) = (tmp_path / "dry-parts").glob("*.json")
    part = json.loads(path.read_text())
    part["where"]["commit"] = "another"
    path.write_text(json.dumps(part))
    assert call_here(mft_gpu, capsys, out=str(tmp_path), dry_run=True, minutes=1e-9)[0] == 0
    part["where"]["device"] = "NVIDIA A100"
    path.write_text(json.dumps(part))
    status, said = call_here(mft_gpu, capsys, out=str(tmp_path), dry_run=True)
    check_refusal(status, said, "holds parts of another run (NVIDIA A100, torch")


def test_without_a_gpu_the_command_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, said = call_here(mft_gpu, capsys, out=str(tmp_path))
    check_refusal(status, said, "dry_run is off, and torch finds no CUDA GPU here.")
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"minutes": 0}, "minutes is 0; allowed is a number, above 0"),
        ({"minutes": -2}, "minutes is -2"),
        ({"out": "results/bench"}, "which holds records of measurements"),
    ],
    ids=str,
)
def test_bad_input_ends_in_a_sentence(options, expected, capsys):
    status, said = call_here(mft_gpu, capsys, dry_run=True, **options)
    check_refusal(status, said, expected)


def test_the_help_explains_every_option():
    check_help(mft_gpu)


def test_the_limits_of_all_parts_fit_into_one_run():
    parts = all_parts(full_bench())
    assert sum(part.seconds for part in parts) <= 60 * gpu.MINUTES
    assert len({gpu._part_file("", part.name) for part in parts}) == len(parts)
    assert [part.name for part in parts] == [part.name for part in all_parts(tiny_bench())]


def test_a_loss_that_is_no_number_is_a_failure(tmp_path):
    part = gpu.Part("one", 1, lambda until: {"loss": float("nan")})
    assert run_parts([part], tmp_path, 1, {}) == []
    (path,) = tmp_path.iterdir()
    assert "ValueError" in json.loads(path.read_text())["found"]["failed"]


@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e30])
def test_all_selectors_find_the_same_mask(scale):
    torch.manual_seed(0)
    scores = torch.randn(4097) * scale
    for kept in (1, 2000, 4096):
        found = [find(scores, kept) for find in gpu.selectors().values()]
        assert all(torch.equal(one, found[0]) for one in found) and found[0].sum() == kept
