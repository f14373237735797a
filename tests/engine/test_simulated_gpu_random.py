"""Random problems on the simulated GPU: any mixture of places, layouts, masks and budgets is exact, within its plan."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import simulated_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_cuda import lock, simulated_gpu
from test_simulated_gpu import exact

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.job import Request, attend, collect_statistics, prepared

RANDOM = settings(max_examples=80, deadline=None, derandomize=True, database=None)
TOLERANCE = {"float16": 6e-4, "float32": 1e-6, "float64": 1e-13}
PLACES = {
    "host": lambda array: array,
    "page-locked": lock,
    "device": lambda array: array.view(simulated_cuda.Array),
}


@dataclass(frozen=True)
class Drawn:
    """One problem; ``room`` times the least budget is what it gets."""

    shape: tuple[int, int, int, int, int, int]  # batch, heads, queries, keys, D, Dv
    dtype: str
    layout: str
    offset: int | None
    places: tuple[str, str, str]
    cover: str
    room: float
    statistics: bool
    seed: int

    def arrays(self) -> list[np.ndarray]:
        batch, heads, queries, keys, dim, value_dim = self.shape
        rng = np.random.default_rng(self.seed)
        shapes = ((queries, dim), (keys, dim), (keys, value_dim))
        return [rng.standard_normal((batch, heads, *shape)).astype(self.dtype) for shape in shapes]


@st.composite
def drawn(draw) -> Drawn:
    queries, keys = draw(st.integers(1, 1200)), draw(st.integers(1, 1200))
    sizes = (draw(st.integers(1, 2)), draw(st.integers(1, 4)), queries, keys)
    dims = st.sampled_from([1, 5, 8, 16])
    return Drawn(
        (*sizes, draw(dims), draw(dims)),
        draw(st.sampled_from(["float16", "float32", "float64"])),
        draw(st.sampled_from(["bhnd", "bnhd"])),
        draw(st.one_of(st.none(), st.integers(-queries, keys))),
        tuple(draw(st.sampled_from(sorted(PLACES))) for _ in "qkv"),
        draw(st.sampled_from(["auto", "cqs", "rectangular"])),
        draw(st.sampled_from([1.0, 1.0, 1.3, 2.0, 10.0])),
        draw(st.booleans()),
        draw(st.integers(0, 1 << 20)),
    )


def least_or_any(request: dict, as_statistics: bool) -> int:
    """The smallest budget, or 0 where nothing is taken from the device."""
    try:
        with prepared(Request(**request, memory=1), as_statistics=as_statistics):
            return 0
    except cqsa.BudgetError as error:
        return int(re.search(r"Pass memory=(\d+)", str(error))[1])


@given(drawn())
@RANDOM
def test_any_problem_is_exact_and_within_its_plan(one) -> None:
    arrays = one.arrays()
    with simulated_gpu(one.seed) as gpu:
        physical = [x if one.layout == "bhnd" else np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
        q, k, v = (PLACES[place](x) for place, x in zip(one.places, physical, strict=True))
        request = {
            "q": q, "k": k, "v": v, "layout": one.layout, "device": "cuda", "options": Options(cover=one.cover),
            "mask": None if one.offset is None else cqsa.causal(one.offset),
        }  # fmt: skip
        memory = max(1, int(one.room * least_or_any(request, one.statistics)))
        with prepared(Request(**request, memory=memory), as_statistics=one.statistics) as job:
            assert job.plan.memory_bytes <= memory
            out = collect_statistics(job).output() if one.statistics else attend(job)[0]
            assert gpu.peak_bytes == max(job.plan.memory_bytes, 512)  # one unit is the least that is asked for
        found = np.asarray(out)
        if one.layout == "bnhd" and not one.statistics:
            found = found.swapaxes(1, 2)
        expected = exact(*arrays, one.offset)
        report = cqsa.compare(found.reshape(expected.shape), expected, tolerance=TOLERANCE[one.dtype])
        assert report.passed, report
