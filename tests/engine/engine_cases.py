"""Fakes that count, plans made to measure and the reference, which the engine's tests share."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from cqsa_arrays.engine import Inputs, OutputResults, StatisticsResults, executor
from cqsa_arrays.masks import Full
from cqsa_arrays.planner import Budget, Group, Machine, Operand, Plan, Problem, Rates, Result
from cqsa_arrays.planner.candidates import cqs_candidate, rectangular_candidate
from cqsa_arrays.planner.memory import TILE_TOKENS
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import Layout

TILE = TILE_TOKENS
TOLERANCE = {"float32": 1e-6, "float64": 2e-14}


def normal(*shape, dtype="float32", seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class FakeSource:
    """A TokenSource over ``array`` (batch, heads, tokens, dim) that notes every call, in order, in ``log``.

    Each entry is (verb, name, batch, heads, tokens). ``fail_at`` makes that read (1 is the first) write half of its
    block and raise.
    """

    held_bytes = touched_bytes = 0

    def __init__(self, name, array, log, *, in_place=False, token_major=False, fail_at=None, error=None) -> None:
        self.name, self.array, self.log = name, array, log
        self.in_place, self.token_major = in_place, token_major
        self.fail_at, self.error = fail_at, error or OSError(f"{name} is gone")
        self.shape, self.dtype, self.layout = array.shape, array.dtype, Layout("bhnd")
        self.description, self.identity = f"fake {name}", {"name": name}
        self.bytes_read, self.reads, self.strides = 0, 0, []

    def staging_bytes(self, compute_dtype) -> int:
        return 0

    def read(self, batch, heads, tokens, out) -> None:
        assert not self.in_place
        self.log.append(("read", self.name, batch, heads, tokens))
        block = self.array[batch.slice, heads.slice, tokens.slice]
        assert out.shape == block.shape
        assert out.strides[-1] == out.itemsize
        self.strides.append(out.strides)
        self.reads += 1
        if self.reads == self.fail_at:
            out[..., : len(tokens) // 2, :] = np.nan
            raise self.error
        out[...] = block
        self.bytes_read += block.nbytes

    def view(self, batch, heads, tokens) -> np.ndarray:
        assert self.in_place
        self.log.append(("view", self.name, batch, heads, tokens))
        return self.array[batch.slice, heads.slice, tokens.slice]

    def prefetch(self, batch, heads, tokens):
        self.log.append(("prefetch", self.name, batch, heads, tokens))
        return iter(())

    def close(self) -> None:
        """Nothing is open."""


class CountingSink:
    """A Sink into arrays of NaN that counts how often each row is written."""

    staging_bytes = 0

    def __init__(self, shape, value_dim, dtype="float32", lse_dtype=None) -> None:
        self.out = np.full((*shape, value_dim), np.nan, dtype)
        self.lse = np.full(shape, np.nan, lse_dtype or dtype)
        self.out_times, self.lse_times = np.zeros(shape, int), np.zeros(shape, int)
        self.longest = 0
        self._lock = threading.Lock()

    def write_out(self, batch, heads, tokens, block) -> None:
        part = (batch.slice, heads.slice, tokens.slice)
        assert block.shape == self.out[part].shape
        self.out[part] = block
        with self._lock:
            self.out_times[part] += 1
            self.longest = max(self.longest, len(tokens))

    def write_lse(self, batch, heads, tokens, block) -> None:
        part = (batch.slice, heads.slice, tokens.slice)
        assert block.shape == self.lse[part].shape
        self.lse[part] = block
        with self._lock:
            self.lse_times[part] += 1

    def check_once(self) -> None:
        assert (self.out_times == 1).all()
        assert (self.lse_times == 1).all()


class Counter:
    """A Progress that adds up."""

    def __init__(self) -> None:
        self.pairs, self.calls = 0, 0
        self._lock = threading.Lock()

    def advance(self, pairs: int) -> None:
        assert pairs >= 0
        with self._lock:
            self.pairs += pairs
            self.calls += 1

    def close(self) -> None:
        """Nothing to do."""


def reference(q, k, v, mask, scale) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp in float64 by the formula; a row that sees no key is 0 and -inf."""
    q, k, v = (array.astype("float64") for array in (q, k, v))
    scores = scale * (q @ k.swapaxes(2, 3))
    if not isinstance(mask, Full):
        rows, columns = np.arange(q.shape[2])[:, None], np.arange(k.shape[2])
        scores = np.where(columns <= rows + mask.offset, scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(largest == -np.inf, 0, largest))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(total > 0, weights @ v / total, 0)
        lse = np.where(total > 0, largest + np.log(total), -np.inf)
    return out, lse[..., 0]


