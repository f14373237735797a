"""Which threads of the library still run."""

from __future__ import annotations

import threading

KEPT = ("cqsa-reader", "cqsa-sender", "cqsa-output")
"""Those that wait for the next run on a GPU."""


def running(names: tuple[str, ...]) -> list[str]:
    """Names of threads that begin with one of ``names``."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


def ours_alive() -> list[str]:
    """Names of this library's threads that still run, but for those that are kept after runs on a GPU."""
    return [name for name in running(("cqsa-",)) if not name.startswith(KEPT)]
