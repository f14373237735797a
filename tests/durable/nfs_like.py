"""A folder that several clients mount at once, each with the habits of a client of NFS.

    with NfsLike(tmp_path) as nfs:
        one, two = nfs.client(USUAL), nfs.client(replace(USUAL, lost=0.1))
        (one.path / "file").write_text("written here, not seen there for some time")

Every mount is a program of its own (this file), the folder ``nfs.server`` is what the server has. ``Habits`` says what
can be switched. There is no network and no NFS in it: it is a file system that misbehaves as NFS does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import fuse_wire
from fuse_wire import CannotMount
from nfs_habits import USUAL, Habits

__all__ = ["USUAL", "CannotMount", "Habits", "Mount", "NfsLike", "mounted", "why_not"]
PATIENCE_S = 20.0
"""What a mount may take to send its last pages, when it is told to stop."""


class Mount:
    """One client: its files are under ``path``. CannotMount where there is no FUSE."""

    def __init__(self, server: Path, path: Path, habits: Habits) -> None:
        self.path, self.habits, self._server = path, habits, server
        self._start()

    def _start(self) -> None:
        self.path.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._server), str(self.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            start_new_session=True,  # Ctrl-C is for those who use it
        )  # fmt: skip
        try:
            self.set(self.habits)
        except BaseException:
            self.stop()
            raise

    def set(self, habits: Habits) -> None:
        """Other habits, from when this returns. Waits while the client is paused."""
        self.habits = habits
        with contextlib.suppress(BrokenPipeError):  # what it has said tells why
            self._process.stdin.write(habits.line())
        answer = self._process.stdout.readline().strip()
        if answer != "ready":
            raise CannotMount(answer or "the program of the mount has died")

    def pause(self) -> None:
        """The client's machine stands still: nothing is answered and nothing sent."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def crash(self) -> None:
        """The client's machine is without power: what was not sent is lost, and who uses it gets ENOTCONN."""
        self._process.kill()
        self.stop()

    def restart(self) -> None:
        """Mount it again after ``crash`` or ``stop``; a client that has seen nothing yet."""
        self._start()

    def stop(self) -> None:
        """Send what is left, and unmount, whatever has happened; again does nothing."""
        process = self._process
        if process.stdin.closed:
            return
        process.send_signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            process.stdin.write("stop\n")  # a copy of this process may hold the pipe open: closing is not enough
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        while _is_mount(self.path):
            fuse_wire.unmount(self.path)


class NfsLike:
    """The server's folder and the mounts of it, under ``directory``; they end with the ``with`` in any case."""

    def __init__(self, directory: Path) -> None:
        self.server, self._directory, self.mounts = directory / "server", directory, []

    def __enter__(self) -> Self:
        self.server.mkdir(exist_ok=True)
        return self

    def client(self, habits: Habits = USUAL) -> Mount:
        """One more client."""
        mount = Mount(self.server, self._directory / f"client-{len(self.mounts)}", habits)
        self.mounts.append(mount)
        return mount

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.ExitStack() as all_:
            for mount in self.mounts:
                all_.callback(mount.stop)


@functools.cache
def why_not() -> str | None:
    """Why nothing can be mounted here, by trying it."""
    with tempfile.TemporaryDirectory() as directory, NfsLike(Path(directory)) as nfs:
        try:
            nfs.client(Habits())
        except CannotMount as reason:
            return str(reason)
    return None


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[NfsLike]:
    """``NfsLike`` for tests: those are skipped where nothing can be mounted."""
    import pytest

    if reason := why_not():
        pytest.skip(f"FUSE: {reason}")
    with NfsLike(directory) as nfs:
        yield nfs


def _is_mount(path: Path) -> bool:
    """By the kernel's list: a mount whose program has died answers nothing."""
    with open("/proc/self/mounts") as mounts:
        return any(line.split()[1].encode().decode("unicode_escape") == str(path.absolute()) for line in mounts)


def main() -> None:
    """Mount, say so, and serve; the first line of the standard input has the habits, as have all others."""
    from nfs_client import Client

    server, path = map(Path, sys.argv[1:])
    fuse_wire.go_on_without_parent()
    os.umask(0)  # modes come with the requests
    client = Client(server, Habits.of_line(sys.stdin.readline()))
    try:
        device = fuse_wire.mount(path)
    except CannotMount as reason:
        print(reason, flush=True)
        sys.exit(1)
    print("ready", flush=True)

    def told(line: str) -> None:
        client.take(line)
        print("ready", flush=True)

    try:
        fuse_wire.serve(device, client, 0, told, client.work)
        client.end()
    finally:
        os.close(device)  # first: then nothing waits for this program
        fuse_wire.unmount(path)


if __name__ == "__main__":
    main()
