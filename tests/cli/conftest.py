"""One thread, as for the optimizer tests."""

from tests.optim.conftest import one_thread

__all__ = ["one_thread"]
