"""Where results go: through links, under names of their own, into arrays between the inputs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import environment, run_command

import cqsa_arrays as cqsa
from cqsa_arrays import ArgumentError, JobStopped, Options, StorageError
from cqsa_arrays.durable import Stop
from cqsa_arrays.durable.claims import Claims
from cqsa_arrays.job import Request, prepared
from cqsa_arrays.resumable import attend
from cqsa_arrays.storage import InputSpec, make_inputs, overlap

X = np.random.default_rng(0).standard_normal((2, 300, 8)).astype("float32")
EXPECTED = cqsa.attention(X, X, X)


def names(folder: Path = Path()) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory, with the input in.h5."""
    monkeypatch.chdir(tmp_path)
    with h5py.File("in.h5", "w") as file:
        for name in "qkv":
            file[name] = X
    return tmp_path


def stored(path: str | Path) -> np.ndarray:
    with h5py.File(path) as file:
        return file["out"][...]


# ---- links


@pytest.mark.parametrize("durable", [False, True])
def test_what_a_link_leads_to_is_written(durable):
    Path("disk").mkdir()
    Path("disk/result.h5").write_text("old")
    Path("link.h5").symlink_to("disk/result.h5")
    Path("again.h5").symlink_to("link.h5")
    for out in ("link.h5", "again.h5"):
        with pytest.raises(ArgumentError, match="which exists"):
            cqsa.attention(X, X, X, out=out, options=Options(durable=durable))
        cqsa.attention(X, X, X, out=out, options=Options(durable=durable, overwrite=True))
        assert Path(out).is_symlink()
        assert np.array_equal(stored("disk/result.h5"), EXPECTED)
    assert names() == ["again.h5", "disk", "disk/result.h5", "in.h5", "link.h5"]


def test_a_link_to_nothing_makes_what_it_leads_to(capsys):
    Path("disk").mkdir()
    Path("link.h5").symlink_to(Path("disk/new.h5").absolute())
    done = run_command(capsys, "attend", "in.h5", "-o", "link.h5")
    assert done.code == 0, done.err
    assert Path("link.h5").is_symlink()
    assert np.array_equal(stored("disk/new.h5"), EXPECTED)
    assert run_command(capsys, "verify", "link.h5").code == 0
    assert names() == ["disk", "disk/new.h5", "in.h5", "link.h5"]


def test_made_inputs_go_through_links():
    Path("link.h5").symlink_to("real.h5")
    for seed in (0, 1):
        make_inputs("link.h5", InputSpec(tokens=9, seed=seed), overwrite=True)
    assert Path("link.h5").is_symlink()
    assert cqsa.open("real.h5").q.shape == (1, 1, 9, 64)


def test_links_that_lead_nowhere_are_refused_and_left_alone(capsys):
    Path("circle.h5").symlink_to("round.h5")
    Path("round.h5").symlink_to("circle.h5")
    Path("folder.h5").symlink_to(".", target_is_directory=True)
    Path("gone.h5").symlink_to("no/such/folder/out.h5")
    before = names()
    for link, says in (("circle", "a link that leads in a circle"), ("folder", "a directory"), ("gone", "is missing")):
        with pytest.raises(ArgumentError, match=f"^out: found .*{says}"):
            cqsa.attention(X, X, X, out=f"{link}.h5", options=Options(overwrite=True))
        for command in (["attend", "in.h5", "--overwrite", "-o"], ["make", "--tokens", 9, "--overwrite"]):
            assert run_command(capsys, *command, f"{link}.h5").code == 2
    for command in ("status", "resume"):
        assert run_command(capsys, command, "circle.h5").code == 2
    assert names() == before


