"""Synthetic inputs of any size, written in bounded memory: normal numbers that depend on nothing but seed and place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ..errors import ArgumentError, StorageError
from ..ranges import Range
from ..units import format_bytes
from ..wording import Choice, Phrase
from .dtypes import SUPPORTED, piece_rows
from .layout import LAYOUTS, Layout, Shape4
from .output import write_rows
from .partfile import PartFile, check_target, target_of
from .rows import Rows

if TYPE_CHECKING:
    from .create import NewDataset

BLOCK_TOKENS = 256
"""Tokens that come from one state of the generator; part of what a seed means, so never to be changed."""

MOST_SEED = (1 << 128) - 1
# Elements of a vector, of which attention takes 1024; many tokens are made at once.
MOST_DIM = 1 << 16
# No number that is made is further from 0.
MOST_DEVIATIONS = 16
# What HDF5 can address in a file, and the most bytes of one of its chunks.
MOST_BYTES, MOST_CHUNK_BYTES = (1 << 63) - 1, (1 << 32) - 1

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What to make. ``key_tokens`` and ``value_dim`` are ``tokens`` and ``head_dim`` unless given.

    ``shared`` gives one data set the three names /q, /k and /v. ``chunk_tokens`` makes chunked data sets of that many
    tokens, compressed by ``compression`` ("gzip" or "lzf"); without it they are contiguous.
    """

    tokens: int
    heads: int = 1
    head_dim: int = 64
    batch: int = 1
    key_tokens: int | None = None
    value_dim: int | None = None
    dtype: str = "float32"
    layout: str = "bhnd"
    seed: int = 0
    scale: float = 1.0
    shared: bool = False
    chunk_tokens: int | None = None
    compression: str | None = None

    def __post_init__(self) -> None:
        numbers = ("tokens", "heads", "head_dim", "batch", "key_tokens", "value_dim", "chunk_tokens")
        for name in numbers:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ArgumentError(name, value, "at least 1", "Leave optional lengths out for their defaults.")
        for name in ("head_dim", "value_dim"):
            if (getattr(self, name) or 1) > MOST_DIM:
                raise ArgumentError(name, getattr(self, name), f"at most {MOST_DIM}", "Split the vectors into heads.")
        if not 0 <= self.seed <= MOST_SEED:
            raise ArgumentError("seed", self.seed, "at least 0 and less than 2**128", "0 is the default.")
        if self.dtype not in SUPPORTED:
            raise ArgumentError("dtype", self.dtype, f"one of {', '.join(SUPPORTED)}", "float32 is the default.")
        if self.layout not in LAYOUTS:
            raise ArgumentError("layout", self.layout, f"one of {', '.join(LAYOUTS)}", "bhnd is the default.")
        if self.shared and not self.shapes["q"] == self.shapes["k"] == self.shapes["v"]:
            found = Phrase.of(Choice("key_tokens"), " or ", Choice("value_dim"))
            raise ArgumentError("shared", found, "one shape for q, k and v", "Leave them out.")
        if not math.isfinite(self.scale):
            raise ArgumentError("scale", self.scale, "a finite number", "It is the standard deviation of the numbers.")
        if MOST_DEVIATIONS * abs(self.scale) > float(ml_dtypes.finfo(SUPPORTED[self.dtype]).max):
            expected = f"a standard deviation of which {self.dtype} holds {MOST_DEVIATIONS}"
            raise ArgumentError("scale", self.scale, expected, "Larger numbers would be infinite.")
        if self.compression not in (None, "gzip", "lzf"):
            raise ArgumentError("compression", repr(self.compression), "gzip or lzf", "Leave it out for none.")
        if self.compression is not None and self.chunk_tokens is None:
            remedy = Phrase.of("Pass ", Choice("chunk_tokens", ...), ", too.")
            raise ArgumentError("compression", self.compression, "chunked data", remedy)
        self._check_sizes()

    def _check_sizes(self) -> None:
        """What HDF5 cannot store is refused before a file is made."""
        itemsize = SUPPORTED[self.dtype].itemsize
        if self.size_bytes > MOST_BYTES:
            found = f"{self.tokens}, which makes {format_bytes(self.size_bytes)} of inputs"
            raise ArgumentError("tokens", found, f"less than {format_bytes(MOST_BYTES)}", "Make fewer or shorter ones.")
        for _, heads, tokens, dim in self.shapes.values() if self.chunk_tokens is not None else ():
            at_once = (heads if _token_major(self) else 1) * min(self.chunk_tokens or 1, tokens)
            if at_once * dim * itemsize > MOST_CHUNK_BYTES:
                found = f"{self.chunk_tokens}, which makes chunks of {format_bytes(at_once * dim * itemsize)}"
                raise ArgumentError("chunk_tokens", found, "less than 4 GiB a chunk", "Make chunks of fewer tokens.")

    @property
    def size_bytes(self) -> int:
        """Bytes of all data sets, before compression."""
        lengths = [math.prod(shape) for shape in self.shapes.values()]
        return (lengths[0] if self.shared else sum(lengths)) * SUPPORTED[self.dtype].itemsize

    @property
    def shapes(self) -> dict[str, Shape4]:
        """Logical shape of each data set."""
        key_tokens = self.key_tokens or self.tokens
        value_dim = self.value_dim or self.head_dim
        return {
            "q": (self.batch, self.heads, self.tokens, self.head_dim),
            "k": (self.batch, self.heads, key_tokens, self.head_dim),
            "v": (self.batch, self.heads, key_tokens, value_dim),
        }


