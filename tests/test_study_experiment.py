"""The runner: same seed, same records; a killed run leaves nothing half-written and goes on."""

import json
import time

import pytest

from mft_nb.study.plan import Run, Workspace
from mft_nb.study.records import CHANGING, read_predictions, read_record, read_records
from mft_nb.study.runner import do_run, missing_runs, run_missing
from tests import tiny
from tests.forks import FORKS
from tests.tiny import PROFILE, RUNS


def lasting(record):
    """A record without what differs between equal runs."""
    where = {name: value for name, value in record["where"].items() if name not in CHANGING}
    return json.dumps(record | {"where": where}, sort_keys=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Records of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    tiny.run(out)
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Records of a run that was killed after its first record, and started again."""
    out = tmp_path_factory.mktemp("killed")
    folder = Workspace(str(out)).records("tiny")
    process = FORKS.Process(target=tiny.run, args=(out,))
    process.start()
    deadline = time.monotonic() + 300
    while not list(folder.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    time.sleep(1)  # the workers notice and end
    records = read_records(folder)  # each is whole
    assert 0 < len(records) < len(RUNS) + 1, "killed too late: this tests nothing"
    for record in records:
        if "test" in record["happened"]:
            read_predictions(folder, record)
    tiny.run(out)
    return out


def test_every_run_has_a_record(whole):
    assert missing_runs(RUNS, Workspace(str(whole))) == []
    names = {record["name"] for record in read_records(Workspace(str(whole)).records("tiny"))}
    assert names == {run.name for run in RUNS} | {"seed0-fine_tuning"}
    assert not (whole / "shared").exists()


def test_same_seed_same_records_and_a_killed_run_goes_on(whole, killed):
    one = read_records(Workspace(str(whole)).records("tiny"))
    two = read_records(Workspace(str(killed)).records("tiny"))
    assert [lasting(record) for record in one] == [lasting(record) for record in two]


def test_a_ray_cluster_of_two_workers_makes_the_same_records(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # with Ray's 15 it waits for the other tests
    tiny.run(tmp_path, "ray", [RUNS[0], RUNS[-1]])  # starting the cluster takes longest
    one = read_records(Workspace(str(whole)).records("tiny"))
    two = {lasting(record) for record in read_records(Workspace(str(tmp_path)).records("tiny"))}
    assert len(two) == 3 and two < {lasting(record) for record in one}


def test_the_pull_on_scores_is_recorded(whole):
    workspace = Workspace(str(whole))
    run = Run("tiny", 0, "90", "pull", 1.0, "inspections")
    pulls = read_record(do_run(run, PROFILE, workspace, {"progress": False}))["happened"]["pulls"]
    assert pulls["mft_seed"]["penalty"] == 1e-4
    assert pulls["mft_seed"]["task"] == pulls["mft_seed, mean"]["task"] > 0
    assert pulls["mft_seed"]["outweighed"] > pulls["mft_seed, mean"]["outweighed"]
    assert pulls["mft_paper"]["penalty"] == pulls["mft_recommended"]["penalty"] == 0


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="engine is 'slurm'; allowed are processes, ray"):
        run_missing(RUNS, Workspace(str(tmp_path)), profile=PROFILE, engine="slurm")


def test_nothing_half_written_stays(killed):
    folder = Workspace(str(killed)).records("tiny")
    stems = {path.stem for path in folder.glob("*.json")}
    for path in folder.iterdir():
        assert path.suffix in (".json", ".csv")
        assert path.suffix != ".csv" or path.stem in stems


def test_a_second_run_does_nothing(whole):
    folder = Workspace(str(whole)).records("tiny")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run_missing(RUNS, Workspace(str(whole)), profile=PROFILE, progress=False) == 0
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_missing_record_is_made_anew_and_equal(whole):
    workspace = Workspace(str(whole))
    path = workspace.records("tiny") / "seed0-90-random.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert run_missing(RUNS, workspace, jobs=1, profile=PROFILE, progress=False) == 1
    assert lasting(json.loads(path.read_text())) == lasting(before)