def test_a_job_is_found_through_its_link(capsys):
    Path("disk").mkdir()
    Path("link.h5").symlink_to("disk/new.h5")

    class StopSoon(Stop):
        """Asks to stop at the second safe place."""

        polls = 0

        def reason_within(self, ahead_s: float) -> str | None:
            self.polls += 1
            return "enough" if self.polls > 1 else None

    options = Options(durable=True, checkpoint_s=0, cover="cqs", chunks=3)
    request = Request(q="in.h5:/q", k="in.h5:/k", v="in.h5:/v", out="link.h5", options=options)
    with prepared(request) as job, pytest.raises(JobStopped):
        attend(job, StopSoon(None))
    assert {"disk/new.h5.job", "disk/new.h5.part"} <= set(names())
    assert run_command(capsys, "status", "link.h5").code == 0
    assert run_command(capsys, "verify", "--partial", "link.h5").code == 0
    assert run_command(capsys, "resume", "link.h5").code == 0
    np.testing.assert_allclose(stored("disk/new.h5"), EXPECTED, atol=1e-6)  # in other chunks
    assert names() == ["disk", "disk/new.h5", "in.h5", "link.h5"]


# ---- names

OTHERS = ["out.npy", "out.npz", "OUT.NPY", "out.zarr", "out.zarr/", "out.pt", "out.safetensors", "out.nc", "out.mat",
          "out.csv", "out.parquet", "out.txt", "out.json", "out.h5.gz", "out.pkl", "out.tif"]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_formats_are_refused(name):
    for call in (cqsa.attention, cqsa.plan):
        for out in (name, Path(name)):
            with pytest.raises(ArgumentError, match=r"^out: found .*, a name of \w.* files; expected .* HDF5 file"):
                call(X, X, X, out=out)
    assert names() == ["in.h5"]


@pytest.mark.parametrize("name", ["out.npy", "out.zarr/", "out.h5.gz"])
def test_commands_refuse_them_too(name, capsys):
    for command in (["attend", "in.h5", "-o"], ["plan", "in.h5", "-o"], ["make", "--tokens", 9]):
        done = run_command(capsys, *command, name)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "a name of" in done.err
    assert names() == ["in.h5"]


@pytest.mark.parametrize("name", ["out.h5.part", "out.h5.job", "x.PART"])
def test_names_of_unfinished_outputs_are_refused(name):
    """The file in the making of another output has that name, and would be removed."""
    with pytest.raises(ArgumentError, match=r"^out: found .*, a name of unfinished outputs"):
        cqsa.attention(X, X, X, out=name)


@pytest.mark.parametrize(
    "name", ["out.h5", "out.hdf5", "out", "out.v2", "layer.3", "out.HDF", ".h5", "out.pt.h5", "npy"]
)
def test_other_names_are_written(name):
    assert np.array_equal(cqsa.attention(X, X, X, out=name)[...], EXPECTED)
    assert names() == sorted([name, "in.h5"])


@pytest.mark.parametrize("name", ["file:x.h5", "a:b", "C:out.h5", "x.h5:y.h5", ":memory:", "a?mode=ro"])
def test_names_with_colons_are_names_like_others(name, capsys):
    done = run_command(capsys, "attend", "in.h5", "-o", name)
    assert done.code == 0, done.err
    assert np.array_equal(stored(name), EXPECTED)
    assert run_command(capsys, "verify", name).code == 0
    assert names() == sorted([name, "in.h5"])
    os.replace("in.h5", f"in:{name}")
    assert run_command(capsys, "plan", f"in:{name}").code == 0


def test_the_longest_file_counts_where_a_name_has_colons(capsys):
    with h5py.File("a", "w") as file:
        file["b"] = X
    os.replace("in.h5", "a:b")
    assert run_command(capsys, "plan", "a:b").code == 0


@pytest.mark.parametrize("name", ["x.h5:/attn", "in.h5:/out", "x.hdf5:out", "x.h5:", "no/x.h5:/a/b"])
def test_an_output_is_no_data_set_in_a_file(name, capsys):
    with pytest.raises(ArgumentError, match=r"^out: found .*, a data set in a file; .* name it .*(h5|hdf5)\."):
        cqsa.attention(X, X, X, out=name)
    for command in (["attend", "in.h5", "-o"], ["plan", "in.h5", "-o"], ["make", "--tokens", 9]):
        assert "a data set in a file" in run_command(capsys, *command, name).err
    assert names() == ["in.h5"]


