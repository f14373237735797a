"""The kernel's own protocol of FUSE, in plain Python: how to mount, and a loop that answers what the kernel asks.

There is no libfuse in between, since its interface by paths cannot tell ``stat`` of a name from ``fstat`` of an open
file that another client has replaced; a client of NFS does. Nothing needs to be installed, where root mounts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 1 << 20
"""Of one read or write."""
DIRECT_IO = 1
"""What ``open`` answers, so that the kernel keeps no pages of the file."""
SET_MODE, SET_OWNER, SET_GROUP, SET_SIZE, SET_ATIME, SET_MTIME, ATIME_NOW, MTIME_NOW = 1, 2, 4, 8, 16, 32, 128, 256

_HEADER, _REPLY = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
_ATTRIBUTES, _VALID = struct.Struct("<6Q10I"), struct.Struct("<QII")
_ENTRY, _DIRENT = struct.Struct("<4Q2I"), struct.Struct("<QQII")
_ASYNC_READ, _POSIX_LOCKS, _BIG_WRITES, _FLOCK_LOCKS = 1, 2, 1 << 5, 1 << 10
_MAX_PAGES, _MORE_FLAGS, _MMAP_OF_DIRECT = 1 << 22, 1 << 30, 1 << 36
_OPERATIONS = {
    1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 5: "readlink", 6: "symlink", 9: "mkdir", 10: "unlink",
    11: "rmdir", 12: "rename", 13: "link", 14: "open", 15: "read", 16: "write", 17: "statfs", 18: "release",
    20: "fsync", 25: "flush", 26: "init", 27: "opendir", 28: "readdir", 29: "releasedir", 30: "fsyncdir",
    31: "lock", 32: "lock", 33: "lock", 35: "create", 36: "interrupt", 42: "batch_forget", 43: "fallocate",
}  # fmt: skip
_UNANSWERED = ("forget", "batch_forget", "interrupt")
_LIBC = ctypes.CDLL(None, use_errno=True)
_NOSUID_NODEV, _DETACH, _SET_DEATH_SIGNAL = 6, 2, 1


class CannotMount(Exception):
    """Says why there is no FUSE here."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the kernel asks: of which node, for which thread, and the bytes after the header."""

    node: int
    pid: int
    body: bytes

    def fields(self, form: str) -> tuple[int, ...]:
        return struct.unpack_from("<" + form, self.body)

    def names(self, start: int = 0) -> list[str]:
        """The names after the first ``start`` bytes, each with a zero at its end."""
        return [os.fsdecode(name) for name in self.body[start:].split(b"\0")[:-1]]


def mount(path: Path) -> int:
    """Mount a file system at ``path``; the descriptor by which the kernel asks. CannotMount says why not."""
    if sys.platform != "linux" or not os.path.exists("/dev/fuse"):
        raise CannotMount("there is no /dev/fuse")
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        arguments = b"nfs_like", os.fsencode(path), b"fuse.nfs_like", _NOSUID_NODEV, options.encode()
        if _LIBC.mount(*arguments[:3], ctypes.c_ulong(arguments[3]), arguments[4]) == 0:
            return device
        os.close(device)
        reason = f"mount: {os.strerror(ctypes.get_errno())}"
    except OSError as error:
        reason = f"/dev/fuse: {error.strerror}"
    return _mount_by_helper(path, reason)


def go_on_without_parent() -> None:
    """Let this program be woken when the one that started it dies: standing still, it would hold others for ever."""
    _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGCONT)


def unmount(path: Path) -> None:
    """Take the mount away, also one that is used or whose program has died."""
    if _LIBC.umount2(os.fsencode(path), _DETACH) != 0 and (helper := _helper()):
        subprocess.run([helper, "-u", "-z", "-q", "--", str(path)], check=False)


def _helper() -> str | None:
    return shutil.which("fusermount3") or shutil.which("fusermount")


def _mount_by_helper(path: Path, reason: str) -> int:
    """The way of those who are not root: a program opens the device and sends it."""
    helper = _helper()
    if helper is None:
        raise CannotMount(f"{reason}, and there is no fusermount")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [helper, "-o", "nosuid,nodev,fsname=nfs_like", "--", str(path)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}, pass_fds=[theirs.fileno()],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise CannotMount(f"{reason}; {done.stderr.strip()}")
        return socket.recv_fds(ours, 1, 1)[1][0]


