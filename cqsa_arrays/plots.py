"""Pictures: the result of the demonstration, and the cover that divides the work.

``python -m cqsa_arrays.plots cover.svg`` draws the cover. Matplotlib comes with the extra ``plot``; figures are
made without pyplot, so that nothing of the caller's Matplotlib is touched.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from .cover import Cover, CqsCover, RectangularCover
from .errors import CqsaError, one_line
from .masks import Full, Mask
from .ranges import Cut
from .units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .demo.report import MemoryReport, SignalReport
    from .demo.run import Signals

INK, FAINT, ACCENT, SECOND = "#1f2933", "#b8c0c8", "#0f766e", "#c2703d"

SUFFIXES = (".svg", ".png", ".pdf")
"""Of pictures that can be written."""

SHOWN_FROM_S, SHOWN_S = 45.0, 5.0
"""The seconds of the recording that are drawn: normal beats and premature ones. A shorter one shows its beginning."""


class PlotError(CqsaError, ImportError):
    """Matplotlib is not installed, or cannot be loaded."""


def need_no_backend() -> None:
    """Let Matplotlib load, whatever backend the surroundings name; for processes that are the command's own.

    Figures are made without one. Notebooks name theirs to all their children, and Matplotlib does not load where that
    is not installed.
    """
    os.environ["MPLBACKEND"] = "agg"


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure; Matplotlib is imported here. Raises PlotError where it is missing or cannot be loaded."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PlotError("no plot: Matplotlib is missing. Install it with: pip install matplotlib") from error
    except (ImportError, OSError, ValueError) as error:  # built for another NumPy, no place for its files, its settings
        raise PlotError(f"no plot: Matplotlib cannot be loaded: {one_line(str(error))}") from error
    return Figure(figsize=(width_in, height_in), layout="constrained")


def plot_demo(
    path: str | os.PathLike[str], signals: Signals, signal_report: SignalReport, memory_report: MemoryReport
) -> None:
    """Write a PNG: a few seconds of the signals, how much noise is left, and memory beside the score matrix's.

    Raises PlotError without Matplotlib, OSError where the file cannot be written.
    """
    figure = new_figure(10, 7.2)
    grid = figure.add_gridspec(3, 2, height_ratios=(1.25, 1.25, 1))
    top = figure.add_subplot(grid[0, :])
    below = figure.add_subplot(grid[1, :], sharex=top, sharey=top)
    _draw_traces(top, below, signals, signal_report)
    _draw_noise(figure.add_subplot(grid[2, 0]), signal_report)
    _draw_memory(figure.add_subplot(grid[2, 1]), memory_report)
    figure.suptitle(
        f"Every {signal_report.window}-sample window of an electrocardiogram compared with all"
        f" {signal_report.samples:,}",
        color=INK, fontsize=13, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def _draw_traces(top: Axes, below: Axes, signals: Signals, report: SignalReport) -> None:
    rate, samples = report.sampling_hz, report.samples
    first = int(SHOWN_FROM_S * rate) if samples >= (SHOWN_FROM_S + SHOWN_S) * rate else 0
    shown = slice(first, min(samples, first + int(SHOWN_S * rate)))
    seconds = np.arange(shown.start, shown.stop) / rate
    top.plot(seconds, signals.noisy[shown], color=SECOND, linewidth=0.8, label="with noise added")
    below.plot(seconds, signals.clean[shown], color=FAINT, linewidth=2.6, label="recording")
    below.plot(seconds, signals.denoised[shown], color=ACCENT, linewidth=1.1, label="denoised by attention")
    for axes in (top, below):
        _plain(axes)
        axes.set_ylabel("lead II (mV)", color=INK)
        axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=10)
        axes.margins(x=0)
    low, high = top.get_ylim()
    top.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
    top.tick_params(labelbottom=False)
    below.set_xlabel("time (s)", color=INK)


def _draw_noise(axes: Axes, report: SignalReport) -> None:
    names = ("with noise", f"best moving\naverage ({report.smoothed_width})", "attention")
    values = (report.noisy_db, report.smoothed_db, report.denoised_db)
    _draw_bars(axes, names, values, (SECOND, FAINT, ACCENT), [f"{value:.1f} dB" for value in values])
    axes.set_xlim(0, max(*values, 1) * 1.22)
    axes.set_xlabel("signal-to-noise ratio (dB)", color=INK)


def _draw_memory(axes: Axes, report: MemoryReport) -> None:
    sizes = {"all scores": report.score_matrix_bytes, "budget": report.budget_bytes, "measured": report.peak_bytes}
    if report.peak_bytes is None:
        sizes = {**sizes, "planned": report.planned_bytes}
    found = {name: size for name, size in sizes.items() if size is not None}
    texts = [format_bytes(size) for size in found.values()]
    values = tuple(size / 2**20 for size in found.values())
    _draw_bars(axes, tuple(found), values, (SECOND, FAINT, ACCENT), texts)
    axes.set_xscale("log")
    axes.set_xlim(min(1.0, min(values) / 2), max(values) * 12)
    axes.set_xlabel("memory (MiB, logarithmic)", color=INK)


def _draw_bars(
    axes: Axes, names: tuple[str, ...], values: tuple[float, ...], colors: tuple[str, ...], texts: list[str]
) -> None:
    bars = axes.barh(names, values, color=colors, height=0.62)
    axes.bar_label(bars, texts, padding=4, color=INK, fontsize=10)
    axes.invert_yaxis()
    _plain(axes)
    axes.tick_params(axis="y", length=0)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK)


def draw_cover(path: str | os.PathLike[str], *, chunks: int = 13, mask: Mask | None = None, task: int = 4) -> None:
    """Write a picture (SVG, PNG or PDF by its name) of the two covers of ``chunks`` x ``chunks`` chunk pairs.

    Each cell is a (query chunk, key chunk) pair in the colour of the task that owns it, as the covers' own steps say;
    ``task`` is dark, and the chunks that it holds are marked along the edges. Pairs that ``mask`` hides stay white.
    Raises PlotError without Matplotlib.
    """
    figure = new_figure(10, 5.4)
    cut, mask = Cut(chunks, chunks, 1), mask or Full()
    covers: tuple[Cover, ...] = (CqsCover(cut, cut, mask), RectangularCover(cut, cut, mask))
    for axes, cover in zip(figure.subplots(1, 2), covers, strict=True):
        _draw_grid(axes, cover, task)
    figure.text(
        0.5, -0.03, f"Each cell is a pair of chunks; its number is the task that owns it. Dark: task {task}.",
        ha="center", va="top", color=INK, fontsize=11,
    )  # fmt: skip
    import matplotlib

    metadata = {"Date": None} if os.fspath(path).endswith(".svg") else None
    with matplotlib.rc_context({"svg.hashsalt": "cover"}):  # with it, and no date, each run writes the same bytes
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1, metadata=metadata)


def owners(cover: Cover) -> np.ndarray:
    """(query chunks, key chunks) int: the task that owns each pair, -1 for pairs that the mask hides.

    >>> owners(RectangularCover(Cut(2, 2, 1), Cut(2, 2, 1), Full())).tolist()
    [[0, 0], [1, 1]]
    """
    grid = np.full((len(cover.queries), len(cover.keys)), -1)
    for task in cover.tasks():
        for step in task.steps():
            for keys in step.keys:
                grid[cover.queries.index_of(step.queries), cover.keys.index_of(keys)] = task.index
    return grid


def _draw_grid(axes: Axes, cover: Cover, task: int) -> None:
    grid = owners(cover)
    for owner in range(cover.task_count):
        _fill(axes, np.argwhere(grid == owner), INK if owner == task else _pale(owner / cover.task_count))
    for (row, column), owner in np.ndenumerate(grid):
        if owner >= 0:
            color, weight = ("white", "bold") if owner == task else ("#6b7680", "normal")
            style: dict[str, Any] = {"color": color, "fontweight": weight, "fontsize": 9}
            axes.text(column + 0.5, row + 0.52, str(owner), ha="center", va="center", **style)
    chosen = cover.task(task)
    rows = [cover.queries.index_of(queries) for queries in chosen.query_ranges()]
    columns = [cover.keys.index_of(keys) for keys in chosen.key_ranges()]
    _fill(axes, [(row, -0.85) for row in rows], ACCENT, width=0.5)
    _fill(axes, [(-0.85, column) for column in columns], ACCENT, height=0.5)
    _label_grid(axes, cover, _title(cover, task, len(rows), len(columns), len({*rows, *columns})))


def _fill(axes: Axes, places: Any, color: Any, *, width: float = 0.92, height: float = 0.92) -> None:
    """Rectangles at ``places`` (row, column), as one path: a picture of many cells stays small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    size = Affine2D().scale(width, height)
    cells = (Path.unit_rectangle().transformed(size + Affine2D().translate(x + 0.04, y + 0.04)) for y, x in places)
    axes.add_patch(PathPatch(Path.make_compound_path(*cells), facecolor=color, linewidth=0))


