"""The steps that each page of the site goes through after smalldocs: `finish(page, site)`."""

import posixpath
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, NavigableString

ELSEWHERE = re.compile(r"^https://.*/katex@[\d.]+/dist/(contrib/)?")
TITLE = re.compile(r'(?:title\(|title=|headline\([^"]*)\s*"([^"{}]+)"')
CALL = re.compile(r"\(.*\)$", flags=re.S)
NAME = re.compile(r"[A-Za-z_][\w.]*")
PARSER = "html.parser"
VERDICT = "verdict"  # the column that a table is read for
WIDE = 5  # columns from which a table may reach into the margin
ALT_LENGTH = 160  # characters
SHORT = 60  # characters of prose that say too little without their heading


@dataclass
class Page:
    """One page, parsed."""

    path: PurePosixPath  # within the site
    soup: BeautifulSoup

    @property
    def root(self):
        """The way from the page to the top folder: nothing, or `../`."""
        return "../" * (len(self.path.parts) - 1)

    @cached_property
    def main(self):
        """The element with the page's own text."""
        return self.soup.find("main")

    def make(self, markup):
        """An element from HTML."""
        return BeautifulSoup(markup, PARSER).contents[0]


@dataclass
class Site:
    """What the pages have in common."""

    names: dict[str, str]  # exported names: where each is explained, from the top folder
    host: str  # where links would lead that belong to this site
    pages: dict[str, str]  # pages as nbdev calls them, and as they are called here
    pictures: object  # keeps the pictures: `site_pictures.Pictures`
    explorer: bool = False  # whether there is one


def finish(page, site):
    """All steps, in their order."""
    for step in (head, header, names_in_prose, names_in_code, own_links, tables, pictures, access):
        step(page, site)


# ---- what is loaded


def head(page, site):
    """Style, scripts, icon and mathematics from this site's own files."""
    libs = f"{page.root}site_libs/"
    for tag in page.soup.head.find_all(["link", "script"]):
        for attribute in ("href", "src"):
            if tag.get(attribute):
                tag[attribute] = ELSEWHERE.sub(f"{libs}katex/", tag[attribute])
        if "fuse" in tag.get("src", ""):
            tag.decompose()
    page.soup.head.meta.insert_after(page.make(f'<script src="{libs}theme.js"></script>'))
    page.soup.head.append(page.make(f'<link rel="icon" href="{libs}favicon.svg">'))
    page.soup.head.append(page.make(f'<link rel="stylesheet" href="{libs}site.css">'))
    page.soup.head.append(page.make(f'<script src="{libs}site.js" defer></script>'))


SEARCH = """<div class="site-search" role="search">
<i class="bi bi-search" aria-hidden="true"></i>
<input type="search" class="form-control form-control-sm" placeholder="Search"
 aria-label="Search this site" aria-controls="site-search-results" autocomplete="off">
<div id="site-search-results" class="site-search-results" hidden></div>
<p class="visually-hidden" role="status"></p></div>"""
THEME = (
    '<li class="nav-item compact"><button type="button" class="nav-link theme-button">'
    '<i class="bi bi-circle-half" aria-hidden="true"></i>'
    '<span class="visually-hidden">Dark or light</span></button></li>'
)


def header(page, site):
    """A link past the menus, the explorer, dark mode and the search box."""
    skip = '<a class="skip-link" href="#quarto-document-content">Skip to the text</a>'
    page.soup.find(id="quarto-header").insert(0, page.make(skip))
    page.main["tabindex"] = "-1"
    left, right = page.soup.select("#navbarCollapse .navbar-nav")
    if site.explorer:
        link = f'<a class="nav-link" href="{page.root}explorer/index.html">Explorer</a>'
        left.append(page.make(f'<li class="nav-item">{link}</li>'))
    right.append(page.make(THEME))
    page.soup.select_one("#quarto-search").replace_with(page.make(SEARCH))


# ---- links


def where(page, site, target):
    """The way from a page to a target, which is given from the top folder."""
    path, _, anchor = target.partition("#")
    return f"#{anchor}" if path == str(page.path) else f"{page.root}{target}"


