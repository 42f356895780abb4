"""Files that take longest come first, so that both workers end at about the same time."""

import gc

import pytest

from tests.browser import browse, browser, tab  # noqa: F401

gc.disable()  # imports leave no garbage, and the search for it takes a fifth of their time

LONGEST = (
    "test_house_outputs",
    "test_house_outputs_more",
    "test_site",
    "test_study_experiment",
    "test_study_figures",
    "test_site_explorer",
    "test_engine",
    "test_frozen",
    "test_resume",
    "test_cli",
    "test_activations",
    "test_peft",
    "test_tasks",
    "test_study_lm",
    "test_switch",
    "test_strangers",
    "test_study_sst2",
    "test_engine_more",
    "test_fsdp",
    "test_shrink",
    "test_study_cli",
)


def pytest_collection_modifyitems(items):
    """Sort tests by their file; the order within a file stays."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish():
    """The search for garbage begins again."""
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def small_searches():
    """A search for garbage passes over what is in use when a file of tests begins."""
    gc.collect()
    gc.freeze()
