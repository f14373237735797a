"""Where partial states wait: what load gives back, what lies on the disk, and that no choice of place changes a bit."""

import errno
import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from engine_cases import TILE, case, group, open_files_below
from hypothesis import given, settings
from hypothesis import strategies as st

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.engine.states import FileStates, ResidentStates, TileStates, open_states, scratch_file
from cqsa_arrays.errors import StorageError
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.ranges import Cut, Range

ROWS, HEADS, DIM = 20, 3, 4
CUT = Cut(ROWS, 3, 4)  # 5 tiles: 4, 8 and 8 rows
CHUNKS = [CUT[i] for i in range(3)]


def file_states(cut: Cut, heads: int, dim: int, dtype: str, directory: str) -> FileStates:
    """States in an unnamed file that is full of nothing."""
    row_bytes = heads * (dim + 2) * np.dtype(dtype).itemsize
    return FileStates(scratch_file(directory, cut.tokens, row_bytes), cut.longest, heads, dim, dtype)


def resident() -> ResidentStates:
    return ResidentStates(ROWS, HEADS, DIM, "float32", None)


def at_home() -> ResidentStates:
    return ResidentStates(ROWS, HEADS, DIM, "float32", np.full((2, HEADS, ROWS, DIM), np.nan, "float32"))


@pytest.fixture(params=["resident", "at home", "file"])
def store(request, tmp_path):
    made = {"resident": resident, "at home": at_home}.get(
        request.param, lambda: file_states(CUT, HEADS, DIM, "float32", str(tmp_path))
    )()
    yield made
    made.close()


def fill(state: BlockStatistics, value: float) -> None:
    """Distinct numbers everywhere, ``value`` more than their place."""
    for part in (state.acc, state.m, state.l):
        part[...] = np.arange(part.size, dtype=part.dtype).reshape(part.shape) + value


def parts(state: BlockStatistics) -> list[np.ndarray]:
    return [state.acc.copy(), state.m.copy(), state.l.copy()]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def is_empty(state: BlockStatistics) -> bool:
    """No row has seen a key; what ``acc`` holds then is of no account."""
    return bool((state.m == -np.inf).all() and (state.l == 0).all())


def put(store, rows: Range, value: float) -> list[np.ndarray]:
    state = store.load(rows)
    fill(state, value)
    store.store(rows, state)
    return parts(state)


# What load gives back.


def test_at_first_no_row_has_seen_a_key(store) -> None:
    store.begin(group(HEADS))
    for rows in CHUNKS:
        state = store.load(rows)
        assert state.acc.shape == (1, HEADS, len(rows), DIM)
        assert is_empty(state)


def test_every_chunk_gets_back_what_was_stored_for_it(store) -> None:
    store.begin(group(HEADS))
    kept = {}
    for version in range(5):
        for i in [0, 2, 1] if version % 2 else [1, 0, 2]:
            kept[i] = put(store, CHUNKS[i], 1000 * version + 100 * i)
            if version == 2 and i == 0:
                kept[i] = put(store, CHUNKS[i], 77)
    for i, rows in enumerate(CHUNKS):
        assert same(parts(store.load(rows)), kept[i])
        assert same(parts(store.load(rows)), kept[i])


def test_loading_does_not_lose_what_was_not_stored_of_another_chunk(store) -> None:
    store.begin(group(HEADS))
    kept = put(store, CHUNKS[1], 5)
    assert is_empty(store.load(CHUNKS[2]))
    assert same(parts(store.load(CHUNKS[1])), kept)


@pytest.mark.parametrize("following", [group(HEADS), group(HEADS, first_head=0), group(1, first_head=2)], ids=str)
def test_begin_forgets(store, following) -> None:
    store.begin(group(HEADS))
    for _, rows in itertools.product(range(2), CHUNKS):
        put(store, rows, 9)
    store.begin(replace(following, index=1))
    for rows in CHUNKS:
        state = store.load(rows)
        assert state.acc.shape == (1, len(following.heads), len(rows), DIM)
        assert is_empty(state)
        put(store, rows, 3)
        assert not is_empty(store.load(rows))


def test_begin_comes_first(store) -> None:
    with pytest.raises(AssertionError, match="begin"):
        store.load(CHUNKS[0])


def test_states_at_home_accumulate_in_the_result_itself() -> None:
    home = np.full((2, HEADS, ROWS, DIM), np.nan, "float64")
    store = ResidentStates(ROWS, 2, DIM, "float64", home)
    store.begin(group(2, first_head=1))
    state = store.load(Range(4, 12))
    assert np.shares_memory(state.acc, home)
    fill(state, 1)
    assert same([home[:1, 1:, 4:12]], [state.acc])
    assert np.isnan(home[:, 0]).all()
    assert np.isnan(home[1]).all()


