"""A process of the command's own: it reserves little beside the budget, and says in one line where memory ran out."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading

# A limit of data (ulimit -d) counts what a thread's stack reserves, by default 8 MiB; our threads touch 0.1 MiB of it.
STACK_BYTES = 1 << 20
# What Python and the libraries of a job reserve: without it they would fail to load, each in words of its own.
LIBRARIES_BYTES = 96 << 20
# What loaders and starters of threads say instead of raising MemoryError.
REFUSALS = ("failed to map segment", "cannot allocate memory", "can't start new thread")


def keep_small() -> None:
    """Reserve no more than a job needs, on a machine of any size; MemoryError where not even the libraries would fit.

    OpenBLAS, which NumPy loads, takes 40 MiB for every processor, for products that a job leaves to kernels of its own.
    Where NumPy is loaded already the process is not the command's own, and stays as it is.
    """
    if "numpy" not in sys.modules and os.name == "posix":
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        threading.stack_size(STACK_BYTES)
        mmap.mmap(-1, LIBRARIES_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


def memory_was_refused(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came of, is memory that the system did not give; libraries have words of their own.

    >>> memory_was_refused(MemoryError()), memory_was_refused(ImportError("x.so: failed to map segment"))
    (True, True)
    """
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if any(text in str(error).lower() for text in REFUSALS):
            return True
        error = error.__cause__ or error.__context__
    return False


def refusal(error: BaseException) -> str:
    """What to say of memory that the system refused: what was asked for, where that is known, and what to do."""
    said = " ".join(str(error).split()) if isinstance(error, MemoryError) else ""
    return f"{said or 'the system gives no more memory'}. Raise the limit on this process, or lower --memory."
