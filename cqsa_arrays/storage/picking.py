"""NumPy's keys on data that only HDF5 can read: what a key picks is read box by box, then indexed in memory.

Imported only when an HDF5 file is at hand: this module imports h5py.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from .slabs import read_slab

_Index = Any
"""One part of a key for one axis: an int, a slice, an array of ints."""


@dataclass(frozen=True, slots=True)
class _Axis:
    """What is read of one axis: ascending ``indices``; and ``key``, which picks from those."""

    indices: range | np.ndarray
    key: _Index


def pick(dataset: h5py.Dataset, key: Any, dtype: np.dtype) -> np.ndarray:
    """``array[key]`` for the array in ``dataset``, whose stored bits are elements of ``dtype``; with NumPy's meaning.

    Of each axis only what the key picks is read, and what lies between in the same chunks. Takes every key that NumPy
    takes, and raises IndexError for the same ones.
    """
    shape = dataset.shape
    picked = np.broadcast_to(np.uint8(0), shape)[key]  # NumPy itself refuses keys, at a byte for each picked element
    if picked.size == 0:
        return np.empty(picked.shape, dtype)
    axes: list[_Axis] = []
    parts: list[Any] = []
    for part in _expanded(key, len(shape)):
        if _takes_no_axis(part):
            parts.append(part)
            continue
        axes.append(_axis(part, shape[len(axes)]))
        parts.append(axes[-1].key)
    return _read(dataset, [axis.indices for axis in axes], dtype)[tuple(parts)]


def _expanded(key: Any, rank: int) -> list[Any]:
    """``key`` with a part for every axis: masks by their places, and slices for what an ellipsis or the end leaves."""
    parts: list[Any] = []
    for part in key if isinstance(key, tuple) else (key,):
        if _takes_no_axis(part) or isinstance(part, slice):
            parts.append(part)
            continue
        array = np.asarray(part)
        if array.dtype == bool:
            parts += array.nonzero() if array.ndim else [array[()]]
        else:
            parts.append(array.astype(np.intp) if array.ndim else operator.index(array[()]))
    rest = [slice(None)] * (rank - sum(not _takes_no_axis(part) for part in parts))
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    return parts[:at] + rest + parts[at:]


def _takes_no_axis(part: _Index) -> bool:
    """Whether it is None, a single boolean, or an ellipsis: one that is written out stays, for an array of rank 0."""
    return part is None or part is Ellipsis or isinstance(part, (bool, np.bool_))


def _axis(part: _Index, length: int) -> _Axis:
    """What a part of a key reads of an axis of ``length``."""
    if isinstance(part, slice):
        wanted = range(length)[part]
        return _Axis(wanted, slice(None)) if wanted.step > 0 else _Axis(wanted[::-1], slice(None, None, -1))
    if isinstance(part, int):
        place = range(length)[part]
        return _Axis(range(place, place + 1), 0)
    indices, places = np.unique(np.where(part < 0, part + length, part), return_inverse=True)
    return _Axis(indices, places.reshape(part.shape))


def _read(dataset: h5py.Dataset, wanted: list[range | np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The elements of ``dataset`` at the ``wanted`` indices of every axis."""
    found = np.empty([len(indices) for indices in wanted], dtype)
    gaps = dataset.chunks or (1,) * len(wanted)
    runs = [_runs(indices, gap) for indices, gap in zip(wanted, gaps, strict=True)]
    for places in itertools.product(*runs):
        parts = [indices[place] for indices, place in zip(wanted, places, strict=True)]
        found[places] = _read_box(dataset, parts, dtype)
    return found


def _runs(indices: range | np.ndarray, gap: int) -> list[slice]:
    """Cuts ascending ``indices`` where the next one is further away than ``gap``."""
    if isinstance(indices, range):
        return [slice(0, len(indices))]
    cuts = np.flatnonzero(np.diff(indices) > gap) + 1
    return [slice(a, b) for a, b in itertools.pairwise([0, *cuts.tolist(), len(indices)])]


def _read_box(dataset: h5py.Dataset, parts: list[range | np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The elements at ``parts`` of every axis, by one read of the box around them; the stored bits, unconverted."""
    steps = [part.step if isinstance(part, range) else 1 for part in parts]
    start = tuple(int(part[0]) for part in parts)
    count = tuple((int(part[-1]) - int(part[0])) // step + 1 for part, step in zip(parts, steps, strict=True))
    box = np.empty(count, dtype)
    read_slab(dataset, start, box, step=steps)
    if all(isinstance(part, range) for part in parts):
        return box
    return box[np.ix_(*(np.arange(n) if isinstance(p, range) else p - p[0] for p, n in zip(parts, count, strict=True)))]
