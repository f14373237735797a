"""What is in a file, for people and for JSON: the facts that decide how each data set is read."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import CqsaError, one_line
from ..tables import html_of_text
from ..units import format_bytes
from .hdf5 import Locking, opened

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
            mapped = "yes" if one.note is None else f"no: {one_line(one.note)}"
            size = format_bytes(one.stored_bytes)
            rows.append((one_line(one.name), shape, one.layout, one.dtype, one.kind, offset, size, mapped))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [f"{one_line(self.path)}, {format_bytes(self.size_bytes)}"]
        lines += ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        for name, value in self.attributes.items():
            text = one_line(str(value))
            short = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"
            lines.append(f"{one_line(name)} = {short}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<FileInfo {self.path!r}: {len(self.datasets)} data sets, {format_bytes(self.size_bytes)}>"

    def _repr_html_(self) -> str:
        return html_of_text(str(self))


def describe(path: str | os.PathLike[str], *, locking: Locking = None) -> FileInfo:
    """The data sets and attributes of the HDF5 file at ``path``; no element is read.

    Raises StorageError for a file that cannot be read; data sets that are of no use here are listed with the reason.

    >>> print(describe("qkv.h5"))                                     # doctest: +SKIP
    """
    path = os.fspath(path)
    with opened(path, locking) as file:
        from .links import datasets, decoded

        found = tuple(_describe(name, one) for name, one in datasets(file))
        attributes = {decoded(name): _attribute(file, name) for name in file.attrs}
    return FileInfo(path, os.stat(path).st_size, found, attributes)


def _describe(name: str, found: Any) -> DatasetInfo:
    """What is to be said of an h5py data set, or of the error of opening it."""
    from .links import damage_named
    from .stored import inspect, storage_kind

    shape: tuple[int, ...] = ()
    kind, stored_bytes = "-", 0
    try:
        if isinstance(found, CqsaError):
            raise found
        with damage_named(name):
            shape, kind, stored_bytes = tuple(found.shape or ()), storage_kind(found), found.id.get_storage_size()
        stored = inspect(found, name, None)
    except CqsaError as error:
        return DatasetInfo(name, shape, "-", "-", kind, None, stored_bytes, str(error))
    layout, dtype = stored.layout.name, stored.dtype.name
    note = stored.unreadable or stored.not_mapped
    return DatasetInfo(name, shape, layout, dtype, kind, stored.offset, stored_bytes, note)


def _attribute(file: Any, name: str | bytes) -> object:
    """An attribute of ``file`` as JSON has it."""
    from .links import damage_named, decoded

    try:
        with damage_named(f"attribute {decoded(name)}"):
            return _plain(file.attrs[name])
    except CqsaError as error:
        return str(error)


def _plain(value: object) -> object:
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool)) else str(value)