@pytest.mark.parametrize("name", ["a\0b.h5", "a\ud800.h5"])
def test_names_that_no_file_can_have_are_refused(name):
    for call in (cqsa.attention, cqsa.plan):
        with pytest.raises(ArgumentError, match=r"^out: found .*No file can have that name"):
            call(X, X, X, out=name)


def test_a_job_that_cannot_be_claimed_leaves_no_folder(monkeypatch):
    def refused(*_arguments, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "out.h5.job/begin.claim-1")

    monkeypatch.setattr(Claims, "take", refused)
    with pytest.raises(StorageError, match=r"out.h5.job/begin.claim-1: Read-only file system"):
        cqsa.attention(X, X, X, out="out.h5", options=Options(durable=True))
    assert names() == ["in.h5"]


# ---- names that a terminal would obey

WILD = "\x1b[2J\u202e\x07\n"


def test_names_are_printed_as_escapes_everywhere():
    """By every command, in success and failure; and no other control character than the ends of lines."""
    folder = f"{WILD}.d"
    Path(folder).mkdir()
    inputs, out = f"{folder}/{WILD}.h5", f"{folder}/{WILD}-out.h5"
    with h5py.File(inputs, "w") as file:
        for name in "qkv":
            file[WILD + name] = file[name] = X
            file[WILD + name].attrs[WILD] = WILD
        file["odd"] = X
        file["odd"].attrs["layout"] = WILD
        file["far"] = X
        file["far"].attrs["scale_factor"] = WILD
        file["link"] = h5py.ExternalLink(f"../{WILD}.h5", WILD)
        file.attrs[WILD] = WILD
    odd, far, link, lost = (f"{inputs}:/{name}" for name in ("odd", "far", "link", f"{WILD}none"))
    commands = [
        ["info", inputs], ["info", WILD], ["plan", inputs, "-o", out], ["plan", inputs, "--q", f"{inputs}:/{WILD}q"],
        *(["plan", inputs, "--q", one] for one in (odd, far, link, lost, WILD)), ["plan", inputs, "--memory", WILD],
        ["plan", inputs, "--layout", WILD], ["plan", inputs, "--scratch", WILD], ["plan", inputs, "--device", WILD],
        ["plan", inputs, "--cover", WILD], ["plan", inputs, "--dtype", WILD], ["plan", inputs, "--lanes", WILD],
        ["plan", inputs, "--locking", WILD], ["plan", inputs, "--offset", WILD], ["plan", inputs, WILD], [WILD],
        ["attend", inputs, "-o", out, "--max-time", "0s"], ["status", out], ["verify", "--partial", out],
        ["attend", inputs, "-o", out, "--scale", "3"],
        ["resume", out], ["attend", inputs, "-o", out], ["attend", inputs, "-o", inputs], ["resume", out],
        ["attend", inputs, "-o", f"{WILD}/out.h5"], ["attend", inputs, "-o", f"{WILD}.npy"],
        ["verify", out], ["verify", inputs], ["verify", WILD], ["status", WILD], ["compare", f"{out}:/out", lost],
        ["compare", f"{out}:/out", f"{inputs}:/q"], ["compare", out, "--against", WILD],
        ["make", inputs, "--tokens", "9"], ["make", f"{WILD}.made.h5", "--tokens", "9"],
        ["make", "x.h5", "--tokens", "9", "--dtype", WILD], ["demo", "--directory", WILD],
    ]  # fmt: skip
    program = (
        "import sys\nfrom cqsa_arrays.cli import main\n"
        "for line in sys.stdin.read().split('\\x00'):\n"
        "    try:\n        main(line.split('\\x01'))\n    except SystemExit:\n        pass\n"
        "    print('done'); print('done', file=sys.stderr)\n"
    )
    lines = "\0".join("\1".join(command) for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", program], input=lines, env=environment(), capture_output=True, text=True, check=True,
        encoding="utf-8",
    )  # fmt: skip
    for stream in (done.stdout, done.stderr):
        parts = stream.split("done\n")
        assert len(parts) == len(commands) + 1
        for command, printed in zip(commands, parts, strict=False):
            assert all(letter.isprintable() or letter == "\n" for letter in printed), (command, printed)
            assert "Traceback" not in printed, (command, printed)
            assert "\x1b" not in printed
    assert r"\x1b[2J\u202e" in done.stdout
    assert r"\x1b[2J\u202e" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith(".h5")] == []  # no name ends a line


