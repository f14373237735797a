"""Any array that people have, as a token source: NumPy, maps, HDF5, DLPack, the array interface."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .device import DeviceSource
from .dtypes import element_dtype
from .hdf5 import DiskArray
from .layout import parse_layout
from .memory import HostSource, MemmapSource, memmap_below
from .source import TokenSource

EXPECTED = "a NumPy or CuPy array, np.memmap, h5py dataset, an array of cqsa_arrays.open(), or one with DLPack"
_DLPACK_CPU = 1


def as_source(array: object, argument: str, layout: str | None = None) -> TokenSource:
    """The token source of ``array`` in ``layout`` (by default its own, or the usual one of its rank).

    Nothing is copied. Raises ArgumentError, naming ``argument``, for lists, scalars, arrays on a GPU, elements that are
    no floats of this machine's byte order, and layouts that do not fit.

    >>> as_source(np.zeros((2, 100, 64), "float32"), "q").shape
    (1, 2, 100, 64)
    """
    if isinstance(array, DiskArray):
        return _with_layout(array, layout, argument).source()
    h5py = sys.modules.get("h5py")
    if h5py is not None and isinstance(array, h5py.Dataset):
        return _dataset_source(array, argument, layout)
    on_device = _device_array(array)
    if on_device is not None:
        element_dtype(np.dtype(on_device.dtype), argument)
        return DeviceSource(on_device, parse_layout(layout, on_device.ndim, argument), argument)
    host = _host_array(array, argument)
    element_dtype(host.dtype, argument)
    parsed = parse_layout(layout, host.ndim, argument)
    owner = memmap_below(host)
    return HostSource(host, parsed, argument) if owner is None else MemmapSource(host, parsed, argument, owner)


def _device_array(array: object) -> Any:
    """``array`` as a CuPy array over the same memory, or None where it is not on a GPU or CuPy is not installed."""
    if not hasattr(array, "__cuda_array_interface__") or importlib.util.find_spec("cupy") is None:
        return None
    import cupy

    return cupy.asarray(array)


def _host_array(array: object, argument: str) -> np.ndarray:
    """``array`` as a NumPy array over the same memory, without a copy where it offers one."""
    if isinstance(array, np.ma.MaskedArray):
        remedy = f"Pass {argument}.data, and say what is to be seen by a mask of cqsa_arrays."
        raise ArgumentError(argument, "a masked array, whose mask would be lost", EXPECTED, remedy)
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "__cuda_array_interface__"):
        raise _on_a_device(array, argument)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        if array.__dlpack_device__()[0] != _DLPACK_CPU:
            raise _on_a_device(array, argument)
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError) as error:
            remedy = "Convert it on purpose; bfloat16 may be passed as uint16 bits with .view(ml_dtypes.bfloat16)."
            found = f"{_type_name(array)} that NumPy cannot take over ({error})"
            raise ArgumentError(argument, found, EXPECTED, remedy) from error
    if not isinstance(array, np.generic) and hasattr(array, "__array_interface__"):
        return np.asarray(array)
    raise ArgumentError(argument, _type_name(array), EXPECTED, f"Make it an array: np.asarray({argument}, 'float32').")


def _on_a_device(array: object, argument: str) -> ArgumentError:
    remedy = f"Install CuPy to compute there, or copy it with {argument}.get() or {argument}.cpu() first."
    return ArgumentError(argument, f"{_type_name(array)} on a GPU", EXPECTED, remedy)


def _with_layout(array: DiskArray, layout: str | None, argument: str) -> DiskArray:
    return array if layout is None else array.in_layout(parse_layout(layout, array.ndim, argument))


def _dataset_source(dataset: object, argument: str, layout: str | None) -> TokenSource:
    """An open h5py data set: by position if its file is open for reading only; else by h5py, which may hold writes."""
    from .chunked import ChunkedSource
    from .stored import inspect

    stored = inspect(dataset, argument, layout)
    if stored.offset is not None:
        return DiskArray(stored).source()
    return ChunkedSource(dataset, stored, owns_file=False)


def _type_name(array: object) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"
