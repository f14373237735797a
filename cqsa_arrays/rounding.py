"""How far results move when scores are rounded: what no kernel of that precision can do better.

Part of the float64 reference, and derived in docs/design/exactness.md.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from .tolerance import SCORE_ERROR, finite, norms

# How often a sum of products is looked at on its way.
_LOOKS = 4

# Root mean square of the error of rounding a number, in unit roundoffs of it.
_ROUNDING = 0.41

# Groups of keys, equal ones in one group.
_GROUPS = 16

# Relative error of a sum of squared distances computed as sum |v|^2 - 2 o . sum v + |o|^2.
_SQUARES = 1e-14


@dataclass(frozen=True, slots=True, eq=False)
class Rounding:
    """What rounding can do to each row, and what it is relative to: (batch, heads, R) float64, 0 for rows not finite.

    ``out`` and ``lse`` bound how far rounded scores move the row's output (as a norm) and its log-sum-exp. ``spread``,
    sqrt(sum_j (p_j |v_j - out|)^2), is how far the output moves where each weight p_j has a relative error of 1, all
    independent. ``running`` is the largest norm that the sum of weighted values has on its way.
    """

    out: np.ndarray
    lse: np.ndarray
    spread: np.ndarray
    running: np.ndarray


class ScoreRounding:
    """Adds up, key by key, how far the results of scaled ``queries`` (g, R, D) move when scores are rounded.

    A score that may be off by e changes its key's weight p by at most p exp(e) min(e, 1), and by 1 at most: keys of no
    weight count where their error could make them the largest. Errors of different keys are independent, those of equal
    keys are equal (``repeats``), so that their values are added before squares are.
    """

    def __init__(
        self, queries: np.ndarray, largest: np.ndarray, value_dim: int, arithmetic: str, *, repeats: bool
    ) -> None:
        self._largest = largest[..., None]
        self._queries, self._error = queries, SCORE_ERROR[arithmetic]
        self._unit = np.abs(finite(queries)).max() or 1.0  # squares neither overflow nor vanish
        self._value_unit = 0.0  # the first value that is not 0 sets it
        self._squares = np.square(queries / self._unit)
        shape = queries.shape[:2]
        self._running, self._lse = np.zeros(shape), np.zeros(shape)
        # By row: the sums of w^2 v, of w^2 and of w^2 |v|^2, of w what rounding can change of a weight, and all of it.
        self._sums = np.zeros((2, *shape, value_dim + 2))
        # By group and row, where there are equal keys: the sums of w v and of w, each key with the sign of its kind.
        self._groups = np.zeros((_GROUPS if repeats else 0, *shape, value_dim + 1))

    def look_at(self, value_sum: np.ndarray) -> None:
        """The sum of weighted values (g, R, Dv) on its way."""
        self._running = np.maximum(self._running, norms(value_sum))

    def add(self, scores: np.ndarray, weights: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """The keys and values of some tokens, (n, D) and (n, Dv), their scores and exp(score - largest), (g, R, n)."""
        seen = scores > -np.inf
        sizes = self._sizes(keys, scores) + np.abs(scores) + np.abs(self._largest)
        error = np.where(seen, self._error * sizes, 0.0)
        grown = weights * (1 + error)
        if not error.max() < 0.5:  # also where it is NaN
            grown = np.where(seen, np.exp(np.minimum(scores - self._largest + error, 0.0)), 0.0)
        self._lse += (grown * error).sum(axis=2)
        values = finite(values)
        self._value_unit = self._value_unit or float(np.abs(values).max())
        values = values / (self._value_unit or 1.0)
        columns = np.column_stack([values, np.ones(len(values)), np.square(values).sum(axis=1)])
        changes = grown * np.minimum(error, 1.0)
        both = np.square(np.stack([changes, weights]))
        self._sums += (both.reshape(-1, len(keys)) @ columns).reshape(self._sums.shape)
        if len(self._groups):
            self._add_groups(changes, keys, columns[:, :-1])

    def _sizes(self, keys: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """What is rounded on the way to each score, (g, R, n): its products, and their sum so far, D times.

        The sum is looked at where it has a quarter of its terms, half of them, and so on.
        """
        unit = np.abs(finite(keys)).max() or 1.0
        products = self._squares @ np.square(keys / unit).T
        dim, partial, squares = keys.shape[1], np.zeros(products.shape), np.square(scores / unit / self._unit)
        for part in np.array_split(np.arange(dim), _LOOKS)[:-1]:  # after the last it is the score
            partial += self._queries[..., part] / self._unit @ (keys[:, part] / unit).T
            squares += np.square(partial)
        sums = _ROUNDING * math.sqrt(dim / _LOOKS) * np.sqrt(squares)
        return unit * self._unit * (np.sqrt(products) + sums)

    def _add_groups(self, changes: np.ndarray, keys: np.ndarray, columns: np.ndarray) -> None:
        """Squares of sums with random signs are on average what is wanted, the sum over kinds of keys."""
        kinds = _kinds(keys)
        group, sign = (kinds >> np.uint64(60)).astype(np.int64), 1.0 - 2.0 * ((kinds >> np.uint64(59)) & np.uint64(1))
        order = np.argsort(group, kind="stable")
        changes, columns = changes[..., order], (sign[:, None] * columns)[order]
        ends = np.searchsorted(group[order], np.arange(_GROUPS + 1))
        for number, (start, stop) in enumerate(itertools.pairwise(ends)):
            self._groups[number] += changes[..., start:stop] @ columns[start:stop]

    def result(self, out: np.ndarray, lse: np.ndarray, weight_sum: np.ndarray) -> Rounding:
        """What was added up, for these results, (g, R) each."""
        unit = self._value_unit or 1.0
        changed, whole = (_distance(sums, out / unit) for sums in self._sums)
        if len(self._groups):
            groups = norms(self._groups[..., :-1] - self._groups[..., -1:] * (out / unit))
            changed = np.maximum(changed, norms(np.moveaxis(groups, 0, -1)))
        known = np.isfinite(lse) & np.isfinite(out).all(axis=2)
        found = (unit * changed, self._lse, unit * whole, self._running)
        return Rounding(*(np.where(known, one / weight_sum, 0.0) for one in found))


class Repeats:
    """Whether keys repeat: within a block, or those of the first block later."""

    def __init__(self) -> None:
        self.found = False
        self._first: np.ndarray | None = None

    def look_at(self, keys: np.ndarray) -> None:
        """The keys of the next block, (n, D)."""
        if self.found:
            return
        kinds = np.unique(_kinds(keys))
        self.found = len(kinds) < len(keys)
        if self._first is None:
            self._first = kinds
        else:
            self.found |= bool(np.isin(kinds, self._first).any())


def _kinds(keys: np.ndarray) -> np.ndarray:
    """A number for each of (n, D) keys, from its bits: the same for equal keys, any of 2^64 for others."""
    bits = np.ascontiguousarray(keys + 0.0).view(np.uint64)  # + 0.0: -0 is 0
    factors = np.random.default_rng(0).integers(0, 1 << 63, (1, keys.shape[1]), dtype=np.uint64) * np.uint64(2)
    mixed = (bits * (factors + np.uint64(1))).sum(axis=1)
    return (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)


def _distance(sums: np.ndarray, out: np.ndarray) -> np.ndarray:
    """sqrt(sum_j w_j^2 |v_j - out|^2), rounded up, from the sums of w^2 v, of w^2 and of w^2 |v|^2.

    The squares of values that are close to each other cancel. What that may lose, 1e-7 of the values, is added: no
    distance is taken for less than it is.
    """
    values, weights, squares = sums[..., :-2], sums[..., -2], sums[..., -1]
    sizes = squares + weights * np.square(out).sum(axis=2)
    return np.sqrt(np.maximum(sizes - 2 * (values * out).sum(axis=2), 0.0) + _SQUARES * sizes)
