"""How a job ends: its output gets its name, or it is dropped; and what is left of it goes."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Never

from ..errors import ArgumentError, StorageError
from ..storage import PART_SUFFIX, OutputFile, describe
from .claims import BEAT_S, STALE_S, Observer, read_worker
from .fact import JobFact, current
from .folder import KEY, OF_JOB, OLD, REMAINS, WORKER, JobFolder, JobPaths, clear
from .records import link_once, read_record, sync_directory
from .states import remove_states
from .stop import Stop

logger = logging.getLogger("cqsa_arrays")
POLL_S = 0.05
# For so long a client of a network file system may believe that there is no file of a name.
HIDDEN_S = 60.0


class JobEnded(Exception):
    """The job that this process works on has been finished by another one."""


def was_finished(out: str, fact: JobFact) -> bool:
    """Whether the output of the job has its name."""
    if not os.path.isfile(out):
        return False
    try:
        return describe(out, locking=fact.locking).attributes.get("job") == fact.mark
    except StorageError:  # another file
        return False


def check_unended(folder: JobFolder, fact: JobFact, output: OutputFile, hidden_s: float = HIDDEN_S) -> None:
    """Raise JobEnded where another process has finished the job, StorageError where it is not there any more.

    For so many seconds its output may have a name that is not seen yet.
    """
    paths, until = fact.paths(folder), time.monotonic() + hidden_s
    if os.path.exists(paths.moved(fact.moves + 1)):
        raise StorageError(f"{folder.out}: the job was moved to another device by another process.")
    while not (output.file.is_at(paths.output) and os.path.exists(folder.record)):
        if output.file.is_at(paths.finished) or was_finished(folder.out, fact):
            raise JobEnded
        if os.path.exists(paths.dropped):
            raise StorageError(f"{folder.out}: the job was dropped by another process.")
        if time.monotonic() > until or not output.file.has_a_name:
            raise _lost(folder)
        time.sleep(POLL_S)  # it has a name that is not seen yet


def _lost(folder: JobFolder) -> StorageError:
    return StorageError(
        f"{folder.path}: removed or replaced while the job was computed. What was done is lost with it: begin the job"
        " again."
    )


def give_name(folder: JobFolder, fact: JobFact, *, overwrite: bool) -> None:
    """Rename the output, which is complete and on the disk. Raises JobEnded where another process has done it.

    It is called "finished" first: that name it can get once, whatever other processes finish or drop the job.
    """
    paths = fact.paths(folder)
    if not overwrite and os.path.lexists(folder.out) and not was_finished(folder.out, fact):
        raise StorageError(f"{folder.out} has appeared meanwhile. Move it away, and resume the job.")
    try:
        os.rename(paths.output, paths.finished)
    except FileNotFoundError:
        if not os.path.exists(paths.finished):
            if was_finished(folder.out, fact):
                raise JobEnded from None
            raise StorageError(f"{folder.out}: the job was dropped by another process.") from None
    try:
        if overwrite:
            os.replace(paths.finished, folder.out)
        elif not link_once(paths.finished, folder.out):
            raise StorageError(f"{folder.out} has appeared meanwhile. Move it away, and resume the job.")
        else:
            sync_directory(os.path.dirname(folder.out))  # the other name must not go before this one is there for good
            with suppress(FileNotFoundError):
                os.remove(paths.finished)
    except FileNotFoundError:
        if not was_finished(folder.out, fact):
            raise StorageError(f"{folder.out}: the job was dropped by another process.") from None
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{paths.finished} cannot be renamed to {folder.out}: {error.strerror}.") from error
    sync_directory(os.path.dirname(folder.out))


def end(folder: JobFolder, fact: JobFact) -> None:
    """Remove the job, which is finished or dropped; by any process, and again."""
    paths = fact.paths(folder)
    try:
        if paths.scratch != paths.directory:  # while the record says where they are
            remove_states(paths.scratch, fact.key)
        # Fails where another process has done it: the directory is gone before a next job can have its record here.
        with suppress(FileNotFoundError, NotADirectoryError):
            os.rename(folder.record, os.path.join(paths.directory, "ended"))
        _unlink_part(folder, paths)
        bury(paths.directory)
        leave(folder, Observer(folder.path))
    except OSError as error:
        raise StorageError(f"{folder.path}: cannot be removed: {error.strerror}.") from error


def bury(directory: str) -> None:
    """Remove a directory of a job. At once nobody who is late finds anything in it."""
    gone = f"{directory.removesuffix('.new')}.gone"
    with suppress(FileNotFoundError, NotADirectoryError):
        os.rename(directory, gone)
    clear(gone, OF_JOB)


def make_way(folder: JobFolder, own: str = "") -> bool:
    """Remove every directory of a job but ``own``; False, and nothing is removed, where one of them is the job.

    Those that are ready to be begun are made void first: one that has been begun until then is seen as such, and none
    can be begun later.
    """
    others = [directory for directory in folder.directories() if directory != own]
    for directory in others:
        other = JobPaths(directory, "", "")
        with suppress(FileNotFoundError, NotADirectoryError):
            os.rename(other.record, other.void)
    if os.path.lexists(folder.record):
        return False
    for directory in (*others, *folder.directories(".new")):
        _unlink_part(folder, JobPaths(directory, "", ""))
        bury(directory)
    return True


def leave(folder: JobFolder, watch: Observer) -> None:
    """Remove the folder, where there is neither a job in it nor a process that works there, as far as ``watch`` saw."""
    try:
        names = os.listdir(folder.path)
    except FileNotFoundError:
        return
    _clear_gone(folder)
    for name in names:
        if (found := WORKER.fullmatch(name)) and watch.is_gone(found[1]):
            with suppress(FileNotFoundError):
                os.remove(os.path.join(folder.path, name))
    if not any(name == "job" or WORKER.fullmatch(name) for name in _names(folder)) and not folder.directories():
        clear(folder.path, REMAINS)


def _clear_gone(folder: JobFolder) -> None:
    """Remove what is left of jobs that are over, whoever may still believe in them."""
    for directory in folder.directories():
        if os.path.exists(os.path.join(directory, "ended")):
            _unlink_part(folder, JobPaths(directory, "", ""))
            bury(directory)
    for directory in folder.directories(".gone"):
        clear(directory, OF_JOB)


def _names(folder: JobFolder) -> list[str]:
    with suppress(FileNotFoundError):
        return os.listdir(folder.path)
    return []


def _unlink_part(folder: JobFolder, paths: JobPaths) -> None:
    """Remove the second name of the output, which people see; not a file of somebody else that is called so."""
    part = folder.out + PART_SUFFIX
    for own in (paths.output, paths.finished, paths.dropped, folder.out):
        with suppress(FileNotFoundError):
            if os.path.samefile(own, part):
                os.remove(part)
                return


def remove_remains(folder: JobFolder) -> None:
    """Remove what runs have left that were killed before a job began, or after its output had its name."""
    if folder.exists or not os.path.isdir(folder.path):
        return
    _clear_gone(folder)
    if any(living(folder, Observer(folder.path))):
        return  # somebody begins a job
    if make_way(folder):
        leave(folder, Observer(folder.path))


def require_over(folder: JobFolder) -> Never:
    """Raise JobEnded where the output has its name and there is no job any more; ArgumentError where neither is so."""
    if not os.path.exists(folder.out):
        folder.require()
    remove_remains(folder)
    raise JobEnded


def drop(folder: JobFolder, stop: Stop, *, overwrite: bool) -> None:
    """Remove an unfinished job, whatever its state; one whose output is complete gives it its name first.

    Raises ArgumentError where a process computes it.
    """
    if not os.path.isdir(folder.path):
        return
    folder.make()  # refuses what is no job's
    if folder.is_old:
        _drop_old(folder)
        return
    require_nobody(folder, stop, "restart", "True")
    try:
        fact = current(folder)
    except StorageError as error:
        logger.info("the record of the job is dropped unread: %s", error)
        _drop_unread(folder)
        return
    if fact is None:
        remove_remains(folder)
        return
    paths = fact.paths(folder)
    with suppress(FileNotFoundError):
        os.rename(paths.output, paths.dropped)
    if os.path.exists(paths.finished):
        with suppress(JobEnded):
            give_name(folder, fact, overwrite=overwrite or fact.overwrite)
    if not os.path.isdir(paths.directory):
        _remove_record(folder, fact.key)  # of a job that somebody has removed by hand
    end(folder, fact)


def _drop_unread(folder: JobFolder) -> None:
    _remove_record(folder, "")
    remove_remains(folder)


def _remove_record(folder: JobFolder, key: str) -> None:
    """Remove the record of the job of that key ("": one that cannot be read), and never that of a later job."""
    aside = f"{folder.record}.new-{secrets.token_hex(4)}"
    with suppress(FileNotFoundError):
        os.rename(folder.record, aside)
        try:
            found = read_record(aside).text("key", KEY)
        except StorageError:
            found = ""
        if found != key:
            link_once(aside, folder.record)
        with suppress(FileNotFoundError):
            os.remove(aside)


def _drop_old(folder: JobFolder) -> None:
    for name in sorted(_names(folder)):
        if OLD.fullmatch(name):
            with suppress(FileNotFoundError):
                os.remove(os.path.join(folder.path, name))
    with suppress(FileNotFoundError):
        os.remove(folder.out + PART_SUFFIX)
    leave(folder, Observer(folder.path))


def require_nobody(folder: JobFolder, stop: Stop, argument: str, found: str, own: str = "") -> None:
    """Raise ArgumentError where a process works on the job besides the worker ``own``; to see it may take seconds."""
    watch, begun = Observer(folder.path), time.monotonic()
    while alive := [name for name in living(folder, watch) if name != own]:
        stop.check()
        moving = [name for name in alive if watch.was_seen_moving(name)]
        for name in moving or ():
            with suppress(FileNotFoundError):
                who = read_worker(folder.path, name)[0] or "another process"
                remedy = "Stop that first."
                raise ArgumentError(
                    argument, f"{found} for {folder.out}, which {who} computes", "a job at rest", remedy
                )
        if time.monotonic() - begun > STALE_S + 2 * BEAT_S:
            return
        time.sleep(POLL_S)


def living(folder: JobFolder, watch: Observer) -> Iterator[str]:
    """The workers that are not known to be gone."""
    for name in _names(folder):
        if (found := WORKER.fullmatch(name)) and not watch.is_gone(found[1]):
            yield found[1]
