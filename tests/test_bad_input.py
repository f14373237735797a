"""Input that cannot be used: refused by name, with what to do, and nothing is written and no input changed."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from command_line import environment, run_command

import cqsa_arrays as cqsa
from cqsa_arrays import ArgumentError, BudgetError, Options, StorageError

X = np.random.default_rng(0).standard_normal((2, 300, 8)).astype("float32")
PEAK = Path(__file__).with_name("peak.py")


def shaped(*shape: int, dtype: object = "f4") -> np.ndarray:
    return np.ones(shape, dtype)


def same(array: np.ndarray) -> dict[str, np.ndarray]:
    """One array as q, k and v."""
    return dict.fromkeys("qkv", array)


def overlapping(array):
    return np.lib.stride_tricks.as_strided(array[:1].copy(), array.shape, (0, *array.strides[1:]), writeable=True)


def changed(array: np.ndarray, **flags: bool) -> np.ndarray:
    array = array.copy()
    array.setflags(**flags)
    return array


class OnDevice:
    """An array as CuPy offers it."""

    __cuda_array_interface__ = {"shape": (2, 300, 8), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


class OnDeviceByDlpack:
    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("memory of a device must not be asked for")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of ``attention`` beside q = k = v = X, and what the refusal says."""

    name: str
    arguments: dict[str, object]
    says: str
    error: type[Exception] = ArgumentError


def option(**choices: object) -> dict[str, object]:
    return {"options": Options(**choices)}


