"""Exact covers: how attention is divided into independent tasks, each visible (query, key) pair in exactly one."""

from .base import Cover, Step, Task
from .check import check_cover
from .cqs import CqsCover
from .difference import difference_set, perfect_order, perfect_sizes, set_size
from .rectangular import RectangularCover
from .report import CoverError, CoverReport

__all__ = [
    "Cover",
    "CoverError",
    "CoverReport",
    "CqsCover",
    "RectangularCover",
    "Step",
    "Task",
    "check_cover",
    "difference_set",
    "perfect_order",
    "perfect_sizes",
    "set_size",
]
