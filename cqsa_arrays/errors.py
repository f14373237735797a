"""The errors that this package raises on purpose; anything else that escapes is a bug of ours."""

from __future__ import annotations

# What to do with a job that cannot go on.
START_OVER = "Start the job over with --restart (Options(restart=True))."


class CqsaError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(CqsaError, ValueError):
    """An argument that cannot be used: names it, what was found, what was expected and what to do."""

    def __init__(self, argument: str, found: object, expected: str, remedy: str) -> None:
        self.argument, self.found, self.expected, self.remedy = argument, found, expected, remedy
        super().__init__(f"{argument}: found {found}; expected {expected}. {remedy}")


class BudgetError(CqsaError, MemoryError):
    """A memory budget that is too small for the smallest piece of the work."""


class DeviceError(CqsaError, RuntimeError):
    """A GPU that is not there, fails or stops answering."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A GPU that has less memory free than a plan was made for: ``free_bytes`` of it were left."""

    def __init__(self, message: str, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        super().__init__(message)


class StorageError(CqsaError, OSError):
    """A file, data set or disk that cannot be read or written as asked."""


class JobStopped(CqsaError):
    """A job that was asked to stop: everything done is committed, and another run goes on from there."""


class JobBusyError(CqsaError):
    """A job of which other processes compute all that is left."""


def one_line(text: str) -> str:
    r"""``text`` for a terminal: on one line, and what would not be printed (or do more than that) as an escape.

    >>> one_line("a\n b\x1b[2J")
    'a b\\x1b[2J'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
