"""The output as the journals of its lanes say it is: whole pages checked, the pages on borders composed."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import NamedTuple

import numpy as np

from ..errors import START_OVER, StorageError
from ..ranges import Range
from ..storage import RawFile
from ..workers import Workers
from .journal import PAGE, Entry, Extent, entries
from .records import damaged

WINDOW_BYTES = 1 << 20
# Bytes on borders are less than a page on either side; more are vectors at a distance from each other.
_SHORT = 2 * PAGE


class _Kept(NamedTuple):
    """One entry of a journal with bytes in it; ``stop`` is past the last byte of the output that it says."""

    position: int
    stop: int
    size_bytes: int
    stride: int
    repeats: int
    file: int
    offset: int


class Pages:
    """What the committed parts of some journals say of an output whose elements lie in the bytes of ``place``.

    ``path_of(attempt)`` is the journal's file. Raises StorageError where one of them is not what was committed. Nothing
    outside the elements is ever written, whatever a journal says. ``size_bytes`` is what they say in all.
    """

    def __init__(self, extents: Iterable[Extent], path_of: Callable[[str], str], place: Range) -> None:
        self.size_bytes = 0
        self._paths: list[str] = []
        whole, kept = array("q"), array("q")  # flat: there may be millions of entries
        for number, extent in enumerate(extents):
            self._paths.append(path_of(extent.attempt))
            for entry in entries(self._paths[-1], extent):
                last = entry.position + entry.stride * max(0, entry.count - 1) + entry.size_bytes
                if (
                    not entry.size_bytes
                    or not place.start <= entry.position <= last <= place.stop
                    or (entry.count > 1 and entry.stride < entry.size_bytes)
                ):
                    raise damaged(self._paths[-1], f"it says something of byte {last} of the output")
                self.size_bytes += entry.size_bytes * max(1, entry.count)
                if entry.count:
                    kept.extend(_kept(entry, last, number))
                else:
                    whole.extend((entry.position, entry.size_bytes, entry.checksum))
        self.whole = np.array(whole, np.int64).reshape(-1, 3)
        table = np.array(kept, np.int64).reshape(-1, len(_Kept._fields))
        table = table[np.argsort(table[:, 0], kind="stable")]
        lengths = table[:, 1] - table[:, 0]
        short = lengths <= _SHORT
        self._short, self._long, self._longest = table[short], table[~short], int(lengths.max(initial=0))

    def check(self, output: RawFile, threads: int, check_stop: Callable[[], None]) -> None:
        """Raise StorageError where a whole page of the output is not what was committed."""

        def check(position: int, size_bytes: int, checksum: int) -> None:
            check_stop()
            if output.checksum(position, size_bytes) != checksum:
                raise StorageError(
                    f"{output.label}: bytes {position} to {position + size_bytes - 1} are not what was committed: the"
                    " file is damaged. ", START_OVER,
                )  # fmt: skip

        with closing(Workers(threads, "check")) as workers:
            workers.run(self.whole, lambda span: check(*span.tolist()))

    def compose(self, output: RawFile, end: int, check_stop: Callable[[], None]) -> None:
        """Write every page on a border, whole; the file has ``end`` bytes."""
        for start in self._windows():
            check_stop()
            window = np.empty(min(WINDOW_BYTES, end - start), np.uint8)
            output.read_into(window, start)
            touched = self.put(start, window)
            for first, last in _runs(touched):
                output.write_from(window[first * PAGE : last * PAGE], start + first * PAGE)

    def put(self, start: int, window: np.ndarray) -> np.ndarray:
        """Put into ``window``, the bytes of the output from ``start`` on, what journals keep; which pages have some."""
        touched = np.zeros(-(-len(window) // PAGE), bool)
        found = np.concatenate(
            [
                table[slice(*np.searchsorted(table[:, 0], (start - most, start + len(window))))]
                for table, most in ((self._short, _SHORT), (self._long, self._longest))
            ]
        )
        found = found[found[:, 1] > start]
        with ExitStack() as stack:
            files: dict[int, RawFile] = {}
            for kept in map(_Kept._make, found.tolist()):
                if kept.file not in files:
                    files[kept.file] = stack.enter_context(closing(RawFile(self._paths[kept.file], "journal")))
                _put(kept, files[kept.file], start, window, touched)
        return touched

    def _windows(self) -> Iterator[int]:
        """Where the windows begin in which anything is kept."""
        starts = set((self._short[:, 0] // WINDOW_BYTES).tolist())
        starts.update(((self._short[:, 1] - 1) // WINDOW_BYTES).tolist())
        for position, stop in self._long[:, :2].tolist():
            starts.update(range(position // WINDOW_BYTES, (stop - 1) // WINDOW_BYTES + 1))
        return (number * WINDOW_BYTES for number in sorted(starts))


def _kept(entry: Entry, stop: int, file: int) -> _Kept:
    stride = entry.stride if entry.count > 1 else entry.size_bytes
    return _Kept(entry.position, stop, entry.size_bytes, stride, entry.count, file, entry.offset)


def _put(kept: _Kept, file: RawFile, start: int, window: np.ndarray, touched: np.ndarray) -> None:
    """The vectors of one entry that lie in the window, of the first and the last maybe a part."""
    stop = start + len(window)
    first = max(0, (start - kept.position - kept.size_bytes) // kept.stride + 1)
    last = min(kept.repeats, -(-(stop - kept.position) // kept.stride))
    if last <= first:
        return
    data = np.empty((last - first, kept.size_bytes), np.uint8)
    file.read_into(data, kept.offset + first * kept.size_bytes)
    begin = kept.position + first * kept.stride - start
    whole = np.arange(begin, begin + (last - first) * kept.stride, kept.stride)
    inside = (whole >= 0) & (whole + kept.size_bytes <= len(window))
    if inside.any():
        a, b = np.flatnonzero(inside)[[0, -1]]
        place = window[whole[a] : whole[b] + kept.size_bytes]
        strided = np.lib.stride_tricks.as_strided(place, (b - a + 1, kept.size_bytes), (kept.stride, 1))
        strided[:] = data[a : b + 1]
    for at, vector in zip(whole[~inside].tolist(), data[~inside], strict=True):
        low, high = max(0, at), min(len(window), at + kept.size_bytes)
        window[low:high] = vector[low - at : high - at]
    for at in whole.tolist():
        touched[max(0, at) // PAGE : -(-(at + kept.size_bytes) // PAGE)] = True


def _runs(touched: np.ndarray) -> list[tuple[int, int]]:
    """First and past-the-last page of each run of touched ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], touched.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
