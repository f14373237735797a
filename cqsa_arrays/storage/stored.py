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
from ..wording import Choice, Phrase
from .conventions import refuse_decoded_values, refuse_reversed_axes, shown
from .dtypes import BFLOAT16, NAMES
from .filters import missing_filters
from .layout import LAYOUTS, LSE_LAYOUTS, Layout, Shape4, parse_layout
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
_ON_DISK = ("sec2", "stdio", "direct", "mpio")
"""h5py's drivers that read a file on a disk under its own name; others have it in memory, in parts, elsewhere."""

_BFLOAT16_FIELDS = (15, 7, 8, 0, 7)
"""Sign bit, exponent's first bit and size, mantissa's first bit and size, as HDF5 states them."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """Facts of one data set.

    ``offset`` is the byte where its elements begin if they can be read by position or mapped, else None, and then
    ``not_mapped`` says why. ``file_size`` is 0 where ``path`` is not the file that has it.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    layout: Layout
    dtype: np.dtype
    kind: str
    chunks: tuple[int, ...] | None
    filters: tuple[str, ...]
    offset: int | None
    not_mapped: str | None
    file_size: int
    file_mtime_ns: int
    opaque: bool = False
    """Whether nothing but the size of its elements says that they are bfloat16."""
    unreadable: str | None = None
    """Why the elements cannot be read here: filters that are not installed."""
    linked_from: tuple[str, ...] = ()
    """Files whose external links led here."""

    @property
    def label(self) -> str:
        """File and data set, for errors and plans.

        "qkv.h5:/q"
        """
        return f"{os.path.basename(self.path)}:{self.name}"

    @property
    def description(self) -> str:
        """The label, and what is taken for granted, for plans."""
        return f"{self.label}, opaque values taken for bfloat16" if self.opaque else self.label

    @property
    def logical_shape(self) -> Shape4:
        """(batch, heads, tokens, head_dim)."""
        return self.layout.logical_shape(self.shape)

    @property
    def token_major(self) -> bool:
        """Whether consecutive tokens are apart by several heads."""
        return self.layout.tokens_outside_heads and self.logical_shape[1] > 1

    def check_readable(self) -> None:
        """Raise StorageError where the elements cannot be read here."""
        if self.unreadable is not None:
            raise StorageError(f"{self.label} cannot be read: {self.unreadable}.")

    @property
    def rows(self) -> Rows:
        """Where its rows lie; only with an ``offset``."""
        assert self.offset is not None
        return Rows(self.logical_shape, self.dtype, self.offset, self.token_major)

    @property
    def on_disk(self) -> bool:
        """Whether ``path`` is the file that has it: not one in memory or in parts, or whose name is gone."""
        return self.file_size > 0

    @property
    def identity(self) -> dict[str, object]:
        """What tells this data set from another or a later one, ready for JSON.

        Without ``path`` where nobody can find it again by that; ``opened_as`` is then what the file was called.
        """
        facts = {
            "dataset": self.name,
            "offset": self.offset,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "linked_from": list(self.linked_from),
        }
        if not self.on_disk:
            return {"opened_as": self.path, **facts}
        return {"path": self.path, "size": self.file_size, "mtime_ns": self.file_mtime_ns, **facts}


def inspect(dataset: h5py.Dataset, argument: str, layout: str | None) -> StoredArray:
    """The facts of ``dataset``, in ``layout`` or the one that its attribute ``layout`` or its rank says.

    Raises ArgumentError for elements that are no floats of this machine's byte order, and where attributes of other
    programs give values or axes another meaning (an explicit ``layout`` says what the stored axes are); StorageError
    for external storage, virtual data sets and files that end before their data.
    """
    with damage_named(place := _place(dataset)):
        properties = dataset.id.get_create_plist()
        kind = storage_kind(dataset)
        _refuse_foreign_data(place, kind, properties.get_external_count())
        refuse_decoded_values(dataset, place, argument)
        dtype = stored_dtype(dataset, argument)
        if layout is None:
            refuse_reversed_axes(dataset, place, argument)
        shape, chunks = dataset.shape, dataset.chunks
        filters = tuple(properties.get_filter(i)[3].decode() for i in range(properties.get_nfilters()))
        said_layout = dataset.attrs.get("layout") if layout is None else None
        unreadable = missing_filters(dataset)
    if shape is None:
        raise ArgumentError(argument, f"{dataset.name} without any elements", "an array", "Write data to it.")
    found = _file_on_disk(dataset.file)
    size = math.prod(shape) * dtype.itemsize
    reason = _why_not_mapped(dataset, kind, size, found is not None)
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
        layout=_layout(said_layout, layout, len(shape), argument, place),
        dtype=dtype,
        kind=kind,
        chunks=chunks,
        filters=filters,
        offset=offset,
        not_mapped=reason,
        file_size=found.st_size if found else 0,
        file_mtime_ns=found.st_mtime_ns if found else 0,
        opaque=_is_unmarked_opaque(dataset),
        unreadable=unreadable,
    )


def _file_on_disk(file: h5py.File) -> os.stat_result | None:
    """What the system says of an open file; None where its name is not, or no longer, that of what HDF5 reads."""
    if file.driver not in _ON_DISK:
        return None
    try:
        named = os.stat(file.filename)
    except OSError:  # removed, or named from another directory
        return None
    # Only of this driver h5py tells the descriptor.
    same = file.driver != "sec2" or os.path.samestat(named, os.fstat(file.id.get_vfd_handle()))
    return named if same else None


