"""The way of blocks to a GPU: threads that fill page-locked pieces, and a stream that copies them to slots there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import cupy

from ...workers import Batch, Workers
from .crew import Crew
from .memory import PinnedPieces
from .transfer import Region, Shipment

T = TypeVar("T")


class Coming(Protocol):
    """Copies that threads are putting on a stream."""

    def wait(self) -> None:
        """Return when all of them are there; an error of any is raised."""


@dataclass(slots=True, eq=False)
class Slot:
    """Memory for one block; the events come when it has arrived, and when the kernels that read it are done.

    ``arrived`` is recorded when nothing is ``coming`` any more; the streams in ``awaited_on`` wait for it already.
    """

    memory: Any
    arrived: cupy.cuda.Event
    awaited_on: set[int] = field(default_factory=set)
    used: dict[int, cupy.cuda.Event] = field(default_factory=dict)  # by stream
    coming: Coming | None = None

    def await_on(self, stream: cupy.cuda.Stream) -> None:
        """What is put on ``stream`` from now on comes after all of the block; returns when that is on its way."""
        self.await_coming()
        if stream.ptr not in self.awaited_on:  # each call of the driver hands over Python's lock
            stream.wait_event(self.arrived)
            self.awaited_on.add(stream.ptr)

    def await_coming(self) -> None:
        """Return when all of the block is on its way to the device."""
        if self.coming is not None:
            self.coming.wait()
            self.coming = None


@dataclass(frozen=True, slots=True)
class Sending:
    """A shipment that a crew sends."""

    shipment: Shipment
    crew: Crew

    def wait(self) -> None:
        self.crew.wait(self.shipment)


@dataclass(slots=True)
class Link:
    """What brings blocks to the device: threads, page-locked pieces, a stream for copies.

    Blocks of arrays in memory are asked for first and then sent together, by the crew, while the caller goes on. Others
    are read by ``readers``, part by part.
    """

    device: cupy.cuda.Device
    pieces: PinnedPieces
    copies: cupy.cuda.Stream
    crew: Crew | None
    readers: Workers | None
    asked: list[tuple[Slot, tuple[cupy.cuda.Event, ...], list[Region]]] = field(default_factory=list)
    under_way: list[Batch] = field(default_factory=list)

    def ask(self, slot: Slot, after: tuple[cupy.cuda.Event, ...], regions: list[Region]) -> None:
        """Have ``regions`` sent to their places in ``slot``, after events, when ``start`` is called."""
        self.asked.append((slot, after, regions))

    def start(self) -> None:
        """Begin to send what was asked for, after what was begun before."""
        asked, self.asked = self.asked, []
        if not asked:
            return
        assert self.crew is not None, "there are arrays of the host"
        regions = [region for _, _, some in asked for region in some]
        after = list({id(event): event for _, events, _ in asked for event in events}.values())
        arrived = [slot.arrived for slot, _, _ in asked]
        shipment = Shipment(regions, after, arrived, self.pieces.size_bytes // 2)
        self.crew.send(shipment)
        for slot, _, _ in asked:
            slot.coming = Sending(shipment, self.crew)

    def read(self, slot: Slot, parts: Iterable[T], bring: Callable[[T], None]) -> None:
        """Have ``bring(part)`` put the copies of all parts on the stream."""
        assert self.readers is not None, "there are inputs that are read"

        def arrived() -> None:
            with self.device:
                slot.arrived.record(self.copies)

        slot.coming = batch = self.readers.start(parts, bring, arrived)
        self.under_way = [other for other in self.under_way if not other.over] + [batch]

    def close(self) -> None:
        """Begin no further part of what is under way; what is begun is waited for."""
        if self.crew is not None:
            self.crew.end()
        for batch in self.under_way:
            batch.waiting.clear()
        try:
            for batch in self.under_way:
                batch.drop()
        finally:
            if self.crew is not None:
                self.crew.close()
