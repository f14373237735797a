"""Any array that people have, as a token source: NumPy, maps, HDF5, DLPack, the array interface."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import numpy.ma  # which NumPy imports when it is first asked for

from ..errors import ArgumentError
from .device import DeviceSource
from .dtypes import BFLOAT16, element_dtype
from .exchange import BFLOAT, REFUSALS, UINT, Relabelled
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
    if is_dataset(array):
        check_open(array, argument)
        return _dataset_source(array, argument, layout)
    on_device = _device_array(array, argument)
    found = _host_array(array, argument) if on_device is None else on_device
    element_dtype(np.dtype(found.dtype), argument)
    parsed = parse_layout(layout, found.ndim, argument)
    if on_device is not None:
        return DeviceSource(on_device, parsed, argument)
    owner = memmap_below(found)
    return HostSource(found, parsed, argument) if owner is None else MemmapSource(found, parsed, argument, owner)


def is_dataset(array: object) -> bool:
    """Whether ``array`` is an h5py data set; h5py is not imported."""
    h5py = sys.modules.get("h5py")
    return h5py is not None and isinstance(array, h5py.Dataset)


def check_open(array: object, argument: str) -> None:
    """Raise ArgumentError for an h5py data set whose file is closed, which can tell neither shape nor type."""
    if is_dataset(array) and not array:
        remedy = 'Use it while its file is open, or pass "file.h5:/name".'
        raise ArgumentError(argument, "a data set of a closed file", "an open one", remedy)


def check_comparable(array: object, argument: str) -> None:
    """Raise ArgumentError, naming ``argument``, where the elements of ``array`` are not all that it says.

    That is a masked array, or an h5py data set that its attributes give another meaning; StorageError for one that
    cannot be read here.
    """
    refuse_mask(array, argument)
    if is_dataset(array):
        from .stored import check_meaning

        check_meaning(array, argument)


def as_array(array: object, argument: str) -> Any:
    """``array`` of any library as one of NumPy or CuPy over the same memory. Raises as ``as_source`` does."""
    on_device = _device_array(array, argument)
    return _host_array(array, argument) if on_device is None else on_device


def _device_array(array: object, argument: str) -> Any:
    """``array`` as a CuPy array over the same memory, or None where it is not on a GPU or CuPy is not installed."""
    try:
        interface = getattr(array, "__cuda_array_interface__", None)
    except RuntimeError as error:
        found = f"{type_name(array)} that cannot be taken over ({error})"
        raise ArgumentError(argument, found, EXPECTED, f"Pass {argument}.detach().") from error
    if interface is None or importlib.util.find_spec("cupy") is None:
        return None
    import cupy

    if interface.get("typestr") == "<V2" and not isinstance(array, cupy.ndarray):  # how PyTorch names bfloat16 here
        return cupy.from_dlpack(Relabelled(array, BFLOAT, UINT)).view(BFLOAT16)
    return cupy.asarray(array)


def _host_array(array: object, argument: str) -> np.ndarray:
    """``array`` as a NumPy array over the same memory, without a copy where it offers one."""
    refuse_mask(array, argument)
    if isinstance(array, np.ndarray):
        return array.view(np.ndarray)  # a matrix would not take four axes
    if hasattr(array, "__cuda_array_interface__"):
        raise _on_a_device(array, argument)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        try:
            found = _taken_over(array) if array.__dlpack_device__()[0] == _DLPACK_CPU else None
        except REFUSALS as error:
            reason = f"{type_name(array)} that NumPy cannot take over ({error})"
            raise ArgumentError(argument, reason, EXPECTED, "Convert it on purpose.") from error
        if found is None:
            raise _on_a_device(array, argument)
        return found
    if not isinstance(array, np.generic) and hasattr(array, "__array_interface__"):
        return np.asarray(array)
    raise ArgumentError(argument, type_name(array), EXPECTED, f"Make it an array: np.asarray({argument}, 'float32').")


def _taken_over(array: Any) -> np.ndarray:
    """``array`` by DLPack, also of bfloat16, which NumPy's own from_dlpack does not know."""
    try:
        return np.from_dlpack(array)
    except REFUSALS as error:
        try:
            return np.from_dlpack(Relabelled(array, BFLOAT, UINT)).view(BFLOAT16)
        except REFUSALS:
            raise error from None


def refuse_mask(array: object, argument: str) -> None:
    """Raise ArgumentError for a masked array of NumPy."""
    if isinstance(array, np.ma.MaskedArray):
        remedy = f"Pass {argument}.data, and say what is to be seen by a mask of cqsa_arrays."
        raise ArgumentError(argument, "a masked array, whose mask would be lost", EXPECTED, remedy)


def _on_a_device(array: object, argument: str) -> ArgumentError:
    remedy = f"Install CuPy to compute there, or copy it with {argument}.get() or {argument}.cpu() first."
    return ArgumentError(argument, f"{type_name(array)} on a GPU", EXPECTED, remedy)


def _with_layout(array: DiskArray, layout: str | None, argument: str) -> DiskArray:
    return array if layout is None else array.in_layout(parse_layout(layout, array.ndim, argument))


def _dataset_source(dataset: object, argument: str, layout: str | None) -> TokenSource:
    """An open h5py data set: by position if its file is open for reading only; else by h5py, which may hold writes."""
    from .chunked import ChunkedSource
    from .stored import inspect

    stored = inspect(dataset, argument, layout)
    if stored.offset is not None:
        return DiskArray(stored).source()
    stored.check_readable()
    return ChunkedSource(dataset, stored, owns_file=False)


def type_name(array: object) -> str:
    """The type of ``array`` with its module, for errors."""
    return f"{type(array).__module__}.{type(array).__qualname__}"
