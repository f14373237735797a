"""Threads that send shipments to a GPU, in compiled code from the first to the end of a run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

import cupy
import numpy as np

from ...workers import Workers, kept_workers
from .memory import Piece, PinnedPieces
from .transfer import SEMAPHORE_NUMBERS, Shipment, Transfers, semaphores

# Shipments that may be under way; there are two at most, unless a thread was not given a processor for a while.
_BILLS = 64
_NAP_S = 1e-4
# How many times a thread looks for its first shipment, which comes in a millisecond or two, before it sleeps.
_LOOKS = 200_000
# How many times is looked whether other threads are done, before they are waited for asleep: a millisecond or two.
_PATIENCE = 1_000_000


class Crew:
    """``size`` threads that wait for shipments in compiled code, where they need no lock of Python's.

    Begun by Python, threads began one after the other, 0.1 ms each, and hindered who launched kernels meanwhile.
    Whoever waits for a shipment sends shares of it, too.
    """

    def __init__(self, transfers: Transfers, pieces: PinnedPieces, copies: cupy.cuda.Stream, size: int) -> None:
        self._transfers, self._pieces, self._copies = transfers, pieces, copies
        memory = np.zeros(SEMAPHORE_NUMBERS * size + 1 + _BILLS, np.int64)
        self._board = memory[SEMAPHORE_NUMBERS * size :]  # which keeps all of it alive while a thread has it
        self._semaphores = semaphores(memory[: SEMAPHORE_NUMBERS * size])
        self._members: list[Future[None]] = []
        self._lent: list[Piece] = []
        self._under_way: deque[Shipment] = deque()
        self._ended = False

    @property
    def size(self) -> int:
        return len(self._semaphores)

    def begin(self, workers: Workers) -> None:
        """Have threads of ``workers`` wait for shipments, until ``end``."""
        transfers, stream = self._transfers, self._copies.ptr
        for address in self._semaphores:
            self._lent.append(piece := self._pieces.borrow())
            given = (transfers.functions, piece.halves, self._board, int(address), stream, _LOOKS)
            self._members.append(workers.submit(transfers.serve, *given))

    def send(self, shipment: Shipment) -> None:
        """Begin to send ``shipment``."""
        while self._under_way and (len(self._under_way) >= _BILLS or self._is_through(self._under_way[0])):
            if self._is_through(self._under_way[0]):
                self._under_way.popleft()
            else:
                self._nap()
        self._under_way.append(shipment)  # alive before a thread knows of it
        self._post(shipment.bill)

    def _post(self, bill: int) -> None:
        transfers = self._transfers
        transfers.post(transfers.functions, self._board, self._semaphores, bill)

    def _is_through(self, shipment: Shipment) -> bool:
        return shipment.passed == len(self._members)

    def wait(self, shipment: Shipment) -> None:
        """Return when ``shipment`` is on the stream, and help with that. Raises CUDADriverError."""
        if not shipment.sent:
            self._help(shipment)
        while not shipment.sent:
            shipment.check()
            self._nap()

    def _help(self, shipment: Shipment) -> None:
        """Send shares of ``shipment`` until none is left."""
        piece = self._pieces.borrow()
        try:
            shipment.send(self._transfers, piece, self._copies.ptr, _PATIENCE)
        finally:
            self._pieces.give_back(piece)

    def _nap(self) -> None:
        """Leave the processor to others for a moment, while there are any that send."""
        assert not self._ended, "nothing is sent after the end"
        for member in self._members:
            if member.done():
                member.result()
        time.sleep(_NAP_S)

    def end(self) -> None:
        """No share of a shipment is begun any more, and the threads end when they are done with what is."""
        for shipment in self._under_way:
            shipment.stop()
        if not self._ended:
            self._post(0)
            self._ended = True

    def close(self) -> None:
        """End, and return when all threads have."""
        self.end()
        try:
            wait(self._members)
        finally:  # an interruption ends no thread
            wait(self._members)
        while self._lent:
            self._pieces.give_back(self._lent.pop())


@contextmanager
def at_work(crew: Crew) -> Iterator[Crew]:
    """``crew`` with its threads, which are told of the end before anybody waits for theirs.

    Wherever an interruption comes, and also where whoever holds this is dropped without being left.
    """
    with kept_workers(crew.size, "sender") as senders:
        try:
            crew.begin(senders)
            yield crew
        finally:
            crew.end()
