"""Runs notebooks from top to bottom and saves their outputs; without names, all notebooks."""

import subprocess
import sys
from pathlib import Path

import nbformat
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.outputs import NOTEBOOKS, run  # noqa: E402


def main(names):
    """Run the notebooks; one that fails keeps the outputs that it has."""
    failed = 0
    paths = [Path(name).resolve() for name in names] or NOTEBOOKS
    for path in tqdm(paths, unit="notebook"):
        try:
            nbformat.write(run(path), path)
        except Exception as error:
            failed += 1
            tqdm.write(f"{path.name} failed and keeps its outputs: {error}")
            continue
        subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", path], check=True)
    if failed:
        sys.exit(f"{failed} of {len(paths)} notebooks failed.")


if __name__ == "__main__":
    main(sys.argv[1:])
