"""Attention of chosen query rows in float64, straight from the formula: the judge of every other result.

Two passes over the keys, in blocks: first each row's largest score, then the sums of ``exp(score - largest)``. No state
is ever re-based or merged, so that nothing is shared with the code that is judged. Where it is asked for, the second
pass also finds how far the result moves when scores are rounded (docs/design/exactness.md). Memory is a few blocks of
``block_tokens`` tokens plus the rows asked for, however long the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from .errors import ArgumentError
from .masks import Mask
from .ranges import Range
from .rounding import Repeats, Rounding, ScoreRounding

# Query rows (times query heads of one group) that pass over the keys together: 256 x 4096 float64 scores are 8 MiB.
_ROWS_AT_ONCE = 256

# Keys whose scores are held at once: few enough to stay in the processor's cache.
_PIECE_TOKENS = 2048

# How many keys are added before the running sum of values is looked at.
_LOOK_TOKENS = 1024


class TokenBlocks(Protocol):
    """What the reference asks of queries, keys and values, wherever they are kept."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch, heads, tokens, dim)."""

    def read(self, batch: Range, heads: Range, tokens: Range, out: np.ndarray) -> None:
        """Fill ``out``, float64, C-contiguous, (len(batch), len(heads), len(tokens), dim)."""


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceRows:
    """Exact results of R chosen query rows, the same for every batch and head.

    ``rows`` (R,) int64 are token numbers, ``out`` (batch, heads, R, Dv) and ``lse`` (batch, heads, R) are float64.
    ``rounding``, in ``arithmetic``, is None where it was not asked for.
    """

    rows: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    rounding: Rounding | None = None
    arithmetic: str | None = None


def sample_rows(tokens: int, count: int, seed: int) -> np.ndarray:
    """``count`` different rows of ``tokens``, sorted int64, always with the first and the last one.

    The ends are where masks and ragged tiles go wrong. Fewer where there are not so many rows, two where ``count`` is
    1. Raises ArgumentError where either is below 1.

    >>> sample_rows(10, 10, seed=0)
    array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    for name, value in (("tokens", tokens), ("count", count)):
        if value < 1:
            raise ArgumentError(name, value, "at least 1", "Ask for at least one row of at least one token.")
    inner = max(tokens - 2, 0)
    chosen = np.random.default_rng(seed).choice(inner, min(max(count - 2, 0), inner), replace=False)
    return np.unique(np.concatenate([[0], chosen + 1, [tokens - 1]])).astype(np.int64)


@np.errstate(all="ignore")  # NaN and infinities are part of the contract
def reference_rows(
    q: TokenBlocks,
    k: TokenBlocks,
    v: TokenBlocks,
    rows: np.ndarray,
    *,
    mask: Mask,
    scale: float,
    arithmetic: str | None = None,
    block_tokens: int = 4096,
) -> ReferenceRows:
    """Softmax attention of ``rows`` of every batch and head, in float64.

    ``q`` is (B, H, Nq, D), ``k`` (B, Hkv, Nk, D), ``v`` (B, Hkv, Nk, Dv), H a multiple of Hkv: query head h uses key
    head ``h // (H // Hkv)``. ``rows`` are token numbers below Nq. The score is ``scale * q . k``, natural units.

    NaN and infinities follow the formula: a row that sees a NaN or +inf score is NaN, a visible weight 0 times a value
    inf is NaN, and keys that the mask hides touch nothing, whatever they hold. One exception: a row without a visible
    key, or with only -inf scores, is 0 with log-sum-exp -inf.

    ``arithmetic``, "float32" or "float64", asks for ``rounding`` in it: a score counts as known to ``SCORE_ERROR`` of
    the sizes that are rounded on the way to it.

    Raises ArgumentError for shapes or rows that do not fit.

    >>> import cqsa_arrays.masks
    >>> class Ones:
    ...     shape = (1, 1, 4, 2)
    ...     def read(self, batch, heads, tokens, out): out[:] = 1.0
    >>> found = reference_rows(Ones(), Ones(), Ones(), np.array([3]), mask=cqsa_arrays.masks.Causal(), scale=0.5)
    >>> found.out.tolist(), found.lse.round(3).tolist()  # four equal scores of 1: 1 + log(4)
    ([[[[1.0, 1.0]]]], [[[2.386]]])
    """
    _check_shapes(q.shape, k.shape, v.shape)
    rows = _checked_rows(rows, q.shape[2])
    if block_tokens < 1:
        raise ArgumentError("block_tokens", block_tokens, "at least 1 token", "Leave it out for the default.")
    batches, heads, group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    out = np.empty((batches, heads, len(rows), v.shape[3]))
    lse = np.empty(out.shape[:3])
    rounding = None if arithmetic is None else Rounding(*(np.empty(lse.shape) for _ in fields(Rounding)))
    for b in range(batches):
        for key_head in range(k.shape[1]):
            query_heads = Range(key_head * group, (key_head + 1) * group)
            for part in Range(0, len(rows)).split(max(1, _ROWS_AT_ONCE // group)):
                queries = scale * _read_rows(q, b, query_heads, rows[part.slice])
                strip = _Strip(k, v, b, key_head, [mask.keys_of(int(row), k.shape[2]) for row in rows[part.slice]])
                target = (b, query_heads.slice, part.slice)
                found = strip.attend(queries, block_tokens, arithmetic)
                out[target], lse[target] = found.out, found.lse
                if rounding is not None and found.rounding is not None:
                    for field in fields(Rounding):
                        getattr(rounding, field.name)[target] = getattr(found.rounding, field.name)
    return ReferenceRows(rows, out, lse, rounding, arithmetic)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """Results of one strip: out (g, R, Dv) and lse (g, R); rounding where it was asked for."""

    out: np.ndarray
    lse: np.ndarray
    rounding: Rounding | None


@dataclass(frozen=True, slots=True)
class _Strip:
    """The keys and values of one batch and key head, with the interval of keys that each row sees."""

    k: TokenBlocks
    v: TokenBlocks
    batch: int
    head: int
    seen: list[Range]

    def attend(self, queries: np.ndarray, block_tokens: int, arithmetic: str | None) -> _Found:
        """The results of scaled ``queries`` (g, R, D)."""
        largest = np.full(queries.shape[:2], -np.inf)
        repeats = Repeats()
        for tokens, visible in self._visible_blocks(block_tokens):
            keys = self._read(self.k, tokens)
            largest = np.maximum(largest, _scores(queries, keys, visible).max(axis=2))
            if arithmetic is not None:
                repeats.look_at(keys)
        nothing = largest == -np.inf
        weight_sum = np.zeros(queries.shape[:2])
        value_sum = np.zeros((*queries.shape[:2], self.v.shape[3]))
        shift, moved = np.where(nothing, 0.0, largest), None
        if arithmetic is not None:
            moved = ScoreRounding(queries, shift, value_sum.shape[2], arithmetic, repeats=repeats.found)
        for tokens, visible in self._visible_blocks(block_tokens):
            keys, values = self._read(self.k, tokens), self._read(self.v, tokens)
            for piece in Range(0, len(tokens)).split(_PIECE_TOKENS):
                part = piece.slice
                scores = _scores(queries, keys[part], visible[:, part])
                weights = np.exp(scores - shift[..., None])
                weight_sum += weights.sum(axis=2)
                for few in Range(0, len(piece)).split(_LOOK_TOKENS):
                    these = Range(piece.start + few.start, piece.start + few.stop).slice
                    value_sum += _weighted_sum(weights[..., few.slice], values[these], visible[:, these])
                    if moved is not None:
                        moved.look_at(value_sum)
                if moved is not None:
                    moved.add(scores, weights, keys[part], values[part])
        out = np.where(nothing[..., None], 0.0, value_sum / weight_sum[..., None])
        lse = largest + np.log(weight_sum)
        return _Found(out, lse, None if moved is None else moved.result(out, lse, weight_sum))

    def _visible_blocks(self, block_tokens: int) -> Iterator[tuple[Range, np.ndarray]]:
        """The key blocks that any row sees, each with its boolean (R, tokens) visibility."""
        first = np.array([keys.start for keys in self.seen])[:, None]
        stop = np.array([keys.stop for keys in self.seen])[:, None]
        for tokens in Range(int(first.min()), int(stop.max())).split(block_tokens):
            position = np.arange(tokens.start, tokens.stop)
            visible = (first <= position) & (position < stop)
            if visible.any():
                yield tokens, visible

    def _read(self, source: TokenBlocks, tokens: Range) -> np.ndarray:
        return _read_block(source, self.batch, Range(self.head, self.head + 1), tokens)[0]


def _scores(queries: np.ndarray, keys: np.ndarray, visible: np.ndarray) -> np.ndarray:
    return np.where(visible, queries @ keys.T, -np.inf)


def _weighted_sum(weights: np.ndarray, values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Sum over visible keys: (g, R, n) weights and (n, Dv) values to (g, R, Dv)."""
    if np.isfinite(values).all():
        return weights @ values
    # The weight 0 of a hidden key times its NaN or inf would be NaN: leave hidden keys out row by row.
    return np.stack([weights[:, r, keys] @ values[keys] for r, keys in enumerate(visible)], axis=1)


