"""The argument of every CUDA kernel, ``struct Call`` of call.cuh, made from arrays on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...block_statistics import BlockStatistics
from ..base import KeyBlock

MAX_PIECES = 64
# Pieces are counted in 32 bits inside the kernels.
PIECE_TOKENS = 1 << 29
ELEMENT_KINDS = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
_WORD_BYTES = 16

_PIECE = np.dtype([("keys", "u8"), ("values", "u8"), ("start", "i8"), ("tokens", "i8")])
_STRIDES = np.dtype([("batch", "i8"), ("head", "i8"), ("token", "i8")])
# In the order of the struct: first everything of 8 bytes, then everything of 4, so that there is no padding.
CALL = np.dtype(
    [("pieces", _PIECE, MAX_PIECES)]
    + [(name, "u8") for name in ("queries", "acc", "m", "l", "out", "lse", "row_low", "row_high")]
    + [(f"{name}_strides", _STRIDES) for name in ("query", "key", "value", "acc", "out", "stat", "lse")]
    + [(name, "i8") for name in ("query_start", "query_tokens", "low_diagonal", "high_diagonal", "span_keys")]
    + [("scale", "f8")]
    + [(n, "i4") for n in ("piece_count", "batches", "heads", "head_dim", "value_dim", "fresh", "out_kind", "aligned")]
)


@dataclass(frozen=True, slots=True)
class RowMask:
    """Row r, counted from token 0, sees the keys ``r + low <= j <= r + high``."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Where finished rows go: ``out`` (batch, heads, rows, Dv) of any float type, ``lse`` (batch, heads, rows)."""

    out: Any
    lse: Any | None


def pack_call(
    queries: Any | None,
    query_start: int,
    blocks: Sequence[KeyBlock],
    state: BlockStatistics | None,
    finish: Finish | None,
    *,
    mask: RowMask,
    scale: float,
    span_keys: int,
    fresh: bool,
) -> np.ndarray:
    """The argument, an array of one ``CALL``, for at most ``MAX_PIECES`` blocks of equal strides.

    All arrays are logical, (batch, heads, tokens, dim), on one device, with contiguous vectors. Without ``queries`` and
    ``blocks`` the rows of ``state`` are only finished.
    """
    call = np.zeros(1, CALL)
    entry = call[0]
    arrays: dict[str, Any] = {}
    if queries is not None:
        entry["queries"], entry["head_dim"], arrays["query"] = queries.data.ptr, queries.shape[3], queries
    if len({(block.keys.strides, block.values.strides) for block in blocks}) > 1:
        raise ValueError("key blocks of one launch have equal strides")
    for piece, block in zip(entry["pieces"], blocks, strict=False):
        piece["keys"], piece["values"] = block.keys.data.ptr, block.values.data.ptr
        piece["start"], piece["tokens"] = block.start, block.keys.shape[2]
        arrays |= {"key": block.keys, "value": block.values}
    if state is not None:
        entry["acc"], entry["m"], entry["l"] = (part.data.ptr for part in (state.acc, state.m, state.l))
        arrays |= {"acc": state.acc, "stat": state.m}
    if finish is not None:
        entry["out"], entry["out_kind"] = finish.out.data.ptr, ELEMENT_KINDS[finish.out.dtype.name]
        arrays["out"] = finish.out
        if finish.lse is not None:
            entry["lse"], arrays["lse"] = finish.lse.data.ptr, finish.lse
    for name, array in arrays.items():
        steps = [stride // array.itemsize for stride in array.strides[:3]]
        entry[f"{name}_strides"] = tuple(steps)
    rows = arrays.get("query", arrays.get("acc"))
    assert rows is not None, "queries or a state"
    entry["batches"], entry["heads"], entry["query_tokens"] = rows.shape[:3]
    entry["value_dim"] = next(arrays[name].shape[3] for name in ("value", "acc") if name in arrays)
    entry["query_start"], entry["low_diagonal"], entry["high_diagonal"] = query_start, mask.low, mask.high
    entry["span_keys"], entry["scale"], entry["fresh"] = span_keys, scale, fresh
    entry["piece_count"] = len(blocks)
    inputs = [
        array for array in (queries, *(a for block in blocks for a in (block.keys, block.values))) if array is not None
    ]
    entry["aligned"] = all(_whole_words(array) for array in inputs)
    return call


def _whole_words(array: Any) -> bool:
    """Whether every vector of ``array`` is whole 16-byte words on 16-byte borders."""
    steps = (array.data.ptr, array.shape[3] * array.itemsize, *array.strides[:3])
    return all(step % _WORD_BYTES == 0 for step in steps)
