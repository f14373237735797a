"""Block statistics: what a query row must remember of the keys it has seen, so that blocks combine exactly.

For a set of keys with scores ``s_j`` (natural units, scale included) and values ``v_j`` one row keeps a base m and

    l = sum_j exp(s_j - m)        acc = sum_j exp(s_j - m) * v_j

Two disjoint key sets merge by re-basing both on one m, and the row ends as

    output = acc / l     lse = m + log(l)

Any m will do. States that kernels and ``merge`` make have l near 1: acc is a mean of values then, so that large finite
values do not add up to infinity, and errors of rounding do not all point the same way.
``exp(lse)`` is never formed: it overflows float32 at a score of 88.7. Sources: Milakov and Gimelshein, "Online
normalizer calculation for softmax", arXiv 1805.02867; step 4 (result reconstruction) of Stream-CQSA, arXiv 2604.20819.

The cases at the edge, which every producer of a state follows:

==================================  ==============================  ================================
a row whose scores are              has the state                   and ends as
==================================  ==============================  ================================
none, or all -inf                   m = -inf, l = 0, acc = 0        output 0, lse -inf
some -inf                           those keys weigh exactly 0      as without those keys
with a +inf                         m = +inf, l = NaN, acc = NaN    NaN (inf - inf in the formula)
with a NaN                          l = NaN; m is NaN or ignores it  NaN, through any later merge
==================================  ==============================  ================================

NaN and infinities of the values reach ``acc`` as in the formula (a visible key of weight 0 and value inf gives NaN).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .errors import ArgumentError

Array = Any  # numpy.ndarray or cupy.ndarray


def array_namespace(array: Array, argument: str = "array") -> ModuleType:
    """The module, numpy or cupy, whose functions take ``array``; CuPy is found but never imported.

    Raises ArgumentError, naming ``argument``, for any other type.

    >>> array_namespace(np.zeros(3)).__name__
    'numpy'
    """
    if isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray):  # its mask would be lost
        return np
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    raise ArgumentError(
        argument, type(array).__name__, "a NumPy or CuPy array", "Convert it with numpy.asarray or cupy.asarray."
    )


@dataclass(frozen=True, slots=True, eq=False)
class BlockStatistics:
    """The statistics of query rows over one set of keys.

    ``acc`` is (..., rows, Dv), ``m`` and ``l`` are (..., rows): all float32 or all float64, all NumPy or all CuPy.
    Raises ArgumentError where they are not. The arrays are kept, not copied.

    >>> left = BlockStatistics(acc=np.array([[2.0]]), m=np.array([0.0]), l=np.array([1.0]))
    >>> right = BlockStatistics(acc=np.array([[4.0]]), m=np.array([0.0]), l=np.array([1.0]))
    >>> both = left.merge(right)
    >>> both.output(), both.lse().round(3)
    (array([[3.]]), array([0.693]))
    """

    acc: Array
    m: Array
    l: Array  # noqa: E741 - the name in the papers

    def __post_init__(self) -> None:
        namespaces = {name: array_namespace(getattr(self, name), name) for name in ("acc", "m", "l")}
        if self.acc.dtype.name not in ("float32", "float64"):
            raise ArgumentError("acc", self.acc.dtype, "float32 or float64", "Narrow the output, not the state.")
        rows = self.acc.shape[:-1]
        for name, part in (("m", self.m), ("l", self.l)):
            if not rows or part.shape != rows or part.dtype != self.acc.dtype or namespaces[name] != namespaces["acc"]:
                raise ArgumentError(
                    name,
                    f"{_describe(part)} with acc {_describe(self.acc)}",
                    "acc (..., rows, Dv), m and l (..., rows), of one dtype and one array library",
                    "Pass the three arrays of one state.",
                )

    def __repr__(self) -> str:
        library = array_namespace(self.acc).__name__
        return f"<BlockStatistics of {library}: rows {self.m.shape}, Dv {self.acc.shape[-1]}, {self.acc.dtype}>"

    @classmethod
    def empty(cls, shape: tuple[int, ...], value_dim: int, dtype: Any, xp: Any = np) -> BlockStatistics:
        """Rows of ``shape`` that saw no key yet; ``xp`` is numpy or cupy."""
        return cls(
            xp.zeros((*shape, value_dim), dtype=dtype),
            xp.full(shape, -np.inf, dtype=dtype),
            xp.zeros(shape, dtype=dtype),
        )

    @property
    def saw_no_key(self) -> Array:
        """Boolean (..., rows): rows with no key of weight above 0. A row whose ``l`` is NaN did see one."""
        return (self.m == -np.inf) & (self.l == 0)

    def merge(self, other: BlockStatistics) -> BlockStatistics:
        """``merge(self, other)``."""
        return merge(self, other)

    def output(self, dtype: Any = None, out: Array | None = None) -> Array:
        """``acc / l``, (..., rows, Dv), of ``dtype`` (the state's by default); 0 for rows that saw no key.

        A new array, or ``out`` of the state's dtype, which may be ``acc`` itself: the state is then used up.
        """
        with np.errstate(all="ignore"):  # 0 / 0 of rows that saw no key, NaN rows, overflow of a narrow dtype
            out = array_namespace(self.acc).divide(self.acc, self.l[..., None], out=out)
            out[self.saw_no_key] = 0
            return out if dtype is None else out.astype(dtype, copy=False)

    def lse(self) -> Array:
        """``m + log(l)``, the natural log-sum-exp of the scores, (..., rows); -inf for rows that saw no key."""
        with np.errstate(all="ignore"):  # log(0) is the -inf that is wanted
            return self.m + array_namespace(self.l).log(self.l)


def merge(a: BlockStatistics, b: BlockStatistics) -> BlockStatistics:
    """The statistics over the keys of ``a`` and of ``b`` together, which must be disjoint sets, for the same rows.

    Rows that saw no key on one side keep the bits of the other. ``merge(a, b)`` and ``merge(b, a)`` agree bit for bit,
    NaN payloads aside, and different groupings within rounding. Raises ArgumentError for states that do not fit.
    """
    xp = array_namespace(a.acc)
    if (a.acc.shape, a.acc.dtype, xp) != (b.acc.shape, b.acc.dtype, array_namespace(b.acc)):
        raise ArgumentError(
            "b", _describe(b.acc), f"a state like a, {_describe(a.acc)}", "Merge states of the same query rows."
        )
    with np.errstate(all="ignore"):  # -inf - -inf of rows that saw no key, which are replaced below; NaN rows
        m, l, weight_a, weight_b = _joint(a, b, xp)  # noqa: E741
        acc = xp.multiply(a.acc, weight_a[..., None], out=xp.empty_like(a.acc))
        acc += xp.multiply(b.acc, weight_b[..., None], out=xp.empty_like(b.acc))
    # Chosen, not multiplied by 0 and added: that would turn -0.0 into 0.0, and -inf - -inf into NaN.
    only_a, only_b = b.saw_no_key, a.saw_no_key
    return BlockStatistics(
        acc=xp.where(only_b[..., None], b.acc, xp.where(only_a[..., None], a.acc, acc)),
        m=xp.where(only_b, b.m, xp.where(only_a, a.m, m)),
        l=xp.where(only_b, b.l, xp.where(only_a, a.l, l)),
    )


def _joint(a: BlockStatistics, b: BlockStatistics, xp: ModuleType) -> tuple[Array, Array, Array, Array]:
    """m and l of both states together, and the float64 factors of their ``acc``.

    ``l`` is near 1: ``acc`` is a mean of values then, and no larger than they are. What is rounded off m and l goes
    into the factors.
    """
    m_a, m_b, l_a, l_b = (part.astype("f8") for part in (a.m, b.m, a.l, b.l))
    top = xp.maximum(m_a, m_b)
    weight_a, weight_b = xp.exp(m_a - top), xp.exp(m_b - top)
    total = l_a * weight_a + l_b * weight_b
    usual = (total > 0) & xp.isfinite(top)
    m = xp.where(usual, top + xp.log(total), top).astype(a.m.dtype)
    moved = xp.where(usual, xp.exp(top - m), 1)
    l = (total * moved).astype(a.l.dtype)  # noqa: E741
    moved = xp.where(usual, l / total, moved)
    return m, l, weight_a * moved, weight_b * moved


def _describe(array: Array) -> str:
    return f"{array_namespace(array).__name__} {array.dtype} {array.shape}"
