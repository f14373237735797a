"""The same bits for any number of threads, on every run, beside other callers, and after an error."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from kernel_cases import FULL, GuardedState, PoisonedKernel, blocks_of, normal, nothing, run_fast, same_bits

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.cpu.tiles import SPAN_KEYS

THREADS = (1, 2, 3, 5)
ARGUMENTS = {"diagonal": 300, "scale": 0.3}


def problem(dtype, seed=0, rows=900, tokens=800):
    """900 rows are 8 groups of panels or more, in each of 4 heads."""
    rng = np.random.default_rng(seed)
    queries, keys, values = (normal(rng, 2, 2, n, 24, dtype=dtype) for n in (rows, tokens, tokens))
    return queries, blocks_of(keys, values, (100, 350))


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("diagonal", [FULL, 0, -400], ids=["full", "causal", "behind"])
def test_same_bits_for_any_number_of_threads_and_on_every_run(dtype, diagonal):
    queries, blocks = problem(dtype)
    states = [
        run_fast(queries, 0, blocks, diagonal=diagonal, scale=0.3, threads=threads)
        for threads in (*THREADS, *THREADS, 1)
    ]
    assert all(same_bits(state, states[0]) for state in states[1:])


@pytest.mark.parametrize("rows", [1, 47, 130, 900])
def test_the_parts_that_are_told_do_not_depend_on_threads(dtype, rows):
    queries, blocks = problem(dtype, rows=rows)
    told = {}
    for threads in THREADS:
        parts = told[threads] = []
        run_fast(queries, 1000, blocks, threads=threads, done=parts.append, **ARGUMENTS)
    assert all(sorted(parts) == sorted(told[1]) for parts in told.values())


def test_rows_have_the_same_bits_alone_and_among_others(dtype):
    """A row's arithmetic depends on the keys alone: not on its panel, its group or its neighbours."""
    queries, blocks = problem(dtype)
    whole = run_fast(queries, 0, blocks, **ARGUMENTS)
    for first, last in ((0, 1), (40, 50), (47, 49), (333, 641), (899, 900)):
        part = np.s_[:, :, first:last]
        alone = run_fast(queries[part], first, blocks, **ARGUMENTS)
        assert same_bits(alone, BlockStatistics(whole.acc[part], whole.m[part], whole.l[part]))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_rows_have_the_same_bits_alone_however_many_keys_others_see(dtype, order):
    """Spans of keys end where they end for one row: pieces may come in any order, as a quorum has them."""
    rng = np.random.default_rng(3)
    tokens = 2 * SPAN_KEYS + 500
    keys, values = (normal(rng, 1, 1, tokens, 2, dtype=dtype) for _ in range(2))
    queries = normal(rng, 1, 1, 150, 2, dtype=dtype)
    pieces = blocks_of(keys, values, (SPAN_KEYS - 700, 2 * SPAN_KEYS - 900))
    for border in (SPAN_KEYS - 700, 2 * SPAN_KEYS - 900, tokens):  # the rows end inside each of the pieces
        first, blocks = border - 200, [pieces[i] for i in order]
        whole = run_fast(queries, first, blocks, diagonal=0, scale=0.3)
        for start, stop in ((0, 1), (0, 48), (40, 60), (96, 150), (149, 150)):
            part = np.s_[:, :, start:stop]
            alone = run_fast(queries[part], first + start, blocks, diagonal=0, scale=0.3)
            assert same_bits(alone, BlockStatistics(whole.acc[part], whole.m[part], whole.l[part])), (border, start)


def repeatedly(kernel, queries, blocks, times):
    states = []
    for _ in range(times):
        state = BlockStatistics.empty(queries.shape[:3], blocks[0].values.shape[3], queries.dtype)
        kernel.accumulate(queries, 0, blocks, state, done=nothing, **ARGUMENTS)
        states.append(state)
    return states


@pytest.mark.parametrize("shared_inputs", [True, False], ids=["shared-inputs", "own-inputs"])
def test_four_callers_at_once_on_kernels_of_their_own(dtype, shared_inputs):
    problems = [problem(dtype, 0 if shared_inputs else seed) for seed in range(4)]
    wanted = [run_fast(queries, 0, blocks, **ARGUMENTS) for queries, blocks in problems]
    kernels = [PoisonedKernel(dtype, rows=900, head_dim=24, value_dim=24, threads=2) for _ in range(4)]
    ready = threading.Barrier(4)

    def call(i):
        ready.wait()
        return repeatedly(kernels[i], *problems[i], times=5)

    with ThreadPoolExecutor(4) as callers:
        for states, expected in zip(callers.map(call, range(4)), wanted, strict=True):
            assert all(same_bits(state, expected) for state in states)
    for kernel in kernels:
        kernel.close()


class DoneError(Exception):
    pass


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("failing", [0, 5, None], ids=["first", "sixth", "every"])
def test_an_error_in_a_worker_reaches_the_caller_and_the_kernel_works_on(dtype, threads, failing):
    queries, blocks = problem(dtype)
    wanted = run_fast(queries, 0, blocks, **ARGUMENTS)
    kernel = PoisonedKernel(dtype, rows=900, head_dim=24, value_dim=24, threads=threads)
    calls = []

    def done(part):
        calls.append(part)
        if failing is None or len(calls) == failing + 1:
            raise DoneError(part)

    for _ in range(3):
        calls.clear()
        state = BlockStatistics.empty(queries.shape[:3], 24, dtype)
        with pytest.raises(DoneError):
            kernel.accumulate(queries, 0, blocks, state, done=done, **ARGUMENTS)
        guarded = GuardedState(queries.shape[:3], 24, dtype)
        kernel.accumulate(queries, 0, blocks, guarded.state, done=nothing, **ARGUMENTS)
        guarded.check()
        assert same_bits(guarded.state, wanted)
    kernel.close()


def test_no_thread_is_left_after_close(dtype):
    before = threading.active_count()
    kernel = PoisonedKernel(dtype, rows=900, head_dim=24, value_dim=24, threads=5)
    repeatedly(kernel, *problem(dtype), times=1)
    kernel.close()
    assert threading.active_count() == before


def test_inputs_are_not_changed(dtype):
    queries, blocks = problem(dtype)
    arrays = [queries, *(a for block in blocks for a in (block.keys, block.values))]
    copies = [array.copy() for array in arrays]
    run_fast(queries, 0, blocks, **ARGUMENTS)
    assert all((array == copy).all() for array, copy in zip(arrays, copies, strict=True))
