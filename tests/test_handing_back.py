"""What is computed is handed back as an array of the queries' library, or refused before any work."""

from __future__ import annotations

import sys
from types import ModuleType

import h5py
import ml_dtypes
import numpy as np
import pytest
import tiny_library

import cqsa_arrays as cqsa
from cqsa_arrays import job

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype("f2"), BFLOAT16, np.dtype("f4"), np.dtype("f8")]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def qkv(dtype: object = "f4") -> list[np.ndarray]:
    return [np.random.default_rng(seed).standard_normal((2, 60, 8)).astype(dtype) for seed in (1, 2, 3)]


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be computed or made ready."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    for name in ("run", "make_ready"):
        monkeypatch.setattr(job, name, refuse)


def register(monkeypatch, library: ModuleType) -> ModuleType:
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return library


# ---- a library of its own


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@by_dtype
def test_tensors_of_any_type_give_tensors_of_any_type(dtype, wanted):
    arrays = qkv(dtype)
    tiny_library.given.clear()
    out = cqsa.attention(*map(tiny_library.Tensor, arrays), dtype=wanted)
    assert type(out) is tiny_library.Tensor
    assert (out.dtype, out.shape) == (wanted.name, (2, 60, 8))
    assert bits(out.numpy()) == bits(cqsa.attention(*arrays, dtype=wanted))
    if BFLOAT16 not in (dtype, wanted):  # which NumPy is offered first, in vain
        assert not tiny_library.given  # what was handed over was let go


def test_a_result_is_handed_over_where_it_lies():
    """Without a copy of it: memory was promised for one."""
    taken = []

    class Library(ModuleType):
        def from_dlpack(self, array: object) -> np.ndarray:
            taken.append(np.from_dlpack(array))
            return taken[-1]

    library = Library("whole")
    q, k, v = qkv()
    model = type("Array", (tiny_library.Tensor,), {"__array_namespace__": lambda self: library})(q)
    out = cqsa.attention(model, k, v)
    assert out is taken[-1]
    # JAX, for one, copies what is not aligned to this.
    assert out.ctypes.data % 64 == 0


def test_a_subclass_from_another_module_is_of_the_same_library():
    mine = type("Mine", (tiny_library.Tensor,), {"__module__": "my.module"})
    assert type(cqsa.attention(mine(qkv()[0]), *qkv()[1:])) is tiny_library.Tensor


def test_a_library_is_found_by_the_namespace_that_its_arrays_name():
    namespace = ModuleType("deep.inside")
    namespace.from_dlpack = tiny_library.from_dlpack
    kind = type(
        "Array", (tiny_library.Tensor,), {"__module__": "no_such", "__array_namespace__": lambda self: namespace}
    )
    assert type(cqsa.attention(kind(qkv()[0]), *qkv()[1:])) is tiny_library.Tensor


@pytest.mark.parametrize("call", [cqsa.attention, cqsa.plan])
@pytest.mark.parametrize("refused", ["bfloat16", "float64"])
def test_what_the_library_cannot_take_is_refused_before_any_work(call, refused, no_work, monkeypatch):
    library = register(monkeypatch, tiny_library.without(refused))
    tensors = [library.Tensor(array) for array in qkv()]
    said = rf"dtype: found {refused}, which tiny_without\.Tensor cannot hold \(no {refused} here\); expected"
    with pytest.raises(cqsa.ArgumentError, match=said):
        call(*tensors, dtype=refused)


def test_an_out_array_of_that_type_is_the_way_out(monkeypatch):
    library = register(monkeypatch, tiny_library.without("bfloat16"))
    out = np.empty((2, 60, 8), BFLOAT16)
    assert cqsa.attention(*map(library.Tensor, qkv()), out=out) is out
    assert bits(out) == bits(cqsa.attention(*qkv(), dtype=BFLOAT16))


def test_a_library_that_narrows_in_silence_is_refused_before_any_work(no_work, monkeypatch):
    library = register(monkeypatch, tiny_library.without())
    exact = library.from_dlpack
    library.from_dlpack = lambda array: library.Tensor(exact(array).numpy().astype("f4"))
    with pytest.raises(cqsa.ArgumentError, match=r"dtype: found float64, which .* cannot hold \(it makes float32"):
        cqsa.attention(*map(library.Tensor, qkv()), dtype="float64")


