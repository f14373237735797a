"""What is written by whole pages and by journals is what was written, however it was cut."""

from __future__ import annotations

import os
import random
from contextlib import closing
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cqsa_arrays import StorageError
from cqsa_arrays.durable.journal import PAGE, Extent, Journal, PagedFile
from cqsa_arrays.durable.pages import Pages
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import RawFile, Rows
from cqsa_arrays.storage.output import write_rows

SHAPES = {
    "heads outside": Rows((2, 3, 500, 8), np.dtype("f4"), 4096, token_major=False),
    "an odd place": Rows((1, 3, 333, 5), np.dtype("f2"), 2048 + 6, token_major=False),
    "tokens outside": Rows((2, 4, 300, 8), np.dtype("f4"), 4096, token_major=True),
    "long vectors": Rows((1, 2, 40, 1024), np.dtype("f8"), 8192, token_major=True),
    "less than a page": Rows((1, 1, 7, 3), np.dtype("f4"), 4100, token_major=False),
}


@pytest.fixture
def output(tmp_path):
    """An empty file of the right size, opened."""

    def make(rows: Rows) -> RawFile:
        path = tmp_path / "output"
        path.write_bytes(b"h" * rows.place.start + bytes(len(rows.place)) + b"t" * 17)
        return RawFile(str(path), "output", write=True)

    return make


def pieces(rows: Rows, rng: random.Random):
    """The whole array in blocks of some heads and tokens, in any order."""
    batch, heads, tokens, _ = rows.shape
    cuts = sorted({0, tokens, *(rng.randrange(tokens) for _ in range(6))})
    by = rng.choice((1, heads))
    found = [
        (Range(b, b + 1), Range(h, min(h + by, heads)), Range(*span))
        for b in range(batch) for h in range(0, heads, by) for span in pairwise(cuts)
    ]  # fmt: skip
    rng.shuffle(found)
    return found


def written(rows: Rows, file: RawFile, folder: str, seed: int) -> tuple[np.ndarray, list[Extent]]:
    """By two attempts, each of some of the pieces; and what the array is to hold."""
    rng = random.Random(seed)
    data = np.random.default_rng(seed).integers(1, 255, (*rows.shape, rows.dtype.itemsize), "u1")
    values = data.view(rows.dtype)[..., 0]
    extents, todo = [], pieces(rows, rng)
    half = len(todo) // 2
    for name, share in (("0000000a", todo[:half]), ("0000000b", todo[half:])):
        with closing(Journal(os.path.join(folder, name), name)) as journal:
            for where in share:
                block = values[tuple(part.slice for part in where)]
                write_rows(PagedFile(file, journal), rows, where, block)
            extents.append(journal.seal())
            journal.keep(rows.place.start, np.full((1, 3), 9, "u1"))  # after the commit: it does not count
            journal.seal()
    return values, [extent for extent in extents if extent.size_bytes]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", SHAPES.values(), ids=SHAPES)
def test_composed_it_is_what_was_written(rows, seed, output, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("cqsa_arrays.durable.pages.WINDOW_BYTES", (PAGE, 3 * PAGE, 1 << 20, 1 << 20)[seed])
    with closing(output(rows)) as file:
        values, extents = written(rows, file, str(tmp_path), seed)
        pages = Pages(extents, lambda name: str(tmp_path / name), rows.place)
        assert pages.size_bytes == len(rows.place)
        end = os.fstat(file.descriptor).st_size
        pages.check(file, 2, lambda: None)
        for _ in range(2):  # it may be done again
            pages.compose(file, end, lambda: None)
        found = (tmp_path / "output").read_bytes()
    physical = values.swapaxes(1, 2) if rows.token_major else values
    assert found[rows.place.start : rows.place.stop] == physical.tobytes()
    assert found[: rows.place.start] == b"h" * rows.place.start
    assert found[rows.place.stop :] == b"t" * 17


@pytest.mark.parametrize("rows", [SHAPES["heads outside"], SHAPES["tokens outside"]], ids=["heads", "tokens"])
def test_only_whole_pages_are_written_in_place(rows, output, tmp_path, monkeypatch) -> None:
    with closing(output(rows)) as file:
        usual, spans = RawFile.write_from, []

        def recorded(self, array, position) -> None:
            spans.append((self.label, position, array.nbytes))
            usual(self, array, position)

        monkeypatch.setattr(RawFile, "write_from", recorded)
        _, extents = written(rows, file, str(tmp_path), 1)
        pages = Pages(extents, lambda name: str(tmp_path / name), rows.place)
        pages.compose(file, os.fstat(file.descriptor).st_size, lambda: None)
    to_output = [(position, size) for label, position, size in spans if label == "output"]
    end = os.path.getsize(tmp_path / "output")
    assert to_output
    assert all(at % PAGE == 0 and ((at + size) % PAGE == 0 or at + size == end) for at, size in to_output)


def test_what_is_not_as_it_was_committed_is_noticed(output, tmp_path) -> None:
    rows = SHAPES["heads outside"]
    with closing(output(rows)) as file:
        _, extents = written(rows, file, str(tmp_path), 3)

        def path_of(name: str) -> str:
            return str(tmp_path / name)

        pages = Pages(extents, path_of, rows.place)
        position, _, _ = pages.whole[0]
        file.write_from(np.frombuffer(b"x", "u1"), position + 5)
        with pytest.raises(StorageError, match="are not what was committed"):
            pages.check(file, 2, lambda: None)
        for wrong in (replace(extents[0], size_bytes=extents[0].size_bytes - 1), replace(extents[0], checksum=5)):
            with pytest.raises(StorageError, match="damaged"):
                Pages([wrong], path_of, rows.place)
        with pytest.raises(StorageError, match="damaged: it says something of byte"):
            Pages(extents, path_of, Range(rows.place.start + 1, rows.place.stop))  # nothing beside the elements