def link_to(page, site, name):
    """A link element to where a name is explained, without its text."""
    return page.soup.new_tag("a", href=where(page, site, site.names[name]), **{"class": "name"})


def names_in_prose(page, site):
    """A name that is written as code leads to its explanation; so do the names in a type."""
    for code in page.main.find_all("code"):
        if code.find_parent(["a", "pre", "h1", "h2", "h3", "h4", "h5", "summary"]):
            continue
        name = CALL.sub("", code.get_text())
        if name.startswith("."):
            name = class_above(code) + name
        if name in site.names:
            code.wrap(link_to(page, site, name))
        elif code.find_parent(class_="parameters"):
            for string in code.find_all(string=True):
                split_names(page, site, string, NAME)


def class_above(code):
    """In a list of members, the class whose members they are."""
    item = code.find_parent("li")
    above = item.find_parent("li") if item else None
    return above.code.get_text() if above and above.code else ""


def split_names(page, site, string, pattern):
    """Make links of the names that a pattern finds in a piece of text."""
    pieces, end = [], 0
    for found in pattern.finditer(str(string)):
        if found[0] in site.names:
            link = link_to(page, site, found[0])
            link.string = found[0]
            pieces += [NavigableString(str(string)[end : found.start()]), link]
            end = found.end()
    if pieces:
        string.replace_with(*pieces, NavigableString(str(string)[end:]))


def names_in_code(page, site):
    """In blocks of code, names that the page imports from the package lead to their explanation."""
    blocks = page.main.select("pre code.python")
    text = "\n".join(block.get_text() for block in blocks)
    imports = re.findall(r"^from mft_nb[\w.]* import (\([^)]*\)|[^\n]*)", text, flags=re.M)
    imported = {name for part in imports for name in re.findall(r"\w+", part)} & set(site.names)
    if not imported:
        return
    pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(sorted(imported))})(?!\w)")
    for block in blocks:
        for string in block.find_all(string=True, recursive=False):
            before, after = string.previous_sibling, string.next_sibling
            attribute = before is not None and before.get_text() == "."
            assigned = after is not None and after.get_text() == "="
            if not attribute and not assigned:
                split_names(page, site, string, pattern)


def own_links(page, site):
    """Links to the address that this site may have one day lead to the page here."""
    for link in page.soup.find_all("a", href=True):
        if link["href"].startswith(site.host):
            target, _, anchor = link["href"].removeprefix(site.host).lstrip("/").partition("#")
            target = site.pages.get(target, target or "index.html")
            link["href"] = where(page, site, f"{target}#{anchor}" if anchor else target)


def link_problems(page, ids, host):
    """What is wrong with the links of a page, one line each."""
    for tag in page.soup.find_all(["a", "img", "link", "script"]):
        link = tag.get("href") or tag.get("src")
        if not link or link.startswith("data:"):
            continue
        parts = urlsplit(link)
        if parts.netloc:
            if link.startswith(host):
                yield f"{page.path}: {link} leads to no host that exists; link to a page"
            elif tag.name != "a":
                yield f"{page.path}: {link} is loaded from another host; copy it into site/"
        elif not parts.scheme:
            here = page.path.parent / unquote(parts.path) if parts.path else page.path
            target = posixpath.normpath(here)
            if target not in ids:
                yield f"{page.path}: {link} leads to no file"
            elif parts.fragment and ids[target] and unquote(parts.fragment) not in ids[target]:
                yield f"{page.path}: {link} leads to no place on that page"


# ---- tables


def tables(page, site):
    """Each table in a box of its own that scrolls, with a name."""
    for table in page.main.find_all("table"):
        if table.find_parent("table"):
            continue
        label = table.get("aria-label") or f"Table: {heading_before(table)}"
        table.attrs.pop("aria-label", None)
        table.attrs.pop("border", None)
        table["class"] = sorted({*table.get("class", []), "table"} - {"dataframe"})
        box = table.parent
        if "sd-table" not in box.get("class", []):
            box = table.wrap(page.soup.new_tag("div"))
        box.attrs = {"class": "table-box", "data-label": label}
        columns = len(table.tr.find_all(["th", "td"])) if table.tr else 0
        if columns == 2:
            table["class"].append("two-columns")
        frame = box.wrap(page.soup.new_tag("div"))
        frame["class"] = "table-frame" + (" column-page-right" if columns >= WIDE else "")
        heads = [cell.get_text(strip=True) for cell in table.select("thead th, thead td")]
        if VERDICT in heads:
            place = heads.index(VERDICT)
            for row in table.find_all("tr"):
                row.find_all(["th", "td"])[place]["class"] = VERDICT
        for cell in table.select("thead th:empty"):
            cell.name = "td"


