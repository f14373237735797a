"""Hashes of what an input holds: which blocks, the same for every way of reading, and what they notice."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from types import SimpleNamespace

import h5py
import ml_dtypes
import numpy as np
import pytest

import cqsa_arrays as cqsa
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import DeviceSource, Layout, as_source, dataset, full_hash, sampled_hash
from cqsa_arrays.storage.content import BLOCK_TOKENS, BLOCKS, sample_blocks

SHAPES = [(1, 1, 5000, 8), (1, 16, 100_000, 64), (3, 5, 3000, 8), (2, 300, 40, 8), (1, 1, 10**9, 64), (7, 9, 17, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_spread_over_tokens_and_heads(shape) -> None:
    batch, heads, tokens, _ = shape
    found = sample_blocks(shape)
    assert len(set(found)) == len(found) <= BLOCKS
    assert len(found) > 0.75 * BLOCKS
    length = min(tokens, BLOCK_TOKENS)
    assert {len(one.tokens) for one in found} == {length}
    assert all(one.tokens.start >= 0 and one.tokens.stop <= tokens for one in found)
    assert all(0 <= one.batch < batch and 0 <= one.head < heads for one in found)
    seen = Counter((one.batch, one.head) for one in found)
    assert len(seen) >= min(batch * heads, 40)
    assert {(0, 0), (batch - 1, heads - 1)} <= set(seen)
    for b, h in ((0, 0), (0, heads - 1), (batch - 1, 0), (batch - 1, heads - 1)):
        ends = {one.tokens for one in found if (one.batch, one.head) == (b, h)}
        assert {Range(0, length), Range(tokens - length, tokens)} <= ends
    if tokens > 50 * BLOCK_TOKENS:  # no long stretch without a block
        starts = sorted(one.tokens.start for one in found)
        assert max(np.diff(starts)) < 4 * tokens / BLOCKS * 2


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 3, 100, 8), (1, 1024, 1, 2), (1, 1, 1024, 1)], ids=str)
def test_little_is_sampled_whole(shape) -> None:
    batch, heads, tokens, _ = shape
    count = np.zeros((batch, heads, tokens), int)
    for one in sample_blocks(shape):
        count[one.batch, one.head, one.tokens.slice] += 1
    assert (count == 1).all()


def hashes(array, layout: str | None = None) -> tuple[str, str]:
    with closing(as_source(array, "q", layout)) as source:
        return sampled_hash(source), full_hash(source)


class OnDevice(np.ndarray):
    """What CuPy's arrays do that is needed here."""

    device = SimpleNamespace(id=0)

    def get(self, order: str) -> np.ndarray:
        assert self.dtype.kind == "u"
        return np.array(self, order=order, subok=False)


def hashes_on_a_device(array: np.ndarray, layout: str) -> tuple[str, str]:
    source = DeviceSource(array.view(OnDevice), Layout(layout), "q")
    return sampled_hash(source), full_hash(source)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("dtype", ["f2", "bfloat16", "f4", "f8"])
def test_every_way_of_reading_gives_the_same(tmp_path, layout, dtype) -> None:
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    array = np.random.default_rng(0).standard_normal((2, 3, 700, 8)).astype(kind)
    array = np.ascontiguousarray(array if layout == "bhnd" else array.swapaxes(1, 2))
    stored = array.view("u2") if dtype == "bfloat16" else array
    chunks = {"whole": array.shape, "odd": (1, *(max(1, n // 3 + 1) for n in array.shape[1:3]), 5), "flat": None}
    with h5py.File(tmp_path / "in.h5", "w") as file:
        for name, chunk in chunks.items():
            made = file.create_dataset(name, data=stored, chunks=chunk, compression="gzip" if chunk else None)
            made.attrs["layout"] = layout
            if dtype == "bfloat16":
                made.attrs["dtype"] = "bfloat16"
    expected = hashes(array, layout)
    array.tofile(tmp_path / "in.raw")
    assert hashes(np.memmap(tmp_path / "in.raw", kind, "r", shape=array.shape), layout) == expected
    for name in chunks:
        assert hashes(dataset(f"{tmp_path}/in.h5:/{name}")) == expected, name
    assert hashes_on_a_device(array, layout) == expected
    with h5py.File(tmp_path / "in.h5", "r") as file:
        for name in chunks:
            assert hashes(file[name]) == expected, name
    assert len(set(expected)) == 2


def test_every_bit_counts_in_the_full_one() -> None:
    array = np.random.default_rng(0).standard_normal((2, 2, 600, 4)).astype("f4")
    array[0, 0, 5, 0] = np.nan
    samples, everything = hashes(array)
    places = [(0, 0, 0, 0), (1, 1, 599, 3), (0, 1, 300, 2), (1, 0, 77, 1), (0, 0, 5, 0)]
    inside = {(b.batch, b.head, t) for b in sample_blocks(array.shape) for t in range(b.tokens.start, b.tokens.stop)}
    for place in places:
        changed = array.copy()
        changed.view("u4")[place] ^= 1
        assert hashes(changed)[1] != everything
        assert (hashes(changed)[0] != samples) == (place[:3] in inside)
    assert hashes(array[::-1])[1] != everything
    assert hashes(array[:, ::-1])[1] != everything


def test_both_can_be_stopped() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with closing(as_source(np.zeros((2, 600, 4), "f4"), "q")) as source:
        for one in (sampled_hash, full_hash):
            with pytest.raises(KeyboardInterrupt):
                one(source, stop)


def test_blocks_of_one_chunk_are_read_together(tmp_path) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("q", data=np.zeros((2, 20_000, 8), "f4"), chunks=(2, 4096, 8), compression="gzip")
    with closing(cqsa.open(tmp_path / "in.h5").q.source()) as source:
        usual, calls = source.read, []
        source.read = lambda *arguments: (calls.append(1), usual(*arguments))
        sampled_hash(source)
    assert len(calls) <= 9  # five chunks, and blocks across their borders
