"""The text and the tiles of CUDA kernels, before anything is compiled."""

import doctest
import shutil

import pytest

from cqsa_arrays.errors import ArgumentError
from cqsa_arrays.kernels.cuda import source, variants
from cqsa_arrays.kernels.cuda.source import flattened
from cqsa_arrays.kernels.cuda.variants import FAMILIES, PADDED, choose_variant, shared_limit_bytes, simple_variant

CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0))
TYPES = ("float16", "bfloat16", "float32", "float64")
SOURCES = sorted(path.name for path in source.HERE.glob("*.cu"))


def test_documented_examples():
    results = doctest.testmod(variants)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("name", SOURCES)
def test_a_flattened_source_needs_no_other_file_and_has_every_header_once(name):
    text = flattened(name)
    assert "#include" not in text
    assert "#pragma once" not in text
    assert text.count("struct Call {") == 1
    assert text.count('#line 1 "call.cuh"') == 1


@pytest.mark.parametrize("name", SOURCES)
def test_a_change_of_a_header_changes_the_text(name, tmp_path, monkeypatch):
    before = flattened(name)
    files = tmp_path / "cuda"
    shutil.copytree(source.HERE, files)
    monkeypatch.setattr(source, "HERE", files)
    assert flattened(name) == before
    with (files / "call.cuh").open("a") as file:
        file.write("// changed\n")
    assert flattened(name) != before


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
def test_a_variant_exists_for_all_dimensions_and_fits(dtype, capability, split):
    for head_dim in (1, *PADDED, PADDED[-1] + 1):
        for value_dim in (1, *PADDED, PADDED[-1] + 1):
            words = head_dim % 16 == 0  # so that both are met
            variant = choose_variant(dtype, head_dim, value_dim, capability, split=split, whole_words=words)
            assert variant.element == dtype
            assert variant.shared_bytes < shared_limit_bytes(capability)
            assert variant.threads % 32 == 0
            assert variant.span_keys % variant.block_keys == 0 < variant.span_keys
            if variant != simple_variant(dtype):
                assert variant.head_dim in PADDED
                assert variant.value_dim in PADDED
                assert head_dim <= variant.head_dim
                assert value_dim <= variant.value_dim


@pytest.mark.parametrize("dims", [(257, 64), (64, 257), (1000, 1000)], ids=str)
def test_longer_vectors_take_the_simple_kernel(dims):
    for dtype in TYPES:
        assert choose_variant(dtype, *dims, (9, 0), split=True) == simple_variant(dtype)


def test_the_largest_tile_is_taken_that_fits():
    keys = {c: choose_variant("float16", 128, 128, c, split=False).block_keys for c in CAPABILITIES}
    assert {c for c, n in keys.items() if n == 32} == {(8, 6), (8, 9), (12, 0), (12, 1), (13, 0)}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_groups_of_warps_multiply_whole_words_on_hopper_alone(capability):
    def source_of(*dims, words=True, dtype="bfloat16"):
        return choose_variant(dtype, *dims, capability, split=True, whole_words=words).source

    hopper = "hopper.cu" if capability == (9, 0) else "half.cu"
    assert source_of(64, 64) == source_of(8, 128, dtype="float16") == source_of(96, 24) == hopper
    assert source_of(64, 64, words=False) == source_of(60, 64) == source_of(64, 1) == source_of(136, 64) == "half.cu"


def test_an_older_device_is_refused():
    with pytest.raises(ArgumentError, match=r"compute capability 7\.5"):
        choose_variant("float16", 64, 64, (7, 5), split=False)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_options_name_the_numbers_of_the_variant(family):
    dtype = {"half.cu": "float16", "hopper.cu": "float16", "double.cu": "float64"}.get(family.source, "float32")
    dim = 180 if family.source == "split_wide.cu" else 80
    split, words = family.source.startswith("split"), family.source == "hopper.cu"
    variant = choose_variant(dtype, dim, 128, (9, 0), split=split, whole_words=words)
    assert variant.source == family.source
    head = f"-DHEAD_DIM={96 if dim == 80 else 192}"
    assert {"-std=c++17", head, "-DVALUE_DIM=128", f"-DWARPS={variant.warps}"} <= set(variant.options)
    assert f"-DSHARED_BYTES={variant.shared_bytes}" in variant.options