def relative_error(found, wanted) -> float:
    return float(np.linalg.norm(found.astype("float64") - wanted) / (np.linalg.norm(wanted) or 1))


@dataclass
class Case:
    """One attention problem with fake sources, and plans made to measure for it."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: object = field(default_factory=Full)
    in_place: bool = False
    token_major: bool = False
    threads: int = 2
    holds_states: bool = False
    fail: tuple[str, int] | None = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.log: list = []
        self.scale = 0.3
        self.sources = {}
        for name in "qkv":
            fail_at = self.fail[1] if self.fail and self.fail[0] == name else None
            self.sources[name] = FakeSource(
                name, getattr(self, name), self.log, in_place=self.in_place, token_major=self.token_major,
                fail_at=fail_at, error=self.error,
            )  # fmt: skip
        self.inputs = Inputs(**self.sources)

    @property
    def compute(self) -> str:
        return "float64" if self.q.dtype == np.float64 else "float32"

    @property
    def rows_shape(self) -> tuple[int, int, int]:
        return self.q.shape[:3]

    @property
    def problem(self) -> Problem:
        def operand(source: FakeSource) -> Operand:
            return Operand(
                source.shape, source.dtype.name, source.dtype.itemsize, source.in_place, source.token_major, 0, 0, ""
            )

        itemsize = np.dtype(self.compute).itemsize
        result = Result(self.compute, itemsize, "array", 1, 0, "counted", self.holds_states)
        operands = (operand(self.sources[name]) for name in "qkv")
        return Problem(*operands, result, self.compute, self.mask, self.scale)

    def _plan(self, candidate, scratch) -> Plan:
        budget = Budget(candidate.memory_bytes, "made to measure", str(scratch))
        return Plan(self.problem, "cpu", budget, candidate, None, "asked for")

    def cqs(self, chunks, group=None, on_disk=False, scratch="/nowhere") -> Plan:
        machine = Machine(self.threads, 1 << 34, Rates())
        return self._plan(
            cqs_candidate(self.problem, machine, group or self.q.shape[:2], "disk" if on_disk else "memory", chunks),
            scratch,
        )

    def rectangular(self, query_parts, key_block, group=None) -> Plan:
        machine = Machine(self.threads, 1 << 34, Rates())
        group = group or self.q.shape[:2]
        return self._plan(rectangular_candidate(self.problem, machine, group, key_block, query_parts), "/nowhere")

    def run(self, plan, progress=None, piece_rows=50) -> tuple[CountingSink, executor.RunReport]:
        """The rows in a counting sink, each written once, and the report."""
        sink = CountingSink(self.rows_shape, self.v.shape[3], self.compute)
        home = np.full((*self.rows_shape, self.v.shape[3]), np.nan, self.compute) if self.holds_states else None
        with closing(OutputResults(sink, piece_rows, self.threads, home)) as results:
            report = executor.run(plan, self.inputs, results, progress or Counter())
        if plan.states_in_result:  # rows are divided where they lie and never written
            assert (sink.out_times == 0).all()
            sink.out[...] = home
            sink.out_times += 1
        sink.check_once()
        return sink, report

    def statistics(self, plan):
        results = StatisticsResults(self.rows_shape, self.v.shape[3], self.compute)
        executor.run(plan, self.inputs, results, Counter())
        return results.statistics

    def check(self, sink) -> None:
        out, lse = reference(self.q, self.k, self.v, self.mask, self.scale)
        empty = lse == -np.inf
        assert (sink.out[empty] == 0).all()
        assert (sink.lse[empty] == -np.inf).all()
        assert relative_error(sink.out, out) <= TOLERANCE[self.compute]
        error = np.abs(sink.lse[~empty] - lse[~empty])
        assert (error <= TOLERANCE[self.compute] * (10 + np.abs(lse[~empty]))).all()

    def entries(self, verb, names="qkv") -> list[tuple]:
        """(name, batch, heads, tokens) of each call, in order."""
        return [entry[1:] for entry in self.log if entry[0] == verb and entry[1] in names]


def case(queries=700, keys=None, batch=1, heads=2, dim=4, value_dim=3, dtype="float32", **options) -> Case:
    keys = queries if keys is None else keys
    q = normal(batch, heads, queries, dim, dtype=dtype, seed=1)
    k = normal(batch, heads, keys, dim, dtype=dtype, seed=2)
    return Case(q, k, normal(batch, heads, keys, value_dim, dtype=dtype, seed=3), **options)


def open_files_below(directory) -> list[str]:
    """What this process holds open in ``directory``, files without a name among them."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # the listing's own
            continue
        if target.startswith(str(directory)):
            found.append(target)
    return found


def group(heads=1, batch=1, first_head=0) -> Group:
    return Group(Range(0, batch), Range(first_head, first_head + heads))
