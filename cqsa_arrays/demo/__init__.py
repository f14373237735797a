"""The demonstration: a real electrocardiogram denoised by exact all-pairs attention in a few MiB.

>>> print(run_demo("."))                                              # doctest: +SKIP
"""

from .report import DemoReport, MemoryReport, SignalReport
from .run import run_demo

__all__ = ["DemoReport", "MemoryReport", "SignalReport", "run_demo"]
