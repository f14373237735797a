"""The inner loops of the CPU kernel, written as LLVM vector code.

Vector lanes are query rows, so a softmax row lives in one lane and no step reduces across lanes. With R rows in a panel
(R = lanes * vectors) and up to ``BLOCK_KEYS`` keys in a block, three functions share one block:

    scores    S (keys, R)  = K (keys, D) @ Qt (D, R)            and the block's row maxima
    weights   S <- exp(S - m),  l <- l * alpha + sum(S),  alpha = exp(m_old - m)
    values    At (Dv, R)   = At * alpha + V^T (Dv, keys) @ S (keys, R)

and every span of blocks ends with ``totals``, which adds At and l to sums in float64.
Keys and values are read one scalar broadcast at a time, with the caller's token stride. The two products are the same
register tile: ``tile.keys`` scalars against ``tile.vectors`` vectors, accumulators in registers. Everything is plain
IEEE arithmetic with explicit fused multiply-adds: no fast-math flag, so that NaN and infinity survive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from llvmlite import ir

from .tiles import PART_KEYS, Tile

I64 = ir.IntType(64)
BYTES = ir.IntType(8).as_pointer()
# Mantissa bits, exponent bias, degree of the polynomial, and the power of 2 below which a weight counts as 0.
_FORMATS = {"float32": (23, 127, 6, -100), "float64": (52, 1023, 11, -960)}


def exp2_coefficients(degree: int) -> list[float]:
    """Power series of 2**f on [-0.5, 0.5], lowest degree first: Taylor's, economised by Chebyshev polynomials.

    Each step removes the highest power by subtracting the multiple of T_n(2 f) that cancels it, which spreads its error
    over the interval and changes the low coefficients by less than their rounding.
    """
    series = [math.log(2) ** k / math.factorial(k) for k in range(degree + 4)]
    while len(series) > degree + 1:
        order = len(series) - 1
        chebyshev = np.polynomial.chebyshev.cheb2poly([0.0] * order + [1.0]) * 2.0 ** np.arange(order + 1)
        series = [float(c) for c in series - series[-1] / chebyshev[-1] * chebyshev][:-1]
    return series


class Emitter:
    """Writes one function's body; knows the tile's vector types and nothing of what is computed."""

    def __init__(self, function: ir.Function, tile: Tile) -> None:
        self.tile = tile
        self.build = ir.IRBuilder(function.append_basic_block("entry"))
        self.function = function
        self.scalar = ir.FloatType() if tile.dtype == "float32" else ir.DoubleType()
        self.vector = ir.VectorType(self.scalar, tile.lanes)
        self.bits = ir.VectorType(ir.IntType(8 * tile.itemsize), tile.lanes)
        self.wide = ir.VectorType(ir.DoubleType(), tile.lanes)

    def splat(self, scalar: ir.Value) -> ir.Value:
        one = self.build.insert_element(
            ir.Constant(ir.VectorType(scalar.type, self.tile.lanes), ir.Undefined), scalar, I64(0)
        )
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.tile.lanes), [0] * self.tile.lanes)
        return self.build.shuffle_vector(one, ir.Constant(one.type, ir.Undefined), mask)

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.vector, [value] * self.tile.lanes)

    def address(self, base: ir.Value, elements: ir.Value) -> ir.Value:
        """``base + elements * itemsize`` as a byte pointer."""
        return self.build.gep(base, [self.build.mul(elements, I64(self.tile.itemsize))])

    def load_scalar(self, pointer: ir.Value) -> ir.Value:
        load = self.build.load(self.build.bitcast(pointer, self.scalar.as_pointer()))
        load.align = self.tile.itemsize
        return load

    def vector_pointer(self, base: ir.Value, row: ir.Value | int, vector: int) -> ir.Value:
        """Vector ``vector`` of row ``row`` in an array whose rows are whole panels."""
        row = I64(row) if isinstance(row, int) else row
        element = self.build.add(self.build.mul(row, I64(self.tile.rows)), I64(vector * self.tile.lanes))
        return self.build.bitcast(self.address(base, element), self.vector.as_pointer())

    def load(self, base: ir.Value, row: ir.Value | int, vector: int) -> ir.Value:
        load = self.build.load(self.vector_pointer(base, row, vector))
        load.align = self.tile.lanes * self.tile.itemsize
        return load

    def store(self, value: ir.Value, base: ir.Value, row: ir.Value | int, vector: int) -> None:
        store = self.build.store(value, self.vector_pointer(base, row, vector))
        store.align = self.tile.lanes * self.tile.itemsize

    def wide_pointer(self, base: ir.Value, row: ir.Value | int, vector: int) -> ir.Value:
        """The same of an array in float64."""
        row = I64(row) if isinstance(row, int) else row
        element = self.build.add(self.build.mul(row, I64(self.tile.rows)), I64(vector * self.tile.lanes))
        return self.build.bitcast(self.build.gep(base, [self.build.mul(element, I64(8))]), self.wide.as_pointer())

    def load_wide(self, base: ir.Value, row: ir.Value | int, vector: int) -> ir.Value:
        load = self.build.load(self.wide_pointer(base, row, vector))
        load.align = 8
        return load

    def store_wide(self, value: ir.Value, base: ir.Value, row: ir.Value | int, vector: int) -> None:
        store = self.build.store(value, self.wide_pointer(base, row, vector))
        store.align = 8

    def widened(self, x: ir.Value) -> ir.Value:
        """``x`` in float64."""
        return x if self.tile.itemsize == 8 else self.build.fpext(x, self.wide)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        name = f"llvm.fma.v{self.tile.lanes}f{8 * self.tile.itemsize}"
        function = self.function.module.globals.get(name)
        if function is None:
            function = ir.Function(self.function.module, ir.FunctionType(self.vector, [self.vector] * 3), name)
        return self.build.call(function, [a, b, c])

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger lane by lane; ``b`` where either is NaN."""
        return self.build.select(self.build.fcmp_ordered(">", a, b), a, b)

    @contextmanager
    def loop(self, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """``for index in range(0, stop, step)``; ``stop`` is at least 1."""
        before, body = self.build.block, self.function.append_basic_block("body")
        self.build.branch(body)
        self.build.position_at_end(body)
        index = self.build.phi(I64)
        index.add_incoming(I64(0), before)
        yield index
        following = self.build.add(index, I64(step))
        index.add_incoming(following, self.build.block)
        after = self.function.append_basic_block("after")
        self.build.cbranch(self.build.icmp_signed("<", following, stop), body, after)
        self.build.position_at_end(after)

    def variables(self, count: int, value: ir.Value) -> list[ir.Value]:
        """Stack slots, which LLVM turns into registers."""
        with self.build.goto_entry_block():
            slots = [self.build.alloca(self.vector) for _ in range(count)]
        for slot in slots:
            self.build.store(value, slot)
        return slots

    def exp(self, x: ir.Value) -> ir.Value:
        """exp(x) for x <= 0, to about one unit in the last place; NaN stays NaN.

        Below 2**-100 (2**-960 in double precision) it is exactly 0: products of smaller weights with values would be
        subnormal, and those take a hundred cycles each. 2**n is built by adding a constant whose low bits then hold n
        plus the exponent bias. The comparison is unordered, so that a NaN is kept: NaN times whatever 2**n has become
        is NaN.
        """
        mantissa, bias, degree, lowest = _FORMATS[self.tile.dtype]
        log2e = self.constant(float(np.log2(np.e)))
        magic = self.constant(1.5 * 2**mantissa + bias)
        shifted = self.fma(x, log2e, magic)
        fraction = self.fma(x, log2e, self.build.fneg(self.build.fsub(shifted, magic)))
        first, *others = reversed(exp2_coefficients(degree))
        result = self.constant(first)
        for coefficient in others:
            result = self.fma(result, fraction, self.constant(coefficient))
        shift = ir.Constant(self.bits, [mantissa] * self.tile.lanes)
        power = self.build.bitcast(self.build.shl(self.build.bitcast(shifted, self.bits), shift), self.vector)
        kept = self.build.fcmp_unordered(">=", x, self.constant(lowest * float(np.log(2))))
        return self.build.select(kept, self.build.fmul(result, power), self.constant(0.0))


def _clamped(e: Emitter, first: ir.Value, count: ir.Value, offset: int) -> ir.Value:
    """``min(first + offset, count - 1)``: a ragged tile repeats its last member instead of reading past the end."""
    wanted, last = e.build.add(first, I64(offset)), e.build.sub(count, I64(1))
    return e.build.select(e.build.icmp_signed("<", wanted, last), wanted, last)


def _rest(e: Emitter, first: ir.Value, count: ir.Value, most: int) -> ir.Value:
    """``min(count - first, most)``."""
    left = e.build.sub(count, first)
    return e.build.select(e.build.icmp_signed("<", left, I64(most)), left, I64(most))


def _multiply_tile(
    e: Emitter,
    pointers: list[ir.Value],
    stride: ir.Value,
    panel: ir.Value,
    count: ir.Value,
    visible: Callable | None = None,
) -> list[list[ir.Value]]:
    """sum over i < count of scalar(pointers[j] + i * stride) * panel row i: one register tile, [pointer][vector]."""
    vectors = range(e.tile.vectors)
    slots = [e.variables(e.tile.vectors, e.constant(0.0)) for _ in pointers]
    with e.loop(count) as i:
        rows = [e.load(panel, i, v) for v in vectors]
        offset = e.build.mul(i, stride)
        masks = [visible(i, v) for v in vectors] if visible else None
        for pointer, row_slots in zip(pointers, slots, strict=True):
            scalar = e.splat(e.load_scalar(e.build.gep(pointer, [offset])))
            for v in vectors:
                factor = e.build.select(masks[v], scalar, e.constant(0.0)) if masks else scalar
                e.build.store(e.fma(factor, rows[v], e.build.load(row_slots[v])), row_slots[v])
    return [[e.build.load(slot) for slot in row_slots] for row_slots in slots]


def _scores(
    e: Emitter,
    queries: ir.Value,
    keys: ir.Value,
    stride: ir.Value,
    count: ir.Value,
    head_dim: ir.Value,
    scores: ir.Value,
    maxima: ir.Value,
) -> None:
    """scores(queries, keys, key_stride_bytes, key_count, head_dim, out scores, out maxima)."""
    for v in range(e.tile.vectors):
        e.store(e.constant(-np.inf), maxima, 0, v)
    with e.loop(count, e.tile.keys) as first:
        pointers = [e.build.gep(keys, [e.build.mul(_clamped(e, first, count, j), stride)]) for j in range(e.tile.keys)]
        products = _multiply_tile(e, pointers, I64(e.tile.itemsize), queries, head_dim)
        for v in range(e.tile.vectors):
            best = e.load(maxima, 0, v)
            for j in range(e.tile.keys):
                best = e.maximum(products[j][v], best)
                e.store(products[j][v], scores, e.build.add(first, I64(j)), v)
            e.store(best, maxima, 0, v)


def _more_scores(
    e: Emitter,
    queries: ir.Value,
    keys: ir.Value,
    stride: ir.Value,
    count: ir.Value,
    head_dim: ir.Value,
    scores: ir.Value,
) -> None:
    """more_scores(queries, keys, key_stride_bytes, key_count, head_dim, in/out scores): add a part of the dot products.

    ``mask`` takes the maxima when the last part is added.
    """
    with e.loop(count, e.tile.keys) as first:
        pointers = [e.build.gep(keys, [e.build.mul(_clamped(e, first, count, j), stride)]) for j in range(e.tile.keys)]
        products = _multiply_tile(e, pointers, I64(e.tile.itemsize), queries, head_dim)
        for j, row in enumerate(products):
            for v, product in enumerate(row):
                place = e.build.add(first, I64(j))
                e.store(e.build.fadd(e.load(scores, place, v), product), scores, place, v)


def _visible(e: Emitter, limits: ir.Value) -> Callable:
    """Key i of the block is visible to a row when i < the row's limit; limits are held in the kernel's arithmetic."""

    def visible(i: ir.Value, v: int) -> ir.Value:
        return e.build.fcmp_ordered("<", e.splat(e.build.sitofp(i, e.scalar)), e.load(limits, 0, v))

    return visible


def _mask(e: Emitter, scores: ir.Value, count: ir.Value, limits: ir.Value, maxima: ir.Value) -> None:
    """mask(scores, key_count, limits, out maxima): invisible scores become -inf, the maxima are taken again."""
    visible = _visible(e, limits)
    best = e.variables(e.tile.vectors, e.constant(-np.inf))
    with e.loop(count) as i:
        for v in range(e.tile.vectors):
            score = e.build.select(visible(i, v), e.load(scores, i, v), e.constant(-np.inf))
            e.store(score, scores, i, v)
            e.build.store(e.maximum(score, e.build.load(best[v])), best[v])
    for v in range(e.tile.vectors):
        e.store(e.build.load(best[v]), maxima, 0, v)


def _weights(
    e: Emitter, scores: ir.Value, count: ir.Value, maxima: ir.Value, m: ir.Value, normalizer: ir.Value, alpha: ir.Value
) -> None:
    """weights(scores, key_count, maxima, m, l, out alpha): one softmax step, scores turned into weights."""
    vectors = range(e.tile.vectors)
    bases, sums = [], e.variables(e.tile.vectors, e.constant(0.0))
    for v in vectors:
        old = e.load(m, 0, v)
        new = e.maximum(e.load(maxima, 0, v), old)
        # A row that has seen nothing but -inf keeps m = -inf; subtracting 0 instead gives weight 0 and not NaN.
        base = e.build.select(e.build.fcmp_ordered("==", new, e.constant(-np.inf)), e.constant(0.0), new)
        bases.append(base)
        e.store(new, m, 0, v)
        e.store(e.exp(e.build.fsub(old, base)), alpha, 0, v)
    with e.loop(count, PART_KEYS) as first:
        part = e.variables(e.tile.vectors, e.constant(0.0))
        with e.loop(_rest(e, first, count, PART_KEYS)) as j:
            i = e.build.add(first, j)
            for v in vectors:
                weight = e.exp(e.build.fsub(e.load(scores, i, v), bases[v]))
                e.store(weight, scores, i, v)
                e.build.store(e.build.fadd(e.build.load(part[v]), weight), part[v])
        for v in vectors:
            e.build.store(e.build.fadd(e.build.load(sums[v]), e.build.load(part[v])), sums[v])
    for v in vectors:
        e.store(e.fma(e.load(normalizer, 0, v), e.load(alpha, 0, v), e.build.load(sums[v])), normalizer, 0, v)


def _values(
    e: Emitter,
    weights: ir.Value,
    values: ir.Value,
    stride: ir.Value,
    count: ir.Value,
    value_dim: ir.Value,
    alpha: ir.Value,
    limits: ir.Value,
    accumulator: ir.Value,
    *,
    masked: bool,
) -> None:
    """values(weights, values, value_stride_bytes, key_count, value_dim, alpha, limits, in/out accumulator).

    Products of ``PART_KEYS`` keys start from zero and are added to the accumulator. The masked variant never multiplies
    an invisible value: 0 * NaN would let it reach a row that cannot see it. Its tile is half as wide, for the masked
    scalars need registers too.
    """
    seen = _visible(e, limits)
    width = e.tile.keys // 2 if masked else e.tile.keys
    with e.loop(value_dim, width) as first, e.loop(count, PART_KEYS) as begin:
        offset = e.build.mul(begin, stride)
        pointers = [e.build.gep(e.address(values, _clamped(e, first, value_dim, j)), [offset]) for j in range(width)]
        panel = e.address(weights, e.build.mul(begin, I64(e.tile.rows)))
        visible = (lambda i, v: seen(e.build.add(begin, i), v)) if masked else None
        products = _multiply_tile(e, pointers, stride, panel, _rest(e, begin, count, PART_KEYS), visible)
        at_first = e.build.icmp_signed("==", begin, I64(0))
        for v in range(e.tile.vectors):
            factor = e.build.select(at_first, e.load(alpha, 0, v), e.constant(1.0))
            for j in range(width):
                column = e.build.add(first, I64(j))
                e.store(e.fma(e.load(accumulator, column, v), factor, products[j][v]), accumulator, column, v)


def _totals(e: Emitter, sums: ir.Value, high: ir.Value, low: ir.Value, factors: ir.Value, columns: ir.Value) -> None:
    """totals(in/out sums, in/out high, in/out low, factors, column count): high <- high * old + sums * new, sums <- 0.

    ``factors`` are old and new of every row. In float64 arithmetic ``low`` keeps what is rounded off (Knuth's two-sum).
    """
    for v in range(e.tile.vectors):
        old, new = e.load_wide(factors, 0, v), e.load_wide(factors, 1, v)
        with e.loop(columns) as column:
            before = e.build.fmul(e.load_wide(high, column, v), old)
            more = e.build.fmul(e.widened(e.load(sums, column, v)), new)
            total = e.build.fadd(before, more)
            e.store_wide(total, high, column, v)
            e.store(e.constant(0.0), sums, column, v)
            if e.tile.itemsize == 8:
                back = e.build.fsub(total, before)
                rest = e.build.fadd(e.build.fsub(before, e.build.fsub(total, back)), e.build.fsub(more, back))
                e.store_wide(e.fma(e.load_wide(low, column, v), old, rest), low, column, v)


def _copy(
    e: Emitter, source: ir.Value, stride: ir.Value, count: ir.Value, size: ir.Value, out: ir.Value, out_stride: ir.Value
) -> None:
    """copy(rows, row_stride_bytes, row_count, row_bytes, out, out_stride_bytes): rows with another stride."""
    memcpy = e.function.module.declare_intrinsic("llvm.memcpy", [BYTES, BYTES, I64])
    with e.loop(count) as i:
        pointers = [e.build.gep(out, [e.build.mul(i, out_stride)]), e.build.gep(source, [e.build.mul(i, stride)])]
        e.build.call(memcpy, [*pointers, size, ir.Constant(ir.IntType(1), 0)])


# Argument kinds: p a byte pointer, i a 64-bit integer.
_BODIES: dict[str, tuple[str, Callable[..., None]]] = {
    "scores": ("ppiiipp", _scores),
    "more_scores": ("ppiiip", _more_scores),
    "mask": ("pipp", _mask),
    "weights": ("pipppp", _weights),
    "values": ("ppiiippp", partial(_values, masked=False)),
    "copy": ("piiipi", _copy),
    "totals": ("ppppi", _totals),
    "masked_values": ("ppiiippp", partial(_values, masked=True)),
}
FUNCTIONS = tuple(_BODIES)


def vector_function(module: ir.Module, tile: Tile, kind: str) -> ir.Function:
    """The function ``kind`` (one of ``FUNCTIONS``) for ``tile`` in ``module``, written at its first use."""
    name = f"cqsa_{kind}_{tile.name}_{tile.dtype}"
    if name in module.globals:
        return module.globals[name]
    arguments, body = _BODIES[kind]
    types = [BYTES if letter == "p" else I64 for letter in arguments]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), types), name)
    function.linkage = "internal"
    emitter = Emitter(function, tile)
    body(emitter, *function.args)
    emitter.build.ret_void()
    return function
