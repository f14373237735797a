"""Which kernel computes a problem, with which tiles: compile options and launch come from the same numbers.

A new kernel is one entry of ``FAMILIES``: its source, how many bytes of shared memory it takes, and its tiles. A type
without an entry is computed by the simple kernel, as are vectors longer than the fast kernels take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...errors import ArgumentError
from .call import ELEMENT_KINDS

# Vectors are padded with zeros, in shared memory, to the next of these.
PADDED = (32, 64, 96, 128, 192, 256)
SIMPLE = "simple.cu"
OLDEST = (8, 0)
HOPPER = (9, 0)
# What one block may take, by compute capability; 99 KiB are there on every other one as well.
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_LEAST_SHARED_KIB = 99
# Keys accumulated from zero before they join the others of a launch; see ``Variant.span_keys``.
SPAN_KEYS = {
    "half.cu": 32768,
    "hopper.cu": 32768,
    "single.cu": 128,
    "split.cu": 2048,
    "split_wide.cu": 1024,
    "double.cu": 512,
}
# What kernels keep in static shared memory beside that, for each warp at most.
_STATIC_BYTES = 80


_METHODS = {
    "half.cu": "products on tensor cores",
    "hopper.cu": "products on tensor cores by groups of warps",
    "split.cu": "products on tensor cores by pairs of float16",
    "split_wide.cu": "products on tensor cores by pairs of TF32",
    "single.cu": "plain arithmetic",
    "double.cu": "products on tensor cores where they have float64",
    SIMPLE: "the plain version",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as it is compiled and launched; head and value dimension 0: any; ``blocks`` as in ``Tile``."""

    source: str
    element: str
    head_dim: int
    value_dim: int
    block_rows: int
    block_keys: int
    warps: int
    shared_bytes: int
    blocks: int = 0
    stages: int = 0

    def __str__(self) -> str:
        """For plans."""
        method = _METHODS[self.source]
        return f"{self.source}, {method}, {self.block_rows} rows x {self.block_keys} keys at once"

    @property
    def span_keys(self) -> int:
        """Keys accumulated from zero, whole tiles: a kernel waits for ever for a rest. The plain kernel has no spans.

        The error of a sum of equal terms, all rounded the same way, grows with their number, and that of tensor cores,
        which cut off, sooner. Sums of the spans of a launch keep more digits.
        """
        return SPAN_KEYS.get(self.source, 32768) // self.block_keys * self.block_keys

    @property
    def architecture(self) -> str | None:
        """What it is compiled for where the device's own architecture does not do: instructions of one generation."""
        return "sm_90a" if self.source == "hopper.cu" else None

    @property
    def whole_words(self) -> bool:
        """Whether it takes only vectors of whole 16-byte words on their borders."""
        return self.source == "hopper.cu"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def options(self) -> tuple[str, ...]:
        """Options of the compiler, apart from the architecture."""
        defines: dict[str, object] = {"ELEMENT": ELEMENT_KINDS[self.element]}
        if self.source == SIMPLE:
            defines["ARITHMETIC"] = "double" if self.element == "float64" else "float"
        else:
            defines |= {"HEAD_DIM": self.head_dim, "VALUE_DIM": self.value_dim}
            defines |= {"BLOCK_ROWS": self.block_rows, "BLOCK_KEYS": self.block_keys}
            defines |= {"WARPS": self.warps, "SHARED_BYTES": self.shared_bytes}
            defines |= {"BLOCKS": self.blocks} if self.blocks else {}
            defines |= {"STAGES": self.stages} if self.stages else {}
        return ("-std=c++17", *(f"-D{name}={value}" for name, value in defines.items()))


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block of ``warps`` warps works on at once: ``rows`` query rows, ``keys`` keys.

    ``blocks`` of them are to fit the registers of a multiprocessor, ``stages`` tiles of keys are on their way through
    shared memory; 0 where the kernel itself knows how many. On devices of the major versions ``not_on`` the compiler
    runs out of registers.
    """

    rows: int
    keys: int
    warps: int
    blocks: int = 0
    stages: int = 0
    not_on: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """A kernel; of ``tiles[d]``, for dimensions up to ``d``, the first that fits into shared memory is taken."""

    source: str
    shared_bytes: Callable[[Tile, int, int], int]
    tiles: Mapping[int, tuple[Tile, ...]]


def _half_bytes(tile: Tile, head_dim: int, value_dim: int) -> int:
    """Queries, two tiles of keys, three of values; rows are 16 bytes longer than the vectors."""
    key, value = 2 * head_dim + 16, 2 * value_dim + 16
    return (tile.rows + 2 * tile.keys) * key + 3 * tile.keys * value


def _hopper_bytes(tile: Tile, head_dim: int, value_dim: int) -> int:
    """Queries, a ring of key and value tiles, what the ring's barriers take."""
    head, value = (-(-dim // 64) * 64 for dim in (head_dim, value_dim))
    return 2 * (tile.rows * head + tile.stages * tile.keys * (head + value)) + 48 * tile.stages + 16


def _single_bytes(tile: Tile, head_dim: int, value_dim: int) -> int:
    """Queries, keys and weights with rows 16 bytes longer than the vectors, values; each tile once."""
    stored = (tile.rows + tile.keys) * (head_dim + 4) + tile.keys * value_dim + tile.rows * (tile.keys + 4)
    return 4 * stored + 16


def _split_bytes(tile: Tile, head_dim: int, value_dim: int) -> int:
    """Queries, a tile of keys, one of values as pairs of float16, rows 8 pairs longer than the vectors; raw tiles."""
    stored = (tile.rows + tile.keys) * (head_dim + 8) + tile.keys * (value_dim + 8)
    return 4 * (stored + tile.keys * (head_dim + value_dim))


def _split_wide_bytes(tile: Tile, head_dim: int, value_dim: int) -> int:
    """Queries, two tiles of keys, two of values."""
    return 4 * ((tile.rows + 2 * tile.keys) * (head_dim + 16) + 2 * tile.keys * (value_dim + 4))


def _double_bytes(tile: Tile, head_dim: int, value_dim: int) -> int:
    """Two tiles of keys and of values, a table of powers, and the queries that do not stay in registers."""
    parts = max(1, 16 * tile.warps // tile.rows)
    one_row_tile = tile.rows * parts == 16 * tile.warps
    kept = min(head_dim, (144 - value_dim // parts) // 16 * 16) if one_row_tile else 0
    return 8 * (20 + tile.rows * (head_dim - kept + 1) + 2 * tile.keys * (head_dim + value_dim + 10))


FAMILIES = {
    "half": Family(
        "half.cu",
        _half_bytes,
        {
            64: (Tile(256, 64, 8, blocks=1),),
            96: (Tile(128, 64, 8, blocks=1), Tile(64, 64, 4, blocks=1)),
            128: (
                Tile(256, 64, 8, blocks=1, not_on=(10,)),
                Tile(128, 64, 8, blocks=1),
                Tile(64, 32, 4, blocks=1),
            ),
            192: (Tile(128, 64, 8, blocks=1), Tile(64, 32, 4, blocks=1)),
            256: (Tile(64, 48, 4, blocks=1), Tile(64, 32, 4, blocks=1)),
        },
    ),
    "hopper": Family(
        "hopper.cu",
        _hopper_bytes,
        {
            64: (Tile(192, 128, 16, stages=5),),
            128: (Tile(128, 128, 12, stages=3),),
        },
    ),
    "single": Family(
        "single.cu",
        _single_bytes,
        {
            64: (Tile(128, 64, 4), Tile(128, 32, 4)),
            96: (Tile(128, 64, 8), Tile(64, 64, 4)),
            128: (Tile(128, 64, 8), Tile(96, 64, 8), Tile(64, 32, 4)),
            192: (Tile(128, 32, 8), Tile(64, 32, 4), Tile(32, 32, 4)),
            256: (Tile(128, 32, 8), Tile(32, 32, 4), Tile(16, 32, 4)),
        },
    ),
    "split": Family(
        "split.cu",
        _split_bytes,
        {
            64: (Tile(256, 32, 8, blocks=1), Tile(128, 32, 8, blocks=1)),
            128: (Tile(128, 32, 8, blocks=1), Tile(64, 16, 4, blocks=1)),
        },
    ),
    "split_wide": Family(
        "split_wide.cu",
        _split_wide_bytes,
        {
            192: (Tile(128, 16, 8), Tile(32, 16, 2)),
            256: (Tile(128, 16, 8), Tile(32, 16, 2)),
        },
    ),
    "double": Family(
        "double.cu",
        _double_bytes,
        {
            64: (Tile(128, 64, 8), Tile(128, 32, 8)),
            128: (Tile(128, 16, 8), Tile(64, 16, 4), Tile(64, 8, 4)),
            256: (Tile(64, 8, 8), Tile(32, 8, 4), Tile(16, 8, 2)),
        },
    ),
}


def variant_for(
    dtype: str, head_dim: int, value_dim: int, capability: tuple[int, int], scale: float, *, whole_words: bool = True
) -> Variant:
    """The kernel that computes a problem; scores that are not scaled by a positive number are left to the plain one.

    ``whole_words``: every vector is whole 16-byte words on their borders, which only some launches find out.
    """
    if scale > 0:
        return choose_variant(dtype, head_dim, value_dim, capability, split=True, whole_words=whole_words)
    return simple_variant(dtype)


def choose_variant(
    dtype: str, head_dim: int, value_dim: int, capability: tuple[int, int], *, split: bool, whole_words: bool = False
) -> Variant:
    """The kernel for elements of type ``dtype`` on a device of compute capability ``capability``.

    ``split``: products of float32 elements are made on tensor cores, from parts; else by plain float32 arithmetic.
    ``whole_words``: see ``variant_for``.

    >>> choose_variant("float16", 80, 128, (9, 0), split=False)  # doctest: +NORMALIZE_WHITESPACE
    Variant(source='half.cu', element='float16', head_dim=96, value_dim=128, block_rows=256, block_keys=64, warps=8,
            shared_bytes=132096, blocks=1, stages=0)
    """
    if capability < OLDEST:
        asked = ".".join(map(str, capability))
        raise ArgumentError("device", f"compute capability {asked}", "8.0 or newer", "Compute on the CPU instead.")
    groups = whole_words and capability == HOPPER and head_dim % 8 == value_dim % 8 == 0
    family = FAMILIES.get(_family(dtype, split, max(head_dim, value_dim), groups))
    if family is None or max(head_dim, value_dim) > PADDED[-1]:
        return simple_variant(dtype)
    # Finished rows pass through the memory of key and value tiles, which must not be much narrower than they are.
    head, value = (_padded(dim) for dim in (max(head_dim, value_dim // 2), value_dim))
    tiles = next(tiles for limit, tiles in family.tiles.items() if max(head, value) <= limit)
    sized = ((tile, family.shared_bytes(tile, head, value)) for tile in tiles)
    limit = shared_limit_bytes(capability)
    fitting = (
        (t, used) for t, used in sized if used + _STATIC_BYTES * t.warps <= limit and capability[0] not in t.not_on
    )
    found = next(fitting, None)
    if found is None:
        return simple_variant(dtype)
    tile, used = found
    return Variant(family.source, dtype, head, value, tile.rows, tile.keys, tile.warps, used, tile.blocks, tile.stages)


def _padded(dim: int) -> int:
    return next(width for width in PADDED if dim <= width)


def simple_variant(dtype: str) -> Variant:
    """The plain kernel: any dimensions; its tile is written in its source."""
    return Variant(SIMPLE, dtype, head_dim=0, value_dim=0, block_rows=8, block_keys=32, warps=8, shared_bytes=0)


def shared_limit_bytes(capability: tuple[int, int]) -> int:
    """Shared memory that one block may take.

    >>> shared_limit_bytes((8, 6))
    101376
    """
    return 1024 * _SHARED_KIB.get(capability, _LEAST_SHARED_KIB)


def _family(dtype: str, split: bool, dim: int, groups: bool) -> str:
    if dtype == "float64":
        return "double"
    if dtype == "float32":
        return "single" if not split else "split" if dim <= max(FAMILIES["split"].tiles) else "split_wide"
    return "hopper" if groups and dim <= max(FAMILIES["hopper"].tiles) else "half"
