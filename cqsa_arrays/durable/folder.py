"""The files of a job: a folder beside its output; ``docs/design/durability.md`` says what each name is for."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from ..errors import START_OVER, ArgumentError, StorageError
from ..storage import JOB_SUFFIX, describe
from ..wording import Call, Phrase

# So often something is looked at again that goes on meanwhile.
LOOKS = 100
KEY, NAME = r"[0-9a-f]{16}", r"[0-9a-f]{8}"
# The claim under which it was begun, and a random name.
ATTEMPT = rf"\d{{1,9}}-{NAME}"
CHECKPOINT = re.compile(rf"lane-(\d{{1,9}})\.({ATTEMPT})\.(\d{{1,9}})")
# "heir": another attempt has the file now; "over": its writer has closed it.
STATES = rf"-\d{{1,9}}-{ATTEMPT}\.states(\.heir|\.over)?"
DONE = re.compile(r"lane-(\d{1,9})\.done")
CLAIM = re.compile(r"(begin|finish|lane-\d{1,9})\.claim-(\d{1,9})")
WORKER = re.compile(rf"worker-({NAME})")
_TEMPORARY = rf"(\.new-{NAME})?"
# What jobs make in their folder, and in the directory of each job there.
OWN = re.compile(rf"job{_TEMPORARY}|{WORKER.pattern}{_TEMPORARY}|{CLAIM.pattern}|{KEY}(\.new|\.gone)?")
# What may lie there without a job, and is removed with the folder.
REMAINS = re.compile(rf"job\.new-{NAME}|{WORKER.pattern}\.new-{NAME}|{CLAIM.pattern}")
OF_JOB = re.compile(
    rf"(job|void|ended|output|finished|dropped|moved-\d{{1,9}}|{CHECKPOINT.pattern}|{DONE.pattern}){_TEMPORARY}"
    rf"|{CLAIM.pattern}|{ATTEMPT}\.rows|{KEY}{STATES}"
)
# What jobs of versions before made.
OLD = re.compile(
    r"ledger\.(sqlite|new)(-journal)?|(setup|finish)\.lock(-journal)?|[0-9a-f]+-states-\d+(\.lock(-journal)?)?"
)


@dataclass(frozen=True, slots=True)
class Picture:
    """What a directory of a job has at one moment: lanes that are done, checkpoints of the others, the highest claims.

    ``checkpoints`` are (attempt, number) by lane; ``claims`` by what is claimed.
    """

    done: frozenset[int] = frozenset()
    checkpoints: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    claims: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobFolder:
    """``out.h5.job``, the folder of the job that writes ``out.h5``."""

    out: str

    @property
    def path(self) -> str:
        return self.out + JOB_SUFFIX

    @property
    def record(self) -> str:
        """The record of the job that is unfinished."""
        return os.path.join(self.path, "job")

    @property
    def exists(self) -> bool:
        """Whether a job was begun and neither finished nor dropped."""
        return os.path.isfile(self.record) or self.is_old

    @property
    def is_old(self) -> bool:
        """Whether an older version of this package keeps a job here."""
        return os.path.isfile(os.path.join(self.path, "ledger.sqlite"))

    def of(self, key: str) -> str:
        """The directory of the job of that key."""
        return os.path.join(self.path, key)

    def require(self) -> None:
        """Raise ArgumentError where no job is unfinished, StorageError for one that this version cannot read."""
        if self.is_old:
            raise StorageError(
                f"{self.path}: a job that an older version of cqsa_arrays began, in a form which this one does not"
                " read. Finish it with that version. ", START_OVER,
            )  # fmt: skip
        if not self.exists:
            found, remedy = f"{self.out}, of which no job is unfinished", Phrase.of("Name the output of a job.")
            if os.path.exists(self.out):
                finished = Phrase.of("It is finished: ", Call("verify"), " checks it.")
                remedy = finished if _is_output(self.out) else Phrase.of("That file is no output of a job: name one.")
            raise ArgumentError("out", found, "the output of an unfinished job", remedy)

    def make(self) -> None:
        """Make the folder, unless it is there. Raises StorageError where it cannot be, or holds what is no job's."""
        try:
            with suppress(FileExistsError):
                os.mkdir(self.path)
            others = (name for name in os.listdir(self.path) if not (OWN.fullmatch(name) or OLD.fullmatch(name)))
            foreign = sorted(name for name in others if not name.startswith("."))  # not .nfs... or .DS_Store
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}. A job keeps its record there.") from error
        if foreign:
            raise StorageError(f"{self.path} holds {foreign[0]}, which is of no job. Move it, or name another output.")

    def refuse_inputs(self, inputs: Iterable[str]) -> None:
        """Raise ArgumentError where an input lies in the folder: what jobs make there is removed."""
        own = os.path.realpath(self.path) + os.sep
        for path in inputs:
            if os.path.realpath(path).startswith(own):
                remedy = "Move it, or name another output."
                raise ArgumentError("out", f"{self.out}, whose job's folder holds the input {path}", "another", remedy)

    def directories(self, ending: str = "") -> list[str]:
        """Those of jobs: begun or ready to be; ".new" ones that are being made, ".gone" ones that are being removed."""
        with suppress(FileNotFoundError):
            names = (name for name in os.listdir(self.path) if re.fullmatch(KEY + re.escape(ending), name))
            paths = (os.path.join(self.path, name) for name in sorted(names))
            return [path for path in paths if not os.path.islink(path)]  # what a link leads to is no job's
        return []


