"""``cqsa.status`` and ``cqsa.resume``: jobs named by their output, from Python."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from durable_cases import CASES, KilledAtCommit, command, digest, make, run, unbroken

import cqsa_arrays as cqsa
from cqsa_arrays.partial import verify_partial

CASE = CASES[0]


@pytest.fixture
def dead(here) -> str:
    """A job that was killed after some commits, and the hash of what it should become."""
    make(CASE)
    expected = unbroken(CASE)
    assert run(command(CASE), KilledAtCommit(5)) < 0
    return expected


def test_an_unfinished_job(dead) -> None:
    found = cqsa.status(Path("out.h5"))
    assert (found.state, found.running, found.finished) == ("stopped", False, False)
    assert 0 < found.share < 1
    assert found.share == found.done_pairs / found.pairs
    assert repr(found) == f"<JobStatus 'out.h5': {found.share:.2%} done, stopped>"
    assert "go on: cqsa resume out.h5" in str(found)
    stored = json.loads(found.to_json())
    assert (stored["state"], stored["done_pairs"], stored["running"]) == ("stopped", found.done_pairs, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.state = "finished"


def test_it_goes_on_from_python(dead) -> None:
    before = cqsa.status("out.h5").done_pairs
    with pytest.raises(cqsa.JobStopped, match="time"):
        cqsa.resume("out.h5", max_time=0)
    assert cqsa.status("out.h5").done_pairs == before
    out = cqsa.resume("out.h5")
    assert digest() == dead
    assert np.array_equal(out[...], cqsa.resume(Path("out.h5"))[...])  # finished: the same again
    assert sorted(set(os.listdir()) - {"run.log"}) == ["out.h5", "qkv.h5"]


def test_a_finished_job(dead) -> None:
    unfinished = cqsa.status("out.h5")
    cqsa.resume("out.h5")
    found = cqsa.status("out.h5")
    assert (found.state, found.finished, found.share) == ("finished", True, 1.0)
    assert [(lane.lane, lane.done, lane.pairs) for lane in found.lanes] == [(0, True, None)]
    assert (found.pairs, found.done_pairs, found.flops) == (unfinished.pairs, unfinished.pairs, unfinished.flops)
    assert found.device == "cpu"
    assert str(found).startswith("out.h5: finished, computed on cpu\n")
    assert repr(found) == "<JobStatus 'out.h5': 100.00% done, finished>"
    assert json.loads(found.to_json())["finished"]


def test_a_job_that_was_killed_when_its_file_had_its_name(dead, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(import_module("cqsa_arrays.durable.attend"), "end", lambda *_: None)
        cqsa.resume("out.h5")
    assert os.path.isdir("out.h5.job")
    assert cqsa.status("out.h5").finished
    with pytest.raises(cqsa.ArgumentError, match="It is finished"):
        verify_partial("out.h5")
    cqsa.resume("out.h5")
    assert sorted(set(os.listdir()) - {"run.log"}) == ["out.h5", "qkv.h5"]


def test_an_output_of_a_call_that_was_not_durable_is_finished(here) -> None:
    q = np.ones((2, 50, 8), "float32")
    cqsa.attention(q, q, q, out="out.h5", causal=True)
    found = cqsa.status("out.h5")
    assert found.finished
    assert found.pairs == 2 * 50 * 51 // 2
    assert cqsa.resume("out.h5").shape == (2, 50, 8)


@pytest.mark.parametrize("call", [cqsa.status, cqsa.resume])
def test_what_is_no_job(here, call) -> None:
    make(CASE)
    with pytest.raises(cqsa.ArgumentError, match=r"^out: found qkv.h5, which no job has written"):
        call("qkv.h5")
    with pytest.raises(cqsa.ArgumentError, match=r"^out: found none.h5, of which no job is unfinished"):
        call("none.h5")
    with pytest.raises(cqsa.ArgumentError, match=r"^out: found type int; expected a path"):
        call(3)
    Path("text.h5").write_text("text")
    with pytest.raises(cqsa.StorageError, match="not an HDF5 file"):
        call("text.h5")


@pytest.mark.parametrize("name", ["out.h5.job", "out.h5.job/", "out.h5.part"])
def test_a_file_of_the_job_is_no_name_of_it(dead, name) -> None:
    for call in (cqsa.status, cqsa.resume):
        with pytest.raises(cqsa.ArgumentError, match=r"Name 'out\.h5'"):
            call(name)


def test_arguments_of_resume_are_named(dead) -> None:
    for argument, value in {"max_time": "soon", "memory": "lots", "device": "abacus"}.items():
        with pytest.raises(cqsa.ArgumentError, match=f"^{argument}: found"):
            cqsa.resume("out.h5", **{argument: value})
    assert cqsa.status("out.h5").state == "stopped"


def test_a_job_of_arrays_in_memory_names_the_remedy(here) -> None:
    q = np.ones((2, 50, 8), "float32")
    with pytest.raises(cqsa.JobStopped):
        cqsa.attention(q, q, q, out="out.h5", options=cqsa.Options(durable=True, max_time_s=0))
    assert cqsa.status("out.h5").state == "stopped"
    with pytest.raises(cqsa.ArgumentError, match="Make the call again that began it"):
        cqsa.resume("out.h5")


def test_names_in_tables_are_escaped(here) -> None:
    make(CASE)
    assert run(command(CASE), KilledAtCommit(5)) < 0
    for one in ("out.h5.job", "out.h5.part"):
        shutil.move(one, one.replace("out", "<b>&"))
    text = cqsa.status("<b>&.h5")._repr_html_()
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;.h5" in text
    assert "nobody computes it" in text
