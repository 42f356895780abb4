"""Imports go one way, and the engine stands alone."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERED = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
ORDER = {path.stem.split("_", 1)[1]: path.stem.split("_", 1)[0] for path in NUMBERED}


def imported(path):
    """Names of the mft_nb modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:  # from .model import x; from . import x
            yield from [node.module] if node.module else [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mft_nb":
            yield from [node.module[7:]] if "." in node.module else [a.name for a in node.names]
        if isinstance(node, ast.Import):
            yield from [a.name[7:] for a in node.names if a.name.startswith("mft_nb.")]


@pytest.mark.parametrize("module", ORDER)
def test_module_imports_only_modules_above_it(module):
    for other in imported(ROOT / "mft_nb" / f"{module}.py"):
        if other in ORDER:
            assert ORDER[other] < ORDER[module], f"{module} imports {other}"


def test_imports_are_seen():
    assert {"train", "mask", "results"} <= set(imported(ROOT / "mft_nb" / "experiment.py"))


def test_every_notebook_with_a_number_is_a_module():
    assert len(ORDER) == len(NUMBERED) >= 13
    assert all((ROOT / "mft_nb" / f"{module}.py").exists() for module in ORDER)


def loaded_by(statement):
    """Names of the modules that a statement loads in a fresh interpreter."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_engine_needs_neither_transformers_nor_datasets():
    modules = loaded_by("from mft_nb.mask import MFT")
    assert "torch" in modules
    assert not modules & {"transformers", "datasets", "pandas", "matplotlib", "statsmodels"}


def test_the_package_itself_is_light():
    assert "torch" not in loaded_by("import mft_nb")
