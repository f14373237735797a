"""Attention inside a NumPy pipeline: arrays in, arrays out, and keys that arrive in pieces.

Run it anywhere: python pipeline.py
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import cqsa_arrays as cqsa

HEADS, TOKENS, HEAD_DIM = 4, 3000, 64


def batches_of_keys(seed: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``count`` pieces of keys and values, (HEADS, TOKENS, HEAD_DIM) each: as from an instrument or a simulation."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        keys, values = rng.standard_normal((2, HEADS, TOKENS, HEAD_DIM), dtype=np.float32)
        yield keys, values


def main() -> None:
    """Attend to keys at hand, then to keys that come one piece after the other, of which none is kept."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, HEADS, TOKENS, HEAD_DIM), dtype=np.float32)

    out = cqsa.attention(q, k, v, causal=True)
    print(f"causal self-attention: {type(out).__name__} {out.shape} {out.dtype}")
    print(f"  the first token sees only itself: {np.allclose(out[:, 0], v[:, 0])}")

    stats = cqsa.statistics(q, k, v)
    for keys, values in batches_of_keys(seed=1, count=3):
        stats = cqsa.merge(stats, cqsa.statistics(q, keys, values))
        print(f"  merged {TOKENS:,} more keys; mean log-sum-exp {stats.lse().mean():.4f}")

    pieces = [(k, v), *batches_of_keys(seed=1, count=3)]
    all_keys, all_values = (np.concatenate([piece[i] for piece in pieces], axis=1) for i in (0, 1))
    at_once = cqsa.attention(q, all_keys, all_values)
    report = cqsa.compare(stats.output(), at_once)
    print(f"pieces against all {all_keys.shape[1]:,} keys at once: {report}")


if __name__ == "__main__":
    main()