def test_names_in_python_are_shown_as_escapes(capsys):
    with h5py.File(f"{WILD}.h5", "w") as file:
        for name in "qkv":
            file[name] = X
    opened = cqsa.open(f"{WILD}.h5")
    plan = cqsa.plan(opened.q, opened.k, opened.v, out=f"{WILD}-out.h5")
    shown = [repr(opened), repr(opened.q), str(plan)]
    for call in (
        lambda: cqsa.open(f"{WILD}none.h5"),
        lambda: cqsa.plan(f"{WILD}.h5:/{WILD}", X, X),
        lambda: cqsa.attention(X, X, X, out=f"{WILD}/out.h5"),
        lambda: cqsa.attention(X, X, X, memory=WILD),
        lambda: cqsa.verify(f"{WILD}.h5"),
    ):
        with pytest.raises(cqsa.CqsaError) as caught:
            call()
        shown += [str(caught.value), repr(caught.value)]
    for text in shown:
        assert all(letter.isprintable() or letter == "\n" for letter in text), text
        assert r"\x1b[2J" in text.replace("\\\\", "\\")
    assert all("\n" not in text for text in (*shown[:2], *shown[3:]))


# ---- arrays


def packed() -> tuple[np.ndarray, list[np.ndarray]]:
    """q, k, v and a place for the output, interleaved in one array."""
    whole = np.random.default_rng(1).standard_normal((300, 4, 2, 8)).astype("f4")
    return whole, [whole[:, i] for i in range(4)]


@pytest.mark.parametrize("memory", [None, "2MiB"])
@pytest.mark.parametrize("cover", ["cqs", "rectangular"])
def test_an_output_between_the_inputs_is_written(memory, cover):
    _, (q, k, v, out) = packed()
    copies = [one.copy() for one in (q, k, v)]
    expected = cqsa.attention(*copies, layout="nhd", options=Options(cover=cover))
    assert cqsa.attention(q, k, v, out=out, layout="nhd", memory=memory, options=Options(cover=cover)) is out
    assert np.allclose(out, expected, rtol=0, atol=1e-6)
    for before, after in zip(copies, (q, k, v), strict=True):
        assert np.array_equal(before, after)


def test_outputs_that_share_an_element_are_refused():
    whole, (q, k, v, _) = packed()
    shifted = whole.reshape(300, 8, 8)[:, 5:7]  # half of v, half of the place for the output
    for out in (q, k[::-1], v[:, ::-1], shifted, whole.reshape(300, 8, 8)[:, 0:3:2]):
        assert np.shares_memory(whole, out)
        with pytest.raises(ArgumentError, match="out: found memory of an input"):
            cqsa.attention(q, k, v, out=out, layout="nhd")


def test_overlaps_that_are_too_hard_to_tell_are_refused(monkeypatch):
    """Whether they meet is a problem of whole numbers that may take for ever: NumPy gives up, and so do we."""
    whole = np.zeros(1 << 20, "f4")

    def strided(start: int) -> np.ndarray:
        strides = [4 * step for step in (7919, 1637, 613, 211)]
        return np.lib.stride_tricks.as_strided(whole[start:], (13, 11, 7, 2), strides)

    assert not np.shares_memory(strided(0), strided(1))
    assert not overlap.share_elements(strided(0), strided(1))
    monkeypatch.setattr(overlap, "MOST_WORK", 1)
    assert overlap.share_elements(strided(0), strided(1))


