"""Tile sizes: the scratch is large enough for every instruction set, each part aligned, groups fixed by the shapes."""

import inspect

import numpy as np
import pytest
from kernel_cases import GuardedState, blocks_of, normal, nothing

from cqsa_arrays.kernels.cpu import kernel as kernel_module
from cqsa_arrays.kernels.cpu.attend import _carve
from cqsa_arrays.kernels.cpu.intrinsics import host_tile
from cqsa_arrays.kernels.cpu.tiles import (
    ALIGNMENT,
    BLOCK_KEYS,
    GROUP_BYTES,
    GROUP_PANELS,
    SPAN_KEYS,
    group_panels,
    instruction_set,
    largest_scratch_bytes,
    tile_for,
)

DTYPES = ("float32", "float64")
SETS = ("avx512", "avx2", "neon", "sse2")
# Rows, head dimension, value dimension.
SHAPES = [
    (1, 1, 1), (2, 3, 5), (47, 8, 7), (48, 8, 8), (49, 9, 9), (97, 1, 513), (193, 31, 33), (384, 64, 64), (400, 7, 100),
    (700, 100, 3), (1000, 128, 128), (3000, 16, 1), (5000, 1, 1), (2000, 200, 200), (97, 1024, 1024), (60, 4097, 2),
    (60, 2, 4097),
]  # fmt: skip


def shape_id(shape):
    return "-".join(map(str, shape))


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


