"""Small valid HDF5 files, and what is done to their bytes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import h5py
import numpy as np
from fuzz_runner import MTIME_NS

from cqsa_arrays.cli.main import main

TOKENS, HEADS, DIM = 40, 2, 8


@dataclass(frozen=True, slots=True)
class Template:
    """A valid file: its bytes and the places of them that are no elements of arrays."""

    name: str
    content: bytes
    metadata: np.ndarray


def write(path: Path, content: bytes) -> None:
    """``content`` at ``path``, with the one time that all files have."""
    path.write_bytes(content)
    os.utime(path, ns=(MTIME_NS, MTIME_NS))


def _arrays(rng: np.random.Generator, *shape: int) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(shape).astype("f4") for name in "qkv"}


def _contiguous(file: h5py.File, rng: np.random.Generator) -> None:
    for name, array in _arrays(rng, HEADS, TOKENS, DIM).items():
        file[name] = array


def _four_axes(file: h5py.File, rng: np.random.Generator) -> None:
    for name, array in _arrays(rng, TOKENS, HEADS, 1, DIM).items():
        file[name] = array.astype("f8")
        file[name].attrs["layout"] = "bhnd"


def _chunked(file: h5py.File, rng: np.random.Generator) -> None:
    for name, array in _arrays(rng, HEADS, TOKENS, DIM).items():
        file.create_dataset(
            name, data=array, chunks=(1, 16, DIM), compression="gzip", shuffle=True, fletcher32=name == "q"
        )


def _growing(file: h5py.File, rng: np.random.Generator) -> None:
    for name, array in _arrays(rng, TOKENS, DIM).items():
        file.create_dataset(name, data=array.astype("f2"), chunks=(7, 3), maxshape=(None, None), compression="lzf")


def _bfloat16(file: h5py.File, rng: np.random.Generator) -> None:
    for name, array in _arrays(rng, TOKENS, DIM).items():
        file[name] = (array.view("u4") >> 16).astype("u2")
        file[name].attrs.update({"dtype": "bfloat16", "layout": "nd"})


def _shared(file: h5py.File, rng: np.random.Generator) -> None:
    file["layers/0/x"] = rng.standard_normal((TOKENS, HEADS, DIM)).astype("f4")
    file["layers/0/x"].attrs["layout"] = "nhd"
    file["q"] = file["layers/0/x"]
    file["k"], file["v"] = h5py.SoftLink("/layers/0/x"), h5py.SoftLink("layers/0/x")


FORMS: dict[str, tuple[Callable[[h5py.File, np.random.Generator], None], dict[str, object]]] = {
    "contiguous": (_contiguous, {}),
    "four axes": (_four_axes, {}),
    "chunked": (_chunked, {}),
    "growing": (_growing, {"libver": "latest"}),
    "bfloat16": (_bfloat16, {}),
    "shared": (_shared, {}),
    "user block": (_contiguous, {"userblock_size": 512}),
    "latest": (_shared, {"libver": "latest"}),
}


@cache
def templates(folder: Path) -> list[Template]:
    """All valid inputs, written in ``folder``."""
    found = []
    for number, (name, (fill, options)) in enumerate(FORMS.items()):
        path = folder / "template.h5"
        with h5py.File(path, "w", **options) as file:
            fill(file, np.random.default_rng(number))
        found.append(_template(name, path))
    return found


@cache
def output(folder: Path) -> tuple[Template, Template]:
    """An input, and the output that was made of it: its attributes name ``in.h5`` in the current directory."""
    source = templates(folder)[0]
    os.chdir(folder)
    write(Path("in.h5"), source.content)
    if (
        main(
            [
                "attend",
                "in.h5",
                "-o",
                "made.h5",
                "--memory",
                "8MiB",
                "--threads",
                "1",
                "--device",
                "cpu",
                "--quiet",
                "--overwrite",
            ]
        )
        != 0
    ):
        raise RuntimeError("no valid output could be made")
    with h5py.File("made.h5") as made, h5py.File("out.h5", "w") as file:
        for name in ("out", "lse"):
            file[name] = made[name][...]
            file[name].attrs.update(made[name].attrs)
        inputs = json.loads(made.attrs["inputs"])
        for one in inputs.values():
            one["relative"] = one["given"] = "in.h5"
        file.attrs.update({"inputs": json.dumps(inputs), "mask": made.attrs["mask"], "scale": made.attrs["scale"]})
    return source, _template("output", Path("out.h5"))


def _template(name: str, path: Path) -> Template:
    content = path.read_bytes()
    taken = np.zeros(len(content), bool)

    def mark(_: str, one: h5py.Dataset | h5py.Group) -> None:
        if isinstance(one, h5py.Dataset):
            base = one.file.userblock_size if one.chunks else 0
            spans = [(one.id.get_offset(), one.nbytes)] if one.chunks is None else []
            if one.chunks:
                chunks = (one.id.get_chunk_info(i) for i in range(one.id.get_num_chunks()))
                spans = [(chunk.byte_offset + base, chunk.size) for chunk in chunks]
            for start, size in spans:
                taken[start : start + size] = True

    with h5py.File(path) as file:
        file.visititems(mark)
    return Template(name, content, np.flatnonzero(~taken))


INTERESTING = [
    0,
    1,
    2,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
]
MOST_CHANGES = 6


def damaged(template: Template, rng: np.random.Generator) -> bytes:
    """The bytes of ``template`` with one to six of the changes below, mostly in the metadata."""
    content = bytearray(template.content)
    for _ in range(int(rng.integers(1, MOST_CHANGES + 1))):
        if content:
            change = CHANGES[rng.integers(len(CHANGES))] if rng.random() < 0.9 else SIZES[rng.integers(len(SIZES))]
            change(content, _place(template, len(content), rng), rng)
    return bytes(content)


def _place(template: Template, length: int, rng: np.random.Generator) -> int:
    if rng.random() < 0.15:
        return int(rng.integers(length))
    return min(int(rng.choice(template.metadata)), length - 1)


def _flip(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at] ^= 1 << int(rng.integers(8))


def _set(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at] = int(rng.integers(256))


def _step(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at] = (content[at] + int(rng.choice([-2, -1, 1, 2]))) % 256


def _number(content: bytearray, at: int, rng: np.random.Generator) -> None:
    size = int(rng.choice([1, 2, 4, 8]))
    at -= at % size
    value = INTERESTING[rng.integers(len(INTERESTING))] % (1 << 8 * size)
    content[at : at + size] = value.to_bytes(size, "little")


def _run(content: bytearray, at: int, rng: np.random.Generator) -> None:
    size = min(int(rng.integers(2, 64)), len(content) - at)
    fill = [bytes(size), b"\xff" * size, rng.bytes(size)]
    content[at : at + size] = fill[rng.integers(3)]


def _copy(content: bytearray, at: int, rng: np.random.Generator) -> None:
    size = min(int(rng.integers(2, 128)), len(content) - at)
    start = int(rng.integers(len(content) - size + 1))
    content[at : at + size] = content[start : start + size]


def _pointer(content: bytearray, at: int, rng: np.random.Generator) -> None:
    """Something that may be taken for an address in the file, even of the very structure that holds it."""
    at -= at % 8
    target = at if rng.random() < 0.3 else int(rng.integers(len(content)))
    if at + 8 <= len(content):
        struct.pack_into("<Q", content, at, target - target % 8)


def _cut(content: bytearray, at: int, rng: np.random.Generator) -> None:
    del content[at:]


def _extend(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content += rng.bytes(int(rng.integers(1, 5000)))


def _insert(content: bytearray, at: int, rng: np.random.Generator) -> None:
    content[at:at] = rng.bytes(int(rng.integers(1, 64)))


def _delete(content: bytearray, at: int, rng: np.random.Generator) -> None:
    del content[at : at + int(rng.integers(1, 64))]


CHANGES = [_flip, _set, _step, _number, _run, _copy, _pointer]
SIZES = [_cut, _extend, _insert, _delete]
