"""A process does not fork while one of its threads loads what a call of this package needs.

Python, Numba and LLVM do not mend that: in the child a module stays half imported, a lock locked, and whoever needs it
waits for ever for a thread that is not there. Locks of h5py and of the standard library are looked after there.
"""

from __future__ import annotations

# Both see to their locks when the process forks, and must do so after us: they hold them while they wait for others.
# What is registered last is called first.
import concurrent.futures.thread  # noqa: F401
import logging  # noqa: F401
import os
import threading
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

Answer = TypeVar("Answer")
# Held while anything is loaded, and by a thread that forks.
_LOADING = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOADING.acquire, after_in_parent=_LOADING.release, after_in_child=_LOADING.release)


def once(load: Callable[..., Answer]) -> Callable[..., Answer]:
    """``load``, called once for the same arguments, one call at a time; later calls take no lock."""
    loaded: dict[tuple[Any, ...], Answer] = {}

    @wraps(load)
    def load_once(*arguments: Any) -> Answer:
        if arguments not in loaded:
            with _LOADING:
                if arguments not in loaded:
                    loaded[arguments] = load(*arguments)
        return loaded[arguments]

    return load_once


preload = once(import_module)
"""The module of that name; where it is imported later than this package, an import statement comes after this."""
