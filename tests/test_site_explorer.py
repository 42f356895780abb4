"""The explorer: its data are the records', it works in a browser, its masks fit their models."""

import importlib.util
import re
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from mft_nb.applied import AppliedMask
from mft_nb.bitmask import overlap, random_mask
from mft_nb.mask_file import check_base, load_mask, mask_sha256
from mft_nb.model import fetch_model, load_classifier
from mft_nb.study.datasets import load_snippets
from mft_nb.study.names import CHECKPOINT_NAMES, METHOD_NAMES
from mft_nb.study.records import read_predictions, read_record
from mft_nb.targets import maskable_weights

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
MASKS = sorted((RESULTS / "masks").glob("*.safetensors"))
SIZE = {"width": 1280, "height": 720}
TREATED = {
    "profile": "embedded",
    "checkpoint": "90",
    "method": "mft_recommended",
    "setting": "10 % pruned",
    "seed": "1",
}


@pytest.fixture(scope="module")
def explorer():
    """The build step as a module."""
    sys.path.insert(0, str(ROOT / "tools"))  # as where Python runs the file
    place = importlib.util.spec_from_file_location("explorer", ROOT / "tools" / "explorer.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(explorer):
    """The runs that it shows: records and rows."""
    return explorer.read_runs(RESULTS)


@pytest.fixture(scope="module")
def folder(explorer, tmp_path_factory):
    """The built page."""
    try:
        explorer.fetch_libraries()
    except FileNotFoundError as error:
        pytest.skip(f"the explorer cannot be built here: {error}")
    folder = tmp_path_factory.mktemp("explorer")
    explorer.main(folder)
    return folder


@pytest.fixture
def visit(browse, folder):
    """Opens the page with an address."""

    def opened(chosen=None, base=None, size=SIZE, **options):
        address = f"{base or folder.as_uri()}/index.html"
        address = f"{address}#{urlencode(chosen)}" if chosen else address
        page = browse(address, size, **options)
        page.wait_for_selector("body[data-ready]")
        return page

    return opened


@pytest.fixture(scope="module")
def predictions():
    """The rows of a record by its profile and name."""

    def read(profile, name):
        place = RESULTS / profile
        return read_predictions(place, read_record(place / f"{name}.json"))

    return read


def accuracies(page):
    """The two large numbers, in percent."""
    names = ("#accuracy-without", "#accuracy-with")
    return [float(page.inner_text(name).rstrip("\N{NO-BREAK SPACE}%")) for name in names]


def settled(page):
    """Wait until the page has drawn what was asked of it."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))")


def accuracy_at(rows, threshold):
    """In percent, as the page writes it."""
    return round(100 * float(((rows.positive > threshold) == rows.label).mean()), 1)


def test_at_one_half_the_levels_are_the_recorded_predictions(explorer, runs):
    keys = {tuple(explorer.run_entry(record)[:5]) for record, _ in runs}
    assert len(keys) == len(runs), "two runs would have the same choices"
    for _, rows in runs:
        said = explorer.levels(rows) >= explorer.STEPS // 2
        assert (said == rows.prediction).all()


@pytest.mark.parametrize("step", [1, 999, 1001, 1153, 1999])
def test_at_each_step_a_level_says_what_the_probability_does(explorer, predictions, step):
    rows = predictions("base", "seed3-75-none")
    said = explorer.levels(rows) >= step
    assert (said == (rows.positive > step / explorer.STEPS)).all()


def test_every_treated_run_has_its_untreated_one(runs):
    asked = [record["asked"] for record, _ in runs]
    places = {True: set(), False: set()}
    for one in asked:
        places[one["method"] == "none"].add((one["profile"], one["checkpoint"], one["seed"]))
    assert places[False] <= places[True]


def test_without_npm_the_explorer_is_left_out_in_one_line(explorer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(explorer.shutil, "which", lambda name: None)
    explorer.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert said.startswith("The explorer is left out of the site: there is no npm")
    assert said.count("\n") == 1


def test_it_is_at_most_two_megabytes_and_names_no_other_host(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 2_000_000
    page = (folder / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    links = re.findall(r'(?:src|href)="([^"#:]+)"', page)
    assert all((folder / link).exists() for link in links if not link.startswith("../"))


def test_sentences_of_sst2_are_not_published(folder):
    content = (folder / "data.js").read_text()
    assert '"sentences":{"snippets":[' in content
    assert "unflinchingly bleak" not in content


def test_it_opens_with_the_half_trained_mpnet_and_the_link_moves_the_threshold(visit, predictions):
    page = visit()
    assert page.input_value("#profile") == "base"
    assert page.input_value("#checkpoint") == "75"
    rows = predictions("base", "seed3-75-none")
    assert accuracies(page)[0] == accuracy_at(rows, 0.5)
    page.click("#first a >> nth=1")
    page.wait_for_function("document.getElementById('threshold-value').value !== '0.5'")
    moved = float(page.input_value("#threshold-value"))
    assert accuracies(page)[0] == accuracy_at(rows, moved) >= accuracy_at(rows, 0.5) + 10
    assert "points on average" in page.inner_text("#first")


def test_choices_set_the_two_numbers_of_the_records(visit, predictions):
    page = visit()
    for choice, value in TREATED.items():
        page.select_option(f"#{choice}", value)
    rows = [predictions("embedded", f"seed1-90-{name}") for name in ("none", "mft_recommended")]
    assert accuracies(page) == [accuracy_at(one, 0.5) for one in rows]
    page.select_option("#method", "magnitude")
    assert accuracies(page)[1] == accuracy_at(predictions("embedded", "seed1-90-magnitude"), 0.5)
    page.select_option("#seed", "0")
    page.select_option("#setting", "50 % pruned")
    half = predictions("embedded", "seed0-90-magnitude-keep0.5")
    assert accuracies(page)[1] == accuracy_at(half, 0.5)
    page.select_option("#profile", "sst2")
    assert page.input_value("#method") == "magnitude", "a choice stays where it can"


def test_the_slider_moves_both_accuracies(visit, predictions):
    page = visit(TREATED)
    rows = [predictions("embedded", f"seed1-90-{name}") for name in ("none", "mft_recommended")]
    page.focus("#threshold")
    page.keyboard.press("ArrowRight")
    settled(page)
    assert page.input_value("#threshold-value") == "0.5005"
    assert accuracies(page) == [accuracy_at(one, 0.5005) for one in rows]
    for threshold in ("0.3", "0.7245"):
        page.fill("#threshold-value", threshold)
        page.press("#threshold-value", "Enter")
        settled(page)
        assert accuracies(page) == [accuracy_at(one, float(threshold)) for one in rows]
    assert "0.7245" in page.get_attribute("#threshold", "aria-valuetext")
    page.click("#threshold-half")
    settled(page)
    assert accuracies(page) == [accuracy_at(one, 0.5) for one in rows]
    page.click("#threshold-without")
    settled(page)
    assert accuracies(page)[0] == max(accuracy_at(rows[0], k / 2000) for k in range(1, 2000))


def test_fixed_and_broken_sentences_are_counted_and_filtered(visit, predictions):
    page = visit(TREATED)
    rows = [predictions("embedded", f"seed1-90-{name}") for name in ("none", "mft_recommended")]
    before, after = [(one.prediction == one.label).to_numpy() for one in rows]
    expected = {"fixed": ~before & after, "broken": before & ~after}
    expected |= {"right": before & after, "wrong": ~before & ~after}
    for kind, which in expected.items():
        assert page.inner_text(f"#count-{kind}") == str(which.sum())
    for kind in ("right", "wrong", "broken"):
        page.uncheck(f"#show-{kind}")
    settled(page)
    fixed = expected["fixed"]
    assert f"of {fixed.sum()} sentences" in page.inner_text("#list-note")
    assert page.locator("#scatter [aria-label=dot] path").count() == fixed.sum()
    page.select_option("#label", "1")
    settled(page)
    positive = fixed & (rows[0].label == 1).to_numpy()
    assert f"of {positive.sum()} sentences" in page.inner_text("#list-note")
    assert set(page.locator("#list td:nth-child(3)").all_inner_texts()) == {"positive"}


def test_words_find_a_snippet_and_its_row_shows_it(visit):
    page = visit(TREATED)
    text = load_snippets()["test"]["sentence"][41]
    page.fill("#search", text[10:40])
    settled(page)
    page.click("#list button")
    assert page.inner_text("#sentence p >> nth=0") == text
    assert page.input_value("#row") == "42"
    page.fill("#search", "43")
    settled(page)
    assert page.locator("#list button").all_inner_texts() == ["43"]


def test_mouse_keyboard_and_finger_choose_a_mark(visit):
    page = visit(TREATED, has_touch=True)
    first = page.inner_text("#sentence")
    page.locator("#scatter").scroll_into_view_if_needed()
    box = page.locator("#scatter").bounding_box()
    marks = page.evaluate("state.marks")
    high = max(marks, key=lambda mark: mark["left"])
    page.mouse.move(box["x"] + high["left"], box["y"] + high["top"])
    settled(page)
    hovered = page.inner_text("#sentence")
    assert hovered != first
    page.focus("#scatter")
    page.keyboard.press("ArrowLeft")
    settled(page)
    assert page.inner_text("#sentence") != hovered
    low = min(marks, key=lambda mark: mark["left"])
    page.touchscreen.tap(box["x"] + low["left"], box["y"] + low["top"])
    settled(page)
    near = [
        m["row"] + 1 for m in marks if abs(m["left"] - low["left"]) + abs(m["top"] - low["top"]) < 1
    ]
    assert int(page.input_value("#row")) in near


@pytest.fixture
def dev_file(tmp_path, predictions):
    """A made-up dev.tsv: with our labels, or as a test changes it."""

    def write(change=lambda lines: lines):
        labels = predictions("base", "seed3-75-none").label
        lines = [f"made up number {row} . \t{label}" for row, label in enumerate(labels, start=1)]
        path = tmp_path / "dev.tsv"
        path.write_text("\n".join(["sentence\tlabel", *change(lines)]) + "\n")
        return path

    return write


def test_an_opened_dev_file_gives_the_sentences(visit, dev_file):
    page = visit()
    assert "its text is not published" in page.inner_text("#sentence")
    page.set_input_files("#dev", dev_file())
    page.wait_for_function("document.getElementById('dev-message').textContent")
    assert page.inner_text("#dev-message") == "The 872 sentences of dev.tsv are shown."
    assert page.inner_text("#sentence p >> nth=0") == "made up number 1 ."
    page.fill("#search", "number 871")
    settled(page)
    assert page.locator("#list td:nth-child(2)").all_inner_texts() == ["made up number 871 ."]


def test_another_dev_file_is_refused_in_one_sentence(visit, dev_file):
    page = visit()
    turned = {"0": "1", "1": "0"}
    changes = {
        "This file has 871 rows, not 872.": lambda lines: lines[1:],
        "The label of row 3 is not the one of our test.": lambda lines: [
            *lines[:2],
            lines[2][:-1] + turned[lines[2][-1]],
            *lines[3:],
        ],
    }
    for said, change in changes.items():
        page.set_input_files("#dev", [])
        page.set_input_files("#dev", dev_file(change))
        page.wait_for_function(
            "(said) => document.getElementById('dev-message').textContent.startsWith(said)",
            arg=said,
        )
        assert "its text is not published" in page.inner_text("#sentence")


def test_one_sentence_is_shown_in_all_runs(visit, runs):
    page = visit(TREATED | {"row": 7})
    shown = [rows for _, rows in runs if len(rows) == 1000]
    assert page.locator("#strip [aria-label=dot] > *").count() == len(shown)
    right = sum(rows.prediction[6] == rows.label[6] for rows in shown)
    page.click("#strip-title ~ details summary")
    counted = page.locator("#strip-table td:nth-child(5)").all_inner_texts()
    assert sum(map(int, counted)) == right
    page = visit({"profile": "base"})
    page.select_option("#strip-runs", "all")
    settled(page)
    both = [rows for _, rows in runs if len(rows) == 872]
    assert page.locator("#strip [aria-label=dot] > *").count() == len(both)


def test_the_address_keeps_the_view(visit):
    page = visit(TREATED)
    page.uncheck("#show-right")
    page.fill("#threshold-value", "0.61")
    page.press("#threshold-value", "Enter")
    page.click("#row-after")
    page.wait_for_function("/threshold=0.61&row=2/.test(location.hash)")
    seen = [accuracies(page), page.inner_text("#sentence"), page.inner_text("#list-note")]
    address = page.evaluate("location.hash")
    page = visit()
    page.evaluate("(address) => { location.hash = address; }", address)
    page.wait_for_function("document.getElementById('threshold-value').value === '0.61'")
    assert [accuracies(page), page.inner_text("#sentence"), page.inner_text("#list-note")] == seen


@pytest.mark.parametrize("wrong", ["profile=none&seed=x&threshold=y&row=-3", "method=none", "a=b"])
def test_a_wrong_address_gives_a_whole_page(visit, wrong):
    page = visit(dict(part.split("=") for part in wrong.split("&")))
    assert all(0 < accuracy < 100 for accuracy in accuracies(page))


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (800, "dark"), (1400, "light")])
def test_nothing_is_wider_than_the_window(visit, width, scheme):
    page = visit(size={"width": width, "height": 844}, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.select_option("#profile", "embedded")
    page.set_viewport_size({"width": 360, "height": 740})
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_reader_s_choice_of_dark_or_light_holds_here_too(visit):
    page = visit(scheme="dark")
    ground = "getComputedStyle(document.documentElement).getPropertyValue('--ground')"
    dark = page.evaluate(ground)
    page.evaluate("toggleTheme()")
    light = page.evaluate(ground)
    assert dark != light
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate(ground) == light


def test_it_works_by_http_and_asks_no_other_host(visit, folder):
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        page = visit(TREATED, base=f"http://127.0.0.1:{server.server_port}")
        assert accuracies(page)[0] > 80
    finally:
        server.shutdown()
        server.server_close()


def test_every_control_has_a_name(visit):
    page = visit(TREATED)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button")]
            .filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim()))
            .map((one) => one.id)"""
    )
    assert unnamed == []


