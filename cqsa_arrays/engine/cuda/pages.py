"""Resident blocks of one input on a GPU: copied into a fixed number of slots, or used where they lie."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from ...planner import Group
from ...ranges import Range
from ...storage import DeviceSource, HostSource, TokenSource
from ..pages import block_bytes
from .link import Link, Slot
from .memory import Arena
from .transfer import Region

# A part of any size: more than there are.
_ANY_BYTES = 1 << 62


class Access(Enum):
    """How the device comes by the blocks of a source."""

    IN_PLACE = "it is there"
    LOCKED = "the device copies them from page-locked memory by itself"
    SENT = "they are copied to page-locked pieces in compiled code"
    READ = "Python reads them to page-locked pieces"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a block: its place in the source, and where it lies in the slot, without gaps."""

    batch: Range
    heads: Range
    tokens: Range
    offset_bytes: int


class DevicePages:
    """The blocks of ``source`` on the device: at most ``slots`` of at most ``tokens`` tokens of ``heads`` heads.

    ``access`` is how they come there.
    ``load`` gives the place of a block, which still is on its way: a stream that reads it waits by ``await_loaded``.
    A slot is not overwritten before the kernels that were launched before ``release`` have read it.
    """

    def __init__(
        self, source: TokenSource, access: Access, link: Link, arena: Arena, *, slots: int, tokens: int, heads: int
    ) -> None:
        self._source, self._access, self._link = source, access, link
        self._in_place = access is Access.IN_PLACE
        self._resident: OrderedDict[tuple[Group, Range], Slot] = OrderedDict()
        self._touched: list[Slot] = []
        self._group: Group | None = None
        # Every block has the strides of the longest: one launch takes several.
        self._tokens, self._heads = tokens, heads
        count = 0 if self._in_place else slots
        elements = arena.take((count, heads * tokens * source.shape[3]), source.dtype) if count else ()
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
        """Have a block brought that is loaded next, unless only blocks could give way that are to be read first."""
        if not self._in_place and self._has_room(group, tokens):
            self._bring(group, tokens)

    def _has_room(self, group: Group, tokens: Range) -> bool:
        return bool(self._free) or (group, tokens) in self._resident or self._oldest not in self._touched

    @property
    def _oldest(self) -> Slot:
        """The slot that gives way next."""
        return next(iter(self._resident.values()))

    def _bring(self, group: Group, tokens: Range) -> Slot:
        slot = self._resident.pop((group, tokens), None)
        if slot is None:
            slot = self._free.pop() if self._free else self._resident.popitem(last=False)[1]
            assert slot not in self._touched, "more blocks at once than slots"
            self._fill(slot, group, tokens)
        self._resident[group, tokens] = slot
        return slot

    def await_loaded(self, stream: cupy.cuda.Stream) -> None:
        """What is put on ``stream`` from now on comes after the blocks loaded since the last ``release``.

        Returns when these are read; an error of the reading is raised.
        """
        for slot in self._touched:
            slot.await_on(stream)

    def release(self, stream: cupy.cuda.Stream, used: cupy.cuda.Event) -> None:
        """The kernels that read those blocks are on ``stream``, before the event ``used``."""
        for slot in self._touched:
            slot.used[stream.ptr] = used
        self._touched.clear()

    def holds(self, group: Group, tokens: Range) -> bool:
        """Whether a block is where it is needed, or on its way there, or in memory at least."""
        return self._in_place or isinstance(self._source, HostSource) or (group, tokens) in self._resident

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

    def _fill(self, slot: Slot, group: Group, tokens: Range) -> None:
        """Ask for the block; from page-locked memory the device copies it by itself."""
        slot.await_coming()
        used, slot.used = tuple(slot.used.values()), {}
        slot.awaited_on.clear()
        link = self._link
        if self._access is Access.LOCKED:
            for event in used:
                link.copies.wait_event(event)
            for part in self._parts(group, tokens, link.pieces.size_bytes):
                self._copy_locked(slot, part)
            slot.arrived.record(link.copies)
        elif self._access is Access.SENT:
            link.ask(slot, used, [self._region(slot, part) for part in self._parts(group, tokens, _ANY_BYTES)])
        else:
            link.read(slot, self._parts(group, tokens, link.pieces.size_bytes), partial(self._read, slot, used))

    def _region(self, slot: Slot, part: Part) -> Region:
        """A part of an array of the host."""
        assert isinstance(self._source, HostSource)
        block = self._source.array[part.batch.start, part.heads.slice, part.tokens.slice]
        self._source.bytes_read += block.nbytes
        block = block.swapaxes(0, 1) if self._source.token_major else block
        return Region(block, slot.memory.data.ptr + part.offset_bytes)

    def _read(self, slot: Slot, used: tuple[cupy.cuda.Event, ...], part: Part) -> None:
        """Read a part into a page-locked piece, which is copied from there after ``used``; by any thread."""
        link, source = self._link, self._source
        shape = (len(part.heads), len(part.tokens), source.shape[3])
        with link.device:
            piece = link.pieces.borrow()
            try:
                piece.wait()
                size_bytes = int(np.prod(shape)) * source.dtype.itemsize
                lying = piece.memory[:size_bytes].view(source.dtype)
                if source.token_major:
                    logical = lying.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1)
                else:
                    logical = lying.reshape(shape)
                source.read(part.batch, part.heads, part.tokens, logical[None])
                to, kind = slot.memory.data.ptr + part.offset_bytes, runtime.memcpyHostToDevice
                for event in used:  # each part: any may be the first
                    link.copies.wait_event(event)
                runtime.memcpyAsync(to, lying.ctypes.data, size_bytes, kind, link.copies.ptr)
                piece.done[0].record(link.copies)
            finally:
                link.pieces.give_back(piece)

    def _copy_locked(self, slot: Slot, part: Part) -> None:
        """Have a part copied from where it is, where its vectors may lie apart; heads together if they lie so."""
        assert isinstance(self._source, HostSource), "page-locked"
        block = self._source.array[part.batch.slice, part.heads.slice, part.tokens.slice][0]
        tokens, dim = block.shape[1:]
        vector_bytes, pitch = dim * block.itemsize, block.strides[1]
        row_bytes = vector_bytes * (len(part.heads) if self._source.token_major else 1)
        to, kind, stream = slot.memory.data.ptr + part.offset_bytes, runtime.memcpyHostToDevice, self._link.copies.ptr
        if self._source.token_major and block.strides[0] == vector_bytes and (tokens == 1 or pitch >= row_bytes):
            source, pitch = block.ctypes.data, pitch if tokens > 1 else row_bytes
            runtime.memcpy2DAsync(to, row_bytes, source, pitch, row_bytes, tokens, kind, stream)
        else:
            pitch = pitch if tokens > 1 else vector_bytes
            step = vector_bytes if self._source.token_major else tokens * vector_bytes
            for h, head in enumerate(block):
                runtime.memcpy2DAsync(
                    to + h * step, row_bytes, head.ctypes.data, pitch, vector_bytes, tokens, kind, stream
                )
        self._source.bytes_read += block.nbytes

    def _parts(self, group: Group, tokens: Range, most: int) -> Iterator[Part]:
        """The parts of a block, of at most ``most`` bytes."""
        vector_bytes = self._source.shape[3] * self._source.dtype.itemsize
        assert len(group.heads) * len(group.batch) <= self._heads
        for b, batch in enumerate(group.batch.split(1)):
            if self._source.token_major:
                # All heads of some tokens, or where one token's are more than a piece, some of them.
                together = min(len(group.heads), most // vector_bytes)
                whole = together == len(group.heads)
                for part in tokens.split(most // (together * vector_bytes) if whole else 1):
                    row = (b * self._tokens + part.start - tokens.start) * len(group.heads)
                    for some in group.heads.split(together):
                        yield Part(batch, some, part, (row + some.start - group.heads.start) * vector_bytes)
                continue
            # Heads lie side by side in the slot where the block is as long as it may be.
            full = len(tokens) == self._tokens
            together = max(1, most // (self._tokens * vector_bytes)) if full else 1
            for some in group.heads.split(together):
                for part in tokens.split(max(1, most // (vector_bytes * len(some)))):
                    head = b * len(group.heads) + some.start - group.heads.start
                    yield Part(batch, some, part, (head * self._tokens + part.start - tokens.start) * vector_bytes)

    def _block(self, slot: Slot, group: Group, tokens: Range) -> Any:
        """The slot's memory as a block, tokens outside heads where the source has them so."""
        batch, heads = len(group.batch), len(group.heads)
        flat = slot.memory[: batch * heads * self._tokens * self._source.shape[3]]
        if self._source.token_major:
            whole = flat.reshape(batch, self._tokens, heads, self._source.shape[3]).swapaxes(1, 2)
        else:
            whole = flat.reshape(batch, heads, self._tokens, self._source.shape[3])
        return whole[:, :, : len(tokens)]


def access_to(source: TokenSource) -> Access:
    """How the device comes by blocks of ``source``."""
    if isinstance(source, DeviceSource):
        return Access.IN_PLACE
    if not isinstance(source, HostSource) or not source.vectors_together:
        return Access.READ
    return Access.LOCKED if _page_locked(source.array) else Access.SENT


def _page_locked(array: np.ndarray) -> bool:
    """Whether the device can read the memory of ``array``, (batch, heads, tokens, head_dim), by itself."""
    if min(array.strides) < 0 or (array.shape[2] > 1 and array.strides[2] < array.shape[3] * array.itemsize):
        return False  # the device takes rows that follow each other without overlapping
    ends = (
        array.ctypes.data,
        array.ctypes.data + sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)),
    )
    return all(runtime.pointerGetAttributes(end).type == runtime.memoryTypeHost for end in ends)
