"""Problems for the CUDA kernels and their launches, for every family; skips where CuPy is missing."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
from gpu_cases import BFLOAT16, assert_close, assert_lse_close, exact_where, host, normal

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock
from cqsa_arrays.kernels.cuda.variants import choose_variant, simple_variant
from cqsa_arrays.masks import UNBOUNDED_DIAGONAL

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
packing = pytest.importorskip("cqsa_arrays.kernels.cuda.call")
kernels = pytest.importorskip("cqsa_arrays.kernels.cuda.kernel")

EVERYTHING = packing.RowMask(-UNBOUNDED_DIAGONAL, UNBOUNDED_DIAGONAL)
SPAN = 1 << 20
# Name: element type, whether products are split, whether it is the plain kernel.
FAMILIES = {
    "half": ("float16", False, False),
    "half, bfloat16": ("bfloat16", False, False),
    "hopper": ("float16", False, False),
    "hopper, bfloat16": ("bfloat16", False, False),
    "single": ("float32", False, False),
    "split": ("float32", True, False),
    "double": ("float64", False, False),
    "simple, float16": ("float16", False, True),
    "simple, bfloat16": ("bfloat16", False, True),
    "simple, float32": ("float32", False, True),
    "simple, float64": ("float64", False, True),
}
by_family = pytest.mark.parametrize("family", FAMILIES)
# First token and number of tokens of each piece: gaps, a single key, less and more than a tile.
PIECES = ((0, 130), (200, 1), (300, 77), (1000, 311), (1311, 64))


@dataclass
class Case:
    """Queries of consecutive tokens and pieces of keys and values, on the host."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pieces: tuple[tuple[int, int], ...] = PIECES
    query_start: int = 0
    scale: float = 0.125

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([np.arange(start, start + count) for start, count in self.pieces])

    @property
    def rows(self) -> np.ndarray:
        return self.query_start + np.arange(self.q.shape[2])

    def exact(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = (self.tokens >= low[:, None]) & (self.tokens < high[:, None])
        return exact_where(self.q, self.k, self.v, seen, self.scale)

    def part(self, first: int, last: int) -> Case:
        """With the pieces first .. last - 1 only."""
        ends = np.cumsum([0, *(count for _, count in self.pieces)])
        keys = np.s_[:, :, ends[first] : ends[last]]
        return Case(self.q, self.k[keys], self.v[keys], self.pieces[first:last], self.query_start, self.scale)


def case(family: str, dim=64, value_dim=None, rows=200, heads=3, batch=2, pieces=PIECES, seed=0, **more) -> Case:
    dtype = FAMILIES[family][0]
    dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    keys = sum(count for _, count in pieces)
    shapes = ((rows, dim), (keys, dim), (keys, value_dim or dim))
    q, k, v = (normal(batch, heads, *shape, dtype=dtype, seed=3 * seed + i) for i, shape in enumerate(shapes))
    return Case(q, k, v, tuple(pieces), scale=dim**-0.5, **more)


def state_dtype(family: str) -> str:
    return "float64" if FAMILIES[family][0] == "float64" else "float32"


@functools.cache
def kernel_of(family: str, dim: int, value_dim: int):
    """A CudaKernel with the variant of ``family``, whatever it would choose by itself."""
    dtype, split, simple = FAMILIES[family]
    made = kernels.CudaKernel(dtype, head_dim=dim, value_dim=value_dim, scale=1.0)
    capability = cupy.cuda.Device().compute_capability
    version = int(capability[:-1]), int(capability[-1])
    variant = (
        simple_variant(dtype)
        if simple
        else choose_variant(dtype, dim, value_dim, version, split=split, whole_words="hopper" in family)
    )
    made.variant, made._function = variant, kernels.load(variant, cupy.cuda.Device().id)
    return made


class Guarded:
    """An array of NaN inside a larger one of NaN."""

    def __init__(self, shape: tuple[int, ...], dtype: object) -> None:
        self._whole = cupy.asarray(np.full([length + 2 for length in shape], np.nan, dtype))
        self._inside = tuple(slice(1, 1 + length) for length in shape)
        self.array = self._whole[self._inside]

    def checked(self) -> np.ndarray:
        """What was written, on the host, and nothing around it was."""
        whole = host(self._whole)
        found = whole[self._inside].copy()
        whole[self._inside] = np.nan
        assert np.isnan(whole).all()
        return found


def empty_state(one: Case, family: str, poisoned: bool = False) -> BlockStatistics:
    shape, dtype = one.q.shape[:3], state_dtype(family)
    if not poisoned:
        return BlockStatistics.empty(shape, one.v.shape[3], dtype, cupy)
    guarded = (Guarded((*shape, one.v.shape[3]), dtype), Guarded(shape, dtype), Guarded(shape, dtype))
    return BlockStatistics(*(each.array for each in guarded))


def on_device(one: Case, view=cupy.asarray):
    """Queries and key blocks there, slices of one array as a launch asks; ``view`` makes it of the host array."""
    ends, keys, values = np.cumsum([0, *(count for _, count in one.pieces)]), view(one.k), view(one.v)
    blocks = [
        KeyBlock(start, keys[:, :, a:b], values[:, :, a:b])
        for (start, _), a, b in zip(one.pieces, ends, ends[1:], strict=False)
    ]
    return view(one.q), blocks


def launch(
    family, one, *, low=None, high=None, mask=EVERYTHING, state=None, fresh=True, span=SPAN, finish=True,
    out_dtype=None, view=cupy.asarray,
):  # fmt: skip
    """One launch: output and log-sum-exp, NaN beforehand, or None, None where ``finish`` is false."""
    kernel = kernel_of(family, one.q.shape[3], one.v.shape[3])
    queries, blocks = on_device(one, view)
    rows, dtype = one.q.shape[:3], state_dtype(family)
    out, lse = Guarded((*rows, one.v.shape[3]), out_dtype or dtype), Guarded(rows, dtype)
    ends = packing.Finish(out.array, lse.array) if finish else None
    call = packing.pack_call(
        queries, one.query_start, blocks, state, ends, mask=mask, scale=one.scale, span_keys=span, fresh=fresh
    )
    intervals = [None if bound is None else cupy.asarray(bound, "int64") for bound in (low, high)]
    if low is not None:
        call["row_low"], call["row_high"] = (bound.data.ptr for bound in intervals)
    kernel._launch(call)
    cupy.cuda.Device().synchronize()
    written = out.checked(), lse.checked()
    return written if finish else (None, None)


def close(family: str, one: Case, low, high, out, lse) -> None:
    expected, expected_lse = one.exact(np.asarray(low), np.asarray(high))
    dtype = BFLOAT16 if "bfloat16" in family else FAMILIES[family][0]
    assert_close(out, expected, dtype)
    assert_lse_close(lse, expected_lse)


def everything(one: Case) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(one.q.shape[2], "i8"), np.full(one.q.shape[2], 1 << 60)


def intervals(one: Case, kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What each row sees: anything, also nothing, less than nothing and keys that are not there."""
    rng, rows, last = np.random.default_rng(seed), one.q.shape[2], int(one.tokens[-1]) + 1
    if kind == "random":
        return np.sort(rng.integers(-50, last + 50, (2, rows)), axis=0)
    if kind == "some rows see nothing":
        low, high = np.sort(rng.integers(0, last, (2, rows)), axis=0)
        return low, np.where(rng.random(rows) < 0.5, low - rng.integers(0, 9, rows), high)
    if kind == "only gaps":
        return np.full(rows, 201), np.full(rows, 300)
    low = np.where(np.arange(rows) < rows // 2, 0, 1000)
    return low, np.where(np.arange(rows) < rows // 2, 130, 1375)
