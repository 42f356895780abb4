"""The committed records: complete, and each number follows from its predictions."""

import json
from pathlib import Path

import pytest

from mft_nb.study.cli import grid_status
from mft_nb.study.figures.table import GRADIENT_SWEEP, KEEP_SWEEP
from mft_nb.study.plan import PUBLISHED, Workspace, plan, published_plan
from mft_nb.study.records import read_predictions, read_record, read_records, summary
from mft_nb.study.runner import missing_runs
from mft_nb.study.tables import results_frame

ROOT = Path(__file__).resolve().parent.parent
PLANS = {"embedded": (0, 1, 2), "sst2": (0, 1, 2, 3, 4)}


@pytest.mark.parametrize("profile", PLANS)
def test_the_plan_is_complete(profile):
    assert missing_runs(plan(profile, PLANS[profile]), Workspace(str(ROOT))) == []


@pytest.mark.parametrize("profile", PUBLISHED)
def test_a_record_tells_of_the_run_that_was_planned(profile):
    workspace = Workspace(str(ROOT))
    for run in published_plan(profile):
        if workspace.record(run).exists():
            asked = read_record(workspace.record(run))["asked"]
            told = [asked[field] for field in ("seed", "checkpoint", "method", "keep")]
            assert told == [run.seed, run.checkpoint, run.method, run.keep], run.name


def machine_of(record):
    """Which machine made a record: by what its processor can do, and by the day."""
    if record["where"]["device"].endswith("AVX2"):
        return "second machine"
    return "first machine" if record["where"]["started"] < "2026-11-26" else "third machine"


@pytest.mark.parametrize("profile", PUBLISHED)
def test_a_part_says_which_machine_made_its_records(profile):
    workspace = Workspace(str(ROOT))
    for part in PUBLISHED[profile]:
        paths = [workspace.record(run) for run in part.runs(profile)]
        if part.covers.endswith("not complete yet"):
            assert not all(path.exists() for path in paths), "say which machine made them"
            continue
        machines = {machine_of(read_record(path)) for path in paths}
        made_by = machines.pop() if len(machines) == 1 else "both machines"
        assert part.covers.endswith(made_by), part
        seeds = {read_record(path)["asked"]["seed"] for path in paths}
        assert seeds == set(part.seeds), part


@pytest.mark.parametrize("profile", PLANS)
def test_numbers_follow_from_predictions(profile):
    folder = ROOT / "results" / profile
    for record in read_records(folder):
        if "test" in record["happened"]:
            rows = read_predictions(folder, record)  # refuses rows that were changed
            told = json.loads(json.dumps(summary(rows)))
            assert told == record["happened"]["test"], record["name"]


@pytest.mark.parametrize("profile", PLANS)
def test_runs_share_data_weights_and_test_sentences(profile):
    records = read_records(ROOT / "results" / profile)
    assert len({record["where"]["data"]["sha256"] for record in records}) == 1
    assert len({record["where"]["model"]["weights_sha256"] for record in records}) == 1
    frame = results_frame(ROOT / "results" / profile)
    assert frame.n.nunique() == 1
    assert frame.p_value.between(0, 1).all()


@pytest.mark.parametrize("profile", PLANS)
def test_masks_of_the_table_prune_exactly_as_many(profile):
    records = read_records(ROOT / "results" / profile)
    pruned = {
        record["happened"]["mask"]["total"] - record["happened"]["mask"]["kept"]
        for record in records
        if record["asked"]["method"] not in ("none", "fine_tuning", "gradient_all")
        and record["asked"]["keep"] == 0.9
    }
    assert len(pruned) == 1


def test_the_plan_makes_what_the_figures_need():
    planned = {run.name for run in plan("embedded")}
    for stem in GRADIENT_SWEEP + KEEP_SWEEP:
        assert f"seed0-{stem}" in planned


def test_the_grid_status_counts_records():
    status = grid_status(ROOT / "results")
    status = status.groupby(["profile", "study"])[["runs", "done"]].sum()
    assert (status.done <= status.runs).all()
    assert status.loc[("embedded", "table"), "done"] == status.loc[("embedded", "table"), "runs"]
    assert status.loc[("sst2", "table"), "done"] == len(
        [path for path in (ROOT / "results" / "sst2").glob("*.csv")]
    )
