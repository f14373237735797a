"""The file system of the NFS-like tests has the habits that it says, each shown with plain Python."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nfs_like import USUAL, Habits, NfsLike, mounted

LONG, SHORT = (1000.0, 1000.0), (0.3, 0.3)
# Nothing reaches the server by itself, and nothing is asked again.
HELD = replace(USUAL, known_s=LONG, write_back_s=LONG)
PLAIN = Habits()


@pytest.fixture
def nfs(tmp_path: Path) -> Iterator[NfsLike]:
    with mounted(tmp_path) as found:
        yield found


def eventually(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def put(path: Path, position: int, data: bytes) -> int:
    """An open descriptor through which that was written."""
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, data, position)
    return descriptor


def both_write(nfs: NfsLike, habits: Habits, first: tuple[int, bytes], second: tuple[int, bytes]) -> bytes:
    """What the server has after two clients have written at the same time, and the second has sent it last."""
    (nfs.server / "x").write_bytes(bytes(8192))
    one, two = nfs.client(habits), nfs.client(habits)
    descriptors = put(one.path / "x", *first), put(two.path / "x", *second)
    for descriptor in descriptors:
        os.fsync(descriptor)
        os.close(descriptor)
    return (nfs.server / "x").read_bytes()


def test_two_writers_of_one_page_lose_bytes(nfs: NfsLike) -> None:
    found = both_write(nfs, HELD, (10, b"A"), (11, b"B"))
    assert found[10:12] == b"\0B"


def test_written_bytes_alone_do_no_harm(nfs: NfsLike) -> None:
    found = both_write(nfs, replace(HELD, whole_pages=False), (10, b"A"), (11, b"B"))
    assert found[10:12] == b"AB"


def test_whole_pages_survive(nfs: NfsLike) -> None:
    assert both_write(nfs, HELD, (0, b"A" * 4096), (4096, b"B" * 4096)) == b"A" * 4096 + b"B" * 4096


def test_a_paused_client_destroys_bytes_later(nfs: NfsLike) -> None:
    (nfs.server / "x").write_bytes(bytes(8192))
    one, two = nfs.client(replace(HELD, write_back_s=(0.5, 0.5))), nfs.client(HELD)
    descriptor = put(one.path / "x", 10, b"A")
    one.pause()
    other = put(two.path / "x", 11, b"B")
    os.fsync(other)
    os.close(other)
    assert (nfs.server / "x").read_bytes()[10:12] == b"\0B"
    one.resume()
    assert eventually(lambda: (nfs.server / "x").read_bytes()[10:12] == b"A\0")
    os.close(descriptor)


def test_a_file_appears_late(nfs: NfsLike) -> None:
    one, two = nfs.client(PLAIN), nfs.client(replace(USUAL, known_s=LONG))
    assert not (two.path / "x").exists()
    assert os.listdir(two.path) == []
    (one.path / "x").write_text("there")
    assert not (two.path / "x").exists()
    with pytest.raises(FileNotFoundError):
        (two.path / "x").read_text()
    assert os.listdir(two.path) == []
    two.set(replace(USUAL, known_s=SHORT))
    (two.path / "own").touch()  # a change of its own: the listing is read again
    assert sorted(os.listdir(two.path)) == ["own", "x"]
    assert (two.path / "x").read_text() == "there"
    assert not (two.path / "y").exists()
    (one.path / "y").touch()
    assert eventually((two.path / "y").exists)


def test_attributes_are_old_until_the_file_is_opened(nfs: NfsLike) -> None:
    one, two = nfs.client(PLAIN), nfs.client(HELD)
    (one.path / "x").write_bytes(b"1")
    assert (two.path / "x").stat().st_size == 1
    (one.path / "x").write_bytes(b"22")
    assert (two.path / "x").stat().st_size == 1
    assert (two.path / "x").read_bytes() == b"22"
    assert (two.path / "x").stat().st_size == 2


def test_pages_are_old_until_the_file_is_opened(nfs: NfsLike) -> None:
    one, two = nfs.client(PLAIN), nfs.client(HELD)
    (one.path / "x").write_bytes(b"old")
    with open(two.path / "x", "rb", buffering=0) as file:
        assert file.read() == b"old"
        (one.path / "x").write_bytes(b"new")
        assert os.pread(file.fileno(), 3, 0) == b"old"
        assert (two.path / "x").read_bytes() == b"new"


def test_fsync_and_rename_are_seen_after_the_time_of_attributes(nfs: NfsLike) -> None:
    one, two = nfs.client(USUAL), nfs.client(replace(USUAL, known_s=SHORT))
    (one.path / "x").write_text("old")
    assert (two.path / "x").stat().st_size == 3
    with open(one.path / "x.new", "w") as file:
        file.write("newer")
        file.flush()
        os.fsync(file.fileno())
    os.rename(one.path / "x.new", one.path / "x")
    assert eventually(lambda: (two.path / "x").stat().st_size == 5)
    assert (two.path / "x").read_text() == "newer"


def test_a_replaced_file_is_told_from_the_open_one(nfs: NfsLike) -> None:
    one, two = nfs.client(PLAIN), nfs.client(replace(PLAIN, stale=True))
    (one.path / "x").write_text("old")
    (nfs.server / "kept").hardlink_to(nfs.server / "x")
    with open(two.path / "x") as file:
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(two.path / "x"))
        (one.path / "x.new").write_text("new")
        os.rename(one.path / "x.new", one.path / "x")
        assert not os.path.samestat(os.fstat(file.fileno()), os.stat(two.path / "x"))


LOST = {
    "link": (lambda path: os.link(path / "x", path / "y"), FileExistsError),
    "rename": (lambda path: os.rename(path / "x", path / "y"), FileNotFoundError),
    "unlink": (lambda path: os.unlink(path / "x"), FileNotFoundError),
    "mkdir": (lambda path: os.mkdir(path / "y"), FileExistsError),
    "create": (lambda path: os.close(os.open(path / "y", os.O_CREAT | os.O_EXCL | os.O_WRONLY)), FileExistsError),
}


@pytest.mark.parametrize("what", LOST)
def test_lost_replies(nfs: NfsLike, what: str) -> None:
    """It is done, and the client hears that it cannot be done; or EIO."""
    (nfs.server / "x").touch()
    client = nfs.client(replace(HELD, lost=1.0))
    act, error = LOST[what]
    with pytest.raises(error):
        act(client.path)
    assert sorted(os.listdir(nfs.server)) == {"rename": ["y"], "unlink": []}.get(what, ["x", "y"])
    if what == "link":
        assert (client.path / "x").stat().st_nlink == 2
    assert sorted(os.listdir(client.path)) == sorted(os.listdir(nfs.server))
    client.set(replace(HELD, lost=1.0, lost_as_eio=1.0))
    with pytest.raises(OSError, match="Input/output error"):
        os.mkdir(client.path / "z")
    assert (nfs.server / "z").is_dir()


def test_an_exclusive_create_has_one_winner(nfs: NfsLike) -> None:
    clients = [nfs.client(replace(HELD, seed=seed)) for seed in range(2)]
    names, won = [f"claim-{number}" for number in range(50)], [[], []]
    for client in clients:
        assert not any((client.path / name).exists() for name in names)

    def claim(number: int) -> None:
        for name in names:
            try:
                os.close(os.open(clients[number].path / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            won[number].append(name)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won[0] + won[1]) == sorted(names)


def test_files_that_another_client_removed_are_stale(nfs: NfsLike) -> None:
    one, two = nfs.client(PLAIN), nfs.client(replace(HELD, known_s=SHORT))
    (one.path / "x").write_bytes(bytes(8192))
    descriptor = put(two.path / "x", 0, b"A")
    (one.path / "x").unlink()
    for act in (lambda: os.fsync(descriptor), lambda: os.pread(descriptor, 1, 5000), lambda: os.fstat(descriptor)):
        with pytest.raises(OSError, match="Stale file handle"):
            act()
    os.close(descriptor)
    assert not (two.path / "x").exists()


def test_files_that_this_client_removed_get_silly_names(nfs: NfsLike) -> None:
    client = nfs.client(HELD)
    descriptor = os.open(client.path / "x", os.O_CREAT | os.O_RDWR)
    os.pwrite(descriptor, b"A", 0)
    os.link(client.path / "x", client.path / "y")
    os.unlink(client.path / "x")
    os.unlink(client.path / "y")
    name, other = os.listdir(client.path)
    assert name.startswith(".nfs")
    assert other.startswith(".nfs")
    assert os.pread(descriptor, 1, 0) == b"A"
    assert os.fstat(descriptor).st_nlink == 2
    with pytest.raises(OSError, match="busy"):
        os.unlink(client.path / name)
    os.close(descriptor)
    assert eventually(lambda: os.listdir(nfs.server) == [])


@pytest.mark.parametrize("name", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("operation", ["write", "fsync", "close"])
def test_injected_errors(nfs: NfsLike, operation: str, name: str) -> None:
    """Said once; what was written is lost, and nothing of it reaches the server."""
    client = nfs.client(replace(HELD, failures=((operation, name, 1.0),)))
    descriptor = os.open(client.path / "x", os.O_CREAT | os.O_RDWR)
    if operation != "write":
        os.write(descriptor, b"A")
    act = {"write": lambda: os.write(descriptor, b"A"), "fsync": lambda: os.fsync(descriptor)}
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        act.get(operation, lambda: os.close(descriptor))()
    if operation != "close":
        os.close(descriptor)
    assert (nfs.server / "x").read_bytes() == b""


def test_locks_and_what_a_server_cannot(nfs: NfsLike) -> None:
    (nfs.server / "x").touch()
    one, two, locking = nfs.client(HELD), nfs.client(HELD), nfs.client(replace(HELD, locks=True))
    with open(one.path / "x", "r+b") as file:
        for lock in (fcntl.flock, fcntl.lockf):
            with pytest.raises(OSError, match="No locks"):
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.fallocate(file.fileno(), 0, 0, 4096) == -1
    with pytest.raises(OSError, match="not supported"):
        os.open(two.path, os.O_TMPFILE | os.O_RDWR)
    with open(locking.path / "x", "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_is_written_arrives_late(nfs: NfsLike) -> None:
    held, late = nfs.client(HELD), nfs.client(replace(USUAL, write_back_s=(0.1, 0.3)))
    descriptors = []
    for name, client in (("x", held), ("y", late)):
        (nfs.server / name).touch()
        descriptors.append(put(client.path / name, 0, b"A"))
        assert (nfs.server / name).read_bytes() == b""
    assert eventually(lambda: (nfs.server / "y").read_bytes() == b"A")
    assert (nfs.server / "x").read_bytes() == b""
    os.close(descriptors[0])
    assert (nfs.server / "x").read_bytes() == b"A"
    os.close(descriptors[1])


WRITER = "import os, sys, time; f = open(sys.argv[1], 'r+b', 0); f.write(b'A'); print(flush=True); time.sleep(60)"


@pytest.mark.parametrize("late", [None, (1.0, 1.0)])
def test_pages_of_a_killed_process_arrive_later(nfs: NfsLike, late: tuple[float, float] | None) -> None:
    client = nfs.client(replace(HELD, late_after_kill_s=late))
    (nfs.server / "x").touch()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(client.path / "x")], stdout=subprocess.PIPE)
    writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert (nfs.server / "x").read_bytes() == (b"" if late else b"A")
    assert eventually(lambda: (nfs.server / "x").read_bytes() == b"A")


def test_a_crashed_client_loses_what_was_not_sent(nfs: NfsLike) -> None:
    client = nfs.client(HELD)
    for name in ("x", "y"):
        (nfs.server / name).touch()
    os.fsync(sent := put(client.path / "x", 0, b"A"))
    held = put(client.path / "y", 0, b"A")
    client.crash()
    with pytest.raises(OSError, match="not connected"):
        os.fsync(held)
    assert [(nfs.server / name).read_bytes() for name in ("x", "y")] == [b"A", b""]
    client.restart()
    assert (client.path / "x").read_bytes() == b"A"
    for descriptor in (sent, held):
        try:
            os.close(descriptor)
        except OSError as error:
            assert error.errno == errno.ENOTCONN  # noqa: PT017 - closed all the same


def test_chance_repeats_with_its_seed(nfs: NfsLike) -> None:
    def lost(seed: int) -> list[bool]:
        client, found = nfs.client(Habits(seed=seed, lost=0.5)), []
        for number in range(20):
            try:
                os.mkdir(client.path / f"{number}")
            except FileExistsError:
                found.append(True)
            else:
                found.append(False)
            os.rmdir(nfs.server / f"{number}")
        return found

    first = lost(1)
    assert lost(1) == first != lost(2)


def test_mounts_end_with_a_failed_test(tmp_path: Path) -> None:
    def fails(nfs: NfsLike) -> None:
        file = open(nfs.client(USUAL).path / "x", "w")  # noqa: SIM115 - open beyond the mount
        kept.append(file)
        file.write("sent when the mount ends")
        file.flush()
        nfs.client(USUAL).pause()
        raise ZeroDivisionError

    kept = []
    with pytest.raises(ZeroDivisionError), mounted(tmp_path) as nfs:
        fails(nfs)
    assert (nfs.server / "x").read_text() == "sent when the mount ends"
    assert [os.listdir(mount.path) for mount in nfs.mounts] == [[], []]
    with pytest.raises(OSError, match="not connected"):
        kept[0].close()


STARTER = """
import sys, time
from pathlib import Path
from nfs_like import Habits, NfsLike
with NfsLike(Path(sys.argv[1])) as nfs:
    nfs.client(Habits()).pause()
    print("paused", flush=True)
    time.sleep(60)
"""


def test_mounts_end_with_a_killed_test(nfs: NfsLike, tmp_path: Path) -> None:
    """Also one that stands still, which would hold everybody who looks at it."""
    (directory := tmp_path / "other").mkdir()
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, directory], stdout=subprocess.PIPE, cwd=Path(__file__).parent
    )
    assert starter.stdout.readline() == b"paused\n"
    assert str(directory) in Path("/proc/self/mounts").read_text()
    starter.kill()
    starter.communicate()
    assert eventually(lambda: str(directory) not in Path("/proc/self/mounts").read_text())
