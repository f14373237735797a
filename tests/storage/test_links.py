"""Links in files: followed inside the file and to its neighbours; further only where that is asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from storage_files import normal, qkv

import cqsa_arrays as cqsa
from cqsa_arrays import ArgumentError, Options, StorageError
from cqsa_arrays.cli import main
from cqsa_arrays.storage import dataset, describe, open_file

X = normal((20, 8))


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder with the file x.h5, and outside of it a file of data."""
    (tmp_path / "home").mkdir()
    qkv(tmp_path / "away.h5", X)
    return tmp_path / "home"


def linked(path: Path, *target: object) -> Path:
    """A file whose /q, /k and /v are external links to those of ``target``, or all to its second part."""
    with h5py.File(path, "w") as file:
        for name in "qkv":
            file[name] = h5py.ExternalLink(*map(str, target if len(target) > 1 else (*target, f"/{name}")))
    return path


def test_links_to_neighbours_and_below_are_followed(home):
    (home / "sub").mkdir()
    qkv(home / "sub" / "y.h5", X)
    for target in ("sub/y.h5", home / "sub" / "y.h5", "sub/../sub/y.h5"):
        found = open_file(linked(home / "x.h5", target)).q
        assert np.array_equal(found[...], X)
        assert found.stored.path == str(home / "sub" / "y.h5")
        assert found.stored.linked_from == (str(home / "x.h5"),)


def test_links_lead_through_groups_soft_links_and_files(home):
    """x.h5: /q -> /near/q, /near -> sub/y.h5:/layers; y.h5: /layers/q -> z.h5:/real, beside y.h5."""
    (home / "sub").mkdir()
    with h5py.File(home / "x.h5", "w") as file:
        file["near"], file["q"] = h5py.ExternalLink("sub/y.h5", "/layers"), h5py.SoftLink("/near/q")
    with h5py.File(home / "sub" / "y.h5", "w") as file:
        file.create_group("layers")["q"] = h5py.ExternalLink("z.h5", "real")
    with h5py.File(home / "sub" / "z.h5", "w") as file:
        file["real"] = X
    found = dataset(f"{home}/x.h5:/q")
    assert np.array_equal(found[...], X)
    assert found.stored.label == "z.h5:/real"
    assert [Path(one).name for one in found.stored.linked_from] == ["x.h5", "y.h5"]


def outside(home: Path, how: str) -> Path:
    """x.h5, which leads to away.h5 outside its folder."""
    if how == "relative":
        return linked(home / "x.h5", "../away.h5")
    if how == "absolute":
        return linked(home / "x.h5", home.parent / "away.h5")
    if how == "link of the file system":
        (home / "y.h5").symlink_to("../away.h5")
        return linked(home / "x.h5", "y.h5")
    if how == "like a neighbour":
        qkv(home.parent / "home.h5", X)
        return linked(home / "x.h5", "../home.h5")
    linked(home / "y.h5", "../away.h5")
    return linked(home / "x.h5", "y.h5")


WAYS = ["relative", "absolute", "link of the file system", "like a neighbour", "by a neighbour"]


@pytest.mark.parametrize("how", WAYS)
def test_links_to_elsewhere_are_followed_only_if_asked(home, how, capsys):
    path, out = outside(home, how), home / "out.h5"
    says = f"has an external link to .*:/q, which is outside {home} and not followed.*follow_links=True"
    references = [f"{path}:/{name}" for name in "qkv"]
    for call in (lambda: open_file(path), lambda: dataset(references[0]), lambda: cqsa.attention(*references)):
        with pytest.raises(StorageError, match=says):
            call()
    assert main(["attend", str(path), "-o", str(out)]) == 2
    assert "not followed" in capsys.readouterr().err
    assert np.array_equal(cqsa.open(path, follow_links=True).q[...], X)
    exact = cqsa.attention(X, X, X)
    assert np.array_equal(cqsa.attention(*references, options=Options(follow_links=True)), exact)
    assert main(["attend", str(path), "-o", str(out), "--follow-links"]) == 0
    assert main(["compare", f"{path}:/q", references[1], "--follow-links"]) == 0
    assert main(["verify", str(out)]) == 0


