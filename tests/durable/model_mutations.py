"""Protocols that are wrong, each in one way: what the exploration must find out, and in which setting."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from model_disk import JOB, OUT, TOP, Operation, newest, output_of
from model_worker import Me, Protocol, Segment
from protocol_model import OVERWRITES, RESTARTS, RUNS, THREE_PARTS, TWO_LANES, TWO_PARTS, Setting

PART = (TOP, "out.part")


class RemovesWhatIsNotTheJob(Protocol):
    """B1 looks whether a directory is the job, and then renames it away."""

    def clear(self, me: Me, tries: int, key: Any) -> Segment:
        for other in (yield ("folders",)):
            if other != key and (yield "read", JOB) != other:
                yield "untold", ("move", other, None)
        return "put_up", me, tries, key


class LeavesWhatIsTheJob(Protocol):
    """B1 leaves a directory alone that is the job, and goes on with the next."""

    def clear(self, me: Me, tries: int, key: Any) -> Segment:
        others = yield from self.void(key)
        for other in others:
            if (yield "read", JOB) != other:
                yield "untold", ("move", other, None)
        return "put_up", me, tries, key


class RemovesNothing(Protocol):
    """Without B1."""

    def clear(self, me: Me, tries: int, key: Any) -> Segment:
        yield "read", JOB
        return "put_up", me, tries, key


class TrustsBeginClaim(Protocol):
    """Who has the claim to begin writes ``job`` over what is there."""

    def put_up(self, me: Me, tries: int, key: Any) -> Segment:
        yield "make", JOB, key
        return "work", me, key


class LinksUnfinished(Protocol):
    """F3 links the output, which then still has its name in the job."""

    def decide(self, me: Me, key: Any) -> Segment:
        how = "link" if me[1] == "run" else "rename"
        if (yield how, (key, "output"), OUT) or (yield "read", OUT) == output_of(key):
            return "end", me, 0, True, key
        return "look", me, 0, True


class FinishesSharedName(LinksUnfinished):
    """F3 renames a name that does not have the key: who works on the job sees to it that it is there."""

    def work(self, me: Me, key: Any) -> Segment:
        if (yield "read", PART) != output_of(key):
            yield "untold", ("unlink", PART)
            yield "untold", ("link", (key, "output"), PART)
        return (yield from super().work(me, key))

    def decide(self, me: Me, key: Any) -> Segment:
        if (yield "rename", PART, OUT) or (yield "read", OUT) == output_of(key):
            return "end", me, 0, True, key
        return "look", me, 0, True


class EndUnlinks(Protocol):
    """E1 looks whether ``job`` is its own, and unlinks it."""

    def end(self, me: Me, tries: int, joined: bool, key: Any) -> Segment:
        if (yield "read", JOB) == key:
            yield "untold", ("unlink", JOB)
        yield "untold", ("move", key, None)
        return "look", me, tries, joined


class EndsBeforeNaming(Protocol):
    """E1 comes before the output has its name."""

    def name(self, me: Me, tries: int, joined: bool, key: Any) -> Segment:
        yield "untold", ("rename", JOB, (key, "ended"))
        yield "untold", ("rename", (key, "finished"), OUT)
        yield "untold", ("move", key, None)
        return "look", me, tries, joined


class DropsWithoutAsking(Protocol):
    """Drop looks whether the job has finished, and ends it."""

    def drop(self, me: Me, tries: int, key: Any) -> Segment:
        if (yield "read", (key, "output")) is None:
            return "join", self.as_next(me), 0, False, key
        return "end", self.as_next(me), tries, False, key


class OverwritesCommitted(Protocol):
    """C1 writes states where the committed ones are."""

    def free_slot(self, slot: int) -> int:
        return slot


class TrustsLaneClaim(Protocol):
    """States belong to a lane, not to an attempt: its claim keeps others out."""

    def attempt(self, me: Me, key: Any, lane: int, cuts: tuple) -> Segment:
        shared = ("states", lane, key)
        if not (yield "make", (key, shared), shared, (cuts[-1], None)):
            return "look", me, 0, True
        return "advance", me, key, lane, cuts, shared, 0, None


class CommitsTooEarly(Protocol):
    """C5 before C1."""

    def commit(self, key: Any, name: tuple, record: tuple, older: Any) -> Generator[Operation, Any, bool]:
        made = yield "make", (key, name), record
        yield "write", record[1], record[2], (name[3],)
        return made


class RemovesTooEarly(Protocol):
    """C6 before C5."""

    def commit(self, key: Any, name: tuple, record: tuple, older: Any) -> Generator[Operation, Any, bool]:
        if older:
            yield "untold", ("unlink", (key, older))
        return (yield from super().commit(key, name, record, None))


class WritesPagesPartly(Protocol):
    """Bytes before and after whole pages are written to their place, by reading the page and writing it again."""

    def settle(self, key: Any, lane: int, at: int, to: int) -> Generator[Operation, Any, None]:
        begin, end = self.bounds[lane][at], self.bounds[lane][to]
        for page in self.pages:
            rows = range(page * 2, min(self.rows, page * 2 + 2))
            mine = [begin <= row < end for row in rows]
            if any(mine):
                there = yield "see", output_of(key), page * 2, 2
                values = tuple(key if m else old for m, old in zip(mine, there or (None, None), strict=False))
                yield "write", output_of(key), page * 2, values


class FinishesTooEarly(Protocol):
    """Finishes when one lane is done."""

    def lanes_left(self, done: dict) -> list[int]:
        return [] if done else super().lanes_left(done)


class GivesEveryHeirTheFile(Protocol):
    """L2 links the states of a dead writer under a name of the new attempt's, not of the old one's."""

    def inherits(self, me: Me, key: Any, lane: int, name: Any, over: tuple) -> Generator[Operation, Any, bool]:
        return (yield "link", (key, ("states", lane, key, name[2])), (key, ("states", lane, key, me[0])))


class FollowsTheLiving(Protocol):
    """L2 takes the states from an heir that may still write."""

    def heirs(self, names: dict, lane: int, name: Any, over: tuple) -> list[int]:
        everybody = tuple(sorted({found[-1] for found in names if found[:2] == ("states", lane)}))
        return super().heirs(names, lane, name, everybody)


class LooksBeforeItKnows(Protocol):
    """L2 looks at the checkpoints first, and then whose writers are dead."""

    def lane(self, me: Me, key: Any, lane: int, doubted: Any) -> Segment:
        listing = yield "list", key
        if listing is None:
            return "look", me, 0, True
        names = dict(listing)
        name = newest(names, lane)
        if ("done", lane) in names or name is None or name[3] == self.parts(lane):
            return (yield from super().lane(me, key, lane, doubted))
        return "judge", me, key, lane, name, names[name], doubted

    def judge(self, me: Me, key: Any, lane: int, name: Any, record: tuple, doubted: Any) -> Segment:
        over = yield from self.over(key, lane)
        names = dict((yield "list", key) or ())
        unneeded = self.swept(names, lane, name, over)
        if name[2] not in over or doubted == name:
            over = ()
        return "forget", me, key, lane, name, record, doubted, over, unneeded

    def swept(self, names: dict, lane: int, name: Any, over: tuple) -> tuple:
        return ()


class SweepsBeforeItKnows(LooksBeforeItKnows):
    """The same, and only clears away; nothing is inherited."""

    def judge(self, me: Me, key: Any, lane: int, name: Any, record: tuple, doubted: Any) -> Segment:
        _, *rest, _, unneeded = yield from super().judge(me, key, lane, name, record, doubted)
        return "forget", *rest, (), unneeded

    def swept(self, names: dict, lane: int, name: Any, over: tuple) -> tuple:
        return self.unneeded(names, lane, name, over)


class ForgetsTheLiving(Protocol):
    """Who takes a lane over clears away what others have, dead or not."""

    def over(self, key: Any, lane: int) -> Generator[Operation, Any, tuple]:
        names = dict((yield "list", key) or ())
        return tuple(sorted({name[-1] for name in names if name[:3] == ("states", lane, key)}))

    def take_over(self, me: Me, key: Any, lane: int, name: Any, record: tuple, over: tuple) -> Segment:
        yield "read", JOB
        return "copy", me, key, lane, name, record, None


class KeepsItsOwn(Protocol):
    """Who comes to the end of a lane keeps its own states for the merge, though another was the first."""

    def needed(self, names: dict, lane: int, name: Any) -> Any:
        return names[name][1]


class BelievesFirstLook(Protocol):
    """Looking believes what it sees first."""

    def believes(self, doubted: Any, bad: Any) -> bool:
        return True


LIFE = {"tries": 1}
PARTS = {"bounds": THREE_PARTS, "begun": True}
LANES = {"bounds": TWO_LANES, "rows": 4, "begun": True}
HEIRS = {"bounds": TWO_PARTS, "begun": True, "meet": True, "inherit": True}
MUTATIONS = (
    Setting(RemovesWhatIsNotTheJob(**LIFE), RUNS),
    Setting(LeavesWhatIsTheJob(**LIFE), ("overwrite", "overwrite", "overwrite"), 3),
    Setting(RemovesNothing(**LIFE), OVERWRITES),
    Setting(TrustsBeginClaim(**LIFE), RUNS),
    Setting(LinksUnfinished(**LIFE), RESTARTS),
    Setting(FinishesSharedName(**LIFE), ("overwrite", "overwrite", "overwrite")),
    Setting(EndUnlinks(**LIFE), OVERWRITES),
    Setting(EndsBeforeNaming(**LIFE), RUNS),
    Setting(DropsWithoutAsking(**LIFE), RESTARTS),
    Setting(OverwritesCommitted(**PARTS), RUNS),
    Setting(TrustsLaneClaim(**PARTS, claims=True), RUNS),
    Setting(CommitsTooEarly(**PARTS), RUNS),
    Setting(RemovesTooEarly(**PARTS), RUNS),
    Setting(WritesPagesPartly(**LANES), RUNS),
    Setting(FinishesTooEarly(**LANES), RUNS),
    Setting(GivesEveryHeirTheFile(**HEIRS, left=True), ("run", "run")),
    Setting(FollowsTheLiving(**HEIRS, left=True), ("run", "run")),
    Setting(LooksBeforeItKnows(**HEIRS), RUNS),
    Setting(SweepsBeforeItKnows(**HEIRS), RUNS),
    Setting(ForgetsTheLiving(**HEIRS), RUNS),
    Setting(KeepsItsOwn(**HEIRS), RUNS),
    Setting(BelievesFirstLook(**PARTS), ("run", "look")),
)
