"""Loading what Numba compiles: from disk where an earlier process has left it there, else with a word to the user.

Imported only where compiled code is called: this module imports Numba.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import event
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

from .buffers import allocate, check_address_space
from .codefiles import CodeFile, home_folder
from .errors import ArgumentError
from .forks import once
from .workers import Pool

logger = logging.getLogger("cqsa_arrays")
settings: Any = numba.config  # from the environment; Numba reads it when it is imported
# What LLVM takes to load a function and to compile one, and the stack for it: where it is refused memory it ends the
# process, so it is not begun without.
LOADING_BYTES, COMPILING_BYTES = 36 << 20, 68 << 20
# The addresses that go with it, of libraries, stacks and what malloc reserves for the threads that follow.
LOADING_ADDRESSES = 256 << 20
COMPILER_STACK_BYTES = 8 << 20


def kept_on_disk(function: Any) -> Any:
    """``function``, one of Numba's, whose machine code is kept on disk where that can be.

    Used instead of ``cache=True``, which raises where no directory can be written or a file of the cache is damaged.
    """
    if hasattr(function, "overloads"):  # else Numba is told to compile nothing, and ``entry_point`` says so
        function._cache = _CodeOnDisk(function.py_func)
    return function


@once
def entry_point(function: Any, signature: Any, what: str) -> Callable[..., Any]:
    """``function``, one of Numba's, for arguments of ``signature``, compiled or loaded; ``what`` it is for the user.

    The compiled function itself, past Numba's dispatcher: that would compile anew for every combination of strides.
    Another thread loads it: llvmlite calls back through ctypes meanwhile, where the exception of a signal, which comes
    to the main thread, would be lost and the job go on. Raises MemoryError where the system refuses what that takes,
    ArgumentError where Numba is told to compile nothing.
    """
    if settings.DISABLE_JIT or not hasattr(function, "overloads"):
        remedy = f"The {what} exists as compiled code only: unset the variable."
        raise ArgumentError("NUMBA_DISABLE_JIT", "1", "0, or no such variable", remedy)
    allocate(LOADING_BYTES, np.uint8)
    check_address_space(LOADING_ADDRESSES)
    with _deep_stacks():
        pool = Pool(1, "load")
        try:
            pool.submit(_load, function, signature, what).result()
        finally:
            pool.close()
    compiled: Callable[..., Any] = function.overloads[signature.args].entry_point
    return compiled


def _load(function: Any, signature: Any, what: str) -> None:
    with event.install_listener("numba:compile", _Compiling(function, what)):
        function.compile(signature)


class _Compiling(event.Listener):
    """Numba says that its cache has no such function: the user is told, and the system is asked for room.

    The room goes back at once.
    """

    def __init__(self, function: Any, what: str) -> None:
        self._function, self._what = function, what

    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"] is self._function:
            allocate(COMPILING_BYTES, np.uint8)
            logger.info("compiling the %s for this processor (once; later runs load it from disk)", self._what)

    def on_end(self, event: Any) -> None:
        """Nothing to do."""


class _CodeOnDisk(NullCache):
    """The machine code of one function, a file for each signature and processor.

    Numba's own cache believes what its files hold, and has one index of all signatures: of two processes that write at
    a time, one may find the code of the other's signature under its own.
    """

    def __init__(self, function: Any) -> None:
        self._function = function

    def load_overload(self, signature: Any, target: Any) -> CompileResult | None:
        """The function for ``signature``, or None."""
        target.refresh()
        code = self._file(signature, target.codegen()).load()
        return None if code is None else CompileResult._rebuild(target, *pickle.loads(code))

    def save_overload(self, signature: Any, compiled: CompileResult) -> None:
        """Keep ``compiled``, if there is a place for it."""
        self._file(signature, compiled.codegen).save(dumps(compiled._reduce()))

    def _file(self, signature: Any, processor: Any) -> CodeFile:
        source = Path(self._function.__code__.co_filename)
        named_by = (str(source), str(signature.args), processor.magic_tuple(), sys.implementation.cache_tag)
        digest = hashlib.sha256(repr(named_by).encode()).hexdigest()
        versions = (sys.version, numba.__version__, llvmlite.__version__, np.__version__, _text_of(source.parent))
        return CodeFile(
            _folders(source.parent), f"{source.stem}.{self._function.__name__}-{digest[:24]}.nbc",
            repr(versions).encode(), "NUMBA_CACHE_DIR",
        )  # fmt: skip


def _text_of(package: Path) -> list[tuple[str, bytes]]:
    """The modules in the folder ``package``: a function is compiled from any of them."""
    return [(file.name, file.read_bytes()) for file in sorted(package.glob("*.py")) if os.access(file, os.R_OK)]


def _folders(package: Path) -> list[Path]:
    """Where Numba, too, keeps what it compiles of functions in the folder ``package``."""
    if settings.CACHE_DIR:
        return [Path(settings.CACHE_DIR, "cqsa_arrays")]
    users = home_folder(os.path.join(AppDirs("numba", False).user_cache_dir, "cqsa_arrays"))
    return [package / "__pycache__", *users]


@contextmanager
def _deep_stacks() -> Iterator[None]:
    """New threads have stacks that a compiler can do with, where the process has asked for smaller ones."""
    before = threading.stack_size()  # 0: the default
    threading.stack_size(before and max(before, COMPILER_STACK_BYTES))
    try:
        yield
    finally:
        threading.stack_size(before)
