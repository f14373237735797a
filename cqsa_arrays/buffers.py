"""Buffers that go back to the system when they are dropped."""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

import numpy as np

from .units import format_bytes


def allocate(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """A zeroed array in pages of its own, page-aligned.

    Arrays of a few MiB from the C heap leave holes in it when they are freed (3 MiB were seen in a budget of 20): with
    pages of its own a buffer counts for what it is while it lives, and for nothing afterwards. Raises MemoryError where
    the system refuses that much, under a limit on this process for example.

    >>> allocate((2, 3), "float32").sum()
    np.float32(0.0)
    """
    count = int(np.prod(shape))
    size_bytes = max(1, count * np.dtype(dtype).itemsize)
    if os.name != "posix":
        return np.frombuffer(mmap.mmap(-1, size_bytes), dtype, count).reshape(shape)
    try:
        pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"the system refuses {format_bytes(size_bytes)} of memory") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # one fault for 2 MiB instead of 512
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def check_address_space(size_bytes: int) -> None:
    """Raise MemoryError where a limit on addresses (``ulimit -v``) leaves less than ``size_bytes``; nothing is kept.

    Shared libraries and what allocators reserve for threads count there, and are no memory that ``allocate`` asks for.
    """
    if os.name != "posix":
        return
    try:
        mmap.mmap(-1, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"the system refuses {format_bytes(size_bytes)} of address space (ulimit -v)") from error
