"""Machine code of the CUDA kernels, compiled by NVRTC and kept on disk beside what CuPy keeps.

CuPy's own way has two faults: a cache that cannot be written ends the call, and it compiles for ``sm_90``, which lacks
the instructions of ``sm_90a`` that exist for compute capability 9.0 alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cupy.cuda import nvrtc

from ...codefiles import CodeFile, home_folder
from ...errors import DeviceError
from ...wording import Choice


def compiled(text: str, options: Sequence[str], compiling: Callable[[], None]) -> bytes:
    """The machine code of ``text``: compiled, after a call of ``compiling``, unless it is there from an earlier time.

    It is kept in ``CUPY_CACHE_DIR``, or ``~/.cupy/kernel_cache``, but not where ``CUPY_CACHE_IN_MEMORY`` is 1. Raises
    ``DeviceError`` with the compiler's log.
    """
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "").strip() == "1":
        compiling()
        return _compile(text, options)
    made_from = repr((text, tuple(options), nvrtc.getVersion())).encode()
    named = os.environ.get("CUPY_CACHE_DIR")
    folders = [Path(named)] if named else home_folder("~/.cupy/kernel_cache")
    file = CodeFile(folders, f"cqsa_{hashlib.sha256(made_from).hexdigest()[:40]}.cubin", made_from, "CUPY_CACHE_DIR")
    code = file.load()
    if code is None:
        compiling()
        code = _compile(text, options)
        file.save(code)
    return code


def architecture(capability: tuple[int, int]) -> str:
    """What NVRTC is to compile for: "sm_89". Raises DeviceError where it knows none whose code such a device runs."""
    major, minor = capability
    known = [divmod(arch, 10) for arch in nvrtc.getSupportedArchs()]
    fitting = [m for known_major, m in known if known_major == major and m <= minor]
    if not fitting:
        version = ".".join(map(str, nvrtc.getVersion()))
        known_not = f"NVRTC {version} cannot compile for compute capability {major}.{minor}"
        raise DeviceError(f"{known_not}. Install CuPy with a newer CUDA, or pass ", Choice("device", "cpu"), ".")
    return f"sm_{major}{max(fitting)}"


def _compile(text: str, options: Sequence[str]) -> bytes:
    program = nvrtc.createProgram(text, "attend.cu", (), ())
    try:
        nvrtc.compileProgram(program, tuple(options))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise DeviceError(f"NVRTC {nvrtc.getVersion()}: {error}: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
