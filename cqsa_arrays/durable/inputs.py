"""What is known of an input: what it holds, and where its file was seen last.

An input is the same as another where layout, shape, type, size of the file and the hashes agree, wherever it lies and
whatever its times are. The hash of samples (``storage.content``) is always known: it notices any change that touches a
sampled block, and nothing else of what keeps the size. The hash of everything notices all; it is known where it was
asked for. Inode and times only say when to look harder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..engine import Inputs
from ..errors import START_OVER, StorageError
from ..storage import LAYOUTS, SUPPORTED, Check, TokenSource, full_hash, sampled_hash, split_reference, unhindered

# Of HDF5, and of the systems' inodes and times.
LARGEST = 2**64


@dataclass(frozen=True, slots=True)
class Hints:
    """What changes with every change of a file, and without one, too."""

    inode: int
    ctime_ns: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Hints:
        """Those of a file."""
        return cls(found.st_ino, found.st_ctime_ns, found.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class KnownInput:
    """What is known of one input.

    ``shape`` is that of the array in its ``layout``. ``size`` is that of its file in bytes, None for an array in
    memory. ``sample`` is None only in what earlier versions wrote, ``full`` where it was not asked for. The file with
    the data set ``dataset`` was at ``relative`` to the folder of the output; ``given`` is its path as it was typed, and
    ``path`` the absolute one, which outputs do not tell: they would differ from folder to folder.
    """

    layout: str
    shape: tuple[int, ...]
    dtype: str
    size: int | None
    sample: str | None
    full: str | None = None
    dataset: str | None = None
    relative: str | None = None
    given: str | None = None
    path: str | None = None
    hints: Hints | None = None

    @property
    def content(self) -> dict[str, object]:
        """What the same input has in any folder and at any time, for JSON."""
        return {
            "layout": self.layout, "shape": list(self.shape), "dtype": self.dtype, "size": self.size,
            "sample": self.sample,
        }  # fmt: skip

    @property
    def attributes(self) -> dict[str, object]:
        """What an output says of it, for JSON: the same wherever the same job is done with the same names."""
        rest = {name: getattr(self, name) for name in ("full", "dataset", "relative", "given")}
        return {name: value for name, value in (self.content | rest).items() if value is not None}

    @property
    def record(self) -> dict[str, object]:
        """What a job remembers, for JSON and ``read_known``."""
        path = {} if self.path is None else {"path": self.path}
        hints = {} if self.hints is None else {name: getattr(self.hints, name) for name in _HINTS}
        return self.attributes | path | hints


def differences(stored: KnownInput, now: KnownInput) -> list[str]:
    """By what they differ, of what is known of both: "layout", "shape", "dtype", "size", "sample", "full"."""
    both = [(name, getattr(stored, name), getattr(now, name)) for name in (*stored.content, "full")]
    return [name for name, a, b in both if a != b and a is not None and b is not None]


# ---- describing


def describe_inputs(
    inputs: Inputs, out: str, *, given: Mapping[str, object], full: bool = False, check: Check = unhindered
) -> dict[str, KnownInput]:
    """What is to be remembered of each input of the output ``out``, with the hash of everything where ``full``.

    ``given`` are the arguments that named them: of text and paths the name is kept. One data set is read once, however
    many names it has. ``check`` may raise to stop what takes long.
    """
    seen: dict[object, KnownInput] = {}
    found: dict[str, KnownInput] = {}
    for name in "qkv":
        source: TokenSource = getattr(inputs, name)
        path, dataset = source.identity.get("path"), source.identity.get("dataset")
        at = name if path is None or dataset is None else (path, dataset, source.layout.name)
        if at not in seen:
            seen[at] = describe_input(source, full=full, check=check)
        found[name] = placed(seen[at], source, out, given.get(name))
    return found


def describe_input(source: TokenSource, *, full: bool = False, check: Check = unhindered) -> KnownInput:
    """What ``source`` holds, and the hints of its file from before that was read."""
    identity = source.identity
    path = identity.get("path")
    try:
        hints = None if path is None else Hints.of(os.stat(str(path)))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}. The file is gone since it was opened.") from error
    shape, size = identity["shape"], identity.get("size")
    assert isinstance(shape, list)
    return KnownInput(
        layout=source.layout.name, shape=tuple(shape), dtype=source.dtype.name,
        size=size if isinstance(size, int) else None, sample=sampled_hash(source, check),
        full=full_hash(source, check) if full else None, hints=hints,
    )  # fmt: skip


def placed(known: KnownInput, source: TokenSource, out: str, given: object) -> KnownInput:
    """``known`` with where the file of ``source`` is, as seen from the output ``out``, and as it was ``given``."""
    path, dataset = source.identity.get("path"), source.identity.get("dataset")
    if not isinstance(path, str) or not isinstance(dataset, str):
        return known
    relative = _relative(path, os.path.dirname(os.path.abspath(out)))
    typed = split_reference(os.fspath(given))[0] if isinstance(given, (str, os.PathLike)) else None
    if typed is not None and os.path.abspath(typed) != path:  # it led to another file
        typed = None
    if typed is None and relative is None:
        typed = path
    return replace(known, dataset=dataset, relative=relative, given=typed, path=path)


def _relative(path: str, folder: str) -> str | None:
    """``path`` as seen from ``folder``; None where no way leads there, as from one drive of Windows to another."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return None


