"""Inputs of jobs and outputs are known by what they hold: not by times, not by where their files lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from durable_cases import command, digest, folder, log, make, run, unbroken
from fault_cases import goes_on, refused
from input_cases import CASE, NAMED, RESUME, SAME, VERIFY, change, finished, move_inputs, sampled, stopped

import cqsa_arrays as cqsa
from cqsa_arrays.durable import Stop
from cqsa_arrays.job import Request, prepared
from cqsa_arrays.resumable import attend
from cqsa_arrays.storage.content import BLOCKS


@pytest.fixture
def begun(here) -> str:
    """A job with some work committed, and the hash of what it should become."""
    make(CASE)
    expected = unbroken(CASE)
    stopped()
    return expected


# ---- nothing of the content has changed


@pytest.mark.parametrize("full", [[], ["--check-inputs", "full"]], ids=["sampled", "full"])
@pytest.mark.parametrize("what", SAME, ids=lambda one: one.__name__)
def test_a_file_with_the_same_content_is_the_same_input(here, what, full) -> None:
    make(CASE)
    expected = unbroken(CASE)
    stopped(*full)
    what()
    assert run([*RESUME, *full]) == 0, log()
    if not full:  # whose hashes are attributes
        assert digest() == expected
    what()
    assert run([*VERIFY, *full]) == 0, log()
    os.remove("out.h5")
    stopped(*full)
    what()
    finished(*full)


def test_the_job_and_its_inputs_move_together(here) -> None:
    with folder(here / "one"):
        make(CASE)
        expected = unbroken(CASE)
        stopped()
    os.rename("one", "two")
    assert run(["resume", "two/out.h5", "--quiet"]) == 0, log()
    assert digest("two/out.h5") == expected
    os.rename("two", "three")
    assert run(["verify", "three/out.h5", "--rows", "16"]) == 0, log()
    assert run(["compare", "three/out.h5", "--against", "cpu"]) == 0, log()


def test_an_unfinished_job_is_verified_where_it_is_now(here) -> None:
    with folder(here / "one"):
        make(CASE)
        stopped()
    os.rename("one", "two")
    assert run(["verify", "two/out.h5", "--partial", "--rows", "16"]) == 0, log()


def test_an_output_that_moves_alone_finds_its_inputs_as_they_were_given(here) -> None:
    make(CASE)
    finished()
    os.mkdir("away")
    os.rename("out.h5", "away/out.h5")
    assert run(["verify", "away/out.h5", "--rows", "16"]) == 0, log()
    os.rename("away/out.h5", "out.h5")
    with folder(here / "below"):
        assert run(["verify", "../out.h5", "--rows", "16"]) == 0, log()


def test_another_file_of_the_same_name_is_passed_over(here) -> None:
    """What is relative to the output comes first, but the content decides."""
    make(CASE)
    finished()
    os.mkdir("away")
    os.rename("out.h5", "away/out.h5")
    shutil.copy("qkv.h5", "away/kept")
    with folder(here / "away"):
        assert run(["make", "qkv.h5", "--tokens", "2000", "--heads", "3", "--head-dim", "16", "--seed", "9"]) == 0
    assert run(["verify", "away/out.h5", "--rows", "16"]) == 0, log()


# ---- inputs elsewhere


def test_inputs_elsewhere_are_named_to_resume(begun) -> None:
    move_inputs()
    for partial in ([*RESUME], [*VERIFY, "--partial"]):
        refused("--q FILE.h5:/PATH", *partial)
        assert "restart" not in log()
    assert run([*VERIFY, "--partial", *NAMED]) == 0, log()
    assert run([*RESUME, *NAMED]) == 0, log()
    assert digest() == begun


def test_inputs_elsewhere_are_named_to_verify(here) -> None:
    make(CASE)
    finished()
    move_inputs()
    refused("cqsa verify out.h5 --q FILE.h5:/PATH", *VERIFY)
    assert "ompute it again" not in log()
    assert run([*VERIFY, *NAMED]) == 0, log()
    assert run([*VERIFY, *(word.partition(":")[0] for word in NAMED)]) == 0, log()  # the data sets of the same names


def test_they_are_named_in_python(begun) -> None:
    move_inputs()
    with pytest.raises(cqsa.StorageError, match=r"Name where it is now: cqsa\.resume\('out\.h5', q=\.\.\.\)"):
        cqsa.resume("out.h5")
    with pytest.raises(cqsa.ArgumentError, match=r"^q: found type int; expected"):
        cqsa.resume("out.h5", q=3)
    named = {name: f"elsewhere/other.h5:/{name}" for name in "qkv"}
    cqsa.resume("out.h5", q=Path("elsewhere/other.h5"), k=named["k"], v=cqsa.open("elsewhere/other.h5").v)
    assert digest() == begun
    with pytest.raises(cqsa.StorageError, match=r"cqsa\.verify\('out\.h5', q=\.\.\.\)"):
        cqsa.verify("out.h5", rows=16)
    assert cqsa.verify("out.h5", rows=16, **named).passed
    with pytest.raises(cqsa.ArgumentError, match=r"^q: found type int; expected"):
        cqsa.verify("out.h5", q=3)


def test_what_is_named_must_be_the_same(begun) -> None:
    assert run(["make", "other.h5", "--tokens", "2000", "--heads", "3", "--head-dim", "16", "--seed", "9"]) == 0
    refused("k: other.h5:/k is not the input", *RESUME, "--k", "other.h5:/k")
    refused("k: other.h5:/k is not the input", *command(CASE), "--k", "other.h5:/k")
    refused("v: qkv.h5:/q is not the input", *RESUME, "--v", "qkv.h5:/q")
    refused("none.h5", *RESUME, "--v", "none.h5:/q")
    os.remove("other.h5")
    goes_on(begun)


def test_a_named_file_counts_more_than_what_is_there(begun) -> None:
    shutil.copy("qkv.h5", "kept.h5")
    change(*sampled(inside=True))
    refused("q: ", *RESUME)
    assert run([*RESUME, "--q", "kept.h5:/q"]) == 0, log()
    assert digest() == begun
    refused("qkv.h5:/q has changed since", *VERIFY)
    assert run([*VERIFY, "--q", "kept.h5"]) == 0, log()


# ---- the content has changed


def test_a_change_within_the_samples_is_refused(begun) -> None:
    change(*sampled(inside=True))
    refused("(different: sample)", *RESUME)
    assert "qkv.h5:/q has changed" in log()
    assert "--q FILE.h5:/PATH" in log()
    refused("(different: sample)")
    change(*sampled(inside=True))  # back
    assert run(RESUME) == 0, log()
    assert digest() == begun
    change(*sampled(inside=True))
    refused("qkv.h5:/q has changed since", *VERIFY)


def test_a_change_outside_of_them_is_seen_by_all_that_is_checked_in_full(here) -> None:
    make(CASE)
    stopped("--check-inputs", "full")
    change(*sampled(inside=False))
    refused("(different: full)", *RESUME)
    refused("(different: full)")
    change(*sampled(inside=False))
    assert run([*RESUME, "--check-inputs", "full"]) == 0, log()
    change(*sampled(inside=False))
    refused("qkv.h5:/q has changed since", *VERIFY, "--check-inputs", "full")


def test_a_change_outside_of_them_is_not_seen_by_samples(here) -> None:
    """As it is stated; what was computed of both is then for ``verify`` to find."""
    make(CASE)
    stopped()
    change(*sampled(inside=False))
    assert run(RESUME) == 0, log()


def test_everything_cannot_be_checked_where_only_samples_are_known(begun) -> None:
    refused("check-inputs: found full; expected sampled", *RESUME, "--check-inputs", "full")
    refused("check-inputs: found full; expected sampled", *command(CASE), "--check-inputs", "full")
    goes_on(begun)
    refused("check-inputs: found full; expected sampled", *VERIFY, "--check-inputs", "full")


@pytest.mark.parametrize("call", [cqsa.verify, cqsa.resume])
def test_what_cannot_be_asked_for_is_refused(begun, call) -> None:
    if call is cqsa.verify:
        goes_on(begun)
    with pytest.raises(cqsa.ArgumentError, match=r"^check_inputs: found 'all'; expected 'sampled' or 'full'"):
        call("out.h5", check_inputs="all")
    with pytest.raises(cqsa.ArgumentError, match=r"^check_inputs: found 'all'"):
        cqsa.attention(*(f"qkv.h5:/{n}" for n in "qkv"), out="b.h5", options=cqsa.Options(check_inputs="all"))


@pytest.mark.parametrize("how", ["longer", "shorter", "another shape", "another type", "gone"])
def test_other_files_of_the_name(begun, how) -> None:
    if how == "longer":
        with h5py.File("qkv.h5", "a") as file:
            file["more"] = [1.0] * 5000
    elif how == "shorter":
        os.truncate("qkv.h5", os.path.getsize("qkv.h5") - 4)
    elif how == "gone":
        with h5py.File("qkv.h5", "a") as file:
            del file["q"]
    else:
        with h5py.File("qkv.h5", "a") as file:
            array = file["q"][...]
            del file["q"]
            file["q"] = array[0] if how == "another shape" else array.astype("f2")
    says = {"shorter": "truncated", "gone": "--q: found /q in ", "another shape": "--q: found 3 dimensions"}
    refused(says.get(how, "qkv.h5:/q has changed since"), *RESUME)
    assert "restart" not in log()


# ---- while it runs


class Meanwhile:
    """Does something before the second look at the inputs of a run."""

    def __init__(self, what: Callable[[], object]) -> None:
        self._what, self._calls = what, 0

    def __call__(self) -> None:
        from cqsa_arrays.durable import Watch

        usual = Watch.check

        def check(watch: Watch) -> None:
            self._calls += 1
            if self._calls == 2:
                self._what()
            usual(watch)

        Watch.check = check  # type: ignore[method-assign]


@pytest.mark.parametrize("full", [[], ["--check-inputs", "full"]], ids=["sampled", "full"])
@pytest.mark.parametrize("what", SAME, ids=lambda one: one.__name__)
def test_a_file_that_is_only_touched_while_it_is_read(here, what, full) -> None:
    make(CASE)
    finished(*full)
    expected = digest()
    os.remove("out.h5")
    assert run(command(CASE, *full), Meanwhile(what)) == 0, log()
    assert digest() == expected


@pytest.mark.parametrize("inside", [True, False], ids=["within the samples", "outside"])
def test_a_file_that_changes_while_it_is_read(here, inside) -> None:
    make(CASE)
    full = [] if inside else ["--check-inputs", "full"]
    finished(*full)
    expected = digest()
    os.remove("out.h5")
    assert run(command(CASE, *full), Meanwhile(lambda: change(*sampled(inside)))) == 2
    assert "qkv.h5 has changed while it was read" in log()
    change(*sampled(inside))
    assert run([*RESUME]) == 0, log()
    assert digest() == expected


def replace_by_another() -> None:
    shutil.copy2("qkv.h5", "other.h5")
    change(*sampled(inside=True), path="other.h5")
    os.replace("other.h5", "qkv.h5")


def test_another_file_that_gets_the_name_while_it_is_read(here) -> None:
    make(CASE)
    assert run(command(CASE), Meanwhile(replace_by_another)) == 2
    assert "qkv.h5 has changed while it was read" in log()


@pytest.mark.parametrize("what", [lambda: os.remove("qkv.h5"), lambda: os.truncate("qkv.h5", 9000)])
def test_a_file_that_is_gone_or_cut_while_it_is_read(here, what) -> None:
    make(CASE)
    assert run(command(CASE), Meanwhile(what)) == 2
    assert "while it was read" in log() or "It is truncated" in log()  # whichever is met first
    assert "Traceback" not in log()


def test_a_long_look_at_the_inputs_can_be_stopped(here) -> None:
    class Late(Stop):
        """Asked while everything is read."""

        calls = 0

        def check(self) -> None:
            self.calls += 1
            if self.calls == 3 * BLOCKS + 2:
                self.ask("interrupted")
            super().check()

    make(CASE)
    options = cqsa.Options(durable=True, check_inputs="full")
    q, k, v = (f"qkv.h5:/{name}" for name in "qkv")
    request = Request(q=q, k=k, v=v, out="out.h5", device="cpu", options=options)
    with prepared(request) as job, pytest.raises(cqsa.JobStopped, match="interrupted"):
        attend(job, Late())
    assert os.listdir() == ["qkv.h5"]
