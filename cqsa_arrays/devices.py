"""The computing devices: the CPU, and what is known of each GPU. CuPy is imported only when a GPU may be used."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache

from .errors import ArgumentError, DeviceError
from .gpu_models import DEFAULT_MODEL, MODELS, model_key
from .wording import Choice, Phrase

OLDEST = (8, 0)
_EXPECTED = "'auto', 'cpu', 'cuda' or 'cuda:<number>'"
_ON_THE_CPU = Choice("device", "cpu")
_LEAVE_OUT = "Leave it out to let the library choose."
CUPY_WHEELS = ("cupy-cuda13x", "cupy-cuda12x")
_INSTALL = Phrase.of(
    f"Install it with pip install {CUPY_WHEELS[0]} (or {CUPY_WHEELS[1]}), or pass ", _ON_THE_CPU, "."
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: its number, model, memory in bytes and compute capability; the number of one that is not here is None.

    ``name`` is how ``device=`` names it.
    """

    index: int | None
    model: str
    total_bytes: int
    capability: tuple[int, int]

    @property
    def name(self) -> str:
        return f"cuda:{model_key(self.model) if self.index is None else self.index}"


def resolve_device(device: object, arrays_on: set[int]) -> Gpu | None:
    """The GPU that computes, or None for the CPU.

    ``arrays_on`` are the numbers of the GPUs that hold inputs or outputs: those compute, and "auto" otherwise takes GPU
    0 where CuPy finds one that is new enough. Raises ArgumentError for a device that is not there or cannot be used.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if device not in ("auto", "cpu") and match is None:
        raise _unknown(device)
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


def planned_device(device: object, arrays_on: set[int]) -> Gpu | None:
    """As ``resolve_device``, for a plan that is not run: "cuda:h200" is a model, and so is "cuda" where no GPU is."""
    if not isinstance(device, str) or not device.startswith("cuda") or arrays_on:
        return resolve_device(device, arrays_on)
    if re.fullmatch(r"cuda(:\d+)?", device):
        return resolve_device(device, arrays_on) if gpus() else _modelled(DEFAULT_MODEL)
    key = model_key(device.removeprefix("cuda:"))
    if key is None:
        raise _unknown(device)
    return _modelled(key)


def _modelled(key: str) -> Gpu:
    model = MODELS[key]
    return Gpu(None, model.title, model.total_bytes, model.capability)


def _unknown(device: object) -> ArgumentError:
    """For a device that is none, or only a model."""
    if not isinstance(device, str):
        return ArgumentError("device", f"type {type(device).__name__}", _EXPECTED, _LEAVE_OUT)
    _, colon, model = device.partition("cuda:")
    if not colon or not model[:1].isalpha():
        return ArgumentError("device", repr(device), _EXPECTED, _LEAVE_OUT)
    if model_key(model) is not None:
        remedy = "A model can only be planned for; to compute, name a GPU of this machine."
        return ArgumentError("device", repr(device), _EXPECTED, remedy)
    return ArgumentError("device", repr(device), f"{_EXPECTED}; for a plan {_models()}", _LEAVE_OUT)


def _models() -> str:
    return f"also a model: {', '.join(f'cuda:{key}' for key in MODELS)}"


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
            Choice("device"), f": cuda:{index} was asked for, but CuPy sees no GPU: {_why_none()}. Pass ",
            _ON_THE_CPU, ".",
        )  # fmt: skip
    if index >= len(found):
        expected = f"one of {', '.join(gpu.name for gpu in found)}"
        raise ArgumentError("device", f"cuda:{index}", expected, "Pass one that is there.")
    if found[index].capability < OLDEST:
        capability = ".".join(map(str, found[index].capability))
        remedy = Phrase.of("Pass ", _ON_THE_CPU, ".")
        raise ArgumentError("device", f"cuda:{index} of compute capability {capability}", "8.0 or newer", remedy)
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
