"""Whether the inputs of a run are those that its job was begun with, and stay so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

from ..engine import Inputs
from ..errors import ArgumentError, CqsaError, StorageError
from ..storage import Check, Locking, TokenSource, dataset_in, full_hash, sampled_hash, unhindered
from ..wording import Call, Choice, Phrase
from .inputs import Hints, KnownInput, differences


class Watch:
    """The ``inputs`` of a run and what is ``known`` of them, looked at again with every commit.

    ``interrupted`` may raise to stop what takes long. For a moment that is only a look at the files: what they hold is
    read again where a time or an inode has moved.
    """

    def __init__(
        self, inputs: Inputs, known: Mapping[str, KnownInput], *, locking: Locking, interrupted: Check = unhindered
    ) -> None:
        self._sources: dict[str, TokenSource] = {name: getattr(inputs, name) for name in "qkv"}
        self.known = dict(known)
        self.locking, self._interrupted = locking, interrupted
        # Of the files that the sources read; another file may get the name.
        self._inodes = {name: one.hints.inode for name, one in known.items() if one.hints is not None}

    def require_same(self, stored: Mapping[str, KnownInput], out: str) -> None:
        """The inputs must be those of which the unfinished job of ``out`` has ``stored`` this.

        Raises StorageError for another one, ArgumentError where everything was to be checked and only samples are
        known. What is known of everything is known from now on, too.
        """
        for name, before in stored.items():
            now = self.known[name]
            if now.full is not None and before.full is None:
                raise only_samples("full", out)
            different = differences(before, now)
            if not different and before.full is not None and now.full is None and before.hints != now.hints:
                now = replace(now, full=full_hash(self._sources[name], self._interrupted))
                different = differences(before, now)
            if different:
                raise another_input(name, self._label(name), out, different, of_file=before.dataset is not None)
            self.known[name] = replace(now, full=before.full)

    def check(self) -> None:
        """Raise StorageError where a file is gone, or holds other than when the run began."""
        looked: set[object] = set()
        for name, known in self.known.items():
            if known.hints is None:
                continue
            identity = self._sources[name].identity
            path = str(identity["path"])
            try:
                found = os.stat(path)
            except OSError as error:
                raise StorageError(f"{name}: {path}: {error.strerror}, while it was read.") from error
            if found.st_size != known.size:
                raise _changed(name, path)
            hints, what = Hints.of(found), (path, identity.get("dataset"), known.layout, known.sample)
            if hints != known.hints:
                if what not in looked and not self._holds(name, known, hints):
                    raise _changed(name, path)
                looked.add(what)
                self.known[name] = replace(known, hints=hints)

    def _holds(self, name: str, known: KnownInput, hints: Hints) -> bool:
        """Whether the file that has the name now holds what is known."""
        source = self._sources[name]
        if hints.inode == self._inodes[name]:
            return self._hashes_agree(source, known)
        dataset = source.identity.get("dataset")
        if not isinstance(dataset, str):  # a map of a file that is another by now
            return False
        path = str(source.identity["path"])
        try:
            array = dataset_in(path, dataset, layout=known.layout, locking=self.locking, argument=name)
            with closing(array.source()) as another:
                alike = list(array.shape) == list(known.shape) and another.dtype.name == known.dtype
                return alike and self._hashes_agree(another, known)
        except CqsaError as error:
            raise _changed(name, path) from error

    def _hashes_agree(self, source: TokenSource, known: KnownInput) -> bool:
        if sampled_hash(source) != known.sample:
            return False
        return known.full is None or full_hash(source, self._interrupted) == known.full

    def _label(self, name: str) -> str:
        """The file and data set of an input, for errors."""
        identity = self._sources[name].identity
        if "path" not in identity:
            return "the array"
        path = os.path.basename(str(identity["path"]))
        return f"{path}:{identity['dataset']}" if "dataset" in identity else path


def another_input(name: str, place: str, out: str, different: list[str], *, of_file: bool) -> StorageError:
    """The error that ``place`` is not what the unfinished job of ``out`` reads: an array of a file, or in memory."""
    naming = Call("resume", out, (Choice(name, ...),))
    remedy = Phrase.of("If that is elsewhere, name it: ", naming, ". If") if of_file else "Pass that again. If"
    return StorageError(
        f"{name}: {place} is not the input that the unfinished job of {out} was begun with (different:"
        f" {', '.join(different)}). ", remedy, " it is gone for good, begin anew with ",
        Choice("restart", True, rare=True), ".",
    )  # fmt: skip


def only_samples(asked: str, out: str) -> ArgumentError:
    """The error that everything was to be compared, and that this cannot be."""
    expected = f"sampled: of the inputs of {out} only samples are known"
    remedy = "Leave it out. What is to be checked in full has to be read in full when the job begins."
    return ArgumentError("check_inputs", asked, expected, remedy)


def _changed(name: str, path: str) -> StorageError:
    return StorageError(
        f"{name}: {path} has changed while it was read. What was committed before is kept, and can go on only with the"
        " file as it was."
    )
