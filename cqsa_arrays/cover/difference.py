"""Difference sets modulo c: few residues whose differences reach every residue.

Singer (Trans. AMS 43, 1938): for a prime power q the points of a line of the projective plane over GF(q), written as
powers of a generator modulo c = q^2 + q + 1, are q + 1 residues of which every nonzero residue is a difference
exactly once.

Every other c takes a Wichmann ruler (J. London Math. Soc. 38, 1963): n marks that measure every length up to n^2/3.
Modulo c it is enough to measure up to c/2 (Colbourn and Ling, Inf. Process. Lett. 75, 2000), hence about sqrt(1.5 c)
marks.
"""

from __future__ import annotations

from itertools import count
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .galois import orbit, power, prime_power, primitive_matrix, reduce

# Values of the hyperplane test that are held at once: 2 MiB of float64, which stays in cache.
BLOCK_VALUES = 1 << 18


def perfect_order(c: int) -> int | None:
    """q where a perfect set of q + 1 residues modulo ``c = q*q + q + 1`` is known, else None.

    That is every prime power q, and also c = 1 with {0} (q = 0) and c = 3 with {0, 1} (q = 1).

    >>> perfect_order(1), perfect_order(57), perfect_order(43), perfect_order(100)
    (0, 7, None, None)
    """
    q = (isqrt(4 * _checked(c) - 3) - 1) // 2
    return q if q * q + q + 1 == c and (q < 2 or prime_power(q)) else None


def perfect_sizes(limit: int) -> list[int]:
    """Every c <= ``limit`` that has a perfect set, ascending.

    >>> perfect_sizes(100)
    [1, 3, 7, 13, 21, 31, 57, 73, 91]
    """
    sizes = (q * q + q + 1 for q in range(isqrt(max(limit, 0)) + 1) if q < 2 or prime_power(q))
    return [c for c in sizes if c <= limit]


def set_size(c: int) -> int:
    """``len(difference_set(c))`` in about sqrt(sqrt(c)) steps, without the set.

    >>> set_size(1_000_000), set_size(1_010_021), set_size(1009**2 + 1009 + 1)
    (1225, 1231, 1010)
    """
    q = perfect_order(c)
    return _ruler_marks(c) if q is None else q + 1


def difference_set(c: int) -> NDArray[np.int64]:
    """Residues modulo ``c``, ascending from 0, that have every residue as a difference of two of them.

    Perfect (every nonzero residue exactly once) where ``perfect_order(c)`` knows a set, else of about 1.23 sqrt(c)
    residues. The same set on every machine. A Singer set takes O(c log c) arithmetic (tens of milliseconds at c = 10^6)
    and O(sqrt(c) log(c)^2) memory beside a few blocks of ``BLOCK_VALUES``; a ruler takes O(sqrt(c)) of both.

    >>> difference_set(13).tolist(), difference_set(14).tolist()
    ([0, 1, 3, 9], [0, 1, 4, 7, 9])
    """
    q = perfect_order(c)
    if q is None:
        return _ruler(_ruler_marks(c))
    field = prime_power(q)
    return np.arange(q + 1) if field is None else _singer_set(*field)


def _singer_set(p: int, k: int) -> NDArray[np.int64]:
    """The logarithms modulo c of a line: a plane through 0 of GF(q^3), which has dimension 3 over GF(q), q = p**k.

    With x a generator, x**c generates GF(q)*. The plane is where the k functionals z -> top(z x**(c j)), j < k,
    vanish; top takes the last of the 3k coefficients over GF(p). Giant steps a and baby steps b turn c powers into k
    matrix products: top(x**(c j) x**(side a + b)) = row(j, a) . column(b).
    """
    c = p ** (2 * k) + p**k + 1
    side = isqrt(c) + 1
    x = primitive_matrix(p, 3 * k)
    giant, scalar = power(x, side, p), power(x, c, p)
    one, functional = np.eye(3 * k)[0], np.eye(3 * k)[-1]
    columns = orbit(x, one, side, p)
    rows = []
    for _ in range(k):
        rows.append(orbit(giant.T, functional, side, p).T)
        functional = reduce(functional @ scalar, p)
    height = max(1, BLOCK_VALUES // side)
    found = []
    for top in range(0, side, height):
        on_line = np.logical_and.reduce([_divisible(row[top : top + height] @ columns, p) for row in rows])
        found.append(np.flatnonzero(on_line) + top * side)
    logarithms = np.concatenate(found)
    return logarithms[logarithms < c] - logarithms[0]


def _divisible(values: NDArray[np.float64], p: int) -> NDArray[np.bool_]:
    quotient = values / p
    return quotient == np.floor(quotient)


def _ruler_shape(marks: int) -> tuple[int, int]:
    """Wichmann's r and s that measure furthest with 4r + s + 3 = ``marks`` >= 3: the top of the parabola in r."""
    r = (marks - 1) // 6
    return r, marks - 3 - 4 * r


def _ruler_marks(c: int) -> int:
    """The fewest marks with which a ruler measures every length up to c/2."""
    if c <= 3:
        return min(c, 2)
    for marks in count(max(3, isqrt(3 * (c // 2)) - 1)):
        r, s = _ruler_shape(marks)
        if 4 * r * (r + s + 2) + 3 * (s + 1) >= c // 2:
            return marks
    raise AssertionError("rulers grow without bound")


def _ruler(marks: int) -> NDArray[np.int64]:
    """The Wichmann ruler of ``marks`` marks: the gaps 1^r, r+1, (2r+1)^r, (4r+3)^s, (2r+2)^(r+1), 1^r."""
    if marks < 3:
        return np.arange(marks)
    r, s = _ruler_shape(marks)
    gaps = np.repeat([1, r + 1, 2 * r + 1, 4 * r + 3, 2 * r + 2, 1], [r, 1, r, s, r + 1, r])
    return np.concatenate([[0], np.cumsum(gaps)])


def _checked(c: int) -> int:
    if c < 1:
        raise ArgumentError("c", c, "a number of chunks of at least 1", "Cut the tokens into one chunk or more.")
    return c
