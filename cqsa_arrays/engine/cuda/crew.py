"""Threads that send shipments to a GPU, in compiled code from the first to the end of a run."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, wait

import cupy
import numpy as np

from ...workers import Workers
from .memory import Piece, PinnedPieces
from .transfer import Semaphores, Shipment, Transfers

# Shipments that may be under way; there are two at most, unless a thread was not given a processor for a while.
_BILLS = 64
_NAP_S = 1e-4
# How many times a thread looks for its first shipment, which comes in a millisecond or two, before it sleeps.
_LOOKS = 200_000
# How many times is looked whether other threads are done, before they are waited for asleep: a millisecond or two.
_PATIENCE = 1_000_000


class Crew:
    """Threads that wait for shipments in compiled code, where they need no lock of Python's.

    Begun by Python, threads began one after the other, 0.1 ms each, and hindered who launched kernels meanwhile.
    Whoever waits for a shipment sends shares of it, too.
    """

    def __init__(self, transfers: Transfers, pieces: PinnedPieces, copies: cupy.cuda.Stream) -> None:
        self._transfers, self._pieces, self._copies = transfers, pieces, copies
        self._board, self._semaphores = np.zeros(1 + _BILLS, np.int64), Semaphores(0)
        self._members: list[Future[None]] = []
        self._lent: list[Piece] = []
        self._under_way: deque[Shipment] = deque()
        self._ended = False

    def begin(self, workers: Workers, size: int) -> None:
        """Have ``size`` threads of ``workers`` wait for shipments, until ``end``."""
        transfers, stream = self._transfers, self._copies.ptr
        self._semaphores = Semaphores(size)
        for address in self._semaphores.addresses:
            self._lent.append(piece := self._pieces.borrow())
            given = (transfers.functions, piece.halves, self._board, int(address), stream, _LOOKS)
            self._members.append(workers.submit(transfers.serve, *given))

    def send(self, shipment: Shipment) -> None:
        """Begin to send ``shipment``."""
        while self._under_way and (len(self._under_way) >= _BILLS or self._is_through(self._under_way[0])):
            if self._is_through(self._under_way[0]):
                self._under_way.popleft()
            else:
                time.sleep(_NAP_S)
        self._under_way.append(shipment)  # alive before a thread knows of it
        self._post(shipment.bill)

    def _post(self, bill: int) -> None:
        transfers = self._transfers
        transfers.post(transfers.functions, self._board, self._semaphores.addresses, bill)

    def _is_through(self, shipment: Shipment) -> bool:
        return shipment.passed == len(self._members)

    def wait(self, shipment: Shipment) -> None:
        """Return when ``shipment`` is on the stream, and help with that. Raises CUDADriverError."""
        if not shipment.sent:
            self.help(shipment)
        while not shipment.sent:
            shipment.check()
            time.sleep(_NAP_S)

    def help(self, shipment: Shipment) -> None:
        """Send shares of ``shipment`` until none is left."""
        piece = self._pieces.borrow()
        try:
            shipment.send(self._transfers, piece, self._copies.ptr, _PATIENCE)
        finally:
            self._pieces.give_back(piece)

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
