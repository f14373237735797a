"""Every CUDA kernel compiles for every architecture and fits into shared memory, fast ones into registers; no GPU."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from nvrtc import CompileError, compile_cubin, kernel_reports

from cqsa_arrays.kernels.cuda import source
from cqsa_arrays.kernels.cuda.source import flattened
from cqsa_arrays.kernels.cuda.variants import SIMPLE, choose_variant, shared_limit_bytes, simple_variant

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Element type, whether products are split, and whether vectors are whole words, which one kernel wants; bfloat16 is
# float16 with other instructions of the same shape.
HOPPER = ("float16", False, True)
TYPES = (("float16", False, False), ("float32", True, False), ("float64", False, False))
PLAIN = ("float32", False, False)  # of no job, only for comparison
EVERY_TYPE = (*TYPES, PLAIN, ("bfloat16", False, False), HOPPER)
DIMS = ((64, 64), (128, 128))
LARGER_DIMS = ((96, 96), (192, 192), (256, 256))
ODD_DIMS = ((32, 32), (64, 256), (192, 128))
# Tiles of values that are narrower than a pass of all threads that copy them.
NARROW = ((TYPES[0], (256, 32)), (TYPES[0], (256, 96)), (TYPES[1], (192, 32)), (TYPES[1], (256, 96)))
LONG = (512, 512)


def capability(arch):
    """(12, 0) of "sm_120"."""
    return int(arch[3:-1]), int(arch[-1])


def cases():
    """Variant and architecture, each pair once: every kernel on every architecture, each time with other dimensions.

    Architectures of one generation, where registers are handed out alike, are next to each other: both of the common
    dimensions come there. The longest vectors also come where shared memory is least, for they have other tiles there.
    """
    wanted = [(kind, DIMS[(i + j) % 2], arch) for i, arch in enumerate(ARCHITECTURES) for j, kind in enumerate(TYPES)]
    wanted += [(kind, LONG, arch) for kind, arch in zip(EVERY_TYPE, ARCHITECTURES, strict=True)]
    wanted += [(kind, dims, "sm_90") for kind in (*TYPES, HOPPER) for dims in LARGER_DIMS]
    wanted += [(kind, dims, "sm_90") for kind, dims in zip(TYPES, ODD_DIMS, strict=True)]
    wanted += [(kind, dims, "sm_90") for kind, dims in NARROW]
    wanted += [(kind, (256, 256), "sm_86") for kind in TYPES]
    wanted += [(HOPPER, dims, "sm_90") for dims in DIMS]
    wanted += [(PLAIN, dims, arch) for dims, arch in zip(DIMS, ("sm_80", "sm_90"), strict=True)]
    wanted += [(("bfloat16", False, words), dims, "sm_90") for dims, words in zip(DIMS, (True, False), strict=True)]
    chosen = (
        (choose_variant(dtype, *dims, capability(arch), split=split, whole_words=words), arch)
        for (dtype, split, words), dims, arch in wanted
    )
    return list(dict.fromkeys(chosen))


def case_id(case):
    variant, arch = case
    return f"{Path(variant.source).stem}-{variant.element}-{variant.head_dim}x{variant.value_dim}-{arch}"


def compile_variant(variant, arch, *options, text=None):
    """``text``, by default the variant's source, and what the host takes for granted of its constants."""
    text = flattened(variant.source) if text is None else text
    text += f"static_assert(BLOCK_ROWS == {variant.block_rows} && BLOCK_KEYS == {variant.block_keys});\n"
    text += f"static_assert(THREADS == {variant.threads});\n"
    arch = variant.architecture or arch
    return compile_cubin(text, arch, [*variant.options, *options])


@pytest.fixture(scope="module")
def compiled(request):
    """Futures of all selected cases, compiled on every core while the tests look at them in turn."""
    selected = [item.callspec.params["case"] for item in request.session.items if "compiled" in item.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {case: pool.submit(compile_variant, *case) for case in selected}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_a_kernel_compiles_and_keeps_to_registers(case, compiled):
    variant, arch = case
    result = compiled[case].result()
    assert result.cubin.startswith(b"\x7fELF")
    assert "warning" not in result.log, result.log
    assert "Performance Loss" not in result.log, result.log  # products that wait for each other
    (report,) = kernel_reports(result.log)
    assert report.name == "attend"
    # What is touched once a span may be in memory, as the totals are; loops that spill take more than this.
    assert report.spill_bytes <= 320 or variant.source == SIMPLE, report
    assert report.shared_bytes + variant.shared_bytes <= shared_limit_bytes(capability(arch))


def test_a_spill_is_seen():
    """The test above can fail: with few registers the kernel spills, and the report says so."""
    text = flattened(SIMPLE).replace("__launch_bounds__(THREADS)", "")  # they come before the option
    result = compile_variant(simple_variant("float32"), "sm_90", "--maxrregcount=32", text=text)
    (report,) = kernel_reports(result.log)
    assert report.registers <= 32
    assert report.spill_bytes > 0


@pytest.mark.parametrize("name", ["state.cuh", SIMPLE])
def test_an_error_is_reported_with_file_and_line(name, tmp_path, monkeypatch):
    """Also after an included file has ended."""
    files = tmp_path / "cuda"
    shutil.copytree(source.HERE, files)
    monkeypatch.setattr(source, "HERE", files)
    line = len((files / name).read_text().splitlines()) + 1
    with (files / name).open("a") as file:
        file.write("int broken = missing;\n")
    with pytest.raises(CompileError, match=rf'(?m)^{name}\({line}\): error: identifier "missing" is undefined'):
        compile_variant(simple_variant("float32"), "sm_90")
