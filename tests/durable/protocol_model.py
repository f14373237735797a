"""Explores every order in which workers of a durable job can make their steps, and die, stand still and wake up late.

    python tests/durable/protocol_model.py [--big] [--only NAME]

Breadth first, so that a fault comes with the shortest trace. What a worker does next depends on the disk and on itself
alone: disks and workers are numbered, and the outcomes of each pair are computed once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from model_disk import JOB, OUT, TOP, Disk, newest, outcomes, output_of, shown, step_shown
from model_worker import Protocol, enter, pending

FRESH = 8  # the number of a worker that comes when all others are gone


@dataclass(frozen=True)
class Setting:
    """Which workers come: ``together`` at a time, each of the next kind; where one ends or dies the next comes."""

    protocol: Protocol
    kinds: tuple[str, ...]
    together: int = 2


class Fault(NamedTuple):
    """What is wrong, and the steps that lead there."""

    what: str
    trace: list[str]

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  {number:2}. {step}" for number, step in enumerate(self.trace, 1))])


class State(NamedTuple):
    disk: int
    workers: tuple[int, ...]
    came: int


class Numbers:
    """Values by number, and numbers by value."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Hashable, int] = {}

    def __call__(self, value: Hashable) -> int:
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


def remembered(before: Disk, disk: Disk) -> Disk:
    """The disk with what is now known of its past. Jobs of which nothing is left are forgotten."""
    names = dict(disk.names)
    past = set(before.past)
    if JOB in names:
        past.add(("begun", names[JOB]))
    if OUT in names:
        past.add(("finished", names[OUT][1]))
    past |= {("dropped", folder) for folder, name in names if name == "dropped"}
    alive = {names.get(JOB), names[OUT][1] if OUT in names else None, *(n for top, n in names if top == TOP)}
    return disk._replace(past=frozenset(fact for fact in past if fact[0] == "dead" or fact[1] in alive))


def wrong_disk(protocol: Protocol, before: Disk, disk: Disk) -> str | None:
    """Which invariant a disk breaks, or how it came from the one before."""
    names, files = dict(disk.names), dict(disk.files)
    if OUT in names:
        _, key = names[OUT]
        if files[names[OUT]] != (key,) * protocol.rows:
            return f"out.h5 is named with rows {files[names[OUT]]}"
    facts = disk.past | before.past
    for what, key in facts:
        if {("finished", key), ("dropped", key)} <= facts:
            return f"{shown(key)} is finished and dropped"
        over = ("finished", key) in facts or ("dropped", key) in facts
        if what == "begun" and not over and (names.get(JOB) != key or (TOP, key) not in names):
            return f"{shown(key)} was begun and is lost: `job` is {shown(names.get(JOB))}"
    if JOB not in names:
        return None
    return wrong_lanes(protocol, names, files) or gone_back(protocol, dict(before.names), names)


def gone_back(protocol: Protocol, before: dict, names: dict) -> str | None:
    """No lane loses its newest checkpoint before there is another."""
    key = names[JOB]
    if before.get(JOB) == key and len(before) > len(names):
        for lane in range(len(protocol.bounds)):
            was, now = (newest({name: 0 for top, name in of if top == key}, lane) for of in (before, names))
            if was and (now is None or now[3] < was[3]):
                return f"lane {lane} has lost its newest checkpoint"
    return None


def wrong_lanes(protocol: Protocol, names: dict, files: dict) -> str | None:
    """Committed checkpoints are readable, and lanes that are done are."""
    key = names[JOB]
    inside = {name: value for (folder, name), value in names.items() if folder == key}
    for lane in range(len(protocol.bounds)):
        done = inside.get(("done", lane))
        if done and done[0][-1] != protocol.parts(lane):
            return f"lane {lane} is done with a checkpoint at {done[0]}"
        for record in filter(None, [done or inside.get(newest(inside, lane))]):
            cuts, states, slot = record
            if protocol.has_states(lane, cuts[-1]) and (states not in files or files[states][slot] != cuts[-1]):
                return f"the newest checkpoint of lane {lane}, at {cuts[-1]}, has states {files.get(states)}"
            rows = files.get(output_of(key))
            for page in protocol.placed(lane, cuts):
                if rows and rows[page * 2 : page * 2 + 2] != protocol.page(page, key):
                    return f"page {page} of a committed checkpoint is not as its journal says"
    return None


