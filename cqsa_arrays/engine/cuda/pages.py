"""Resident blocks of one input on a GPU: copied into a fixed number of slots, or used where they lie."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from ...planner import Group
from ...ranges import Range
from ...storage import DeviceSource, TokenSource
from ...workers import Workers
from .memory import Arena, PinnedPieces


@dataclass(frozen=True, slots=True)
class Link:
    """What brings blocks to the device: reader threads, page-locked pieces, a stream for copies beside ``compute``."""

    device: cupy.cuda.Device
    arena: Arena
    pieces: PinnedPieces | None
    readers: Workers
    copies: cupy.cuda.Stream
    compute: cupy.cuda.Stream


@dataclass(slots=True)
class Slot:
    """Memory for one block; the events come when it has arrived, and when the kernels that read it are done."""

    memory: Any
    arrived: cupy.cuda.Event
    used: dict[int, cupy.cuda.Event] = field(default_factory=dict)  # by stream


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a block: its place in the source, and the first byte and the shape that it has in the slot."""

    batch: Range
    heads: Range
    tokens: Range
    offset: int
    shape: tuple[int, int, int]  # as it lies in the slot: (heads, tokens, dim), or (tokens, heads, dim)


class DevicePages:
    """The blocks of ``source`` on the device: at most ``slots`` of at most ``tokens`` tokens of ``heads`` heads.

    ``load`` returns at once with a block that is still on its way: a stream that reads it waits by ``await_loaded``. A
    slot is not overwritten before the kernels that were launched before ``release`` have read it.
    """

    def __init__(self, source: TokenSource, link: Link, *, slots: int, tokens: int, heads: int) -> None:
        self._source, self._link = source, link
        self._in_place = isinstance(source, DeviceSource)
        self._resident: OrderedDict[tuple[Group, Range], Slot] = OrderedDict()
        self._touched: list[Slot] = []
        self._group: Group | None = None
        count = 0 if self._in_place else slots
        elements = link.arena.take((count, heads * tokens * source.shape[3]), source.dtype) if count else ()
        self._free = [Slot(memory, cupy.cuda.Event(disable_timing=True)) for memory in elements]

    def begin(self, group: Group) -> None:
        """Serve the heads of ``group`` from now on; blocks of another one give way when their slots are needed."""
        self._group = group

    def load(self, tokens: Range) -> Any:
        """The block (batch, heads, tokens, dim) of the group; valid until ``slots`` other blocks were loaded."""
        group = self._current
        if self._in_place:
            return self._source.view(group.batch, group.heads, tokens)
        slot = self._bring(group, tokens)
        self._touched.append(slot)
        return self._block(slot, group, tokens)

    def preload(self, group: Group, tokens: Range) -> None:
        """Have a block copied that is loaded next, unless it is here."""
        if not self._in_place:
            self._bring(group, tokens)

    def _bring(self, group: Group, tokens: Range) -> Slot:
        slot = self._resident.pop((group, tokens), None)
        if slot is None:
            slot = self._free.pop() if self._free else self._resident.popitem(last=False)[1]
            self._fill(slot, group, tokens)
        self._resident[group, tokens] = slot
        return slot

    def await_loaded(self, stream: cupy.cuda.Stream) -> None:
        """What is put on ``stream`` from now on comes after the blocks loaded since the last ``release``."""
        for slot in self._touched:
            stream.wait_event(slot.arrived)

    def release(self, stream: cupy.cuda.Stream) -> None:
        """The kernels that read those blocks are on ``stream``."""
        for slot in self._touched:
            slot.used[stream.ptr] = stream.record()
        self._touched.clear()

    def prefetch(self, group: Group, tokens: Range) -> None:
        """Ask the system to read a block ahead into the page cache, unless it is resident; for another thread."""
        if not self._in_place and (group, tokens) not in self._resident:
            self._source.prefetch(group.batch, group.heads, tokens)

    @property
    def _current(self) -> Group:
        assert self._group is not None, "begin() comes first"
        return self._group

    def _fill(self, slot: Slot, group: Group, tokens: Range) -> None:
        """Read the block by several threads, piece by piece, each piece copied as soon as it is read."""
        link, base = self._link, slot.memory.data.ptr
        pieces = link.pieces
        assert pieces is not None, "an input that is not on the device comes in pieces"
        for event in slot.used.values():
            link.copies.wait_event(event)
        slot.used.clear()

        def bring(part: Part) -> None:
            with link.device:
                piece = pieces.borrow()
                try:
                    size_bytes = int(np.prod(part.shape)) * self._source.dtype.itemsize
                    lying = piece.memory[:size_bytes].view(self._source.dtype).reshape(part.shape)
                    logical = lying.swapaxes(0, 1) if self._source.token_major else lying
                    self._source.read(part.batch, part.heads, part.tokens, logical[None])
                    to_device = runtime.memcpyHostToDevice
                    runtime.memcpyAsync(base + part.offset, lying.ctypes.data, size_bytes, to_device, link.copies.ptr)
                    piece.done.record(link.copies)
                finally:
                    pieces.give_back(piece)

        link.readers.run(self._parts(group, tokens, pieces.size_bytes), bring)
        slot.arrived.record(link.copies)

    def _parts(self, group: Group, tokens: Range, most_bytes: int) -> Iterator[Part]:
        """The pieces of a block, each of which is contiguous in the slot."""
        dim, itemsize = self._source.shape[3], self._source.dtype.itemsize
        together = len(group.heads) if self._source.token_major else 1
        row_bytes = together * dim * itemsize
        offset = 0
        for batch in group.batch.split(1):
            for heads in group.heads.split(together):
                for part in tokens.split(max(1, most_bytes // row_bytes)):
                    lengths = (len(part), together) if self._source.token_major else (together, len(part))
                    yield Part(batch, heads, part, offset, (*lengths, dim))
                    offset += len(part) * row_bytes

    def _block(self, slot: Slot, group: Group, tokens: Range) -> Any:
        """The slot's memory as a block, tokens outside heads where the source has them so."""
        batch, heads = len(group.batch), len(group.heads)
        dim = self._source.shape[3]
        flat = slot.memory[: batch * heads * len(tokens) * dim]
        if self._source.token_major:
            return flat.reshape(batch, len(tokens), heads, dim).swapaxes(1, 2)
        return flat.reshape(batch, heads, len(tokens), dim)
