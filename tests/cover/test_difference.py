"""Difference sets: every residue is a difference, exactly once where perfect, and few marks suffice."""

from itertools import pairwise

import numpy as np
import pytest

from cqsa_arrays.cover.difference import difference_set, perfect_order, perfect_sizes, set_size
from cqsa_arrays.cover.galois import orbit, power, prime_factors, prime_power, primitive_matrix
from cqsa_arrays.errors import ArgumentError


def is_prime_power(number: int) -> bool:
    """By definition, without the code under test."""
    smallest = next((d for d in range(2, number + 1) if number % d == 0), None)
    while smallest and number % smallest == 0:
        number //= smallest
    return smallest is not None and number == 1


ORDERS = [0, 1, *(q for q in range(2, 132) if is_prime_power(q))]
LARGE_ORDERS = [243, 256, 343, 512, 625, 729, 841, 961, 997, 1009, 1021, 1024, 1031]


def times_reached(marks: np.ndarray, c: int) -> np.ndarray:
    """For each residue, how many ordered pairs of marks differ by it."""
    return np.bincount(((marks[None, :] - marks[:, None]) % c).ravel(), minlength=c)


@pytest.mark.parametrize("q", ORDERS + LARGE_ORDERS)
def test_perfect_set_reaches_each_residue_exactly_once(q: int) -> None:
    c = q * q + q + 1
    marks = difference_set(c)
    times = times_reached(marks, c)
    assert perfect_order(c) == q
    assert times[0] == len(marks) == set_size(c) == q + 1
    assert (times[1:] == 1).all()
    assert marks[0] == 0
    assert all(a < b for a, b in pairwise(marks.tolist()))
    assert marks[-1] < c


@pytest.mark.parametrize("c", [*range(1, 700), *range(9_990, 10_010), 65_536, 99_999, 999_999, 1_000_000, 1_500_001])
def test_every_set_reaches_every_residue_with_few_marks(c: int) -> None:
    marks = difference_set(c)
    assert (times_reached(marks, c) >= 1).all()
    assert len(marks) == set_size(c) <= 1.25 * c**0.5 + 6
    assert marks[0] == 0
    assert all(a < b for a, b in pairwise(marks.tolist()))
    assert marks[-1] < c


def test_set_size_keeps_its_bound_without_the_set() -> None:
    sizes = np.array([set_size(c) for c in range(1, 20_001)])
    c = np.arange(1, 20_001)
    assert (sizes <= 1.25 * np.sqrt(c) + 6).all()
    assert (sizes * (sizes - 1) + 1 >= c).all()  # fewer differences than residues is impossible


def test_sets_are_the_same_on_every_machine() -> None:
    assert difference_set(73).tolist() == [0, 2, 24, 40, 41, 52, 60, 66, 70]
    assert difference_set(1009**2 + 1009 + 1)[:5].tolist() == [0, 1, 3, 113, 3394]
    assert difference_set(1024**2 + 1024 + 1)[:5].tolist() == [0, 1052, 1419, 2650, 3523]
    assert difference_set(20).tolist() == [0, 1, 4, 7, 10, 12]


def test_perfect_sizes_are_the_known_ones() -> None:
    assert perfect_sizes(307) == [1, 3, 7, 13, 21, 31, 57, 73, 91, 133, 183, 273, 307]
    assert perfect_sizes(306)[-1] == 273
    assert perfect_sizes(0) == []
    assert perfect_sizes(131**2 + 131 + 1) == [q * q + q + 1 for q in ORDERS]
    assert [c for c in range(1, 10_000) if perfect_order(c) is not None] == perfect_sizes(9_999)


@pytest.mark.parametrize("function", [difference_set, set_size, perfect_order])
@pytest.mark.parametrize("c", [0, -7])
def test_no_chunks_are_refused(function, c: int) -> None:
    with pytest.raises(ArgumentError, match="c: found"):
        function(c)


def test_factors_and_prime_powers_agree_with_their_definition() -> None:
    for number in range(1, 600):
        primes = [d for d in range(2, number + 1) if number % d == 0 and all(d % e for e in range(2, d))]
        assert prime_factors(number) == primes
        found = prime_power(number)
        assert (found is not None) == is_prime_power(number)
        assert found is None or found[0] ** found[1] == number


@pytest.mark.parametrize(("p", "n"), [(2, 1), (2, 9), (3, 6), (5, 3), (7, 3), (31, 2), (1009, 1)])
def test_powers_of_the_generator_are_all_nonzero_elements(p: int, n: int) -> None:
    order = p**n - 1
    columns = orbit(primitive_matrix(p, n), np.eye(n)[0], order, p)
    elements = np.array([p**i for i in range(n)]) @ columns
    assert sorted(elements.tolist()) == list(range(1, p**n))


def test_power_agrees_with_whole_number_arithmetic() -> None:
    matrix, p = np.array([[3, 1006, 7], [1000, 5, 999], [0, 1, 1008]]), 1009
    expected = np.eye(3, dtype=object)
    for exponent in range(40):
        assert (power(matrix.astype(float), exponent, p) == expected.astype(float)).all()
        expected = expected @ matrix.astype(object) % p
