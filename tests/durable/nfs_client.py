"""What a client of a network file system answers to its kernel: names and their caches, and the way to its pages."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

import fuse_wire as wire
from fuse_wire import Request
from nfs_habits import Habits
from nfs_pages import Node, Pages

KILLED = 0x400
"""The flag of a thread in /proc that dies by a signal."""
SILLY = ".nfs"
"""How the names begin of files that were removed by the client that has them open."""


class Client:
    """Each method named as in ``fuse_wire`` answers one kind of request: bytes, None, or an OSError."""

    def __init__(self, server: Path, habits: Habits) -> None:
        root = Node(1, os.open(server, os.O_PATH | os.O_DIRECTORY))
        self._nodes, self._last = {1: root}, 1
        self._numbers = {_identity(os.fstat(root.place)): 1}
        # By directory and name: the node, or None where there was none, and until when that is believed.
        self._names: dict[tuple[int, str], tuple[int | None, float]] = {}
        self._listings: dict[int, list[tuple[str, int, int]]] = {}  # of directories that are being read
        self._pages, self._locks = Pages(habits), habits.locks

    @property
    def habits(self) -> Habits:
        return self._pages.habits

    def take(self, line: str) -> None:
        """Other habits from now on; the random numbers go on."""
        self._pages.habits = Habits.of_line(line)

    def work(self) -> float | None:
        """Send the pages that are due; seconds until there is more to do."""
        due = []
        for node in [node for node in self._nodes.values() if node.written]:
            due.append(self._pages.send_due(node))
            self._tidy(node)
        times = [time_ for time_ in due if time_ is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def end(self) -> None:
        """An orderly unmount sends what is left."""
        for node in list(self._nodes.values()):
            with contextlib.suppress(OSError):
                self._pages.send_all(node)
            self._tidy(node)

    def init(self, request: Request) -> bytes:
        return wire.init_reply(request, self._locks)

    # Names

    def lookup(self, request: Request) -> bytes:
        self._may_fail("lookup")
        (name,) = request.names()
        number, until = self._names.get((request.node, name), (None, 0.0))
        if time.monotonic() < until:
            if number is None:
                raise FileNotFoundError(errno.ENOENT, name)
            if number in self._nodes:
                with contextlib.suppress(OSError):  # stale: ask again
                    return self._entry(self._nodes[number])
        return self._entry(self._ask(self._nodes[request.node], name))

    def _ask(self, directory: Node, name: str) -> Node:
        """The node that has this name on the server."""
        self._pages.on_server(directory)
        key = directory.number, name
        try:
            node = self._node(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory.place))
        except FileNotFoundError:
            self._names[key] = None, self._pages.until()
            raise
        self._names[key] = node.number, self._pages.until()
        return node

    def _node(self, place: int) -> Node:
        """The node of an open descriptor, which it keeps or closes."""
        identity = _identity(os.fstat(place))
        if identity in self._numbers:
            os.close(place)
        else:
            self._last += 1
            self._numbers[identity] = self._last
            self._nodes[self._last] = Node(self._last, place)
        return self._nodes[self._numbers[identity]]

    def _entry(self, node: Node) -> bytes:
        reply = wire.entry_reply(node.number, self._attributes(node))
        node.lookups += 1
        return reply

    def forget(self, request: Request) -> None:
        self._forget(request.node, *request.fields("Q"))

    def batch_forget(self, request: Request) -> None:
        count, _ = request.fields("II")
        numbers = request.fields(f"II{2 * count}Q")[2:]
        for node, lookups in zip(numbers[::2], numbers[1::2], strict=True):
            self._forget(node, lookups)

    def _forget(self, number: int, lookups: int) -> None:
        if number in self._nodes:
            self._nodes[number].lookups -= lookups
            self._tidy(self._nodes[number])

    def _tidy(self, node: Node) -> None:
        """Close what nobody needs any more."""
        if not node.idle:
            return
        if node.data is not None:
            os.close(node.data)
            node.data = None
        for directory, name in node.silly:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)
            os.close(directory)
        node.silly.clear()
        if node.lookups <= 0 and node.number != 1:
            del self._nodes[node.number], self._numbers[_identity(os.fstat(node.place))]
            node.close()

    # Attributes

    def getattr(self, request: Request) -> bytes:
        return wire.attributes_reply(self._attributes(self._nodes[request.node]))

    def _attributes(self, node: Node) -> bytes:
        found, changed = self._pages.attributes(node)
        if changed:  # of a directory: names that were not there may be there now
            self._doubt_negatives(node)
        return wire.attributes(found, node.size)

    def _doubt_negatives(self, directory: Node) -> None:
        directory.listing = None
        for key in [key for key, (found, _) in self._names.items() if key[0] == directory.number and found is None]:
            del self._names[key]

    def setattr(self, request: Request) -> bytes:
        node = self._nodes[request.node]
        fields = request.fields("IIQQQQQQIIIIIIII")
        valid, size, times, parts = fields[0], fields[3], fields[5:7], fields[8:10]
        if valid & wire.SET_SIZE:
            self._pages.truncate(node, size)
        if valid & wire.SET_MODE:
            os.chmod(node.path, fields[11])
        if valid & (wire.SET_OWNER | wire.SET_GROUP):
            os.chown(node.path, *[fields[13 + i] if valid & wire.SET_OWNER << i else -1 for i in (0, 1)])
        if valid & (wire.SET_ATIME | wire.SET_MTIME):
            old = os.fstat(node.place)
            set_, now = (wire.SET_ATIME, wire.SET_MTIME), (wire.ATIME_NOW, wire.MTIME_NOW)
            new = [times[i] * 10**9 + parts[i] if not valid & now[i] else time.time_ns() for i in (0, 1)]
            kept = old.st_atime_ns, old.st_mtime_ns
            os.utime(node.path, ns=tuple(new[i] if valid & set_[i] else kept[i] for i in (0, 1)))
        node.until = 0.0
        return wire.attributes_reply(self._attributes(node))

    def statfs(self, request: Request) -> bytes:
        return wire.statfs_reply(os.fstatvfs(self._nodes[request.node].place))

    def readlink(self, request: Request) -> bytes:
        return os.fsencode(os.readlink("", dir_fd=self._nodes[request.node].place))

    # Changes of names

    def _change(self, operation: str, *keys: tuple[int, str]) -> contextlib.ExitStack:
        """Around a change of these names on the server: what was believed of them is forgotten."""
        self._may_fail(operation)
        stack = contextlib.ExitStack()
        for number in {number for number, _ in keys}:
            self._pages.on_server(self._nodes[number])
            stack.enter_context(self._nodes[number].own_change())
        for key in keys:
            stack.callback(self._names.pop, key, None)
        return stack

    def _reply(self, again: int) -> None:
        """The server has done it; where the reply is lost, the request comes again and gets the error ``again``."""
        draw = self._pages.random.random
        if draw() < self.habits.lost:
            raise OSError(errno.EIO if draw() < self.habits.lost_as_eio else again, "the first reply was lost")

    def mkdir(self, request: Request) -> bytes:
        directory, (name,) = self._nodes[request.node], request.names(8)
        with self._change("mkdir", (request.node, name)):
            os.mkdir(name, request.fields("I")[0], dir_fd=directory.place)
        self._reply(errno.EEXIST)
        return self._entry(self._ask(directory, name))

    def rmdir(self, request: Request) -> None:
        (name,) = request.names()
        with self._change("rmdir", (request.node, name)):
            os.rmdir(name, dir_fd=self._nodes[request.node].place)
        self._reply(errno.ENOENT)

    def symlink(self, request: Request) -> bytes:
        directory, (name, target) = self._nodes[request.node], request.names()
        with self._change("symlink", (request.node, name)):
            os.symlink(target, name, dir_fd=directory.place)
        return self._entry(self._ask(directory, name))

    def link(self, request: Request) -> bytes:
        directory, node = self._nodes[request.node], self._nodes[request.fields("Q")[0]]
        (name,) = request.names(8)
        node.until = 0.0  # the reply has its attributes, also that of an error
        self._pages.on_server(node)
        with self._change("link", (request.node, name)), node.own_change():
            os.link(node.path, name, dst_dir_fd=directory.place)
        self._reply(errno.EEXIST)
        return self._entry(self._ask(directory, name))

    def unlink(self, request: Request) -> None:
        directory, (name,) = self._nodes[request.node], request.names()
        node = self._opened(directory, name)
        if node and name in [hidden for _, hidden in node.silly]:
            raise OSError(errno.EBUSY, name)
        with self._change("unlink", (request.node, name)):
            if node:
                self._hide(directory, name, node)
            else:
                os.unlink(name, dir_fd=directory.place)
        self._reply(errno.ENOENT)

    def _opened(self, directory: Node, name: str) -> Node | None:
        """The node of that name, if it is open here."""
        with contextlib.suppress(FileNotFoundError):
            number = self._numbers.get(_identity(os.stat(name, dir_fd=directory.place, follow_symlinks=False)))
            node = self._nodes[number] if number else None
            return node if node and node.opens else None
        return None

    def _hide(self, directory: Node, name: str, node: Node) -> None:
        """Rename instead of removing: who has the file open here can go on with it."""
        hidden = f"{SILLY}{node.number:016x}{self._pages.random.getrandbits(32):08x}"
        os.rename(name, hidden, src_dir_fd=directory.place, dst_dir_fd=directory.place)
        node.silly.append((os.dup(directory.place), hidden))
        node.until = 0.0

    def rename(self, request: Request) -> None:
        first, second = self._nodes[request.node], self._nodes[request.fields("Q")[0]]
        old, new = request.names(8)
        replaced, moved = self._opened(second, new), self._opened(first, old)
        with self._change("rename", (request.node, old), (second.number, new)):
            if replaced and replaced is not moved and os.stat(old, dir_fd=first.place, follow_symlinks=False):
                self._hide(second, new, replaced)
            os.rename(old, new, src_dir_fd=first.place, dst_dir_fd=second.place)
        self._reply(errno.ENOENT)

    # Directories

    def opendir(self, request: Request) -> bytes:
        self._last += 1
        return wire.open_reply(self._last, 0)

    def readdir(self, request: Request) -> bytes:
        handle, start, room = request.fields("QQI")
        if start == 0 or handle not in self._listings:
            self._listings[handle] = self._list(self._nodes[request.node])
        return wire.directory_reply(self._listings[handle], start, room)

    def _list(self, directory: Node) -> list[tuple[str, int, int]]:
        if directory.listing and time.monotonic() < directory.listing[0]:
            return directory.listing[1]
        new = directory.change is None
        own, changed = self._pages.attributes(directory, fresh=True)
        if new or changed:
            self._doubt_negatives(directory)
        found = [(name, own.st_ino, own.st_mode) for name in (".", "..")]
        place = os.open(directory.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(place) as entries:
                found += [(entry.name, entry.inode(), entry.stat(follow_symlinks=False).st_mode) for entry in entries]
        except FileNotFoundError:  # removed meanwhile
            return self._list(directory)
        finally:
            os.close(place)
        directory.listing = self._pages.until(), found
        return found

    def releasedir(self, request: Request) -> None:
        self._listings.pop(request.fields("Q")[0], None)

    def fsyncdir(self, request: Request) -> None:
        self._pages.on_server(self._nodes[request.node])  # names are on the server at once

    # Files

    def create(self, request: Request) -> bytes:
        directory, (name,) = self._nodes[request.node], request.names(16)
        flags, mode = request.fields("II")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags & (os.O_EXCL | os.O_TRUNC)
        with self._change("create", (request.node, name)):
            data = os.open(name, flags, mode, dir_fd=directory.place)
        try:
            if flags & os.O_EXCL:
                self._reply(errno.EEXIST)
            node = self._node(os.open(f"/proc/self/fd/{data}", os.O_PATH))
            if node.data is None:
                node.data = os.dup(data)
        finally:
            os.close(data)
        self._names[request.node, name] = node.number, self._pages.until()
        return self._entry(node) + self._open(node)

    def open(self, request: Request) -> bytes:
        self._may_fail("open")
        node = self._nodes[request.node]
        try:
            return self._open(node)
        except OSError as error:
            if error.errno == errno.ESTALE:  # the kernel looks the name up again
                self._names = {key: value for key, value in self._names.items() if value[0] != node.number}
            raise

    def _open(self, node: Node) -> bytes:
        self._pages.attributes(node, fresh=True)  # close-to-open
        if node.data is None:
            try:
                node.data = os.open(node.path, os.O_RDWR)
            except PermissionError:
                node.data = os.open(node.path, os.O_RDONLY)
        node.opens += 1
        return wire.open_reply(0, wire.DIRECT_IO)

    def read(self, request: Request) -> bytes:
        self._may_fail("read")
        _, position, size = request.fields("QQI")
        return self._pages.read(self._nodes[request.node], position, size)

    def write(self, request: Request) -> bytes:
        self._may_fail("write")
        _, position, size = request.fields("QQI")
        self._pages.write(self._nodes[request.node], position, request.body[40 : 40 + size])
        return size.to_bytes(8, "little")

    def fsync(self, request: Request) -> None:
        self._send(self._nodes[request.node], "fsync")

    def flush(self, request: Request) -> None:
        node = self._nodes[request.node]
        if self.habits.late_after_kill_s and node.written and _killed(request.pid):
            self._pages.delay(node, self.habits.late_after_kill_s)
        else:
            self._send(node, "close")

    def _send(self, node: Node, operation: str) -> None:
        try:
            if node.written:
                self._may_fail(operation)
        except OSError:
            self._pages.drop_written(node)
            raise
        self._pages.send_all(node)

    def release(self, request: Request) -> None:
        node = self._nodes[request.node]
        node.opens -= 1
        self._tidy(node)

    def lock(self, request: Request) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    def fallocate(self, request: Request) -> None:
        raise OSError(errno.EOPNOTSUPP, "the server cannot")

    def _may_fail(self, operation: str) -> None:
        for name, error, share in self.habits.failures:
            if name == operation and self._pages.random.random() < share:
                raise OSError(getattr(errno, error), "injected")


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _killed(thread: int) -> bool:
    """Whether this thread dies by a signal, so that its close waits for nothing."""
    try:
        state = Path(f"/proc/{thread}/stat").read_text()
    except OSError:
        return True
    return bool(int(state.rpartition(")")[2].split()[6]) & KILLED)
