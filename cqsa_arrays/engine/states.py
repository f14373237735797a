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
from ..ranges import Cut, Range
from ..storage import reserve
from ..units import format_bytes

# Gives memory for so many elements of a dtype.
Allocator = Callable[[int, str], Any]


class StateStore(Protocol):
    """States of the query ranges that one cover hands out, for one group of heads at a time."""

    moved_bytes: int

    def begin(self, group: Group) -> None:
        """Forget everything: no row of ``group`` has seen a key."""

    def load(self, rows: Range) -> BlockStatistics:
        """The state of ``rows``, to be continued in place; an empty one at first."""

    def store(self, rows: Range, state: BlockStatistics) -> None:
        """Keep ``state``, which ``load`` gave."""

    def close(self) -> None:
        """Release memory and files."""


class _Block:
    """Memory for the state of up to ``rows`` rows of ``heads`` heads: one buffer, cut into acc, m and l."""

    def __init__(self, rows: int, heads: int, value_dim: int, dtype: str, take: Allocator = allocate) -> None:
        self._flat = take(rows * heads * (value_dim + 2), dtype)
        self._value_dim = value_dim

    def view(self, group: Group, rows: int) -> tuple[BlockStatistics, Any]:
        """The state of ``rows`` rows, and all of its memory as one array."""
        shape = (len(group.batch), len(group.heads), rows)
        count = int(np.prod(shape))
        flat = self._flat[: count * (self._value_dim + 2)]
        acc, rest = flat[: count * self._value_dim], flat[count * self._value_dim :]
        m, normalizer = rest[:count], rest[count:]
        return BlockStatistics(acc.reshape(*shape, self._value_dim), m.reshape(shape), normalizer.reshape(shape)), flat


def _clear(state: BlockStatistics) -> None:
    """No row has seen a key; ``acc`` is left as it is, for kernels do not read it then."""
    state.m[...], state.l[...] = -np.inf, 0


class ResidentStates:
    """All rows of a group stay in memory; with ``home``, (B, H, Nq, Dv), their ``acc`` in the result's own memory."""

    moved_bytes = 0

    def __init__(self, rows: int, heads: int, value_dim: int, dtype: str, home: np.ndarray | None) -> None:
        self._block = _Block(rows, heads, 0 if home is not None else value_dim, dtype)
        self._rows, self._home = rows, home
        self._state: BlockStatistics | None = None

    def begin(self, group: Group) -> None:
        state, _ = self._block.view(group, self._rows)
        if self._home is not None:
            state = BlockStatistics(self._home[group.batch.slice, group.heads.slice], state.m, state.l)
        _clear(state)
        self._state = state

    def load(self, rows: Range) -> BlockStatistics:
        assert self._state is not None, "begin() comes first"
        part = (slice(None), slice(None), rows.slice)
        return BlockStatistics(self._state.acc[part], self._state.m[part], self._state.l[part])

    def store(self, rows: Range, state: BlockStatistics) -> None:
        """Nothing to do: ``state`` is the memory itself."""

    def close(self) -> None:
        self._state = None


class TileStates:
    """One query tile stays while its keys pass, and is finished before the next one comes."""

    moved_bytes = 0

    def __init__(self, rows: int, heads: int, value_dim: int, dtype: str) -> None:
        self._block = _Block(rows, heads, value_dim, dtype)
        self._group: Group | None = None
        self._rows: Range | None = None

    def begin(self, group: Group) -> None:
        self._group, self._rows = group, None

    def load(self, rows: Range) -> BlockStatistics:
        assert self._group is not None, "begin() comes first"
        state, _ = self._block.view(self._group, len(rows))
        if rows != self._rows:
            _clear(state)
            self._rows = rows
        return state

    def store(self, rows: Range, state: BlockStatistics) -> None:
        """Nothing to do: ``state`` is the memory itself."""

    def close(self) -> None:
        self._group = self._rows = None


