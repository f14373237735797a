"""Streams that launches take in turn, so that the first blocks of one run beside the last blocks of the one before."""

from __future__ import annotations

from itertools import cycle

import cupy

from ...ranges import Range


class Lanes:
    """``count`` streams beside ``compute``; with one, ``compute`` itself.

    Launches on different lanes may run at the same time and in any order, except that those on the same query rows
    follow each other: a row's state is continued in the order of the plan, whatever runs beside it.
    """

    def __init__(self, compute: cupy.cuda.Stream, count: int) -> None:
        self._compute = compute
        self._streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(count)] if count > 1 else []
        self._turn = cycle(self._streams or [compute])
        self._last: dict[Range, cupy.cuda.Event] = {}

    def take(self, rows: Range) -> cupy.cuda.Stream:
        """The stream of the next launch, which continues ``rows``."""
        stream = next(self._turn)
        if rows in self._last:
            stream.wait_event(self._last[rows])
        return stream

    def launched(self, rows: Range, stream: cupy.cuda.Stream) -> None:
        """The launch on ``rows`` is on ``stream``."""
        if self._streams:
            self._last[rows] = stream.record()

    def fork(self) -> None:
        """Launches from now on come after what is on ``compute``."""
        self._last.clear()
        event = self._compute.record()
        for stream in self._streams:
            stream.wait_event(event)

    def join(self) -> None:
        """What is put on ``compute`` from now on comes after all launches."""
        for stream in self._streams:
            self._compute.wait_event(stream.record())
