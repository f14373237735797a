"""Asking a run to stop where everything is committed."""

from __future__ import annotations

import time


class Stop:
    """Why a run is to stop at the next safe place: somebody asked, by any thread or signal, or its time is over."""

    def __init__(self, max_time_s: float | None = None) -> None:
        self._reason: str | None = None
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s

    def ask(self, reason: str) -> None:
        """Stop because of ``reason``."""
        self._reason = self._reason or reason

    @property
    def asked(self) -> bool:
        """Whether somebody did; time does not count."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time is over"
        return self._reason