def init_reply(request: Request, locks: bool) -> bytes:
    """With ``locks`` the kernel keeps locks itself; without it asks for each, and is told that there are none."""
    _, _, read_ahead, offered, more = request.fields("IIIII")
    offered |= more << 32 if offered & _MORE_FLAGS else 0
    wanted = _ASYNC_READ | _BIG_WRITES | _MAX_PAGES | _MORE_FLAGS | _MMAP_OF_DIRECT
    flags = offered & (wanted if locks else wanted | _POSIX_LOCKS | _FLOCK_LOCKS)
    head = 7, 39, read_ahead, flags & 0xFFFFFFFF, 16, 12, MOST_BYTES, 1, MOST_BYTES // 4096, 0, flags >> 32
    return struct.pack("<IIIIHHIIHHI", *head).ljust(64, b"\0")


def attributes(found: os.stat_result, size: int) -> bytes:
    """What the kernel is told of a file; its size may be another one here than on the server."""
    times = [getattr(found, name) for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")]
    seconds, rest = [time // 10**9 for time in times], [time % 10**9 for time in times]
    owner = found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_rdev
    return _ATTRIBUTES.pack(found.st_ino, size, -(-size // 512), *seconds, *rest, *owner, found.st_blksize, 0)


def attributes_reply(encoded: bytes) -> bytes:
    return _VALID.pack(0, 0, 0) + encoded  # valid for no time: the kernel keeps nothing


def entry_reply(node: int, encoded: bytes) -> bytes:
    return _ENTRY.pack(node, 0, 0, 0, 0, 0) + encoded


def open_reply(handle: int, flags: int) -> bytes:
    return struct.pack("<QII", handle, flags, 0)


def directory_reply(entries: list[tuple[str, int, int]], start: int, room: int) -> bytes:
    """As many of the entries (name, inode, mode) from ``start`` on as there is room for."""
    found = bytearray()
    for at, (name, inode, mode) in enumerate(entries[start:], start + 1):
        encoded = os.fsencode(name)
        one = _DIRENT.pack(inode, at, len(encoded), stat.S_IFMT(mode) >> 12) + encoded
        one = one.ljust(-(-len(one) // 8) * 8, b"\0")
        if len(found) + len(one) > room:
            break
        found += one
    return bytes(found)


def statfs_reply(found: os.statvfs_result) -> bytes:
    blocks = found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree
    return struct.pack("<5Q4I6I", *blocks, found.f_bsize, found.f_namemax, found.f_frsize, *[0] * 7)


def serve(device: int, answers: object, control: int, told: Callable[[str], None], work: Callable[[], float]) -> None:
    """Answer the kernel by the methods of ``answers`` until the mount is gone or ``control`` says "stop" or ends.

    Other lines of ``control`` go to ``told``. ``work`` does what is due, and says after how many seconds it is next.
    """
    for descriptor in (device, control):
        os.set_blocking(descriptor, False)
    lines = b""
    while True:
        ready, _, _ = select.select([device, control], [], [], work())
        if control in ready:
            piece = os.read(control, 1 << 16)
            *whole, lines = (lines + piece).split(b"\n")
            for line in whole:
                if line != b"stop":
                    told(line.decode())
            if not piece or b"stop" in whole:
                return
        if device in ready and not _answer(device, answers):
            return


def _answer(device: int, answers: object) -> bool:
    """One request; False where the mount is gone."""
    try:
        message = os.read(device, MOST_BYTES + 8192)
    except OSError as error:  # ENOENT: whoever asked was interrupted
        return error.errno != errno.ENODEV
    _, code, unique, node, _, _, pid, _, _ = _HEADER.unpack_from(message)
    name = _OPERATIONS.get(code, "")
    body, problem = b"", 0
    method = getattr(answers, name, None)
    if method is None:
        problem = errno.ENOSYS
    else:
        try:
            body = method(Request(node, pid, message[_HEADER.size :])) or b""
        except OSError as error:
            problem = error.errno or errno.EIO
    if name not in _UNANSWERED:
        try:
            os.writev(device, [_REPLY.pack(_REPLY.size + len(body), -problem, unique), body])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
    return True
