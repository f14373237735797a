"""Attention from file to file with less memory than the inputs take.

Run it anywhere: python on_disk.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import cqsa_arrays as cqsa
from cqsa_arrays.storage import InputSpec, describe, make_inputs

MEMORY = "12MiB"


def main() -> None:
    """Make 24 MiB of inputs, look at the plan, run it, prove the result."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, output = Path(folder) / "qkv.h5", Path(folder) / "out.h5"
        make_inputs(inputs, InputSpec(tokens=16384, heads=2, head_dim=64, dtype="float32"))
        print(describe(inputs), end="\n\n")

        q, k, v = (f"{inputs}:/{name}" for name in "qkv")
        print(cqsa.plan(q, k, v, causal=True, memory=MEMORY, out=output), end="\n\n")

        out = cqsa.attention(q, k, v, causal=True, memory=MEMORY, out=output)
        print(f"result: {out}")
        print(f"  one vector of it, read from the disk: {out[0, 1, 12345, :4]}", end="\n\n")

        print(cqsa.verify(output, rows=64))


if __name__ == "__main__":
    main()