def test_states_at_home_hold_no_acc_of_their_own() -> None:
    sizes = {}
    for name, store in (("resident", resident()), ("at home", at_home())):
        sizes[name] = store._block._flat.nbytes
    assert sizes == {"resident": HEADS * ROWS * (DIM + 2) * 4, "at home": HEADS * ROWS * 2 * 4}


def test_one_tile_stays_until_another_comes() -> None:
    store = TileStates(8, HEADS, DIM, "float32")
    with pytest.raises(AssertionError, match="begin"):
        store.load(CHUNKS[0])
    store.begin(group(HEADS))
    assert is_empty(store.load(CHUNKS[1]))
    kept = put(store, CHUNKS[1], 4)
    assert same(parts(store.load(CHUNKS[1])), kept)
    assert is_empty(store.load(CHUNKS[0]))
    assert is_empty(store.load(CHUNKS[1]))
    put(store, CHUNKS[1], 4)
    store.begin(group(HEADS))
    assert is_empty(store.load(CHUNKS[1]))
    store.close()


# Two slots in a file.


@pytest.fixture
def file_store(tmp_path):
    made = file_states(CUT, HEADS, DIM, "float32", str(tmp_path))
    made.begin(group(HEADS))
    yield made
    made.close()


def flat(kept: list[np.ndarray]) -> bytes:
    return b"".join(part.tobytes() for part in kept)


def slots_on_disk(store: FileStates, rows: Range) -> list[bytes]:
    """What the file holds for ``rows``, slot by slot, read past the store."""
    row_bytes = HEADS * (DIM + 2) * 4
    return [
        os.pread(store._file._file.descriptor, len(rows) * row_bytes, (slot * ROWS + rows.start) * row_bytes)
        for slot in range(2)
    ]


def test_the_version_before_stays_on_the_disk_until_the_next_store(file_store) -> None:
    for rows in CHUNKS:
        versions = [flat(put(file_store, rows, 0))]
        for value in (100, 200, 300):
            state = file_store.load(rows)
            fill(state, value)
            # Changed in memory only: the last version is whole on the disk.
            assert versions[-1] in slots_on_disk(file_store, rows)
            file_store.store(rows, state)
            versions.append(flat(parts(state)))
            assert sorted(slots_on_disk(file_store, rows)) == sorted(versions[-2:])


