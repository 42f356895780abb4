"""The figures of the study keep to the house style: a finding as title, few rows, large letters."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.colors import to_hex

from mft_nb.study.effects import OURS
from mft_nb.study.figures.claims import few_figure
from mft_nb.study.figures.curve import CURVES, UNIT_COLORS
from mft_nb.study.figures.draw import ALL_FIGURES, draw_all
from mft_nb.study.figures.lm import LM_FIGURES
from mft_nb.study.figures.style import COLORS, GREY
from mft_nb.study.figures.table import FRONT, _anatomy_title, _changed_title, _front_title
from mft_nb.study.names import CHECKPOINT_NAMES
from mft_nb.study.records import MissingRecords

ROOT = Path(__file__).resolve().parent.parent
WORDS = 12  # of a title, at most
ROWS = 8  # with a name
COLUMNS = 2  # of panels
SEEN = 350  # pixels of width at which a figure must be read
LETTER = 8  # pixels that the size of a letter must have there
NEUTRAL = {"black", "white", GREY, "0.7", "0.9"}  # of lines to compare with, rings and grids


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Every figure of every profile by name, drawn once, and the folder of its files."""
    folder, found = tmp_path_factory.mktemp("figures"), {}

    def keeping(name, draw):
        def one(records):
            figure = draw(records)
            found[f"{records.name}_{name}"] = figure
            return figure

        return one

    kept, of_lm = (
        {name: keeping(name, draw) for name, draw in figures.items()}
        for figures in (ALL_FIGURES, LM_FIGURES)
    )
    draw_all(ROOT / "results", folder, kept, of_lm)
    return found, folder


def failing(drawn, fault):
    """What is wrong by the name of a figure."""
    faults = {name: fault(figure) for name, figure in drawn[0].items()}
    return {name: found for name, found in faults.items() if found}


def title_of(figure):
    """The title of a figure, in one line."""
    return figure.texts[0].get_text().replace("\n", " ")


def panels_of(figure):
    """Panels that hold data."""
    return [axes for axes in figure.axes if axes.has_data()]