def test_at_most_six_masks_are_published():
    assert 1 <= len(MASKS) <= 6
    assert sum(path.stat().st_size for path in MASKS) <= 1_400_000
    told = (RESULTS / "masks" / "README.md").read_text()
    for path in MASKS:
        assert f"`{path.name}`" in told
        assert f"`{mask_sha256(load_mask(path).mask)[:12]}`" in told


@pytest.fixture(scope="module")
def minilm():
    """A model of the shapes of the profile's checkpoints, with weights of its own."""
    config = AutoConfig.from_pretrained(fetch_model("minilm"), num_labels=2)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("path", MASKS, ids=lambda path: path.stem)
def test_a_mask_fits_its_checkpoint_and_its_record(path, minilm):
    mask = load_mask(path).mask
    weights = maskable_weights(minilm)
    assert {name: one.shape for name, one in mask.items()} == {
        name: one.shape for name, one in weights.items()
    }
    told = read_record(RESULTS / "embedded" / f"{path.stem}.json")["happened"]["mask"]
    assert mask.kept == told["kept"]
    assert mask.density_by_tensor() == told["density_by_tensor"]
    before = {name: one.detach().clone() for name, one in weights.items()}
    with AppliedMask(minilm, mask):
        for name, keeps in mask.items():
            masked = minilm.get_parameter(name)
            assert not masked[~keeps].any()
            assert (masked[keeps] == before[name][keeps]).all()