def test_a_store_that_fails_half_way_leaves_the_version_before(file_store, monkeypatch) -> None:
    kept = put(file_store, CHUNKS[1], 1)
    state = file_store.load(CHUNKS[1])
    fill(state, 50)
    write, calls = os.pwrite, []

    def half(descriptor, data, position) -> int:
        calls.append(position)
        if len(calls) > 1:
            raise OSError(errno.EIO, "Input/output error")
        return write(descriptor, data[: len(data) // 2], position)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(OSError, match="Input/output error"):
        file_store.store(CHUNKS[1], state)
    assert len(calls) == 2
    assert flat(kept) in slots_on_disk(file_store, CHUNKS[1])
    assert same(parts(file_store.load(CHUNKS[1])), kept)


def test_short_reads_and_writes_are_continued(file_store, monkeypatch) -> None:
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda f, buffers, at: read(f, [buffers[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: write(f, data[:5], at))
    kept = [put(file_store, rows, 10 * i) for i, rows in enumerate(CHUNKS)]
    for rows, wanted in zip(CHUNKS, kept, strict=True):
        assert same(parts(file_store.load(rows)), wanted)


def test_a_scratch_file_that_was_cut_short_is_an_error(file_store) -> None:
    put(file_store, CHUNKS[2], 1)
    os.ftruncate(file_store._file._file.descriptor, 100)
    with pytest.raises(StorageError, match="scratch"):
        file_store.load(CHUNKS[2])


def test_moved_bytes_count_both_ways(file_store) -> None:
    size = len(CHUNKS[1]) * HEADS * (DIM + 2) * 4
    put(file_store, CHUNKS[1], 1)
    assert file_store.moved_bytes == size
    file_store.load(CHUNKS[1])
    assert file_store.moved_bytes == 2 * size


def test_the_space_is_reserved_in_a_file_without_a_name(tmp_path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    store = file_states(Cut(50_000, 7, 96), HEADS, 30, "float64", str(tmp_path))
    size = 2 * 50_000 * HEADS * 32 * 8
    found = os.fstat(store._file._file.descriptor)
    assert found.st_size == size
    assert found.st_blocks * 512 >= size
    assert found.st_nlink == 0
    assert os.listdir(tmp_path) == []
    assert len(open_files_below(tmp_path)) == 1
    store.close()
    assert open_files_below(tmp_path) == []
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_met_at_the_start(tmp_path, monkeypatch) -> None:
    def full(descriptor, start, length) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError) as raised:
        file_states(Cut(1 << 20, 7, 96), HEADS, 30, "float32", str(tmp_path))
    text = str(raised.value)
    assert text.startswith(f"scratch: cannot reserve 768 MiB for states in {tmp_path}: No space left on device.")
    assert os.listdir(tmp_path) == []
    assert open_files_below(tmp_path) == []


def test_a_run_on_a_full_disk_reads_nothing(tmp_path, monkeypatch) -> None:
    def full(descriptor, start, length) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    one = case(queries=7 * TILE)
    plan = one.cqs(7, on_disk=True, scratch=tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="scratch"):
        one.run(plan)
    assert one.log == []


def test_a_missing_directory_is_named(tmp_path) -> None:
    with pytest.raises(StorageError, match=f"scratch: .* in {tmp_path}/none: No such file"):
        file_states(CUT, HEADS, DIM, "float32", str(tmp_path / "none"))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 7), st.data())
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_chunks_of_any_cut_never_overlap_on_the_disk(tmp_path_factory, rows, count, tile, data) -> None:
    cut = Cut(rows, count, tile)
    store = file_states(cut, 1, 2, "float64", str(tmp_path_factory.getbasetemp()))
    try:
        store.begin(group())
        chunks = [cut[i] for i in range(count) if len(cut[i])]
        kept = {}
        for number, i in enumerate(data.draw(st.lists(st.integers(0, len(chunks) - 1), min_size=1, max_size=30))):
            if i in kept:
                assert same(parts(store.load(chunks[i])), kept[i])
            kept[i] = put(store, chunks[i], 1000 * number)
        for i, wanted in kept.items():
            assert same(parts(store.load(chunks[i])), wanted)
    finally:
        store.close()


# Which store a plan asks for.


def test_a_plan_gets_the_store_that_it_names(tmp_path) -> None:
    one = case(queries=700)
    home = np.zeros((1, 2, 700, 3), "float32")
    for plan, kind in (
        (one.cqs(3), ResidentStates),
        (one.cqs(3, on_disk=True, scratch=tmp_path), FileStates),
        (one.rectangular(3, TILE), TileStates),
    ):
        store = open_states(plan, home, None)
        assert type(store) is kind
        store.close()


@pytest.mark.parametrize("count", [1, 3, 7], ids=lambda n: f"{n} chunks")
def test_full_attention_moves_the_states_that_were_planned(count, tmp_path) -> None:
    one = case(queries=7 * TILE)
    plan = one.cqs(count, on_disk=True, scratch=tmp_path)
    _, report = one.run(plan)
    moved = plan.chosen.traffic
    assert report.state_moved_bytes == moved.state_read_bytes + moved.state_written_bytes
    assert plan.chosen.scratch_bytes == 2 * 2 * 7 * TILE * (3 + 2) * 4


@pytest.mark.parametrize("mask", [Causal(), Causal(-300), Causal(50)], ids=str)
def test_causal_attention_moves_no_more_than_that(mask, tmp_path) -> None:
    one = case(queries=7 * TILE, mask=mask)
    plan = one.cqs(7, on_disk=True, scratch=tmp_path)
    _, report = one.run(plan)
    moved = plan.chosen.traffic
    assert report.state_moved_bytes <= moved.state_read_bytes + moved.state_written_bytes


# No place and no grouping changes the result.

GROUPS = [(2, 3), (1, 2), (1, 1)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mask", [Full(), Causal(-60)], ids=["full", "causal"])
def test_place_of_states_heads_together_and_threads_change_no_bit(dtype, mask, tmp_path) -> None:
    outputs = {}
    for name, threads, heads in itertools.product(("memory", "home", "disk"), (1, 2, 3), GROUPS):
        if threads > 1 and heads != (1, 2):
            continue
        one = case(
            queries=300,
            keys=400,
            batch=2,
            heads=3,
            dtype=dtype,
            mask=mask,
            threads=threads,
            holds_states=name == "home",
        )
        sink, _ = one.run(one.cqs(3, heads, on_disk=name == "disk", scratch=tmp_path))
        one.check(sink)
        outputs[name, threads, heads] = sink.out.tobytes() + sink.lse.tobytes()
    assert len(set(outputs.values())) == 1


@pytest.mark.parametrize(
    "make", [lambda one: one.cqs(3), lambda one: one.rectangular(3, 2 * TILE)], ids=["cqs", "rect"]
)
def test_the_same_plan_gives_the_same_bits(make) -> None:
    outputs = set()
    for threads, _ in itertools.product((1, 2, 3), range(2)):
        one = case(queries=700, keys=750, heads=3, dim=16, value_dim=16, threads=threads, mask=Causal(60))
        sink, _ = one.run(make(one))
        outputs.add(sink.out.tobytes() + sink.lse.tobytes())
    assert len(outputs) == 1


def test_both_covers_agree_within_rounding(tmp_path) -> None:
    found = []
    for make in (
        lambda one: one.cqs(7),
        lambda one: one.cqs(4, (1, 1), True, tmp_path),
        lambda one: one.rectangular(5, 2 * TILE),
    ):
        one = case(queries=700, keys=750, dtype="float64", mask=Causal(60))
        sink, _ = one.run(make(one))
        found.append(sink.out)
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=0, atol=1e-14)
