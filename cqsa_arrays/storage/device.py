"""Arrays on a GPU as token sources: used where they lie, never copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..ranges import Range
from .layout import Layout, Shape4
from .overlap import share_elements


class DeviceSource:
    """A TokenSource over the CuPy ``array`` in ``layout``; only a run on its own GPU can use it."""

    in_place = True
    held_bytes = touched_bytes = 0
    bytes_read = 0

    def __init__(self, array: Any, layout: Layout, label: str) -> None:
        self.layout = layout
        self._array = layout.logical(array)
        if self._array.shape[3] > 1 and self._array.strides[3] != array.itemsize:
            remedy = f"Pass cupy.ascontiguousarray({label})."
            raise ArgumentError(label, "an array on a GPU whose vectors are scattered", "contiguous vectors", remedy)
        self.device_index: int = array.device.id
        self.token_major = layout.tokens_outside_heads and self._array.shape[1] > 1
        self.description = f"{label}, on cuda:{self.device_index}, used in place"
        self.identity: dict[str, object] = {"shape": list(array.shape), "dtype": array.dtype.name}

    @property
    def shape(self) -> Shape4:
        b, h, n, d = self._array.shape
        return b, h, n, d

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._array.dtype)

    @property
    def cell(self) -> Shape4:
        return 1, 1, 1, self.shape[3]

    def staging_bytes(self, compute_dtype: np.dtype) -> int:
        """None: nothing is read."""
        return 0

    def read(self, batch: Range, heads: Range, tokens: Range, out: np.ndarray) -> None:
        raise TypeError(f"{self.description}: it is viewed, not read")

    def view(self, batch: Range, heads: Range, tokens: Range) -> Any:
        return self._array[batch.slice, heads.slice, tokens.slice]

    def prefetch(self, batch: Range, heads: Range, tokens: Range) -> Iterator[None]:
        """Nothing to do: it is in memory."""
        return iter(())

    def overlaps(self, array: Any) -> bool:
        import cupy

        return isinstance(array, cupy.ndarray) and share_elements(self._array, array)

    def close(self) -> None:
        """Nothing to do: the caller owns the array."""
