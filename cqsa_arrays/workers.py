"""Threads for work that releases the GIL."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
# What glibc reserves for the stack of a thread unless it is told otherwise (ulimit -s).
DEFAULT_STACK_BYTES = 8 << 20


def stack_bytes() -> int:
    """What the stack of a new thread reserves."""
    found = threading.stack_size()  # which also goes back to the default
    threading.stack_size(found)
    return found or DEFAULT_STACK_BYTES


@dataclass(frozen=True, slots=True)
class Batch:
    """Items that threads are taking."""

    waiting: deque[Any]
    futures: list[Future[None]]

    def drop(self) -> None:
        """No further item is begun; return when those that are begun are done, and whatever came of them."""
        self.waiting.clear()
        wait(self.futures)

    def wait(self) -> None:
        """Return when all are done.

        After an error or an interruption no further item is begun; the error is raised once all threads have stopped.
        """
        try:
            wait(self.futures)
        finally:
            self.waiting.clear()
            wait(self.futures)
        for future in self.futures:
            future.result()


class Workers:
    """``threads`` threads that take items one by one, in order; several instances may work at the same time."""

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"cqsa-{name}")

    def run(self, items: Iterable[T], work: Callable[[T], None]) -> None:
        """``work(item)`` for every item; returns when all are done, and fails, as ``Batch.wait`` does."""
        self.start(items, work).wait()

    def start(self, items: Iterable[T], work: Callable[[T], None]) -> Batch:
        """Have ``work(item)`` done for every item."""
        waiting = deque(items)

        def take_items() -> None:
            while waiting:
                try:
                    item = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                try:
                    work(item)
                except BaseException:
                    waiting.clear()
                    raise

        batch = Batch(waiting, [])
        try:
            for _ in range(min(self._threads, len(waiting))):
                batch.futures.append(self._pool.submit(take_items))
        except BaseException:  # an interruption, too: nothing goes on behind it
            waiting.clear()
            wait(batch.futures)
            raise
        return batch

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()
