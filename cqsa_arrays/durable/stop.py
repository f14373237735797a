"""Asking a run to stop where everything is committed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from ..errors import JobStopped

TIME_IS_OVER = "the time is over"


class Stop:
    """Why a run is to stop at the next safe place: somebody asked, by any thread or signal, or its time is over.

    The time, ``max_time_s`` seconds, counts from ``began`` of ``time.monotonic()``, by default from now on; what came
    before the first part of the work counts, too. A run with any time at all computes that part even so: a job that is
    resumed again and again, with a limit that is too short for its beginning, comes to its end.
    """

    def __init__(self, max_time_s: float | None = None, began: float | None = None) -> None:
        self._reason: str | None = None
        self._deadline = None if max_time_s is None else (time.monotonic() if began is None else began) + max_time_s
        self.worked = max_time_s == 0

    def ask(self, reason: str) -> None:
        """Stop because of ``reason``."""
        self._reason = self._reason or reason

    def reason_within(self, ahead_s: float) -> str | None:
        """Why to stop now, if what comes next takes so many seconds; or None."""
        if self._reason is None and self._deadline is not None and self.worked:
            return TIME_IS_OVER if time.monotonic() + ahead_s >= self._deadline else None
        return self._reason

    def check(self) -> None:
        """Raise JobStopped where somebody has asked; for what is done again by the next run, whatever its time."""
        if self._reason is not None:
            raise JobStopped(self._reason)


@contextmanager
def stopped_by(signals: Mapping[int, str], stop: Stop) -> Iterator[None]:
    """``stop`` is asked by the first of ``signals``, each with its reason; after that they do what they did before.

    Those that are ignored stay so. Only in the main thread, as Python has it.
    """
    before = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.ask(signals[number])
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
