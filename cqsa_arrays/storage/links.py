"""The way through an HDF5 file: data sets by name, link by link, so that no other file is opened unasked.

Imported only when an HDF5 file is at hand: this module imports h5py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import h5py
from h5py import h5l, h5o

from ..errors import ArgumentError, CqsaError, StorageError
from ..wording import Choice
from .conventions import refuse_group

MOST_LINKS = 64
MOST_NAMES = 20

DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError)
"""What h5py raises where the structure of a file is damaged: HDF5's classes of errors, translated one by one."""


@dataclass(frozen=True, slots=True)
class External:
    """Where an external link leads: a file, as the link has it, and the rest of the way in there."""

    file: str
    name: str


@contextmanager
def damage_named(place: str) -> Iterator[None]:
    """What h5py says of the file in the calls inside becomes a StorageError that names ``place``."""
    try:
        yield
    except CqsaError:
        raise
    except DAMAGE as error:
        raise StorageError(f"{place} is damaged: {error}. Copy or write it again.") from error


def encoded(name: str) -> bytes:
    """``name`` as HDF5 has it. What is no UTF-8 there is kept by surrogates, as in the names of files.

    Raises ArgumentError for text that no file can hold.
    """
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ArgumentError("data set", ascii(name), "a name in UTF-8", "Correct the name.") from error


def decoded(name: bytes | str) -> str:
    """The inverse of ``encoded``."""
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name


def find(file: h5py.File, name: str, argument: str) -> h5py.Dataset | External:
    """The data set ``name`` of ``file``, through hard and soft links, or where an external link on the way leads.

    Raises ArgumentError, listing the data sets present, where there is none; StorageError for a damaged file.
    """
    place, parts, followed = f"{file.filename}:{name}", _parts(encoded(name)), 0
    with damage_named(place):
        here = file["/"]
    while parts:
        part = parts.pop(0)
        with damage_named(place):
            if not isinstance(here, h5py.Group) or not here.id.links.exists(part):
                raise _missing(file, name, argument)
            kind = here.id.links.get_info(part).type
            if kind == h5l.TYPE_HARD:
                here = here[part]
                continue
            target = here.id.links.get_val(part)
        if kind == h5l.TYPE_EXTERNAL:
            return External(os.fsdecode(target[0]), "/" + decoded(b"/".join([*_parts(target[1]), *parts])))
        followed += 1
        if kind != h5l.TYPE_SOFT:
            raise StorageError(f"{place} leads through a link of an unknown kind. Name the data set itself.")
        if followed > MOST_LINKS:
            raise StorageError(f"{place} leads through more than {MOST_LINKS} soft links: a circle?")
        parts = _parts(target) + parts
        here = file["/"] if target.startswith(b"/") else here
    if isinstance(here, h5py.Group):
        with damage_named(place):
            refuse_group(here, place, argument)
    if not isinstance(here, h5py.Dataset):
        raise _missing(file, name, argument, "a group" if isinstance(here, h5py.Group) else "a data type")
    return here


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def check_external(link: External, origin: str, home: str, *, follow_links: bool) -> str:
    """The path of the file that ``link`` of the file ``origin`` leads to, from origin's folder on, as HDF5 has it.

    Raises StorageError where that is missing or, unless ``follow_links``, outside the folder ``home``.
    """
    path = os.path.join(os.path.dirname(os.path.realpath(origin)), link.file)
    place = f"{origin} has an external link to {link.file}:{link.name}"
    if not (follow_links or os.path.realpath(path).startswith(os.path.join(home, ""))):
        raise StorageError(
            f"{place}, which is outside {home} and not followed. Name that file and data set themselves, or pass ",
            Choice("follow_links", True), " if you trust this one.",
        )  # fmt: skip
    if not os.path.exists(path):
        raise StorageError(f"{place}, which is missing. Copy it there, or name the data set itself.")
    return path


def datasets(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset | StorageError]]:
    """Names and data sets of ``file`` in order, by hard links; instead of what cannot be opened, the reason.

    Each group is visited once, however many names it has. Raises StorageError where the root itself is damaged.
    """
    waiting, visited = [b"/"], set()
    while waiting:
        name = waiting.pop()
        try:
            with damage_named(f"{file.filename}:{decoded(name)}"):
                found = file[name]
                if isinstance(found, h5py.Dataset):
                    yield decoded(name), found
                elif isinstance(found, h5py.Group) and (address := h5o.get_info(found.id).addr) not in visited:
                    visited.add(address)
                    waiting += reversed(_children(found, name))
        except StorageError as error:
            if name == b"/":
                raise
            yield decoded(name), error


def _children(group: h5py.Group, name: bytes) -> list[bytes]:
    """Full names of the objects in ``group`` by hard links."""
    names: list[bytes] = []
    group.id.links.iterate(names.append)
    hard = [one for one in names if group.id.links.get_info(one).type == h5l.TYPE_HARD]
    return [name.rstrip(b"/") + b"/" + one for one in hard]


def _missing(file: h5py.File, name: str, argument: str, what: str = "missing") -> ArgumentError:
    names = [one for one, found in datasets(file) if isinstance(found, h5py.Dataset)]
    present = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "") if names else "none"
    found = f"{name} in {file.filename} is {what} (data sets present: {present})"
    return ArgumentError(argument, found, f"a data set {name}", "Name one that is there: file.h5:/path.")
