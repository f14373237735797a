"""Copies between host arrays and a simulated device: every byte in its place, by any number of threads."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import simulated_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_cuda import simulated_gpu

DTYPES = ("u1", "f2", "f4", "f8")


@pytest.fixture(params=range(2), ids=lambda seed: f"seed {seed}")
def gpu(request):
    with simulated_gpu(request.param) as simulator:
        yield simulator


def transfers():
    from cqsa_arrays.engine.cuda.transfer import open_transfers

    simulated_cuda.Device().use()
    return open_transfers()


def piece_of(size_bytes: int):
    from cqsa_arrays.engine.cuda.memory import Piece

    return Piece(np.full(size_bytes, 0xEE, "u1"))


@st.composite
def views(draw):
    """A view (outer, inner, dim) with contiguous vectors of an array of its own: gaps, any order of axes, backwards."""
    outer, inner, dim = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 9))
    steps = [draw(st.sampled_from([1, 1, 2, -1])) for _ in range(2)]
    wide = (outer * abs(steps[0]), inner * abs(steps[1]), dim + draw(st.sampled_from([0, 0, 3])))
    swapped = draw(st.booleans())
    base = np.zeros(wide if not swapped else (wide[1], wide[0], wide[2]), draw(st.sampled_from(DTYPES)))
    base.view("u1").reshape(-1)[:] = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 250, base.nbytes)
    view = base if not swapped else base.swapaxes(0, 1)
    return base, view[:: steps[0], :: steps[1], :dim]


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: np.zeros((2, 3, 4), "f2"), (1, 48, 48)),  # one row
        (lambda: np.zeros((2, 4, 4), "f2")[:, :3], (1, 24, 48)),  # outer rows apart
        (lambda: np.zeros((2, 3, 5), "f2")[..., :4], (3, 8, 48)),  # all vectors apart
        (lambda: np.zeros((3, 2, 4), "f2").swapaxes(0, 1), (3, 8, 48)),  # the other order
        (lambda: np.zeros((3, 1, 4), "f2").swapaxes(0, 1), (1, 24, 24)),
        (lambda: np.zeros((4, 1, 4), "f2")[::2], (1, 8, 16)),
    ],
)
def test_rows_are_as_long_as_they_can_be(gpu, make, numbers) -> None:
    from cqsa_arrays.engine.cuda.transfer import Region

    address, inner, _, _, row_bytes, size_bytes, device, before = Region(block := make(), 77).numbers()
    assert (inner, row_bytes, size_bytes) == numbers
    assert (address, device, before) == (block.ctypes.data, 77, 0)


@given(blocks=st.lists(views(), min_size=1, max_size=5), share=st.integers(1, 300), threads=st.integers(1, 4), seed=...)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_several_threads_send_every_byte_once(blocks: list, share: int, threads: int, seed: bool) -> None:
    with simulated_gpu(int(seed)):
        from cqsa_arrays.engine.cuda.transfer import Region, Shipment

        memory = [np.full(view.nbytes + 2, 0xEE, "u1") for _, view in blocks]
        regions = [Region(view, m.ctypes.data + 1) for (_, view), m in zip(blocks, memory, strict=True)]
        copies, kernels = simulated_cuda.Stream(), simulated_cuda.Stream()
        kernels.rank, seen, begun = -1, [], []  # late, unless they are waited for
        kernels.put(lambda: seen.append(all((m == 0xEE).all() for m in memory)), lambda: bool(begun))
        after, arrived = kernels.record(), simulated_cuda.Event()
        shipment = Shipment(regions, [after], [arrived], share)
        begun.append(True)
        loops = transfers()
        pieces = [piece_of(2 * share) for _ in range(threads)]
        others = [threading.Thread(target=shipment.send, args=(loops, piece, copies.ptr)) for piece in pieces[1:]]
        for other in others:
            other.start()
        shipment.send(loops, pieces[0], copies.ptr, 10**8)
        assert shipment.sent
        assert arrived.recorded == 1
        arrived.synchronize()
        for other in others:
            other.join()
        assert seen == [True]
        for (_, view), m in zip(blocks, memory, strict=True):
            assert m[1:-1].tobytes() == view.tobytes()
            assert m[0] == m[-1] == 0xEE


@given(block=views(), share=st.integers(1, 300), seed=st.integers(0, 99), waits=...)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_rows_come_back_to_their_places_and_nothing_else_changes(
    block: tuple, share: int, seed: int, waits: bool
) -> None:
    base, view = block
    with simulated_gpu(int(seed)):
        from cqsa_arrays.engine.cuda.transfer import Region

        expected, there = base.copy(), np.full(view.nbytes, 0xEE, "u1")
        places = np.flatnonzero(mark(base, view).view("u1").reshape(-1))
        expected.view("u1").reshape(-1)[places] = 251
        stream, kernels, asleep = simulated_cuda.Stream(), simulated_cuda.Stream(), simulated_cuda.Event(block=True)
        kernels.rank, begun = -1, []  # late, unless they are waited for
        kernels.put(lambda: there.fill(251), lambda: bool(begun))
        ready, region = kernels.record(), Region(view, there.ctypes.data)
        begun.append(True)
        if not waits:
            ready.synchronize()
            ready = None
        transfers().receive(region, piece_of(4 * share), stream.ptr, ready, asleep)
        assert base.tobytes() == expected.tobytes()


def mark(base: np.ndarray, view: np.ndarray) -> np.ndarray:
    """An array like ``base`` with every bit set where ``view`` lies."""
    marks = np.zeros(base.shape, base.dtype)
    offset = view.ctypes.data - base.ctypes.data
    raw = np.ndarray((*view.shape, base.itemsize), "u1", marks.data, offset, (*view.strides, 1))
    raw[...] = 255
    return marks


def test_order_within_rows_that_come_back(gpu) -> None:
    from cqsa_arrays.engine.cuda.transfer import Region

    there = np.arange(3 * 50 * 8, dtype="f4").reshape(3, 50, 8)
    out = np.zeros((50, 3, 9), "f4")
    region = Region(out[..., :8].swapaxes(0, 1), there.ctypes.data)
    transfers().receive(region, piece_of(64), simulated_cuda.Stream().ptr, None, simulated_cuda.Event(block=True))
    np.testing.assert_array_equal(out[..., :8].swapaxes(0, 1), there)
    assert not out[..., 8].any()


@pytest.mark.parametrize("way", ["send", "receive"])
def test_what_the_driver_reports_is_raised_and_no_copy_follows(gpu, way, capfd) -> None:
    from cupy_backends.cuda.api.driver import CUDADriverError

    from cqsa_arrays.engine.cuda.transfer import Region, Shipment

    block, there = np.ones((1, 100, 4), "f4"), np.zeros(1600, "u1")
    piece = piece_of(64)
    piece.shares[2:] = piece.halves[2:] = 10**6  # no such events
    region, stream = Region(block, there.ctypes.data), simulated_cuda.Stream()
    if way == "send":
        call = partial(Shipment([region], [], [], 32).send, transfers(), piece, stream.ptr)
    else:
        call = partial(transfers().receive, region, piece, stream.ptr, None, simulated_cuda.Event(block=True))
    with pytest.raises(CUDADriverError, match="719"):
        call()
    stream.synchronize()
    assert not there.any()
    assert (block == 1).all()
    assert capfd.readouterr().err.count("KeyError") == 1


def test_a_shipment_whose_arrival_cannot_be_recorded_is_not_sent(gpu) -> None:
    from cupy_backends.cuda.api.driver import CUDADriverError

    from cqsa_arrays.engine.cuda.transfer import Region, Shipment

    there, arrived = np.zeros(1600, "u1"), simulated_cuda.Event()
    shipment = Shipment([Region(np.ones((1, 100, 4), "f4"), there.ctypes.data)], [], [arrived], 32)
    shipment._arrived[0] = 10**6  # no such event
    with pytest.raises(CUDADriverError, match="719"):
        shipment.send(transfers(), piece_of(64), simulated_cuda.Stream().ptr)
    assert not shipment.sent


def test_a_shipment_that_is_stopped_begins_nothing(gpu) -> None:
    from cqsa_arrays.engine.cuda.transfer import Region, Shipment

    there, stream = np.zeros(1600, "u1"), simulated_cuda.Stream()
    shipment = Shipment([Region(np.ones((1, 100, 4), "f4"), there.ctypes.data)], [], [], 32)
    shipment.stop()
    shipment.send(transfers(), piece_of(64), stream.ptr)
    stream.synchronize()
    assert not shipment.sent
    assert not there.any()
