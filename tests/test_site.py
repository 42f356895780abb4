"""The site as a reader meets it: built once, then opened in Chromium, by http and from the disk."""

import ast
import functools
import gc
import http.server
import importlib
import os
import re
import runpy
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("smalldocs", reason="the site is built with smalldocs, of the extra `dev`")
from bs4 import BeautifulSoup  # noqa: E402
from PIL import Image  # noqa: E402

from tests.browser import DESK  # noqa: E402
from tests.forks import FORKS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
KINDS = (  # of pages: front page, names, a finding, mathematics, a tutorial, a glossary, figures
    "index.html",
    "15_config.html",
    "findings/controls.html",
    "25_stats.html",
    "tutorials/your_model.html",
    "glossary.html",
    "study/25_study_figures.html",
)
PHONE = {"width": 390, "height": 844}


def build(folder, seconds):
    """Run `tools/site.py`, and leave the seconds of the processor that it took in a file."""
    os.chdir(ROOT)
    sys.argv = [str(ROOT / "tools" / "site.py"), str(folder)]
    sys.path.insert(0, str(ROOT / "tools"))
    runpy.run_path(sys.argv[0], run_name="__main__")
    seconds.write_text(str(time.process_time()))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a freshly built site."""
    folder = tmp_path_factory.mktemp("site")
    process = FORKS.Process(target=build, args=(folder / "_docs", folder / "seconds"))
    process.start()
    process.join(timeout=280)
    process.kill()  # if it hangs
    process.join()
    assert process.exitcode == 0  # stderr says why
    # seconds of the processor, which other work on the machine does not change
    assert float((folder / "seconds").read_text()) < 100
    return folder / "_docs"


@pytest.fixture(scope="module")
def pages(site):
    """The pages that come from notebooks, parsed, by their path."""
    paths = sorted(path for path in site.rglob("*.html") if "explorer" not in path.parts)
    gc.disable()  # all are kept, and a search for garbage among them would take seconds
    parsed = {
        str(path.relative_to(site)): BeautifulSoup(path.read_text(), "html.parser")
        for path in paths
    }
    gc.freeze()
    gc.enable()
    yield parsed
    gc.unfreeze()


@pytest.fixture(scope="module")
def server(site):
    """The address of the site by http."""
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and prints nothing."""

    def log_message(self, *_):
        """No line for each request."""


@pytest.fixture(params=["http", "disk"])
def root(request, site):
    """The address of the site: by http, and from the disk."""
    if request.param == "http":
        return request.getfixturevalue("server")
    return f"{site.as_uri()}/"


def seen(page, selector):
    """Whether the first element of a selector lies within the window, left to right."""
    box = page.locator(selector).first.bounding_box()
    return box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]


# ---- what the files hold


def test_pages_are_small(site, pages):
    sizes = {}
    for path, page in pages.items():
        pictures = {image["src"].rpartition("/")[2] for image in page.main.find_all("img")}
        own = sum((site / "pictures" / name).stat().st_size for name in pictures)
        sizes[path] = (site / path).stat().st_size + own
    assert max(sizes.values()) <= 800_000, max(sizes, key=sizes.get)


def test_nothing_is_loaded_from_another_host(site, pages):
    for path, page in pages.items():
        for tag in page.find_all(["script", "link", "img", "iframe"]):
            address = tag.get("src") or tag.get("href") or ""
            assert not urlsplit(address).netloc, f"{path}: {address}"
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style


def test_names_lead_to_a_page_here(pages):
    names = [link["href"] for page in pages.values() for link in page.find_all("a", class_="name")]
    assert len(names) > 500
    assert not [address for address in names if urlsplit(address).netloc]
    links = [page.find("a", class_="name", string="MaskConfig") for page in pages.values()]
    targets = {link["href"] for link in links if link}
    assert {"15_config.html#maskconfig", "../15_config.html#maskconfig", "#maskconfig"} == targets


