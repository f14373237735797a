"""Durable jobs, named by the file that they write: how far one is, and going on with it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from .arguments import check_depth
from .durable import JobFolder, JobStatus, finished_status, remove_remains
from .durable import status as unfinished_status
from .errors import ArgumentError, StorageError
from .job import prepared
from .options import Options
from .resumable import attend, resumed
from .storage import JOB_SUFFIX, PART_SUFFIX, DiskArray, dataset_in, target_of
from .units import parse_seconds


def status(out: str | os.PathLike[str]) -> JobStatus:
    """How far the job that writes the file ``out`` is, whether or not a process works on it; nothing is changed.

    Returns a JobStatus: ``state`` is "running", "stopped" or "finished", ``share`` what is done of the whole (0 to 1),
    ``left_s`` the seconds that are left; ``print`` shows it, ``to_json()`` gives it as JSON. Raises ArgumentError where
    ``out`` is neither the output of a job nor of an unfinished one, StorageError where a file cannot be read.

    >>> cqsa.status("out.h5")                                         # doctest: +SKIP
    <JobStatus 'out.h5': 37.50% done, running>
    """
    path = _output_path(out)
    folder = JobFolder(path)
    while True:  # it may be begun, and finished, meanwhile
        if folder.exists:
            try:
                return unfinished_status(path)
            except (ArgumentError, StorageError):
                if folder.exists:
                    raise
        if os.path.exists(path):
            return finished_status(path)
        folder.require()  # says what is missing


def resume(
    out: str | os.PathLike[str],
    *,
    device: str | None = None,
    memory: int | str | None = None,
    max_time: float | str | None = None,
    progress: bool = False,
    check_inputs: str = "sampled",
    q: Any = None,
    k: Any = None,
    v: Any = None,
) -> DiskArray:
    """Go on with the unfinished job that writes the file ``out``, from what it committed last.

    Everything else is as the job was begun with. ``device`` ("cpu", "cuda", ...) moves it to another device, from where
    on its bits are those of that device; ``memory`` is another budget; ``max_time`` stops it after so many seconds, or
    text such as "8h", with everything committed; ``progress`` shows a bar.

    The inputs are looked for where they were as seen from the output, then where they were given as seen from the
    working directory; ``q``, ``k`` and ``v`` ("file.h5:/q" or arrays of ``cqsa.open``) say where one is now. What they
    hold must be what it was, by the hash of sampled blocks that the job has, or with ``check_inputs="full"`` by that of
    everything (``Options.check_inputs``); times and names do not matter.

    Returns the data set /out, (batch, heads, Nq, Dv) in the job's layout, as ``attention`` does; also where the job is
    finished already. Raises JobStopped where ``max_time`` ends it (another call goes on from there), JobBusyError where
    other processes compute what is left, ArgumentError where there is no such job, or its inputs were arrays in memory
    (make the call again that began it), BudgetError, StorageError and DeviceError as ``attention`` does.

    >>> out = cqsa.resume("out.h5", max_time="8h", progress=True)     # doctest: +SKIP
    """
    path = _output_path(out)
    limit_s = None if max_time is None else parse_seconds(max_time, "max_time")
    check_depth(check_inputs)
    options = Options(durable=True, progress=progress, max_time_s=limit_s, check_inputs=check_inputs)
    named = {"q": q, "k": k, "v": v}
    if finished(path) is None:
        try:
            with prepared(resumed(path, device=device, memory=memory, options=options, named=named)) as job:
                output: DiskArray = attend(job)[0]
                return output
        except (ArgumentError, StorageError):
            if finished(path) is None:  # else by another process, meanwhile
                raise
    return dataset_in(path, "/out", argument="out")


def finished(out: str | os.PathLike[str]) -> JobStatus | None:
    """As ``status``, of a job that is finished; None of one that is not, or where there is no such file.

    Raises ArgumentError where no job has written the file. What runs have left that were killed at its very end is
    removed.
    """
    path = _output_path(out)
    folder = JobFolder(path)
    if folder.exists or not os.path.exists(path):
        return None
    found = status(path)
    if not found.finished:
        return None
    with suppress(OSError):  # on a disk that cannot be written to
        remove_remains(folder)
    return found


def _output_path(out: str | os.PathLike[str]) -> str:
    """``out`` as text; ArgumentError for what is no path, or one of the job's own files."""
    try:
        path = os.fsdecode(out)
    except TypeError:
        found, remedy = f"type {type(out).__name__}", 'Name the file that the job writes, such as "out.h5".'
        raise ArgumentError("out", found, "a path", remedy) from None
    for suffix in (JOB_SUFFIX, PART_SUFFIX):
        own = path.rstrip(os.sep)
        if own.endswith(suffix) and JobFolder(own.removesuffix(suffix)).exists:
            remedy = f"Name {own.removesuffix(suffix)!r}."
            raise ArgumentError("out", repr(path), "the file that the job writes, not what it keeps beside it", remedy)
    return target_of(path)
