"""Check of a CQS cover in O(chunks): each residue is owned once, the chunks share out the tokens, sampled tasks obey.

Chunks a and b meet in the task a - D[x] that owns the residue b - a through (x, y). So if each residue modulo c has
one owner, c shifts of one pattern hold all c^2 chunk pairs once. Sampled tasks, read through the public interface,
tie this to the steps that are really handed out: each live pair there has its residue's owner, and each residue not
there is dead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..ranges import Cut, Range
from .cqs import CqsCover
from .report import CoverError, CoverReport, raise_pair


def check_residues(cover: CqsCover) -> CoverReport:
    """Prove that ``cover`` is exact, or raise CoverError; O(c) time and memory, about 15 seconds at c = 10^6."""
    c = cover.task_count
    for cut in (cover.queries, cover.keys):
        _check_cut(cut)
    home = _query_mark_of_residue(cover)
    samples = sorted({0, c // 3, c - 1})
    counted = sum(_check_task(cover, index, home) for index in samples)
    visible = cover.mask.pairs(Range(0, cover.queries.tokens), Range(0, cover.keys.tokens))
    return CoverReport(cover.name, c, len(samples), visible, counted)


def _check_cut(cut: Cut) -> None:
    stop = 0
    for index in range(len(cut)):
        chunk = cut[index]
        if chunk.start != stop or chunk.stop < stop:
            raise CoverError(f"chunk {index} is {chunk}, expected it to start at {stop}")
        stop = chunk.stop
    if stop != cut.tokens:
        raise CoverError(f"the chunks end at {stop}, expected {cut.tokens}")


def _query_mark_of_residue(cover: CqsCover) -> NDArray[np.int64]:
    """``(c,)``: for each residue the mark D[x] of the query chunk of its owner (x, y)."""
    c = cover.task_count
    x, y = np.nonzero(cover.owned)
    residues = (cover.marks[y] - cover.marks[x]) % c
    owners = np.bincount(residues, minlength=c)
    if (owners != 1).any():
        residue = int(np.argmax(owners != 1))
        raise CoverError(f"query chunk 0 and key chunk {residue} meet in {owners[residue]} tasks, expected one")
    home = np.empty(c, dtype=np.int64)
    home[residues] = cover.marks[x]
    return home


def _check_task(cover: CqsCover, index: int, home: NDArray[np.int64]) -> int:
    """The visible pairs of one task, each of them in the place that its residue's owner gives it."""
    c = cover.task_count
    chunks = ((cover.marks + index) % c).tolist()
    query_chunk, key_chunk = ({cut[chunk]: chunk for chunk in chunks} for cut in (cover.queries, cover.keys))
    times = np.zeros(c, dtype=np.int64)
    pairs = 0
    for step in cover.task(index).steps():
        if step.queries not in query_chunk or not key_chunk.keys() >= set(step.keys):
            raise CoverError(f"task {index} has a step with chunks that are not of its quorum: {step.queries}")
        query = query_chunk[step.queries]
        residues = (np.array([key_chunk[keys] for keys in step.keys]) - query) % c
        if (home[residues] != (query - index) % c).any():
            raise CoverError(f"task {index} pairs rows {step.queries} with keys that another task owns")
        np.add.at(times, residues, 1)
        pairs += sum(cover.mask.pairs(step.queries, keys) for keys in step.keys)
    for residue in np.flatnonzero(times != 1).tolist():
        query = (int(home[residue]) + index) % c
        queries, keys = cover.queries[query], cover.keys[(query + residue) % c]
        if cover.mask.live(queries, keys):
            raise_pair(cover.mask, queries, keys, int(times[residue]))
    return pairs