OFFERED = "found {}; expected float16, bfloat16, float32, float64"
BYTES = "expected a positive number of bytes.*Pass for example memory='2GiB'"
CASES = [
    Case("rank 0", {"q": np.float32(1)}, "q: found numpy.float32; expected a NumPy or CuPy array.*Make it an array"),
    Case("rank 1", same(shaped(5)), "q: found 1 dimensions; expected 2, 3 or 4 dimensions. Give it 2"),
    Case("rank 5", same(shaped(1, 1, 1, 1, 1)), "q: found 5 dimensions; expected 2, 3 or 4"),
    Case("different ranks", {"q": shaped(300, 8)}, "k: found 2 heads; expected 1 heads, as q has"),
    Case("heads", {"q": shaped(3, 300, 8)}, "k: found 2 heads; expected 3 heads, as q has. Shapes are q"),
    Case("heads of v", {"v": shaped(1, 300, 8)}, "v: found 1 heads; expected 2 heads, as k has"),
    Case("batch", same(shaped(3, 1, 9, 8)) | {"q": shaped(2, 1, 9, 8)}, "k: found 3 batch; expected 2 batch"),
    Case("D", {"q": shaped(2, 300, 9)}, "k: found 8 head_dim; expected 9 head_dim, as q has"),
    Case("Nk", {"v": shaped(2, 299, 8)}, "v: found 299 tokens; expected 300 tokens, as k has"),
    Case("mixed dtypes", {"k": X.astype("f8")}, "q, k, v: found q float32, k float64, v float32; expected one dtype"),
    Case("mixed 16 bits", same(X.astype("f2")) | {"v": X.astype(ml_dtypes.bfloat16)}, "v bfloat16; expected one dtype"),
    Case("integers", same(X.astype("i4")), f"q: {OFFERED.format('dtype int32')}. Convert it on purpose"),
    Case("bits of bfloat16", same(X.astype("u2")), "q: found dtype uint16.*bfloat16 bits"),
    Case("objects", same(X.astype(object)), f"q: {OFFERED.format('dtype object')}"),
    Case("booleans", same(X > 0), f"q: {OFFERED.format('dtype bool')}"),
    Case("complex", {"v": X.astype("c8")}, f"v: {OFFERED.format('dtype complex64')}"),
    Case("long double", same(X.astype(np.longdouble)), "q: found dtype float(128|96|64); expected float16"),
    Case("big-endian", {"k": X.astype(">f4")}, "k: found float32 of the other byte order .*Convert it once"),
    Case("zero query tokens", {"q": shaped(2, 0, 8)}, "q: found 0 tokens; expected at least 1 tokens"),
    Case("zero keys", {"k": shaped(2, 0, 8), "v": shaped(2, 0, 8)}, "k: found 0 tokens; expected at least 1"),
    Case("zero heads", same(shaped(0, 9, 8)), "q: found 0 heads; expected at least 1 heads"),
    Case("zero batches", same(shaped(0, 1, 9, 8)), "q: found 0 batch; expected at least 1 batch"),
    Case("D = 0", same(shaped(2, 9, 0)), "q: found 0 head_dim; expected at least 1 head_dim"),
    Case("Dv = 0", {"v": shaped(2, 300, 0)}, "v: found 0 head_dim; expected at least 1 head_dim"),
    Case("D = 1025", same(shaped(1, 9, 1025)), "q: found head_dim 1025; expected at most 1024. Split"),
    Case("Dv = 1025", {"v": shaped(2, 300, 1025)}, "v: found head_dim 1025; expected at most 1024"),
    Case("a list", {"q": [[1.0, 2.0]]}, "q: found builtins.list; expected a NumPy or CuPy array.*np.asarray"),
    Case("None", {"v": None}, "v: found builtins.NoneType; expected a NumPy or CuPy array"),
    Case("a masked array", {"k": np.ma.masked_array(X)}, "k: found a masked array.*Pass k.data"),
    *(
        []  # CuPy would take it over
        if importlib.util.find_spec("cupy")
        else [Case("on a GPU", {"q": OnDevice()}, "q: found .*OnDevice on a GPU; expected .* copy it with q.get()")]
    ),
    Case("on a GPU, DLPack", {"v": OnDeviceByDlpack()}, "v: found .* on a GPU; expected .* v.cpu()"),
    Case("scale NaN", {"scale": np.nan}, "scale: found nan; expected a finite number. Leave it out"),
    Case("scale inf", {"scale": np.inf}, "scale: found inf; expected a finite number"),
    Case("scale inf of NumPy", {"scale": np.float32("-inf")}, r"scale: found np.float32\(-inf\); expected a finite"),
    Case("scale as text", {"scale": "1"}, "scale: found '1'; expected a finite number"),
    Case("scale beyond floats", {"scale": 10**400}, "scale: found 1000*; expected a finite number"),
    Case("scale True", {"scale": True}, "scale: found True; expected a finite number"),
    Case("scale for each head", {"scale": np.ones((50, 50))}, "scale: found type ndarray; expected a finite number"),
    Case("layout", {"layout": "hdn"}, "layout: found 'hdn'; expected one of bhnd, bnhd, hnd, nhd, nd. b = batch"),
    Case("layout 5", {"layout": 5}, "layout: found 5; expected one of bhnd"),
    Case("layout of another rank", {"layout": "bhnd"}, "q: found 3 dimensions; expected 4, for layout 'bhnd'"),
    Case("12 bananas", {"memory": "12 bananas"}, f"memory: found '12 bananas'; {BYTES}"),
    Case("-1GiB", {"memory": "-1GiB"}, f"memory: found '-1GiB'; {BYTES}"),
    Case("no text", {"memory": ""}, f"memory: found ''; {BYTES}"),
    Case("0 bytes", {"memory": 0}, f"memory: found 0; {BYTES}"),
    Case("True bytes", {"memory": True}, f"memory: found True; {BYTES}"),
    Case("1.5 bytes", {"memory": 1.5}, f"memory: found 1.5; {BYTES}"),
    Case("1KiB", {"memory": "1KiB"}, r"memory: .* not fit 1 KiB \(memory='1KiB'\).* Pass memory=\d+", BudgetError),
    Case("host 12 bananas", option(host_memory="12 bananas"), "host_memory: found '12 bananas'; expected a positive"),
    Case("host 1KiB", option(host_memory="1KiB"), r"memory: .* not fit 1 KiB \(host_memory='1KiB'\)", BudgetError),
    Case("device", {"device": "gpu"}, "device: found 'gpu'; expected 'auto', 'cpu', 'cuda' or 'cuda:<number>'"),
    Case("device 0", {"device": 0}, "device: found type int; expected 'auto', 'cpu', 'cuda' or"),
    Case("cover", option(cover="spiral"), "cover: found 'spiral'; expected one of auto, cqs, rectangular"),
    Case("cover as a list", option(cover=["cqs"]), "cover: found type list; expected one of auto, cqs, rectangular"),
    Case("no chunks", option(chunks=0), "chunks: found 0; expected a whole number, at least 1. Leave it out"),
    Case("1.5 chunks", option(chunks=1.5), "chunks: found 1.5; expected a whole number"),
    Case("chunks as text", option(chunks="7"), "chunks: found '7'; expected a whole number"),
    Case("no threads", option(threads=0), "threads: found 0; expected a whole number, at least 1. Leave it out"),
    Case(
        "threads without an end", option(threads=10**400), "threads: found 10*; expected a whole number, at most 65536"
    ),
    Case("threads True", option(threads=True), "threads: found True; expected a whole number"),
    Case("mask array", {"mask": np.ones((300, 300), bool)}, r"mask: found type ndarray; expected cqsa.causal\("),
    Case("mask text", {"mask": "causal"}, r"mask: found 'causal'; expected cqsa.causal\(...\) or None"),
    Case("causal and mask", {"causal": True, "mask": cqsa.causal()}, "causal: found both .*; expected one of them"),
    Case("causal 1", {"causal": 1}, r"causal: found 1; expected True or False. For an offset pass mask"),
    Case("out of another shape", {"out": shaped(2, 300, 9)}, r"out: found shape \(2, 300, 9\); expected \(2, 300, 8\)"),
    Case("out of integers", {"out": shaped(2, 300, 8, dtype="i4")}, "out: found dtype int32; expected one of float16"),
    Case("out of another byte order", {"out": shaped(2, 300, 8, dtype=">f4")}, "out: found dtype >f4; expected one"),
    Case("out a map", {"out": np.memmap("/dev/zero", "f4", "c", shape=X.shape)}, "out: found a memory map; expected"),
    Case("out overlaps itself", {"out": overlapping(X)}, "out: found an array whose elements overlap; expected"),
    Case("out read-only", {"out": changed(X, write=False)}, "out: found a read-only array; expected a writable one"),
    Case("out a list", {"out": [0.0]}, "out: found type list; expected a NumPy or CuPy array, a path or None"),
    Case("out without a name", {"out": ""}, "out: found ''; expected a NumPy or CuPy array, a path or None"),
    Case("out is an input", {"out": X}, "out: found memory of an input; expected an array of its own. Inputs are"),
    Case("out is part of an input", {"out": X[::-1]}, "out: found memory of an input"),
    Case("dtype int", {"dtype": int}, "dtype: found int64; expected one of float16.*Leave it out"),
    Case("dtype unknown", {"dtype": "float8"}, "dtype: found 'float8'; expected one of float16"),
    Case("dtype beside out", {"out": shaped(2, 300, 8), "dtype": "f8"}, "dtype: found 'f8'; expected float32, as out"),
    Case("options a dict", {"options": {}}, r"options: found dict; expected cqsa.Options\(...\)"),
    Case("options None", {"options": None}, r"options: found NoneType; expected cqsa.Options"),
    Case("scratch missing", option(scratch="nowhere"), "scratch: found 'nowhere'; expected an existing directory"),
    Case("scratch a file", option(scratch=__file__), "scratch: found .*; expected an existing directory"),
    Case("scratch a number", option(scratch=1), "scratch: found 1; expected an existing directory"),
    Case("text without a data set", {"q": __file__}, "q: found .*; expected an existing file and a data set in it"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current directory, in which temporary files are made, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in ``folder``: names, and the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(case: Case, call: Callable[..., object], arguments: dict[str, object]) -> None:
    with pytest.raises(case.error, match=case.says) as caught:
        call(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_arguments_are_refused_by_name(case, folder):
    arguments = {**same(X), **case.arguments}
    arrays = [a for a in arguments.values() if isinstance(a, np.ndarray) and a.dtype != object]
    before = [array.tobytes() for array in arrays]
    refused(case, cqsa.attention, arguments)
    refused(case, cqsa.plan, arguments)
    assert [array.tobytes() for array in arrays] == before
    assert contents(folder) == {}


@pytest.mark.parametrize("offset", [0.5, "1", None, True, 2**62 + 1, np.int64(-(2**63))])
def test_offsets_are_whole_numbers(offset):
    with pytest.raises(ArgumentError, match=r"^offset: found .*; expected a whole number from -2\*\*62 to 2\*\*62"):
        cqsa.causal(offset)


@pytest.mark.parametrize("call", [cqsa.attention, cqsa.plan])
def test_misspelt_and_positional_arguments_are_type_errors(call):
    with pytest.raises(TypeError, match="cauzal"):
        call(X, X, X, cauzal=True)
    with pytest.raises(TypeError, match="positional"):
        call(X, X, X, True)
    with pytest.raises(TypeError, match="chunk"):
        Options(chunk=3)


def test_a_result_larger_than_the_budget_names_the_way_out(folder):
    long = np.broadcast_to(X[:1, :1], (1, 1 << 24, 8))
    with pytest.raises(BudgetError, match=r'"result" 512 MiB\. .* Or pass out=.out\.h5.: then the result, 512 MiB'):
        cqsa.attention(long, X[:1], X[:1], memory="64MiB")
    assert cqsa.plan(long, X[:1], X[:1], memory="64MiB", out="out.h5").memory_bytes <= 64 << 20


def smallest_bytes(**arguments: object) -> int:
    """The budget that a refusal names."""
    with pytest.raises(BudgetError) as caught:
        cqsa.plan(**{**arguments, "memory": "1KiB"})
    return int(re.search(r"Pass memory=(\d+) or more", str(caught.value))[1])


@pytest.mark.parametrize("cover", ["auto", "cqs", "rectangular"])
@pytest.mark.parametrize("out", [None, "out.h5"])
def test_the_smallest_budget_that_a_refusal_names_works(cover, out, folder):
    arguments = {**same(X), "out": out, "options": Options(cover=cover, threads=2)}
    smallest = smallest_bytes(**arguments)
    assert cqsa.plan(**arguments, memory=smallest).memory_bytes == smallest
    found = cqsa.attention(**arguments, memory=smallest)
    assert np.allclose(found[...], cqsa.attention(X, X, X), rtol=0, atol=1e-6)
    with pytest.raises(BudgetError, match=f"Pass memory={smallest} "):
        cqsa.plan(**arguments, memory=smallest - 1)


def test_the_smallest_budget_is_kept(folder):
    inputs = write_inputs(Path("in.h5"), np.random.default_rng(0).standard_normal((1, 8_000, 64)).astype("f4"))
    opened = cqsa.open(inputs)
    smallest = smallest_bytes(q=opened.q, k=opened.k, v=opened.v, out="out.h5")
    argv = [sys.executable, PEAK, inputs, "out.h5", str(smallest)]
    done = subprocess.run(argv, env=environment(), check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["peak"] <= smallest


# ---- files: through the library and through the command


def write_inputs(path: Path, *arrays: np.ndarray, **options: object) -> Path:
    """``path`` with /q, /k and /v; one array is all three."""
    with h5py.File(path, "w") as file:
        for name, array in zip("qkv", arrays * 3 if len(arrays) == 1 else arrays, strict=True):
            file.create_dataset(name, data=array, **options)
    return path


def without_q(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["k"] = file["v"] = X


def cut_in_half(path: Path) -> None:
    whole = write_inputs(path, X).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def with_a_damaged_chunk(path: Path) -> None:
    """The data of /k do not decompress: found only while the work is under way."""
    write_inputs(path, X, chunks=(1, 50, 8), compression="gzip")
    with h5py.File(path) as file:
        position = file["k"].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(b"\xff" * 40)


def with_a_damaged_header(path: Path) -> None:
    write_inputs(path, X)
    with h5py.File(path) as file:
        position = h5py.h5o.get_info(file["k"].id).addr
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(b"\xff" * 8)


def with_layout(value: object) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write_inputs(path, X)
        with h5py.File(path, "r+") as file:
            file["q"].attrs["layout"] = value

    return make


def writes(*arrays: np.ndarray) -> Callable[[Path], object]:
    return lambda path: write_inputs(path, *arrays)


@dataclass(frozen=True, slots=True)
class FileCase:
    """An input file that ``make`` writes, and what the refusal says."""

    name: str
    make: Callable[[Path], object]
    says: str
    error: type[Exception] = ArgumentError


FILE_CASES = [
    FileCase("missing file", lambda path: None, "in.h5: No such file or directory. Check the path", StorageError),
    FileCase(
        "missing data set", without_q, r"q: found /q in .*in.h5 is missing \(data sets present: /k, /v\); expected"
    ),
    FileCase("a directory", Path.mkdir, "in.h5 is a directory; expected an HDF5 file. Name the file", StorageError),
    FileCase(
        "not HDF5", lambda path: path.write_text("q,k,v" * 999), "in.h5 is not an HDF5 file; expected", StorageError
    ),
    FileCase("empty", Path.touch, "in.h5 is not an HDF5 file; expected one with the data sets", StorageError),
    FileCase("truncated", cut_in_half, "in.h5 is truncated: copy or write it again", StorageError),
    FileCase("damaged chunk", with_a_damaged_chunk, "in.h5:/k: tokens .* cannot be read", StorageError),
    FileCase("rank 1", writes(X[0, 0]), "q: found 1 dimensions; expected 2, 3 or 4"),
    FileCase("heads", writes(X, X[:1], X[:1]), "k: found 1 heads; expected 2 heads, as q has"),
    FileCase("Nk", writes(X, X, X[:, 1:]), "v: found 299 tokens; expected 300 tokens, as k has"),
    FileCase("D", writes(X, X[..., 1:], X), "k: found 7 head_dim; expected 8 head_dim, as q has"),
    FileCase("mixed dtypes", writes(X, X.astype("f8"), X), "q, k, v: found q float32, k float64, v float32; expected"),
    FileCase("integers", writes(X.astype("i4")), "q: found integers in /q; expected float16, .*Store floats"),
    FileCase("booleans", writes(X > 0), r"q: found enumerated values \(or booleans\) in /q; expected float16"),
    FileCase("complex", writes(X.astype("c8")), r"q: found compound values \(or complex numbers\) in /q; expected"),
    FileCase("text", writes(np.full((2, 9), b"abc")), "q: found strings in /q; expected float16"),
    FileCase("big-endian", writes(X.astype(">f4")), "q: found a big-endian float of 4 bytes in /q; .*Convert it once"),
    FileCase("zero tokens", writes(X[:, :0]), "q: found 0 tokens; expected at least 1 tokens"),
    FileCase("zero heads", writes(X[:0]), "q: found 0 heads; expected at least 1 heads"),
    FileCase("D = 0", writes(X[..., :0]), "q: found 0 head_dim; expected at least 1 head_dim"),
    FileCase("layout no text", with_layout(5), "q: found the attribute layout = 5 of .*in.h5:/q"),
    FileCase("layouts", with_layout(["nd", "nd"]), r"q: found the attribute layout = \['nd', 'nd'\] of"),
    FileCase("layout of no length", with_layout(np.zeros(0)), r"q: found the attribute layout = \[\] of"),
    FileCase("damaged header", with_a_damaged_header, "in.h5:/k is damaged: .*Copy or write it again", StorageError),
    FileCase("D = 1025", writes(shaped(1, 3, 1025)), "q: found head_dim 1025; expected at most 1024"),
]


def attend_to_file(inputs: Path, out: object, **arguments: object) -> object:
    return cqsa.attention(*(f"{inputs}:/{name}" for name in "qkv"), out=out, **arguments)


def refused_by_command(capsys: pytest.CaptureFixture[str], says: str, *argv: object) -> None:
    """Exit code 2, one line on standard error, nothing else."""
    done = run_command(capsys, *argv)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
    assert re.search(f"^cqsa {argv[0]}: .*{says}", done.err), done.err


@pytest.mark.parametrize("case", FILE_CASES, ids=[case.name for case in FILE_CASES])
def test_files_are_refused_and_left_alone(case, folder, capsys):
    inputs = folder / "in.h5"
    case.make(inputs)
    before = contents(folder)
    with pytest.raises(case.error, match=case.says) as caught:
        attend_to_file(inputs, folder / "out.h5")
    assert "\n" not in str(caught.value)
    refused_by_command(capsys, case.says, "attend", inputs, "-o", folder / "out.h5")
    assert contents(folder) == before


@dataclass(frozen=True, slots=True)
class OutCase:
    """An output beside the good input in.h5 that ``make`` prepares, and what the refusal says."""

    name: str
    out: str
    make: Callable[[Path], object]
    says: str
    overwrite: bool = False


NEVER = "out: found .*, which is an input; expected another file. Inputs are never overwritten"
OUT_CASES = [
    OutCase("missing folder", "no/out.h5", lambda out: None, "out: found .*whose folder is missing; .*Make .*no first"),
    OutCase("folder is a file", "in.h5/out.h5", lambda out: None, "out: found .*whose folder is not a directory"),
    OutCase("a directory", "out.h5", Path.mkdir, "out: found .*out.h5, a directory; expected the name of a file"),
    OutCase("existing", "out.h5", lambda out: out.write_text("mine"), "out: found .*which exists; expected a new file"),
    OutCase("the input", "in.h5", lambda out: None, NEVER),
    OutCase("the input, overwrite", "in.h5", lambda out: None, NEVER, overwrite=True),
    OutCase("link to the input", "out.h5", lambda out: out.symlink_to("in.h5"), NEVER, overwrite=True),
    OutCase("hard link of the input", "out.h5", lambda out: out.hardlink_to("in.h5"), NEVER, overwrite=True),
    OutCase("no name in a folder", "new.h5/", lambda out: None, "out: found new.h5/, a directory; expected the name"),
    OutCase("a fifo", "out.h5", os.mkfifo, "out: found out.h5, which is no regular file", overwrite=True),
    OutCase("a directory as .part", "out.h5", lambda out: Path(f"{out}.part").mkdir(), "out.h5.part, a directory"),
    OutCase("the input as .part", "out.h5", lambda out: Path(f"{out}.part").symlink_to("in.h5"), NEVER),
]


@pytest.mark.parametrize("case", OUT_CASES, ids=[case.name for case in OUT_CASES])
def test_outputs_are_refused_and_left_alone(case, folder, capsys):
    inputs, out = write_inputs(Path("in.h5"), X), case.out
    case.make(Path(out))
    before = contents(folder)
    with pytest.raises(ArgumentError, match=case.says):
        attend_to_file(inputs, out, options=Options(overwrite=case.overwrite))
    flags = ["--overwrite"] if case.overwrite else []
    refused_by_command(capsys, case.says, "attend", inputs, "-o", out, *flags)
    assert contents(folder) == before


class BytesPath:
    """A path as bytes, which is allowed, but not here."""

    def __fspath__(self) -> bytes:
        return b"out.h5"


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("out", ["a\0b.h5", "a\ud800.h5", BytesPath()], ids=["a null", "half a letter", "bytes"])
def test_outputs_that_no_file_can_be_named_are_refused(out, durable, folder):
    inputs = write_inputs(Path("in.h5"), X)
    before = contents(folder)
    for call in (cqsa.attention, cqsa.plan):
        with pytest.raises(ArgumentError, match=r"^out: found .*; expected .*a path"):
            call(*(f"{inputs}:/{name}" for name in "qkv"), out=out, options=Options(durable=durable))
    assert contents(folder) == before


def test_an_existing_output_is_replaced_only_if_asked(folder, capsys):
    inputs, out = write_inputs(Path("in.h5"), X), Path("out.h5")
    out.write_text("mine")
    refused_by_command(capsys, "out: found out.h5, which exists", "attend", inputs, "-o", out)
    assert out.read_text() == "mine"
    attend_to_file(inputs, out, options=Options(overwrite=True))
    assert run_command(capsys, "attend", inputs, "-o", out, "--overwrite").code == 0
    assert sorted(contents(folder)) == ["in.h5", "out.h5"]


@pytest.fixture
def mounted(folder):
    """Mounts small file systems below ``folder``; skips where that is not allowed."""
    places = []

    def mount(name: str, options: str) -> Path:
        place = folder / name
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


def test_an_unwritable_folder_is_refused(mounted, capsys):
    inputs, locked = write_inputs(Path("in.h5"), X), mounted("locked", "ro")
    says = "out: found .*whose folder is not writable; expected a writable folder"
    with pytest.raises(ArgumentError, match=says):
        attend_to_file(inputs, locked / "out.h5")
    refused_by_command(capsys, says, "attend", inputs, "-o", locked / "out.h5")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody can make files")
def test_a_folder_that_takes_no_files_is_refused(folder, capsys):
    inputs, says = write_inputs(Path("in.h5"), X), "/proc/out.h5.*(No such file|folder is not writable)"
    with pytest.raises((ArgumentError, StorageError), match=says):
        attend_to_file(inputs, "/proc/out.h5")
    refused_by_command(capsys, says, "attend", inputs, "-o", "/proc/out.h5")


# ---- full disks


def test_a_full_disk_is_refused_before_any_work(mounted, capsys):
    inputs, small = write_inputs(Path("in.h5"), shaped(1, 20_000, 64)), mounted("small", "size=1m")
    says = r"(output|out\.h5\.part): cannot be allocated: .*No space left.* It needs 4\.\d+ MiB; .* are free"
    with pytest.raises(StorageError, match=says):
        attend_to_file(inputs, small / "out.h5")
    refused_by_command(capsys, says, "attend", inputs, "-o", small / "out.h5")
    assert contents(small) == {}


ON_DISK = {"memory": None, "options": Options(cover="cqs", chunks=7, threads=1)}


def states_on_disk(inputs: Path) -> tuple[int, cqsa.Plan]:
    """A budget that puts the states of 7 chunks on the disk, and its plan."""
    arguments = {**{name: f"{inputs}:/{name}" for name in "qkv"}, **ON_DISK, "out": "out.h5"}
    memory = smallest_bytes(**arguments)
    plan = cqsa.plan(**{**arguments, "memory": memory})
    assert plan.chosen.states_on_disk
    return memory, plan


def test_a_full_scratch_disk_is_refused_before_any_work(mounted, capsys):
    inputs, small = write_inputs(Path("in.h5"), shaped(1, 20_000, 16)), mounted("small", "size=64k")
    memory, _ = states_on_disk(inputs)
    says = "scratch: cannot reserve .* for states in .*small: No space left on device. Name a directory"
    before = sorted(contents(Path()))
    with pytest.raises(StorageError, match=says):
        attend_to_file(
            inputs, "out.h5", memory=memory, options=Options(cover="cqs", chunks=7, threads=1, scratch=str(small))
        )
    flags = ["--cover", "cqs", "--chunks", 7, "--threads", 1, "--memory", memory, "--scratch", small]
    refused_by_command(capsys, says, "attend", inputs, "-o", "out.h5", *flags)
    assert sorted(contents(Path())) == before


@pytest.mark.parametrize("place", ["output", "scratch"])
def test_a_refused_reservation_leaves_nothing(place, folder, monkeypatch):
    """The same without the right to mount: the system refuses one of the two reservations."""
    inputs = write_inputs(Path("in.h5"), shaped(1, 20_000, 16))
    memory, plan = states_on_disk(inputs)
    reserve = os.posix_fallocate

    def full(descriptor: int, start: int, size: int) -> None:
        if (size == plan.chosen.scratch_bytes) == (place == "scratch"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = contents(folder)
    with pytest.raises(StorageError, match="No space left") as caught:
        attend_to_file(inputs, "out.h5", **{**ON_DISK, "memory": memory})
    assert str(caught.value).startswith("scratch" if place == "scratch" else "out.h5")
    assert contents(folder) == before


def test_a_file_size_limit_is_refused_like_a_full_disk(folder):
    inputs = write_inputs(Path("in.h5"), shaped(1, 20_000, 64))
    before = contents(folder)
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    code += "from cqsa_arrays.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "attend", inputs, "-o", "out.h5"]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "output: cannot be allocated" in done.stderr
    assert contents(folder) == before


# ---- the command's own arguments

COMMANDS = [
    (
        "12 bananas",
        "attend in.h5 -o out.h5 --memory|12 bananas",
        "memory: found '12 bananas'; expected a positive number",
    ),
    ("-1GiB", "attend in.h5 -o out.h5 --memory=-1GiB", "memory: found '-1GiB'; expected a positive number of bytes"),
    ("1KiB", "attend in.h5 -o out.h5 --memory 1KiB", r"--memory: .* does not fit 1 KiB .* Pass --memory \d+ or more"),
    ("layout", "attend in.h5 -o out.h5 --layout xyz", "layout: found 'xyz'; expected one of bhnd"),
    ("scale", "attend in.h5 -o out.h5 --scale nan", "scale: found nan; expected a finite number"),
    ("device", "attend in.h5 -o out.h5 --device gpu", "device: found 'gpu'; expected 'auto', 'cpu'"),
    ("cover", "plan in.h5 --cover spiral", "cover: found 'spiral'; expected one of auto"),
    ("chunks", "plan in.h5 --chunks 0", "chunks: found 0; expected a whole number, at least 1"),
    ("threads", "plan in.h5 --threads 0", "threads: found 0; expected a whole number, at least 1"),
    ("two masks", "plan in.h5 --causal --offset 3", "--causal: found both --causal and --offset; expected one of them"),
    ("offset", f"plan in.h5 --offset {2**63}", "offset: found 9223372036854775808; expected a whole number"),
    ("dtype of half a letter", "plan in.h5 --dtype \udcff", r"dtype: found '\\udcff'; expected one of float16"),
    ("half a letter", "info \udcff.h5", r"\\udcff.h5: No such file or directory"),
    ("a data set of half a letter", "plan in.h5 --q in.h5:\udcff", r"q: found \\udcff in in.h5 is missing"),
    ("a name that acts", "info \x1b[2J.h5", r"\\x1b\[2J.h5: No such file or directory"),
    ("dtype", "plan in.h5 --dtype int8", "dtype: found int8; expected one of float16"),
    ("scratch", "plan in.h5 --scratch nowhere", "scratch: found 'nowhere'; expected an existing directory"),
    ("no output name", "attend in.h5 -o |", "--out: found ''; expected OUT.h5, which is not empty"),
    ("data set", "plan in.h5 --q in.h5:/x", r"q: found /x in in.h5 is missing \(data sets present: /k, /q, /v\)"),
    ("verify a missing file", "verify no.h5", "no.h5: No such file or directory. Check the path"),
    ("verify an input", "verify in.h5", "path: found in.h5 without them .*; expected an output of cqsa attend"),
    ("verify no rows", "verify out.h5 --rows 0", "rows: found 0; expected a whole number, at least 1"),
    ("verify seed", "verify out.h5 --seed -1", "seed: found -1; expected a whole number, at least 0"),
    (
        "compare shapes",
        "compare in.h5:/q other.h5:/q",
        r"out: found shape \(2, 300, 8\); expected the reference's shape",
    ),
    ("compare a file", "compare in.h5 in.h5:/q", "result: found 'in.h5'; expected an existing file and a data set"),
    ("info of a directory", "info .", r"\. is a directory; expected an HDF5 file"),
    ("info of text", "info text.h5", "text.h5 is not an HDF5 file"),
    ("make over a file", "make in.h5 --tokens 9", "out: found in.h5, which exists; expected a new file"),
    ("make nothing", "make new.h5 --tokens 0", "tokens: found 0; expected at least 1"),
    ("make integers", "make new.h5 --tokens 9 --dtype int8", "dtype: found int8; expected one of float16"),
    ("make nowhere", "make no/new.h5 --tokens 9", "out: found no/new.h5, whose folder is missing"),
    ("make unknown", "make new.h5 --tokens 9 --chunk-tokens 3 --compression zip", "compression: found 'zip'; expected"),
]


@pytest.mark.parametrize(("line", "says"), [case[1:] for case in COMMANDS], ids=[case[0] for case in COMMANDS])
def test_the_command_refuses_in_one_line(line, says, folder, capsys):
    write_inputs(folder / "in.h5", X)
    write_inputs(folder / "other.h5", X[:, 1:])
    (folder / "text.h5").write_text("q,k,v" * 999)
    before = contents(folder)
    words, bar, last = line.partition("|")
    refused_by_command(capsys, says, *words.split(), *([last] if bar else []))
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("verify out.h5 --rows some", "--rows: 'some': expected a whole number or \"all\""),
        ("verify out.h5 --tolerance nan", "--tolerance: 'nan': expected a number, at least 0"),
        ("compare a:/q b:/q --tolerance -1", "--tolerance: '-1': expected a number, at least 0"),
        ("plan in.h5 --chunks many", "--chunks: invalid int value: 'many'"),
        ("attend in.h5", "required: -o/--out"),
        ("plan", "required: QKV.h5"),
        ("resume", "required: OUT.h5"),
        ("finish", "invalid choice: 'finish'"),
        ("", "required: COMMAND"),
    ],
)
def test_words_that_do_not_parse_show_the_usage(line, says, folder, capsys):
    done = run_command(capsys, *line.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("usage: cqsa")
    assert says in done.err.splitlines()[-1]


@pytest.mark.parametrize("rows", [0, 1.5, "all", True])
def test_verify_wants_a_number_of_rows(rows, folder):
    with pytest.raises(ArgumentError, match=r"^rows: found .*; expected a whole number, at least 1. None checks all"):
        cqsa.verify("out.h5", rows=rows)
