"""Where partial states wait between the tasks that continue them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np

from ..block_statistics import BlockStatistics
from ..buffers import allocate
from ..errors import StorageError
from ..planner import Group, Plan
from ..ranges import Range
from ..storage import RawFile, reserve
from ..units import format_bytes
from ..wording import Choice
from .statefile import StateFile

# Gives memory for so many elements of a dtype.
Allocator = Callable[[int, str], Any]


class StateStore(Protocol):
    """States of the query ranges that one cover hands out, for one group of heads at a time."""

    @property
    def moved_bytes(self) -> int:
        """Bytes that were written to a file and read back."""

    def begin(self, group: Group) -> None:
        """Turn to ``group``, of which no row has seen a key but those whose states were saved."""

    def load(self, rows: Range) -> BlockStatistics:
        """The state of ``rows``, to be continued in place; an empty one at first."""

    def store(self, rows: Range, state: BlockStatistics) -> None:
        """Keep ``state``, which ``load`` gave."""

    def finished(self, rows: Range) -> None:
        """``rows`` were handed out: their state is no longer needed."""

    def save(self) -> None:
        """Write every state that has changed since the last time to the file of the job."""

    def close(self) -> None:
        """Release memory and files."""


class StateBlock:
    """Memory for the states of up to ``rows`` rows of ``heads`` heads: of each chunk acc, then m, then l."""

    def __init__(self, rows: int, heads: int, value_dim: int, dtype: str, take: Allocator = allocate) -> None:
        self._row_elements = heads * (value_dim + 2)
        self._flat = take(rows * self._row_elements, dtype)
        self._value_dim = value_dim

    def view(self, group: Group, rows: Range) -> tuple[BlockStatistics, Any]:
        """The state of a chunk, ``rows`` counted from the first of the block, and all of its memory as one array."""
        shape = (len(group.batch), len(group.heads), len(rows))
        count = int(np.prod(shape))
        begin = rows.start * self._row_elements
        flat = self._flat[begin : begin + count * (self._value_dim + 2)]
        acc, rest = flat[: count * self._value_dim], flat[count * self._value_dim :]
        m, normalizer = rest[:count], rest[count:]
        return BlockStatistics(acc.reshape(*shape, self._value_dim), m.reshape(shape), normalizer.reshape(shape)), flat


def _clear(state: BlockStatistics) -> None:
    """No row has seen a key; ``acc`` is left as it is, for kernels do not read it then."""
    state.m[...], state.l[...] = -np.inf, 0


class ResidentStates:
    """All rows of a group stay in memory; with ``home``, (B, H, Nq, Dv), their ``acc`` in the result's own memory."""

    moved_bytes = 0

    def __init__(
        self, rows: int, heads: int, value_dim: int, dtype: str, home: np.ndarray | None, file: StateFile | None = None
    ) -> None:
        self._block = StateBlock(rows, heads, 0 if home is not None else value_dim, dtype)
        self._home, self._file = home, file
        self._group: Group | None = None
        self._begun: set[Range] = set()
        self._changed: set[Range] = set()

    def begin(self, group: Group) -> None:
        self._group = group
        self._begun.clear()
        self._changed.clear()
        if self._file is not None:
            self._file.begin(group.index)

    def load(self, rows: Range) -> BlockStatistics:
        assert self._group is not None, "begin() comes first"
        state, flat = self._block.view(self._group, rows)
        if self._home is not None:
            part = (self._group.batch.slice, self._group.heads.slice, rows.slice)
            state = BlockStatistics(self._home[part], state.m, state.l)
        if rows not in self._begun:
            _begin(rows, state, flat, self._file)
            self._begun.add(rows)
        self._changed.add(rows)
        return state

    def store(self, rows: Range, state: BlockStatistics) -> None:
        """Nothing to do: ``state`` is the memory itself."""

    def finished(self, rows: Range) -> None:
        self._changed.discard(rows)

    def save(self) -> None:
        for rows in sorted(self._changed):
            assert self._file is not None
            assert self._group is not None, "begin() comes first"
            self._file.write(rows, (self._block.view(self._group, rows)[1],))
        self._changed.clear()

    def close(self) -> None:
        self._group = None


def _begin(rows: Range, state: BlockStatistics, flat: np.ndarray, file: StateFile | None) -> None:
    """The state of ``rows`` as it was saved, or an empty one."""
    if file is not None and file.rows_of(rows):
        file.read(rows, flat)
    else:
        _clear(state)


