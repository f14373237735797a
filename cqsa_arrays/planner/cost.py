"""What a plan moves and how long it should take: only good enough to choose between covers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .memory import DISK, HOST, Residency, state_row_bytes
from .problem import Problem


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine does, a second. Until the machine is calibrated these are typical figures of one server core."""

    float32_flops_per_thread: float = 150e9
    float64_flops_per_thread: float = 70e9
    disk_read_bytes: float = 1.9e9
    disk_write_bytes: float = 1.2e9
    cached_bytes: float = 8e9
    # Of states: handed to the system, read back, checked and put on the disk.
    saved_bytes: float = 0.7e9
    step_s: float = 1e-4
    # One GPU of the Hopper generation, by element type of the inputs, and its link to the host.
    device_flops: tuple[tuple[str, float], ...] = (
        ("float16", 500e12), ("bfloat16", 500e12), ("float32", 75e12), ("float64", 35e12),
    )  # fmt: skip
    # Short vectors do not make a pair of a query and a key quicker than this: its exponential takes as long.
    device_pair_s: float = 0.41e-12
    # Parts of a step are multiples of it; a kernel rescales up to 32 rows together, so that parts must be, too.
    device_wave_rows: int = 132 * 192
    # Each launch begins and ends every row that it takes: operands come, a state is read and written.
    row_launch_s: float = 0.65e-9
    link_bytes: float = 50e9
    copied_bytes: float = 25e9
    # Of Python and the driver, beside the device: a launch, and rows whose operands come and whose result leaves.
    launch_s: float = 1e-3
    tile_s: float = 2.5e-3

    def flops(self, dtype: str, threads: int) -> float:
        per_thread = self.float32_flops_per_thread if dtype == "float32" else self.float64_flops_per_thread
        return per_thread * threads

    def device_s(self, dtype: str, flops_per_pair: int) -> float:
        """Seconds of a GPU for one (query, key) pair."""
        return max(flops_per_pair / dict(self.device_flops)[dtype], self.device_pair_s)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a run moves between memory and files; 0 for arrays that are used where they lie."""

    input_read_bytes: int
    state_read_bytes: int
    state_written_bytes: int
    output_written_bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """How a cover repeats itself: how often each token is loaded, and in how many kernel calls of how many rows.

    The first call sees ``first_keys`` keys. ``same_rows``: most calls continue the rows of the call before;
    ``keys_stay``: each sees all keys of its rows, which are loaded by the first that needs them.
    """

    query_loads: float
    key_loads: float
    state_moves: float
    steps: int
    rows_per_step: int
    first_keys: int
    same_rows: bool = False
    keys_stay: bool = False


def traffic(problem: Problem, work: Work) -> Traffic:
    """Bytes moved; causal masks leave out what no row sees, which ``work`` has taken into account."""
    key_bytes = problem.k.file_bytes + problem.v.file_bytes
    state_bytes = problem.batch * problem.heads * problem.query_tokens * state_row_bytes(problem)
    moves = max(0.0, work.state_moves)
    return Traffic(
        input_read_bytes=int(work.query_loads * problem.q.file_bytes + work.key_loads * key_bytes),
        state_read_bytes=int(moves * state_bytes),
        state_written_bytes=int(moves * state_bytes),
        output_written_bytes=problem.output_bytes if problem.result.place == "file" else 0,
    )


def estimate_s(
    problem: Problem, residency: Residency, work: Work, moved: Traffic, rates: Rates, cache_bytes: int
) -> float:
    """Seconds: arithmetic and disk side by side, then what cannot overlap: first loads, copies, calls."""
    once = problem.file_bytes
    # What fits the page cache is read from the disk once.
    disk_read = min(once, moved.input_read_bytes) if once <= cache_bytes else moved.input_read_bytes
    disk_s = disk_read / rates.disk_read_bytes + moved.output_written_bytes / rates.disk_write_bytes
    state_bytes = moved.state_read_bytes + moved.state_written_bytes
    if state_bytes and 2 * once > cache_bytes:
        disk_s += moved.state_read_bytes / rates.disk_read_bytes + moved.state_written_bytes / rates.disk_write_bytes
    copies_s = (moved.input_read_bytes + state_bytes) / rates.cached_bytes
    items = residency.heads * max(1, -(-work.rows_per_step // 768))
    idle = -(-items // residency.threads) * residency.threads / items
    compute_s = problem.flops / rates.flops(problem.compute_dtype, residency.threads) * idle
    first_rows = residency.heads * residency.key_chunk * residency.key_slots * problem.compute_itemsize
    first_s = first_rows * (problem.head_dim + problem.value_dim) / rates.disk_read_bytes if once else 0.0
    return max(compute_s, disk_s) + copies_s + first_s + work.steps * rates.step_s


def estimate_device_s(
    problem: Problem, residency: Residency, work: Work, moved: Traffic, rates: Rates, cache_bytes: int, states: str
) -> float:
    """Seconds on a GPU: arithmetic, link and disk side by side; then what nothing hides.

    That is the way of the first blocks to the device and of the last rows from it, and multiprocessors that fall idle
    where a launch has few blocks of rows.
    """
    from_disk = problem.on_disk_bytes / max(1, problem.file_bytes)
    once, moved_in = from_disk * problem.file_bytes, from_disk * moved.input_read_bytes
    disk_read = min(once, moved_in) if once <= cache_bytes else moved_in
    disk_s = disk_read / rates.disk_read_bytes + moved.output_written_bytes / rates.disk_write_bytes
    state_s = {
        HOST: max(moved.state_read_bytes, moved.state_written_bytes) / rates.link_bytes,  # both ways at once
        DISK: moved.state_read_bytes / rates.disk_read_bytes + moved.state_written_bytes / rates.disk_write_bytes,
    }.get(states, 0.0)
    output_bytes = 0 if problem.result.on_device else problem.output_bytes
    link_s = (moved.input_read_bytes + output_bytes) / rates.link_bytes
    rows = residency.heads * min(work.rows_per_step, problem.query_tokens)
    pair_s = rates.device_s(problem.q.dtype, 2 * (problem.head_dim + problem.value_dim))
    compute_s = problem.pairs * pair_s * (1 + _idle(rows, work, rates))
    compute_s += work.steps * rows * rates.row_launch_s
    groups = problem.batch * problem.heads / residency.heads
    tiles = groups * -(-problem.query_tokens // residency.query_chunk)
    host_s = work.steps * rates.launch_s + tiles * rates.tile_s
    copied_s = moved.input_read_bytes / rates.copied_bytes
    first_tokens = {"q": residency.query_chunk, "k": work.first_keys, "v": work.first_keys}
    first_bytes = sum(
        operand.file_bytes / (problem.batch * problem.heads * operand.shape[2]) * residency.heads * first_tokens[name]
        for name, operand in (("q", problem.q), ("k", problem.k), ("v", problem.v))
    )
    last_bytes = output_bytes / (problem.batch * problem.heads * problem.query_tokens)
    last_bytes *= residency.heads * residency.state_rows
    arrival_s = (1 - from_disk) / rates.copied_bytes + from_disk / rates.disk_read_bytes
    departure_s = 1 / rates.copied_bytes + (problem.result.place == "file") / rates.disk_write_bytes
    in_order = work.keys_stay and work.first_keys < problem.key_tokens
    if in_order:
        # Launches grow from none to twice the average; the first of them wait for the host.
        compute_s = compute_s * (1 + (host_s / (2 * compute_s)) ** 2) if host_s < 2 * compute_s else host_s
    late_s = _late_s(once / groups / rates.disk_read_bytes, compute_s / groups, in_order)
    ends_s = first_bytes * arrival_s + last_bytes * departure_s + late_s
    return max(compute_s, disk_s, link_s + state_s, host_s, copied_s) + ends_s


def _late_s(read_s: float, compute_s: float, in_order: bool) -> float:
    """What a first group of so many seconds waits for the disk; later ones are read ahead meanwhile.

    It needs nearly all of its tokens in about the first third of its time. Where it takes them ``in_order``, causal
    work grows with their square, and from where it grows faster than time there is always some.
    """
    if not in_order:
        return max(0.0, read_s - compute_s / 3)
    return read_s**2 / (4 * compute_s) if read_s < 2 * compute_s else read_s - compute_s


def _idle(rows: int, work: Work, rates: Rates) -> float:
    """Share of the arithmetic by which multiprocessors idle: launches of few rows do not fill them.

    Those that continue the same rows follow each other, each with a last wave of its own; others fill each other's.
    """
    waves = rows / rates.device_wave_rows
    alone = math.ceil(waves) / waves - 1
    return alone if work.same_rows else max(0.1 * alone, 0.5 / waves - 1)
