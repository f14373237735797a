"""The argument of the CUDA kernels: NumPy's record is the compiler's struct, and is filled from arrays as promised."""

from __future__ import annotations

import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from nvrtc import CompileError, compile_cubin

from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.kernels.base import KeyBlock
from cqsa_arrays.kernels.cuda.call import CALL, ELEMENT_KINDS, MAX_PIECES, Finish, RowMask, pack_call
from cqsa_arrays.kernels.cuda.source import HERE, flattened


def layout(struct: str, record: np.dtype) -> str:
    """Assertions that ``struct`` has the fields of ``record`` where ``record`` has them."""
    lines = [f"static_assert(sizeof({struct}) == {record.itemsize});"]
    for name, (kind, offset, *_) in record.fields.items():
        lines.append(f"static_assert(__builtin_offsetof({struct}, {name}) == {offset});")
        lines.append(f"static_assert(sizeof((({struct}*)0)->{name}) == {kind.itemsize});")
    return "\n".join(lines)


def compiled(*lines: str) -> bytes:
    return compile_cubin("\n".join([flattened("call.cuh"), *lines]), "sm_90", ["-std=c++17"]).cubin


def test_the_record_has_sizes_and_offsets_of_the_struct():
    piece, strides = CALL["pieces"].base, CALL["query_strides"]
    kinds = [f"static_assert({name.upper()} == {number});" for name, number in ELEMENT_KINDS.items()]
    assert compiled(
        layout("Call", CALL), layout("Piece", piece), layout("Strides", strides), *kinds,
        f"static_assert(MAX_PIECES == {MAX_PIECES});",
    ).startswith(b"\x7fELF")  # fmt: skip


def test_a_field_in_the_wrong_place_would_be_seen():
    fields = [(name, CALL[name]) for name in CALL.names]
    fields[1], fields[2] = fields[2], fields[1]
    with pytest.raises(CompileError, match="static assertion failed"):
        compiled(layout("Call", np.dtype(fields)))


def test_the_record_has_every_field_of_the_struct_in_order():
    text = re.search(r"struct Call \{(.*?)\n\};", (HERE / "call.cuh").read_text(), re.S)[1]
    declared = re.findall(r"^ {4}(?:const )?\w+ (.*?);", text, re.M)
    names = [re.sub(r"[\s*]|\[\w+\]", "", name) for line in declared for name in line.split(",")]
    assert names == list(CALL.names)


def test_the_argument_fits_what_a_launch_may_pass():
    assert CALL.itemsize <= 4096


def fake(array: np.ndarray):
    """What ``pack_call`` asks of a CuPy array."""
    return SimpleNamespace(
        data=SimpleNamespace(ptr=array.ctypes.data), shape=array.shape, strides=array.strides, dtype=array.dtype,
        itemsize=array.itemsize,
    )  # fmt: skip


def call_of(q, blocks, state=None, finish=None, **changes):
    options = {"mask": RowMask(-7, 9), "scale": 0.5, "span_keys": 1024, "fresh": True, **changes}
    return pack_call(q, 11, blocks, state, finish, **options)[0]


def aligned(*shape: int, dtype="f2", shift=0) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 16 + shift
    return memory[start : start + size].view(dtype).reshape(shape)


def test_every_field_is_filled():
    q, k, v = aligned(2, 3, 50, 64), aligned(2, 3, 40, 64), aligned(2, 3, 40, 24)
    out, lse = aligned(2, 3, 50, 24, dtype=ml_dtypes.bfloat16), aligned(2, 3, 50, dtype="f4")
    state = BlockStatistics.empty((2, 3, 50), 24, "f4")
    shown = SimpleNamespace(acc=fake(state.acc), m=fake(state.m), l=fake(state.l))
    blocks = [
        KeyBlock(100, fake(k[:, :, :16]), fake(v[:, :, :16])),
        KeyBlock(200, fake(k[:, :, 16:]), fake(v[:, :, 16:])),
    ]
    call = call_of(fake(q), blocks, shown, Finish(fake(out), fake(lse)))
    assert (call["queries"], call["out"], call["lse"]) == tuple(a.ctypes.data for a in (q, out, lse))
    assert [call[name] for name in ("acc", "m", "l")] == [a.ctypes.data for a in (state.acc, state.m, state.l)]
    assert call["piece_count"] == 2
    first, second = call["pieces"][:2]
    assert (first["start"], first["tokens"], second["start"], second["tokens"]) == (100, 16, 200, 24)
    assert second["keys"] - first["keys"] == 16 * 64 * 2
    assert second["values"] - first["values"] == 16 * 24 * 2
    assert not call["pieces"][2:].view("i8").any()
    strides = {name: tuple(call[f"{name}_strides"]) for name in ("query", "key", "value", "acc", "out", "stat", "lse")}
    assert strides == {
        "query": (9600, 3200, 64), "key": (7680, 2560, 64), "value": (2880, 960, 24), "acc": (3600, 1200, 24),
        "out": (3600, 1200, 24), "stat": (150, 50, 1), "lse": (150, 50, 1),
    }  # fmt: skip
    numbers = (
        "batches",
        "heads",
        "query_tokens",
        "head_dim",
        "value_dim",
        "query_start",
        "low_diagonal",
        "high_diagonal",
    )
    assert [call[name] for name in numbers] == [2, 3, 50, 64, 24, 11, -7, 9]
    assert (call["scale"], call["span_keys"], call["fresh"], call["out_kind"], call["aligned"]) == (0.5, 1024, 1, 1, 1)
    assert (call["row_low"], call["row_high"]) == (0, 0)


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        (aligned(1, 1, 9, 64), True),
        (aligned(1, 1, 9, 64, shift=2), False),
        (aligned(1, 1, 9, 33), False),
        (aligned(1, 1, 9, 65)[..., :64], False),
        (aligned(1, 1, 9, 40), True),
        (aligned(1, 9, 2, 64).swapaxes(1, 2), True),
    ],
    ids=["whole words", "begins between", "odd vectors", "odd steps", "40 elements", "tokens outside heads"],
)
def test_whole_words_are_told_from_others(q, expected):
    dim = q.shape[3]
    block = KeyBlock(0, fake(aligned(1, 1, 9, dim)), fake(aligned(1, 1, 9, 8)))
    assert bool(call_of(fake(q), [block])["aligned"]) is expected


def test_rows_are_finished_without_queries_and_keys():
    state = BlockStatistics.empty((1, 2, 5), 3, "f8")
    shown = SimpleNamespace(acc=fake(state.acc), m=fake(state.m), l=fake(state.l))
    call = call_of(None, (), shown, Finish(fake(aligned(1, 2, 5, 3, dtype="f8")), None), fresh=False)
    assert (call["queries"], call["lse"], call["piece_count"], call["fresh"]) == (0, 0, 0, 0)
    assert (call["batches"], call["heads"], call["query_tokens"], call["value_dim"]) == (1, 2, 5, 3)
    assert call["out_kind"] == ELEMENT_KINDS["float64"]