def _read_block(source: TokenBlocks, batch: int, heads: Range, tokens: Range) -> np.ndarray:
    """(heads, tokens, dim) of one batch."""
    block = np.empty((1, len(heads), len(tokens), source.shape[3]))
    source.read(Range(batch, batch + 1), heads, tokens, block)
    return block[0]


def _read_rows(source: TokenBlocks, batch: int, heads: Range, rows: np.ndarray) -> np.ndarray:
    """(heads, len(rows), dim): one read for each run of consecutive rows."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    blocks = [_read_block(source, batch, heads, Range(int(run[0]), int(run[-1]) + 1)) for run in runs]
    return np.concatenate(blocks, axis=1)


def _checked_rows(rows: np.ndarray, tokens: int) -> np.ndarray:
    rows = np.asarray(rows)
    valid = rows.ndim == 1 and rows.size > 0 and rows.dtype.kind in "iu"
    if not (valid and rows.min() >= 0 and rows.max() < tokens):
        found = f"{rows.dtype} {rows.shape}" + (f" from {rows.min()} to {rows.max()}" if valid else "")
        raise ArgumentError("rows", found, f"at least one integer from 0 to {tokens - 1}", "Use sample_rows.")
    return rows.astype(np.int64)


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    fits = len(q) == len(k) == len(v) == 4
    fits = fits and (q[0], q[3]) == (k[0], k[3]) and k[:3] == v[:3] and k[1] > 0 and q[1] % k[1] == 0
    if not fits:
        raise ArgumentError(
            "q, k, v",
            f"shapes {q}, {k}, {v}",
            "(B, H, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv) with H a multiple of Hkv",
            "Check the layout of each array.",
        )
