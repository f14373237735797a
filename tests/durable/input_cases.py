"""What the tests of inputs share: jobs that are stopped or finished, and what becomes of the file that they read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import h5py
from durable_cases import CASES, command, log, run

import cqsa_arrays as cqsa
from cqsa_arrays.storage.content import sample_blocks

CASE = CASES[0]
NAMED = [word for name in "qkv" for word in (f"--{name}", f"elsewhere/other.h5:/{name}")]
RESUME, VERIFY = ["resume", "out.h5", "--quiet"], ["verify", "out.h5", "--rows", "16"]


def stopped(*more: str) -> None:
    assert run(command(CASE, "--max-time", "0.001", *more)) == 3, log()


def finished(*more: str) -> None:
    assert run(command(CASE, *more)) == 0, log()


def data_place(token: int, head: int = 1, name: str = "q") -> int:
    """The byte in qkv.h5 where a token's vector begins."""
    stored = cqsa.open("qkv.h5").q.stored if name == "q" else getattr(cqsa.open("qkv.h5"), name).stored
    heads, tokens, dim = CASE.spec.heads, CASE.spec.tokens, CASE.spec.head_dim
    assert stored.shape == (1, heads, tokens, dim)
    return stored.offset + (head * tokens + token) * dim * 4


def change(token: int, head: int = 1, path: str = "qkv.h5") -> None:
    """Another number in q, with the size and the times as they were."""
    before, place = os.stat(path), data_place(token, head)
    with open(path, "r+b") as file:
        file.seek(place)
        old = file.read(4)
        file.seek(place)
        file.write(bytes([old[0] ^ 1]) + old[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def sampled(inside: bool) -> tuple[int, int]:
    """A (token, head) of q inside or outside of all sampled blocks."""
    q = CASE.spec
    seen = {
        (t, b.head)
        for b in sample_blocks((1, q.heads, q.tokens, q.head_dim))
        for t in range(b.tokens.start, b.tokens.stop)
    }
    everything = ((token, 1) for token in range(500, q.tokens))
    return next(one for one in everything if (one in seen) == inside)


def touch() -> None:
    os.utime("qkv.h5", ns=(5, 5))


def open_for_appending() -> None:
    h5py.File("qkv.h5", "a").close()


def copy() -> None:
    """Another file with other times gets the name."""
    shutil.copyfile("qkv.h5", "copied")
    os.replace("copied", "qkv.h5")


SAME: list[Callable[[], None]] = [touch, open_for_appending, copy]


def move_inputs() -> None:
    os.mkdir("elsewhere")
    os.rename("qkv.h5", "elsewhere/other.h5")
