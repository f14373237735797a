"""Loading what Numba compiles: from its cache on disk, with a word to the user where that has to be filled first.

Imported only where compiled code is called: this module imports Numba.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba.core import event

from .buffers import allocate

logger = logging.getLogger("cqsa_arrays")
# A function loads from the cache on disk well within this; only a compilation takes longer.
_PATIENCE_S = 0.7
# What LLVM takes to load a function and to compile one, and the stack for it: where it is refused memory it ends the
# process, so it is not begun without.
LOADING_BYTES, COMPILING_BYTES = 36 << 20, 68 << 20
COMPILER_STACK_BYTES = 8 << 20
# One at a time: the size of new stacks is that of the process.
_LOADING = threading.Lock()


def entry_point(function: Any, signature: Any, what: str) -> Callable[..., Any]:
    """``function``, one of Numba's, for arguments of ``signature``, compiled or loaded; ``what`` it is for the user.

    The compiled function itself, past Numba's dispatcher: that would compile anew for every combination of strides.
    Another thread loads it: llvmlite calls back through ctypes meanwhile, where the exception of a signal, which comes
    to the main thread, would be lost and the job go on. Raises MemoryError where the system refuses what that takes.
    """
    with _LOADING:
        if signature.args not in function.overloads:
            _load(function, signature, what)
    compiled: Callable[..., Any] = function.overloads[signature.args].entry_point
    return compiled


def _load(function: Any, signature: Any, what: str) -> None:
    allocate(LOADING_BYTES, np.uint8)
    text = "compiling the %s for this processor (once; later runs load it from disk)"
    note = threading.Timer(_PATIENCE_S, logger.info, [text, what])
    note.daemon = True
    note.start()
    try:
        with _deep_stacks(), ThreadPoolExecutor(1, thread_name_prefix="cqsa-load") as pool:
            pool.submit(_compile, function, signature).result()
    finally:
        note.cancel()


def _compile(function: Any, signature: Any) -> None:
    with event.install_listener("numba:compile", _RoomToCompile(function)):
        function.compile(signature)


class _RoomToCompile(event.Listener):
    """Numba says that its cache on disk has no such function: the system is asked for room, which goes back at once."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"] is self._function:
            allocate(COMPILING_BYTES, np.uint8)

    def on_end(self, event: Any) -> None:
        """Nothing to do."""


@contextmanager
def _deep_stacks() -> Iterator[None]:
    """New threads have stacks that a compiler can do with, where the process has asked for smaller ones."""
    before = threading.stack_size()  # 0: the default
    threading.stack_size(before and max(before, COMPILER_STACK_BYTES))
    try:
        yield
    finally:
        threading.stack_size(before)
