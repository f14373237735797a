"""Attention in memory on the CPU, ours beside PyTorch's scaled_dot_product_attention, measured in turn in one process.

    python benchmarks/peers.py [--tokens 8192 32768] [--threads 2] [--repeats 7] [--json results/peers.json]

Rates are 4 H N^2 D floating-point operations (half of it for causal) over the median of the repeats; the ratio is the
median of the ratios of neighbouring runs, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median

import numpy as np
from report import machine, store, table

import cqsa_arrays as cqsa

HEADS = 4
# OpenMP threads spin for a while after their work is done: without a pause each call would slow the one after it.
PAUSE_S = 0.3
ASKED = {("float32", 64): 1.25, ("float32", 128): 1.15, ("float64", 64): 1.3, ("float64", 128): 1.2}


def timed(call: Callable[[], object]) -> float:
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(tokens: int, dtype: str, dim: int, causal: bool, threads: int, repeats: int) -> dict[str, object]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, HEADS, tokens, dim)).astype(dtype) for _ in range(3))
    theirs = [torch.from_numpy(x) for x in (q, k, v)]
    options = cqsa.Options(threads=threads)

    def ours() -> object:
        return cqsa.attention(q, k, v, causal=causal, options=options)

    def peer() -> object:
        return scaled_dot_product_attention(*theirs, is_causal=causal)

    difference = float(np.abs(ours() - peer().numpy()).max())
    seconds = [(timed(ours), timed(peer)) for _ in range(repeats)]
    flops = 4 * HEADS * tokens**2 * dim * (0.5 if causal else 1)
    rates = [flops / median(column) / 1e9 for column in zip(*seconds, strict=True)]
    return {
        "dtype": dtype, "D": dim, "N": tokens, "mask": "causal" if causal else "full",
        "ours GFLOP/s": round(rates[0], 1), "torch GFLOP/s": round(rates[1], 1),
        "ratio": round(median(theirs / ours for ours, theirs in seconds), 3), "asked": ASKED[dtype, dim],
        "largest difference": difference,
    }  # fmt: skip


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    for tokens, dtype, dim, causal in product(arguments.tokens, ("float32", "float64"), (64, 128), (False, True)):
        repeats = arguments.repeats if tokens <= 8192 else max(3, arguments.repeats // 2)
        yield measure(tokens, dtype, dim, causal, arguments.threads, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", default="benchmarks/results/peers.json")
    arguments = parser.parse_args()
    import torch

    result = {"machine": machine(), "peer": f"torch {torch.__version__}, {HEADS} heads, {arguments.threads} threads"}
    store(arguments.json, {**result, "rows": table(rows(arguments))})


if __name__ == "__main__":
    main()
