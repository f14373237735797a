"""The engine's view of an input: blocks of tokens, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from ..ranges import Range
from .layout import Layout, Shape4


class TokenSource(Protocol):
    """An attention input of logical shape (batch, heads, tokens, head_dim), read block by block.

    ``read`` and ``prefetch`` may run in different threads at the same time.
    """

    @property
    def shape(self) -> Shape4:
        """(batch, heads, tokens, head_dim)."""

    @property
    def dtype(self) -> np.dtype:
        """Element type as the user sees it: float16, bfloat16, float32 or float64."""

    @property
    def layout(self) -> Layout:
        """The order of the axes of the array that this is a view of."""

    @property
    def token_major(self) -> bool:
        """Whether tokens lie outside heads; then blocks should be allocated (batch, tokens, heads, head_dim)."""

    @property
    def cell(self) -> Shape4:
        """What is read as a whole, whatever is wanted of it: a chunk, all heads of a token, or one vector.

        (batch, heads, tokens, head_dim); cells begin at 0 in every axis.
        """

    @property
    def in_place(self) -> bool:
        """Whether ``view`` works: a native float32 or float64 array in memory with contiguous vectors."""

    @property
    def description(self) -> str:
        """What it is and how it is read, for plans: "qkv.h5:/q, contiguous, positioned reads"."""

    @property
    def identity(self) -> dict[str, object]:
        """What tells this input from another, ready for JSON."""

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the file or array so far, gaps that were read through included."""

    @property
    def held_bytes(self) -> int:
        """Bytes that stay in memory between reads, such as HDF5's cache of chunks; 0 for most sources."""

    @property
    def touched_bytes(self) -> int:
        """Bytes that HDF5 holds during a read for the chunks that it touches; 0 for most sources."""

    def staging_bytes(self, compute_dtype: np.dtype) -> int:
        """The most bytes that one ``read`` into a ``compute_dtype`` block takes besides that block and held_bytes."""

    def read(self, batch: Range, heads: Range, tokens: Range, out: np.ndarray) -> None:
        """Fill ``out``, a float32 or float64 (batch, heads, tokens, head_dim) view of these lengths.

        Its last axis must be contiguous; its other strides are free. Narrower elements are widened exactly; wider
        ones raise ArgumentError. Raises StorageError where the file is shorter than it was, or cannot be read.
        """

    def view(self, batch: Range, heads: Range, tokens: Range) -> np.ndarray:
        """This block of the array itself, without a copy; only where ``in_place``, and in ``dtype``."""

    def prefetch(self, batch: Range, heads: Range, tokens: Range) -> Iterator[None]:
        """Have the system read this block's bytes into its page cache, some at each turn, without mapping them."""

    def overlaps(self, array: np.ndarray) -> bool:
        """Whether writing to ``array`` could change this input."""

    def close(self) -> None:
        """Let go of files; reading is over."""


def no_view(source: TokenSource) -> TypeError:
    """The error of asking for a view of a source that is not ``in_place``: a mistake of the caller."""
    return TypeError(f"{source.description} is not in memory: read it")
