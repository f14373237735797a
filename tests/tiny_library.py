"""An array library of its own: it shares nothing with NumPy but DLPack, by which it gives and takes arrays.

It reads and writes DLPack's structures itself, and knows bfloat16 as DLPack does, which NumPy does not.
"""

from __future__ import annotations

import ctypes
import math
from types import ModuleType

import ml_dtypes
import numpy as np

CODES = {"float16": (2, 16), "bfloat16": (4, 16), "float32": (2, 32), "float64": (2, 64)}
_NAMES = {code: name for name, code in CODES.items()}
_PLAIN, _USED = b"dltensor", b"used_dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", _api))
_get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _api))

given: dict[int, tuple[object, ...]] = {}
"""What has been handed over and not been let go yet, by the address of its structure; also what nobody took."""


@_Deleter
def _let_go(managed: object) -> None:
    del given[ctypes.addressof(managed.contents)]


class Tensor:
    """Bytes, a shape and the name of an element type."""

    def __init__(self, array: np.ndarray) -> None:
        self._bytes = bytearray(array.tobytes())
        self.shape, self.dtype = array.shape, array.dtype.name

    def numpy(self) -> np.ndarray:
        """A copy, for the tests to look at."""
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
        return np.frombuffer(bytes(self._bytes), dtype).reshape(self.shape)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self) -> object:
        code, bits = CODES[self.dtype]
        memory = (ctypes.c_char * len(self._bytes)).from_buffer(self._bytes)
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        strides = (ctypes.c_int64 * len(self.shape))(*(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))))
        tensor = _Tensor(ctypes.addressof(memory), 1, 0, len(self.shape), code, bits, 1, shape, strides, 0)
        managed = _Managed(tensor, None, _let_go)
        given[address := ctypes.addressof(managed)] = (managed, memory, shape, strides)
        return _new(address, _PLAIN, None)


def from_dlpack(array: object) -> Tensor:
    """Take over (here: copy) whatever array speaks DLPack; BufferError for other elements than floats."""
    capsule = array.__dlpack__()
    managed = ctypes.cast(_get(capsule, _PLAIN), ctypes.POINTER(_Managed))
    _rename(capsule, _USED)
    tensor = managed.contents.tensor
    try:
        if (name := _NAMES.get((tensor.code, tensor.bits))) is None:
            raise BufferError(f"elements of code {tensor.code}")
        shape = tuple(tensor.shape[: tensor.ndim])
        size = math.prod(shape) * tensor.bits // 8
        made = Tensor.__new__(Tensor)
        made.shape, made.dtype = shape, name
        made._bytes = bytearray(ctypes.string_at(tensor.data + tensor.byte_offset, size))
        return made
    finally:
        managed.contents.deleter(managed)


def without(*names: str) -> ModuleType:
    """The same library, which does not know elements of these types."""
    made = ModuleType("tiny_without")

    def picky(array: object) -> Tensor:
        found = from_dlpack(array)
        if found.dtype in names:
            raise BufferError(f"no {found.dtype} here")
        return type("Tensor", (made.Tensor,), {})(found.numpy())

    made.Tensor = type("Tensor", (Tensor,), {"__module__": "tiny_without"})
    made.from_dlpack = picky
    return made
