"""Streams and events of a simulated GPU: work is carried out late, in any order that they allow."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import ClassVar
from weakref import WeakValueDictionary

TOTAL_BYTES = 1 << 30


class CudaError(RuntimeError):
    status = 719


class Simulator:
    """All streams of the device. ``run_until`` carries out work, one piece after the other, in a random order."""

    def __init__(self, seed: int) -> None:
        self.random, self.lock = random.Random(seed), threading.RLock()
        self.streams: list[Stream] = []
        self.current = threading.local()
        self.used_bytes = self.peak_bytes = 0
        self.locked: list[tuple[int, int]] = []
        self.fail_at: int | None = None
        self.launches = self.copies_2d = 0

    def run_until(self, done: Callable[[], bool]) -> None:
        with self.lock:
            while not done():
                ready = [stream for stream in self.streams if stream.ready()]
                assert ready, "every stream waits: a deadlock"
                self.pick(ready).step()

    def now_and_then(self) -> None:
        """The device works beside the host, too."""
        with self.lock:
            for _ in range(self.random.randrange(3)):
                ready = [stream for stream in self.streams if stream.ready()]
                if ready:
                    self.pick(ready).step()

    def pick(self, ready: list[Stream]) -> Stream:
        """Mostly the stream of the highest rank, so that those of low ranks are starved."""
        return max(ready, key=lambda stream: stream.rank) if self.random.random() < 0.7 else self.random.choice(ready)

    def take(self, size_bytes: int) -> None:
        if self.used_bytes + size_bytes > TOTAL_BYTES:
            error = CudaError("out of memory")
            error.status = 2
            raise error
        self.used_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)


_NOW = [Simulator(0)]


def simulator() -> Simulator:
    """The one that is at work."""
    return _NOW[-1]


class Event:
    everyone: ClassVar[WeakValueDictionary[int, Event]] = WeakValueDictionary()
    numbers: ClassVar[count[int]] = count(1)

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        on_device = getattr(simulator().current, "devices", 0) or threading.current_thread() is threading.main_thread()
        assert on_device, "made on whatever device this thread has"
        self.recorded = self.reached = 0
        self.ptr = next(self.numbers)
        self.everyone[self.ptr] = self

    def record(self, stream: Stream | None = None) -> None:
        with simulator().lock:
            self.recorded += 1
            number = self.recorded
            (stream or get_current_stream()).put(lambda: self._reach(number))

    def _reach(self, number: int) -> None:
        self.reached = max(self.reached, number)

    @property
    def done(self) -> bool:
        simulator().now_and_then()
        return self.reached >= self.recorded

    def synchronize(self) -> None:
        number = self.recorded
        simulator().run_until(lambda: self.reached >= number)


class Stream:
    def __init__(self, non_blocking: bool = False, priority: int = 0) -> None:
        self._work: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        with simulator().lock:
            simulator().streams.append(self)
            self.rank = simulator().random.random()
            self.ptr = len(simulator().streams)

    def put(self, work: Callable[[], None], may_run: Callable[[], bool] = lambda: True) -> None:
        with simulator().lock:
            self._work.append((may_run, work))
        simulator().now_and_then()

    def ready(self) -> bool:
        return bool(self._work) and self._work[0][0]()

    def step(self) -> None:
        self._work.popleft()[1]()

    def record(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        number = event.recorded
        self.put(lambda: None, lambda: event.reached >= number)

    def synchronize(self) -> None:
        mark = self.record()
        mark.synchronize()

    def __enter__(self) -> Stream:
        stack = simulator().current.__dict__.setdefault("stack", [])
        stack.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        simulator().current.stack.pop()


def get_current_stream() -> Stream:
    stack = simulator().current.__dict__.setdefault("stack", [])
    return stack[-1] if stack else simulator().streams[0]


def stream_of(ptr: int) -> Stream:
    return simulator().streams[ptr - 1]


class Device:
    def __init__(self, index: int = 0) -> None:
        self.id, self.compute_capability = index, "90"

    def __enter__(self) -> Device:
        simulator().current.devices = getattr(simulator().current, "devices", 0) + 1
        return self

    def __exit__(self, *error: object) -> None:
        simulator().current.devices -= 1

    def use(self) -> None:
        simulator().current.context = True

    def synchronize(self) -> None:
        simulator().run_until(lambda: not any(stream._work for stream in simulator().streams))


def begin(seed: int) -> None:
    """Another simulator from now on, with its default stream."""
    _NOW[0] = Simulator(seed)
    Stream()
