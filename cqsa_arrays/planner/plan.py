"""The plan: what will run, what it needs and what else was considered. Readable, and JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ..cover import Cover, set_size
from ..errors import one_line
from ..gpu_models import DEFAULT_MODEL, MODELS
from ..masks import Causal
from ..tables import html_of_text
from ..units import counted, format_bytes, format_seconds
from ..wording import Choice
from .candidates import Candidate
from .durability import Durability
from .edges import edge_covers
from .groups import Groups
from .memory import DISK, HOST, MEMORY, MemoryTerm, total_bytes
from .problem import Problem


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that the run may hold resident, where they come from, and the directory for states that do not fit.

    ``scratch`` is that directory, None for the system's own.
    Where a GPU computes, ``memory_bytes`` bounds the GPU and ``host_bytes`` its host.
    """

    memory_bytes: int
    origin: str | Choice
    scratch: str | None
    host_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How one attention problem will be run. ``print(plan)`` shows it; the same plan gives the same bits."""

    problem: Problem
    device: str
    budget: Budget
    chosen: Candidate
    alternative: Candidate | None
    reason: str
    kernel: str = ""
    durability: Durability | None = None

    @property
    def lanes(self) -> int:
        """How many lanes share the tasks of every group."""
        return self.durability.lanes if self.durability is not None else 1

    @property
    def lanes_meet(self) -> bool:
        """Whether several lanes see keys of the same rows, so that their states are merged at the end."""
        return self.lanes > 1 and self.cover_name == "cqs" and self.chosen.query_parts > 1

    @property
    def part_rows(self) -> int:
        """The most query rows between two places where a run may be stopped."""
        return self.chosen.part_rows

    @property
    def cover_name(self) -> str:
        return self.chosen.cover

    @property
    def memory_bytes(self) -> int:
        """The bound on resident memory that the run adds to the process."""
        return self.chosen.memory_bytes

    @property
    def states_in_result(self) -> bool:
        """Whether unfinished rows are accumulated in the result's own memory."""
        return self.problem.result.holds_states and self.cover_name == "cqs" and self.chosen.states == MEMORY

    @property
    def no_states(self) -> bool:
        """Whether each launch on a GPU finishes its rows."""
        return self.chosen.residency.state_row_bytes == 0

    @property
    def groups(self) -> Groups:
        """The groups of heads, in the order in which they run."""
        return Groups(self.problem.batch, self.chosen.batches, self.problem.heads, self.chosen.heads)

    def build_cover(self) -> Cover:
        """The cover of one group."""
        return self.chosen.build_cover(self.problem)

    def build_edge_covers(self) -> tuple[Cover, Cover] | None:
        """The covers of the first and of the last group, where they have their own."""
        return edge_covers(self.problem, self.chosen.edge_tiles, self.chosen.tile_tokens)

    @property
    def identity(self) -> str:
        """A short name of everything that decides the bits: problem, cover, chunks, groups, lanes."""
        c = self.chosen
        parts = [c.cover, c.query_parts, c.key_parts, c.batches, c.heads, c.tile_tokens, self.lanes, c.keys_stay]
        if c.edge_tiles > 1:  # not in jobs that are stored, whose names stay
            parts.append(c.edge_tiles)
        text = json.dumps([self.problem.to_dict(), self.device, parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "identity": self.identity,
            "device": self.device,
            "kernel": self.kernel,
            "problem": self.problem.to_dict(),
            "budget": {**asdict(self.budget), "origin": str(self.budget.origin)},
            "memory_bytes": self.memory_bytes,
            "flops": self.problem.flops,
            "reason": self.reason,
            "chosen": asdict(self.chosen),
            "alternative": asdict(self.alternative) if self.alternative else None,
            "durability": asdict(self.durability) if self.durability else None,
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [*self._problem_lines(), "", *self._cover_lines(), "", *self._memory_lines(), "", *self._price_lines()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        c = self.chosen
        memory = f"{format_bytes(self.memory_bytes)} of {format_bytes(self.budget.memory_bytes)}"
        return f"<Plan {self.identity}: {c.cover} on {self.device}, {memory}, about {format_seconds(c.estimated_s)}>"

    def _repr_html_(self) -> str:
        return html_of_text(str(self))

    def _problem_lines(self) -> list[str]:
        p = self.problem
        mask = f"causal, offset {p.mask.offset}" if isinstance(p.mask, Causal) else "full"
        threads = f", {counted(self.chosen.residency.threads, 'thread')}" if self.device == "cpu" else ""
        return [
            f"plan {self.identity} on {self.device}{threads}",
            *self._model_lines(),
            f"  attention    batch {p.batch}, heads {p.heads}, queries {p.query_tokens:,}, keys {p.key_tokens:,},"
            f" D {p.head_dim}, Dv {p.value_dim}, {mask}",
            f"  arithmetic   {p.q.dtype} -> {p.compute_dtype}, {p.flops:.3g} floating-point operations",
            *([f"  kernel       {self.kernel}"] if self.kernel else []),
            *(f"  {name:<12} {one_line(getattr(p, name).description)}" for name in ("q", "k", "v")),
            f"  output       {one_line(p.result.description)}, {p.result.dtype}, {format_bytes(p.output_bytes)}",
        ]

    def _model_lines(self) -> list[str]:
        """Says so where the device is a model that is not here."""
        model = MODELS.get(self.device.removeprefix("cuda:"))
        if model is None:
            return []
        rates = "" if model is MODELS[DEFAULT_MODEL] else f"; times are those of an {MODELS[DEFAULT_MODEL].title}"
        return [f"  model        {model.title}, {format_bytes(model.total_bytes)}, not a GPU of this machine{rates}"]

    def _cover_lines(self) -> list[str]:
        c, p = self.chosen, self.problem
        if c.cover == "cqs":
            size = set_size(c.query_parts)
            share = f"{size / c.query_parts:.1%} of the tokens"
            shape = f"{counted(c.query_parts, 'task')} of {counted(size, 'chunk')} ({share})"
        else:
            stay = ", which stay" if c.keys_stay else ""
            shape = f"{counted(c.query_parts, 'query tile')}, each against {counted(c.key_parts, 'key block')}{stay}"
        places = {
            MEMORY: "in memory", HOST: "in page-locked memory of the host", DISK: "in a scratch file, two slots each",
        }[c.states]  # fmt: skip
        places = "none: each launch finishes its rows" if self.no_states else places
        groups = counted(len(self.groups), "group")
        together = f"{c.batches * c.heads} of {counted(p.batch * p.heads, 'head')} together, {groups}"
        if c.edge_tiles > 1:
            together += f", the first and the last in {c.edge_tiles} tiles"
        return [
            f"  cover        {c.cover}: {shape}",
            f"  chunks       {c.residency.query_chunk:,} query and {c.residency.key_chunk:,} key tokens",
            f"  heads        {together}",
            f"  states       {places}",
            *([f"  lanes        {self.lanes}, each with an equal share of the tasks"] if self.lanes > 1 else []),
            *([f"  saved        {self.durability}"] if self.durability is not None else []),
            f"  why          {self.reason}",
        ]

    def _memory_lines(self) -> list[str]:
        terms = [_term_line(term) for term in self.chosen.terms]
        budget = f"{format_bytes(self.budget.memory_bytes)} ({self.budget.origin})"
        lines = [
            "  memory",
            *terms,
            f"    {'total':<24}{format_bytes(self.memory_bytes):>12}  of {budget}",
        ]
        if self.chosen.host_terms:
            lines += ["  host memory", *(_term_line(term) for term in self.chosen.host_terms)]
            lines.append(f"    {'total':<24}{format_bytes(total_bytes(self.chosen.host_terms)):>12}")
            lines.append("  besides      the CUDA context and the code of the kernels, once for each process")
        return lines

    def _price_lines(self) -> list[str]:
        header = f"  {'price':<16}{'time':>12}{'inputs read':>14}{'states moved':>14}{'written':>12}{'disk space':>12}"
        rows = [header, self._price_row(self.chosen, "chosen")]
        if self.alternative is not None:
            rows.append(self._price_row(self.alternative, "not chosen"))
        return rows

    def _price_row(self, c: Candidate, remark: str) -> str:
        t = c.traffic
        disk = c.scratch_bytes + t.output_written_bytes
        cells = (
            f"{format_seconds(c.estimated_s):>12}", f"{format_bytes(t.input_read_bytes):>14}",
            f"{format_bytes(t.state_read_bytes + t.state_written_bytes):>14}",
            f"{format_bytes(t.output_written_bytes):>12}", f"{format_bytes(disk):>12}",
        )  # fmt: skip
        return f"    {c.cover:<14}{''.join(cells)}  {remark}"


def _term_line(term: MemoryTerm) -> str:
    return f"    {term.name:<24}{format_bytes(term.size_bytes):>12}"
