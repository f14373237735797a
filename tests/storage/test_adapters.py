"""What may be passed as an array, and what is refused with a remedy."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from storage_files import BFLOAT16, normal, qkv, read

from cqsa_arrays.errors import ArgumentError
from cqsa_arrays.storage import as_source, open_file


class _Exchanged:
    """An array of another library: no NumPy array, but one of its protocols."""

    def __init__(self, array, device=1):
        self.array, self.device = array, device


class _DLPack(_Exchanged):
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device, 0


class _Interface(_Exchanged):
    @property
    def __array_interface__(self):
        return self.array.__array_interface__


class _Array(_Exchanged):
    def __array__(self, dtype=None, copy=None):
        return self.array


class _Cuda(_Exchanged):
    __cuda_array_interface__ = {"version": 3}  # noqa: RUF012


@pytest.mark.parametrize("kind", [_DLPack, _Interface])
def test_arrays_of_other_libraries_are_used_in_place(kind):
    array = normal((2, 50, 8))
    source = as_source(kind(array), "q")
    assert source.in_place
    assert np.shares_memory(source.view(*(slice_of(n) for n in (1, 2, 50))), array)


def test_what_only_converts_would_be_copied_whole_and_is_refused():
    with pytest.raises(ArgumentError, match=r"np\.asarray\(q"):
        as_source(_Array(normal((2, 50, 8))), "q")


def slice_of(length):
    from cqsa_arrays.ranges import Range

    return Range(0, length)


def test_disk_arrays_take_a_layout(tmp_path):
    q = open_file(qkv(tmp_path / "x.h5", normal((50, 3, 8)))).q
    source = as_source(q, "q", "nhd")
    assert source.shape == (1, 3, 50, 8)
    assert np.array_equal(read(source)[0], normal((50, 3, 8)).swapaxes(0, 1))
    source.close()


WITHOUT_CUPY = pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy would take it over")
REFUSED = [
    pytest.param([[1.0, 2.0]], "found builtins.list.*np.asarray", id="list"),
    pytest.param(1.5, "builtins.float", id="float"),
    pytest.param(np.float32(1.5), "numpy.float32", id="numpy-scalar"),
    pytest.param(np.array(1.5), "0 dimensions", id="zero-dimensional"),
    pytest.param("qkv.h5:/q", "builtins.str", id="text"),
    pytest.param(None, "NoneType", id="none"),
    pytest.param(np.zeros((5, 8), "i4"), r"dtype int32.*astype\('float32'\)", id="integers"),
    pytest.param(np.zeros((5, 8), "u2"), r"dtype uint16.*view\(ml_dtypes.bfloat16\)", id="bfloat16-bits"),
    pytest.param(np.zeros((5, 8), "?"), "dtype bool", id="booleans"),
    pytest.param(np.zeros((5, 8), "c8"), "dtype complex64", id="complex"),
    pytest.param(np.zeros((5, 8), "O"), "dtype object", id="objects"),
    pytest.param(np.zeros((5, 8), "g"), "dtype (longdouble|float128)", id="long-double"),
    pytest.param(np.zeros((5, 8), [("x", "f4")]), "dtype ", id="records"),
    pytest.param(np.zeros((5, 8), ">f4"), r"other byte order.*newbyteorder", id="big-endian"),
    pytest.param(np.ma.masked_array(np.zeros((5, 8), "f4")), "masked array", id="masked"),
    pytest.param(_Cuda(None), r"on a GPU.*\.get\(\)", id="cuda-interface", marks=WITHOUT_CUPY),
    pytest.param(_DLPack(np.zeros((5, 8), "f4"), device=2), r"on a GPU.*\.get\(\)", id="cuda-dlpack"),
    pytest.param(_DLPack(np.zeros((5, 8), BFLOAT16)), "NumPy cannot take over", id="dlpack-of-an-unknown-type"),
]


@pytest.mark.parametrize(("array", "said"), REFUSED)
def test_what_cannot_be_used_is_named_with_a_remedy(array, said):
    with pytest.raises(ArgumentError, match=f"^k: found .*{said}|^k: .*{said}") as caught:
        as_source(array, "k")
    assert caught.value.argument == "k"


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_and_using_memory_loads_no_file_or_gpu_library():
    use = "import numpy as np; from cqsa_arrays.storage import as_source; as_source(np.zeros((2, 2)), 'q')"
    assert not _loaded_by(use) & {"h5py", "numba", "cupy", "torch"}


def test_the_check_of_imports_can_fail():
    assert "h5py" in _loaded_by("import h5py, cqsa_arrays.storage")
