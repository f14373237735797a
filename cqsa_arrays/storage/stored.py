"""What is known of a data set before it is read: its facts, each checked once while its file is open in h5py.

Imported only when an HDF5 file is at hand: this module imports h5py.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import h5py
import numpy as np
from h5py import h5d, h5t

from ..errors import ArgumentError, StorageError
from .dtypes import BFLOAT16, NAMES
from .layout import LSE_LAYOUTS, Layout, Shape4, parse_layout
from .links import damage_named, decoded
from .rows import Rows

_KINDS = {h5d.COMPACT: "compact", h5d.CONTIGUOUS: "contiguous", h5d.CHUNKED: "chunked", h5d.VIRTUAL: "virtual"}
_CLASSES = {
    h5t.INTEGER: "integers",
    h5t.COMPOUND: "compound values (or complex numbers)",
    h5t.STRING: "strings",
    h5t.VLEN: "values of variable length",
    h5t.ENUM: "enumerated values (or booleans)",
    h5t.OPAQUE: "opaque values",
    h5t.REFERENCE: "references",
    h5t.ARRAY: "arrays",
}
_BFLOAT16_FIELDS = (15, 7, 8, 0, 7)
"""Sign bit, exponent's first bit and size, mantissa's first bit and size, as HDF5 states them."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """Facts of one data set. ``offset`` is the byte where its elements begin if they can be read by position or
    mapped, else None, and then ``not_mapped`` says why."""

    path: str
    name: str
    shape: tuple[int, ...]
    layout: Layout
    dtype: np.dtype
    kind: str
    chunks: tuple[int, ...] | None
    filters: tuple[str, ...]
    stored_bytes: int
    offset: int | None
    not_mapped: str | None
    file_size: int
    file_mtime_ns: int
    linked_from: tuple[str, ...] = ()
    """Files whose external links led here."""

    @property
    def label(self) -> str:
        """File and data set, for errors and plans.

        "qkv.h5:/q"
        """
        return f"{os.path.basename(self.path)}:{self.name}"

    @property
    def logical_shape(self) -> Shape4:
        """(batch, heads, tokens, head_dim)."""
        return self.layout.logical_shape(self.shape)

    @property
    def token_major(self) -> bool:
        """Whether consecutive tokens are apart by several heads."""
        return self.layout.tokens_outside_heads and self.logical_shape[1] > 1

    @property
    def rows(self) -> Rows:
        """Where its rows lie; only with an ``offset``."""
        assert self.offset is not None
        return Rows(self.logical_shape, self.dtype, self.offset, self.token_major)

    @property
    def identity(self) -> dict[str, object]:
        """What tells this data set from another or a later one, ready for JSON."""
        return {
            "path": self.path,
            "dataset": self.name,
            "size": self.file_size,
            "mtime_ns": self.file_mtime_ns,
            "offset": self.offset,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "linked_from": list(self.linked_from),
        }


def inspect(dataset: h5py.Dataset, argument: str, layout: str | None) -> StoredArray:
    """The facts of ``dataset``, in ``layout`` or the one that its attribute ``layout`` or its rank says.

    Raises ArgumentError for elements that are no floats of this machine's byte order, StorageError for external
    storage, virtual data sets and files that end before their data.
    """
    with damage_named(place := f"{dataset.file.filename}:{decoded(dataset.name)}"):
        properties = dataset.id.get_create_plist()
        kind = storage_kind(dataset)
        _refuse_foreign_data(place, kind, properties.get_external_count())
        dtype = stored_dtype(dataset, argument)
        shape, chunks, stored_bytes = dataset.shape, dataset.chunks, dataset.id.get_storage_size()
        filters = tuple(properties.get_filter(i)[3].decode() for i in range(properties.get_nfilters()))
        said_layout = dataset.attrs.get("layout")
    if shape is None:
        raise ArgumentError(argument, f"{dataset.name} without any elements", "an array", "Write data to it.")
    found = os.stat(dataset.file.filename) if dataset.file.driver == "sec2" else None
    size = math.prod(shape) * dtype.itemsize
    reason = _why_not_mapped(dataset, kind, size, stored_bytes)
    offset = dataset.id.get_offset() if reason is None else None
    if found and offset is not None and found.st_size < (stop := offset + size):
        raise StorageError(
            f"{place}: its data end at byte {stop}, but the file at byte {found.st_size}. It is truncated: copy or"
            " write it again."
        )
    return StoredArray(
        path=os.path.abspath(dataset.file.filename),
        name=decoded(dataset.name),
        shape=shape,
        layout=_layout(said_layout, layout, len(shape), argument),
        dtype=dtype,
        kind=kind,
        chunks=chunks,
        filters=filters,
        stored_bytes=stored_bytes,
        offset=offset,
        not_mapped=reason,
        file_size=found.st_size if found else 0,
        file_mtime_ns=found.st_mtime_ns if found else 0,
    )


def storage_kind(dataset: h5py.Dataset) -> str:
    """HDF5's layout of ``dataset``: compact, contiguous, chunked or virtual."""
    return _KINDS[dataset.id.get_create_plist().get_layout()]


