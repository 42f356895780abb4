"""Make README.md from nbs/index.ipynb without Quarto: `python tools/readme.py [folder]`."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
PYTHON = {"language_info": {"name": "python"}}  # for the colours of code


def shown(cell):
    """A copy of a cell as the page shows it, or None where it is hidden."""
    directives = re.findall(r"^#\s*\|\s*(.+)$", cell.source, flags=re.M)
    if any(directive.startswith(("hide", "default_exp")) for directive in directives):
        return None
    alt = [directive[8:] for directive in directives if directive.startswith("fig-alt:")]
    cell.metadata["alt"] = "".join(alt).strip() or "figure"
    cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M)
    cell.metadata["echo"] = "echo: false" not in directives
    return cell


def main(folder=ROOT):
    """Write README.md, and the page's pictures as figures/front_page_N.png."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [cell for cell in map(shown, notebook.cells) if cell]
    hidden = {cell.id for cell in notebook.cells if not cell.metadata["echo"]}
    pieces, pictures = [], {}
    exporter = MarkdownExporter()
    for cell in notebook.cells:
        exporter.exclude_input = cell.id in hidden
        alone = nbformat.v4.new_notebook(cells=[cell], metadata=PYTHON)
        text, extra = exporter.from_notebook_node(alone)
        for name, content in extra["outputs"].items():
            picture = f"figures/front_page_{len(pictures)}.png"
            pictures[picture] = content
            text = text.replace(f"![png]({name})", f"![{cell.metadata['alt']}]({picture})")
        pieces.append(text.strip())
    page = "\n\n".join(filter(None, pieces))
    page = re.sub(r"\]\((?!https?:)([\w/]+\.ipynb)\)", r"](nbs/\1)", page)  # from the top folder
    header = "<!-- made from nbs/index.ipynb by `make readme` -->\n\n"
    (folder / "figures").mkdir(exist_ok=True)
    for picture, content in pictures.items():
        (folder / picture).write_bytes(content)
    (folder / "README.md").write_text(header + page + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