CANARY = 12345.678


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_a_run_stays_within_its_scratch(monkeypatch, dtype, shape, threads):
    """Canaries around the scratch survive; the scratch itself is NaN beforehand and is used to its end."""
    rows, head_dim, value_dim = shape
    margin, whole = 4096, []

    def guarded(count, dtype):
        space = np.full(count + 2 * margin, CANARY, dtype)
        first = margin - space.ctypes.data % ALIGNMENT // space.itemsize
        scratch = space[first : first + count]
        assert scratch.ctypes.data % ALIGNMENT == 0
        scratch[:] = np.nan
        whole.append((space, first, count))
        return scratch

    monkeypatch.setattr(kernel_module, "allocate", guarded)
    rng = np.random.default_rng(1)
    queries, keys, values = (
        normal(rng, 1, 2, n, w, dtype=dtype) for n, w in ((rows, head_dim), (250, head_dim), (250, value_dim))
    )
    kernel = kernel_module.CpuKernel(dtype, rows=rows, head_dim=head_dim, value_dim=value_dim, threads=threads)
    assert len(whole) == threads
    for diagonal in (1 << 40, 250 - rows, 0):
        state = GuardedState((1, 2, rows), value_dim, dtype)
        kernel.accumulate(
            queries, 0, blocks_of(keys, values, (101,)), state.state, diagonal=diagonal, scale=0.1, done=nothing
        )
        state.check()
    kernel.close()
    used = 0
    for space, first, count in whole:
        assert (space[:first] == np.array(CANARY, dtype)).all()
        assert (space[first + count :] == np.array(CANARY, dtype)).all()
        written = np.flatnonzero(~np.isnan(space[first : first + count]))
        used = max(used, int(written[-1]) + 1 if len(written) else 0)
        assert count * space.itemsize == host_tile(dtype).scratch_bytes(rows, head_dim, value_dim)
    slack = count - used
    assert slack * np.dtype(dtype).itemsize <= 3 * ALIGNMENT + host_tile(dtype).keys * 8  # nothing is paid for nothing


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("family", SETS)
def test_the_parts_of_the_scratch_fit_and_are_aligned(dtype, family, shape):
    """For every instruction set, also those that this machine lacks: the layout that the kernel carves, in NumPy."""
    _, head_dim, value_dim = shape
    tile = tile_for(family, dtype)
    panels, columns = group_panels(tile, *shape), tile.columns(value_dim)
    space = np.empty(tile.scratch_bytes(*shape) // tile.itemsize + ALIGNMENT, dtype)
    first = -space.ctypes.data % ALIGNMENT // tile.itemsize
    scratch = space[first : first + tile.scratch_bytes(*shape) // tile.itemsize]
    packed, span, total, *others = _carve.py_func(scratch, panels, head_dim, columns, tile.rows)
    parts = [*total, packed, *span, *others]
    state = [(panels, columns, tile.rows), (panels, tile.rows), (panels, tile.rows)]
    low = columns + 1 if dtype == "float64" else 0
    totals = [(panels, columns + 1, tile.rows), (panels, low, tile.rows), state[1], state[2], (2, tile.rows)]
    wanted = [
        *totals, (panels, head_dim, tile.rows), *state, state[1], (tile.rows,), (tile.rows,), (tile.rows,),
        (BLOCK_KEYS * tile.rows,),
    ]  # fmt: skip
    assert all(part.dtype == np.float64 for part in total)
    assert [part.shape for part in parts[:-1]] == wanted
    ends = [part.ctypes.data + part.nbytes for part in parts]
    assert all(end == part.ctypes.data for end, part in zip(ends[:-1], parts[1:], strict=True))
    vector_bytes = tile.lanes * tile.itemsize
    assert all(part.ctypes.data % vector_bytes == 0 for part in parts)
    values_stride = columns * tile.itemsize + ALIGNMENT
    assert (BLOCK_KEYS - 1) * values_stride + value_dim * tile.itemsize <= parts[-1].nbytes


@pytest.mark.parametrize("family", SETS)
def test_scratch_for_more_rows_serves_fewer(dtype, family):
    """A kernel is made for the longest block of queries and called with shorter ones."""
    tile = tile_for(family, dtype)
    for head_dim, value_dim in ((1, 1), (16, 8), (64, 64), (128, 100), (1024, 1024)):
        sizes = [tile.scratch_bytes(rows, head_dim, value_dim) for rows in range(1, 3000, 7)]
        assert sizes == sorted(sizes)
        assert all(largest_scratch_bytes(dtype, rows, head_dim, value_dim) >= sizes[rows // 7] for rows in (1, 1401))


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("family", SETS)
def test_groups_of_panels_depend_on_the_shapes_alone(dtype, family, shape):
    assert list(inspect.signature(group_panels).parameters) == ["tile", "rows", "head_dim", "value_dim"]
    tile = tile_for(family, dtype)
    panels = group_panels(tile, *shape)
    assert 1 <= panels <= GROUP_PANELS
    panel_bytes = tile.rows * (shape[1] + tile.columns(shape[2])) * tile.itemsize
    assert panels == 1 or panels * panel_bytes <= GROUP_BYTES
    total = -(-shape[0] // tile.rows)
    assert -(-total // panels) >= min(total, 8) // 2  # enough work items for several threads


@pytest.mark.parametrize("family", SETS)
def test_tiles_fit_the_register_file(dtype, family):
    tile = tile_for(family, dtype)
    registers, vector_bytes = {"avx512": (32, 64), "avx2": (16, 32), "neon": (32, 16), "sse2": (16, 16)}[family]
    assert tile.lanes * tile.itemsize == vector_bytes
    assert tile.vectors * tile.keys + tile.vectors + 1 <= registers
    assert BLOCK_KEYS % tile.keys == 0
    assert SPAN_KEYS >= BLOCK_KEYS
    assert (tile.name, tile.dtype) == (family, dtype)


@pytest.mark.parametrize(
    ("value_dim", "columns"), [(1, 8), (7, 8), (8, 8), (9, 16), (128, 128), (129, 136)], ids=lambda n: str(n)
)
def test_columns_are_whole_tiles(value_dim, columns):
    assert tile_for("avx512", "float32").columns(value_dim) == columns


# Triple, features, family.
TARGETS = {
    "avx512": ("x86_64-unknown-linux-gnu", "+sse2,+avx2,+fma,+avx512f", "avx512"),
    "avx512-without-fma": ("x86_64-unknown-linux-gnu", "+avx2,-fma,+avx512f", "sse2"),
    "avx2": ("x86_64-unknown-linux-gnu", "+avx2,+fma,-avx512f", "avx2"),
    "avx2-like-names": ("x86_64-unknown-linux-gnu", "+avx2,+fma4,-fma,+avx512fp16", "sse2"),
    "old": ("x86_64-unknown-linux-gnu", "+sse4.2,+avx,-avx2", "sse2"),
    "generic": ("x86_64-unknown-linux-gnu", "", "sse2"),
    "arm": ("aarch64-unknown-linux-gnu", "+neon,+fp-armv8", "neon"),
    "mac": ("arm64-apple-darwin23.0.0", "", "neon"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_instruction_set_of_a_target(target):
    triple, features, family = TARGETS[target]
    assert instruction_set(triple, features) == family
