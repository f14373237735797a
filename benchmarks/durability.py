"""What durability costs: the same job with and without it, in turn, from a file to a file.

python benchmarks/durability.py [--tokens 400000] [--heads 1] [--dtype float32] [--device cpu] [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import h5py
import numpy as np
from report import machine, store, table

import cqsa_arrays as cqsa
from cqsa_arrays.durable.checkpoint import LaneCheckpoint


def counted() -> list[int]:
    """Counts the commits from now on."""
    usual, commits = LaneCheckpoint._commit, [0]

    def commit(self, sealed) -> None:
        commits[0] += 1
        usual(self, sealed)

    LaneCheckpoint._commit = commit
    return commits


def rows(arguments: argparse.Namespace, directory: Path) -> dict[str, object]:
    shape = (1, arguments.heads, arguments.tokens, 64)
    rng = np.random.default_rng(0)
    with h5py.File(directory / "qkv.h5", "w") as file:
        for name in "qkv":
            data = file.create_dataset(name, shape, arguments.dtype)
            for head in range(arguments.heads):
                data[0, head] = rng.standard_normal(shape[2:], dtype="float32")
    sources = [f"{directory}/qkv.h5:/{name}" for name in "qkv"]
    first = [np.ones((1, 64, 64), arguments.dtype)] * 3
    cqsa.attention(*first, device=arguments.device)  # context and kernels
    commits, times, saved = counted(), {True: [], False: []}, ""
    call = {"causal": True, "device": arguments.device, "memory": arguments.memory, "out": directory / "out.h5"}
    for durable in [True, False] * arguments.repeats:
        options = cqsa.Options(durable=durable, overwrite=True, cover=arguments.cover)
        plan = cqsa.plan(*sources, **call, options=options)
        begun = time.perf_counter()
        cqsa.attention(*sources, **call, options=options)
        times[durable].append(time.perf_counter() - begun)
        saved = str(plan.durability) if durable else saved
        print(f"durable {durable}: {times[durable][-1]:.2f} s, {plan.cover_name}", flush=True)
    with_it, without = median(times[True]), median(times[False])
    return {
        "device": arguments.device, "N": arguments.tokens, "heads": arguments.heads, "dtype": arguments.dtype,
        "cover": plan.cover_name, "saved": saved.split(";")[0], "commits": commits[0] // arguments.repeats,
        "durable s": round(with_it, 2), "not durable s": round(without, 2), "ratio": round(with_it / without, 3),
        "asked": 1.03,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--cover", default="cqs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", default="benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as directory:
        found = table([rows(arguments, Path(directory))])
    name = f"durability_{arguments.device.partition(':')[0]}.json"
    store(str(Path(arguments.results) / name), {"machine": machine(), "rows": found})


if __name__ == "__main__":
    main()