def test_links_that_lead_nowhere_are_named(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    page_type = importlib.import_module("site_html").Page
    problems = importlib.import_module("site_html").link_problems
    soup = BeautifulSoup(
        '<a href="https://here.example/mft/a.html">1</a><a href="gone.html">2</a>'
        '<a href="../b.html#gone">3</a><a href="../b.html#there">4</a><a href="#own">5</a>'
        '<a href="https://arxiv.org/abs/2503.22764">6</a><img src="https://other.example/x.png">',
        "html.parser",
    )
    page = page_type(Path("sub/a.html"), soup)
    ids = {"sub/a.html": {"own"}, "b.html": {"there"}}
    found = list(problems(page, ids, "https://here.example"))
    assert [re.search(r": (\S+) ", line)[1] for line in found] == [
        "https://here.example/mft/a.html",
        "gone.html",
        "../b.html#gone",
        "https://other.example/x.png",
    ]


def fields_in_the_source():
    """Class, field and the comment next to it, for every public dataclass of the package."""
    for path in sorted((ROOT / "mft_nb").rglob("[a-z]*.py")):
        source = path.read_text()
        lines = source.splitlines()
        for cls in ast.parse(source).body:
            if not isinstance(cls, ast.ClassDef) or cls.name.startswith("_"):
                continue
            if any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list):
                for field in cls.body:
                    if isinstance(field, ast.AnnAssign) and "init=False" not in ast.unparse(field):
                        comment = lines[field.end_lineno - 1].partition("  # ")[2]
                        yield cls.name, field.target.id, comment.replace("`", "")


def test_each_field_of_a_dataclass_is_explained_on_its_page(pages):
    tables = {
        table.find_parent(class_="table-box")["data-label"]: table
        for page in pages.values()
        for table in page.select("table.parameters")
    }
    fields = list(fields_in_the_source())
    assert len(fields) > 100
    for cls, name, comment in fields:
        rows = tables[f"Parameters of {cls}"].select("tbody tr")
        meanings = {row.td.get_text(): row.find_all("td")[3].get_text() for row in rows}
        assert comment in meanings[name], (cls, name)


def test_a_function_and_a_method_have_a_table_of_parameters(pages):
    def table_after(page, name):
        return pages[page].find(id=name).find_next("table", class_="parameters")

    rows = table_after("15_config.html", "check_number").select("tbody tr")
    cells = [[cell.get_text() for cell in row.find_all("td")] for row in rows]
    assert cells[2] == ["low", "float", "", "lowest allowed value"]
    assert cells[4] == ["whole", "bool", "False", "whether only whole numbers are allowed"]
    method = table_after("22_mask.html", "mft.save_pretrained")
    assert method.tbody.tr.td.get_text() == "folder"


def test_each_picture_has_words(pages):
    images = [(path, image) for path, page in pages.items() for image in page.main.find_all("img")]
    assert len(images) > 50
    assert not [(path, image["src"]) for path, image in images if len(image.get("alt", "")) < 20]


def test_pictures_are_sharp(site, pages):
    """From SVG, or with twice the pixels at which they are shown."""
    blurred = []
    for path, page in pages.items():
        for image in page.main.find_all("img"):
            source = (site / path).parent / image["src"]
            if source.suffix == ".png" and Image.open(source).width < 1.9 * int(image["width"]):
                blurred.append((path, image["src"]))
    assert not blurred
    figures = pages["study/25_study_figures.html"].main.find_all("img")
    assert sum(image["src"].endswith(".svg") for image in figures) >= 10  # each named figure


def test_code_of_findings_is_folded(pages):
    page = pages["findings/controls.html"]
    folded = page.select("details.code-fold")
    assert folded
    assert not [details for details in folded if details.has_attr("open")]
    assert all(code.find_parent("details") for code in page.select("pre.cell-code"))


def test_pages_have_an_icon_edit_and_source_links_and_neighbours(pages):
    for path, page in pages.items():
        assert page.find("link", rel="icon"), path
        actions = {link.get_text(strip=True) for link in page.select(".toc-action")}
        assert {"Edit this page", "View source"} <= actions, path
    assert pages["findings/controls.html"].select(".nav-page-previous a, .nav-page-next a")
    assert pages["index.html"].find("a", attrs={"aria-label": "Repository"})


# ---- what a reader sees


def test_the_front_page_opens(root, browse):
    page = browse(f"{root}index.html")
    assert page.locator("h1").inner_text() == "mft_nb"
    picture = page.locator("main img").first
    picture.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('main img').naturalWidth > 100")
    page.locator("main a[href='findings/controls.html']").first.click()
    assert page.locator("h1").inner_text() == "Does the mask cause the gain?"


