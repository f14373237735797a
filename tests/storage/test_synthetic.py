"""Synthetic inputs: the same numbers for a seed however they are stored, in bounded memory; and their description."""

import json
import os

import h5py
import numpy as np
import pytest
from storage_files import BFLOAT16, DTYPES, normal, peak_bytes, qkv, reset_peak, resident_bytes

from cqsa_arrays.errors import ArgumentError
from cqsa_arrays.ranges import Range
from cqsa_arrays.storage import LAYOUTS, InputSpec, Layout, describe, make_inputs, open_file
from cqsa_arrays.storage.synthetic import normal_block

MIB = 1 << 20
SPEC = InputSpec(tokens=700, heads=3, head_dim=16, batch=2, key_tokens=300, value_dim=8, seed=5)


def _logical(path, name):
    array = getattr(open_file(path), name)
    return array.layout.logical(array[...])


def _variant(**changes):
    kept = {name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__}
    return InputSpec(**{**kept, **changes})


def test_shapes_and_variance(tmp_path):
    make_inputs(tmp_path / "x.h5", SPEC)
    opened = open_file(tmp_path / "x.h5")
    assert (opened.q.shape, opened.k.shape, opened.v.shape) == ((2, 3, 700, 16), (2, 3, 300, 16), (2, 3, 300, 8))
    assert abs(opened.q[...].std() - 1) < 0.02
    assert os.listdir(tmp_path) == ["x.h5"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_tokens", [None, 97], ids=["contiguous", "chunked"])
def test_numbers_depend_on_the_place_only(tmp_path, layout, chunk_tokens):
    one = {"batch": 2 if "b" in layout else 1, "heads": 3 if "h" in layout else 1}
    make_inputs(tmp_path / "a.h5", _variant(**one))
    make_inputs(tmp_path / "b.h5", _variant(**one, layout=layout, chunk_tokens=chunk_tokens))
    for name in "qkv":
        assert np.array_equal(_logical(tmp_path / "a.h5", name), _logical(tmp_path / "b.h5", name))


def test_blocks_of_any_size_are_parts_of_one_sequence():
    whole = normal_block(SPEC, "k", 1, Range(0, 3), Range(0, 300))
    for tokens in (Range(0, 1), Range(255, 257), Range(37, 299)):
        assert np.array_equal(normal_block(SPEC, "k", 1, Range(1, 3), tokens), whole[:, 1:, tokens.slice])


def test_seeds_data_sets_heads_and_blocks_differ():
    block = normal_block(SPEC, "q", 0, Range(0, 2), Range(0, 512))
    others = [
        normal_block(SPEC, "k", 0, Range(0, 1), Range(0, 256)),
        normal_block(_variant(seed=6), "q", 0, Range(0, 1), Range(0, 256)),
        normal_block(SPEC, "q", 1, Range(0, 1), Range(0, 256)),
        block[:, 1:, :256],
        block[:, :1, 256:],
    ]
    assert all(not np.isclose(block[:, :1, :256], other).any(axis=(0, 1, 3)).all() for other in others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_types_hold_the_same_numbers_rounded(tmp_path, dtype):
    make_inputs(tmp_path / "x.h5", _variant(dtype=dtype.name, scale=0.5))
    wide = normal_block(_variant(dtype=dtype.name, scale=0.5), "v", 0, Range(0, 3), Range(0, 300))
    assert open_file(tmp_path / "x.h5").v.dtype == dtype
    assert np.array_equal(_logical(tmp_path / "x.h5", "v")[:1], wide.astype(dtype))


@pytest.mark.parametrize("chunk_tokens", [None, 100], ids=["contiguous", "chunked"])
def test_shared_inputs_are_one_data_set_with_three_names(tmp_path, chunk_tokens):
    spec = InputSpec(tokens=5000, dtype="bfloat16", shared=True, chunk_tokens=chunk_tokens)
    make_inputs(tmp_path / "x.h5", spec)
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["q"] == file["k"] == file["v"]
    assert os.path.getsize(tmp_path / "x.h5") < 1.1 * 5000 * 64 * 2
    assert open_file(tmp_path / "x.h5").v.dtype == BFLOAT16


@pytest.mark.parametrize(
    ("bad", "argument"),
    [
        ({"tokens": 0}, "tokens"),
        ({"heads": -1}, "heads"),
        ({"dtype": "int8"}, "dtype"),
        ({"layout": "dn"}, "layout"),
        ({"shared": True}, "shared"),
        ({"compression": "gzip"}, "compression"),
        ({"seed": -1}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_specifications_are_named(bad, argument):
    with pytest.raises(ArgumentError) as caught:
        _variant(**bad)
    assert caught.value.argument == argument


def test_existing_files_are_kept_unless_told(tmp_path):
    path = qkv(tmp_path / "x.h5", normal((5, 8)))
    with pytest.raises(ArgumentError, match="which exists"):
        make_inputs(path, SPEC)
    make_inputs(path, SPEC, overwrite=True)
    assert open_file(path).q.shape == (2, 3, 700, 16)


def test_an_interrupted_making_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    for spec in (SPEC, _variant(chunk_tokens=100)):
        with pytest.raises(KeyboardInterrupt):
            make_inputs(tmp_path / "x.h5", spec, progress=interrupt)
        assert os.listdir(tmp_path) == []


def test_progress_ends_at_all_bytes(tmp_path):
    told = []
    make_inputs(tmp_path / "x.h5", SPEC, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (told[0][1],) * 2 == (2 * 3 * (700 * 16 + 300 * 16 + 300 * 8) * 4,) * 2


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_memory_does_not_grow_with_the_file(tmp_path, layout):
    make_inputs(tmp_path / "warm.h5", InputSpec(tokens=1000, heads=8, layout=layout))
    reset_peak()
    before = resident_bytes()
    make_inputs(tmp_path / "x.h5", InputSpec(tokens=20_000, heads=8, layout=layout, shared=True))  # 39 MiB
    assert peak_bytes() - before < 6 * MIB


def test_description_of_inputs(tmp_path):
    make_inputs(tmp_path / "x.h5", _variant(layout="bnhd", dtype="bfloat16"))
    found = {one.name: one for one in describe(tmp_path / "x.h5").datasets}
    assert list(found) == ["/k", "/q", "/v"]
    assert (found["/q"].shape, found["/q"].layout, found["/q"].dtype) == ((2, 700, 3, 16), "bnhd", "bfloat16")
    assert found["/q"].mapped
    assert found["/q"].stored_bytes == 2 * 700 * 3 * 16 * 2


def test_description_says_why_data_are_not_mapped(tmp_path):
    with h5py.File(qkv(tmp_path / "x.h5", normal((100, 8)), chunks=(10, 8), compression="gzip"), "r+") as file:
        file["counts"] = np.arange(3)
        file.attrs["plan"] = json.dumps({"c": 7})
        file.attrs["version"] = np.float64(2)
    info = describe(tmp_path / "x.h5")
    found = {one.name: one for one in info.datasets}
    assert found["/q"].note == "chunked"
    assert "integers in /counts" in found["/counts"].note
    text = str(info)
    assert "100 x 8" in text
    assert "no: chunked" in text
    again = json.loads(info.to_json())
    assert again["attributes"] == {"plan": '{"c": 7}', "version": 2.0}
    assert again["size_bytes"] == os.path.getsize(tmp_path / "x.h5")


def test_layouts_fit_their_axes():
    with pytest.raises(ArgumentError, match="3 heads"):
        Layout("nd").physical_shape((1, 3, 5, 8))
