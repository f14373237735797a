"""What others do with queries, keys and values in the memory of the host, one GPU, causal: seconds and device memory.

``stream_cqsa`` is the published implementation of Stream-CQSA (package stream-cqsa). The other one is what a user of
FlashAttention-3 (package fa3-fwd) or, without that, of PyTorch writes: query tiles stay, key tiles stream past them
with double buffering, and partial results merge by their log-sum-exp. Both need PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

HEADS, DIM = 8, 64
# Difference sets of 7 and 31, and whether stream_cqsa adds up on the GPU.
STREAMED = [(7, (0, 1, 3), True), (31, (0, 1, 3, 8, 12, 18), True)]


def rivals(tokens: int) -> Iterator[tuple[str, float, int]]:
    """Name, seconds and peak bytes of PyTorch's allocator of those that are installed, stream_cqsa at its fastest."""
    try:
        from stream_cqsa import stream_cqsa_forward
    except ImportError:
        stream_cqsa_forward = None
    for chunks, marks, on_gpu in STREAMED if stream_cqsa_forward is not None else ():
        # Tokens outside heads: the layout in which it makes no copy.
        q, k, v = (x.transpose(1, 2) for x in pinned_inputs((1, tokens, HEADS, DIM), torch.float16))

        def streamed(q=q, k=k, v=v, chunks=chunks, marks=marks, on_gpu=on_gpu) -> None:
            stream_cqsa_forward(
                q, k, v, causal=True, itr=1, c=chunks, interest_set=marks, stream_from_host=True,
                accumulate_on_gpu=on_gpu,
            )  # fmt: skip

        yield (f"stream_cqsa, c = {chunks}, adds up on the {'GPU' if on_gpu else 'host'}", *measured(streamed))
    kernel, name = tile_kernel()
    q, k, v = pinned_inputs((tokens, HEADS, DIM), torch.bfloat16)
    out = torch.empty(tokens, HEADS, DIM, dtype=torch.float32).pin_memory()
    yield (f"tiles of 65536 by {name}", *measured(lambda: rectangular(q, k, v, out, kernel, 65536)))


def pinned_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device="cuda").to(dtype).cpu().pin_memory() for _ in range(3)]


def measured(run: Callable[[], None]) -> tuple[float, int]:
    """The better of two runs after which everything is compiled and warm."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    return elapsed, peak


def tile_kernel() -> tuple[Callable, str]:
    """Output (tokens, heads, dim) and log-sum-exp (heads, tokens) of one tile pair."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:

        def flash2(q, k, v, causal):
            heads_first = (x[None].transpose(1, 2) for x in (q, k, v))
            found = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first, 0.0, causal)
            return found[0][0].transpose(0, 1), found[1][0]

        return flash2, "FlashAttention-2"

    def flash3(q, k, v, causal):
        out, lse = flash_attn_func(q[None], k[None], v[None], causal=causal, return_attn_probs=True)[:2]
        return out[0], lse[0]

    return flash3, "FlashAttention-3"


def rectangular(q, k, v, out, kernel: Callable, tile: int) -> None:
    """Causal attention of pinned arrays (tokens, heads, dim), tile by tile, into ``out``."""
    tokens, copies, main = len(q), torch.cuda.Stream(), torch.cuda.current_stream()
    slots = [[torch.empty_like(x[:tile], device="cuda") for x in (k, v)] for _ in range(2)]
    loaded, free = ([torch.cuda.Event() for _ in slots] for _ in range(2))
    for start in range(0, tokens, tile):
        queries = q[start : start + tile].to("cuda", non_blocking=True)
        acc = torch.zeros(queries.shape, device="cuda")
        lse = torch.full((q.shape[1], len(queries)), -torch.inf, device="cuda")
        for step, first in enumerate(range(0, start + len(queries), tile)):
            slot = step % 2
            with torch.cuda.stream(copies):
                copies.wait_event(free[slot])
                block = [there[: len(x[first : first + tile])] for there, x in zip(slots[slot], (k, v), strict=True)]
                for there, x in zip(block, (k, v), strict=True):
                    there.copy_(x[first : first + tile], non_blocking=True)
                loaded[slot].record(copies)
            main.wait_event(loaded[slot])
            part, part_lse = kernel(queries, *block, causal=first == start)
            free[slot].record(main)
            new = torch.logaddexp(lse, part_lse)
            acc.mul_((lse - new).exp().T[..., None]).add_(part.float() * (part_lse - new).exp().T[..., None])
            lse = new
        out[start : start + tile].copy_(acc, non_blocking=True)
    torch.cuda.synchronize()
