"""Build the site without Quarto: `python tools/site.py [folder]` writes `_docs/` or the folder.

nbdev's processors make pages of the notebooks, smalldocs lays them out, and the steps of
`site_html.py` add what it leaves out. No cell of a notebook is run. KaTeX and MiniSearch come by
npm, once; the built site asks no other host for anything.
"""

import gc
import json
import os
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import explorer
import site_html
from execnb.nbio import read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults, add_links, exec_show_docs
from npm_packages import packed_files
from site_names import ExplainNames
from site_pictures import Pictures
from smalldocs.config import load
from smalldocs.site import Site as SmallSite

ROOT = Path(__file__).resolve().parent.parent
TEXT_LENGTH = 1500  # characters of a section that the search reads


def quote_alt(cell):
    """An alternative text with a colon is no YAML unless it stands in quotes."""
    if cell.cell_type == "code":
        quoted = re.compile(r"^(#\|\s*fig-alt:\s*)([^\s\"'].*)$", flags=re.M)
        cell.source = quoted.sub(lambda line: line[1] + json.dumps(line[2]), cell.source)


class Processors(FilterDefaults):
    """nbdev's processors, with names explained from the package and linked in the pages."""

    def base_procs(self):
        procs = [proc for proc in super().base_procs() if proc is not add_links]
        procs = [ExplainNames if proc is exec_show_docs else proc for proc in procs]
        return [*procs, quote_alt]


def make_pages(work):
    """Notebooks without what nbdev hides, and the files next to them, in the folder `work`."""
    source = get_config().nbs_path
    skipped = shutil.ignore_patterns("*.ipynb", ".*", "_proc", "_docs")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work, ignore=skipped)
    for path in nbglob(as_path=True):
        notebook = read_nb(path)
        Processors()(notebook)
        write_nb(notebook, work / path.relative_to(source))


def lay_out(work):
    """The pages as HTML; gives the folder and the links that lead nowhere."""
    small = SmallSite(load(work), quiet=True)
    small.build()
    return small.out, [f"{page}: broken link {href}" for page, href in small.broken]


def called_by_nbdev(path):
    """The name that nbdev gives a page: without the number in front."""
    return str(path.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.name.lower())))


def explained_names(package, pages):
    """Where each exported name is explained, by its name without the module."""
    index = import_module(f"{package}._modidx").d["syms"]
    names = {}
    for module, members in index.items():
        for full, (target, _) in members.items():
            page, _, anchor = target.partition("#")
            if page in pages:
                names.setdefault(full.removeprefix(f"{module}."), f"{pages[page]}#{anchor}")
    return names


def copy_assets(out, assets):
    """Style, scripts and libraries into `site_libs/`, in place of smalldocs's search."""
    libs = out / "site_libs"
    for name in ("site.css", "site.js", "theme.js", "favicon.svg"):
        shutil.copy(assets / name, libs / name)
    shutil.rmtree(libs / "fuse", ignore_errors=True)
    versions = json.loads((assets / "package.json").read_text(encoding="utf-8"))["dependencies"]
    for package, name_of in (("katex", katex_file), ("minisearch", minisearch_file)):
        for name, content in packed_files(package, versions[package], name_of).items():
            target = libs / package / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(slim(name, content))


def katex_file(name):
    """What a file of KaTeX's package is called here; None for one that no page loads."""
    if name == "LICENSE" or name.startswith("dist/fonts/") and name.endswith(".woff2"):
        return name.removeprefix("dist/")
    loaded = ("dist/katex.min.js", "dist/katex.min.css", "dist/contrib/auto-render.min.js")
    return Path(name).name if name in loaded else None


def minisearch_file(name):
    """The same for MiniSearch's package."""
    return {"LICENSE.txt": "LICENSE", "dist/umd/index.js": "minisearch.js"}.get(name)


def slim(name, content):
    """A style sheet without font formats that only old browsers read; a script without its map."""
    if name.endswith(".css"):
        return re.sub(rb',url\([^)]*\.(woff|ttf)\) format\("[a-z]*"\)', b"", content)
    return re.sub(rb"^//# sourceMappingURL.*$", b"", content, flags=re.M)


def add_explorer(out):
    """Let `explorer.py` make its page, and read it; None where it left the page out."""
    folder = out / "explorer"
    explorer.main(folder)
    return site_html.read(folder / "index.html", out) if (folder / "index.html").exists() else None


def write_search(out):
    """The index of the search as a script, which a page that is opened from the disk may load."""
    entries = json.loads((out / "search.json").read_text(encoding="utf-8"))
    for number, entry in enumerate(entries):
        entry["id"] = number
        entry["text"] = entry["text"][:TEXT_LENGTH]
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    (out / "search-index.js").write_text(f"window.siteIndex = {text};\n", encoding="utf-8")
    (out / "search.json").unlink()


def build(target=ROOT / "_docs", root=ROOT):
    """Build the site of a checkout into a folder; gives its problems, one line each."""
    target = Path(target).resolve()
    work = target.with_name("_proc")
    os.chdir(root)
    sys.path.insert(0, str(root))
    config = get_config()
    make_pages(work)
    out, problems = lay_out(work)
    parsed = [site_html.read(path, out) for path in sorted(out.rglob("*.html"))]
    pages = {called_by_nbdev(page.path): str(page.path) for page in parsed}
    anchors = {f"{page.path}#{tag['id']}" for page in parsed for tag in page.soup.find_all(id=True)}
    names = explained_names(config.lib_path.name, pages)
    made = add_explorer(out)
    site = site_html.Site(
        names={name: place for name, place in names.items() if place in anchors},
        host=config.doc_host + config.doc_baseurl,
        pages=pages,
        pictures=Pictures(out / "pictures", root / "figures"),
        explorer=made is not None,
    )
    copy_assets(out, root / "site")
    for page in parsed:
        site_html.finish(page, site)
        (out / page.path).write_text(str(page.soup), encoding="utf-8")
    write_search(out)
    (out / "sitemap.xml").unlink(missing_ok=True)  # its addresses are of a host that does not exist
    checked = [*parsed, made] if made else parsed
    ids = {str(path.relative_to(out)): set() for path in out.rglob("*") if path.is_file()}
    for page in checked:
        ids[str(page.path)] = {tag["id"] for tag in page.soup.find_all(id=True)}
    for page in checked:
        problems += site_html.link_problems(page, ids, config.doc_host)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(out, target)
    return problems


def main(target=ROOT / "_docs"):
    """Build, and fail where a link leads nowhere."""
    gc.disable()  # parsed pages are millions of objects in use: looking for others takes seconds
    try:
        problems = build(target)
    except FileNotFoundError as error:
        if "npm" not in str(error):
            raise
        sys.exit(f"The site was not built: {error}")
    print(*problems, sep="\n", end="\n" if problems else "")
    if problems:
        sys.exit(f"{len(problems)} links of the site lead nowhere: correct them in the notebooks")
    print(f"the site is in {target}/index.html")


if __name__ == "__main__":
    main(*sys.argv[1:])
