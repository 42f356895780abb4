"""The front page keeps to its budgets, and findings answer before they show code."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FINDINGS = sorted((ROOT / "nbs" / "findings").glob("*.ipynb"))


def words(text):
    """Words that a reader reads: no code, no addresses, no marks."""
    text = re.sub(r"```.*?```|<!--.*?-->", " ", text, flags=re.S)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    return re.findall(r"[^\W_]+(?:[-'’.][^\W_]+)*", text)


def before(heading):
    """The page up to a line."""
    start, found, _ = README.partition(heading)
    assert found, heading
    return start


def test_the_first_command_comes_early():
    start = before("make reproduce")
    assert len(words(start)) <= 200
    assert len(re.findall(r"\d+(?:[.,]\d+)*", " ".join(words(start)))) <= 25


def test_the_front_page_is_read_in_minutes():
    assert len(words(before("## How it is built"))) <= 750


def test_a_finding_has_one_number():
    found = before("\n![Accuracy on three").split("## What was found")[1]
    findings = re.findall(r"^\d\. .*$", found, flags=re.M)
    assert len(findings) == 3
    for finding in findings:
        text = re.sub(r"\]\([^)]*\)", "]", finding)
        assert len(re.findall(r"[+−]\d+\.\d", text)) == 1, finding
        assert re.search(r"\(nbs/findings/\w+\.ipynb\)", finding), finding


def test_a_quantity_has_one_number():
    """A number of a finding stands on the page that it links to."""
    for finding in re.findall(r"^\d\. .*$", README, flags=re.M):
        pages = re.findall(r"\((nbs/findings/\w+\.ipynb)\)", finding)
        number = re.search(r"[+−]\d+\.\d", finding)
        if number is None:
            continue
        texts = [(ROOT / page).read_text(encoding="utf-8") for page in pages]
        shown = number.group().replace("−", "\\u2212")
        assert any(number.group() in text or shown in text for text in texts), finding


@pytest.mark.parametrize("page", FINDINGS, ids=lambda page: page.stem)
def test_a_page_answers_before_it_shows_code(page):
    notebook = nbformat.read(page, as_version=4)
    title, answer, *rest = [cell for cell in notebook.cells if "#| hide" not in cell.source]
    assert title.source.startswith("# ") and title.source.split("\n")[0].endswith("?")
    assert answer.cell_type == "markdown" and answer.source.startswith("**")
    first = rest[0]
    assert first.cell_type == "code"
    assert any("image/png" in output.get("data", {}) for output in first.outputs), "no figure"
    order = "\n".join(cell.source for cell in rest if cell.cell_type == "markdown")
    parts = ["## How sure are we?", "## What we did not test", "## Method"]
    places = [order.index(part) for part in parts]
    assert places == sorted(places)
    code = [cell for cell in rest if cell.cell_type == "code"]
    folds = ("#| code-fold: true", "#| code-fold: show")
    assert all(cell.source.startswith(folds) for cell in code)


@pytest.mark.parametrize("page", FINDINGS, ids=lambda page: page.stem)
def test_a_page_explains_its_terms(page):
    assert "](../glossary.ipynb)" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", FINDINGS, ids=lambda page: page.stem)
def test_each_page_is_listed_on_the_front_page_and_in_the_sidebar(page):
    assert f"](nbs/findings/{page.name})" in README
    assert f"findings/{page.name}" in (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8")


BANNED = (  # of STYLE's table: what a reader has to guess
    "cannot be told|told apart|is not seen to|nothing is seen to|the seed experiment|seed recipe|"
    "the small model|the larger model|rungs?|best checkpoint|baseline checkpoint"
)


@pytest.mark.parametrize("page", FINDINGS, ids=lambda page: page.stem)
def test_a_page_speaks_plainly(page):
    cells = nbformat.read(page, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    shown = "\n".join(
        str(output.get("data", {}).get("text/markdown", ""))
        for cell in cells
        for output in cell.get("outputs", [])
    )
    assert not re.findall(rf"\b(?:{BANNED})\b", prose + shown)
