"""Rows between arrays of the host and the device through page-locked memory: loops that do not hold Python's lock.

They call the driver by the addresses of its functions. Arguments are vectors of 64-bit integers:

    driver   the context, then addresses in the order of ``DRIVER_FUNCTIONS``
    pinned   address, bytes of a share, an event for each share: recorded after the last copy that uses it
    region   address, inner count, outer stride, inner stride, bytes of a row, bytes of all rows, address on the device,
             and of several regions, the shares that those before it fill

Row r lies at ``address + r // inner count * outer stride + r % inner count * inner stride``; on the device rows follow
each other without gaps. While the device copies some shares, the processor fills or empties others.
"""

from __future__ import annotations

import numba as nb
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

DRIVER_FUNCTIONS = (
    "cuCtxSetCurrent", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuEventRecord", "cuEventSynchronize",
    "cuStreamWaitEvent",
)  # fmt: skip
_CONTEXT, _SET_CONTEXT, _TO_DEVICE, _TO_HOST, _RECORD, _SYNCHRONIZE, _WAIT = range(1 + len(DRIVER_FUNCTIONS))
_ADDRESS, _INNER, _OUTER_STRIDE, _INNER_STRIDE, _ROW_BYTES, _BYTES, _DEVICE, _BEFORE = range(8)
_VECTOR = nb.int64[::1]
SEND = nb.int64(_VECTOR, _VECTOR, nb.int64[:, ::1], _VECTOR, nb.int64, _VECTOR, _VECTOR, nb.int64)
RECEIVE = nb.int64(_VECTOR, _VECTOR, _VECTOR, nb.int64)
_I64, _POINTER = ir.IntType(64), ir.IntType(8).as_pointer()


@intrinsic
def _call(typing_context, function, arguments):
    """What the C function at the address ``function`` returns, an int, for a tuple of integers."""

    def codegen(context, builder, signature, values):
        given = [builder.extract_value(values[1], i) for i in range(len(arguments))]
        kind = ir.FunctionType(ir.IntType(32), [_I64] * len(given))
        return builder.sext(builder.call(builder.inttoptr(values[0], kind.as_pointer()), given), _I64)

    return types.int64(types.int64, arguments), codegen


@intrinsic
def _copy(typing_context, to, source, size):
    """C's memcpy."""

    def codegen(context, builder, signature, values):
        kind = ir.FunctionType(_POINTER, [_POINTER, _POINTER, _I64])
        memcpy = builder.module.globals.get("memcpy") or ir.Function(builder.module, kind, "memcpy")
        to, source, size = values
        builder.call(memcpy, [builder.inttoptr(to, _POINTER), builder.inttoptr(source, _POINTER), size])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _add(typing_context, address, number):
    """Add to the integer at ``address``, as if no other thread did meanwhile; what it was before."""

    def codegen(context, builder, signature, values):
        return builder.atomic_rmw("add", builder.inttoptr(values[0], _I64.as_pointer()), values[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@nb.njit
def _move(region, first, count, memory, outward):
    """Bytes ``first`` .. ``first + count`` of all rows to ``memory``, or ``outward``, from there."""
    end = first + count
    while first < end:
        row, skipped = first // region[_ROW_BYTES], first % region[_ROW_BYTES]
        size = min(region[_ROW_BYTES] - skipped, end - first)
        outer, inner = row // region[_INNER], row % region[_INNER]
        place = region[_ADDRESS] + outer * region[_OUTER_STRIDE] + inner * region[_INNER_STRIDE] + skipped
        if outward:
            _copy(place, memory, size)
        else:
            _copy(memory, place, size)
        memory += size
        first += size


@nb.njit(nogil=True, cache=True)
def send(driver, pinned, regions, counts, stream, after, arrived, patience):
    """Put copies of ``regions`` to the device on ``stream``, behind the events ``after``; 0 or the driver's error.

    Share by share, beside other threads: ``counts`` has how many shares are begun, how many are done, and how many
    there are. Whoever does the last one records the events ``arrived`` and counts once more; who has none left
    to do looks for that as many times as it has ``patience``.
    """
    begun, done = counts.ctypes.data, counts.ctypes.data + 8
    status = _call(driver[_SET_CONTEXT], (driver[_CONTEXT],))
    for event in after:
        status = status or _call(driver[_WAIT], (stream, event, 0))
    share, turn = pinned[1], 0
    while status == 0:
        number, r = _add(begun, 1), 0
        if number >= counts[2]:
            break
        while r + 1 < len(regions) and regions[r + 1, _BEFORE] <= number:
            r += 1
        first, place = (number - regions[r, _BEFORE]) * share, turn % (len(pinned) - 2)
        memory, event = pinned[0] + place * share, pinned[2 + place]
        count = min(share, regions[r, _BYTES] - first)
        status = _call(driver[_SYNCHRONIZE], (event,))
        if status == 0:
            _move(regions[r], first, count, memory, False)
            status = _call(driver[_TO_DEVICE], (regions[r, _DEVICE] + first, memory, count, stream))
            status = status or _call(driver[_RECORD], (event, stream))
        if status == 0 and _add(done, 1) + 1 == counts[2]:
            for event in arrived:
                status = status or _call(driver[_RECORD], (event, stream))
            if status == 0:
                _add(done, 1)
        turn += 1
    while status == 0 and patience > 0 and _add(done, 0) <= counts[2]:
        patience -= 1
    return status


@nb.njit(nogil=True, cache=True)
def receive(driver, pinned, region, stream):
    """Fill ``region`` from the device, behind what is on ``stream``; 0 or the driver's error."""
    status = _call(driver[_SET_CONTEXT], (driver[_CONTEXT],))
    share, places = pinned[1], len(pinned) - 2
    turns = (region[_BYTES] + share - 1) // share
    for turn in range(turns + places - 1):
        if turn < turns and status == 0:
            first, place = turn * share, turn % places
            memory, count = pinned[0] + place * share, min(share, region[_BYTES] - first)
            status = _call(driver[_TO_HOST], (memory, region[_DEVICE] + first, count, stream))
            status = status or _call(driver[_RECORD], (pinned[2 + place], stream))
        come = turn - places + 1
        if come >= 0 and status == 0:
            first, place = come * share, come % places
            status = _call(driver[_SYNCHRONIZE], (pinned[2 + place],))
            if status == 0:
                _move(region, first, min(share, region[_BYTES] - first), pinned[0] + place * share, True)
    return status