def _title(cover: Cover, task: int, rows: int, columns: int, both: int) -> str:
    if cover.name == "cqs":
        return f"CQS: task {task} holds {both} of {len(cover.keys)} chunks,\nand pairs them with each other"
    return f"Rectangular: task {task} holds {rows} query chunk,\nand reads {columns} of {len(cover.keys)} key chunks"


def _label_grid(axes: Axes, cover: Cover, title: str) -> None:
    axes.set_title(title, color=INK, fontsize=12.5, loc="left", fontweight="bold", linespacing=1.35, pad=10)
    axes.set_xlim(-0.85, len(cover.keys) + 0.05)
    axes.set_ylim(len(cover.queries) + 0.05, -0.85)
    axes.set_aspect("equal")
    axes.set_xticks(np.arange(len(cover.keys)) + 0.5, [str(i) for i in range(len(cover.keys))])
    axes.set_yticks(np.arange(len(cover.queries)) + 0.5, [str(i) for i in range(len(cover.queries))])
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("key chunk", color=INK, fontsize=11)
    axes.set_ylabel("query chunk", color=INK, fontsize=11)


def _pale(share: float) -> tuple[float, float, float]:
    """A light colour for each task, round the colour circle."""
    from colorsys import hls_to_rgb

    return hls_to_rgb(share, 0.86, 0.55)


def main(arguments: list[str]) -> int:
    """``python -m cqsa_arrays.plots FILE``: draw the cover."""
    description = "Draw the cover that divides the work: CQS Divide beside rectangles."
    parser = argparse.ArgumentParser(prog="python -m cqsa_arrays.plots", description=description)
    parser.add_argument("file", metavar="FILE.svg", help="picture to write, by its suffix .svg, .png or .pdf")
    try:
        path = parser.parse_args(arguments).file
        if not path.lower().endswith(SUFFIXES):
            parser.error(f"found {path!r}; expected a name that ends with {', '.join(SUFFIXES)}")
        need_no_backend()
        draw_cover(path)
    except (PlotError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except SystemExit as left:  # of argparse
        return int(left.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
