"""A reader with a model of their own can skip the cells that make one, and finds what is named."""

import ast
import inspect
import re
from pathlib import Path

import nbformat
import pytest

from mft_nb import cli

FOLDER = Path(__file__).resolve().parent.parent / "nbs" / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))


def names(source, kind):
    """The names that a cell sets (ast.Store) or uses (ast.Load), functions and imports included."""
    nodes = list(ast.walk(ast.parse(source)))
    found = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}
    if kind is ast.Store:
        found |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        imports = (ast.Import, ast.ImportFrom)
        aliases = [one for node in nodes if isinstance(node, imports) for one in node.names]
        found |= {one.asname or one.name.split(".")[0] for one in aliases}
    return found


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_the_cells_to_skip_can_be_skipped(tutorial):
    cells = nbformat.read(tutorial, as_version=4).cells
    said = [number for number, cell in enumerate(cells) if "skip the next two cells" in cell.source]
    assert len(said) == 1
    code = [number for number, cell in enumerate(cells) if cell.cell_type == "code"]
    skipped = [number for number in code if number > said[0]][:2]
    made = set().union(*(names(cells[number].source, ast.Store) for number in skipped))
    for number in code:
        if number not in skipped:
            source = cells[number].source
            if number > skipped[-1]:
                missing = made & names(source, ast.Load) - names(source, ast.Store)
                assert not missing, f"cell {cells[number].id} needs {missing} of a skipped cell"
            made -= names(source, ast.Store)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_the_commands_in_the_prose_can_be_given(tutorial):
    cells = nbformat.read(tutorial, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    lines = re.findall(r"^(?:\|.*`)?(mft_\w+) ([^`\n]+)", prose, flags=re.M)
    assert {command for command, _ in lines} <= {"mft_fit", "mft_apply"}
    for command, options in lines:
        known = inspect.signature(getattr(cli, command)).parameters
        assert set(re.findall(r"--(\w+)", options)) <= set(known)


def test_no_assertion_rests_on_time():
    cells = nbformat.read(FOLDER / "faster_model.ipynb", as_version=4).cells
    for cell in cells:
        nodes = ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ()
        for node in nodes:
            if isinstance(node, ast.Assert):
                assert not names(ast.unparse(node), ast.Load) & {"ratio", "seconds", "time"}
