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


class Pool:
    """At most ``threads`` threads, which also work when the interpreter ends.

    When the main thread has ended, an executor takes nothing any more; but other threads go on, and exit handlers are
    called. A thread of its own then does each piece of work, or, where Python begins no threads either, the caller.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"cqsa-{name}")
        self._name, self._closed = f"cqsa-{name}", False

    def submit(self, work: Callable[..., T], *arguments: Any, by_caller: bool = True) -> Future[T]:
        """Have ``work(*arguments)`` done by one of the threads.

        ``by_caller``: rather by the caller than not at all. Raises RuntimeError where nobody can, or after ``close``.
        """
        try:
            return self._executor.submit(work, *arguments)
        except RuntimeError as error:
            if self._closed or not str(error).startswith("cannot schedule new futures"):
                raise
        return _work_apart(self._name, by_caller, work, *arguments)

    def close(self, *, cancel: bool = False) -> None:
        """Stop the threads; with ``cancel``, what none has begun is never done."""
        self._closed = True
        self._executor.shutdown(cancel_futures=cancel)


def _work_apart(name: str, by_caller: bool, work: Callable[..., T], *arguments: Any) -> Future[T]:
    """As ``Pool.submit``, without an executor."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # noqa: BLE001 - it is for whoever asks for the result
            future.set_exception(error)

    try:
        threading.Thread(target=run, name=name).start()
    except RuntimeError:
        if not by_caller:
            raise
        run()
    return future


class Workers:
    """``threads`` threads that take items one by one, in order; several instances may work at the same time."""

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._pool = Pool(threads, name)

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
        """Have ``work(*arguments)`` done by one of the threads, beside the caller."""
        return self._pool.submit(work, *arguments, by_caller=False)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.close()


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
