"""Progress of a run, counted in visible (query, key) pairs."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from typing import Any, Protocol

from ..forks import preload
from ..units import format_seconds

LINE_S = 60.0
"""Between two lines of a job whose progress goes to no terminal."""


class Progress(Protocol):
    """Told of work done, from several threads."""

    def advance(self, pairs: int) -> None:
        """``pairs`` more visible (query, key) pairs are done."""

    def close(self) -> None:
        """The run is over, or has failed."""


class Silent:
    """Says nothing."""

    def advance(self, pairs: int) -> None:
        pass

    def close(self) -> None:
        pass


def in_notebook() -> bool:
    """Whether IPython runs this for a notebook or a console that shows what is written, though it is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = getattr(ipython, "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


@lru_cache(maxsize=1)
def _bar_class() -> Any:
    """tqdm with a lock of its own, which is new in every process: another thread may hold it when this one forks."""
    preload("tqdm")
    from tqdm import tqdm

    class Bar(tqdm):
        """``tqdm``."""

    def renew_lock() -> None:
        Bar.set_lock(threading.RLock())

    renew_lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew_lock)
    return Bar


class ProgressBar:
    """A bar on standard error with rate and time left; where that is no terminal and no notebook, a line now and then.

    In a notebook it is the same line of text: widgets would need a package more, and are not for worker threads.
    """

    def __init__(self, pairs: int, flops: int, done_pairs: int = 0) -> None:
        self._lock = threading.Lock()
        self._flops_per_pair = flops / max(1, pairs)
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt}FLOP [{elapsed}<{remaining}, {rate_fmt}]"
        self._bar = _bar_class()(
            total=flops, initial=int(done_pairs * self._flops_per_pair), desc="attend", unit="FLOP", unit_scale=True,
            # tqdm asks standard error whether it is a terminal, which it cannot where there is none, as in daemons.
            disable=True if sys.stderr is None else False if in_notebook() else None, bar_format=form, smoothing=0.1,
        )  # fmt: skip
        self._lines = ProgressLines("attend", flops, done_pairs * self._flops_per_pair, "FLOP/s")

    def advance(self, pairs: int) -> None:
        with self._lock:
            self._bar.update(pairs * self._flops_per_pair)
            if self._bar.disable:
                self._lines.advance(pairs * self._flops_per_pair)

    def close(self) -> None:
        self._bar.close()


class ProgressLines:
    """For logs: a line on standard error at most every ``LINE_S`` seconds, with the share done, rate and time left.

    Amounts are of the unit whose rate is called ``rate_unit``, of which ``done`` are done before this run.
    """

    def __init__(self, what: str, total: float, done: float, rate_unit: str) -> None:
        self._what, self._rate_unit = what, rate_unit
        self._total, self._done, self._before = max(1.0, total), done, done
        self._begun = self._last = time.monotonic()

    def advance(self, amount: float) -> None:
        """``amount`` more is done."""
        self._done += amount
        now = time.monotonic()
        if now - self._last >= LINE_S:
            self._last = now
            if sys.stderr is not None:
                with suppress(OSError):  # a job does not end because nobody reads of its progress
                    print(self._line(now - self._begun), file=sys.stderr, flush=True)

    def _line(self, elapsed_s: float) -> str:
        rate = (self._done - self._before) / elapsed_s
        left = f", {format_seconds(max(0.0, self._total - self._done) / rate)} left" if rate > 0 else ""
        return f"{self._what}: {self._done / self._total:.1%} done, {rate / 1e9:.3g} G{self._rate_unit}{left}"
