"""The functions of ``vector_ir`` as Numba intrinsics, for the processor that Numba compiles for.

Each takes the scratch array first: its dtype selects the arithmetic. Addresses are integers, because queries, keys,
values and state lie in several buffers at once.
"""
# The typing functions must name every argument: Numba reads their signatures.
# ruff: noqa: D103

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from ...forks import once
from .tiles import Tile, instruction_set, tile_for
from .vector_ir import vector_function


def target_tile(context: Any, dtype: str) -> Tile:
    """The tile for the processor that a Numba target ``context`` compiles for."""
    triple, _, features = context.codegen().magic_tuple()
    return tile_for(instruction_set(triple, features), dtype)


@once
def host_tile(dtype: str) -> Tile:
    """The tile of this machine."""
    return target_tile(cpu_target.target_context, dtype)


def _call(kind: str, scratch: Any, argument_count: int) -> tuple[Any, Any]:
    """Numba signature and code generator of the vector function ``kind``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        function = vector_function(builder.module, target_tile(context, str(scratch.dtype)), kind)
        values = [
            builder.inttoptr(value, kind) if isinstance(kind, ir.PointerType) else value
            for value, kind in zip(arguments[1:], function.function_type.args, strict=True)
        ]
        builder.call(function, values)
        return context.get_dummy_value()

    return types.void(scratch, *[types.intp] * argument_count), codegen


@intrinsic
def panel_rows(typing_context, scratch):
    """Query rows of one panel, a compile-time constant."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return context.get_constant(types.intp, target_tile(context, str(scratch.dtype)).rows)

    return types.intp(scratch), codegen


@intrinsic
def tile_columns(typing_context, scratch):
    """Value columns of one register tile, a compile-time constant."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return context.get_constant(types.intp, target_tile(context, str(scratch.dtype)).keys)

    return types.intp(scratch), codegen


@intrinsic
def block_scores(typing_context, scratch, queries, keys, stride, count, head_dim, scores, maxima):
    return _call("scores", scratch, 7)


@intrinsic
def block_more_scores(typing_context, scratch, queries, keys, stride, count, head_dim, scores):
    return _call("more_scores", scratch, 6)


@intrinsic
def block_mask(typing_context, scratch, scores, count, limits, maxima):
    return _call("mask", scratch, 4)


@intrinsic
def block_weights(typing_context, scratch, scores, count, maxima, m, normalizer, alpha):
    return _call("weights", scratch, 6)


@intrinsic
def block_values(typing_context, scratch, weights, values, stride, count, value_dim, alpha, limits, accumulator):
    return _call("values", scratch, 8)


@intrinsic
def block_masked_values(typing_context, scratch, weights, values, stride, count, value_dim, alpha, limits, accumulator):
    return _call("masked_values", scratch, 8)


@intrinsic
def block_copy(typing_context, scratch, rows, stride, count, row_bytes, out, out_stride):
    return _call("copy", scratch, 6)


@intrinsic
def block_totals(typing_context, scratch, sums, high, low, factors, columns):
    return _call("totals", scratch, 5)
