"""What people see of objects: short texts, tables in notebooks, names that complete."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import types

import h5py
import numpy as np
import pytest
from command_line import environment

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.storage import describe
from cqsa_arrays.tables import html_of_text, html_table

LONGEST = 220


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> str:
    """A folder with kv.h5, which has no queries, and an output."""
    folder = tmp_path_factory.mktemp("shown")
    x = np.ones((2, 60, 8), "float32")
    with h5py.File(folder / "kv.h5", "w") as file:
        file["k"], file["v"], file["deep/q"], file["ids"] = x, x, x, np.arange(3)
    with h5py.File(folder / "qkv.h5", "w") as file:
        file["q"] = file["k"] = file["v"] = x
    q, k, v = (f"{folder / 'qkv.h5'}:/{name}" for name in "qkv")
    cqsa.attention(q, k, v, out=folder / "out.h5", options=Options(durable=True), device="cpu")
    return str(folder)


def shown(folder: str) -> dict[str, object]:
    """Everything that the public functions give, by what a short text of it must have."""
    x = np.ones((2, 60, 8), "float32")
    opened = cqsa.open(f"{folder}/kv.h5")
    return {
        "<Plan [0-9a-f]{16}: cqs on cpu, .*MiB of .*, about .* s>": cqsa.plan(x, x, x, device="cpu"),
        r"<BlockStatistics of numpy: rows \(2, 60\), Dv 8, float32>": cqsa.statistics(x, x, x, device="cpu"),
        r"<DiskArray .*kv.h5:/k hnd\(2, 60, 8\) float32, memory-mapped>": opened.k,
        r"<OpenedFile .*kv.h5: k hnd\(2, 60, 8\) float32, v hnd\(2, 60, 8\) float32>": opened,
        r"<ErrorReport PASSED: relative Frobenius error .* over 120 rows>": cqsa.verify(f"{folder}/out.h5", rows=None),
        "<JobStatus '.*out.h5': 100.00% done, finished>": cqsa.status(f"{folder}/out.h5"),
        "<FileInfo '.*kv.h5': 4 data sets, .*B>": describe(f"{folder}/kv.h5"),
        r"Options\(\)": Options(),
        r"Options\(threads=2, durable=True\)": Options(durable=True, threads=2),
    }


def test_texts_are_short(files) -> None:
    for pattern, one in shown(files).items():
        assert re.fullmatch(pattern, repr(one)), repr(one)
        assert len(repr(one)) < LONGEST


def test_options_are_their_text() -> None:
    given = Options(threads=3, scratch="/tmp")
    assert eval(repr(given), {"Options": Options}) == given


def test_tables_in_notebooks_are_escaped(files) -> None:
    tables = [one._repr_html_() for one in shown(files).values() if hasattr(type(one), "_repr_html_")]
    assert len(tables) >= 4
    assert all(text.startswith("<table><caption>") and text.endswith("</table>") for text in tables)
    assert "<tr><td>total</td><td>" in tables[0]
    assert html_table("<b>", [("&", 1)], ("<i>",)) == (
        "<table><caption>&lt;b&gt;</caption><tr><th>&lt;i&gt;</th></tr><tr><td>&amp;</td><td>1</td></tr></table>"
    )
    assert html_of_text("a\n  <b>  2  c d") == (
        "<table><caption>a</caption><tr><td>&lt;b&gt;</td><td>2</td><td>c d</td></tr></table>"
    )


def test_a_file_gives_what_it_has(files) -> None:
    opened = cqsa.open(f"{files}/kv.h5")
    assert opened.k.shape == opened.v.shape == (2, 60, 8)
    assert not hasattr(opened, "q")
    assert {"k", "v"} <= set(dir(opened))
    with pytest.raises(
        AttributeError, match=r"q: found /q in .*kv.h5 is missing \(data sets present: .*/deep/q, .*/k,"
    ):
        opened.q  # noqa: B018
    with pytest.raises(cqsa.ArgumentError, match="q: found /q"):
        opened.q  # noqa: B018
    with pytest.raises(cqsa.ArgumentError, match="ids"):
        opened.ids  # noqa: B018 - is there, and no input of attention
    found = cqsa.open(f"{files}/out.h5")
    assert found.out.shape == (2, 60, 8)
    assert found.lse.shape == (2, 60)
    assert np.array_equal(pickle.loads(pickle.dumps(found)).out[...], found.out[...])


def test_only_what_is_public_completes() -> None:
    assert [name for name in dir(cqsa) if not name.startswith("__")] == sorted(set(cqsa.__all__) - {"__version__"})
    code = "import cqsa_arrays as cqsa, sys; dir(cqsa); assert 'numba' not in sys.modules and 'h5py' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


class Stream:
    """What a notebook has for standard error: no terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(("shell", "bar"), [(types.SimpleNamespace(kernel=1), True), (object(), False), (None, False)])
def test_a_notebook_shows_progress(monkeypatch, shell, bar) -> None:
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", stream := Stream())
    x = np.ones((2, 300, 8), "float32")
    cqsa.attention(x, x, x, device="cpu", options=Options(progress=True))
    assert ("attend: 100%" in stream.text) == bar
    assert bool(stream.text) == bar


def test_a_notebook_that_is_run(tmp_path, monkeypatch) -> None:
    """By Jupyter, where it is installed."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([environment()["PYTHONPATH"], *sys.path]))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    cells = (
        "import numpy as np, cqsa_arrays as cqsa",
        "x = np.ones((2, 300, 8), 'float32')\n"
        "cqsa.attention(x, x, x, device='cpu', options=cqsa.Options(progress=True)).shape",
        "cqsa.plan(x, x, x)",
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(
        book, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown_of = [cell.outputs for cell in book.cells]
    assert "attend: 100%" in "".join(one.get("text", "") for one in shown_of[1])
    assert "<table><caption>plan " in shown_of[2][0]["data"]["text/html"]
