"""Layouts: the order of the axes of a caller's array, and its view as (batch, heads, tokens, head_dim)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..errors import ArgumentError

LOGICAL_AXES = "bhnd"
LAYOUTS = ("bhnd", "bnhd", "hnd", "nhd", "nd")
LSE_LAYOUTS = ("bhn", "hn", "n")
_BY_RANK = {4: "bhnd", 3: "hnd", 2: "nd"}
_AXIS_NAMES = {"b": "batch", "h": "heads", "n": "tokens", "d": "head_dim"}

Shape4 = tuple[int, int, int, int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Layout:
    """One of LAYOUTS or LSE_LAYOUTS: b = batch, h = heads, n = tokens, d = head_dim; axes left out have length 1."""

    name: str

    @property
    def tokens_outside_heads(self) -> bool:
        """Whether consecutive tokens are apart by all heads (bnhd, nhd)."""
        return "nh" in self.name

    @property
    def axes(self) -> str:
        """The axes by name: "heads x tokens x head_dim"."""
        return " x ".join(_AXIS_NAMES[axis] for axis in self.name)

    @property
    def lse_name(self) -> str:
        """Axes of the log-sum-exp beside an output of this layout: bhn, hn or n, with tokens always last."""
        return "".join(axis for axis in "bhn" if axis in self.name)

    def logical(self, array: np.ndarray) -> np.ndarray:
        """View of ``array`` (in this layout) as (batch, heads, tokens, head_dim); nothing is copied.

        >>> Layout("nhd").logical(np.zeros((10, 2, 64))).shape
        (1, 2, 10, 64)
        """
        view = array.transpose([self.name.index(axis) for axis in LOGICAL_AXES if axis in self.name])
        return np.expand_dims(view, tuple(i for i, axis in enumerate(LOGICAL_AXES) if axis not in self.name))

    def physical(self, block: np.ndarray) -> np.ndarray:
        """View of ``block``, (batch, heads, tokens, head_dim), in this layout: the inverse of ``logical``."""
        kept = [axis for axis in LOGICAL_AXES if axis in self.name]
        dropped = tuple(i for i, axis in enumerate(LOGICAL_AXES) if axis not in self.name)
        return block.squeeze(dropped).transpose([kept.index(axis) for axis in self.name])

    def logical_shape(self, shape: tuple[int, ...]) -> Shape4:
        """(batch, heads, tokens, head_dim) of an array of ``shape`` in this layout."""
        b, h, n, d = (shape[self.name.index(axis)] if axis in self.name else 1 for axis in LOGICAL_AXES)
        return b, h, n, d

    def physical_shape(self, logical_shape: Shape4) -> tuple[int, ...]:
        """Shape, in this layout, of an array that is ``logical_shape`` logically.

        Raises ArgumentError where an axis that this layout leaves out is longer than 1.

        >>> Layout("nhd").physical_shape((1, 2, 10, 64))
        (10, 2, 64)
        """
        lengths = dict(zip(LOGICAL_AXES, logical_shape, strict=True))
        for axis, length in lengths.items():
            if axis not in self.name and length != 1:
                found = f"{self.name!r} for {length} {_AXIS_NAMES[axis]}"
                raise ArgumentError("layout", found, f"a layout with the axis {axis!r}", "Use 'bhnd' or 'bnhd'.")
        return self.order(logical_shape)

    def lse_shape(self, logical_shape: Shape4) -> tuple[int, ...]:
        """Shape of the log-sum-exp beside an output that is ``logical_shape`` logically.

        >>> Layout("nhd").lse_shape((1, 2, 10, 64))
        (2, 10)
        """
        return tuple(logical_shape[LOGICAL_AXES.index(axis)] for axis in self.lse_name)

    def order(self, values: tuple[T, T, T, T]) -> tuple[T, ...]:
        """One value for each logical axis, put in the order of this layout; those of axes it leaves out are dropped.

        >>> Layout("nhd").order((0, 3, 5, 0))
        (5, 3, 0)
        """
        return tuple(values[LOGICAL_AXES.index(axis)] for axis in self.name)

    def __str__(self) -> str:
        return self.name


def usual_layout(rank: int) -> Layout | None:
    """The layout that is assumed of a ``rank``-dimensional array where nothing names one; None for other ranks."""
    return Layout(_BY_RANK[rank]) if rank in _BY_RANK else None


def parse_layout(text: str | None, rank: int, argument: str) -> Layout:
    """The layout named ``text``, or the usual one of a ``rank``-dimensional array where ``text`` is None.

    Raises ArgumentError, naming ``argument``, for an unknown layout and for one that does not fit ``rank``.

    >>> parse_layout(None, 3, "q").name
    'hnd'
    """
    if text is None and rank not in _BY_RANK:
        remedy = "Give it 2 (tokens, head_dim), 3 (heads, tokens, head_dim) or 4 axes."
        raise ArgumentError(argument, f"{rank} dimensions", "2, 3 or 4 dimensions", remedy)
    name = _BY_RANK[rank] if text is None else text
    if name not in LAYOUTS:
        remedy = "b = batch, h = heads, n = tokens, d = head dim."
        raise ArgumentError(argument, f"unknown layout {name!r}", f"one of {', '.join(LAYOUTS)}", remedy)
    if len(name) != rank:
        remedy = f"Name the layout that it has, or reshape it to {len(name)} dimensions."
        raise ArgumentError(argument, f"{rank} dimensions", f"{len(name)}, for layout {name!r}", remedy)
    return Layout(name)
