"""Files that take longest come first, so that both workers end at about the same time."""

LONGEST = ("test_outputs", "test_outputs_more", "test_experiment", "test_cli", "test_resume")


def pytest_collection_modifyitems(items):
    """Sort tests by their file; the order within a file stays."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
