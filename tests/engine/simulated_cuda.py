"""A simulated GPU behind the names of CuPy that the engine uses, to run the engine where there is none.

Work on streams is carried out late and in any order that streams and events allow, drawn by a seed: what the engine
forgets to order comes out wrong in some run, as on a real device. Some streams are starved, which is worse than chance.
The kernel is the formula in float64.
"""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
import types
from collections.abc import Callable
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import ml_dtypes
import numpy as np
from simulated_streams import (
    TOTAL_BYTES,
    CudaError,
    Device,
    Event,
    Stream,
    begin,
    get_current_stream,
    simulator,
    stream_of,
)

from cqsa_arrays.kernels.cuda.call import CALL, ELEMENT_KINDS

KINDS = {number: np.dtype(getattr(ml_dtypes, name, name)) for name, number in ELEMENT_KINDS.items()}


class Memory:
    """Device memory, full of bytes that make NaN of any float."""

    def __init__(self, size_bytes: int) -> None:
        simulator().take(size_bytes)
        self.bytes = np.full(size_bytes, 0xFF, np.uint8)

    def __del__(self) -> None:
        if hasattr(self, "bytes"):
            simulator().used_bytes -= len(self.bytes)


class Array(np.ndarray):
    """``cupy.ndarray``: made at a place of some memory."""

    def __new__(cls, shape, dtype=float, memptr=None):
        if memptr is None:
            return np.full(shape, np.nan, dtype).view(cls)
        memory, offset = memptr
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return memory.bytes[offset : offset + size].view(dtype).reshape(shape).view(cls)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self):
        return Device()

    def __setitem__(self, key, value) -> None:
        get_current_stream().synchronize()  # as if it were the next piece of work there
        super().__setitem__(key, value)

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **named):
        get_current_stream().synchronize()
        plain = [np.asarray(x) if isinstance(x, Array) else x for x in inputs]
        if out:
            named["out"] = tuple(np.asarray(x) for x in out)
        found = getattr(ufunc, method)(*plain, **named)
        return out[0] if out else found.view(Array) if isinstance(found, np.ndarray) else found

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        get_current_stream().synchronize()
        if out is None:
            return np.array(self)
        assert self.flags.c_contiguous
        assert out.flags.c_contiguous
        assert out.shape == self.shape
        out[...] = np.asarray(self)
        return out

    @property
    def __cuda_array_interface__(self):
        return self.__array_interface__


def bytes_at(ptr: int, size_bytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_ubyte * size_bytes).from_address(ptr), np.uint8)


def memcpy_async(to: int, source: int, size_bytes: int, kind: int, stream: int) -> None:
    def copy() -> None:
        bytes_at(to, size_bytes)[:] = bytes_at(source, size_bytes)

    stream_of(stream).put(copy)


def memcpy_2d_async(to, to_pitch, source, source_pitch, width, height, kind, stream) -> None:
    if min(to_pitch, source_pitch) < width:
        raise CudaError("cudaErrorInvalidPitchValue")
    simulator().copies_2d += 1

    def copy() -> None:
        for row in range(height):
            bytes_at(to + row * to_pitch, width)[:] = bytes_at(source + row * source_pitch, width)

    stream_of(stream).put(copy)


def pointer_attributes(ptr: int):
    return SimpleNamespace(type=1 if any(a <= ptr < b for a, b in simulator().locked) else 0)


def lock(array: np.ndarray) -> np.ndarray:
    """Make the simulated device take ``array`` for page-locked."""
    simulator().locked.append((array.ctypes.data, array.ctypes.data + array.nbytes))
    return array


class PinnedMemory:
    def __init__(self, size_bytes: int) -> None:
        self.bytes = np.full(size_bytes, 0xFF, np.uint8)


# ---- the driver, as compiled code calls it


def driver_function(*kinds: type) -> Callable[[Callable[..., object]], object]:
    """Makes a C function that returns an error if the Python function raises one."""

    def made(function: Callable[..., object]) -> object:
        def called(*given: int) -> int:
            try:
                function(*given)
            except (AssertionError, LookupError, CudaError):
                traceback.print_exc()
                return CudaError.status
            return 0

        return ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(called)

    return made


ADDRESS, SIZE = ctypes.c_uint64, ctypes.c_size_t
CONTEXT = 12345


@driver_function(ADDRESS)
def set_context(context: int) -> None:
    assert context == CONTEXT


@driver_function(ADDRESS, ADDRESS, SIZE, ADDRESS)
def to_device(to: int, source: int, size_bytes: int, stream: int) -> None:
    memcpy_async(to, source, size_bytes, 1, stream)


@driver_function(ADDRESS, ADDRESS, SIZE, ADDRESS)
def to_host(to: int, source: int, size_bytes: int, stream: int) -> None:
    memcpy_async(to, source, size_bytes, 2, stream)


