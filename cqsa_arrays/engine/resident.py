"""Everything of a run that holds memory: where blocks and states are, and the kernel that computes on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ..block_statistics import BlockStatistics
from ..cover import Step
from ..kernels.base import Kernel, KeyBlock
from ..planner import Group, Problem
from ..ranges import Range
from ..storage import TokenSource
from . import ahead
from .pages import Pages
from .results import Results
from .schedule import Work
from .states import StateStore


@dataclass(frozen=True, slots=True)
class Inputs:
    """The three sources of one problem."""

    q: TokenSource
    k: TokenSource
    v: TokenSource


class Blocks(ahead.Blocks, Protocol):
    """The resident blocks of one input; see ``Pages`` and ``cuda.pages.DevicePages``."""

    def begin(self, group: Group) -> None:
        """Serve the heads of ``group`` from now on."""

    def load(self, tokens: Range) -> Any:
        """The block (batch, heads, tokens, dim) of the group."""


AnyBlocks = TypeVar("AnyBlocks", bound=Blocks)


@dataclass(frozen=True, slots=True)
class Operands(Generic[AnyBlocks]):
    """The resident blocks of all three inputs."""

    queries: AnyBlocks
    keys: AnyBlocks
    values: AnyBlocks

    def __iter__(self) -> Iterator[AnyBlocks]:
        return iter((self.queries, self.keys, self.values))

    def begin(self, group: Group) -> None:
        """Serve the heads of ``group`` from now on."""
        for blocks in self:
            blocks.begin(group)

    def load(self, step: Step) -> tuple[Any, list[KeyBlock]]:
        """The blocks of ``step``, read unless they are resident."""
        queries = self.queries.load(step.queries)
        return queries, [KeyBlock(r.start, self.keys.load(r), self.values.load(r)) for r in step.keys]

    def of(self, step: Step) -> Iterator[tuple[AnyBlocks, Range]]:
        """Every block of ``step``, with the input whose it is."""
        yield self.queries, step.queries
        for tokens in step.keys:
            yield self.keys, tokens
            yield self.values, tokens


class Resident(Protocol):
    """What ``executor.run`` works with: everything of a run that holds memory, on the CPU or a GPU."""

    @property
    def operands(self) -> Operands[Any]:
        """The blocks that are here."""

    @property
    def read_ahead_bytes(self) -> int | None:
        """How far blocks are read ahead beyond the next step; None where no input is read from a disk."""

    @property
    def states(self) -> MovedStates:
        """The partial states."""

    def begin(self, group: Group) -> None:
        """Turn to another group of heads."""

    def attend(
        self, work: Work, queries: Any, blocks: list[KeyBlock], done: Callable[[Range], None], upcoming: Work | None
    ) -> None:
        """Merge the statistics of the rows of ``work`` against its key ranges, loaded last, into their state.

        Where blocks are computed on in another memory, those of ``upcoming`` begin to be brought there.
        """

    def catch_up(self) -> bool:
        """Return once the part that was put under way first is done; False where none is under way."""

    def take(self, group: Group, rows: Range, *, in_place: bool) -> None:
        """Hand out ``rows``, which are finished."""

    def settle(self) -> None:
        """Return once everything put under way is computed and the rows handed out are written."""

    def save(self) -> None:
        """Write the states that have changed to the file of the job; ``settle`` comes first."""

    def drain(self) -> None:
        """Wait for work that is under way."""


class MovedStates(Protocol):
    """Counts what it moves."""

    @property
    def moved_bytes(self) -> int:
        """Bytes of states that went elsewhere and came back."""


@dataclass(frozen=True, slots=True)
class HostResident:
    """``Resident`` on the CPU: work is done when a call returns."""

    kernel: Kernel
    operands: Operands[Pages]
    states: StateStore
    results: Results
    problem: Problem
    read_ahead_bytes: int = 0

    def begin(self, group: Group) -> None:
        self.operands.begin(group)
        self.states.begin(group)

    def attend(
        self, work: Work, queries: Any, blocks: list[KeyBlock], done: Callable[[Range], None], upcoming: Work | None
    ) -> None:
        step = work.step
        assert step is not None
        state = self.states.load(step.queries)
        rows = slice(work.rows.start - step.queries.start, work.rows.stop - step.queries.start)
        part = BlockStatistics(state.acc[:, :, rows], state.m[:, :, rows], state.l[:, :, rows])
        self.kernel.accumulate(
            queries[:, :, rows], work.rows.start, blocks, part,
            diagonal=self.problem.mask.diagonal, scale=self.problem.scale, done=done,
        )  # fmt: skip
        if work.ends_step:
            self.states.store(step.queries, state)

    def catch_up(self) -> bool:
        return False

    def take(self, group: Group, rows: Range, *, in_place: bool) -> None:
        self.results.take(group, rows, self.states.load(rows), in_place=in_place)
        self.states.finished(rows)

    def settle(self) -> None:
        """Nothing to do."""

    def save(self) -> None:
        self.states.save()

    def drain(self) -> None:
        """Nothing to do."""
