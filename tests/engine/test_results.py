"""What becomes of finished rows."""

from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
from engine_cases import TILE, CountingSink, case, group, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from our_threads import ours_alive

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.engine import OutputResults, StatisticsResults
from cqsa_arrays.masks import Causal
from cqsa_arrays.planner import Group
from cqsa_arrays.ranges import Range


def state_of(batch, heads, rows, dim=3, dtype="float32", seed=0) -> BlockStatistics:
    weights = np.abs(normal(batch, heads, rows, dtype=dtype, seed=seed)) + 1
    return BlockStatistics(
        normal(batch, heads, rows, dim, dtype=dtype, seed=seed + 1), normal(batch, heads, rows, dtype=dtype), weights
    )


def rows_of(state, part) -> BlockStatistics:
    return BlockStatistics(state.acc[part], state.m[part], state.l[part])


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 50), st.integers(1, 4),
    st.lists(st.integers(0, 40), max_size=4), st.data(),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_every_row_is_written_once_in_pieces(batch, heads, rows, piece, threads, borders, data) -> None:
    state = state_of(batch, heads, rows)
    sink = CountingSink((batch, heads, rows), 3)
    together = data.draw(st.integers(1, heads))
    cuts = sorted({0, rows, *(border for border in borders if border < rows)})
    with closing(OutputResults(sink, piece, threads, None)) as results:
        for first in range(0, heads, together):
            of = Group(Range(0, batch), Range(first, min(first + together, heads)))
            for start, stop in pairwise(cuts):
                part = (of.batch.slice, of.heads.slice, slice(start, stop))
                results.take(of, Range(start, stop), rows_of(state, part), in_place=False)
    sink.check_once()
    assert sink.longest <= piece
    assert sink.out.tobytes() == state.output().tobytes()
    assert sink.lse.tobytes() == state.lse().tobytes()


def test_pieces_are_of_all_heads_of_one_batch_entry() -> None:
    written = []

    class Sink(CountingSink):
        def write_out(self, batch, heads, tokens, block) -> None:
            written.append((batch, heads, tokens))
            super().write_out(batch, heads, tokens, block)

    sink = Sink((3, 5, 30), 3)
    with closing(OutputResults(sink, 7, 1, None)) as results:
        results.take(Group(Range(1, 3), Range(2, 4)), Range(10, 30), state_of(2, 2, 20), in_place=False)
    expected = [
        (Range(b, b + 1), Range(2, 4), Range(t, min(t + 7, 30)))
        for b in (1, 2) for t in (10, 17, 24)
    ]  # fmt: skip
    assert written == expected
    assert (sink.out_times[1:3, 2:4, 10:] == 1).all()
    assert sink.out_times.sum() == 2 * 2 * 20


def test_rows_without_a_key_end_as_zero_and_minus_infinity() -> None:
    sink = CountingSink((1, 2, 9), 3)
    with closing(OutputResults(sink, 4, 2, None)) as results:
        results.take(group(2), Range(0, 9), BlockStatistics.empty((1, 2, 9), 3, "float32"), in_place=False)
    assert (sink.out == 0).all()
    assert (sink.lse == -np.inf).all()


def test_an_error_of_the_sink_is_raised_and_threads_end() -> None:
    class Broken(CountingSink):
        def write_out(self, batch, heads, tokens, block) -> None:
            raise OSError("disk")

    with closing(OutputResults(Broken((1, 1, 90), 3), 10, 3, None)) as results, pytest.raises(OSError, match="disk"):
        results.take(group(), Range(0, 90), state_of(1, 1, 90), in_place=False)
    assert not ours_alive()


def test_output_may_lie_where_its_own_states_are() -> None:
    state = state_of(1, 2, 50)
    wanted = state.output()

    sink = CountingSink((1, 2, 50), 3)
    with closing(OutputResults(sink, 8, 2, state.acc)) as results:
        assert results.home is state.acc
        results.take(group(2), Range(0, 50), state, in_place=True)
    assert (sink.out_times == 0).all()
    assert (sink.lse_times == 1).all()
    assert state.acc.tobytes() == wanted.tobytes()


# Statistics.


def test_statistics_keep_the_states_themselves() -> None:
    results = StatisticsResults((2, 3, 20), 4, "float64")
    assert results.home is results.statistics.acc
    assert (results.statistics.m == -np.inf).all()
    state = state_of(1, 2, 8, dim=4, dtype="float64")
    results.take(Group(Range(1, 2), Range(1, 3)), Range(5, 13), state, in_place=False)
    kept = rows_of(results.statistics, np.s_[1:2, 1:3, 5:13])
    for field in ("acc", "m", "l"):
        assert getattr(kept, field).tobytes() == getattr(state, field).tobytes()
    assert results.statistics.saw_no_key.sum() == 2 * 3 * 20 - 2 * 8
    results.close()


@pytest.mark.parametrize("holds_states", [False, True], ids=["states apart", "states in the result"])
@pytest.mark.parametrize("cover", ["cqs", "cqs by heads", "rectangular"])
def test_statistics_of_a_run_are_those_of_its_output(cover, holds_states) -> None:
    one = case(queries=400, keys=500, batch=2, heads=2, mask=Causal(-50), holds_states=holds_states)
    plan = {"cqs": lambda: one.cqs(3), "cqs by heads": lambda: one.cqs(3, (1, 1))}.get(
        cover, lambda: one.rectangular(2, TILE)
    )()
    sink, _ = one.run(plan)
    found = one.statistics(plan)
    assert found.output().tobytes() == sink.out.tobytes()
    assert found.lse().tobytes() == sink.lse.tobytes()
    assert found.saw_no_key[:, :, :50].all()
    assert not found.saw_no_key[:, :, 50:].any()


def test_statistics_of_two_halves_of_the_keys_merge_to_the_whole() -> None:
    one = case(queries=300, keys=400, dtype="float64")
    halves = []
    for part in (slice(0, 150), slice(150, 400)):
        half = case(queries=300, keys=400, dtype="float64")
        half = type(half)(one.q, one.k[:, :, part], one.v[:, :, part])
        halves.append(half.statistics(half.cqs(1)))
    merged = halves[0].merge(halves[1])
    sink, _ = one.run(one.cqs(3))
    np.testing.assert_allclose(merged.output(), sink.out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(merged.lse(), sink.lse, rtol=1e-13)
