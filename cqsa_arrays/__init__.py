"""Exact attention over arrays that fit neither GPU memory nor RAM, for NumPy, CuPy and HDF5.

>>> import numpy as np, cqsa_arrays as cqsa
>>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 1024, 64)).astype("float32")
>>> out = cqsa.attention(q, k, v, causal=True)

Everything is imported when it is first used: ``import cqsa_arrays`` loads neither Numba nor h5py nor CuPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .forks import preload as _preload
from .version import __version__

if TYPE_CHECKING:
    from .api import attention, causal, open, plan, statistics
    from .block_statistics import BlockStatistics, merge
    from .comparison import ErrorReport, Tolerance, compare
    from .errors import ArgumentError, BudgetError, CqsaError, DeviceError, JobBusyError, JobStopped, StorageError
    from .jobs import resume, status
    from .options import Options
    from .planner import Plan
    from .verification import verify

# No home may have the name of what lives in it: importing it would put the module in the function's place.
_HOMES = {
    "api": ("attention", "causal", "open", "plan", "statistics"),
    "comparison": ("ErrorReport", "Tolerance", "compare"),
    "errors": (
        "ArgumentError",
        "BudgetError",
        "CqsaError",
        "DeviceError",
        "JobBusyError",
        "JobStopped",
        "StorageError",
    ),
    "jobs": ("resume", "status"),
    "options": ("Options",),
    "planner": ("Plan",),
    "block_statistics": ("BlockStatistics", "merge"),
    "verification": ("verify",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArgumentError", "BlockStatistics", "BudgetError", "CqsaError", "DeviceError", "ErrorReport", "JobBusyError",
    "JobStopped", "Options", "Plan", "StorageError", "Tolerance", "__version__", "attention", "causal", "compare",
    "merge", "open", "plan", "resume", "statistics", "status", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_preload(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
