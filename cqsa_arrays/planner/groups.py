"""The groups of heads of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from ..ranges import Range


@dataclass(frozen=True, slots=True)
class Group:
    """Heads that go through the cover together; ``index`` is its place among the groups of a plan."""

    batch: Range
    heads: Range
    index: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Groups(Sequence[Group]):
    """``batch`` x ``heads`` cut into groups of at most ``batches`` x ``together``, in the order in which they run.

    They are computed from their index, never listed: there may be millions.
    """

    batch: int
    batches: int
    heads: int
    together: int

    def __len__(self) -> int:
        return -(-self.batch // self.batches) * self._across

    @property
    def _across(self) -> int:
        return -(-self.heads // self.together)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | Sequence[Group]:
        if isinstance(index, slice):
            return tuple(map(self.__getitem__, range(*index.indices(len(self)))))
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch, head = (index // self._across) * self.batches, (index % self._across) * self.together
        heads = Range(head, min(head + self.together, self.heads))
        return Group(Range(batch, min(batch + self.batches, self.batch)), heads, index)
