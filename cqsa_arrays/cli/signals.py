"""Signals that end a job where everything is committed; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..durable import Stop
from .reasons import INTERRUPTED_BY, TERMINATED_BY

_REASONS = {signal.SIGINT: INTERRUPTED_BY, signal.SIGTERM: TERMINATED_BY, signal.SIGHUP: TERMINATED_BY}


@contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[Stop]:
    """``stop`` is asked by the first of SIGINT, SIGTERM and SIGHUP; after that they do what they did before."""
    before = {number: signal.getsignal(number) for number in _REASONS}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.ask(_REASONS[signal.Signals(number)])
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
