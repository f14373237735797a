"""Run one job in a fresh process and print its plan's bound and the peak of resident memory that it added, as JSON.

Used by the tests: ``python peak.py INPUT.h5 OUT.h5 MEMORY [cover]``. Resident means anonymous, shared and mapped pages:
the high-water mark of the process, reset after a tiny warm-up call that loads the kernels, less what was resident then.
"""

import json
import sys

import numpy as np

import cqsa_arrays as cqsa


def resident_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main(source: str, out: str, memory: str, cover: str = "auto") -> None:
    opened = cqsa.open(source)
    options = cqsa.Options(cover=cover, overwrite=True)
    dtype = "float64" if opened.q.dtype == np.float64 else "float32"
    tiny = np.ones((1, 1, 200, 8), dtype)
    cqsa.attention(tiny, tiny, tiny, out=out, options=options)
    opened.q[(0,) * (opened.q.ndim - 1)]  # loads the filters of compressed data
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = resident_bytes("VmRSS")
    plan = cqsa.plan(opened.q, opened.k, opened.v, memory=memory, out=out, options=options)
    cqsa.attention(opened.q, opened.k, opened.v, memory=memory, out=out, options=options)
    peak = resident_bytes("VmHWM") - before
    row = {"plan": plan.memory_bytes, "peak": peak, "budget": plan.budget.memory_bytes, "cover": plan.cover_name}
    print(json.dumps({**row, "parts": plan.chosen.query_parts, "heads": plan.chosen.heads * plan.chosen.batches}))


if __name__ == "__main__":
    main(*sys.argv[1:])
