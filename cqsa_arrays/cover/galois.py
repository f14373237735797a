"""Finite-field arithmetic for Singer's difference sets: small exact matrices over GF(p) held in float64.

An element of GF(p^n) is a vector of n coefficients in 0..p-1 and multiplication by a fixed element is an (n, n) matrix.
Float64 sends every product to BLAS and stays exact while ``n * p**2 < 2**52``: p up to a million is far inside.
"""

from __future__ import annotations

from itertools import count

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def prime_factors(number: int) -> list[int]:
    """The distinct primes that divide ``number`` >= 1, ascending, by trial division.

    >>> prime_factors(360), prime_factors(1009), prime_factors(1)
    ([2, 3, 5], [1009], [])
    """
    primes, divisor = [], 2
    while divisor * divisor <= number:
        if number % divisor == 0:
            primes.append(divisor)
            while number % divisor == 0:
                number //= divisor
        divisor += 1
    return [*primes, number] if number > 1 else primes


def prime_power(number: int) -> tuple[int, int] | None:
    """``(p, k)`` where ``number`` is the prime power p**k with k >= 1, else None.

    >>> prime_power(1024), prime_power(7), prime_power(12), prime_power(1)
    ((2, 10), (7, 1), None, None)
    """
    primes = prime_factors(number)
    if len(primes) != 1:
        return None
    return primes[0], next(k for k in count(1) if primes[0] ** k == number)


def reduce(values: Matrix, p: int) -> Matrix:
    """``values`` modulo p; exact for whole numbers 0 <= value < 2**52, and much faster than ``np.fmod``."""
    return values - p * np.floor(values / p)


def power(matrix: Matrix, exponent: int, p: int) -> Matrix:
    """``matrix ** exponent`` modulo p by repeated squaring.

    >>> power(np.array([[1.0, 1.0], [1.0, 0.0]]), 10, 7).tolist()    # Fibonacci: 89, 55; 55, 34
    [[5.0, 6.0], [6.0, 6.0]]
    """
    result = np.eye(len(matrix))
    for bit in bin(exponent)[2:]:
        result = reduce(result @ result, p)
        if bit == "1":
            result = reduce(result @ matrix, p)
    return result


def orbit(matrix: Matrix, vector: Matrix, length: int, p: int) -> Matrix:
    """``(n, length)``: the columns vector, M vector, M^2 vector, ... modulo p, doubled in number by each product."""
    columns = vector[:, None]
    while columns.shape[1] < length:
        columns = np.hstack([columns, reduce(matrix @ columns, p)])
        matrix = reduce(matrix @ matrix, p)
    return columns[:, :length]


def primitive_matrix(p: int, n: int) -> Matrix:
    """Multiplication by x in GF(p)[x]/f, f the first polynomial of degree n for which x has order p**n - 1.

    That order makes f irreducible and x a generator of GF(p^n)*, so no separate test of irreducibility is needed.
    "First" reads the lower coefficients of ``x**n = a0 + a1 x + ...`` as the number ``a0 + a1 p + ...``: the same on
    every machine.

    >>> primitive_matrix(2, 3).tolist()    # x**3 = x + 1: columns 1, x, x**2 go to x, x**2, 1 + x
    [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    order = p**n - 1
    primes = prime_factors(order)
    # Below p the polynomial is the binomial x**n - a0: no generator for n > 1, since x**n is then in GF(p).
    for number in count(p if n > 1 else 1):
        if number % p:  # else f is divisible by x
            matrix = np.eye(n, k=-1)
            matrix[:, -1] = [number // p**i % p for i in range(n)]
            if _has_order(matrix, order, primes, p):
                return matrix
    raise AssertionError("every finite field has a generator")


def _has_order(matrix: Matrix, order: int, primes: list[int], p: int) -> bool:
    """Whether ``order``, whose distinct primes are ``primes``, is the multiplicative order of ``matrix`` modulo p."""

    def is_one(exponent: int) -> bool:
        return bool((power(matrix, exponent, p) == np.eye(len(matrix))).all())

    return is_one(order) and not any(is_one(order // prime) for prime in primes)