def check_meaning(dataset: h5py.Dataset, argument: str) -> None:
    """Raise ArgumentError where attributes give ``dataset`` another meaning; StorageError where it cannot be read."""
    with damage_named(place := _place(dataset)):
        refuse_decoded_values(dataset, place, argument)
        refuse_reversed_axes(dataset, place, argument)
        reason = missing_filters(dataset)
    if reason is not None:
        raise StorageError(f"{place} cannot be read: {reason}.")


def _place(dataset: h5py.Dataset) -> str:
    """File and name of ``dataset``, for errors."""
    return f"{dataset.file.filename}:{decoded(dataset.name)}"


def storage_kind(dataset: h5py.Dataset) -> str:
    """HDF5's layout of ``dataset``: compact, contiguous, chunked or virtual."""
    return _KINDS[dataset.id.get_create_plist().get_layout()]


def stored_dtype(dataset: h5py.Dataset, argument: str) -> np.dtype:
    """Element type of ``dataset`` by the fields of its *stored* type; raises ArgumentError for what is no float here.

    bfloat16 comes as uint16 with the attribute dtype="bfloat16" (what this package writes), as HDF5's own 2-byte float,
    which h5py passes off as float32, and as 2-byte opaque values: those without a tag (what h5py makes of ml_dtypes
    arrays), with a tag that says bfloat16, or with the attribute.
    """
    stored = dataset.id.get_type()
    for code in ("f2", "f4", "f8"):
        if stored == h5t.py_create(np.dtype(code)):
            return np.dtype(code)
    kind, size = stored.get_class(), stored.get_size()
    said = dataset.attrs.get("dtype") if size == 2 and kind in (h5t.INTEGER, h5t.OPAQUE) else None
    tagged = kind == h5t.INTEGER and _is_text(said, "bfloat16")
    own_float = (
        kind == h5t.FLOAT and size == 2 and stored.get_fields() == _BFLOAT16_FIELDS and stored.get_ebias() == 127
    )
    if kind == h5t.OPAQUE:
        _check_opaque(stored, said, dataset.name, argument)
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


def _check_opaque(stored: h5t.TypeOpaqueID, said: object, name: str, argument: str) -> None:
    """Raise ArgumentError unless opaque values of this type, whose attribute dtype is ``said``, are bfloat16."""
    tag, size = stored.get_tag(), stored.get_size()
    if size == 2 and (_is_text(said, "bfloat16") or (said is None and tag.lower() in (b"", b"bfloat16"))):
        return
    found = f"opaque values of {size} bytes in {name}, tagged {shown(tag)}"
    found += "" if said is None else f", with the attribute dtype = {shown(said)}"
    remedy = "Store floats; if the values are bfloat16, say so by the attribute dtype='bfloat16'."
    raise ArgumentError(argument, found, NAMES, remedy)


def _is_unmarked_opaque(dataset: h5py.Dataset) -> bool:
    """Whether its values are opaque, with neither a tag nor an attribute that names them."""
    stored = dataset.id.get_type()
    return stored.get_class() == h5t.OPAQUE and not stored.get_tag() and "dtype" not in dataset.attrs


def _is_text(value: object, text: str) -> bool:
    """Whether an attribute, which may be anything, is ``text``."""
    return isinstance(value, (str, bytes)) and value in (text, text.encode())


def _layout(said: object, asked: str | None, rank: int, argument: str, place: str) -> Layout:
    """The layout that was asked for, else the one that the data set says it has, else the usual one of its rank."""
    if asked is not None or said is None:
        return parse_layout(asked, rank, argument)
    name = said.reshape(())[()] if isinstance(said, np.ndarray) and said.size == 1 else said
    name = decoded(name) if isinstance(name, bytes) else name
    if isinstance(name, str) and name in LAYOUTS + LSE_LAYOUTS and len(name) == rank:
        return Layout(name)
    found = f"the attribute layout = {shown(said)} of {place}, which has {rank} dimensions"
    remedy = Phrase.of("Name the layout by ", Choice("layout", ...), ", which counts more, or correct the attribute.")
    raise ArgumentError(argument, found, f"one of {', '.join(LAYOUTS)}", remedy)


def _refuse_foreign_data(place: str, kind: str, external_count: int) -> None:
    if kind == "virtual":
        raise StorageError(
            f"{place} is virtual: its data lie in other data sets. Name those, or copy it to a real one."
        )
    if external_count:
        raise StorageError(f"{place} keeps its data in external files, which are not followed. Copy it to a real one.")


def _why_not_mapped(dataset: h5py.Dataset, kind: str, size: int, on_disk: bool) -> str | None:
    """Why the elements, ``size`` bytes, cannot be taken straight from the file, or None if they can."""
    if kind != "contiguous":
        return kind
    if dataset.file.driver != "sec2":
        return f"not a plain file (h5py driver {dataset.file.driver})"
    if not on_disk:
        return "its file is no longer under that name"
    if dataset.file.mode != "r":
        return "its file is open for writing"
    stored_bytes = dataset.id.get_storage_size()  # only here: HDF5 adds up chunks one by one
    if size == 0 or stored_bytes == 0:
        # get_offset() alone does not tell: with a user block it is a number even where nothing is allocated.
        return "no space allocated yet"
    if stored_bytes != size or dataset.id.get_offset() is None:
        return "its size on disk is not that of its elements"
    return None
