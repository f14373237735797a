"""What a worker of a durable job does, step by step, as docs/design/durability.md has it.

A segment is a generator: it yields an operation of the file system, is sent what it is told, and returns the segment
that comes next, or None where the worker ends. Between two operations anything may happen. A worker's state is its
segment, the arguments and what it has been told in it. As claims must not matter, anybody may be taken for gone at any
time. Not modelled: power loss (all writes are on the disk at once), journals as files (a checkpoint says what
is in them), moves to another device.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from model_disk import FOLDER, JOB, OUT, PAGE, Disk, Operation, newest, output_of, shown

Me = tuple[int, str]  # a number that no other has, and the kind of run: run, overwrite, restart, look
Segment = Generator[Operation, Any, tuple | None]
HALF = "half-written"
NEW = ".new"
DEAD = 7  # a worker that was there before all others


class DamageError(Exception):
    """A worker found what must not be."""


@dataclass(frozen=True)
class Protocol:
    """The protocol for a job of some shape: ``bounds`` says for each lane at which rows its parts begin and end."""

    bounds: tuple[tuple[int, ...], ...] = ()
    rows: int = 3
    meet: bool = False  # lanes leave states, and the finisher merges them; else lanes write rows
    claims: bool = False  # with files; else any lane is granted to anybody
    misses: bool = False  # L2's listing is not one step: it can miss checkpoints that come and go meanwhile
    begun: bool = False  # the job is there at the start
    inherit: bool = False  # L2: the states of a writer that is dead for certain are linked
    left: bool = False  # by a worker that has died: a checkpoint at the end of the first part
    tries: int = 2  # beginnings of a worker

    @property
    def start(self) -> Disk:
        if not self.begun:
            return Disk()
        key = "K"
        names = {JOB: key, ("", key): FOLDER, (key, "job"): key, (key, "output"): output_of(key)}
        files = {output_of(key): (None,) * self.rows}
        if self.left:
            states = ("states", 0, key, DEAD)
            names |= {(key, states): states, (key, ("checkpoint", 0, DEAD, 1)): ((0, 1), states, 0)}
            files |= {states: (1, HALF)}
        past = frozenset({("begun", key), ("dead", DEAD)})
        return Disk(frozenset(names.items()), frozenset(files.items()), past)

    @property
    def pages(self) -> range:
        return range(-(-self.rows // PAGE))

    def parts(self, lane: int) -> int:
        return len(self.bounds[lane]) - 1

    def page(self, page: int, value: Any) -> tuple:
        return (value,) * (min(self.rows, (page + 1) * PAGE) - page * PAGE)

    def whole(self, lane: int, at: int, to: int) -> list[int]:
        """The pages that have all their bytes from one piece of the lane's rows."""
        begin, end = self.bounds[lane][at], self.bounds[lane][to]
        return [page for page in self.pages if begin <= page * PAGE and (page + 1) * PAGE <= end]

    def placed(self, lane: int, cuts: tuple[int, ...]) -> list[int]:
        """The pages that journals with these cuts say are in the output."""
        return [] if self.meet else [page for at, to in pairwise(cuts) for page in self.whole(lane, at, to)]

    def has_states(self, lane: int, position: int) -> bool:
        return position > 0 and (self.meet or position < self.parts(lane))

    # Looking for a job

    def look(self, me: Me, tries: int, joined: bool) -> Segment:
        key = yield "read", JOB
        if key is not None and me[1] == "restart" and not joined:
            return "drop", me, tries, key
        if key is not None:
            return "join", me, tries, joined, key
        if joined or tries == 0:
            return None
        if me[1] == "run" and (yield "read", OUT) is not None:  # refuses to write over it, and tidies
            return "tidy", me
        return "begin", me, tries - 1

    def join(self, me: Me, tries: int, joined: bool, key: Any) -> Segment:
        if (yield "read", (key, "output")) is not None:
            return "work", me, key
        if (yield "read", (key, "finished")) is not None:
            return "name", me, tries, joined, key
        return "end", me, tries, joined, key  # finished and named, or dropped: it is to end in both cases

    # Begin

    def begin(self, me: Me, tries: int) -> Segment:
        key = f"K{me[0]}{'abc'[tries]}"
        yield "mkdir", key + NEW, (("output", output_of(key), (None,) * self.rows), ("job", key, None))
        if not (yield "move", key + NEW, key):
            return "look", me, tries, False
        return "clear", me, tries, key

    def clear(self, me: Me, tries: int, key: Any) -> Segment:
        """B1: after it no other directory is the job or can become it."""
        others = yield from self.void(key)
        if (yield "read", JOB) is not None:
            yield "untold", ("move", key, None)
            return "look", me, tries, False
        return "sweep", me, tries, key, others

    def void(self, key: Any) -> Generator[Operation, Any, tuple]:
        """No other directory can be begun from here on, if it was not before; their names."""
        others = [name for name in (yield ("folders",)) if name != key]
        for other in others:
            if other.endswith(NEW):
                yield "untold", ("move", other, None)
            else:
                yield "untold", ("rename", (other, "job"), (other, "void"))
        return tuple(name for name in others if not name.endswith(NEW))

    def sweep(self, me: Me, tries: int, key: Any, others: tuple) -> Segment:
        for other in others:
            yield "untold", ("move", other, None)
        return ("put_up", me, tries, key) if key else None

    def put_up(self, me: Me, tries: int, key: Any) -> Segment:
        """B2."""
        if (yield "link", (key, "job"), JOB) or (yield "read", JOB) == key:
            if me[1] == "run" and (yield "read", OUT) is not None:  # of a job that has finished meanwhile
                return "drop", me, 0, key
            return "work", me, key
        yield "untold", ("move", key, None)
        return "look", me, tries, False

    def tidy(self, me: Me) -> Segment:
        """Removes what dead workers left beside a finished output, as in B1."""
        others = yield from self.void(None)
        return None if (yield "read", JOB) is not None else ("sweep", me, 0, None, others)

    # Run a lane

    def work(self, me: Me, key: Any) -> Segment:
        listing = yield "list", key
        if listing is None:
            return "look", me, 0, True
        names = dict(listing)
        done = {name[1]: value for name, value in names.items() if name[0] == "done"}
        lanes = self.lanes_left(done)
        if not lanes:
            return "finish", me, key, tuple(sorted(done.items()))
        lane = (yield "choose", tuple(lanes)) if len(lanes) > 1 else lanes[0]
        if self.claims and not (yield from self.claim(me, key, lane, names)):
            return "work", me, key
        return "lane", me, key, lane, None

    def claim(self, me: Me, key: Any, lane: int, names: dict) -> Generator[Operation, Any, bool]:
        highest = max((name[2] for name in names if name[:2] == ("claim", lane)), default=0)
        holder = names.get(("claim", lane, highest))
        if holder == me[0]:
            return True
        if holder is not None and (yield "choose", ("it is gone", "it lives")) == "it lives":
            return False
        return (yield "create", (key, ("claim", lane, highest + 1)), me[0])

    def lanes_left(self, done: dict) -> list[int]:
        return [lane for lane in range(len(self.bounds)) if lane not in done]

    def lane(self, me: Me, key: Any, lane: int, doubted: Any) -> Segment:
        """L1 and L2. ``doubted``: a checkpoint whose states were not what it says."""
        over = (yield from self.over(key, lane)) if self.inherit else ()
        listing = yield ("glance" if self.misses else "list"), key
        if listing is None:
            return "look", me, 0, True
        names = dict(listing)
        if ("done", lane) in names:
            return "work", me, key
        name = newest(names, lane)
        if name is None:
            return "attempt", me, key, lane, (0,)
        if name[3] == self.parts(lane):
            return "done", me, key, lane, name
        unneeded = self.unneeded(names, lane, name, over)
        if name[2] not in over or doubted == name:
            over = ()
        return "forget", me, key, lane, name, names[name], doubted, over, unneeded

    def over(self, key: Any, lane: int) -> Generator[Operation, Any, tuple]:
        """The attempts that are of dead workers; known before what they did last is looked for."""
        listing = yield "list", key
        found = []
        for number in sorted({name[-1] for name, _ in listing or () if name[:3] == ("states", lane, key)}):
            if (yield "dead", number):
                found.append(number)
        return tuple(found)

    def unneeded(self, names: dict, lane: int, name: Any, over: tuple) -> tuple:
        """The checkpoints, and then the states, of attempts that are over, and neither the farthest nor its heirs."""
        kept = {name[2], *self.heirs(names, lane, name, over)}
        ended = [number for number in over if number not in kept]
        checkpoints = (found for found in names if found[:2] == ("checkpoint", lane) and found[2] in ended)
        states = (found for found in names if found[:2] == ("states", lane) and found[-1] in ended)
        return (*sorted(checkpoints), *sorted(states))

    def heirs(self, names: dict, lane: int, name: Any, over: tuple) -> list[int]:
        """Those that are over and have taken over the states of the farthest."""
        states = {found[-1]: value for found, value in names.items() if found[:2] == ("states", lane)}
        mine = states.get(name[2])
        return [number for number in over if number != name[2] and mine and states.get(number) == mine]

    def forget(
        self, me: Me, key: Any, lane: int, name: Any, record: tuple, doubted: Any, over: tuple, unneeded: tuple
    ) -> Segment:
        for one in unneeded:
            yield "untold", ("unlink", (key, one))
        if over:
            return "take_over", me, key, lane, name, record, over
        return "copy", me, key, lane, name, record, doubted

    def take_over(self, me: Me, key: Any, lane: int, name: Any, record: tuple, over: tuple) -> Segment:
        """The states of a writer that is dead for certain get one heir at a time; all others copy them."""
        if (yield from self.inherits(me, key, lane, name, over)):
            return "advance", me, key, lane, *record, None
        return "copy", me, key, lane, name, record, None

    def inherits(self, me: Me, key: Any, lane: int, name: Any, over: tuple) -> Generator[Operation, Any, bool]:
        states, mine = (key, ("states", lane, key, name[2])), (key, ("states", lane, key, me[0]))
        if (yield "link", states, (key, ("heir", lane, name[2]))):
            return (yield "link", states, mine) or (yield "read", mine) is not None
        names = dict((yield "list", key) or ())
        for heir in self.heirs(names, lane, name, over):
            if (yield "rename", (key, ("states", lane, key, heir)), mine) or (yield "read", mine) is not None:
                return True
        return False

    def copy(self, me: Me, key: Any, lane: int, name: Any, checkpoint: tuple, doubted: Any) -> Segment:
        cuts, states, slot = checkpoint
        if (yield "see", states, slot, 1) == (cuts[-1],):
            return "attempt", me, key, lane, cuts
        if doubted == name and not self.misses:
            raise DamageError(f"the states of {shown(name)} are not what it says, and nothing is newer")
        return "lane", me, key, lane, name

    def attempt(self, me: Me, key: Any, lane: int, cuts: tuple) -> Segment:
        mine = ("states", lane, key, me[0])
        if self.meet or self.parts(lane) > 1:
            made = yield "make", (key, mine), mine, (cuts[-1], None)
            if not made:
                return "look", me, 0, True
        return "advance", me, key, lane, cuts, mine, 0, None

    def advance(self, me: Me, key: Any, lane: int, cuts: tuple, states: Any, slot: int, older: Any) -> Segment:
        """L3: computes to some position and commits."""
        at, end = cuts[-1], self.parts(lane)
        to = (yield "choose", tuple(range(at + 1, end + 1))) if at + 1 < end else end
        free = self.free_slot(slot)
        yield from self.settle(key, lane, at, to)
        name, record = ("checkpoint", lane, me[0], to), ((*cuts, to), states, free)
        if not (yield from self.commit(key, name, record, older)):
            return "look", me, 0, True
        if to == end:
            return "done", me, key, lane, name
        return "advance", me, key, lane, *record, name

    def commit(self, key: Any, name: tuple, record: tuple, older: Any) -> Generator[Operation, Any, bool]:
        (_, lane, _, to), (_, states, free) = name, record
        if self.has_states(lane, to):  # C1
            yield "write", states, free, (HALF,)
            yield "write", states, free, (to,)
        if (yield "read", (key, "output")) is None or not (yield "make", (key, name), record):  # C4, C5
            return False
        if older:  # C6
            yield "untold", ("unlink", (key, older))
        return True

    def free_slot(self, slot: int) -> int:
        return 1 - slot

    def settle(self, key: Any, lane: int, at: int, to: int) -> Generator[Operation, Any, None]:
        """Whole pages go to their place; the bytes before and after are in the journal."""
        for page in [] if self.meet else self.whole(lane, at, to):
            yield "write", output_of(key), page * PAGE, self.page(page, key)

    def done(self, me: Me, key: Any, lane: int, name: Any) -> Segment:
        yield "untold", ("link", (key, name), (key, ("done", lane)))
        return ("clear_lane", me, key, lane, name) if self.inherit else ("work", me, key)

    def clear_lane(self, me: Me, key: Any, lane: int, name: Any) -> Segment:
        """States of the lane that nobody needs any more, whoever still writes them."""
        names = dict((yield "list", key) or ())
        needed = self.needed(names, lane, name)
        for one in sorted(found for found in names if found[:2] == ("states", lane) and names[found] != needed):
            yield "untold", ("unlink", (key, one))
        return "work", me, key

    def needed(self, names: dict, lane: int, name: Any) -> Any:
        """The states that are to be merged: those of the checkpoint that was the first at the end."""
        return names[("done", lane)][1] if self.meet and ("done", lane) in names else None

    # Finish, end, drop

    def finish(self, me: Me, key: Any, done: tuple) -> Segment:
        """F1, F2: pages that journals have whole are read; the others are composed (of all lanes') and written."""
        for lane, (cuts, states, slot) in done:
            if self.meet and (yield "see", states, slot, 1) != (self.parts(lane),):
                return "suspect", me, key, f"states of lane {lane}"
            if cuts[-1] != self.parts(lane):
                raise DamageError("a lane is done that has rows left")
        placed = {page for lane, record in done for page in self.placed(lane, record[0])}
        for page in self.pages:
            if page not in placed:
                yield "write", output_of(key), page * PAGE, self.composed(page, key, dict(done))
            elif (yield "see", output_of(key), page * PAGE, PAGE) != self.page(page, key):
                return "suspect", me, key, f"page {page}"
        return "decide", me, key

    def composed(self, page: int, key: Any, done: dict) -> tuple:
        """A page of the rows that the lanes which are done have in their journals, or in their states."""
        if self.meet or not self.bounds:
            return self.page(page, key if len(done) == len(self.bounds) else None)
        rows = range(page * PAGE, min(self.rows, (page + 1) * PAGE))
        have = {row for lane in done for row in range(self.bounds[lane][0], self.bounds[lane][-1])}
        return tuple(key if row in have else None for row in rows)

    def suspect(self, me: Me, key: Any, what: str) -> Segment:
        if (yield "read", (key, "output")) is not None:
            raise DamageError(f"{what} is not what the journal says")
        return "look", me, 0, True

    def decide(self, me: Me, key: Any) -> Segment:
        """F3: against Drop."""
        if (yield "rename", (key, "output"), (key, "finished")) or (yield "read", (key, "finished")) is not None:
            return "name", me, 0, True, key
        return "look", me, 0, True

    def name(self, me: Me, tries: int, joined: bool, key: Any) -> Segment:
        """F4: linked where it must not be there."""
        how = "link" if me[1] == "run" else "rename"
        told = yield how, (key, "finished"), OUT
        if told or (yield "read", (key, "finished")) is None or (yield "read", OUT) == output_of(key):
            return "end", me, tries, joined, key
        return None  # something else has the name: the job stays

    def end(self, me: Me, tries: int, joined: bool, key: Any) -> Segment:
        yield "untold", ("rename", JOB, (key, "ended"))  # E1
        yield "untold", ("move", key, None)  # E2
        return "look", me, tries, joined

    def drop(self, me: Me, tries: int, key: Any) -> Segment:
        if (yield "rename", (key, "output"), (key, "dropped")) or (yield "read", (key, "dropped")) is not None:
            return "end", self.as_next(me), tries, False, key
        return "join", self.as_next(me), 0, False, key  # it has finished: said, and nothing is begun

    def as_next(self, me: Me) -> Me:
        """What the run is once the job that it was to drop is no more."""
        return (me[0], "overwrite") if me[1] == "restart" else me

    # Looking

    def watch(self, me: Me, doubted: Any) -> Segment:
        key = yield "read", JOB
        listing = (yield "list", key) if key is not None else None
        if listing is None:
            return None
        names = dict(listing)
        for lane in range(len(self.bounds)):
            name = newest(names, lane)
            cuts, states, slot = names.get(name, ((0,), None, 0))
            bad = self.has_states(lane, cuts[-1]) and (yield "see", states, slot, 1) != (cuts[-1],)
            for page in self.placed(lane, cuts):
                bad = bad or (yield "see", output_of(key), page * PAGE, PAGE) != self.page(page, key)
            if bad and self.believes(doubted, (key, name)):
                raise DamageError(f"{shown(name)} is shown as damaged")
            if bad:
                return "watch", me, (key, name)
        return None

    def believes(self, doubted: Any, bad: Any) -> bool:
        """Only what is still so, with nothing newer, is damaged."""
        return doubted == bad


def enter(number: int, kind: str, tries: int) -> tuple:
    me = (number, kind)
    return ("watch", (me, None), ()) if kind == "look" else ("look", (me, tries, False), ())


@cache
def pending(protocol: Protocol, worker: tuple) -> tuple[tuple | None, Operation | None]:
    """The worker at its next operation; without an operation where it has ended (None) or found damage."""
    segment, arguments, told = worker
    run = getattr(protocol, segment)(*arguments)
    try:
        operation = next(run)
        for answer in told:
            operation = run.send(answer)
    except StopIteration as end:
        return (None, None) if end.value is None else pending(protocol, (end.value[0], end.value[1:], ()))
    except DamageError as error:
        return ("damage", (arguments[0], str(error)), ()), None
    return worker, operation
