"""What is generated from the notebooks is what lies in the repository."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = (ast.Import, ast.ImportFrom)
NOTEBOOKS = [
    p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts
]


def exported(root):
    """The text of each file of the package, those of the study too."""
    package = root / "mft_nb"
    return {str(p.relative_to(package)): p.read_text() for p in package.rglob("*.py")}


def test_export_leaves_no_diff(tmp_path):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    export = Path(sys.executable).with_name("nbdev_export")
    subprocess.run([export], cwd=tmp_path, check=True, capture_output=True)
    fresh, committed = exported(tmp_path), exported(ROOT)
    assert fresh.keys() == committed.keys()
    for name in fresh:
        assert fresh[name] == committed[name], f"mft_nb/{name} differs: run nbdev_export"


def test_readme_is_made_from_the_front_page(tmp_path):
    subprocess.run([sys.executable, ROOT / "tools" / "readme.py", tmp_path], check=True)
    fresh = (tmp_path / "README.md").read_text()
    assert fresh == (ROOT / "README.md").read_text(), "README.md differs: run make readme"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all(cell.get("id") for cell in notebook["cells"])
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        assert not re.search(r"#\s*\|\s*eval:\s*false", source), source
        outputs = cell.get("outputs", [])
        assert not any(output["output_type"] == "error" for output in outputs)
        shown = [output["data"] for output in outputs if "data" in output]
        figures = [data for data in shown if "<Figure" in "".join(data.get("text/plain", ""))]
        assert all("image/png" in data for data in figures), f"no picture of {source}"
        # a warning names files of the machine that ran the notebook
        assert not any(output.get("name") == "stderr" for output in outputs), source
    opening = "".join(notebook["cells"][0]["source"])
    assert re.fullmatch(r"# [^#\n]+\n+> [^\n]+", opening), "nbdev drops the rest of this cell"
    assert "metadata" not in notebook or set(notebook["metadata"]) <= {"kernelspec"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_cell_holds_imports_or_code(path):
    """To document a module, `nbdev_docs` runs its exports and every cell that imports anything."""
    sources = [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    if not any("#| default_exp" in source for source in sources):
        return
    for source in sources:
        tree = ast.parse(re.sub(r"(?m)^[%!].*", "", source))
        imports = any(isinstance(node, IMPORTS) for node in ast.walk(tree))
        alone = all(isinstance(node, IMPORTS) for node in tree.body)
        assert source.startswith("#| export") or alone or not imports, source
