"""What the benchmarks share: the machine, a table that is printed as it is measured, results stored with a date."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import cqsa_arrays as cqsa


def machine() -> dict[str, object]:
    """Processor, threads, memory and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    vectors = next((name for name in ("avx512f", "avx2") if name in flags.split()), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": f"{names[0] if names else platform.processor()}, {vectors}",
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cqsa_arrays": cqsa.__version__,
    }


def table(
    rows: Iterable[dict[str, object]], keep: Callable[[list[dict[str, object]]], None] | None = None
) -> list[dict[str, object]]:
    """Print each row as it comes, under one header; returns them all. ``keep`` is told of those so far after each."""
    found: list[dict[str, object]] = []
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        widths = [max(len(name), 9) for name in row]
        if not found:
            print("  ".join(name.rjust(width) for name, width in zip(row, widths, strict=True)))
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)
        found.append(row)
        if keep is not None:
            keep(found)
    return found


def store(path: str, result: dict[str, object]) -> None:
    """Write ``result`` with today's date as JSON."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"date": datetime.date.today().isoformat(), **result}, indent=1) + "\n")
