"""The CUDA kernel family: one launch for one query block against its key blocks, on the current stream of CuPy.

A row's arithmetic depends on the order and lengths of the key blocks, and nothing is added atomically: the same calls
give the same bits. Of 16-bit elements it depends on the 32 rows around it, too, which are rescaled together: launches
of one job begin at multiples of 32 rows of a chunk.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cupy
import numpy as np
from cupy.cuda import driver

from ...block_statistics import BlockStatistics
from ...masks import UNBOUNDED_DIAGONAL
from ...ranges import Range
from ..base import KeyBlock, in_token_order
from .call import CALL, MAX_PIECES, PIECE_TOKENS, Finish, RowMask, pack_call
from .cubin import architecture, compiled
from .source import flattened
from .variants import Variant, variant_for

logger = logging.getLogger("cqsa_arrays")
# Launches that may be under way: enough to keep the device busy, few enough that an interruption is soon heard.
_LAUNCHES_AHEAD = 4
# The argument as one element without fields: of an array with some, CuPy has NumPy describe every one at every launch.
_OPAQUE = np.dtype((np.void, CALL.itemsize))


@lru_cache(maxsize=64)
def load(variant: Variant, device_index: int) -> Any:
    """The compiled kernel on the current device, which has that number.

    What was compiled is kept on disk, by source, options and architecture; what is loaded stays loaded: to read the
    sources and load the code takes longer than a small problem.
    """

    def say() -> None:
        logger.info("compiling %s for %s (once; later runs load it from disk)", variant.source, variant.element)

    arch = variant.architecture or architecture(_capability(cupy.cuda.Device()))
    options = (*variant.options, "-ftz=true", f"-arch={arch}")  # the second as CuPy does
    module = cupy.cuda.Module()
    module.load(compiled(flattened(variant.source), options, say))
    function = module.get_function("attend")
    driver.funcSetAttribute(
        function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, variant.shared_bytes
    )  # fmt: skip
    return function


def _capability(device: cupy.cuda.Device) -> tuple[int, int]:
    """(9, 0) of "90", (12, 1) of "121"."""
    return int(device.compute_capability[:-1]), int(device.compute_capability[-1])


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch that is under way, and whom to tell when it is done."""

    finished: cupy.cuda.Event
    done: Callable[[Range], None]
    rows: Range
    times: int


class CudaKernel:
    """``Kernel`` on CuPy arrays of one element type; states are float32, or float64 for float64 elements."""

    def __init__(self, dtype: str, *, head_dim: int, value_dim: int, scale: float) -> None:
        device = cupy.cuda.Device()
        capability = _capability(device)
        self.variant = variant_for(dtype, head_dim, value_dim, capability, scale)
        self._function = load(self.variant, device.id)
        self._for_any_words = variant_for(dtype, head_dim, value_dim, capability, scale, whole_words=False)
        self._device = device.id
        self._launches: deque[_Launch] = deque()

    def accumulate(
        self,
        queries: Any,
        query_start: int,
        blocks: Sequence[KeyBlock],
        state: BlockStatistics | None,
        *,
        diagonal: int,
        scale: float,
        done: Callable[[Range], None],
        fresh: bool = False,
        finish: Finish | None = None,
        loaded: Callable[[], None] = lambda: None,
    ) -> cupy.cuda.Event:
        """See ``Kernel.accumulate``; returns when the work is on the stream, a few launches ahead of the device.

        The event that it returns comes when that work is done.

        ``fresh``: the state holds nothing yet. ``finish``: these are all keys of the rows, which are written there;
        a state is needed only where they take several launches. ``loaded`` is called before the launch, and returns
        when the stream waits for the blocks.
        """
        pieces = [piece for block in in_token_order(blocks) for piece in _pieces(block)]
        spans = self.variant.span_keys
        calls = [
            pack_call(
                queries, query_start, pieces[first : first + MAX_PIECES], state,
                finish if first + MAX_PIECES >= len(pieces) else None,
                mask=RowMask(-UNBOUNDED_DIAGONAL, diagonal), scale=scale, span_keys=spans, fresh=fresh and first == 0,
            )
            for first in range(0, len(pieces), MAX_PIECES)
        ]  # fmt: skip
        loaded()
        for call in calls:
            self._launch(call)
        rows = Range(query_start, query_start + queries.shape[2])
        finished = cupy.cuda.Event(disable_timing=True)
        finished.record()
        self._launches.append(_Launch(finished, done, rows, queries.shape[0] * queries.shape[1]))
        self._tell(_LAUNCHES_AHEAD)
        return finished

    def finish(self, state: BlockStatistics, to: Finish, *, fresh: bool) -> None:
        """Write ``acc / l`` and the log-sum-exp of ``state``; ``fresh``: it holds nothing. By any thread.

        A launch without keys: what remains of a kernel is its end.
        """
        spans = self.variant.span_keys
        self._launch(
            pack_call(None, 0, (), state, to, mask=RowMask(0, 0), scale=1.0, span_keys=spans, fresh=fresh)
        )  # fmt: skip

    def catch_up(self) -> bool:
        """Wait for the oldest launch that is under way; False where there is none."""
        under_way = len(self._launches)
        self._tell(max(0, under_way - 1))
        return under_way > 0

    def drain(self) -> None:
        """Wait for everything that was launched."""
        self._tell(0)

    def close(self) -> None:
        """Nothing to release: the compiled kernel belongs to CuPy."""

    def _launch(self, call: np.ndarray) -> None:
        entry, variant, function = call[0], self.variant, self._function
        if variant.whole_words and not entry["aligned"]:
            variant, function = self._for_any_words, load(self._for_any_words, self._device)
        row_blocks = -(-int(entry["query_tokens"]) // variant.block_rows)
        grid = row_blocks * int(entry["heads"]) * int(entry["batches"])
        function((grid,), (variant.threads,), (call.view(_OPAQUE),), shared_mem=variant.shared_bytes)

    def _tell(self, ahead: int) -> None:
        """Report the launches that are done; wait until at most ``ahead`` are under way."""
        while self._launches and (len(self._launches) > ahead or self._launches[0].finished.done):
            launch = self._launches.popleft()
            launch.finished.synchronize()
            for _ in range(launch.times):
                launch.done(launch.rows)


def _pieces(block: KeyBlock) -> Iterator[KeyBlock]:
    """``block`` in pieces that the kernels can count."""
    for first in range(0, block.keys.shape[2], PIECE_TOKENS):
        part = slice(first, first + PIECE_TOKENS)
        yield KeyBlock(block.start + first, block.keys[:, :, part], block.values[:, :, part])
