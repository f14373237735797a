"""Whether arrays share elements, by their addresses alone: on the host and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

MOST_WORK = 100_000
"""Steps that NumPy may take to tell; a few are enough for slices of one array, whatever their shapes."""


def share_elements(a: Any, b: Any) -> bool:
    """Whether two NumPy arrays, or two CuPy arrays, have a byte in common; True also where that is too hard to tell.

    Interleaved parts of one array, whose ranges of addresses overlap, share none.

    >>> packed = np.zeros((10, 2, 8))
    >>> share_elements(packed[:, 0], packed[:, 1]), share_elements(packed[:, 0], packed[3])
    (False, True)
    """
    try:
        return bool(np.shares_memory(_addresses(a), _addresses(b), max_work=MOST_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(array: Any) -> bool:
    """Whether two elements of ``array`` may lie in one place, as in broadcast arrays and sliding windows.

    >>> overlaps_itself(np.zeros((3, 4)).T[::2]), overlaps_itself(np.broadcast_to(np.zeros(3), (2, 3)))
    (False, True)
    """
    reach = array.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (length - 1)
    return False


def _addresses(array: Any) -> np.ndarray:
    """``array``, or for one on a GPU a NumPy array at the same addresses, of which no element may be touched."""
    if not hasattr(array, "__cuda_array_interface__"):
        return array.view(np.ndarray)
    address = array.__cuda_array_interface__["data"][0]
    return np.asarray(_At(address, array.shape, array.strides, array.itemsize))


class _At:
    """What NumPy makes an array of."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (address, True), "shape": shape, "strides": strides, "typestr": f"|V{itemsize}",
        }  # fmt: skip
