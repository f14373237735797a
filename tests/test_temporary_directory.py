"""The system's temporary directory is asked for by what puts states there, and by nothing else."""

import tempfile

import numpy as np
import pytest

import cqsa_arrays as cqsa
from cqsa_arrays.cli import main

X, MEMORY = np.ones((1, 1, 20000, 16), "f4"), "1.5MiB"
ON_DISK = {"memory": MEMORY, "options": cqsa.Options(cover="cqs", threads=1)}


@pytest.fixture(autouse=True)
def _no_temporary_directory(tmp_path, monkeypatch) -> None:
    """A read-only container, a full disk."""

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)


def test_calls_in_memory_do_without() -> None:
    x = X[:, :, :100]
    assert np.allclose(cqsa.attention(x, x, x), 1)
    assert np.allclose(cqsa.attention(x, x, x, causal=True, out=np.empty_like(x)), 1)
    assert np.allclose(cqsa.statistics(x, x, x).output(), 1)
    assert cqsa.plan(x, x, x).to_dict()["budget"]["scratch"] is None
    assert cqsa.compare(x, x).passed


def test_calls_of_files_do_without(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        "make in.h5 --tokens 200 --head-dim 8", "plan in.h5", "info in.h5", "attend in.h5 -o out.h5",
        "verify out.h5", "compare out.h5:/out out.h5:/out",
    ):  # fmt: skip
        assert main(command.split()) == 0, command


def test_states_that_do_not_fit_say_where_they_would_go() -> None:
    out = np.empty_like(X, "f2")
    assert cqsa.plan(X, X, X, out=out, **ON_DISK).chosen.states_on_disk
    with pytest.raises(cqsa.StorageError) as caught:
        cqsa.attention(X, X, X, out=out, **ON_DISK)
    assert str(caught.value) == (
        "scratch: the states do not fit in memory, and no temporary directory can be written (No usable temporary"
        " directory found in ['/tmp', '/var/tmp']). Name a directory that can, or raise memory so that"
        " states stay there."
    )


def test_a_directory_that_is_named_does_as_well(tmp_path) -> None:
    options = cqsa.Options(cover="cqs", threads=1, scratch=tmp_path)
    out = cqsa.attention(X, X, X, out=np.empty_like(X, "f2"), memory=MEMORY, options=options)
    assert (out == 1).all()