@dataclass
class Exploration:
    """All that can be reached in a setting."""

    setting: Setting
    disks: Numbers = field(default_factory=Numbers)
    workers: Numbers = field(default_factory=Numbers)
    steps: dict = field(default_factory=dict)  # (disk, worker): [(what was told, disk, worker, what is wrong)]
    entered: dict = field(default_factory=dict)
    left: dict = field(default_factory=dict)  # (disk, worker): the disk after that worker has died
    came_from: dict = field(default_factory=dict)
    ends: set = field(default_factory=set)  # pairs from which a worker alone comes to its end

    def explore(self) -> Fault | None:
        workers = tuple(self.entering(number) for number in range(min(self.setting.together, len(self.setting.kinds))))
        start = State(self.disks(self.setting.protocol.start), workers, len(workers))
        self.came_from[start] = None
        queue = deque([start])
        while queue:
            state = queue.popleft()
            for step, after, wrong in self.successors(state):
                if wrong:
                    return Fault(wrong, [*self.trace(state), self.step_shown(state.disk, *step)])
                if after in self.came_from:
                    continue
                self.came_from[after] = (state, step)
                if alone := self.alone(after):
                    wrong, steps = alone
                    return Fault(wrong, [*self.trace(after), *(self.step_shown(*pair, 0) for pair in steps)])
                queue.append(after)
        return None

    def entering(self, number: int, kind: str = "") -> int:
        if number not in self.entered:
            worker = enter(number, kind or self.setting.kinds[number], self.setting.protocol.tries)
            self.entered[number] = self.workers(pending(self.setting.protocol, worker)[0])
        return self.entered[number]

    def successors(self, state: State) -> Iterator[tuple[tuple, State, str | None]]:
        for place, worker in enumerate(state.workers):
            others = state.workers[:place] + state.workers[place + 1 :]
            for which, (_, disk, next_worker, wrong) in enumerate(self.outcomes(state.disk, worker)):
                step = (worker, which)
                if next_worker is None:
                    yield step, self.joined_by_next(self.without(disk, worker), others, state.came), wrong
                else:
                    yield step, State(disk, tuple(sorted((*others, next_worker))), state.came), wrong
            yield (worker, None), self.joined_by_next(self.without(state.disk, worker), others, state.came), None

    def joined_by_next(self, disk: int, workers: tuple[int, ...], came: int) -> State:
        if came < len(self.setting.kinds):
            return State(disk, tuple(sorted((*workers, self.entering(came)))), came + 1)
        return State(disk, workers, came)

    def without(self, disk: int, worker: int) -> int:
        """The disk after a worker has died: its states that no checkpoint needs nobody will ever look at."""
        if (disk, worker) not in self.left:
            self.left[disk, worker] = self._without(disk, worker)
        return self.left[disk, worker]

    def _without(self, disk: int, worker: int) -> int:
        number = self.workers.values[worker][1][0][0]
        names, files, past = self.disks.values[disk]
        used = {value[1] for (_, name), value in names if name[0] in ("checkpoint", "done")}

        def unused(name: Any, states: Any) -> bool:
            return name[0] == "states" and name[-1] == number and states not in used

        names = frozenset(entry for entry in names if not unused(entry[0][1], entry[1]))
        files = frozenset(entry for entry in files if not unused(entry[0], entry[0]))
        if self.setting.protocol.inherit:  # there it matters who is dead for certain
            past |= {("dead", number)}
        return self.disks(Disk(names, files, past))

    def outcomes(self, disk: int, worker: int) -> list[tuple[Any, int, int | None, str | None]]:
        """What may come of the worker's next step."""
        found = self.steps.get((disk, worker))
        if found is None:
            found = self.steps[disk, worker] = list(self._outcomes(disk, worker))
        return found

    def _outcomes(self, disk: int, worker: int) -> Iterator[tuple[Any, int, int | None, str | None]]:
        protocol, before = self.setting.protocol, self.disks.values[disk]
        segment, arguments, told = self.workers.values[worker]
        _, operation = pending(protocol, (segment, arguments, told))
        for after, answer in outcomes(before, operation):
            wrong = None
            if after is not before:
                if after.names != before.names:
                    after = remembered(before, after)
                wrong = wrong_disk(protocol, before, after)
            next_worker, _ = pending(protocol, (segment, arguments, (*told, answer)))
            if next_worker and next_worker[0] == "damage":
                wrong = wrong or next_worker[1][1]
            yield answer, self.disks(after), None if next_worker is None else self.workers(next_worker), wrong

    def alone(self, state: State) -> tuple[str, list] | None:
        """What is wrong if all die and a fresh worker comes, or if all but one stand still: that one comes to its end.

        With the end of the fresh one the job has finished.
        """
        fresh = self.entering(FRESH, "overwrite")
        for worker in (fresh, *state.workers):
            disk, path = state.disk, []
            while worker is not None and (disk, worker) not in self.ends:
                path.append((disk, worker))
                _, disk, worker, wrong = self.outcomes(disk, worker)[0]
                if wrong:
                    return wrong, path
                if len(path) > 300:
                    return "A worker alone comes to no end", path[:40]
            if path and path[0][1] == fresh and worker is None:
                names = dict(self.disks.values[disk].names)
                if JOB in names or OUT not in names:
                    return "A fresh worker alone does not finish the job", path
            self.ends.update(path)
        return None

    def trace(self, state: State) -> list[str]:
        steps = []
        while self.came_from[state] is not None:
            state, step = self.came_from[state]
            steps.append(self.step_shown(state.disk, *step))
        return steps[::-1]

    def step_shown(self, disk: int, worker: int, which: int | None) -> str:
        segment, arguments, told = self.workers.values[worker]
        who = f"{arguments[0][1]} {arguments[0][0]}"
        if which is None:
            return f"{who} dies in {segment}"
        answer, after, _, _ = self.steps[disk, worker][which]
        _, operation = pending(self.setting.protocol, (segment, arguments, told))
        lost = answer is False and after != disk
        return f"{who}, {segment}: {step_shown(operation, answer)}{' (the reply was lost)' if lost else ''}"


