"""The first and the last group of heads on a GPU: where others are one launch, these are some.

So work begins when the tokens of the first tile have come, and at the end few rows have still to leave.
"""

from __future__ import annotations

from ..cover import Cover, RectangularCover
from ..ranges import Cut
from .cost import Rates
from .memory import Residency
from .problem import Problem

# Three take longer: launches of a tile come too late, and do not fill the device.
EDGE_TILES = 2


def edge_tiles(problem: Problem, residency: Residency, parts: tuple[int, int], rates: Rates) -> int:
    """Into how many query tiles these groups are cut: into several where a group takes the GPU longer than Python.

    ``parts`` are those of the others' queries and keys. Only where each launch finishes its rows, which leave.
    """
    groups, per_pair = problem.batch * problem.heads / residency.heads, 2 * (problem.head_dim + problem.value_dim)
    group_s = problem.pairs / groups * rates.device_s(problem.q.dtype, per_pair)
    leaves = residency.state_row_bytes == 0 and not problem.result.on_device
    several = leaves and parts == (1, 1) and groups > 2 and group_s > rates.tile_s
    return EDGE_TILES if several else 1


def edge_covers(problem: Problem, tiles: int, tile_tokens: int) -> tuple[Cover, Cover] | None:
    """Those of the first and of the last group, where they have their own.

    The last begins with its last tile, of a causal mask the longest work; the shortest follows beside it.
    """
    if tiles == 1:
        return None
    queries, keys = (Cut(tokens, tiles, tile_tokens) for tokens in (problem.query_tokens, problem.key_tokens))
    whole = Cut(problem.key_tokens, 1, tile_tokens)
    first = RectangularCover(queries, keys, problem.mask, at_once=True)
    return first, RectangularCover(queries, whole, problem.mask, at_once=True, descending=True)
