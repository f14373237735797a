"""Hashes of what an input holds: of sampled blocks, or of everything.

Both are of the elements as they are stored, in logical order: they are the same for every way of reading a data set.
A layout, an element type and a shape are not part of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from ..ranges import Range
from .device import DeviceSource
from .dtypes import piece_rows
from .layout import Shape4
from .source import TokenSource

BLOCKS, BLOCK_TOKENS = 64, 16
"""How many blocks are sampled, and the consecutive tokens of each."""

BORDER_PAIRS, BORDER_BATCHES = 4, 3
"""How many (batch, head) pairs have the first and the last block of their tokens sampled, and of how many batch entries
the first and the last head do."""

GOLDEN = 0.618
"""Multiples of this share, modulo 1, are spread evenly, however many there are."""

Check = Callable[[], None]
"""Called again and again where a hash takes long: raises to stop it."""


def unhindered() -> None:
    """A ``Check`` that never stops anything."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some tokens of one head."""

    batch: int
    head: int
    tokens: Range


def sample_blocks(shape: Shape4) -> list[Block]:
    """The blocks of an input of logical ``shape`` whose elements are sampled, in the order of their tokens.

    Everything, where that is no more. Else the borders of the token axis of some heads, and one block in each of equal
    stretches of the token axis, at a fixed place that looks random, of another head each.

    >>> [len(sample_blocks((1, heads, tokens, 64))) for heads, tokens in ((1, 100), (1, 10**9), (16, 10**5))]
    [7, 64, 64]
    """
    batch, heads, tokens, _ = shape
    pairs = batch * heads
    if pairs * tokens <= BLOCKS * BLOCK_TOKENS:
        found = {(part, pair) for part in Range(0, tokens).split(BLOCK_TOKENS) for pair in range(pairs)}
    else:
        length = min(tokens, BLOCK_TOKENS)
        ends = (Range(0, length), Range(tokens - length, tokens))
        found = {(part, pair) for part in ends for pair in _border_pairs(batch, heads)}
        strata, step = BLOCKS - len(found), _stride(pairs)
        for i in range(strata):
            low, high = (tokens * j // strata for j in (i, i + 1))
            start = min(low + _random(i) % max(1, high - low - length + 1), tokens - length)
            found.add((Range(start, start + length), i * step % pairs))
    return [Block(*divmod(pair, heads), part) for part, pair in sorted(found)]


def _border_pairs(batch: int, heads: int) -> set[int]:
    """Of all pairs of batch entry and head, by number: some, evenly spread, and those at the borders of batches."""
    pairs = np.linspace(0, batch * heads - 1, BORDER_PAIRS).astype(int).tolist()
    firsts = [heads * b for b in np.linspace(0, batch - 1, BORDER_BATCHES).astype(int).tolist()]
    return {*pairs, *firsts, *(first + heads - 1 for first in firsts)}


def _stride(pairs: int) -> int:
    """A step that visits all of so many pairs before it comes back, far apart in turn."""
    step = max(1, round(GOLDEN * pairs))
    while math.gcd(step, pairs) > 1:
        step += 1
    return step


def _random(number: int) -> int:
    """The same large number on every machine and with every version of NumPy."""
    return int.from_bytes(sha256(b"block %d" % number).digest()[:8])


def sampled_hash(source: TokenSource, check: Check = unhindered) -> str:
    """SHA-256 of the elements of the sampled blocks: at most 1024 tokens.

    Blocks in the same cells of the source, such as one compressed chunk, are read together.
    """
    blocks = sample_blocks(source.shape)
    wide, high, long, _ = source.cell
    together: dict[tuple[int, ...], list[Block]] = {}
    for block in blocks:
        first, last = block.tokens.start // long, (block.tokens.stop - 1) // long
        together.setdefault((block.batch // wide, block.head // high, first, last), []).append(block)
    found: dict[Block, bytes] = {}
    for group in together.values():
        check()
        batch, heads = _hull([b.batch for b in group]), _hull([b.head for b in group])
        tokens = Range(min(b.tokens.start for b in group), max(b.tokens.stop for b in group))
        read = _elements(source, batch, heads, tokens)
        for block in group:
            part = slice(block.tokens.start - tokens.start, block.tokens.stop - tokens.start)
            found[block] = read[block.batch - batch.start, block.head - heads.start, part].tobytes()
    return sha256(b"".join(found[block] for block in blocks)).hexdigest()


def _hull(numbers: list[int]) -> Range:
    return Range(min(numbers), max(numbers) + 1)


def full_hash(source: TokenSource, check: Check = unhindered) -> str:
    """SHA-256 of the SHA-256 of each head's elements; ``check`` is called for every piece of about 1 MiB."""
    batch, heads, tokens, dim = source.shape
    wide, high, long, _ = source.cell
    at_once = long * piece_rows(wide * high * long * dim * source.dtype.itemsize)
    digests = [b""] * (batch * heads)
    for b in Range(0, batch).split(wide):
        for h in Range(0, heads).split(high):
            found = [[sha256() for _ in range(len(h))] for _ in range(len(b))]
            for t in Range(0, tokens).split(at_once):
                check()
                for of_heads, read in zip(found, _elements(source, b, h, t), strict=True):
                    for one, elements in zip(of_heads, read, strict=True):
                        one.update(elements)
            for i, of_heads in enumerate(found):
                first = (b.start + i) * heads + h.start
                digests[first : first + len(h)] = [one.digest() for one in of_heads]
    return sha256(b"".join(digests)).hexdigest()


def _elements(source: TokenSource, batch: Range, heads: Range, tokens: Range) -> np.ndarray:
    """The bytes of a block as they are stored: (batch, heads, tokens, bytes of a vector), in C order."""
    if isinstance(source, DeviceSource):
        # As whole numbers: CuPy does not copy every type of elements.
        block = source.view(batch, heads, tokens).view(f"u{source.dtype.itemsize}").get(order="C")
    else:
        block = np.empty((len(batch), len(heads), len(tokens), source.shape[3]), source.dtype)
        source.read(batch, heads, tokens, block)
    return block.view(np.uint8)
