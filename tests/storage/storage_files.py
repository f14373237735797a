"""Files, arrays and measures that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from cqsa_arrays.ranges import Range

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype("f2"), BFLOAT16, np.dtype("f4"), np.dtype("f8")]
AXES = {"b": 2, "h": 3, "n": 50, "d": 8}
PAGE = 4096


def normal(shape: tuple[int, ...], dtype: object = "f4", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def layout_shape(layout: str) -> tuple[int, ...]:
    return tuple(AXES[axis] for axis in layout)


def write_array(file: h5py.File, name: str, array: np.ndarray, **options: object) -> h5py.Dataset:
    """``array`` under ``name``; bfloat16 as uint16 with its mark."""
    if array.dtype != BFLOAT16:
        return file.create_dataset(name, data=array, **options)
    made = file.create_dataset(name, data=array.view("u2"), **options)
    made.attrs["dtype"] = "bfloat16"
    return made


def qkv(path: Path, array: np.ndarray, **options: object) -> Path:
    with h5py.File(path, "w") as file:
        for name in "qkv":
            write_array(file, name, array, **options)
    return path


def create_low_level(file: h5py.File, name: str, stored: object, shape: tuple[int, ...], layout: int, alloc: int):
    """A data set with a choice of HDF5's own types, layout and allocation time."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(layout)
    properties.set_alloc_time(alloc)
    return h5py.Dataset(h5d.create(file.id, name.encode(), stored, h5s.create_simple(shape), properties))


def hdf5_bfloat16() -> h5t.TypeFloatID:
    """HDF5's 2-byte float with bfloat16's fields."""
    stored = h5t.IEEE_F32LE.copy()
    stored.set_fields(15, 7, 8, 0, 7)
    stored.set_size(2)
    stored.set_ebias(127)
    return stored


def whole(source) -> tuple[Range, Range, Range]:
    return tuple(Range(0, length) for length in source.shape[:3])


def read(source, dtype: object = "f4", where: tuple[Range, Range, Range] | None = None) -> np.ndarray:
    """A block of ``source`` as the engine reads it: token-major memory for token-major sources."""
    b, h, n = where or whole(source)
    if source.token_major:
        out = np.full((len(b), len(n), len(h), source.shape[3]), 77, dtype).swapaxes(1, 2)
    else:
        out = np.full((len(b), len(h), len(n), source.shape[3]), 77, dtype)
    source.read(b, h, n, out)
    return out


def resident_bytes() -> int:
    """Anonymous, shared and mapped pages of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak_bytes() -> int:
    """High-water mark of resident pages since ``reset_peak``."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
