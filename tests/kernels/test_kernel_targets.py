"""Other processors: the right tile, right results, fused multiply-adds, and inner loops that stay in registers."""

import functools
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from assembly import calls, functions, hot_loops, innermost_loops
from llvmlite import binding as llvm
from llvmlite import ir

import cqsa_arrays
from cqsa_arrays.kernels.cpu.tiles import tile_for
from cqsa_arrays.kernels.cpu.vector_ir import FUNCTIONS, vector_function

HERE = Path(__file__).parent
DTYPES = ("float32", "float64")
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
# Family, triple, LLVM's name of the processor.
PROCESSORS = {
    "skylake-avx512": ("avx512", X86),
    "sapphirerapids": ("avx512", X86),
    "znver4": ("avx512", X86),
    "haswell": ("avx2", X86),
    "alderlake": ("avx2", X86),
    "znver3": ("avx2", X86),
    "generic": ("neon", ARM),
    "cortex-a72": ("neon", ARM),
    "neoverse-n1": ("neon", ARM),
    "neoverse-v2": ("neon", ARM),
    "apple-m1": ("neon", ARM),
}
# NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, features that this machine must have, family.
FOREIGN = {
    "haswell": ("haswell", "+avx,+avx2,+fma,-avx512f", {"avx2", "fma"}, "avx2"),
    "skylake-avx512": (
        "skylake-avx512",
        "+avx,+avx2,+fma,+avx512f,+avx512cd,+avx512bw,+avx512dq,+avx512vl",
        {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "fma"},
        "avx512",
    ),
    "generic": ("generic", "", set(), "sse2"),
}


@pytest.fixture(scope="module", autouse=True)
def targets():
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


@functools.cache
def compile_function(kind, tile, triple, processor):
    """Assembly of one vector function, alone in its module."""
    module = ir.Module()
    module.triple = triple
    vector_function(module, tile, kind).linkage = "external"
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, opt=3)
    parsed.data_layout = str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    return machine.emit_assembly(parsed)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_function_compiles_to_code_without_calls(kind, dtype, processor):
    """Only ``copy`` calls anything: a fused multiply-add that the processor lacked would become a call."""
    family, triple = PROCESSORS[processor]
    assembly = compile_function(kind, tile_for(family, dtype), triple, processor)
    assert bool(calls(assembly)) == (kind == "copy")
    assert ("memcpy" in assembly) == (kind == "copy")


@pytest.mark.parametrize("kind", ["scores", "values"])
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_stay_in_registers(kind, dtype, processor):
    family, triple = PROCESSORS[processor]
    tile = tile_for(family, dtype)
    loops = hot_loops(compile_function(kind, tile, triple, processor), family, tile.vectors * tile.keys)
    assert loops
    for loop in loops:
        assert loop.spills == []
        assert loop.product


@pytest.mark.parametrize("processor", ["skylake-avx512", "sapphirerapids", "haswell", "generic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_products_stay_in_registers_too(dtype, processor):
    """Their tile has half the keys, which leaves registers for the masks and the masked scalars."""
    family, triple = PROCESSORS[processor]
    tile = tile_for(family, dtype)
    assembly = compile_function("masked_values", tile, triple, processor)
    loops = hot_loops(assembly, family, tile.vectors * tile.keys // 2)
    assert loops
    assert all(loop.compares and loop.spills == [] for loop in loops)


@pytest.mark.parametrize(
    ("family", "processor", "triple"),
    [("avx512", "skylake-avx512", X86), ("avx2", "haswell", X86), ("neon", "generic", ARM)],
)
def test_the_search_for_spills_finds_them(family, processor, triple):
    """With twice the keys in a tile the accumulators cannot fit the registers."""
    large = replace(tile_for(family, "float32"), keys=16)
    for kind in ("scores", "values"):
        loops = hot_loops(compile_function(kind, large, triple, processor), family, large.vectors * 8)
        assert any(loop.spills for loop in loops)


def test_loops_are_found_in_assembly():
    text = """
f:
\tmovq\t%rsp, %rbp
.LBB0_1:
\txorl\t%eax, %eax
.LBB0_2:
\tvmovups\t(%rdi,%rax), %zmm0
\tvfmadd231ps\t%zmm0, %zmm1, %zmm2
\tvmovups\t%zmm2, 64(%rsp)
\tvmovups\t-64(%rbp), %zmm3
\tvmovups\t(%rbp,%rax), %zmm3
\tmovq\t8(%rsp), %rcx
\tjne\t.LBB0_2
\tjne\t.LBB0_1
\tretq
g:
\tvbroadcastss\t(%rbp), %zmm3
.LBB1_1:
\tvfmadd231ps\t(%rbp), %zmm1, %zmm2
\tjne\t.LBB1_1
"""
    first, second = innermost_loops(text, "avx512")
    assert (first.multiply_adds, len(first.spills), len(first.lines)) == (1, 2, 8)
    assert (second.multiply_adds, second.spills) == (1, [])
    assert len(functions(text)) == 3


def missing_here(processor):
    """The features of ``processor`` that this machine lacks; its kind, where that is another."""
    host, needed = llvm.get_host_cpu_features(), FOREIGN[processor][2]
    return {feature for feature in needed if not host.get(feature)} if platform.machine() == "x86_64" else {"x86_64"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for all foreign processors: code for one must not be taken for another."""
    return tmp_path_factory.mktemp("numba")


@pytest.fixture(scope="module")
def children(cache, tmp_path_factory):
    """The kernels compiled for each foreign processor and tried, all at the same time: a folder and what came of it."""

    def compile_and_try(processor):
        name, features, *_ = FOREIGN[processor]
        folder = tmp_path_factory.mktemp(processor)
        environment = {
            **os.environ,
            "NUMBA_CPU_NAME": name,
            "NUMBA_CPU_FEATURES": features,
            "NUMBA_CACHE_DIR": str(cache),
            "PYTHONPATH": f"{Path(cqsa_arrays.__file__).parents[1]}{os.pathsep}{HERE}",
        }
        argv = [sys.executable, HERE / "target_child.py", folder]
        return folder, subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600, check=False)

    able = [processor for processor in FOREIGN if not missing_here(processor)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(able, pool.map(compile_and_try, able), strict=True))


@pytest.mark.parametrize("processor", FOREIGN)
def test_other_processors_compute_right(processor, children):
    """The whole kernel, compiled for another processor whose instructions this one has."""
    if processor not in children:
        pytest.skip(f"this {platform.machine()} lacks {sorted(missing_here(processor))}")
    family = FOREIGN[processor][3]
    folder, child = children[processor]
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert report == {"tiles": dict.fromkeys(DTYPES, family), "hits": 0}
    for dtype in DTYPES:
        assembly = (folder / f"{dtype}.s").read_text()
        width = {"avx512": "zmm", "avx2": "ymm", "sse2": "xmm"}[family]
        assert re.search(rf"%{width}\d", assembly)
        assert not re.search(r"%zmm\d", assembly) or family == "avx512"
        if family == "sse2":
            assert not re.search(r"%ymm\d|vfmadd", assembly)
            continue
        tile = tile_for(family, dtype)
        products = [loop for loop in hot_loops(assembly, family, tile.vectors * tile.keys) if loop.product]
        assert len(products) >= 2  # scores and values
        assert [loop.spills for loop in products] == [[]] * len(products)


def test_each_processor_has_code_of_its_own(children, cache):
    assert len(list(cache.rglob("*.nbc"))) == len(DTYPES) * len(children)
