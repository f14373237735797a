"""Who works on what. Claims only save work: nothing is wrong when two processes hold the same one."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Self

from ..errors import StorageError
from .folder import NAME, JobFolder, Picture
from .records import NO_LINKS, gone_or_failed

# A worker raises its counter so often; one whose counter stands still for so long, by the clock of who looks, is gone.
BEAT_S, STALE_S = 2.0, 20.0
UNKNOWN = -1
_MOST_BYTES = 4096
_TRIES = 9


@dataclass(frozen=True, slots=True)
class Who:
    """A process: ``machine`` is the same for all that can see each other's numbers, "" where that is not known."""

    host: str
    machine: str
    pid: int
    started: int
    since: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether it is one of this machine."""
        return self.machine == _machine() != ""

    @property
    def is_dead(self) -> bool:
        """Whether it is known for certain: a process of this machine that is no more."""
        return self.is_here and _started(self.pid) not in (UNKNOWN, self.started)


def this_process() -> Who:
    """The one that asks."""
    return Who(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), time.time())


@cache
def _machine() -> str:
    """This boot of this machine, and this namespace of process numbers; "" on systems that do not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int:
    """When the process of that number began, in ticks of this boot; 0 where there is none, or UNKNOWN."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *rest = file.read().rpartition(b")")[2].split()
        if state not in (b"Z", b"X"):
            return int(rest[18])
        # Other threads may still be within a call of the system, which a kill does not end.
        return UNKNOWN if len(os.listdir(f"/proc/{pid}/task")) > 1 else 0
    except (FileNotFoundError, ProcessLookupError):
        return 0 if os.path.exists("/proc/self/stat") and not _is_there(pid) else UNKNOWN
    except (OSError, ValueError, IndexError):  # no descriptor is left, or others' processes are not shown
        return UNKNOWN


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def worker_path(folder: str, name: str) -> str:
    """The file of a worker."""
    return os.path.join(folder, f"worker-{name}")


def read_worker(folder: str, name: str) -> tuple[Who | None, bytes]:
    """The process behind a worker, None where its file does not say, and what that file holds.

    Raises FileNotFoundError where it is gone: the worker has ended.
    """
    try:
        with open(worker_path(folder, name), "rb") as file:
            text = file.read(_MOST_BYTES)
    except OSError as error:
        raise gone_or_failed(worker_path(folder, name), error) from error
    return _who(text), text


_KINDS = {"host": str, "machine": str, "pid": int, "started": int, "since": float}


def _who(text: bytes) -> Who | None:
    try:
        found = json.loads(text)
        return Who(**{name: kind(found[name]) for name, kind in _KINDS.items()})
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


class Worker:
    """This process as others see it: a file in the job's folder whose counter goes up until the end of the context."""

    def __init__(self, folder: JobFolder) -> None:
        self._job_folder, self.folder, self.name = folder, folder.path, secrets.token_hex(4)
        self._who, self._beats, self._end = this_process(), 0, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="cqsa-heartbeat", daemon=True)
        self._last, self._gap_s = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        for again in range(_TRIES, -1, -1):
            self._job_folder.make()
            try:
                self._make()
                break
            except OSError as error:
                if not (isinstance(error, FileNotFoundError) and again):  # another process has just left the folder
                    raise StorageError(f"{self.folder}: {error.strerror}. A job keeps its record there.") from error
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join()
        with suppress(OSError):
            os.remove(self.path)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            self._gap_s = max(self._gap_s, time.monotonic() - self._last)
            self._last = time.monotonic()
            self._beats += 1
            try:
                self._write(self.path, 0)
            except OSError:  # the folder is gone, or the disk fails: whoever writes what matters will say so
                return

    @property
    def stood_still(self) -> bool:
        """Whether it may have been taken for gone at some time."""
        return max(self._gap_s, time.monotonic() - self._last) >= STALE_S / 2

    @property
    def path(self) -> str:
        """Its file."""
        return worker_path(self.folder, self.name)

    @property
    def text(self) -> bytes:
        """What its file says, and its claims."""
        return json.dumps({"name": self.name, **asdict(self._who), "beats": f"{self._beats:012}"}).encode()

    def _make(self) -> None:
        temporary = f"{self.path}.new-{self.name}"
        self._write(temporary, os.O_CREAT)
        try:
            os.rename(temporary, self.path)  # who is killed before leaves nothing that seems to live
        except FileNotFoundError:
            if not os.path.exists(self.path):  # else the first reply was lost
                raise

    def _write(self, path: str, flags: int) -> None:
        """Always as long: it is written over. Closed each time, so that a network file system passes it on."""
        descriptor = os.open(path, os.O_WRONLY | flags, 0o666)
        try:
            os.write(descriptor, self.text)
            if flags:  # a claim without a name would have to be waited for, after a loss of power
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(slots=True)
class Observer:
    """Tells which workers are gone, from what one process sees of them. Clocks of machines are never compared."""

    folder: str
    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, tuple[bytes, float, int]] = field(default_factory=dict)

    def is_gone(self, name: str) -> bool:
        """Whether the worker has ended, is dead, or has stood still for long. ``name`` is "" of a claim without one."""
        text = b""
        if name:
            try:
                who, text = read_worker(self.folder, name)
            except FileNotFoundError:
                return True
            if who is not None and who.is_dead:
                return True
        now = self.clock()
        before, since, moves = self._seen.get(name, (None, now, 0))
        if before != text:
            self._seen[name] = text, now, moves + (before is not None)
            return False
        return now - since >= STALE_S

    def was_seen_moving(self, name: str) -> bool:
        """Whether it is known to live: its counter went up since it was first looked at."""
        return name in self._seen and self._seen[name][2] > 0


