"""How exact is it? Results of several dtypes against float64, computed straight from the formula.

Run it anywhere: python compare.py
"""

from __future__ import annotations

import numpy as np

import cqsa_arrays as cqsa
from cqsa_arrays.masks import Full
from cqsa_arrays.reference import reference_rows
from cqsa_arrays.storage import as_source

HEADS, TOKENS, HEAD_DIM = 2, 1500, 64


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """All rows in float64 by the reference, which shares no code with the kernels: (HEADS, TOKENS, HEAD_DIM)."""
    sources = (as_source(array, name) for name, array in zip("qkv", (q, k, v), strict=True))
    return reference_rows(*sources, np.arange(TOKENS), mask=Full(), scale=HEAD_DIM**-0.5).out[0]


def main() -> None:
    """Compare each dtype with float64 on its own inputs, and float16 with what it was rounded from."""
    arrays = np.random.default_rng(0).standard_normal((3, HEADS, TOKENS, HEAD_DIM), dtype=np.float32)
    exact = exact_attention(*arrays)

    for dtype in (np.float64, np.float32, np.float16):
        q, k, v = arrays.astype(dtype)
        report = cqsa.compare(cqsa.attention(q, k, v), exact_attention(q, k, v))
        print(f"{np.dtype(dtype).name} in, {np.dtype(dtype).name} out, against float64 on the same inputs\n{report}\n")

    q, k, v = arrays.astype(np.float16)
    wide = cqsa.attention(q, k, v, dtype=np.float32)
    report = cqsa.compare(wide, exact)
    print(f"float16 in, float32 out, against float64 on the inputs before they were rounded to float16\n{report}")
    print("The last report fails as it should: rounding inputs costs more than attention itself does.")


if __name__ == "__main__":
    main()
