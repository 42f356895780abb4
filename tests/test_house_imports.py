"""Imports go one way, the engine stands alone, and no file is too long to read."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest

from mft_nb.files import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mft_nb"
MODULES = {  # by dotted name: the file
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem not in ("__init__", "_modidx")
}
ENGINE = [name for name in MODULES if not name.startswith("study.")]
STUDY = [name for name in MODULES if name.startswith("study.")]
FIGURES = [name for name in MODULES if name.startswith("study.figures.")]


def source(name):
    """Where a module comes from: `nbs/07_bitmask.ipynb`."""
    return re.search(r"nbs/\S+\.ipynb", MODULES[name].read_text()).group()


ORDER = {name: (name.startswith("study."), source(name)) for name in MODULES}


@cache
def imported(name):
    """The modules of the package that a module imports, inside functions too, with the names."""
    found = {}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            package = ["mft_nb", *name.split(".")][: -node.level] if node.level else []
            full = ".".join([*package, *filter(None, [node.module])])
            if full.split(".")[0] == "mft_nb":
                module = full.removeprefix("mft_nb").removeprefix(".")
                for alias in node.names:
                    inner = f"{module}.{alias.name}".removeprefix(".")
                    found.setdefault(inner if inner in MODULES else module, set()).add(alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mft_nb."):
                    found.setdefault(alias.name[7:], set())
    return found


def depth(name):
    """Modules in the longest chain of imports that ends in a module."""
    return 1 + max((depth(other) for other in imported(name) if other in MODULES), default=0)


def test_imports_are_seen():
    assert "study.plan" in imported("study.runner")
    assert "MFT" in imported("train")["mask"] and depth("mask") > 3


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_modules_above_it(name):
    for other in imported(name):
        assert other not in MODULES or ORDER[other] < ORDER[name], f"{name} imports {other}"


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_does_not_import_the_study(name):
    assert not [other for other in imported(name) if other.startswith("study")]


def test_the_longest_chain_of_the_engine():
    chains = {name: depth(name) for name in ENGINE}
    assert max(chains.values()) <= 7, chains


@pytest.mark.parametrize("name", ["study.records", *FIGURES])
def test_figures_and_records_need_no_engine(name):
    others = {other for other in imported(name) if not other.startswith("study.")}
    assert others <= {"stats", "files"}, f"{name} imports {others}"


@pytest.mark.parametrize("name", MODULES)
def test_private_names_stay_in_their_file(name):
    taken = [own for names in imported(name).values() for own in names]
    private = [own for own in taken if re.match("_[^_]", own)]
    assert not private, f"{name} imports {private}"


def loaded_by(statement):
    """Names of the modules that a statement loads in a fresh interpreter."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_mask_needs_neither_training_nor_transformers():
    modules = loaded_by("from mft_nb.mask import MFT, MaskConfig")
    assert "torch" in modules
    assert not modules & {"transformers", "datasets", "pandas", "matplotlib", "statsmodels"}
    assert not modules & {"mft_nb.train", "mft_nb.trainer", "mft_nb.data", "mft_nb.stats"}


def test_the_package_itself_is_light():
    assert "torch" not in loaded_by("import mft_nb")


def packages(setting):
    """Names of the packages that a setting of settings.ini requires."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return {re.match(r"[\w-]+", word).group() for word in parser["DEFAULT"][setting].split()}


def test_extras_bring_what_the_messages_say():
    for extra, named in EXTRAS.items():
        assert set(named) == packages(f"{extra}_requirements"), extra
    assert packages("requirements") == {"torch", "numpy", "safetensors", "fastcore", "tqdm"}


def test_the_oldest_versions_are_the_lower_bounds():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    bounds = parser["DEFAULT"]["requirements"] + " " + parser["DEFAULT"]["train_requirements"]
    oldest = set((ROOT / "tests" / "oldest.txt").read_text().splitlines())
    for bound in bounds.split():
        name, version = re.match(r"([\w-]+)>=([\d.]+)", bound).groups()
        assert f"{name}=={version}" in oldest


@pytest.mark.parametrize("name", MODULES)
def test_a_file_can_be_read_in_one_sitting(name):
    assert len(MODULES[name].read_text().splitlines()) <= 565  # about 550


@pytest.mark.parametrize("name", MODULES)
def test_public_arguments_are_annotated(name):
    module = importlib.import_module(f"mft_nb.{name}")
    bare = []
    for function in public_functions(module):
        for argument in inspect.signature(function).parameters.values():
            if argument.name not in ("self", "cls") and argument.annotation is argument.empty:
                bare.append(f"{function.__qualname__}({argument.name})")
    assert not bare


def public_functions(module):
    """Functions and methods of a module without an underscore, where they are defined."""
    for name in module.__all__:
        owner = getattr(module, name, None)
        if inspect.isfunction(owner):
            yield owner
        elif inspect.isclass(owner):
            for own, method in vars(owner).items():
                method = getattr(method, "__func__", method)
                if inspect.isfunction(method) and (not own.startswith("_") or own == "__init__"):
                    yield method