def test_statistics_are_numpy_arrays_whatever_the_library(monkeypatch):
    library = register(monkeypatch, tiny_library.without("float32"))
    found = cqsa.statistics(*map(library.Tensor, qkv()))
    assert type(found.acc) is np.ndarray


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_of_a_library_can_be_compared(dtype):
    arrays = qkv(dtype)
    out = cqsa.attention(*map(tiny_library.Tensor, arrays))
    expected = cqsa.compare(cqsa.attention(*arrays), arrays[2])
    assert cqsa.compare(out, tiny_library.Tensor(arrays[2])) == expected
    assert cqsa.compare(out, out).passed


def test_an_array_that_no_device_has_is_named():
    """As PyTorch's meta tensors: their library has no device to name."""

    class Nowhere(tiny_library.Tensor):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise ValueError("Unknown device type meta for Dlpack")

    with pytest.raises(cqsa.ArgumentError, match=r"k: found .*Nowhere that NumPy cannot take over \(Unknown device"):
        cqsa.attention(qkv()[0], Nowhere(qkv()[0]), qkv()[0])


class NamedType:
    """As PyTorch's types of elements, which NumPy does not know."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_the_type_of_the_result_may_be_named_as_pytorch_does(wanted):
    assert cqsa.attention(*qkv(), dtype=NamedType(wanted.name)).dtype == wanted
    with pytest.raises(cqsa.ArgumentError, match=r"dtype: found .*; expected one of"):
        cqsa.attention(*qkv(), dtype=NamedType("int8"))


# ---- the libraries that the documentation names


def as_memmap(array: np.ndarray, folder) -> np.memmap:
    made = np.memmap(folder / "q.raw", array.dtype, "w+", shape=array.shape)
    made[...] = array
    return made


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_numpy_maps_and_files_give_numpy_arrays(wanted, tmp_path):
    q, k, v = qkv()
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["q"], file["k"], file["v"] = q, k, v
    opened = cqsa.open(tmp_path / "in.h5")
    with h5py.File(tmp_path / "in.h5") as file:
        for one in (q, as_memmap(q, tmp_path), file["q"], opened.q, f"{tmp_path}/in.h5:/q"):
            out = cqsa.attention(one, k, v, dtype=wanted)
            assert (type(out), out.dtype) == (np.ndarray, wanted)
            assert bits(out) == bits(cqsa.attention(q, k, v, dtype=wanted))


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@by_dtype
def test_torch_tensors_of_any_type_give_tensors_of_any_type(dtype, wanted):
    torch = pytest.importorskip("torch")
    arrays = qkv("f4")
    tensors = [torch.from_numpy(array).to(getattr(torch, dtype.name)) for array in arrays]
    out = cqsa.attention(*tensors, dtype=wanted.name)
    assert (type(out), out.dtype) == (torch.Tensor, getattr(torch, wanted.name))
    expected = cqsa.attention(*(array.astype(dtype) for array in arrays), dtype=wanted)
    assert bits(out.view(torch.uint8).numpy()) == bits(expected)
    assert torch.equal(cqsa.attention(*tensors, dtype=out.dtype), out)
    assert cqsa.compare(out, out).passed


def test_torch_parameters_views_and_tensors_without_data():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(array) for array in qkv())
    still = torch.nn.Parameter(q, requires_grad=False)
    assert type(cqsa.attention(still, k, v)) is torch.Tensor
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.stack([q, k]).to(dtype).permute(1, 2, 3, 0)[..., 0]
        expected = cqsa.attention(wide.contiguous(), wide.contiguous(), wide.contiguous())
        assert torch.equal(cqsa.attention(wide, wide, wide), expected)
    with pytest.raises(cqsa.ArgumentError, match=r"q: found torch.*gradient"):
        cqsa.attention(torch.nn.Parameter(q), k, v)
    with pytest.raises(cqsa.ArgumentError, match=r"q: found torch.*meta"):
        cqsa.attention(torch.empty(2, 60, 8, device="meta"), k, v)


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_jax_arrays_of_any_type_give_arrays_of_any_type(dtype, wanted, request):
    jax = pytest.importorskip("jax")
    arrays = [jax.numpy.asarray(array).astype(dtype) for array in qkv("f4")]
    if wanted == np.float64:
        request.getfixturevalue("no_work")
        with pytest.raises(cqsa.ArgumentError, match=r"dtype: found float64, which .* cannot hold \(it makes float32"):
            cqsa.attention(*arrays, dtype=wanted)
        return
    out = cqsa.attention(*arrays, dtype=wanted)
    assert isinstance(out, jax.Array)
    assert out.dtype == wanted
    assert bits(np.asarray(out)) == bits(cqsa.attention(*map(np.asarray, arrays), dtype=wanted))