@driver_function(ADDRESS, ADDRESS)
def event_record(event: int, stream: int) -> None:
    Event.everyone[event].record(stream_of(stream))


@driver_function(ADDRESS)
def event_synchronize(event: int) -> None:
    Event.everyone[event].synchronize()


@driver_function(ADDRESS, ADDRESS, ctypes.c_uint)
def stream_wait(stream: int, event: int, flags: int) -> None:
    stream_of(stream).wait_event(Event.everyone[event])


def driver() -> list[int]:
    """In the order of ``native.DRIVER_FUNCTIONS``, for a thread that uses the device."""
    assert getattr(simulator().current, "context", False), "no context is current"
    functions = (set_context, to_device, to_host, event_record, event_synchronize, stream_wait)
    return [CONTEXT, *(ctypes.cast(each, ctypes.c_void_p).value for each in functions)]


# ---- the kernel


def array_at(ptr: int, shape: tuple[int, ...], strides, dtype: np.dtype) -> np.ndarray:
    steps = [int(step) * dtype.itemsize for step in strides]
    size = sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + dtype.itemsize
    return np.ndarray(shape, dtype, (ctypes.c_ubyte * size).from_address(int(ptr)), 0, steps)


class Function:
    """``attend`` as call.cuh describes it."""

    ptr = 0

    def __init__(self, element: int) -> None:
        self._element = KINDS[element]
        self._real = np.dtype("f8" if self._element == np.float64 else "f4")

    def __call__(self, grid, block, arguments, shared_mem=0) -> None:
        call = arguments[0].copy().view(CALL)
        simulator().launches += 1
        if simulator().fail_at is not None and simulator().launches >= simulator().fail_at:
            raise CudaError("an illegal memory access was encountered")
        get_current_stream().put(lambda: self._compute(call[0]))

    def _compute(self, call) -> None:
        rows = (int(call["batches"]), int(call["heads"]), int(call["query_tokens"]))
        dim, value_dim = int(call["head_dim"]), int(call["value_dim"])
        state = None
        if call["m"]:
            acc = array_at(call["acc"], (*rows, value_dim), (*call["acc_strides"], 1), self._real)
            m, normalizer = (array_at(call[name], rows, call["stat_strides"], self._real) for name in ("m", "l"))
            state = (acc, m, normalizer)
        m, normalizer, acc = np.full(rows, -np.inf), np.zeros(rows), np.zeros((*rows, value_dim))
        if state is not None and not call["fresh"]:
            seen = state[2] != 0
            m, normalizer = np.where(seen, state[1], -np.inf), np.where(seen, state[2], 0.0)
            acc = np.where(seen[..., None], state[0], 0.0)
        for piece in call["pieces"][: int(call["piece_count"])]:
            m, normalizer, acc = self._merged(call, piece, rows, dim, value_dim, (m, normalizer, acc))
        if call["out"]:
            self._finish(call, rows, value_dim, m, normalizer, acc)
        elif state is not None:
            state[0][...], state[1][...], state[2][...] = acc, m, normalizer

    def _merged(self, call, piece, rows, dim, value_dim, before):
        batch, heads, count = rows
        tokens = int(piece["tokens"])
        q = array_at(call["queries"], (*rows, dim), (*call["query_strides"], 1), self._element).astype("f8")
        k = array_at(piece["keys"], (batch, heads, tokens, dim), (*call["key_strides"], 1), self._element).astype("f8")
        v = array_at(piece["values"], (batch, heads, tokens, value_dim), (*call["value_strides"], 1), self._element)
        row = int(call["query_start"]) + np.arange(count)[:, None]
        key = int(piece["start"]) + np.arange(tokens)
        seen = (key <= row + call["high_diagonal"]) & (key >= row + call["low_diagonal"])
        scores = np.where(seen, float(call["scale"]) * (q @ k.swapaxes(2, 3)), -np.inf)
        m, normalizer, acc = before
        new = np.maximum(m, scores.max(3))
        base = np.where(new == -np.inf, 0.0, new)
        weights, alpha = np.exp(scores - base[..., None]), np.exp(m - base)
        return new, normalizer * alpha + weights.sum(3), acc * alpha[..., None] + weights @ v.astype("f8")

    def _finish(self, call, rows, value_dim, m, normalizer, acc) -> None:
        empty = normalizer == 0
        share = np.where(empty, 1, normalizer)
        out = array_at(call["out"], (*rows, value_dim), (*call["out_strides"], 1), KINDS[int(call["out_kind"])])
        out[...] = (acc / share[..., None]).astype(out.dtype)
        if call["lse"]:
            lse = array_at(call["lse"], rows, call["lse_strides"], self._real)
            lse[...] = np.where(empty, -np.inf, m + np.log(share))


