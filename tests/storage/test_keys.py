"""``DiskArray[...]`` means what NumPy means by the same key, however the data are stored."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5d, h5t
from storage_files import BFLOAT16, create_low_level, hdf5_bfloat16, normal, write_array

from cqsa_arrays.storage import DiskArray, dataset

SHAPE = (3, 50, 8)
FORMS = {
    "contiguous": {},
    "chunked": {"chunks": (2, 7, 3)},
    "gzip": {"chunks": (1, 16, 8), "compression": "gzip", "shuffle": True},
    "one-token-chunks": {"chunks": (1, 1, 8)},
}


def stored(folder: Path, form: str, array: np.ndarray) -> DiskArray:
    with h5py.File(folder / "x.h5", "w") as file:
        write_array(file, "q", array, **FORMS[form])
    return dataset(f"{folder}/x.h5:/q")


def indices(rng: random.Random, length: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.array([rng.randrange(-length, length) for _ in range(count)], int).reshape(shape)


def a_slice(rng: random.Random, length: int) -> slice:
    start, stop = (rng.choice([None, rng.randrange(-length - 2, length + 3)]) for _ in range(2))
    return slice(start, stop, rng.choice([None, 1, 2, 3, -1, -2, 7, length + 1]))


def a_key(rng: random.Random) -> object:
    """A key of any kind, most of which fit SHAPE; some raise IndexError."""
    parts: list[object] = []
    picks, width = rng.random() < 0.5, rng.choice([0, 1, 4])
    for length in SHAPE[: rng.randrange(4)]:
        kind = rng.choice(["int", "slice", "slice", "array", "list", "mask", "far"] if picks else ["int", "slice"])
        if kind == "far":
            kind = "int" if rng.random() < 0.9 else kind
        parts.append(
            {
                "int": lambda n: rng.choice([int, np.int64, np.array])(rng.randrange(-n, n)),
                "slice": lambda n: a_slice(rng, n),
                "array": lambda n: indices(rng, n, rng.choice([(width,), (2, width), (width,)])),
                "list": lambda n: indices(rng, n, (width,)).tolist(),
                "mask": lambda n: np.array([rng.random() < 0.5 for _ in range(n)]),
                "far": lambda n: rng.choice([n, -n - 1]),
            }[kind](length)
        )
    for extra in (None, Ellipsis, True):
        if rng.random() < (0.3 if extra is not True else 0.02):
            parts.insert(rng.randrange(len(parts) + 1), extra)
    return tuple(parts) if len(parts) != 1 or rng.random() < 0.5 else parts[0]


def outcome(array: object, key: object) -> tuple[object, ...]:
    try:
        found = array[key]
    except IndexError:
        return ("IndexError",)
    return type(found), found.dtype, found.shape, found.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_random_keys_mean_what_they_mean_in_numpy(tmp_path, form):
    array = normal(SHAPE)
    q, rng, answered = stored(tmp_path, form, array), random.Random(form), 0
    for number in range(300):
        key = a_key(rng)
        expected = outcome(array, key)
        assert outcome(q, key) == expected, (number, key)
        answered += expected != ("IndexError",)
    assert answered > 150


KEYS = [
    ..., (), None, 0, -1, np.int8(2), 3, -4, [0, 2], [], [True, False, True], [[0], [1]], (0, [1, 5, 1]),
    (slice(None), 49), (0, 50), (..., 8), (..., -8), slice(None, None, -1), slice(2, 2), (1, 2, 3), (0, 0, 0, 0),
    (0, slice(49, None, -7), slice(6, 0, -2)), (..., ...), "q", 1.0, [0.5], (None, 1, None, ...),
    (slice(None), [3, -1], 0), ([0, 1], slice(None), [0, 1]), (0, np.zeros(50, bool)), np.zeros(4, bool),
    np.arange(1200).reshape(SHAPE) % 7 == 0, (np.eye(3, 50) > 0, 2), (True, 1), np.True_, False,
    (0, np.array([], int)), np.array([-3, 2], "i1"), np.array([1, 2], "u8"), range(2),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", KEYS, ids=lambda key: repr(key)[:40].replace("\n", " "))
def test_keys_of_every_kind(tmp_path, form, key):
    array = normal(SHAPE)
    assert outcome(stored(tmp_path, form, array), key) == outcome(array, key)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["f2", BFLOAT16, "f8"], ids=str)
def test_every_element_type_is_picked_bit_by_bit(tmp_path, form, dtype):
    array = normal(SHAPE, dtype)
    array.reshape(-1).view(f"u{array.itemsize}")[100] += 12345
    q = stored(tmp_path, form, array)
    for key in (..., (1, [5, 2, 5]), (slice(None), -1, slice(None, None, -3)), (0, 0, 0)):
        assert outcome(q, key) == outcome(array, key)


def test_chunked_bfloat16_of_hdf5_keeps_its_bits(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        create_low_level(file, "q", hdf5_bfloat16(), SHAPE, h5d.COMPACT, h5d.ALLOC_TIME_EARLY)
        file["q"][...] = normal(SHAPE, BFLOAT16).astype("f4")
    assert outcome(dataset(f"{tmp_path}/x.h5:/q"), (0, [3, 1])) == outcome(normal(SHAPE, BFLOAT16), (0, [3, 1]))


@pytest.mark.parametrize("layout", [h5d.CONTIGUOUS, h5d.CHUNKED])
def test_data_without_space_or_elements(tmp_path, layout):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        if layout == h5d.CHUNKED:
            file.create_dataset("q", (4, 0), "f4", chunks=(2, 2), maxshape=(None, None))
        else:
            create_low_level(file, "q", h5t.NATIVE_FLOAT, (4, 8), layout, h5d.ALLOC_TIME_LATE)
    q = dataset(f"{tmp_path}/x.h5:/q")
    for key in (..., 0, [1, 3], (slice(None, None, -1), 0), 4):
        assert outcome(q, key) == outcome(np.zeros(q.shape, "f4"), key)


def test_what_lies_far_apart_is_not_read_with_what_lies_between(tmp_path, monkeypatch):
    """The first and the last of 3000 tokens: two reads of one chunk each."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("q", data=normal((3000, 8)), chunks=(10, 8))
    q = dataset(f"{tmp_path}/x.h5:/q")
    from cqsa_arrays.storage import picking

    sizes, whole = [], picking._read_box
    monkeypatch.setattr(picking, "_read_box", lambda *read: sizes.append(out := whole(*read)) or out)
    assert np.array_equal(q[[2999, 0, 3, 2999]], normal((3000, 8))[[2999, 0, 3, 2999]])
    assert [box.shape for box in sizes] == [(2, 8), (1, 8)]