RUNS, RESTARTS, OVERWRITES = ("run", "run", "run"), ("run", "restart", "run"), ("overwrite", "overwrite", "restart")
TWO_PARTS, THREE_PARTS, TWO_LANES = ((0, 1, 3),), ((0, 1, 2, 3),), ((0, 3), (3, 4))
STANDARD = {
    "begin and finish": Setting(Protocol(tries=1), RUNS),
    "restart": Setting(Protocol(tries=1), RESTARTS),
    "overwrite": Setting(Protocol(tries=1), OVERWRITES),
    "two parts": Setting(Protocol(TWO_PARTS, begun=True), RUNS),
    "two lanes": Setting(Protocol(TWO_LANES, 4, begun=True), RUNS),
    "listings that miss": Setting(Protocol(TWO_PARTS, begun=True, misses=True), ("run", "run")),
    "claims": Setting(Protocol(TWO_LANES, 4, begun=True, claims=True), ("run", "run")),
    "restart in a lane": Setting(Protocol(((0, 3),), begun=True, tries=1), ("run", "restart")),
    "lanes that meet": Setting(Protocol(TWO_LANES, 4, begun=True, meet=True), ("run", "run")),
    "inherited states": Setting(Protocol(THREE_PARTS, begun=True, left=True, inherit=True), ("run", "run")),
    "looking": Setting(Protocol(TWO_PARTS, begun=True, tries=1), ("run", "look", "restart")),
    "looking at parts": Setting(Protocol(TWO_PARTS, begun=True), ("run", "look", "run")),
    "looking at lanes": Setting(Protocol(TWO_LANES, 4, begun=True), ("run", "look", "run")),
}
BIG = {
    "three begin": Setting(Protocol(tries=1), RUNS, 3),
    "three begin or restart": Setting(Protocol(tries=1), RESTARTS, 3),
    "three overwrite": Setting(Protocol(tries=1), OVERWRITES, 3),
    "three of all kinds": Setting(Protocol(tries=1), ("run", "overwrite", "restart"), 3),
    "two restarts": Setting(Protocol(tries=1), ("restart", "restart", "run", "run")),
    "begin twice": Setting(Protocol(), RUNS),
    "restart, and begin twice": Setting(Protocol(), RESTARTS),
    "restart in lanes": Setting(Protocol(TWO_LANES, 4, begun=True), ("run", "restart")),
    "three in two parts": Setting(Protocol(TWO_PARTS, begun=True), RUNS, 3),
    "three in two lanes": Setting(Protocol(TWO_LANES, 4, begun=True), RUNS, 3),
    "three lanes that meet": Setting(Protocol(TWO_LANES, 4, begun=True, meet=True), RUNS),
    "claims of three": Setting(Protocol(TWO_LANES, 4, begun=True, claims=True), RUNS),
    "states inherited": Setting(Protocol(TWO_PARTS, begun=True, inherit=True), RUNS),
    "states inherited twice": Setting(Protocol(TWO_PARTS, begun=True, meet=True, inherit=True), RUNS),
    "looking at a restart": Setting(Protocol(TWO_PARTS, begun=True, meet=True), ("run", "look", "restart")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--big", action="store_true", help="three workers, and more beginnings")
    parser.add_argument("--only", help="this setting")
    arguments = parser.parse_args()
    settings = BIG if arguments.big else STANDARD
    faults = 0
    for name, setting in settings.items():
        if arguments.only in (None, name):
            began = time.monotonic()
            exploration = Exploration(setting)
            fault = exploration.explore()
            seconds = time.monotonic() - began
            print(f"{name}: {len(exploration.came_from)} states in {seconds:.1f} s: {fault or 'holds'}", flush=True)
            faults += fault is not None
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