def heading_before(tag):
    """The text of the nearest heading above an element."""
    heading = tag.find_previous(["h1", "h2", "h3", "h4"])
    return heading.get_text(" ", strip=True) if heading else "this page"


# ---- pictures


def pictures(page, site):
    """Pictures in files of their own, sharp where there is a sharper one, all with words."""
    for image in page.main.find_all("img"):
        title = site.pictures.place(image, page.root)
        if not image.get("alt"):
            image["alt"] = title or words_for(image)
        image["loading"] = "lazy"


def words_for(image):
    """What a picture shows: its caption, titles in the cell's code, else the prose above it."""
    figure = image.find_parent("figure")
    if figure and figure.figcaption:
        return figure.figcaption.get_text(" ", strip=True)
    cell = image.find_parent(class_="cell") or image
    code = cell.select_one("pre.cell-code") if cell is not image else None
    titles = TITLE.findall(code.get_text()) if code else []
    text = ". ".join(dict.fromkeys(titles)) or prose_above(cell)
    if not titles and len(text) < SHORT:
        text = f"{heading_before(image)}: {text}"
    sentences = re.split(r"(?<=[.!?])\s", text)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > ALT_LENGTH:
            break
        kept += f" {sentence}"
    return kept.rstrip(":")


def prose_above(tag):
    """The nearest paragraph or list item above an element, in the same section."""
    above = tag.find_previous(["p", "li", "h1", "h2", "h3", "h4"])
    while above is not None and "source-link" in above.get("class", []):
        above = above.find_previous(["p", "li", "h1", "h2", "h3", "h4"])
    return above.get_text(" ", strip=True) if above is not None else ""


# ---- what a screen reader and a keyboard meet


def access(page, site):
    """Roles, names and states that smalldocs leaves out."""
    menu, top = page.soup.find(id="quarto-sidebar"), page.soup.find(id="quarto-header")
    menu["aria-label"] = "All pages"
    for link in menu.select("a[data-bs-toggle]"):
        link["role"] = "button"
        link["href"] = link["data-bs-target"]
        link["aria-controls"] = link["data-bs-target"].lstrip("#")
    for toggle in menu.select(".sidebar-item-toggle"):
        section = toggle.parent.select_one(".menu-text").get_text()
        toggle["aria-label"] = f"Open or close {section}"
    for opener in top.select(".quarto-btn-toggle"):
        opener["aria-expanded"] = "false"
        del opener["aria-label"]
        opener.append(" All pages")
    for bar, label in ((".navbar", "This site"), (".quarto-secondary-nav", "Where this page is")):
        top.select_one(bar)["aria-label"] = label
    contents, margin = page.soup.find(id="TOC"), page.soup.find(id="quarto-margin-sidebar")
    if contents:
        contents["aria-label"] = "On this page"
    if margin:
        margin["role"] = "complementary"
    around = page.main.select_one(".page-navigation")
    if around:
        around["aria-label"] = "Previous and next page"
    for icon in page.soup.find_all("i", class_="bi"):
        icon.attrs.pop("role", None)
        icon["aria-hidden"] = "true"
    for button in page.main.find_all("button", class_="code-copy-button"):
        button["aria-label"] = "Copy this code"
        button["type"] = "button"
    for code in page.main.find_all("pre"):
        code["data-label"] = "Code" if code.find_parent(class_="sourceCode") else "Output"


def read(path, root):
    """A page of a folder, parsed."""
    soup = BeautifulSoup(Path(path).read_text(encoding="utf-8"), PARSER)
    return Page(PurePosixPath(Path(path).relative_to(root).as_posix()), soup)
