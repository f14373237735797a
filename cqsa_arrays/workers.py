"""Threads for work that releases the GIL."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
# What glibc reserves for the stack of a thread unless it is told otherwise (ulimit -s).
DEFAULT_STACK_BYTES = 8 << 20


def stack_bytes() -> int:
    """What the stack of a new thread reserves."""
    found = threading.stack_size()  # which also goes back to the default
    threading.stack_size(found)
    return found or DEFAULT_STACK_BYTES


@dataclass(slots=True)
class Batch:
    """Items that threads are taking; ``left`` of them are not done, and ``then`` is called when none is."""

    waiting: deque[Any]
    then: Callable[[], None]
    left: int
    futures: list[Future[None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_all(self, work: Callable[[Any], None]) -> None:
        """Take items until there are no more; for each of the threads."""
        while self.waiting:
            try:
                item = self.waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                work(item)
                with self._lock:
                    self.left -= 1
                    last = self.left == 0
                if last:
                    self.then()
            except BaseException:
                self.waiting.clear()
                raise

    @property
    def over(self) -> bool:
        """Whether no thread works on it any more."""
        return all(future.done() for future in self.futures)

    def drop(self) -> None:
        """No further item is begun; return when those that are begun are done, and whatever came of them."""
        self.waiting.clear()
        try:
            wait(self.futures)
        finally:  # an interruption ends no thread
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

    def start(self, items: Iterable[T], work: Callable[[T], None], then: Callable[[], None] = lambda: None) -> Batch:
        """Have ``work(item)`` done for every item, after those of earlier calls; then a thread calls ``then()``."""
        waiting = deque(items)
        batch = Batch(waiting, then, len(waiting))
        try:
            for _ in range(min(self._threads, len(waiting))):
                batch.futures.append(self._pool.submit(batch.take_all, work))
        except BaseException:  # an interruption, too: nothing goes on behind it
            batch.drop()
            raise
        return batch

    def submit(self, work: Callable[..., None], *arguments: Any) -> Future[None]:
        """Have ``work(*arguments)`` done by one of the threads."""
        return self._pool.submit(work, *arguments)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


# Threads that wait for the next to use them, by number and name: to begin one and to end it takes as long as to read
# four megabytes, half a millisecond.
_KEPT: dict[tuple[int, str], Workers] = {}
os.register_at_fork(after_in_child=_KEPT.clear)


@contextmanager
def kept_workers(threads: int, name: str) -> Iterator[Workers]:
    """Workers that are kept afterwards, where no error comes of it: then nothing is under way.

    After an error, or an interruption anywhere, they end first, with whatever somebody has left under way.
    """
    workers = _KEPT.pop((threads, name), None) or Workers(threads, name)
    try:
        yield workers
    except BaseException:
        workers.close()
        raise
    if _KEPT.setdefault((threads, name), workers) is not workers:  # several runs at a time
        workers.close()
