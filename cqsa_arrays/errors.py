"""The errors that this package raises on purpose; anything else that escapes is a bug of ours."""

from __future__ import annotations

from typing import Any

from .wording import Choice, Phrase

# What to do with a job that cannot go on.
START_OVER = Phrase.of("Start the job over with ", Choice("restart", True, rare=True), ".")


class CqsaError(Exception):
    """Base of every error that this package raises on purpose.

    ``str(error)`` is the message of ``phrase`` as Python writes it, on one line; what a terminal would not print, or
    obey, in the names in it is shown as an escape. The command line spells the phrase with its options. Errors travel
    between processes: pickle makes one again from its phrases.
    """

    def __init__(self, *parts: object) -> None:
        self.phrase = Phrase.of(*parts)
        super().__init__(str(self.phrase))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.phrase.parts, self.__dict__

    def __str__(self) -> str:
        return one_line(str(self.phrase))


class ArgumentError(CqsaError, ValueError):
    """An argument that cannot be used: names it, what was found, what was expected and what to do.

    >>> str(ArgumentError("threads", 0, "at least 1", "Leave it out."))
    'threads: found 0; expected at least 1. Leave it out.'
    """

    def __init__(self, argument: str, found: object, expected: str | Phrase, remedy: str | Phrase) -> None:
        # As text: what was found may be anything, also what cannot be pickled.
        self._said = tuple(map(Phrase.of, (found, expected, remedy)))
        self.argument = argument
        self.found, self.expected, self.remedy = map(str, self._said)
        super().__init__(Choice(argument), ": found ", found, "; expected ", expected, ". ", remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, *self._said), self.__dict__


class MissingArrayError(ArgumentError, AttributeError):
    """An array that an opened file does not have."""


class BudgetError(CqsaError, MemoryError):
    """A memory budget that is too small for the smallest piece of the work."""


class DeviceError(CqsaError, RuntimeError):
    """A GPU that is not there, fails or stops answering."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A GPU that has less memory free than a plan was made for: ``free_bytes`` of it were left."""

    def __init__(self, message: str | Phrase, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.phrase, self.free_bytes), self.__dict__


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