@dataclass(frozen=True, slots=True)
class JobPaths:
    """Where one job has its files: in its ``directory``, states in ``scratch``, which may be the same."""

    directory: str
    key: str
    scratch: str

    @property
    def record(self) -> str:
        return os.path.join(self.directory, "job")

    @property
    def void(self) -> str:
        """The record of a job that can no longer be begun."""
        return os.path.join(self.directory, "void")

    @property
    def output(self) -> str:
        """The output while it is written."""
        return os.path.join(self.directory, "output")

    @property
    def finished(self) -> str:
        """The output once it is complete, until it has its name."""
        return os.path.join(self.directory, "finished")

    @property
    def dropped(self) -> str:
        """The output of a job that is being dropped."""
        return os.path.join(self.directory, "dropped")

    def moved(self, number: int) -> str:
        return os.path.join(self.directory, f"moved-{number}")

    def checkpoint(self, lane: int, attempt: str, number: int) -> str:
        return os.path.join(self.directory, f"lane-{lane}.{attempt}.{number}")

    def done(self, lane: int) -> str:
        return os.path.join(self.directory, f"lane-{lane}.done")

    def journal(self, attempt: str) -> str:
        return os.path.join(self.directory, f"{attempt}.rows")

    def states(self, lane: int, attempt: str) -> str:
        return os.path.join(self.scratch, f"{self.key}-{lane}-{attempt}.states")

    def look(self) -> Picture:
        """The directory as it is now. Raises FileNotFoundError where it is gone."""
        return look(self.directory)


def look(directory: str) -> Picture:
    """The directory of a job as it is now. Raises FileNotFoundError where it is gone."""
    done, claims, checkpoints = set(), dict[str, int](), defaultdict[int, list[tuple[str, int]]](list)
    for name in os.listdir(directory):
        if found := DONE.fullmatch(name):
            done.add(int(found[1]))
        elif found := CHECKPOINT.fullmatch(name):
            checkpoints[int(found[1])].append((found[2], int(found[3])))
        elif found := CLAIM.fullmatch(name):
            claims[found[1]] = max(claims.get(found[1], 0), int(found[2]))
    return Picture(frozenset(done), dict(checkpoints), claims)


def clear(directory: str, own: re.Pattern[str]) -> None:
    """Remove the files in ``directory`` whose names are ``own``, and it, where nothing else is in it.

    Nothing is followed: of a link only the name is removed. Raises OSError.
    """
    try:
        names = [] if os.path.islink(directory) else os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        path = os.path.join(directory, name)
        if own.fullmatch(name) and (os.path.islink(path) or not os.path.isdir(path)):
            with suppress(FileNotFoundError):
                os.remove(path)
    with suppress(OSError):  # somebody else's files are in it
        os.rmdir(directory)


def _is_output(path: str) -> bool:
    """Whether the file at ``path`` names its inputs, as outputs do."""
    try:
        return "inputs" in describe(path).attributes
    except StorageError:  # no HDF5 file
        return False
