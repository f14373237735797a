"""A file as ``cqsa.open`` gives it: the arrays that it has, by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

from ..errors import ArgumentError, MissingArrayError, one_line
from .hdf5 import DiskArray, Locking, dataset_in, opened


class OpenedFile:
    """The arrays in one HDF5 file: ``.q``, ``.k``, ``.v`` and whatever else its root holds, those that it has.

    Another name is an AttributeError that lists the data sets of the file. No file stays open.
    """

    def __init__(
        self, path: str, arrays: Mapping[str, DiskArray], layout: str | None, locking: Locking, follow_links: bool
    ) -> None:
        self.path, self._arrays = path, dict(arrays)
        self._layout, self._locking, self._follow_links = layout, locking, follow_links

    def __getattr__(self, name: str) -> DiskArray:
        if name.startswith("_"):  # what Python and notebooks look for
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name not in self._arrays:
            try:
                self._arrays[name] = dataset_in(
                    self.path, f"/{name}", layout=self._layout, locking=self._locking, argument=name,
                    follow_links=self._follow_links,
                )  # fmt: skip
            except ArgumentError as error:
                raise MissingArrayError(error.argument, error.found, error.expected, error.remedy) from error
        return self._arrays[name]

    def __dir__(self) -> list[str]:
        return sorted(["path", *self._arrays])

    def __repr__(self) -> str:
        shown = [f"{name} {one.layout}{one.shape} {one.dtype.name}" for name, one in self._arrays.items()]
        return f"<OpenedFile {one_line(self.path)}: {', '.join(shown) or 'no q, k or v'}>"


def open_file(
    path: str | os.PathLike[str], *, layout: str | None = None, locking: Locking = None, follow_links: bool = False
) -> OpenedFile:
    """The arrays of an HDF5 file, with nothing read yet and no file left open.

    External links are followed to files beside this one or below, with ``follow_links`` to any. Raises ArgumentError
    where one of /q, /k and /v is there and no input of attention, StorageError for a file that cannot be read. Warns of
    filters that are not installed: reading will be refused.
    """
    path = os.fspath(path)
    with opened(path, locking) as file:
        root = file["/"]
        present = [name for name in "qkv" if root.id.links.exists(name.encode())]
    arrays = {
        name: dataset_in(path, f"/{name}", layout=layout, locking=locking, argument=name, follow_links=follow_links)
        for name in present
    }
    for reason, label in {one.stored.unreadable: one.stored.label for one in reversed(arrays.values())}.items():
        if reason is not None:
            warnings.warn(one_line(f"{label} cannot be read: {reason}."), stacklevel=3)
    return OpenedFile(path, arrays, layout, locking, follow_links)
