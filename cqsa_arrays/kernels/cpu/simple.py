"""The plain version of the CPU kernel, in NumPy: what ``CpuKernel`` must agree with, short enough to be believed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...block_statistics import BlockStatistics, merge
from ..base import KeyBlock


def accumulate_simply(
    queries: np.ndarray,
    query_start: int,
    blocks: Sequence[KeyBlock],
    state: BlockStatistics,
    *,
    diagonal: int,
    scale: float,
) -> BlockStatistics:
    """The state merged with the statistics of ``queries`` against ``blocks``; arguments as ``CpuKernel.accumulate``."""
    rows = query_start + np.arange(queries.shape[2])
    for block in blocks:
        seen = (block.start + np.arange(block.keys.shape[2]))[None, :] <= rows[:, None] + diagonal
        with np.errstate(all="ignore"):
            scores = np.where(seen, queries * queries.dtype.type(scale) @ block.keys.swapaxes(-1, -2), -np.inf)
            m = np.max(np.where(np.isnan(scores), -np.inf, scores), axis=-1)
            weights = np.exp(scores - np.where(m == -np.inf, 0, m)[..., None]).astype("f8")
            total = weights.sum(-1)
            usual = (total > 0) & np.isfinite(m)
            base = np.where(usual, m + np.log(total), m).astype(m.dtype)
            l = np.where(usual, total * np.exp(m.astype("f8") - base), total).astype(m.dtype)  # noqa: E741
            acc = np.stack(
                [
                    (weights[..., row, :, None] * np.where(seen[row][:, None], block.values, 0)).sum(
                        -2, dtype=np.longdouble
                    )
                    for row in range(len(rows))
                ],
                axis=-2,
            )
            acc *= np.where(usual, l / total, 1)[..., None]  # a mean of values, and as large as they are
        state = merge(state, BlockStatistics(acc.astype(queries.dtype), base, l))
    return state
