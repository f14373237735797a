"""Machine code for an architecture that CuPy does not ask NVRTC for, kept on disk beside what CuPy keeps.

The instructions of ``sm_90a`` exist for compute capability 9.0 alone; CuPy compiles for ``sm_90``, which lacks them,
and NVRTC before CUDA 13 takes one architecture only.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cupy.cuda import nvrtc

from ...errors import DeviceError


@contextmanager
def compiled(text: str, options: Sequence[str]) -> Iterator[Path]:
    """A file with the machine code of ``text``, compiled unless it is there from an earlier time.

    It lies in ``CUPY_CACHE_DIR``, or ``~/.cupy/kernel_cache``; where that cannot be written, or where
    ``CUPY_CACHE_IN_MEMORY`` is 1, it is removed when it was used. Raises ``DeviceError`` with the compiler's log.
    """
    key = repr((text, tuple(options), nvrtc.getVersion()))
    directory = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    path = directory / f"cqsa_{hashlib.sha256(key.encode()).hexdigest()[:40]}.cubin"
    in_memory = os.environ.get("CUPY_CACHE_IN_MEMORY", "").strip() == "1"
    if not in_memory and path.exists():
        yield path
        return
    code = _compile(text, options)
    if not in_memory and _kept(code, path):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        yield Path(file.name)


def _kept(code: bytes, path: Path) -> bool:
    """Whether the file at ``path`` could be written: whole, whoever else does so and whatever happens meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(code)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.remove(file.name)
                raise
    except OSError:
        return False
    return True


def _compile(text: str, options: Sequence[str]) -> bytes:
    program = nvrtc.createProgram(text, "attend.cu", (), ())
    try:
        nvrtc.compileProgram(program, tuple(options))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise DeviceError(f"NVRTC {nvrtc.getVersion()}: {error}: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
