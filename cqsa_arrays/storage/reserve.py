"""Disk blocks for bytes that are written later: a full disk is met before the work and not in its middle."""

from __future__ import annotations

import errno
import os

from .dtypes import PIECE_BYTES

_NO_RESERVATION = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def reserve(descriptor: int, start: int, stop: int) -> None:
    """Give the bytes from ``start`` to ``stop`` of an open file disk blocks; OSError where there is no room.

    Where the system cannot reserve, the bytes are written as zeros.
    """
    if stop > start and not _reserved_by_system(descriptor, start, stop - start):
        zeros = bytes(PIECE_BYTES)
        os.lseek(descriptor, start, os.SEEK_SET)
        while start < stop:
            start += os.write(descriptor, zeros[: stop - start])


def _reserved_by_system(descriptor: int, start: int, size: int) -> bool:
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, start, size)
    except OSError as error:
        if error.errno in _NO_RESERVATION:
            return False
        raise
    return True