def make_inputs(
    path: str | os.PathLike[str], spec: InputSpec, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Write /q, /k and /v as ``spec`` says; the file has its name only when it is whole.

    Equal seeds give equal numbers, whatever the layout, the storage or the number of tokens: longer inputs begin with
    the shorter ones. Raises ArgumentError for a path that cannot be an output, StorageError where there is no room.

    >>> make_inputs("qkv.h5", InputSpec(tokens=1 << 20, heads=8, dtype="float16"))    # doctest: +SKIP
    """
    from .create import NewDataset

    check_target(path := target_of(os.fspath(path)), (), overwrite=overwrite)
    layout, dtype = Layout(spec.layout), SUPPORTED[spec.dtype]
    names = ["q"] if spec.shared else ["q", "k", "v"]
    links = {"/k": "/q", "/v": "/q"} if spec.shared else {}
    attributes: dict[str, object] = {"synthetic": asdict(spec)}
    report = _Report(progress, spec.size_bytes)
    new = [
        NewDataset(f"/{name}", layout.physical_shape(spec.shapes[name]), dtype, {"layout": spec.layout})
        for name in names
    ]
    if spec.chunk_tokens is None:
        with PartFile.create(path, new, attributes=attributes, links=links, overwrite=overwrite) as part:
            for name, offset in zip(names, part.offsets, strict=True):
                _write_contiguous(part, Rows(spec.shapes[name], dtype, offset, _token_major(spec)), spec, name, report)
            part.finish()
        return
    with PartFile.create(path, [], attributes=attributes, links={}, overwrite=overwrite) as part:
        _write_chunked(part, new, links, spec, report)
        part.finish()


def normal_block(spec: InputSpec, name: str, batch: int, heads: Range, tokens: Range) -> np.ndarray:
    """The numbers of data set ``name`` at these places: (1, heads, tokens, dim), float32, or float64 if stored so."""
    _, all_heads, _, dim = spec.shapes[name]
    wide = np.dtype("f8") if spec.dtype == "float64" else np.dtype("f4")
    block = np.empty((1, len(heads), len(tokens), dim), wide)
    first, past = tokens.start // BLOCK_TOKENS, -(-tokens.stop // BLOCK_TOKENS)
    for h, number in product(range(heads.start, heads.stop), range(first, past)):
        counter = [0, number, batch * all_heads + h, "qkv".index(name)]
        whole = np.random.Generator(np.random.Philox(key=spec.seed, counter=counter))
        normal = whole.standard_normal((BLOCK_TOKENS, dim), wide.type)
        start = number * BLOCK_TOKENS
        wanted = tokens & Range(start, start + BLOCK_TOKENS)
        into = slice(wanted.start - tokens.start, wanted.stop - tokens.start)
        block[0, h - heads.start, into] = normal[wanted.start - start : wanted.stop - start]
    block *= spec.scale
    return block


class _Report:
    """Counts bytes towards ``total_bytes`` and tells ``progress``."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress, self._total, self._done = progress, total_bytes, 0

    def add(self, size_bytes: int) -> None:
        self._done += size_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _token_major(spec: InputSpec) -> bool:
    return Layout(spec.layout).tokens_outside_heads and spec.heads > 1


def _places(spec: InputSpec, name: str, tokens_at_once: int) -> Iterator[tuple[Range, Range, Range]]:
    """The blocks that are made one after the other, in the order of the file."""
    batch, heads, tokens, _ = spec.shapes[name]
    heads_at_once = heads if _token_major(spec) else 1
    return product(
        Range(0, batch).split(1), Range(0, heads).split(heads_at_once), Range(0, tokens).split(tokens_at_once)
    )


def _write_contiguous(part: PartFile, rows: Rows, spec: InputSpec, name: str, report: _Report) -> None:
    blocks_at_once = max(1, piece_rows(rows.row_bytes) // BLOCK_TOKENS)
    for batch, heads, tokens in _places(spec, name, blocks_at_once * BLOCK_TOKENS):
        block = normal_block(spec, name, batch.start, heads, tokens)
        write_rows(part.file, rows, (batch, heads, tokens), block)
        report.add(block.size * rows.dtype.itemsize)


def _write_chunked(
    part: PartFile, new: list[NewDataset], links: dict[str, str], spec: InputSpec, report: _Report
) -> None:
    """Through h5py, chunk by chunk; a chunk is one head's, or in token-major layouts all heads' tokens."""
    import h5py

    from .create import stored_form, write_attributes

    layout, chunk_tokens = Layout(spec.layout), spec.chunk_tokens or 1
    try:
        with h5py.File(part.part, "r+", locking=False) as file:  # nobody else knows it yet
            for one in new:
                stored, marks = stored_form(one.dtype)
                name = one.name.strip("/")
                _, heads, tokens, dim = spec.shapes[name]
                chunk = layout.order((1, heads if _token_major(spec) else 1, min(chunk_tokens, tokens), dim))
                made = file.create_dataset(name, one.shape, stored, chunks=chunk, compression=spec.compression)
                write_attributes(made, {**marks, **one.attributes})
                for b, h, t in _places(spec, name, chunk_tokens):
                    block = normal_block(spec, name, b.start, h, t).astype(one.dtype).view(stored)
                    where = layout.order((b.slice, h.slice, t.slice, slice(None)))
                    made[where] = layout.physical(block)
                    report.add(block.nbytes)
            for name, target in links.items():
                file[name] = file[target]
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{part.part}: cannot be written: {error}") from error
