"""Attention on one GPU: kernels and whole jobs, ours beside the peers that are installed, measured in one run.

    python benchmarks/gpu.py [--only kernels host flat file rivals] [--results benchmarks/results]

Kernels work on arrays that lie on the device, whole jobs on arrays of the host or an HDF5 file under a budget. Rates
are 4 H N^2 D floating-point operations (half of it for causal) over the median time. Peers need PyTorch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from statistics import median

import cupy
import h5py
import numpy as np
from report import machine, store, table

import cqsa_arrays as cqsa
from cqsa_arrays.kernels.cuda import kernel
from cqsa_arrays.kernels.cuda.variants import choose_variant

HEADS = 8
# After so long a GPU that was at the limit of its power runs at its highest clock again.
REST_S = 0.5
# dtype, D, the peer's name and its backend in PyTorch, what is asked of ours: a ratio to the peer, or TFLOP/s
KERNELS = [
    *((dtype, dim, "FLASH_ATTENTION", "1.00 x") for dtype in ("float16", "bfloat16") for dim in (64, 128)),
    *(("float32", dim, "EFFICIENT_ATTENTION", "66") for dim in (64, 128)),
    *(("float32, plain", dim, "EFFICIENT_ATTENTION", "33") for dim in (64, 128)),
    ("float64", 64, "MATH", "30"),
]
TOKENS = {"float16": 131072, "bfloat16": 131072, "float32": 32768, "float64": 32768}


def arrays(tokens: int, dim: int, dtype: str, xp=cupy) -> list:
    rng = xp.random.default_rng(0)
    wide = (rng.standard_normal((1, HEADS, tokens, dim), dtype="float32") for _ in range(3))
    return [x.astype(cqsa_dtype(dtype)) for x in wide]


def cqsa_dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    found = []
    for _ in range(repeats):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        call()
        cupy.cuda.Device().synchronize()
        found.append(time.perf_counter() - start)
    return median(found)


def flops(tokens: int, dim: int, causal: bool) -> float:
    return 4 * HEADS * tokens**2 * dim * (0.5 if causal else 1)


def kernel_rows(repeats: int) -> Iterator[dict[str, object]]:
    for kind, dim, backend, asked in KERNELS:
        dtype, plain = kind.split(",")[0], "plain" in kind
        tokens = TOKENS[dtype]
        for causal in (False, True):
            q, k, v = arrays(tokens, dim, dtype)
            out = cupy.empty_like(q)
            with plain_float32() if plain else nullcontext():
                ours = seconds(lambda: cqsa.attention(q, k, v, causal=causal, out=out), repeats)  # noqa: B023
            theirs = peer_seconds((q, k, v), backend, causal, repeats)
            rows = np.sort(np.random.default_rng(1).choice(tokens, 64, replace=False))
            error = error_of(out, (q, k, v), rows, causal)
            rate = flops(tokens, dim, causal) / ours / 1e12
            yield {
                "dtype": kind, "D": dim, "N": tokens, "mask": "causal" if causal else "full",
                "TFLOP/s": round(rate, 1), "peer": backend.lower().removesuffix("_attention"),
                "peer TFLOP/s": round(flops(tokens, dim, causal) / theirs / 1e12, 1) if theirs else None,
                "ratio": round(theirs / ours, 3) if theirs else None, "asked": asked, "error": error,
            }  # fmt: skip


@contextmanager
def plain_float32() -> Iterator[None]:
    """float32 without tensor cores meanwhile, which no argument asks for."""
    usual = kernel.variant_for
    kernel.variant_for = lambda *problem, **_: choose_variant(*problem[:4], split=False)
    try:
        yield
    finally:
        kernel.variant_for = usual


def peer_seconds(operands: tuple, backend: str, causal: bool, repeats: int) -> float | None:
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return None
    tensors = [torch.from_dlpack(x) if x.dtype.name != "bfloat16" else as_bfloat16(torch, x) for x in operands]
    if backend == "MATH":  # it holds all scores
        tensors = [x[:, :, :8192] for x in tensors]
    with sdpa_kernel(getattr(SDPBackend, backend)):
        found = seconds(lambda: torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal), repeats)
    torch.cuda.empty_cache()
    return found * (operands[0].shape[2] / tensors[0].shape[2]) ** 2


def as_bfloat16(torch, array):
    return torch.from_dlpack(array.view("uint16")).view(torch.bfloat16)


def error_of(out, operands: tuple, rows: np.ndarray, causal: bool) -> float:
    """Relative error of sampled rows of one head against float64 on the device."""
    q, k, v = (x[0, 0].astype("float64") for x in operands)
    scores = q[rows] @ k.T * q.shape[1] ** -0.5
    if causal:
        scores[cupy.arange(k.shape[0])[None] > cupy.asarray(rows)[:, None]] = -np.inf
    weights = cupy.exp(scores - scores.max(axis=1, keepdims=True))
    exact = weights @ v / weights.sum(axis=1, keepdims=True)
    return float(cupy.linalg.norm(out[0, 0, rows].astype("float64") - exact) / cupy.linalg.norm(exact))


@contextmanager
def device_peak() -> Iterator[dict[str, int]]:
    """The most device memory that was in use by the driver's count, beyond what was before, sampled all the time."""
    found, done = {"bytes": 0}, threading.Event()
    device = cupy.cuda.Device()
    before = cupy.cuda.runtime.memGetInfo()[0]

    def watch() -> None:
        with device:
            while not done.wait(0.002):
                found["bytes"] = max(found["bytes"], before - cupy.cuda.runtime.memGetInfo()[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def resident_run(operands: list) -> tuple[float, np.ndarray]:
    """Seconds of causal attention with everything on the device, and its result."""
    q, k, v = (cupy.asarray(x) for x in operands)
    out = cupy.empty_like(q)
    elapsed = seconds(lambda: cqsa.attention(q, k, v, causal=True, out=out), 1)
    return elapsed, out.get()


def host_rows(tokens: int, dim: int, dtype: str, budgets: list[str], repeats: int) -> Iterator[dict[str, object]]:
    operands = [x.get() for x in arrays(tokens, dim, dtype)]
    kernel_s, expected = resident_run(operands)
    cupy.get_default_memory_pool().free_all_blocks()
    for budget in budgets:
        for cover in ("auto", "cqs", "rectangular"):
            found, plan, result = host_job(operands, budget, cover, repeats)
            yield {
                "N": tokens, "dtype": dtype, "D": dim, "budget": budget, "cover": f"{cover}: {plan.cover_name}",
                "parts": f"{plan.chosen.query_parts} x {plan.chosen.key_parts}, {plan.chosen.heads} heads",
                "s": round(found["s"], 3), "kernel s": round(kernel_s, 3), "ratio": round(found["s"] / kernel_s, 3),
                "asked": 1.05,
                "planned MiB": round(plan.memory_bytes / 2**20, 1), "peak MiB": round(found["peak"] / 2**20, 1),
                "difference": float(cqsa.compare(result[0, :1], expected[0, :1]).frobenius),
            }  # fmt: skip


def host_job(
    operands: list, budget: str, cover: str, repeats: int = 3, rest_s: float = 0.0
) -> tuple[dict, cqsa.Plan, np.ndarray]:
    """Median seconds and peak bytes of causal attention from host memory to host memory; its plan and result.

    The device rests for ``rest_s`` seconds before each run.
    """
    result = np.empty_like(operands[0])
    result.fill(0)  # a page that is touched for the first time costs as much as its copy
    call = {"causal": True, "memory": budget, "device": "cuda", "options": cqsa.Options(cover=cover), "out": result}
    plan = cqsa.plan(*operands, **call)
    smaller = {**call, "out": np.empty_like(result[:, :, :4096])}
    cqsa.attention(*(x[:, :, :4096] for x in operands), **smaller)  # context, kernels, page-locked memory
    times = []
    for _ in range(repeats):
        time.sleep(rest_s)
        start = time.perf_counter()
        cqsa.attention(*operands, **call)
        times.append(time.perf_counter() - start)
    with device_peak() as peak:  # apart: to ask the driver all the time slows a short job by a tenth
        cqsa.attention(*operands, **call)
    return {"s": median(times), "peak": peak["bytes"]}, plan, result


def flat_rows(longest: int, dim: int, dtype: str) -> Iterator[dict[str, object]]:
    """The same job at half the tokens, a quarter ... : its time should fall with their square.

    Each run alone, on a device that has rested, as a job finds it; and one run after the other, when the device is at
    the limit of its power and runs at a lower clock the longer that lasts.
    """
    operands = [x.get() for x in arrays(longest, dim, dtype)]
    first: dict[str, float] = {}
    for tokens in (longest >> shift for shift in range(4)):
        part = [np.ascontiguousarray(x[:, :, :tokens]) for x in operands]
        kernel_s, _ = resident_run(part)
        cupy.get_default_memory_pool().free_all_blocks()
        row = {"N": tokens, "dtype": dtype, "D": dim, "budget": "1GiB", "kernel s": round(kernel_s, 4)}
        for name, rest_s in (("alone", REST_S), ("in a row", 0.0)):
            job, plan, _ = host_job(part, "1GiB", "auto", 7 if tokens < longest else 3, rest_s)
            share = job["s"] / tokens**2
            flat = share / first.setdefault(name, share)
            row |= {f"{name} s": round(job["s"], 4), f"{name}: s / N^2": round(flat, 3)}
        yield {**row, "cover": plan.cover_name, "asked": "0.95 to 1.05"}


def rival_rows(tokens: int) -> Iterator[dict[str, object]]:
    """Ours and the others from the memory of the host."""
    operands = [x.get() for x in arrays(tokens, 64, "float16")]
    cupy.get_default_memory_pool().free_all_blocks()
    job, _, _ = host_job(operands, "1GiB", "auto")
    rows = [("cqsa_arrays, 1 GiB", job["s"], job["peak"])]
    del operands
    try:
        from gpu_rivals import rivals
    except ImportError:
        others: Iterator = iter(())
    else:
        others = rivals(tokens)
    for name, elapsed, peak in chain(rows, others):
        yield {
            "what": name, "N": tokens, "s": round(elapsed, 2), "of ours": round(elapsed / job["s"], 2),
            "device MiB": round(peak / 2**20),
        }  # fmt: skip


def drop_from_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rates(path: Path, size_bytes: int) -> tuple[float, float]:
    """Bytes a second: reading ``path`` cold, and writing and syncing as much beside it."""
    drop_from_cache(path)
    block = bytearray(16 << 20)
    start, done = time.perf_counter(), 0
    with open(path, "rb", buffering=0) as file:
        while (count := file.readinto(block)) and done < size_bytes:
            done += count
    read = done / (time.perf_counter() - start)
    start, beside = time.perf_counter(), path.with_suffix(".rate")
    with open(beside, "wb", buffering=0) as file:
        for _ in range(size_bytes // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    written = size_bytes // len(block) * len(block) / (time.perf_counter() - start)
    beside.unlink()
    return read, written


def file_rows(tokens: int, dim: int, dtype: str, budget: str, directory: str, repeats: int) -> Iterator[dict]:
    """From a cold file to a new one, beside the kernel and the rates of the disk: all of them in turn."""
    path, out = Path(directory) / "qkv.h5", Path(directory) / "out.h5"
    out.unlink(missing_ok=True)
    operands = [x.get() for x in arrays(tokens, dim, dtype)]
    with h5py.File(path, "w") as file:
        for name, array in zip("qkv", operands, strict=True):
            file.create_dataset(name, data=array)
    os.sync()
    kernel_s, _ = resident_run(operands)
    del operands
    cupy.get_default_memory_pool().free_all_blocks()
    size = path.stat().st_size
    sources = [f"{path}:/{name}" for name in "qkv"]
    for cover in ("auto", "cqs", "rectangular"):
        call = {"causal": True, "memory": budget, "device": "cuda", "out": out, "options": cqsa.Options(cover=cover)}
        plan = cqsa.plan(*sources, **call)
        with device_peak() as peak:  # apart, for it disturbs
            cqsa.attention(*sources, **call)
        written, error = out.stat().st_size, cqsa.verify(out, rows=32).frobenius
        found = []
        for _ in range(repeats):
            out.unlink()  # or its blocks would be given back while the new file gets its name
            rates = disk_rates(path, min(size, 2 << 30))
            drop_from_cache(path)
            start = time.perf_counter()
            cqsa.attention(*sources, **call)
            found.append((time.perf_counter() - start, *rates))
        elapsed, read, write = (median(column) for column in zip(*found, strict=True))
        out.unlink()
        disk_s = size / read + written / write
        yield {
            "N": tokens, "dtype": dtype, "D": dim, "budget": budget, "cover": f"{cover}: {plan.cover_name}",
            "parts": f"{plan.chosen.query_parts} x {plan.chosen.key_parts}", "s": round(elapsed, 3),
            "kernel s": round(kernel_s, 3), "disk s": round(disk_s, 3),
            "read GB/s": round(read / 1e9, 2), "write GB/s": round(write / 1e9, 2),
            "ratio": round(elapsed / max(kernel_s, disk_s), 3), "asked": 1.15,
            "peak MiB": round(peak["bytes"] / 2**20, 1), "error": error,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["kernels", "host", "flat", "file", "rivals"])
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of the whole jobs")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--budgets", nargs="*", default=["4GiB", "1GiB"])
    parser.add_argument("--directory", help="for the file; a qkv.h5 there is used (default: temporary)")
    parser.add_argument("--results", default="benchmarks/results", help="folder for gpu_kernels.json and so on")
    arguments = parser.parse_args()
    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or temporary
        sections = {
            "kernels": lambda: kernel_rows(arguments.repeats),
            "host": lambda: host_rows(arguments.tokens, 64, "float16", arguments.budgets, arguments.repeats),
            "flat": lambda: flat_rows(arguments.tokens, 64, "float16"),
            "rivals": lambda: rival_rows(arguments.tokens),
            "file": lambda: file_rows(
                arguments.tokens, 64, "float16", arguments.budgets[0], directory, arguments.repeats
            ),
        }
        for name in arguments.only:
            path, where = f"{arguments.results}/gpu_{name}.json", {"machine": machine(), "gpu": gpu, "heads": HEADS}
            table(sections[name](), keep=lambda rows: store(path, {**where, "rows": rows}))  # noqa: B023
            print(f"stored in {path}")


if __name__ == "__main__":
    main()
