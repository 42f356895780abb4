"""A reader with a model of their own can skip the cells that make one."""

import ast
from pathlib import Path

import nbformat

TUTORIAL = Path(__file__).resolve().parent.parent / "nbs" / "tutorials" / "your_model.ipynb"


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


def test_the_cells_to_skip_can_be_skipped():
    cells = nbformat.read(TUTORIAL, as_version=4).cells
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
