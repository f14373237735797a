"""Set-up of all tests."""

import ctypes
import gc
import signal

import pytest

# A shell starts background jobs with SIGINT ignored. Python then installs no handler and an interrupt would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def small_process():
    """What the tests of a file have freed goes back to the system: with a gigabyte resident a fork takes 50 ms."""
    yield
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
