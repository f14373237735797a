"""Rows between arrays of the host and the device through page-locked memory: loops that do not hold Python's lock.

They call the driver, and semaphores of the C library, by the addresses of their functions. Arguments are vectors of
64-bit integers:

    functions  the context, then addresses in the order of ``DRIVER_FUNCTIONS`` and ``SYSTEM_FUNCTIONS``
    pinned     address, bytes of a share, an event for each share: recorded after the last copy that uses it
    region     address, inner count, outer stride, inner stride, bytes of a row, bytes of all rows, address on the
               device, and of several regions, the shares that those before it fill
    bill       of a shipment: address and number of its regions, of the events that it comes after, and of those that
               are recorded when it has come; its shares; of these, how many are begun, how many done (one more when
               the events are recorded); the driver's error; the threads of a board that are through with it
    board      how many bills were posted, then the addresses of the last ones, each in the place of its number modulo
               how many there are room for; 0 is the end

Row r lies at ``address + r // inner count * outer stride + r % inner count * inner stride``; on the device rows follow
each other without gaps. While the device copies some shares, the processor fills or empties others.
"""

from __future__ import annotations

import numba as nb
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ...compiled import kept_on_disk

DRIVER_FUNCTIONS = (
    "cuCtxSetCurrent", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuEventRecord", "cuEventSynchronize",
    "cuStreamWaitEvent",
)  # fmt: skip
SYSTEM_FUNCTIONS = ("sem_wait", "sem_trywait", "sem_post")
_CONTEXT, _SET_CONTEXT, _TO_DEVICE, _TO_HOST, _RECORD, _SYNCHRONIZE, _WAIT, _SLEEP, _LOOK, _WAKE = range(10)
_ADDRESS, _INNER, _OUTER_STRIDE, _INNER_STRIDE, _ROW_BYTES, _BYTES, _DEVICE, _BEFORE = range(8)
_REGION_BYTES = 8 * 8
_REGIONS, _AFTER, _ARRIVED, _SHARES, _BEGUN, _DONE, _FAILED, _PASSED = 0, 2, 4, 6, 7, 8, 9, 10
# More than there are shares.
_NO_MORE = 1 << 62
_VECTOR = nb.int64[::1]
SEND = nb.int64(_VECTOR, _VECTOR, nb.int64, nb.int64, nb.int64)
SERVE = nb.void(_VECTOR, _VECTOR, _VECTOR, nb.int64, nb.int64, nb.int64)
POST = nb.void(_VECTOR, _VECTOR, _VECTOR, nb.int64)
RECEIVE = nb.int64(_VECTOR, _VECTOR, _VECTOR, nb.int64, nb.int64, nb.int64)
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


