"""The computing devices: the CPU, and what is known of each GPU. CuPy is imported only when a GPU may be used."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache

from .errors import ArgumentError, DeviceError

OLDEST = (8, 0)
_EXPECTED = "'auto', 'cpu', 'cuda' or 'cuda:<number>'"
_INSTALL = "Install it with pip install 'cqsa-arrays[cuda13]' (or cuda12), or pass device='cpu'."


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: its number, name, memory in bytes and compute capability."""

    index: int
    model: str
    total_bytes: int
    capability: tuple[int, int]

    @property
    def name(self) -> str:
        return f"cuda:{self.index}"


def resolve_device(device: object, arrays_on: set[int]) -> Gpu | None:
    """The GPU that computes, or None for the CPU.

    ``arrays_on`` are the numbers of the GPUs that hold inputs or outputs: those compute, and "auto" otherwise takes GPU
    0 where CuPy finds one that is new enough. Raises ArgumentError for a device that is not there or cannot be used.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if device not in ("auto", "cpu") and match is None:
        found = repr(device) if isinstance(device, str) else f"type {type(device).__name__}"
        raise ArgumentError("device", found, _EXPECTED, "Leave it out to let the library choose.")
    if len(arrays_on) > 1:
        found = ", ".join(f"cuda:{index}" for index in sorted(arrays_on))
        raise ArgumentError("q, k, v, out", f"arrays on {found}", "arrays on one GPU", "Copy them to one of them.")
    here = next(iter(arrays_on), None)
    if here is not None and (device == "cpu" or (match and match[1] and int(match[1]) != here)):
        raise ArgumentError("device", f"{device!r} with arrays on cuda:{here}", f"'cuda:{here}'", "Or copy the arrays.")
    if device == "cpu":
        return None
    if here is not None:
        return _usable(here)
    if match:
        return _usable(int(match[1] or 0))
    if importlib.util.find_spec("cupy") is None:
        return None
    usable = [gpu for gpu in gpus()[:1] if gpu.capability >= OLDEST]
    return usable[0] if usable else None


def gpus() -> list[Gpu]:
    """All GPUs that CuPy sees; none where CuPy, the driver or a GPU is missing."""
    if importlib.util.find_spec("cupy") is None:
        return []
    try:
        import cupy
    except ImportError:  # installed, but its libraries are not
        return []
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        return []
    return [_describe(index) for index in range(count)]


def _usable(index: int) -> Gpu:
    if importlib.util.find_spec("cupy") is None:
        raise ArgumentError("device", f"cuda:{index} without CuPy", "the package cupy", _INSTALL)
    found = gpus()
    if not found:
        raise DeviceError(
            f"device: cuda:{index} was asked for, but CuPy sees no GPU: {_why_none()}. Pass device='cpu'."
        )
    if index >= len(found):
        expected = f"one of {', '.join(gpu.name for gpu in found)}"
        raise ArgumentError("device", f"cuda:{index}", expected, "Pass one that is there.")
    if found[index].capability < OLDEST:
        capability = ".".join(map(str, found[index].capability))
        raise ArgumentError(
            "device", f"cuda:{index} of compute capability {capability}", "8.0 or newer", "Pass device='cpu'."
        )
    return found[index]


def _why_none() -> str:
    try:
        import cupy
    except ImportError as error:
        return str(error)
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return str(error)
    return "there is none"


@lru_cache
def _describe(index: int) -> Gpu:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    return Gpu(
        index, properties["name"].decode(), properties["totalGlobalMem"], (properties["major"], properties["minor"])
    )