def texts_of(figure):
    """Everything that is written, tick labels included, as far as it is shown."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        found += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [tick.label1 for tick in ticks]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def beyond(box, frame):
    """Whether a box is not wholly within a frame."""
    return box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1


def test_published_figures_are_those_of_the_records(drawn):
    fresh = {path.name for path in drawn[1].iterdir()}
    published = {path.name for path in (ROOT / "figures").glob("*_*.*")}
    assert fresh == {name for name in published if not name.startswith("front_page")}
    for name in fresh:
        if name.endswith(".svg"):
            paths = (drawn[1] / name).read_text().count("<path")
            assert paths == (ROOT / "figures" / name).read_text().count("<path"), name


def test_a_title_is_a_finding_in_few_words(drawn):
    def fault(figure):
        title = title_of(figure)
        numbers = re.search(r"[\[\](){}]|\bp\s*[=<]", title)
        return title if numbers or len(title.split()) > WORDS else ""

    assert not failing(drawn, fault)


def test_at_most_two_panels_stand_side_by_side(drawn):
    def fault(figure):
        grids = [axes.get_subplotspec().get_gridspec() for axes in panels_of(figure)]
        return max(grid.ncols for grid in grids) > COLUMNS

    assert not failing(drawn, fault)


def test_panels_side_by_side_share_their_scale(drawn):
    def fault(figure):
        by_row = {}
        for axes in panels_of(figure):
            by_row.setdefault(axes.get_subplotspec().rowspan.start, []).append(axes)
        return any(len({axes.get_ylim() for axes in row}) > 1 for row in by_row.values())

    assert not failing(drawn, fault)


def test_a_figure_has_few_rows_and_one_legend(drawn):
    def fault(figure):
        rows = [
            sum(not re.search(r"^\W*[\d.]+$", text.get_text()) for text in axes.get_yticklabels())
            for axes in panels_of(figure)
        ]
        legends = len(figure.legends) + sum(bool(axes.get_legend()) for axes in figure.axes)
        return max(rows) > ROWS or legends > 1

    assert not failing(drawn, fault)


def test_letters_can_be_read_where_a_figure_is_small(drawn):
    def fault(figure):
        scale = SEEN / figure.get_size_inches()[0] / 72
        return [t.get_text() for t in texts_of(figure) if t.get_fontsize() * scale < LETTER]

    assert not failing(drawn, fault)


def test_nothing_is_written_over_an_edge_or_a_frame(drawn):
    def fault(figure):
        figure.draw_without_rendering()
        places = [(text, figure.bbox) for text in texts_of(figure)]
        places += [(text, axes.bbox) for axes in figure.axes for text in axes.texts]
        found = [text for text, frame in places if beyond(text.get_window_extent(), frame)]
        return [text.get_text() for text in found]

    assert not failing(drawn, fault)


def test_a_colour_means_a_treatment(drawn):
    allowed = {to_hex(color) for color in (*COLORS.values(), *UNIT_COLORS.values(), *NEUTRAL)}

    def fault(figure):
        lines = [line for axes in figure.axes for line in axes.lines]
        return {to_hex(line.get_color()) for line in lines} - allowed

    assert not failing(drawn, fault)


@pytest.mark.parametrize("continued", [(5.1, 5, 4.9), (20, 20, 20), (-20, 1, 9)])
def test_no_clear_difference_is_not_called_about_as_much(continued):
    gains = {OURS: (4.9, 5, 5.1), "continued": continued}
    places = [(c, method, seed) for c in CHECKPOINT_NAMES for method in FRONT for seed in range(3)]
    runs = pd.DataFrame(places, columns=["checkpoint", "method", "seed"])
    points = [gains.get(one.method, (0, 0, 0))[one.seed] / 100 for one in runs.itertuples()]
    runs = runs.assign(keep=0.9, variant="", validation=0.5, n=100, difference=points)
    title = _front_title(runs.assign(accuracy=0.5 + runs.difference))
    assert title.endswith("continued fine-tuning is not clearly worse")


def test_a_title_tells_gains_and_harm():
    words = {"baseline": "helps", "75": "helps", "90": "hurts"}
    assert _changed_title(words) == "Our masks clearly help 2 and hurt 1 of 3 checkpoints"


def test_the_uneven_kind_of_mask_is_named():
    uneven = {"gradient_all": [0.5], OURS: [9.0]}
    assert _anatomy_title(uneven).startswith("Our recipe prunes some")
    uneven["gradient_all"] = [9.0]
    assert _anatomy_title(uneven).startswith("Both kinds of mask prune some")


def test_a_second_model_with_pruned_neurons_is_drawn_as_far_as_its_records_go(tmp_path, capsys):
    here, base = ROOT / "results" / "units", tmp_path / "results" / "units_base"
    (base / "units").mkdir(parents=True)
    shutil.copytree(here.with_name("bench"), base.with_name("bench"))
    runs = [*here.glob("*-none.*"), *here.glob("units/*-units_*-keep0.[257]*-neurons.*")]
    for one in runs:
        if not re.search("fisher|magnitude", one.name):
            shutil.copy(one, base / one.relative_to(here))
    written = draw_all(base.parent, tmp_path / "figures", CURVES)
    assert [path.name for path in written] == ["units_base_curve.png", "units_base_curve.svg"]
    assert "no run that fine-tunes a model with half the neurons" in capsys.readouterr().out
    figure = CURVES["curve"](base)
    caption = figure.texts[1].get_text().replace("\n", " ")
    assert caption.startswith("MPNet-base on SST-2") and "BERT-base's shape" in caption
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 4 and "trained mask of units" in labels


def test_a_few_weights_are_drawn_once_a_half_trained_model_is_there(tmp_path):
    folder = tmp_path / "sst2" / "inspections"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "results/sst2/inspections/seed7-baseline-few.json", folder)
    with pytest.raises(MissingRecords, match="no half-trained model"):
        few_figure(tmp_path / "sst2")
