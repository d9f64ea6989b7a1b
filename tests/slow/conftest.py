"""The order of the slow tests."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, or it would run alone at the end."""
    items.sort(key=lambda item: "test_quickstart" not in item.nodeid)