class FileStates:
    """States in an unnamed scratch file, two slots each: a new version goes beside the old, then becomes current.

    The state in memory is one block, which ``take`` gives.
    """

    def __init__(
        self, queries: Cut, heads: int, value_dim: int, dtype: str, directory: str, take: Allocator = allocate
    ) -> None:
        self._block = _Block(queries.longest, heads, value_dim, dtype, take)
        self._queries = queries
        self._row_bytes = heads * (value_dim + 2) * np.dtype(dtype).itemsize
        # Per chunk: 0 before its first version, else 1 + the slot that is current.
        self._current = np.zeros(len(queries), np.uint8)
        self._group: Group | None = None
        self._file = self._reserved(directory, 2 * queries.tokens * self._row_bytes)
        self.moved_bytes = 0

    @staticmethod
    def _reserved(directory: str, size_bytes: int) -> int:
        """Descriptor of a file without a name, its space reserved: a full disk is met here and not in the middle."""
        try:
            with ExitStack() as undo:
                descriptor = _unnamed_file(directory)
                undo.callback(os.close, descriptor)
                reserve(descriptor, 0, size_bytes)
                undo.pop_all()
        except OSError as error:
            raise StorageError(
                f"scratch: cannot reserve {format_bytes(size_bytes)} for states in {directory}: {error.strerror}."
                " Name a directory with that much room, or raise memory so that states stay there."
            ) from error
        return descriptor

    def begin(self, group: Group) -> None:
        self._group = group
        self._current[:] = 0

    def load(self, rows: Range) -> BlockStatistics:
        assert self._group is not None, "begin() comes first"
        state, flat = self._block.view(self._group, len(rows))
        if self._current[self._queries.index_of(rows)] == 0:
            _clear(state)
        else:
            self.read(rows, flat)
        return state

    def store(self, rows: Range, state: BlockStatistics) -> None:
        assert self._group is not None, "begin() comes first"
        self.write(rows, self._block.view(self._group, len(rows))[1])

    def read(self, rows: Range, flat: np.ndarray) -> None:
        """Fill ``flat`` with the current version of ``rows``, of which there is one."""
        current = int(self._current[self._queries.index_of(rows)])
        self._transfer(os.preadv, flat, self._position(rows, current - 1))

    def write(self, rows: Range, flat: np.ndarray) -> None:
        """Make ``flat`` the current version of ``rows``."""
        index = self._queries.index_of(rows)
        slot = 0 if self._current[index] == 2 else 1
        self._transfer(os.pwritev, flat, self._position(rows, slot))
        self._current[index] = 1 + slot

    def close(self) -> None:
        os.close(self._file)

    def _position(self, rows: Range, slot: int) -> int:
        return (slot * self._queries.tokens + rows.start) * self._row_bytes

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], flat: np.ndarray, position: int) -> None:
        """All of ``flat`` by positioned reads or writes, which may each move less than asked."""
        view = flat.view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                moved = call(self._file, [view[done:]], position + done)
            except OSError as error:
                raise StorageError(f"scratch: states cannot be read or written: {error.strerror}.") from error
            if moved <= 0:
                raise StorageError("scratch: the file of states ended early; it was changed from outside.")
            done += moved
        self.moved_bytes += done


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


def open_states(plan: Plan, home: np.ndarray | None) -> StateStore:
    """The store that ``plan`` asks for on the CPU; ``home`` as in ``ResidentStates``."""
    chosen, problem = plan.chosen, plan.problem
    heads, dim, dtype = chosen.batches * chosen.heads, problem.value_dim, problem.compute_dtype
    if chosen.states_on_disk:
        return FileStates(plan.build_cover().queries, heads, dim, dtype, plan.budget.scratch)
    if chosen.cover == "rectangular":
        return TileStates(chosen.residency.query_chunk, heads, dim, dtype)
    return ResidentStates(problem.query_tokens, heads, dim, dtype, home)
