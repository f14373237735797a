"""New HDF5 files that are allocated whole: structure, space and durability first, raw bytes in place after.

Imported only when a file is made: this module imports h5py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from ..errors import START_OVER, StorageError
from ..units import format_bytes
from .dtypes import BFLOAT16
from .reserve import reserve

DATA_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class NewDataset:
    """A data set to be made: its physical ``shape``, the ``dtype`` of its elements and its attributes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    attributes: Mapping[str, object] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def create_contiguous(
    path: str, datasets: list[NewDataset], attributes: Mapping[str, object], links: Mapping[str, str]
) -> list[int]:
    """Make the file ``path`` with contiguous ``datasets`` and their disk blocks; the byte offset of each.

    ``links`` are further names for them. When this returns, structure, attributes and space are on the disk, and the
    elements are undefined. Where there is no room, StorageError says how much is needed, and no file is left.
    """
    try:
        with ExitStack() as undo:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            undo.callback(os.remove, path)  # also on an interruption; never a file that was there before
            offsets = _create(path, datasets, attributes, links)
            undo.pop_all()
    except (OSError, RuntimeError) as error:  # h5py reports a full disk on closing as a RuntimeError
        raise _no_room(path, sum(new.nbytes for new in datasets), error) from error
    return offsets


def _create(
    path: str, datasets: list[NewDataset], attributes: Mapping[str, object], links: Mapping[str, str]
) -> list[int]:
    with h5py.File(
        path,
        "w",
        libver=("v108", "v110"),  # attributes over 64 KiB (plans) need 1.8; any HDF5 since 1.10 reads it
        alignment_threshold=DATA_ALIGNMENT,
        alignment_interval=DATA_ALIGNMENT,
        locking=False,  # nobody else knows the file yet, and some disks have no locks
    ) as file:
        offsets = [_create_dataset(file, new) for new in datasets]
        for name, target in links.items():
            file[name] = file[target]
        write_attributes(file, attributes)
    spans = [(offset, offset + new.nbytes) for offset, new in zip(offsets, datasets, strict=True)]
    _reserve(path, spans)
    sync_directory(path)
    return offsets


def contiguous_offsets(path: str, datasets: list[NewDataset], marks: Mapping[str, object]) -> list[int]:
    """The byte offset of each of ``datasets`` in the file that create_contiguous made of them.

    Raises StorageError where it is gone, has other data sets, or lacks an attribute of ``marks``.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:  # the job has a lock of its own
            for name, value in marks.items():
                if file.attrs.get(name) != value:
                    raise StorageError(f"{path}: found {name} = {file.attrs.get(name)}, expected {value}.")
            offsets = []
            for new in datasets:
                found = file[new.name]
                offset = found.id.get_offset()
                if found.shape != new.shape or found.dtype != stored_form(new.dtype)[0] or offset is None:
                    raise StorageError(f"{path}: {new.name} is {found.dtype} {found.shape}, not what was allocated.")
                offsets.append(offset)
        ends = max(offset + new.nbytes for offset, new in zip(offsets, datasets, strict=True))
        if os.path.getsize(path) < ends:
            raise StorageError(f"{path} is truncated.")
    except StorageError as error:
        raise StorageError(f"{error} It is not the file of this job. ", START_OVER) from None
    except (OSError, RuntimeError, KeyError) as error:
        raise StorageError(f"{path}: the unfinished output cannot be read: {error}. ", START_OVER) from error
    return offsets


def write_attributes(target: h5py.HLObject, attributes: Mapping[str, object]) -> None:
    """Attributes as HDF5 has them; what is nested (dicts, lists, None) as JSON text."""
    for name, value in attributes.items():
        target.attrs[name] = value if isinstance(value, (str, int, float, bool)) else json.dumps(value)


def stored_form(dtype: np.dtype) -> tuple[np.dtype, dict[str, object]]:
    """The type that HDF5 stores for elements of ``dtype``, and the attributes that say so.

    HDF5 files of bfloat16 that every version reads hold its bits as uint16.

    >>> stored_form(np.dtype("f4"))
    (dtype('float32'), {})
    """
    return (np.dtype("u2"), {"dtype": "bfloat16"}) if dtype == BFLOAT16 else (dtype, {})


def sync_directory(path: str) -> None:
    """Put on the disk that ``path`` now has this name, on systems that can."""
    if os.name == "posix":
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _create_dataset(file: h5py.File, new: NewDataset) -> int:
    """An empty contiguous data set, and the byte where its elements will lie."""
    stored, marks = stored_form(new.dtype)
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same job gives the same bytes
    space = h5s.create_simple(new.shape)
    made = h5d.create(file.id, new.name.encode(), h5t.py_create(stored, logical=True), space, properties)
    write_attributes(h5py.Dataset(made), {**marks, **new.attributes})
    return made.get_offset()


def _reserve(path: str, spans: list[tuple[int, int]]) -> None:
    """Give the file's bytes in ``spans`` disk blocks, so that writing in place cannot run out of room."""
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        for start, stop in spans:
            reserve(descriptor, start, stop)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_room(path: str, needed_bytes: int, error: Exception) -> StorageError:
    folder = os.path.dirname(path) or "."
    free = shutil.disk_usage(folder).free
    return StorageError(
        f"{path}: cannot be allocated: {error}. It needs {format_bytes(needed_bytes)}; {format_bytes(free)} are free"
        f" on the disk of {os.path.abspath(folder)}. Make room, or write to another disk."
    )
