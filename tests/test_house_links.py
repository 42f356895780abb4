"""Links between the pages lead somewhere."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not p.parent.name.startswith(".")]


def links_of(page):
    """Where the links in a notebook's prose lead."""
    cells = nbformat.read(page, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "nbs")))
def test_links_within_the_pages_are_relative_and_exist(page):
    for link in links_of(page):
        if not link.startswith(("https://", "http://", "#", "attachment:")):
            assert not link.startswith("/"), link
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_the_tutorial_on_your_own_model_leads_on():
    assert links_of(ROOT / "nbs" / "tutorials" / "your_model.ipynb")
