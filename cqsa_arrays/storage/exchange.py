"""DLPack for bfloat16, which NumPy and CuPy take and give only as the bits of uint16: its name is changed on the way.

Structures as in DLPack's dlpack.h: https://github.com/dmlc/dlpack.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

UINT, BFLOAT = 1, 4
"""DLPack's codes of kinds of elements."""

REFUSALS = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)
"""What libraries raise for an array that they cannot give or take."""


class _Tensor(ctypes.Structure):
    """The head of DLPack's tensor, with which its managed tensor begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@dataclass(frozen=True, slots=True)
class Relabelled:
    """``array`` of another library by DLPack, its 16-bit elements of code ``was`` handed over as of code ``becomes``.

    Nothing is copied. Handing over raises BufferError for other elements.
    """

    array: Any
    was: int
    becomes: int

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        asked = {"stream": stream, "dl_device": dl_device, "copy": copy}
        # No version asked for: that gives the first form of the structure, which everybody takes.
        capsule = self.array.__dlpack__(**{name: value for name, value in asked.items() if value is not None})
        tensor = _Tensor.from_address(_pointer(capsule, b"dltensor"))
        if (tensor.code, tensor.bits, tensor.lanes) != (self.was, 16, 1):
            raise BufferError(f"elements of DLPack's code {tensor.code} and {tensor.bits} bits")
        tensor.code = self.becomes
        return capsule