def windows() -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(np.zeros(307, "f4"), 8, writeable=True)


OUTS = [
    pytest.param(np.ma.masked_array(np.zeros((300, 8), "f4"), True), "a masked array, whose mask", id="masked"),
    pytest.param(np.ma.masked_array(np.zeros((300, 8), "f4")), "a masked array, whose mask", id="masked nowhere"),
    pytest.param(np.broadcast_to(np.zeros(8, "f4"), (300, 8)), "whose elements overlap", id="broadcast"),
    pytest.param(windows(), "whose elements overlap", id="windows"),
    pytest.param(np.zeros((300, 8), object), "dtype object", id="objects"),
    pytest.param(np.zeros((300, 8), [("x", "f4")]), "dtype ", id="structured"),
]


@pytest.mark.parametrize(("out", "says"), OUTS)
def test_arrays_that_cannot_hold_the_result_are_refused(out, says):
    for call in (cqsa.attention, cqsa.plan):
        with pytest.raises(ArgumentError, match=f"^out: found .*{says}"):
            call(X[0], X[0], X[0], out=out)


class Variable:
    """As netCDF4 and others have it: slices are masked arrays."""

    def __init__(self, array: np.ma.MaskedArray) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, key: object) -> np.ma.MaskedArray:
        return self._array[key]


def test_masked_arrays_are_refused_by_every_function():
    masked = np.ma.masked_array(X[0], X[0] > 0)
    for call in (cqsa.attention, cqsa.plan, cqsa.statistics):
        for place in range(3):
            inputs = [X[0]] * 3
            inputs[place] = masked
            with pytest.raises(ArgumentError, match=f"^{'qkv'[place]}: found a masked array"):
                call(*inputs)
    with pytest.raises(ArgumentError, match=r"^out: found a masked array"):
        cqsa.compare(masked, X[0])
    with pytest.raises(ArgumentError, match=r"^reference: found a masked array"):
        cqsa.compare(X[0], masked)
    with pytest.raises(ArgumentError, match=r"^out: found masked elements"):
        cqsa.compare(Variable(masked), X[0])
    assert cqsa.compare(Variable(np.ma.masked_array(X[0], False)), X[0]).passed
    with pytest.raises(ArgumentError, match="acc: found MaskedArray"):
        cqsa.BlockStatistics(masked, X[0, :, 0], X[0, :, 0])


class Marked(np.ndarray):
    """An array of a kind that minds what is done to it."""

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"{function.__name__} is not for arrays like this one")


@pytest.mark.parametrize("kind", [np.matrix, np.recarray, Marked])
def test_arrays_of_other_kinds_are_taken_as_the_arrays_they_are(kind):
    expected, out = cqsa.attention(X[0], X[0], X[0]), np.zeros((300, 8), "f4").view(kind)
    x = X[0].view(kind)
    assert np.array_equal(np.asarray(cqsa.attention(x, x, x)), expected)
    assert cqsa.attention(x, x, x, out=out) is out
    assert np.array_equal(np.asarray(out), expected)
    half = np.zeros((300, 8), "f2").view(kind)
    cqsa.attention(x, x, x, out=half)
    assert np.array_equal(np.asarray(half), expected.astype("f2"))


class OnDevice:
    """As much of a CuPy array as tells where it lies: nowhere that could be read."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.shape, self.strides, self.itemsize = shape, strides, 2
        self.__cuda_array_interface__ = {"data": (address, False)}


def test_arrays_on_a_gpu_are_told_apart_by_their_addresses():
    q, out, reversed_q = (
        OnDevice((1 << 44) + at, (300, 8), (sign * 32, 2)) for at, sign in ((0, 1), (16, 1), (299 * 32, -1))
    )
    assert not overlap.share_elements(q, out)
    assert overlap.share_elements(q, reversed_q)
    assert not overlap.overlaps_itself(reversed_q)
