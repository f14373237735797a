"""The way back: a result as an array of the library that the queries came from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .adapters import as_source, type_name
from .dtypes import BFLOAT16
from .exchange import BFLOAT, REFUSALS, UINT, Relabelled


def taker(model: Any) -> Callable[[Any], Any] | None:
    """``from_dlpack`` of the library whose array ``model`` is; None for NumPy, and for what is no array of a library.

    >>> taker(np.zeros(3)) is None, taker("in.h5:/q") is None
    (True, True)
    """
    if isinstance(model, np.ndarray) or not hasattr(model, "__dlpack__"):
        return None
    names = [base.__module__.partition(".")[0] for base in type(model).__mro__]
    libraries = [sys.modules.get(name) for name in names]
    if hasattr(model, "__array_namespace__"):  # of the array API standard
        libraries.insert(0, model.__array_namespace__())
    found = (getattr(library, "from_dlpack", None) for library in libraries)
    return next((take for take in found if take is not None), None)


def like(array: Any, model: Any) -> Any:
    """``array``, NumPy's or CuPy's, as an array of the library that ``model`` is of, if that takes over DLPack.

    Else it is returned as it is. The memory is the same, unless that library copies.
    """
    take = None if type(array) is type(model) else taker(model)
    if take is None:
        return array
    return take(Relabelled(array.view(np.uint16), UINT, BFLOAT) if array.dtype == BFLOAT16 else array)


def check_like(array: Any, model: Any) -> None:
    """Raise ArgumentError unless ``like`` can hand back arrays of the type of ``array``, (1, 1, 1, 1), which is tried.

    A library may know no such elements, or keep them as narrower ones.
    """
    try:
        found = like(array, model)
        dtype = array.dtype if found is array else as_source(found, "dtype").dtype
        reason = None if dtype == array.dtype else f"it makes {dtype} of them"
    except REFUSALS as error:
        reason = str(error)
    if reason is not None:
        raise ArgumentError(
            "dtype",
            f"{array.dtype}, which {type_name(model)} cannot hold ({reason})",
            "a type that an array of q's library can have",
            f"Pass out=numpy.empty(shape, {array.dtype.name!r}), q as a NumPy array, or another dtype.",
        )
