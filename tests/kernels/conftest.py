"""What tests of kernels need."""

import pytest

from moebius.kernels.cpp import build


@pytest.fixture(scope="session")
def cpp() -> None:
    """A machine that develops this has a compiler; without one nothing that asks may pass."""
    assert build.load() is None
