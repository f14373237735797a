"""Buffers: zeroed, in pages of their own, and gone when they are dropped."""

import json
import mmap
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cqsa_arrays.buffers import allocate


@given(
    st.one_of(st.integers(0, 5000), st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple)),
    st.sampled_from(["float16", "float32", "float64", "uint8"]),
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_zeroed_writable_contiguous_and_page_aligned(shape, dtype) -> None:
    buffer = allocate(shape, dtype)
    assert buffer.shape == (shape if isinstance(shape, tuple) else (shape,))
    assert buffer.dtype == dtype
    assert buffer.flags.c_contiguous
    assert buffer.flags.writeable
    assert buffer.flags.aligned
    assert buffer.ctypes.data % mmap.PAGESIZE == 0
    assert not buffer.any()
    buffer[...] = 1
    assert buffer.all()


def test_two_buffers_share_nothing_and_are_zeroed_again() -> None:
    first = allocate((100, 100), "float32")
    first[...] = 7
    second = allocate((100, 100), "float32")
    assert not np.shares_memory(first, second)
    del first
    for _ in range(5):
        again = allocate((100, 100), "float32")
        assert not again.any()
        again[...] = 7
        del again
    assert not second.any()


def test_views_keep_the_memory() -> None:
    part = allocate(10_000, "float64")[5000:].reshape(50, 100)
    part[...] = 3
    other = allocate(10_000, "float64")
    other[...] = 4
    assert (part == 3).all()


def test_more_than_there_is_is_an_error() -> None:
    with pytest.raises((MemoryError, OSError, ValueError)):
        allocate(1 << 50, "float64")


MEASURE = """
import json
import numpy as np
from cqsa_arrays.buffers import allocate

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) << 10

allocate(1000, "float32")[...] = 1
start = resident()
buffers = [allocate((3, 1 << 20), "float32") for _ in range(4)]
untouched = resident() - start
for buffer in buffers:
    buffer[...] = 1
full = resident() - start
small = [bytearray(100) for _ in range(1000)]  # what would sit on top of them in a heap
del buffers[1:], buffer
left = resident() - start
del buffers
print(json.dumps({"untouched": untouched, "full": full, "left": left, "end": resident() - start}))
"""


def test_memory_is_taken_when_touched_and_goes_back_when_dropped() -> None:
    command = [sys.executable, "-c", MEASURE]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    size, slack = 12 << 20, 1 << 20
    assert found["untouched"] <= slack
    assert 4 * size <= found["full"] <= 4 * size + slack
    assert size <= found["left"] <= size + slack
    assert found["end"] <= slack