class Claims:
    """Taking shares of a job's work, in its ``directory``, for a ``worker``."""

    def __init__(self, directory: str, worker: Worker, watch: Observer) -> None:
        self._directory, self._worker, self._watch = directory, worker, watch

    @property
    def worker(self) -> str:
        """Who claims."""
        return self._worker.name

    @property
    def may_be_lost(self) -> bool:
        """Whether others may have taken the worker for gone."""
        return self._worker.stood_still

    @property
    def watch(self) -> Observer:
        """What tells who is gone."""
        return self._watch

    def within(self, directory: str) -> Claims:
        """Those of the same worker in another directory."""
        return Claims(directory, self._worker, self._watch)

    def take(self, what: str, picture: Picture) -> bool:
        """Claim ``what``, unless another one has, who is not gone as far as is known."""
        highest = picture.claims.get(what, 0)
        held_by = self.holder(what, highest) if highest else ""
        if highest and held_by != self.worker and not self._watch.is_gone(held_by):
            return False
        return self._create(what, highest + 1)

    def _create(self, what: str, number: int) -> bool:
        """A claim is a further name of the worker's file; or a file with its name, where there are no such links."""
        path = self._path(what, number)
        try:
            os.link(self._worker.path, path)
        except FileExistsError:
            with suppress(FileNotFoundError):
                return os.path.samefile(self._worker.path, path)  # the first reply was lost
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return self._write(path)
        return True

    def _write(self, path: str) -> bool:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self._worker.text)
        finally:
            os.close(descriptor)
        return True

    def holder(self, what: str, number: int) -> str:
        """The worker that a claim names; "" where it does not yet."""
        return holder(self._path(what, number))

    def is_mine(self, what: str, number: int) -> bool:
        """Whether nobody has claimed after ``number``."""
        return not os.path.exists(self._path(what, number + 1))

    def _path(self, what: str, number: int) -> str:
        return claim_path(self._directory, what, number)


def claim_path(directory: str, what: str, number: int) -> str:
    """The file of a claim."""
    return os.path.join(directory, f"{what}.claim-{number}")


def holder(claim: str) -> str:
    """The worker that the file ``claim`` names; "" where it does not."""
    try:
        found = json.loads(_text_of(claim)).get("name")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return found if isinstance(found, str) and re.fullmatch(NAME, found) else ""


def claimed_by(directory: str, what: str, number: int) -> Who | None:
    """The process that has made a claim, whether it lives or not; None where that is not known."""
    return _who(_text_of(claim_path(directory, what, number)))


def _text_of(claim: str) -> bytes:
    with suppress(OSError), open(claim, "rb") as file:
        return file.read(_MOST_BYTES)
    return b""