def test_the_folder_is_that_of_the_real_file(home):
    """A link of the file system to a file elsewhere does not make this folder its own."""
    linked(home.parent / "x.h5", "away.h5")
    (home / "x.h5").symlink_to("../x.h5")
    assert np.array_equal(open_file(home / "x.h5").q[...], X)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        pytest.param("no.h5", "external link to no.h5:/q, which is missing", id="missing"),
        pytest.param("fifo", "fifo is not a regular file", id="fifo"),
        pytest.param("sub", "sub is a directory", id="folder"),
        pytest.param("text.h5", "text.h5 is not an HDF5 file", id="text"),
        pytest.param("x.h5", "more than 64 external links: a circle", id="itself"),
    ],
)
def test_links_to_what_is_no_file_are_refused(home, target, says):
    os.mkfifo(home / "fifo")  # opening it would wait for ever
    (home / "sub").mkdir()
    (home / "text.h5").write_text("q, k, v")
    with h5py.File(home / "x.h5", "w") as file:
        file["q"] = h5py.ExternalLink(target, "/q")
    with pytest.raises(StorageError, match=says):
        dataset(f"{home}/x.h5:/q")


def test_a_missing_data_set_at_the_end_of_a_link_is_named_where_it_is_missing(home):
    qkv(home / "y.h5", X)
    with pytest.raises(ArgumentError, match=r"q: found /no in .*y.h5 is missing \(data sets present: /k, /q, /v\)"):
        dataset(f"{linked(home / 'x.h5', 'y.h5', '/no')}:/q", argument="q")


@pytest.mark.parametrize("name", ["x.h5", "y.h5"])
def test_neither_the_linking_file_nor_the_linked_one_is_overwritten(home, name):
    path = linked(home / "x.h5", qkv(home / "y.h5", X).name)
    before = (home / name).read_bytes()
    with pytest.raises(ArgumentError, match="which is an input; expected another file"):
        cqsa.attention(*(f"{path}:/{one}" for one in "qkv"), out=home / name, options=Options(overwrite=True))
    assert (home / name).read_bytes() == before


def test_external_files_and_virtual_data_sets_stay_refused(home):
    with h5py.File(home / "x.h5", "w") as file:
        file.create_dataset("q", (20, 8), "f4", external=[(str(home / "raw.bin"), 0, 640)])
        layout = h5py.VirtualLayout((20, 8), "f4")
        layout[...] = h5py.VirtualSource("y.h5", "q", (20, 8))
        file.create_virtual_dataset("k", layout)
    for name, says in (("q", "keeps its data in external files"), ("k", "is virtual")):
        with pytest.raises(StorageError, match=says):
            dataset(f"{home}/x.h5:/{name}", follow_links=True)


def test_names_that_are_no_text_are_read(home):
    with h5py.File(home / "x.h5", "w") as file:
        file[b"\xff\xfe"] = X
        file[b"\xff\xfe"].attrs["layout"] = "nd"
        file.create_dataset(b"\xfd", data=X, chunks=(5, 8))
        file.attrs[b"\xff"] = 1.0
    names = [one.name for one in describe(home / "x.h5").datasets]
    assert names == ["/\udcfd", "/\udcff\udcfe"]
    assert "\\udcff\\udcfe" in str(describe(home / "x.h5"))
    assert json.loads(describe(home / "x.h5").to_json())["datasets"][1]["layout"] == "nd"
    for name in names:
        found = dataset(f"{home}/x.h5:{name}")
        assert np.array_equal(found[...], X)
        found.source().close()
        assert np.array_equal(cqsa.attention(found, found, found, out=home / "out.h5", options=OVERWRITE), ATTENDED)


OVERWRITE = Options(overwrite=True)
ATTENDED = cqsa.attention(X, X, X)


def test_a_damaged_data_set_is_listed_beside_the_good_ones(home):
    path = qkv(home / "x.h5", X)
    with h5py.File(path) as file:
        position = h5py.h5o.get_info(file["k"].id).addr
    with path.open("r+b") as raw:
        raw.seek(position), raw.write(b"\xff" * 8)
    notes = {one.name: one.note for one in describe(path).datasets}
    assert notes.keys() == {"/k", "/q", "/v"}
    assert (notes["/q"], notes["/v"]) == (None, None)
    assert f"{path}:/k is damaged" in notes["/k"]
    with pytest.raises(StorageError, match=r"x\.h5:/k is damaged"):
        dataset(f"{path}:/k")
    assert dataset(f"{path}:/q").shape == (20, 8)
