"""Pictures: what is drawn is what the covers say, the files are good, and Matplotlib's state is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cqsa_arrays.cover import CqsCover, RectangularCover
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.plots import PlotError, draw_cover, main, owners
from cqsa_arrays.ranges import Cut

image = pytest.importorskip("matplotlib.image")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", [CqsCover, RectangularCover])
def test_every_pair_has_one_owner_and_every_task_as_many(kind):
    cut = Cut(70, 7, 10)
    grid = owners(kind(cut, cut, Full()))
    assert np.bincount(grid.ravel(), minlength=7).tolist() == [7] * 7


def test_owners_of_seven_chunks():
    grid = owners(CqsCover(Cut(7, 7, 1), Cut(7, 7, 1), Full()))
    # D = {0, 1, 3}: chunks 0, 1 and 3 meet in task 0, and of the diagonal (0, 0) is its.
    assert np.argwhere(grid == 0).tolist() == [[0, 0], [0, 1], [0, 3], [1, 0], [1, 3], [3, 0], [3, 1]]


def test_hidden_pairs_have_no_owner():
    grid = owners(CqsCover(Cut(7, 7, 1), Cut(7, 7, 1), Causal()))
    np.testing.assert_array_equal(grid == -1, np.triu(np.ones((7, 7), bool), k=1))


@pytest.mark.parametrize(("chunks", "mask", "task"), [(13, None, 4), (7, Causal(), 0), (7, Causal(-3), 6)])
def test_cover_picture_is_not_blank(tmp_path, chunks, mask, task):
    draw_cover(path := tmp_path / "cover.png", chunks=chunks, mask=mask, task=task)
    pixels = image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.1


def test_mask_leaves_cells_white(tmp_path):
    white = []
    for name, mask in (("full.png", Full()), ("causal.png", Causal())):
        draw_cover(tmp_path / name, mask=mask)
        white.append((image.imread(tmp_path / name)[..., :3] == 1).all(axis=2).mean())
    assert white[1] > white[0] + 0.2


def test_svg_is_small_and_the_same_each_time(tmp_path):
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    assert [main([str(path)]) for path in paths] == [0, 0]
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first.startswith(b"<?xml")
    assert len(first) < 200_000


def test_picture_in_the_documents_is_up_to_date(tmp_path):
    draw_cover(path := tmp_path / "cover.svg")
    numbers = path.read_text().count("<use ")
    assert (ROOT / "docs" / "cover.svg").read_text().count("<use ") == numbers > 338


def test_command_says_how_it_is_used(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_is_no_name_of_a_file(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    assert "FILE.svg" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--svg"], ["a.svg", "b.svg"], ["cover"], [""], ["cover.txt"], ["no/cover.svg"]])
def test_what_cannot_be_drawn_is_refused(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "python -m cqsa_arrays.plots: " in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match="pip install matplotlib"):
        draw_cover(tmp_path / "cover.png")


def test_the_command_draws_whatever_backend_a_notebook_has_named(tmp_path):
    words = [sys.executable, "-m", "cqsa_arrays.plots", str(tmp_path / "cover.svg")]
    subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, "MPLBACKEND": "nonsense"})
    assert (tmp_path / "cover.svg").stat().st_size > 1000


def test_the_command_says_in_one_line_why_there_is_no_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(tmp_path / "cover.svg")]) == 2
    assert capsys.readouterr().err == (
        "python -m cqsa_arrays.plots: no plot: Matplotlib is missing. Install it with: pip install matplotlib\n"
    )


def test_pyplot_stays_untouched(tmp_path):
    code = f"""
import sys, cqsa_arrays.plots
assert "matplotlib" not in sys.modules, "imported too early"
cqsa_arrays.plots.draw_cover({str(tmp_path / "cover.png")!r})
assert "matplotlib.figure" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
