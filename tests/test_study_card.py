"""A record of the study as the result on a mask's card: with its own mask, and none it lacks."""

from pathlib import Path

import numpy as np
import pytest

from mft_nb.card import mask_card
from mft_nb.mask_file import load_mask, mask_sha256
from mft_nb.study.recording import describe_mask, record_result, write_record
from mft_nb.study.records import prediction_rows, read_record, summary
from mft_nb.study.tables import results_frame
from tests.test_card import ABOUT, save_toy

ROOT = Path(__file__).resolve().parent.parent


def test_every_published_mask_has_the_result_of_the_table():
    frame = results_frame(ROOT / "results" / "sst2").set_index("name")
    masked = frame[frame.masked > 0]
    assert len(masked)
    for name, row in masked.iterrows():
        result = record_result(ROOT / "results" / "sst2" / f"{name}.json")
        assert (result.total, result.after) == (row.n, row.correct)
        assert (result.paired.fixed, result.paired.broken) == (row.fixed, row.broken)
        assert result.paired.p_value == row.p_value


def test_a_record_gives_only_a_hash_that_a_mask_file_can_have():
    for path in (ROOT / "results" / "masks").glob("*.safetensors"):
        result = record_result(ROOT / "results" / "embedded" / f"{path.stem}.json")
        assert result.mask_sha256 in (None, mask_sha256(load_mask(path).mask))
    later = record_result(ROOT / "results" / "sst2" / "seed0-90-random.json")
    told = read_record(ROOT / "results" / "sst2" / "seed0-90-random.json")
    assert later.mask_sha256 == told["happened"]["mask"]["sha256"]


def write_toy_records(folder, mask, data=("a", "a")):
    """Records of a masked run and of the unmasked one; the path of the first."""
    for method, predictions, digest in (
        ("none", [0, 1, 0, 1], data[0]),
        ("mft_seed", [0, 1, 1, 1], data[1]),
    ):
        rows = prediction_rows(np.eye(2)[predictions], [0, 1, 1, 1])
        asked = {"profile": "toy", "seed": 0, "checkpoint": "90", "method": method, "keep": 0.9}
        happened = {"test": summary(rows)}
        if method != "none":
            happened["mask"] = describe_mask(mask)
        where = {"data": {"sha256": digest}}
        path = write_record(folder, f"seed0-90-{method}", asked, happened, where, rows)
    return path


def test_a_record_goes_with_its_own_mask_only(tmp_path):
    path = write_toy_records(tmp_path / "records", save_toy(tmp_path / "mask"))
    result = record_result(path)
    assert (result.before, result.after, result.total) == (3, 4, 4)
    page = mask_card(tmp_path / "mask", **ABOUT, result=result).text
    assert "+25.00 points: 1 fixed, 0 broken of 4; McNemar's exact test p = 1.000" in page
    save_toy(tmp_path / "other", first=True)
    with pytest.raises(ValueError, match="record of another mask"):
        mask_card(tmp_path / "other", **ABOUT, result=result)


def test_records_that_cannot_be_compared_are_refused(tmp_path):
    mask = save_toy(tmp_path / "mask")
    path = write_toy_records(tmp_path / "mixed", mask, data=("a", "b"))
    with pytest.raises(ValueError, match="different data"):
        record_result(path)
    alone = write_toy_records(tmp_path / "alone", mask)
    alone.with_name("seed0-90-none.json").unlink()
    with pytest.raises(FileNotFoundError, match="No record seed0-90-none.json"):
        record_result(alone)
    with pytest.raises(FileNotFoundError, match="No record seed9-90-mft_seed.json"):
        record_result(alone.with_name("seed9-90-mft_seed.json"))
