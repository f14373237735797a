"""One small case of each dtype on the processor that the environment names; prints what was compiled, as JSON.

Run by test_kernel_targets.py: ``python target_child.py ASSEMBLY_FOLDER``.
"""

import json
import sys
from pathlib import Path

import numpy as np
from kernel_cases import FULL, blocks_of, check_exact, exact, normal, run_fast

from cqsa_arrays.kernels.cpu.attend import attend_group, signature
from cqsa_arrays.kernels.cpu.intrinsics import host_tile


def main(folder: Path) -> None:
    tiles = {}
    for dtype in ("float32", "float64"):
        rng = np.random.default_rng(1)
        for head_dim, value_dim in ((7, 10), (64, 33)):
            shapes = ((130, head_dim), (210, head_dim), (210, value_dim))
            queries, keys, values = (normal(rng, 1, 2, *shape, dtype=dtype) for shape in shapes)
            blocks = blocks_of(keys, values, (100,))
            for diagonal in (FULL, 0):
                arguments = {"diagonal": diagonal, "scale": 0.3}
                # 0.3 makes scores of up to 10 at head dimension 64: their rounding alone is 5e-7.
                tolerance = 2e-6 if dtype == "float32" else None
                state = run_fast(queries, 40, blocks, **arguments)
                check_exact(state, *exact(queries, 40, blocks, **arguments), tolerance)
        tiles[dtype] = host_tile(dtype).name
        compiled = attend_group.overloads[tuple(signature(dtype).args)]
        (folder / f"{dtype}.s").write_text(compiled.library.get_asm_str())
    print(json.dumps({"tiles": tiles, "hits": sum(attend_group.stats.cache_hits.values())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