# ---- reading back


def read_known_inputs(found: object, out: str) -> dict[str, KnownInput]:
    """What the job of ``out`` remembers of its inputs; StorageError where that is not what it wrote."""
    try:
        known = read_inputs(found)
        if missing := [name for name, one in known.items() if one.sample is None]:
            raise ValueError(f"of {missing[0]}: sample is None")
        return known
    except ValueError as error:
        raise StorageError(f"{out}.job: its record is damaged ({error}). ", START_OVER) from error


def read_inputs(found: object) -> dict[str, KnownInput]:
    """What is said of q, k and v, in a record or in an output; ValueError where one is wanting or wrong."""
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in "qkv"):
        raise ValueError("it does not name q, k and v")
    known = {}
    for name in "qkv":
        try:
            known[name] = read_known(found[name])
        except ValueError as error:
            raise ValueError(f"of {name}: {error}") from error
    return known


def read_known(found: Mapping[str, object]) -> KnownInput:
    """The inverse of ``KnownInput.record`` and ``attributes``, also of what versions before them wrote.

    ValueError, which names the field, for values of other types, out of range, or that cannot be.
    """
    said = _Fields(found)
    layout, shape = said.text("layout"), said.shape("shape")
    if layout not in LAYOUTS or len(layout) != len(shape):
        raise said.wrong("layout")
    if said.text("dtype") not in SUPPORTED:
        raise said.wrong("dtype")
    earlier = "sample" not in found
    if earlier and found.keys() & {"relative", "given", "inode"}:
        raise said.wrong("sample")
    relative, given, path = (said.path(name) for name in ("relative", "given", "path"))
    if relative is not None and os.path.isabs(relative):
        raise said.wrong("relative")
    has_file = any(place is not None for place in (relative, given, path))
    hints = None
    if "inode" in found or "ctime_ns" in found:
        hints = Hints(*(said.number(name, least=0 if name == "inode" else -LARGEST) for name in _HINTS))
    return KnownInput(
        layout=layout, shape=shape, dtype=said.text("dtype"),
        size=said.number("size") if found.get("size") is not None else None,
        sample=None if earlier else said.hash("sample"), full=said.hash("full") if "full" in found else None,
        dataset=said.path("dataset") if has_file else None, relative=relative, given=given, path=path,
        hints=hints,
    )  # fmt: skip


_HINTS = tuple(one.name for one in fields(Hints))


class _Fields:
    """The fields of what was found, each checked as it is asked for."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found

    def wrong(self, name: str) -> ValueError:
        """The error that ``name`` is what it cannot be."""
        return ValueError(f"{name} is {self._found.get(name)!a:.80}")

    def text(self, name: str) -> str:
        value = self._found.get(name)
        if not isinstance(value, str):
            raise self.wrong(name)
        return value

    def path(self, name: str) -> str | None:
        """What can be a path, or the name of a data set."""
        if self._found.get(name) is None:
            return None
        value = self.text(name)
        try:
            possible = value != "" and b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            possible = False
        if not possible:
            raise self.wrong(name)
        return value

    def hash(self, name: str) -> str:
        value = self.text(name)
        if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
            raise self.wrong(name)
        return value

    def number(self, name: str, least: int = 0) -> int:
        value = self._found.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < LARGEST:
            raise self.wrong(name)
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        value = self._found.get(name)
        if not isinstance(value, list) or not 2 <= len(value) <= 4:
            raise self.wrong(name)
        if not all(type(one) is int and 0 < one < LARGEST for one in value):
            raise self.wrong(name)
        return tuple(value)