@intrinsic
def _at(typing_context, address):
    """The integer at ``address``, as other threads have left it."""

    def codegen(context, builder, signature, values):
        return builder.load_atomic(builder.inttoptr(values[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _put(typing_context, address, number):
    """Store an integer at ``address``, for other threads."""

    def codegen(context, builder, signature, values):
        builder.store_atomic(values[1], builder.inttoptr(values[0], _I64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@nb.njit
def _of(vector, place):
    """A number of the vector at an address."""
    return _at(vector + 8 * place)


@nb.njit
def _move(region, first, count, memory, outward):
    """Bytes ``first`` .. ``first + count`` of all rows to ``memory``, or ``outward``, from there."""
    end, row_bytes = first + count, _of(region, _ROW_BYTES)
    address, inner_count = _of(region, _ADDRESS), _of(region, _INNER)
    outer_stride, inner_stride = _of(region, _OUTER_STRIDE), _of(region, _INNER_STRIDE)
    while first < end:
        row, skipped = first // row_bytes, first % row_bytes
        size = min(row_bytes - skipped, end - first)
        outer, inner = row // inner_count, row % inner_count
        place = address + outer * outer_stride + inner * inner_stride + skipped
        if outward:
            _copy(place, memory, size)
        else:
            _copy(memory, place, size)
        memory += size
        first += size


@nb.njit
def _send_shares(functions, pinned, bill, stream):
    """A thread's shares of a shipment: until none is left, or one fails."""
    if _of(bill, _BEGUN) >= _of(bill, _SHARES):
        return  # before the driver is called, which has one lock for all threads
    status = _call(functions[_SET_CONTEXT], (functions[_CONTEXT],))
    for e in range(_of(bill, _AFTER + 1)):
        event = _of(_of(bill, _AFTER), e)
        status = status or _call(functions[_WAIT], (stream, event, 0))
    regions, region_count = _of(bill, _REGIONS), _of(bill, _REGIONS + 1)
    share, shares, turn = pinned[1], _of(bill, _SHARES), 0
    while status == 0:
        number, region = _add(bill + 8 * _BEGUN, 1), regions
        if number >= shares:
            break
        last = regions + _REGION_BYTES * (region_count - 1)
        while region < last and _of(region + _REGION_BYTES, _BEFORE) <= number:
            region += _REGION_BYTES
        first, place = (number - _of(region, _BEFORE)) * share, turn % (len(pinned) - 2)
        memory, event = pinned[0] + place * share, pinned[2 + place]
        count = min(share, _of(region, _BYTES) - first)
        status = _call(functions[_SYNCHRONIZE], (event,))
        if status == 0:
            _move(region, first, count, memory, False)
            status = _call(functions[_TO_DEVICE], (_of(region, _DEVICE) + first, memory, count, stream))
            status = status or _call(functions[_RECORD], (event, stream))
        if status == 0 and _add(bill + 8 * _DONE, 1) + 1 == shares:
            for e in range(_of(bill, _ARRIVED + 1)):
                status = status or _call(functions[_RECORD], (_of(_of(bill, _ARRIVED), e), stream))
            if status == 0:
                _add(bill + 8 * _DONE, 1)
        turn += 1
    if status != 0:
        _put(bill + 8 * _FAILED, status)
        _put(bill + 8 * _BEGUN, _NO_MORE)


@kept_on_disk
@nb.njit(nogil=True)
def send(functions, pinned, bill, stream, patience):
    """Put copies of a shipment on ``stream``, share by share beside other threads; 0 or the driver's error.

    Who has no share left to do looks whether the others are done, as many times as it has ``patience``.
    """
    _send_shares(functions, pinned, bill, stream)
    while patience > 0 and _of(bill, _FAILED) == 0 and _of(bill, _DONE) <= _of(bill, _SHARES):
        patience -= 1
    return _of(bill, _FAILED)


@kept_on_disk
@nb.njit(nogil=True)
def serve(functions, pinned, board, semaphore, stream, patience):
    """Send what is posted on ``board``, beside other threads, each woken by a semaphore of its own; until the end.

    A thread looks for its first shipment as many times as it has ``patience``, before it sleeps.
    """
    taken = 0
    while True:
        while patience > 0 and _call(functions[_LOOK], (semaphore,)) != 0:
            patience -= 1
        while patience <= 0 and _call(functions[_SLEEP], (semaphore,)) != 0:
            pass  # a signal has come
        patience = 0
        bill = _at(board.ctypes.data + 8 * (1 + taken % (len(board) - 1)))
        if bill == 0:
            break
        _send_shares(functions, pinned, bill, stream)
        _add(bill + 8 * _PASSED, 1)
        taken += 1


@kept_on_disk
@nb.njit
def post(functions, board, semaphores, bill):
    """Have a shipment sent by those who serve the board; 0 is the end."""
    posted = board[0]
    _put(board.ctypes.data + 8 * (1 + posted % (len(board) - 1)), bill)
    board[0] = posted + 1
    for semaphore in semaphores:
        _call(functions[_WAKE], (semaphore,))


@kept_on_disk
@nb.njit(nogil=True)
def receive(functions, pinned, region, stream, ready, asleep):
    """Fill ``region`` from the device, behind the event ``ready``, if not 0; 0 or the driver's error.

    That is waited for by the event ``asleep``, by which a thread sleeps.
    """
    status = _call(functions[_SET_CONTEXT], (functions[_CONTEXT],))
    if ready != 0:
        status = status or _call(functions[_WAIT], (stream, ready, 0))
        status = status or _call(functions[_RECORD], (asleep, stream))
        status = status or _call(functions[_SYNCHRONIZE], (asleep,))
    share, places = pinned[1], len(pinned) - 2
    turns = (region[_BYTES] + share - 1) // share
    for turn in range(turns + places - 1):
        if turn < turns and status == 0:
            first, place = turn * share, turn % places
            memory, count = pinned[0] + place * share, min(share, region[_BYTES] - first)
            status = _call(functions[_TO_HOST], (memory, region[_DEVICE] + first, count, stream))
            status = status or _call(functions[_RECORD], (pinned[2 + place], stream))
        come = turn - places + 1
        if come >= 0 and status == 0:
            first, place = come * share, come % places
            status = _call(functions[_SYNCHRONIZE], (pinned[2 + place],))
            if status == 0:
                _move(region.ctypes.data, first, min(share, region[_BYTES] - first), pinned[0] + place * share, True)
    return status