def stored_dtype(dataset: h5py.Dataset, argument: str) -> np.dtype:
    """Element type of ``dataset`` by the fields of its *stored* type; raises ArgumentError for what is no float here.

    bfloat16 comes as uint16 with the attribute dtype="bfloat16" (what this package writes), as 2-byte opaque values
    (what h5py makes of ml_dtypes arrays) and as HDF5's own 2-byte float, which h5py passes off as float32.
    """
    stored = dataset.id.get_type()
    for code in ("f2", "f4", "f8"):
        if stored == h5t.py_create(np.dtype(code)):
            return np.dtype(code)
    kind, size = stored.get_class(), stored.get_size()
    tagged = kind == h5t.INTEGER and size == 2 and _is_text(dataset.attrs.get("dtype"), "bfloat16")
    own_float = (
        kind == h5t.FLOAT and size == 2 and stored.get_fields() == _BFLOAT16_FIELDS and stored.get_ebias() == 127
    )
    if kind == h5t.OPAQUE and size == 2:
        return BFLOAT16
    if tagged or own_float:
        if stored.get_order() == h5t.NATIVE_FLOAT.get_order():
            return BFLOAT16
    elif kind != h5t.FLOAT:
        remedy = "Store floats; bfloat16 bits may be uint16 with the attribute dtype='bfloat16'."
        raise ArgumentError(argument, f"{_CLASSES.get(kind, 'other values')} in {dataset.name}", NAMES, remedy)
    order = "big-endian" if stored.get_order() == h5t.ORDER_BE else "little-endian"
    found = f"a {order} float of {size} bytes in {dataset.name}"
    raise ArgumentError(argument, found, f"{NAMES} in this machine's byte order", "Convert it once with h5py.")


def _is_text(value: object, text: str) -> bool:
    """Whether an attribute, which may be anything, is ``text``."""
    return isinstance(value, (str, bytes)) and value in (text, text.encode())


def _layout(said: object, asked: str | None, rank: int, argument: str) -> Layout:
    """The layout that was asked for, else the one that the data set says it has, else the usual one of its rank."""
    if asked is not None:
        return parse_layout(asked, rank, argument)
    said = decoded(said) if isinstance(said, bytes) else said
    if said is not None and not isinstance(said, str):
        found = f"an attribute layout of type {type(said).__name__}"
        raise ArgumentError(argument, found, "text such as 'bhnd'", "Correct it, or say it with layout=.")
    return Layout(said) if said in LSE_LAYOUTS and len(said) == rank else parse_layout(said, rank, argument)


def _refuse_foreign_data(place: str, kind: str, external_count: int) -> None:
    if kind == "virtual":
        raise StorageError(
            f"{place} is virtual: its data lie in other data sets. Name those, or copy it to a real one."
        )
    if external_count:
        raise StorageError(f"{place} keeps its data in external files, which are not followed. Copy it to a real one.")


def _why_not_mapped(dataset: h5py.Dataset, kind: str, size: int, stored_bytes: int) -> str | None:
    """Why the elements, ``size`` bytes, cannot be taken straight from the file, or None if they can."""
    if kind != "contiguous":
        return kind
    if dataset.file.driver != "sec2":
        return f"not a plain file (h5py driver {dataset.file.driver})"
    if dataset.file.mode != "r":
        return "its file is open for writing"
    if size == 0 or stored_bytes == 0:
        # get_offset() alone does not tell: with a user block it is a number even where nothing is allocated.
        return "no space allocated yet"
    if stored_bytes != size or dataset.id.get_offset() is None:
        return "its size on disk is not that of its elements"
    return None
