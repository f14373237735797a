"""CUDA's run-time compiler as the package nvidia-cuda-nvrtc installs it: no GPU, no CuPy, no toolkit."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
# What ptxas says of each function: a kernel, or a function that is called and not inlined.
KERNEL = re.compile(r"^ptxas info\s+: Compiling entry function '(\w+)'", re.M)
PROPERTIES = re.compile(r"^ptxas info\s+: Function properties for (\w+)\n(.*)$", re.M)
USED = re.compile(r"^ptxas info\s+: Used (\d+) registers(?:.*?(\d+) bytes smem)?", re.M)
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class CompileError(Exception):
    """The compiler refused; its log is the message."""


@dataclass(frozen=True, slots=True)
class Compiled:
    cubin: bytes
    log: str


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What one kernel takes: registers and stack of a thread, bytes that a thread spills, static shared memory."""

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC, the newest that is installed. Its second library is not on the loader's path, so it is loaded first."""
    for package in PACKAGES:
        try:
            paths = [path for path in files(package) or () if ".alt." not in path.name]
        except PackageNotFoundError:
            continue
        (builtins,) = (path for path in paths if path.name.startswith("libnvrtc-builtins.so"))
        (compiler,) = (path for path in paths if path.name.startswith("libnvrtc.so"))
        ctypes.CDLL(str(builtins.locate()))
        return ctypes.CDLL(str(compiler.locate()))
    raise ModuleNotFoundError(f"none of the packages {', '.join(PACKAGES)} is installed")


def compile_cubin(source: str, arch: str, options: Sequence[str] = ()) -> Compiled:
    """Machine code for ``arch`` ("sm_90") and what compiler and assembler said; CompileError with the log otherwise."""
    nvrtc, program = library(), ctypes.c_void_p()
    every = [f"--gpu-architecture={arch}", "--ptxas-options=-v", *options]
    given = (ctypes.c_char_p * len(every))(*(option.encode() for option in every))
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"source.cu", 0, None, None))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(every), given)
        log = output(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if status:
            raise CompileError(log)
        return Compiled(output(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log)
    finally:
        check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))


def kernel_reports(log: str) -> list[KernelReport]:
    """One for each kernel that the log tells of; functions that kernels call are left out."""
    reports = []
    for name, text in zip(*[iter(KERNEL.split(log)[1:])] * 2, strict=True):
        (frame,) = (FRAME.search(rest) for function, rest in PROPERTIES.findall(text) if function == name)
        used = USED.search(text)
        stack, stores, loads = map(int, frame.groups())
        reports.append(KernelReport(name, int(used[1]), stack, stores + loads, int(used[2] or 0)))
    return reports


def output(size_of, get, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    check(get(program, buffer))
    return buffer.raw


def check(status: int) -> None:
    if status:
        library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(library().nvrtcGetErrorString(status).decode())