def test_the_mask_of_the_untrained_head_is_of_the_packaged_weights():
    path = RESULTS / "masks" / "seed0-baseline-mft_recommended.safetensors"
    model, _ = load_classifier("minilm", seed=0)
    check_base(maskable_weights(model), load_mask(path).base_sha256)


def test_the_random_mask_is_the_one_of_its_seed(minilm):
    saved = load_mask(RESULTS / "masks" / "seed0-90-random.safetensors").mask
    assert saved == random_mask(maskable_weights(minilm), 0.9, seed=0)


def test_two_masks_are_compared_as_the_engine_does(visit):
    first, second = "seed0-90-mft_recommended", "seed0-90-random"
    found = overlap(
        *(load_mask(RESULTS / "masks" / f"{name}.safetensors").mask for name in (first, second))
    )
    page = visit()
    page.select_option("#first-mask", first)
    page.select_option("#second-mask", second)
    said = page.inner_text("#overlap-answer").replace("\N{NO-BREAK SPACE}", " ")
    assert f"{100 * found.fraction:.1f} %" in said
    assert f"by chance it would be {100 * found.chance:.1f} %" in said
    title = f"{METHOD_NAMES['random']}, {CHECKPOINT_NAMES['90']}"
    assert title in said
    page.click("#masks details summary")
    shared = page.locator("#mask-table td:nth-child(6)").all_inner_texts()
    assert sum(int(one.replace(",", "")) for one in shared) == found.shared


def test_the_blocks_of_a_mask_are_its_zeros(explorer):
    mask = load_mask(MASKS[0]).mask
    pictures = np.frombuffer(explorer.block_bytes(~mask), np.uint8).reshape(len(mask), -1)
    for picture, tensor in zip(pictures, mask.values(), strict=True):
        assert picture.mean() / 255 == pytest.approx((~tensor).double().mean().item(), abs=2e-3)
