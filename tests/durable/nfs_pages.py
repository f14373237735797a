"""A file as one client of a network file system knows it: attributes of some time ago, pages of some time ago."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from nfs_habits import Habits

PAGE = 4096


@dataclass(slots=True)
class Written:
    """What of a page has to reach the server, and when it does by itself."""

    start: int
    stop: int
    due: float


class Node:
    """A file or directory of the server. ``place`` is an open descriptor, so that no number is used again."""

    def __init__(self, number: int, place: int) -> None:
        self.number, self.place, self.lookups, self.opens = number, place, 0, 0
        self.data: int | None = None  # descriptor to read and write by, while the file is open or written pages wait
        self.known: os.stat_result | None = None
        self.until, self.change, self.size = 0.0, None, 0
        self.pages: dict[int, bytearray] = {}
        self.written: dict[int, Written] = {}
        self.listing: tuple[float, list[tuple[str, int, int]]] | None = None
        self.silly: list[tuple[int, str]] = []  # open directories and names, of what was removed while it was open
        self.error: int | None = None  # of a page that went to the server by itself: the next fsync or close says it

    @property
    def path(self) -> str:
        """For calls that take no descriptor."""
        return f"/proc/self/fd/{self.place}"

    @property
    def idle(self) -> bool:
        return not self.opens and not self.written

    def close(self) -> None:
        for descriptor in (self.data, self.place):
            if descriptor is not None:
                os.close(descriptor)
        self.data = None

    @contextlib.contextmanager
    def own_change(self) -> Iterator[None]:
        """Around a change on the server by this client: its caches stay valid, if nobody else changed it before."""
        before = _change(os.fstat(self.place))
        yield
        if before == self.change:
            self.change = _change(os.fstat(self.place))
        self.until, self.listing = 0.0, None


def _change(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size


class Pages:
    """Attributes and contents of nodes by the habits of a client. The server itself is trusted to lose nothing."""

    def __init__(self, habits: Habits) -> None:
        self.habits, self.random = habits, random.Random(habits.seed)

    def until(self) -> float:
        """When to ask the server again for what it says now."""
        return time.monotonic() + self.random.uniform(*self.habits.known_s)

    def attributes(self, node: Node, fresh: bool = False) -> tuple[os.stat_result, bool]:
        """What this client believes of a file, and whether it has just heard that someone else changed it."""
        if node.known is not None and not fresh and time.monotonic() < node.until:
            return node.known, False
        found = self.on_server(node)
        changed = node.change is not None and node.change != _change(found)
        if changed or not self.habits.cached:
            node.pages = {number: page for number, page in node.pages.items() if number in node.written}
        node.size = max(found.st_size, node.size) if node.written else found.st_size
        node.known, node.change, node.until = found, _change(found), self.until()
        return found, changed

    def on_server(self, node: Node) -> os.stat_result:
        """What the server says now."""
        found = os.fstat(node.place)
        if found.st_nlink == 0 and self.habits.stale:
            node.until = 0.0  # the kernel asks for the name again
            raise OSError(errno.ESTALE, "removed by another client")
        return found

    def read(self, node: Node, position: int, size: int) -> bytes:
        self.attributes(node)
        stop, found = min(position + size, node.size), bytearray()
        while position < stop:
            number, start = divmod(position, PAGE)
            piece = self._page(node, number)[start : min(PAGE, start + stop - position)]
            found += piece
            position += len(piece)
        return bytes(found)

    def write(self, node: Node, position: int, data: bytes) -> None:
        stop = position + len(data)
        for number in range(position // PAGE, -(-stop // PAGE)):
            first = number * PAGE
            start, end = max(position - first, 0), min(stop - first, PAGE)
            self._write_page(node, number, start, data[first + start - position : first + end - position])
            node.size = max(node.size, first + end)
            if self.habits.write_back_s is None:
                self.send(node, number)

    def _write_page(self, node: Node, number: int, start: int, data: bytes) -> None:
        stop = start + len(data)
        waiting = node.written.get(number)
        if waiting and (stop < waiting.start or start > waiting.stop):
            self.send(node, number)  # the bytes between the two are not this client's
            waiting = None
        page = node.pages.setdefault(number, bytearray(PAGE)) if len(data) == PAGE else self._page(node, number)
        page[start:stop] = data
        if waiting:
            waiting.start, waiting.stop = min(start, waiting.start), max(stop, waiting.stop)
        else:
            due = time.monotonic() + self.random.uniform(*(self.habits.write_back_s or (0.0, 0.0)))
            node.written[number] = Written(0, PAGE, due) if self.habits.whole_pages else Written(start, stop, due)

    def send(self, node: Node, number: int) -> None:
        """One written page to the server."""
        waiting = node.written.pop(number)
        self.on_server(node)
        start = number * PAGE + waiting.start
        stop = min(number * PAGE + waiting.stop, node.size)
        with node.own_change():
            os.pwrite(node.data, node.pages[number][waiting.start : stop - number * PAGE], start)

    def send_all(self, node: Node) -> None:
        """All written pages to the server. After an error the rest is dropped, as such a client does."""
        try:
            if node.error is not None:
                raise OSError(node.error, "said late")
            for number in sorted(node.written):
                self.send(node, number)
        except OSError:
            self.drop_written(node)
            raise

    def drop_written(self, node: Node) -> None:
        for number in node.written:
            del node.pages[number]
        node.written.clear()
        node.until, node.error = 0.0, None

    def send_due(self, node: Node) -> float | None:
        """The pages whose time has come; when it is for the next."""
        now = time.monotonic()
        for number in [number for number, waiting in node.written.items() if waiting.due <= now]:
            try:
                self.send(node, number)
            except OSError as error:
                node.error = error.errno
                del node.pages[number]
        return min((waiting.due for waiting in node.written.values()), default=None)

    def delay(self, node: Node, span: tuple[float, float]) -> None:
        """Written pages shall reach the server at other times, from now on."""
        for waiting in node.written.values():
            waiting.due = time.monotonic() + self.random.uniform(*span)

    def truncate(self, node: Node, size: int) -> None:
        self.send_all(node)
        self.on_server(node)
        with node.own_change():
            os.truncate(node.path, size)
        node.pages = {number: page for number, page in node.pages.items() if (number + 1) * PAGE <= size}
        node.size = size

    def _page(self, node: Node, number: int) -> bytearray:
        """The cached page, or what the server has now."""
        if number not in node.pages or not (self.habits.cached or number in node.written):
            self.on_server(node)
            found = os.pread(node.data, PAGE, number * PAGE)
            node.pages[number] = bytearray(found.ljust(PAGE, b"\0"))
        return node.pages[number]
