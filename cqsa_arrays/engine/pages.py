"""Resident blocks of one input: read into a fixed number of slots, or used where they lie."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from ..buffers import allocate
from ..planner import Group
from ..ranges import Range
from ..storage import TokenSource


def block_bytes(source: TokenSource, group: Group, tokens: Range) -> int:
    """Bytes of a block of ``source``."""
    return len(group.batch) * len(group.heads) * len(tokens) * source.shape[3] * source.dtype.itemsize


class Pages:
    """The blocks of ``source`` that are in memory: at most ``slots`` of at most ``tokens`` tokens of ``heads`` heads.

    A block that is resident already is not read again; the one used longest ago gives way. An array that can be used in
    place takes no memory here.
    """

    def __init__(self, source: TokenSource, *, slots: int, tokens: int, heads: int, dtype: str) -> None:
        self._source = source
        self._resident: OrderedDict[Range, int] = OrderedDict()
        self._free = list(range(slots))
        self._group: Group | None = None
        self._slots = allocate((0 if source.in_place else slots, heads * tokens * source.shape[3]), dtype)

    def begin(self, group: Group) -> None:
        """Serve the heads of ``group`` from now on."""
        self._group = group
        self._free += self._resident.values()
        self._resident.clear()

    def load(self, tokens: Range) -> np.ndarray:
        """The block (batch, heads, tokens, dim) of the group; valid until ``slots`` other blocks were loaded."""
        group = self._current
        if self._source.in_place:
            return self._source.view(group.batch, group.heads, tokens)
        if tokens in self._resident:
            self._resident.move_to_end(tokens)
            return self._block(self._resident[tokens], tokens)
        slot = self._free.pop() if self._free else self._resident.popitem(last=False)[1]
        try:
            block = self._block(slot, tokens)
            self._source.read(group.batch, group.heads, tokens, block)
        except BaseException:
            self._free.append(slot)  # half read: never to be taken for resident
            raise
        self._resident[tokens] = slot
        return block

    def holds(self, group: Group, tokens: Range) -> bool:
        """Whether a block is where it is needed, so that reading ahead has no use."""
        return self._source.in_place or (group == self._group and tokens in self._resident)

    def prefetch(self, group: Group, tokens: Range) -> Iterator[None]:
        """Have the system read a block ahead into its page cache, some at each turn; for another thread."""
        return self._source.prefetch(group.batch, group.heads, tokens)

    def size_bytes(self, group: Group, tokens: Range) -> int:
        """Bytes of a block where it is read."""
        return block_bytes(self._source, group, tokens)

    @property
    def _current(self) -> Group:
        assert self._group is not None, "begin() comes first"
        return self._group

    def _block(self, slot: int, tokens: Range) -> np.ndarray:
        """The slot's memory as a block, tokens outside heads where the file has them so: its reads stay long runs."""
        batch, heads = len(self._current.batch), len(self._current.heads)
        dim = self._source.shape[3]
        flat = self._slots[slot, : batch * heads * len(tokens) * dim]
        if self._source.token_major:
            return flat.reshape(batch, len(tokens), heads, dim).swapaxes(1, 2)
        return flat.reshape(batch, heads, len(tokens), dim)
