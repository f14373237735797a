"""Threads that wait for shipments in compiled code: every byte arrives, errors are raised, and they always end."""

from __future__ import annotations

import gc
import importlib
import time
from concurrent.futures import Future
from contextlib import closing, contextmanager

import numpy as np
import pytest
import simulated_cuda
from our_threads import running
from simulated_cuda import simulated_gpu

from cqsa_arrays.workers import Workers

SHARE = 256


@pytest.fixture(params=range(2), ids=lambda seed: f"seed {seed}")
def gpu(request):
    with simulated_gpu(request.param) as simulator:
        yield simulator
    assert running(("cqsa-crew",)) == []


def crew_on_pieces_of_two_shares(size: int, monkeypatch):
    """A crew that has not begun, and the stream on which it sends."""
    crew, memory, transfer = (
        importlib.import_module(f"cqsa_arrays.engine.cuda.{name}") for name in ("crew", "memory", "transfer")
    )
    monkeypatch.setattr(memory, "PINNED_PIECE_BYTES", 2 * SHARE)
    simulated_cuda.Device().use()
    pieces, stream = memory.PinnedPieces(size + 1), simulated_cuda.Stream()
    return crew.Crew(transfer.open_transfers(), pieces, stream, size), stream


@contextmanager
def crew_of(size: int, monkeypatch):
    """One at work, on threads that are not kept."""
    made, stream = crew_on_pieces_of_two_shares(size, monkeypatch)
    with closing(Workers(size, "crew")) as workers, closing(made):
        made.begin(workers)
        yield made, stream


def shipment_of(block: np.ndarray, there: np.ndarray):
    transfer = importlib.import_module("cqsa_arrays.engine.cuda.transfer")
    arrived = simulated_cuda.Event()
    regions = [transfer.Region(block, there.ctypes.data)]
    return transfer.Shipment(regions, [], [arrived], SHARE), arrived


@pytest.mark.parametrize("size", [1, 3])
def test_more_shipments_than_the_board_has_room_for(gpu, size, monkeypatch) -> None:
    blocks = np.random.default_rng(0).random((200, 1, 50, 4))
    there = np.full_like(blocks, np.nan)
    with crew_of(size, monkeypatch) as (crew, stream):
        sent = [shipment_of(*pair) for pair in zip(blocks, there, strict=True)]
        for shipment, _ in sent:
            crew.send(shipment)
        for shipment, arrived in sent[::-1]:
            crew.wait(shipment)
            arrived.synchronize()
        stream.synchronize()
        assert len(crew._under_way) <= 64
    assert np.array_equal(blocks, there)


def test_a_thread_that_is_late_does_not_miss_a_shipment_whose_place_another_took(gpu, monkeypatch) -> None:
    """The places of a board are taken again only when every thread is through with what was there."""
    crew_module = importlib.import_module("cqsa_arrays.engine.cuda.crew")
    monkeypatch.setattr(crew_module, "_BILLS", 2)

    class Slow(simulated_cuda.Event):
        def synchronize(self) -> None:
            time.sleep(0.002)
            super().synchronize()

    monkeypatch.setattr(importlib.import_module("cupy").cuda, "Event", Slow)
    blocks = np.random.default_rng(0).random((20, 1, 100, 4))
    there = np.full_like(blocks, np.nan)
    with crew_of(3, monkeypatch) as (crew, stream):
        sent = [shipment_of(*pair)[0] for pair in zip(blocks, there, strict=True)]
        for shipment in sent:
            crew.send(shipment)
            assert len(crew._under_way) <= 2
        while not all(shipment.sent for shipment in sent):
            time.sleep(0.001)
        stream.synchronize()
    assert [shipment.passed for shipment in sent] == [3] * 20
    assert np.array_equal(blocks, there)


def test_what_the_driver_reports_to_one_thread_is_raised_by_who_waits(gpu, monkeypatch, capfd) -> None:
    from cupy_backends.cuda.api.driver import CUDADriverError

    there = np.zeros((3, 1, 1000, 4))
    with crew_of(2, monkeypatch) as (crew, _):
        for piece in crew._lent:
            piece.halves[2:] = 10**6  # no such events
        bad, _ = shipment_of(np.ones((1, 1000, 4)), there[0])
        crew.send(bad)
        while not bad._bill[9]:
            time.sleep(0.001)
        with pytest.raises(CUDADriverError, match="719"):
            crew.wait(bad)
        with pytest.raises(CUDADriverError, match="719"):  # whoever asks
            crew.wait(bad)
    assert not bad.sent
    assert capfd.readouterr().err.count("KeyError") >= 1


def test_a_thread_that_ended_before_its_time_is_not_waited_for(gpu, monkeypatch) -> None:
    monkeypatch.setattr(importlib.import_module("cqsa_arrays.engine.cuda.crew"), "_BILLS", 2)
    blocks = np.ones((4, 1, 50, 4))
    with crew_of(1, monkeypatch) as (crew, _):
        failed = Future()
        failed.set_exception(TypeError("of another type"))
        crew._members.append(failed)
        for block in blocks[:2]:
            crew.send(shipment_of(block, np.zeros_like(block))[0])
        with pytest.raises(TypeError, match="of another type"):
            crew.send(shipment_of(blocks[2], np.zeros_like(block))[0])


def test_threads_end_where_whoever_holds_them_is_dropped(gpu, monkeypatch) -> None:
    """As by an interruption between two steps of an ``ExitStack``, which then takes none of those that are left."""
    monkeypatch.setattr("cqsa_arrays.workers._KEPT", {})  # none of those that earlier runs have left
    before = running(("cqsa-sender",))
    made, _ = crew_on_pieces_of_two_shares(2, monkeypatch)
    held = importlib.import_module("cqsa_arrays.engine.cuda.crew").at_work(made)
    held.__enter__()
    assert len(running(("cqsa-sender",))) == len(before) + 2
    del held
    gc.collect()
    assert running(("cqsa-sender",)) == before


def test_the_end_stops_what_is_under_way(gpu, monkeypatch) -> None:
    class Slow(simulated_cuda.Event):
        def synchronize(self) -> None:
            time.sleep(0.01)
            super().synchronize()

    monkeypatch.setattr(importlib.import_module("cupy").cuda, "Event", Slow)
    with crew_of(2, monkeypatch) as (crew, _):
        shipment, _ = shipment_of(np.ones((1, 10000, 4)), np.zeros((1, 10000, 4)))
        crew.send(shipment)
        start = time.perf_counter()
        crew.close()
        crew.close()
        with pytest.raises(AssertionError, match="after the end"):
            crew.wait(shipment)
    assert time.perf_counter() - start < 5  # all of it would take six seconds
    assert not shipment.sent
