"""Inputs found again: beside the output, where they were given, or where the user says; what they hold decides."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from ..errors import ArgumentError, CqsaError, StorageError
from ..storage import DiskArray, Locking, dataset_in, full_hash, split_reference
from ..wording import Call, Choice
from .inputs import KnownInput, describe_input, differences
from .watch import another_input, only_samples

Depth = Literal["structure", "sampled", "full"]
"""How much of what is found is compared with what is known."""


@dataclass(frozen=True, slots=True)
class Finder:
    """Finds the inputs of ``out``; messages tell the user of ``command`` how to name one."""

    out: str
    command: Literal["verify", "resume"]
    locking: Locking
    depth: Depth

    def find(self, name: str, stored: KnownInput, named: object = None) -> DiskArray:
        """The array of which ``stored`` is known, at the place that the user has ``named`` or where it is looked for.

        Raises StorageError where there is none, or only others: then the first is named; ArgumentError where it was no
        array of a file and is not named, or cannot be checked so.
        """
        if self.depth == "full" and stored.full is None:
            raise only_samples("full", self.out)
        if named is not None:
            array = self._named(name, stored, named)
            if different := self._differences(stored, array):
                raise self._another(name, array.stored.label, different)
            return array
        if stored.dataset is None:
            raise ArgumentError(
                "path", f"{name} was an array in memory", "inputs in files", "Compare with compare instead."
            )
        return self._looked_for(name, stored)

    def _looked_for(self, name: str, stored: KnownInput) -> DiskArray:
        """The first file of the candidates that holds what is known."""
        refusal: CqsaError | None = None
        for path in self._candidates(stored):
            if not os.path.exists(path):
                continue
            try:
                array = self._open(name, path, str(stored.dataset), stored)
                different = self._differences(stored, array)
            except CqsaError as error:  # no such data set, one of another kind, or a file that cannot be read
                refusal = refusal or error
                continue
            if not different:
                return array
            refusal = refusal or self._changed(name, f"{path}:{stored.dataset}", different)
        raise self._missing(name, stored) if refusal is None else refusal

    def _candidates(self, stored: KnownInput) -> list[str]:
        """Relative to the output, which may be reached through links; then as it was given; then where it was."""
        found: list[str] = []
        if stored.relative is not None:
            folders = (os.path.dirname(path(self.out)) for path in (os.path.abspath, os.path.realpath))
            found += [os.path.normpath(os.path.join(folder, stored.relative)) for folder in folders]
        found += [os.path.abspath(path) for path in (stored.given, stored.path) if path is not None]
        return list(dict.fromkeys(found))

    def _open(self, name: str, path: str, dataset: str, stored: KnownInput) -> DiskArray:
        return dataset_in(path, dataset, layout=stored.layout, locking=self.locking, argument=name)

    def _named(self, name: str, stored: KnownInput, named: object) -> DiskArray:
        """What the user has named: a data set, or a file that has it under the name that it had."""
        if isinstance(named, DiskArray):
            return self._open(name, named.stored.path, named.stored.name, stored)
        if not isinstance(named, (str, os.PathLike)):
            expected = 'the text "file.h5:/path" or an array of cqsa.open()'
            raise ArgumentError(name, f"type {type(named).__name__}", expected, "Leave it out to have it looked for.")
        path, dataset = split_reference(os.fspath(named))
        return self._open(name, path, dataset or stored.dataset or f"/{name}", stored)

    def _differences(self, stored: KnownInput, array: DiskArray) -> list[str]:
        if self.depth == "structure":
            return []
        with closing(array.source()) as source:
            different = differences(stored, describe_input(source))
            if not different and self.depth == "full" and full_hash(source) != stored.full:
                return ["full"]
        return different

    @property
    def _unfinished(self) -> bool:
        return self.command == "resume"

    def _naming(self, name: str) -> Call:
        return Call(self.command, self.out, (Choice(name, ...),))

    def _missing(self, name: str, stored: KnownInput) -> StorageError:
        places = " or ".join(self._candidates(stored))
        return StorageError(
            f"{name}: the input {stored.dataset} of {self.out} is not there: no file {places}. Name where it is now: ",
            self._naming(name), ".",
        )  # fmt: skip

    def _changed(self, name: str, place: str, different: list[str]) -> StorageError:
        since = f"the job of {self.out} was begun" if self._unfinished else f"{self.out} was computed"
        return StorageError(
            f"{name}: {place} has changed since {since} (different: {', '.join(different)}). If what it was is"
            " elsewhere, name it: ", self._naming(name), ".",
        )  # fmt: skip

    def _another(self, name: str, place: str, different: list[str]) -> StorageError:
        if self._unfinished:
            return another_input(name, place, self.out, different, of_file=True)
        return StorageError(
            f"{name}: {place} is not the input that {self.out} was computed from (different: {', '.join(different)})."
            " Name that: ", self._naming(name), ".",
        )  # fmt: skip
