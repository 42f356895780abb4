"""The outputs in the notebooks are those of a fresh run from top to bottom.

Every other notebook; the rest is in test_house_outputs_more, since tests go by file.
"""

import pytest

from tests.outputs import NOTEBOOKS, check_outputs


@pytest.mark.parametrize("path", NOTEBOOKS[::2], ids=lambda path: path.stem)
def test_outputs_equal_a_fresh_run(path):
    check_outputs(path)
