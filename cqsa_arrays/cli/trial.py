"""A look at input files in a child process first: HDF5 itself crashes on some damaged ones, or never comes back.

Neither can be caught in the process that it happens to; not even Ctrl-C ends a loop inside HDF5. Only the command does
this: a library must not fork its caller.
"""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator

from ..errors import StorageError
from .parser import input_references

CPU_SECONDS = 60
"""Of computing, not of waiting for a disk: for the structure of 100,000 data sets it takes a quarter of that."""

# What the child may do to itself; other signals are not its fault.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGXCPU)


def try_inputs(arguments: Namespace) -> None:
    """Raise StorageError, naming the file, where looking at an input of the command would end or stop this process."""
    if hasattr(os, "fork"):
        for place, look in _looks(arguments):
            survive(place, look)


def _looks(arguments: Namespace) -> Iterator[tuple[str, Callable[[], object]]]:
    """What the command does first with each of its input files."""
    from ..storage import dataset, describe
    from ..verification import opened_inputs

    named = {name: getattr(arguments, name, None) for name in "qkv"}

    def look_at(reference: str) -> tuple[str, Callable[[], object]]:
        follow_links = getattr(arguments, "follow_links", False)
        return reference, lambda: dataset(reference, locking=arguments.locking, follow_links=follow_links)

    if arguments.command == "info":
        yield arguments.path, lambda: describe(arguments.path, locking=arguments.locking)
    elif arguments.command == "verify":
        yield arguments.path, lambda: opened_inputs(arguments.path, arguments.locking, named, "structure")
    elif arguments.command == "resume":
        yield from (look_at(one) for one in named.values() if one is not None)
    elif arguments.command == "compare" and arguments.device is not None:
        yield arguments.result, lambda: opened_inputs(arguments.result, arguments.locking, depth="structure")
    elif arguments.command == "compare":
        yield from (look_at(one) for one in (arguments.result, arguments.reference) if one is not None)
    elif arguments.command in ("attend", "plan"):
        yield from map(look_at, input_references(arguments).values())


def survive(place: str, look: Callable[[], object]) -> None:
    """Call ``look`` in a child process; StorageError, naming ``place``, where the child does not survive that.

    What ``look`` returns or raises is of no interest here: the caller will meet it again.
    """
    import h5py  # noqa: F401 - once, not in every child

    child = os.fork()
    if child == 0:
        try:
            _be_mortal()
            look()
        finally:
            os._exit(0)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:  # interrupted
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    code = os.waitstatus_to_exitcode(status)
    if -code in CRASHES:
        what = "does not come back from" if -code == signal.SIGXCPU else f"crashes ({signal.Signals(-code).name}) on"
        raise StorageError(f"{place} is damaged: HDF5 {what} reading its structure. Copy or write it again.")


def _be_mortal() -> None:
    """Let signals end this process at once, say nothing, and end it after CPU_SECONDS."""
    import faulthandler
    import resource

    faulthandler.disable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
