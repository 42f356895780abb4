"""Figures and effects of the studies, drawn from made-up records with a known answer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

from mft_nb.stats import holm
from mft_nb.study.claims import BERT_MFT, CLAIMS, PROGRAM, bearing_gap, ledger
from mft_nb.study.effects import effects, harmless_fraction
from mft_nb.study.figures.inside import flipped_figure, threshold_means
from mft_nb.study.figures.studies import STUDY_FIGURES, waterfall_figure
from mft_nb.study.figures.style import save_figure
from mft_nb.study.plan import plan
from mft_nb.study.recording import write_record
from mft_nb.study.records import MissingRecords, prediction_rows, summary
from mft_nb.study.tables import results_frame
from mft_nb.study.threshold import half_trained_runs, threshold_frame

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ("table", "controls", "waterfall", "ablations", "curves")
CATASTROPHE = "90 % at random changes the converged model by \N{MINUS SIGN}39.5 points"
ACCURACY = {"baseline": 0.5, "75": 0.76, "90": 0.9}


def made_up(run, drawn):
    """Predictions of a run: as accurate as its checkpoint, less what it prunes, plus what it is."""
    accuracy = ACCURACY[run.checkpoint] - 0.2 * (0.9 - run.keep) * (run.keep < 0.9)
    accuracy += {"continued": 0.03, "mft_seed": -0.06}.get(run.method, 0)
    accuracy += 0.05 if run.variant.startswith("l1_") else 0
    labels = np.arange(400) % 2
    right = np.arange(400) < accuracy * 400 + drawn.integers(-3, 4)
    return prediction_rows(np.eye(2)[np.where(right, labels, 1 - labels)], labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of every study for three seeds."""
    made = tmp_path_factory.mktemp("results") / "made_up"
    drawn = np.random.default_rng(0)
    for run in plan("sst2", (0, 1, 2), STUDIES):
        rows = made_up(run, drawn)
        asked = {name: getattr(run, name) for name in ("seed", "checkpoint", "method", "keep")}
        asked |= {"profile": "made_up", "study": run.study, "variant": run.variant}
        happened = {"test": summary(rows), "validation": summary(rows)}
        if run.method != "none":
            happened["mask"] = {"density": run.keep}
        target = made if run.study == "table" else made / run.study
        write_record(target, run.name, asked, happened, {}, rows)
    return made


def test_effects_find_what_was_put_in(folder):
    found = effects(results_frame(folder, ("controls",)))
    top = found[found.checkpoint == "90"].set_index("method")
    assert top.loc["continued"].low < 0.03 < top.loc["continued"].high
    assert top.loc["mft_seed"].difference < -0.04
    assert (found.p_holm >= found.p_value).all()
    assert (found.seeds == 3).all()


@pytest.mark.parametrize("name", ["effects", "waterfall", "ablations", "curves"])
def test_each_figure_is_drawn(name, folder, tmp_path):
    figure = STUDY_FIGURES[name](folder)
    assert save_figure(figure, tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_ledger_judges_what_was_put_in(folder):
    verdicts = ledger(folder).set_index("claim").verdict
    assert verdicts["it matters which fraction is pruned"] == "replicates"  # 0.2 a unit put in
    assert verdicts["it matters which layers are masked"] == "inconclusive"  # nothing put in
    assert verdicts["the loss is flatter around a masked model"] == "not tested"
    catastrophe = ledger(folder, PROGRAM).set_index("claim").loc[CATASTROPHE]
    assert catastrophe.verdict == "contradicted"  # 16 points put in, 39 reported


def test_a_claim_about_another_treatment_has_a_number_and_no_verdict(folder):
    table = ledger(folder, BERT_MFT).set_index("claim")
    hurts = table.loc["MFT hurts the converged model"]  # 6 points put in, of a trained mask
    assert hurts.verdict == "not tested"
    assert hurts["ours [95 %]"].startswith(("\N{MINUS SIGN}6", "\N{MINUS SIGN}5"))
    assert hurts["p, Holm"] == ""


def test_a_trained_mask_is_not_judged_by_the_number_of_a_random_one(folder):
    table = ledger(folder, BERT_MFT).set_index("claim")
    trained = table.loc["pruning 90 % is a catastrophe; here by our trained mask"]
    assert trained.verdict == "not tested" and trained["ours [95 %]"] and trained["p, Holm"] == ""


def test_what_is_bearable_is_adjusted_for_both_masks_without_training(folder):
    claims = [claim for claim in CLAIMS if claim.measure is bearing_gap]
    found = {m: bearing_gap(folder, replace(claims[0], method=m)) for m in ("random", "magnitude")}
    raw = []
    for one in found.values():
        error = (one.high - one.low) / 2 / student.ppf(0.975, one.seeds - 1)
        raw.append(2 * student.sf(abs(one.difference) / error, one.seeds - 1))
    assert [one.p_value for one in found.values()] == pytest.approx(list(holm(np.array(raw))))
    assert any(one.p_value > p for one, p in zip(found.values(), raw, strict=True))


def test_marks_of_the_threshold_figure_are_of_the_same_seeds():
    frame = threshold_frame(ROOT / "results" / "base")
    runs = half_trained_runs(frame)
    assert set(frame.query("checkpoint == '75'").seed) == set(range(6))
    for _, rows in runs.groupby("method", observed=True):
        assert sorted(rows.seed) == [3, 4, 5]
    assert threshold_means(frame).accuracy["none"] == pytest.approx(0.706, abs=0.0005)


def test_random_masks_of_nine_tenths_have_one_verdict_on_all_pages():
    pages = ("how_much_can_be_pruned", "what_their_program_does", "ledger")
    for page in pages:
        text = (ROOT / "nbs" / "findings" / f"{page}.ipynb").read_text(encoding="utf-8")
        shown = [line for line in text.splitlines() if "24.0 [" in line and "37.1" in line]
        assert shown and not any("inconclusive" in line for line in shown), page
        assert all("hurts" in line or "replicates" in line for line in shown), page


def test_the_waterfall_names_the_repair(folder):
    title = waterfall_figure(folder).texts[0].get_text().replace("\n", " ")
    assert "L1" in title and "repairs most" in title


def test_a_fraction_that_costs_a_point_is_found(folder):
    frame = results_frame(folder, ("curves",))
    assert 0.1 < harmless_fraction(frame, "90", "random", loss=0.05) < 0.5


def test_without_records_a_figure_says_so(tmp_path):
    for draw in STUDY_FIGURES.values():
        with pytest.raises((MissingRecords, FileNotFoundError), match="records|runs|insp"):
            draw(tmp_path)


def test_half_a_study_is_drawn_or_refused_by_name(folder, tmp_path):
    for name in ("seed0-90-none", "seed0-90-mft_seed"):
        for path in folder.glob(f"{name}.*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(MissingRecords, match="our recipe"):
        flipped_figure(tmp_path)
    (tmp_path / "waterfall").mkdir()
    for path in (folder / "waterfall").glob("seed0-90-mft_seed-l1_start.*"):
        (tmp_path / "waterfall" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(MissingRecords, match="one change alone"):
        waterfall_figure(tmp_path)
