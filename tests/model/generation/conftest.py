"""Generation is tested on one thread, as recursion is."""

from tests.model.recursion.conftest import one_thread

__all__ = ["one_thread"]