class TileStates:
    """One query tile stays while its keys pass, and is finished before the next one comes."""

    moved_bytes = 0

    def __init__(self, rows: int, heads: int, value_dim: int, dtype: str, file: StateFile | None = None) -> None:
        self._block = StateBlock(rows, heads, value_dim, dtype)
        self._file = file
        self._group: Group | None = None
        self._rows: Range | None = None

    def begin(self, group: Group) -> None:
        self._group, self._rows = group, None
        if self._file is not None:
            self._file.begin(group.index)

    def load(self, rows: Range) -> BlockStatistics:
        state, flat = self._view(rows)
        if rows != self._rows:
            _begin(rows, state, flat, self._file)
            self._rows = rows
        return state

    def store(self, rows: Range, state: BlockStatistics) -> None:
        """Nothing to do: ``state`` is the memory itself."""

    def finished(self, rows: Range) -> None:
        self._rows = None

    def save(self) -> None:
        if self._rows is not None:
            assert self._file is not None
            self._file.write(self._rows, (self._view(self._rows)[1],))

    def close(self) -> None:
        self._group = self._rows = None

    def _view(self, rows: Range) -> tuple[BlockStatistics, np.ndarray]:
        assert self._group is not None, "begin() comes first"
        return self._block.view(self._group, Range(0, len(rows)))


class FileStates:
    """States in a file, of the job or an unnamed scratch file; a new version goes beside the old one.

    The state in memory is one block, which ``take`` gives.
    """

    def __init__(self, file: StateFile, rows: int, heads: int, value_dim: int, dtype: str, take: Allocator = allocate):
        self._block = StateBlock(rows, heads, value_dim, dtype, take)
        self._file = file
        self._group: Group | None = None
        self._loaded: Range | None = None  # and not stored since

    @property
    def moved_bytes(self) -> int:
        return self._file.moved_bytes

    def begin(self, group: Group) -> None:
        self._group, self._loaded = group, None
        self._file.begin(group.index)

    def load(self, rows: Range) -> BlockStatistics:
        state, flat = self._view(rows)
        if rows != self._loaded:
            self._loaded = None
            _begin(rows, state, flat, self._file)
            self._loaded = rows
        return state

    def store(self, rows: Range, state: BlockStatistics) -> None:
        self._loaded = None
        self._file.write(rows, (self._view(rows)[1],))

    def finished(self, rows: Range) -> None:
        self._loaded = None

    def save(self) -> None:
        """Only what is in memory: the others are in the file."""
        if self._loaded is not None:
            self._file.write(self._loaded, (self._view(self._loaded)[1],))

    def close(self) -> None:
        self._file.close()

    def _view(self, rows: Range) -> tuple[BlockStatistics, np.ndarray]:
        assert self._group is not None, "begin() comes first"
        return self._block.view(self._group, Range(0, len(rows)))


def scratch_file(directory: str | None, rows: int, row_bytes: int) -> StateFile:
    """A file without a name, its space reserved: a full disk is met here and not in the middle.

    It lies in ``directory``, None for the system's temporary one. Raises StorageError.
    """
    if directory is None:
        directory = _temporary_directory()
    try:
        with ExitStack() as undo:
            descriptor = _unnamed_file(directory)
            undo.callback(os.close, descriptor)
            made = StateFile(RawFile.of_descriptor(descriptor, "scratch"), rows, row_bytes)
            reserve(descriptor, 0, made.size_bytes)
            undo.pop_all()
    except OSError as error:
        size = format_bytes(2 * rows * row_bytes)
        raise StorageError(
            Choice("scratch"),
            f": cannot reserve {size} for states in {directory}: {error.strerror}. Name a directory"
            " with that much room, or raise ",
            Choice("memory"),
            " so that states stay there.",
        ) from error
    return made


def _temporary_directory() -> str:
    try:
        return tempfile.gettempdir()
    except OSError as error:
        raise StorageError(
            f"scratch: the states do not fit in memory, and no temporary directory can be written ({error.strerror})."
            " Name a directory that can, or raise memory so that states stay there."
        ) from error


def _unnamed_file(directory: str) -> int:
    """Descriptor of a new file that has no name, or has one for a moment where the file system cannot do without."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    descriptor, path = tempfile.mkstemp(dir=directory, prefix="cqsa-states-")
    os.unlink(path)
    return descriptor


def states_on_disk(plan: Plan, file: StateFile | None, take: Allocator = allocate) -> FileStates:
    """The states of a plan that keeps them in a file: the job's, or a scratch file of its own."""
    chosen, problem = plan.chosen, plan.problem
    heads, dim, dtype = chosen.batches * chosen.heads, problem.value_dim, problem.compute_dtype
    if file is None:
        row_bytes = heads * (dim + 2) * problem.compute_itemsize
        file = scratch_file(plan.budget.scratch, problem.query_tokens, row_bytes)
    return FileStates(file, chosen.residency.query_chunk, heads, dim, dtype, take)


def open_states(plan: Plan, home: np.ndarray | None, file: StateFile | None) -> StateStore:
    """The store that ``plan`` asks for on the CPU; ``home`` as in ``ResidentStates``, ``file`` that of a job."""
    chosen, problem = plan.chosen, plan.problem
    heads, dim, dtype = chosen.batches * chosen.heads, problem.value_dim, problem.compute_dtype
    if chosen.states_on_disk:
        return states_on_disk(plan, file)
    if chosen.cover == "rectangular":
        return TileStates(chosen.residency.query_chunk, heads, dim, dtype, file)
    return ResidentStates(problem.query_tokens, heads, dim, dtype, home, file)
