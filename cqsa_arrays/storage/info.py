"""What is in a file, for people and for JSON: the facts that decide how each data set is read."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

import numpy as np

from ..errors import CqsaError
from ..units import format_bytes
from .hdf5 import Locking, dataset_names, find_dataset, opened

SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """One data set. ``note`` says why it is not mapped, or why it is of no use here; None where it is mapped."""

    name: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    kind: str
    offset: int | None
    stored_bytes: int
    note: str | None

    @property
    def mapped(self) -> bool:
        """Whether it is read by position or mapped, without h5py."""
        return self.note is None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What ``describe`` finds; ``str()`` is a table."""

    path: str
    size_bytes: int
    datasets: tuple[DatasetInfo, ...]
    attributes: dict[str, object]

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        rows = [("data set", "shape", "layout", "dtype", "storage", "offset", "size", "memory-mapped")]
        for one in self.datasets:
            shape = " x ".join(map(str, one.shape))
            offset = "-" if one.offset is None else str(one.offset)
            mapped = "yes" if one.note is None else f"no: {one.note}"
            size = format_bytes(one.stored_bytes)
            rows.append((one.name, shape, one.layout, one.dtype, one.kind, offset, size, mapped))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [f"{self.path}, {format_bytes(self.size_bytes)}"]
        lines += ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        for name, value in self.attributes.items():
            text = str(value)
            short = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"
            lines.append(f"{name} = {short}")
        return "\n".join(lines)


def describe(path: str | os.PathLike[str], *, locking: Locking = None) -> FileInfo:
    """The data sets and attributes of the HDF5 file at ``path``; no element is read.

    Raises StorageError for a file that cannot be read; data sets that are of no use here are listed with the reason.

    >>> print(describe("qkv.h5"))                                     # doctest: +SKIP
    """
    path = os.fspath(path)
    with opened(path, locking) as file:
        datasets = tuple(_describe(file, name) for name in dataset_names(file))
        attributes = {name: _plain(value) for name, value in file.attrs.items()}
    return FileInfo(path, os.stat(path).st_size, datasets, attributes)


def _describe(file: object, name: str) -> DatasetInfo:
    from .stored import inspect, storage_kind

    found = find_dataset(file, name, name)
    try:
        stored = inspect(found, name, None)
    except CqsaError as error:
        shape = tuple(found.shape or ())
        return DatasetInfo(name, shape, "-", "-", storage_kind(found), None, found.id.get_storage_size(), str(error))
    layout, dtype = stored.layout.name, stored.dtype.name
    return DatasetInfo(
        name, stored.shape, layout, dtype, stored.kind, stored.offset, stored.stored_bytes, stored.not_mapped
    )


def _plain(value: object) -> object:
    """An attribute as JSON has it."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool)) else str(value)