class Nvrtc:
    """Machine code is the options, one a line."""

    NVRTCError = type("NVRTCError", (RuntimeError,), {})

    def __init__(self) -> None:
        self.options: list[str] = []
        self.compiled = 0

    @staticmethod
    def getVersion() -> tuple[int, int]:
        return 13, 0

    @staticmethod
    def getSupportedArchs() -> tuple[int, ...]:
        return 75, 80, 90, 100

    def createProgram(self, text: str, name: str, headers: tuple[str, ...], includes: tuple[str, ...]) -> int:
        assert "attend" in text
        return 0

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:
        self.options, self.compiled = list(options), self.compiled + 1
        if not set(self.options) & {"-arch=sm_90", "-arch=sm_90a"}:
            raise self.NVRTCError("compilation failed")

    def getProgramLog(self, program: int) -> str:
        return f"no such architecture: {' '.join(self.options)}"

    def getCUBIN(self, program: int) -> bytes:
        return "\n".join(self.options).encode()

    def destroyProgram(self, program: int) -> None:
        self.options = []


class Module:
    """A module is loaded from the options that it was compiled with."""

    def load(self, code: bytes) -> None:
        options = code.decode().split("\n")
        defines = dict(option[2:].split("=") for option in options if option.startswith("-D"))
        self._element = int(defines["ELEMENT"])

    def get_function(self, name: str) -> Function:
        return Function(self._element)


def modules() -> dict[str, types.ModuleType]:
    """The modules to be put in ``sys.modules``."""

    def module(name: str, **content: object) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(content, __spec__=ModuleSpec(name, None))
        return made

    runtime = module(
        "cupy.cuda.runtime",
        CUDARuntimeError=CudaError, memcpyAsync=memcpy_async, memcpy2DAsync=memcpy_2d_async, memcpyHostToDevice=1,
        memcpyDeviceToHost=2, memoryTypeHost=1, pointerGetAttributes=pointer_attributes, getDeviceCount=lambda: 1,
        memGetInfo=lambda: (TOTAL_BYTES - simulator().used_bytes, TOTAL_BYTES),
        getDeviceProperties=lambda index: {"name": b"simulated", "totalGlobalMem": TOTAL_BYTES, "major": 9, "minor": 0},
    )  # fmt: skip
    cuda = module(
        "cupy.cuda",
        Device=Device, Event=Event, Memory=Memory, MemoryPointer=lambda memory, offset: (memory, offset),
        PinnedMemory=PinnedMemory, PinnedMemoryPointer=lambda memory, offset: memory.bytes, Stream=Stream,
        get_current_stream=get_current_stream, runtime=runtime, nvrtc=Nvrtc(), Module=Module,
        driver=types.SimpleNamespace(
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, funcSetAttribute=lambda function, attribute, value: None
        ),
    )  # fmt: skip
    cupy = module(
        "cupy",
        cuda=cuda, ndarray=Array, empty=lambda shape, dtype: Array(shape, dtype),
        full=lambda shape, value, dtype: np.full(shape, value, dtype).view(Array),
        zeros=lambda shape, dtype: np.zeros(shape, dtype).view(Array), may_share_memory=np.may_share_memory,
        asarray=lambda array: np.asarray(array).view(Array), asnumpy=lambda array: array.get(),
    )  # fmt: skip
    backend = module("cupy_backends.cuda.api.driver", CUDADriverError=type("CUDADriverError", (RuntimeError,), {}))
    backends = [module(name) for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.api")]
    return {made.__name__: made for made in (cupy, cuda, runtime, *backends, backend)}


@contextmanager
def simulated_gpu(seed: int):
    """``cupy`` is the simulator meanwhile, and what was imported with it is forgotten afterwards."""
    here = "cqsa_arrays.kernels.cuda"
    ours = ("cupy", "cupy_backends", "cqsa_arrays.engine.cuda", f"{here}.kernel", f"{here}.cubin")

    def concerned() -> list[str]:
        kept = "cqsa_arrays.engine.cuda.native"  # compiled once; it knows nothing of CuPy
        return [name for name in sys.modules if name.startswith(ours) and name != kept]

    before = {name: sys.modules.pop(name) for name in concerned()}
    begin(seed)
    sys.modules.update(modules())
    from cqsa_arrays import devices
    from cqsa_arrays.engine.cuda import transfer

    transfer._driver = lambda names: driver()
    devices._describe.cache_clear()
    try:
        with TemporaryDirectory() as cache, patch.dict(os.environ, CUPY_CACHE_DIR=cache):
            yield simulator()
    finally:
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(before)
        devices._describe.cache_clear()
