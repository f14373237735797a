"""HDF5 files that are whole, but odd: every kind of element, shape, link, storage and attribute, at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
from fuzz_files import write
from h5py import h5d, h5p, h5s, h5t

Random = np.random.Generator
DTYPES: list[object] = [
    "f2", "f4", "f4", "f4", "f8", ">f2", ">f4", ">f8", "g", "i1", "u2", ">u2", "i4", "u8", "?", "c8", "c16", "S3",
    "V2", "V3", np.dtype([("x", "f4"), ("y", "i2")]), np.dtype(("f4", (2,))), h5py.string_dtype(),
    h5py.vlen_dtype("f4"), h5py.enum_dtype({"a": 1, "b": 2}), h5py.ref_dtype, h5py.regionref_dtype,
    np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn), h5py.opaque_dtype(np.dtype("M8[s]")),
]  # fmt: skip
SIZES = [0, 1, 2, 3, 8, 8, 40, 40, 1024, 1025]
MOST_ELEMENTS = 200_000
HUGE = [2**20, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1]
TEXTS: list[object] = [
    "bhnd", "bnhd", "hnd", "nhd", "nd", "bhn", "hn", "n", "", "dn", "bfloat16", "float8", "\n\n", "é\u2028x", "\x1b[2J",
    b"bhnd", b"\xff\xfe", 5, -1, 2.5, float("nan"), True, [1, 2], ["nd", "nd"], np.array(["nd"], "S2"),
    np.zeros((3, 4)), np.zeros((0,)), h5py.Empty("f4"), h5py.Empty("S2"), np.zeros(2, [("x", "f4")]), "x" * 9999,
]  # fmt: skip
NAMES = ["q", "k", "v", "out", "lse", "x", "layers/0/q", "é", "a b", "x:y", "line\nbreak", "\x1b[31mred", b"\xff\xfe",
         "." * 3, "n" * 300, "/".join("deep"), "a/./b"]  # fmt: skip
FILES = ["other.h5", "in.h5", "no.h5", "/no/x.h5", "../case/other.h5", "", ".", "sub/other.h5", "/dev/null", "é.h5",
         "fifo", "text.h5", b"\xff.h5", "x" * 300]  # fmt: skip
ATTRIBUTES = ["layout", "dtype", "inputs", "mask", "scale", "é", "line\nbreak"]


def pick(rng: Random, choices: list[object]) -> object:
    """One of ``choices``, as it is."""
    return choices[int(rng.integers(len(choices)))]


def odd_shape(rng: Random) -> tuple[int, ...]:
    """Mostly a shape that would do; else of any rank from 0 to 6, with 0 and 1 and lengths that are too much."""
    if rng.random() < 0.5:
        return ((40, 8), (2, 40, 8), (1, 2, 40, 8))[rng.integers(3)]
    shape = [int(pick(rng, SIZES[:8])) for _ in range(rng.integers(7))]  # type: ignore[call-overload]
    while math.prod(shape) > MOST_ELEMENTS:
        shape[shape.index(max(shape))] = 2
    return tuple(shape)


def odd_dataset(file: h5py.File, name: object, rng: Random, dtype: object, shape: tuple[int, ...]) -> None:
    """A data set of these, stored one way or another."""
    options: dict[str, object] = {}
    if shape and rng.random() < 0.4 and 0 not in shape:
        options["chunks"] = tuple(int(rng.integers(1, length + 1)) for length in shape)
        options["compression"] = pick(rng, [None, "gzip", "lzf"])
        options["shuffle"], options["fletcher32"] = bool(rng.random() < 0.3), bool(rng.random() < 0.3)
        options["scaleoffset"] = 3 if np.dtype(dtype).kind in "iu" and rng.random() < 0.3 else None
        options["maxshape"] = tuple(None if rng.random() < 0.3 else length for length in shape)
    made = file.create_dataset(name, shape, dtype, **options)
    if rng.random() < 0.8 and np.dtype(dtype).kind in "fiu":
        made[...] = (rng.standard_normal(shape) * 10).astype(np.dtype(dtype))


def _plain(file: h5py.File, name: object, rng: Random) -> None:
    odd_dataset(file, name, rng, pick(rng, DTYPES[:5]), odd_shape(rng))


def _typed(file: h5py.File, name: object, rng: Random) -> None:
    odd_dataset(file, name, rng, pick(rng, DTYPES), odd_shape(rng))


def _huge(file: h5py.File, name: object, rng: Random) -> None:
    """A shape far beyond memory, of which nothing is allocated."""
    shape = [int(pick(rng, SIZES)) or 1 for _ in range(rng.integers(2, 5))]  # type: ignore[call-overload]
    shape[rng.integers(len(shape))] = int(pick(rng, HUGE))  # type: ignore[call-overload]
    chunks = tuple(min(length, int(pick(rng, [1, 8, 1024, 2**20, 2**30]))) for length in shape)  # type: ignore[call-overload]
    properties = h5p.create(h5p.DATASET_CREATE)
    if rng.random() < 0.8:
        properties.set_chunk(chunks)
    else:
        properties.set_alloc_time(h5d.ALLOC_TIME_LATE)
    stored = h5t.py_create(np.dtype(str(pick(rng, ["f2", "f4", "f8"]))))
    h5d.create(file.id, _encoded(name), stored, h5s.create_simple(tuple(shape)), properties, _parents())


def _odd_float(file: h5py.File, name: object, rng: Random) -> None:
    """A float that is none of the four."""
    stored = h5t.IEEE_F32LE.copy()
    stored.set_fields(15, int(rng.integers(5, 9)), int(rng.integers(4, 8)), 0, int(rng.integers(2, 6)))
    stored.set_size(int(pick(rng, [2, 3, 4, 5, 8, 16])))  # type: ignore[call-overload]
    stored.set_ebias(int(pick(rng, [0, 127, 15])))  # type: ignore[call-overload]
    h5d.create(file.id, _encoded(name), stored, h5s.create_simple((40, 8)), None, _parents())


def _scalar(file: h5py.File, name: object, rng: Random) -> None:
    file[name] = pick(rng, [1.5, "text", h5py.Empty("f4"), np.float32(1), b"x"])


def _group(file: h5py.File, name: object, rng: Random) -> None:
    file.create_group(name)


def _named_type(file: h5py.File, name: object, rng: Random) -> None:
    file[name] = np.dtype("f4")


def _soft_link(file: h5py.File, name: object, rng: Random) -> None:
    file[name] = h5py.SoftLink(
        str(pick(rng, ["q", "/q", "k", "v", "/", "..", "./q", "no", "layers/0/q", "away/q", "x"]))
    )


def _hard_link(file: h5py.File, name: object, rng: Random) -> None:
    file[name] = file[str(pick(rng, [*file.keys(), "/"]))]


def _external_link(file: h5py.File, name: object, rng: Random) -> None:
    file[name] = h5py.ExternalLink(pick(rng, FILES), str(pick(rng, ["/", "/q", "q", "/no", "away/q"])))


def _external_storage(file: h5py.File, name: object, rng: Random) -> None:
    file.create_dataset(name, (40, 8), "f4", external=[(str(pick(rng, FILES[:5])), 0, 1280)])


def _virtual(file: h5py.File, name: object, rng: Random) -> None:
    layout = h5py.VirtualLayout((40, 8), "f4")
    layout[...] = h5py.VirtualSource(str(pick(rng, FILES[:5])), "q", (40, 8))
    file.create_virtual_dataset(name, layout)


def _user_link(file: h5py.File, name: object, rng: Random) -> None:
    """A link in a link, so that no end is in sight."""
    group = file.create_group(f"loop{rng.integers(100)}")
    group["again"] = group
    file[name] = h5py.SoftLink(f"{group.name}/again/again/again/{pick(rng, ['q', 'again', 'no'])}")


MAKERS: list[Callable[[h5py.File, object, Random], None]] = [
    _plain, _plain, _plain, _typed, _typed, _huge, _odd_float, _scalar, _group, _named_type, _soft_link, _soft_link,
    _hard_link, _external_link, _external_storage, _virtual, _user_link,
]  # fmt: skip


def _encoded(name: object) -> bytes:
    return name if isinstance(name, bytes) else str(name).encode()


def _parents() -> h5p.PropLCID:
    """Groups on the way are made."""
    properties = h5p.create(h5p.LINK_CREATE)
    properties.set_create_intermediate_group(True)
    return properties


def write_odd_files(folder: Path, rng: Random, good: bytes) -> list[str]:
    """in.h5 and what its links may lead to; the names that were put into it."""
    write(folder / "other.h5", good)
    (folder / "sub").mkdir()
    write(folder / "sub" / "other.h5", good)
    write(folder / "text.h5", b"q,k,v" * 99)
    options = {"libver": pick(rng, ["earliest", "latest", "v110"]), "userblock_size": pick(rng, [0, 0, 512, 4096])}
    maker = MAKERS[rng.integers(len(MAKERS))]
    alike = rng.random() < 0.4
    with h5py.File(folder / "in.h5", "w", **options) as file:
        for name in "qkv":
            _try(file, name, rng, maker if alike or rng.random() < 0.2 else MAKERS[rng.integers(3)])
        for _ in range(rng.integers(4)):
            _try(file, pick(rng, NAMES), rng, MAKERS[rng.integers(len(MAKERS))])
        for _ in range(rng.integers(4)):
            _attribute(file, rng)
        return [name for name in file if isinstance(name, str)]


def _try(file: h5py.File, name: object, rng: Random, maker: Callable[[h5py.File, object, Random], None]) -> None:
    """What h5py itself refuses to make is left out."""
    try:
        if name not in file:
            maker(file, name, rng)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError):
        return


def _attribute(file: h5py.File, rng: Random) -> None:
    try:
        target = pick(rng, [file, *(file[name] for name in "qkv" if name in file)])
        target.attrs[str(pick(rng, ATTRIBUTES))] = pick(rng, TEXTS)  # type: ignore[attr-defined]
    except (OSError, RuntimeError, KeyError, ValueError, TypeError):
        return