def test_search_finds_a_name_and_leads_to_it(root, browse):
    page = browse(f"{root}findings/controls.html")
    page.keyboard.press("/")
    page.keyboard.type("save_pretrained")
    wanted = page.locator(".site-search-results a:first-child", has_text="MFT.save_pretrained")
    wanted.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url("**/22_mask.html#mft.save_pretrained")
    page.locator(".site-search input").fill("no such word anywhere")
    page.locator(".found-nothing", has_text="Nothing found").wait_for()


def test_search_forgives_a_slip(browse, site):
    page = browse(f"{site.as_uri()}/index.html")
    page.locator(".site-search input").fill("thresold")
    page.locator(".site-search-results a", has_text="hreshold").first.wait_for()


@pytest.mark.parametrize("path", KINDS)
def test_a_phone_shows_the_page_without_scrolling_sideways(path, browse, site):
    page = browse(f"{site.as_uri()}/{path}", PHONE)
    page.wait_for_load_state()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]


def test_the_menu_of_a_phone_scrolls_to_its_end(browse, site):
    page = browse(f"{site.as_uri()}/index.html", PHONE)
    page.locator(".quarto-btn-toggle").click()
    last = page.locator("#quarto-sidebar a.sidebar-link").last
    last.scroll_into_view_if_needed()
    box = last.bounding_box()
    assert 0 < box["y"] < PHONE["height"]
    last.click()
    page.wait_for_url("**/study/35_gpu.html")


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_a_table_shows_its_verdict(size, browse, site):
    for path in ("findings/controls.html", "findings/ledger.html"):
        page = browse(f"{site.as_uri()}/{path}", size)
        heads = page.locator("th", has_text="verdict")
        assert heads.count()
        for number in range(heads.count()):
            box = heads.nth(number).bounding_box()
            assert box["x"] + box["width"] <= size["width"], (path, number)


def test_a_table_that_scrolls_says_so_and_the_keyboard_reaches_it(browse, site):
    page = browse(f"{site.as_uri()}/findings/ledger.html", PHONE)
    box = page.locator(".table-frame.scrolls .table-box").first
    box.wait_for()
    assert box.get_attribute("tabindex") == "0"
    assert box.get_attribute("aria-label").startswith("Table: ")
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")
    hint = "getComputedStyle(document.querySelector('.table-frame.scrolls'), '::before').content"
    assert "scroll sideways" in page.evaluate(hint)


def test_mathematics_needs_no_network(browse, site):
    page = browse(f"{site.as_uri()}/25_stats.html")
    formulas = page.locator(".math").count()
    assert formulas > 20
    page.locator(".math .katex").nth(formulas - 1).wait_for(state="attached")
    assert page.locator(".math .katex").count() == formulas
    assert page.locator(".katex-error").count() == 0
    page.evaluate("document.fonts.ready")
    assert page.evaluate("document.fonts.check('16px KaTeX_Math')")


def test_dark_mode_is_kept(browse, server):
    page = browse(f"{server}index.html")
    shade = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(shade)
    page.locator(".theme-button").click()
    dark = page.evaluate(shade)
    page.goto(f"{server}15_config.html")
    assert page.evaluate(shade) == dark != light


def test_the_system_may_ask_for_dark_mode(browse, site):
    page = browse(f"{site.as_uri()}/index.html", scheme="dark")
    assert page.evaluate("document.documentElement.dataset.bsTheme") == "dark"


def test_the_first_tab_skips_the_menus(browse, site):
    page = browse(f"{site.as_uri()}/15_config.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip-link"
    assert seen(page, ".skip-link")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "MAIN"


def serious(page):
    """axe's serious and critical findings on a page, folded code unfolded."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    found = Axe().run(page).response["violations"]
    return [
        (finding["id"], [node["html"][:200] for node in finding["nodes"][:3]])
        for finding in found
        if finding["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("path", KINDS)
def test_axe_finds_nothing_serious(path, browse, server):
    assert serious(browse(server + path)) == []


@pytest.mark.parametrize("path", ["15_config.html", "findings/controls.html"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_axe_finds_nothing_serious_in_the_dark_with_search_open(path, size, browse, server):
    page = browse(server + path, size, "dark")
    if size is PHONE:
        page.locator(".navbar-toggler").click()
        page.locator(".navbar-collapse.show").wait_for()
    page.locator(".site-search input").fill("random mask")
    page.locator(".site-search-results a").first.wait_for()
    assert serious(page) == []
