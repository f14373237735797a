"""The rarer choices, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Rarer choices of ``attention``, ``statistics`` and ``plan``; the defaults suit almost everybody.

    ``host_memory``: bytes or text such as "2GiB" that bound the host; on the CPU the smaller of it and ``memory``
    counts. ``scratch``: the directory for partial states that do not fit in memory (default: that of the output file,
    else the system's temporary directory). ``cover``: "auto", "cqs" or "rectangular". ``chunks``: the number of chunks
    of the CQS cover (default: the smallest with a perfect difference set that fits). ``threads``: default is every
    processor that this process may use; a plan gives the same bits for any number, but under a tight budget the memory
    of more threads can lead to another plan. ``overwrite``: whether an existing output file may be replaced.
    ``follow_links``: whether external links in input files are followed beyond the folder of the file that was named.
    ``locking``: h5py's, for files that are named: None for HDF5's own choice, True, "best-effort", or False for disks
    that have no locks; an output and the record of a job remember it for ``verify`` and ``resume``.
    ``check_inputs``: how a job and its output know their inputs. "sampled" takes a hash of 64 blocks of 16 tokens,
    spread over all of an input: it notices every change of the file's size, and what touches one of the blocks. "full"
    takes one of everything, too, which reads all of the inputs once more: it notices every change.
    ``progress``: show a progress bar on standard error where that is a terminal or a notebook, else a line a minute.

    ``durable`` (needs ``out`` to be a path): what is done is committed in the folder ``out + ".job"``, and after any
    interruption the same call goes on from there, or finds all done. ``lanes``: so many shares of the work, which
    several processes may compute at once; they are part of the plan, and belong to a durable job. ``checkpoint_s``:
    seconds between commits, or text such as "10min" (default: as often as costs 3 % of the time at most).
    ``max_time_s``: stop so many seconds after the beginning of the call, with everything committed, by JobStopped.
    ``restart``: drop an unfinished job of this output and begin anew. Ctrl-C commits what is done first, too; a second
    one does not wait for that.
    """

    host_memory: int | str | None = None
    scratch: str | os.PathLike[str] | None = None
    cover: str = "auto"
    chunks: int | None = None
    threads: int | None = None
    overwrite: bool = False
    follow_links: bool = False
    locking: bool | str | None = None
    progress: bool = False
    durable: bool = False
    lanes: int = 1
    checkpoint_s: float | str | None = None
    max_time_s: float | str | None = None
    restart: bool = False
    check_inputs: str = "sampled"

    def __repr__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Options({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"
