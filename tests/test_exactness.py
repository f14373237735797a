"""What verify allows: correct results of large scores pass, wrong ones fail, and what no kernel can know is no pass."""

import json
from dataclasses import replace
from functools import lru_cache

import h5py
import ml_dtypes
import numpy as np
import pytest

import cqsa_arrays as cqsa
from cqsa_arrays.cli import main
from cqsa_arrays.comparison import TOLERANCES, compare_rows, worst_verdict
from cqsa_arrays.masks import Causal, Full
from cqsa_arrays.recomputation import compare_with_device
from cqsa_arrays.reference import reference_rows
from cqsa_arrays.storage import as_source
from cqsa_arrays.tolerance import SCORE_ERROR
from cqsa_arrays.verification import judged_dtype

ROWS, KEYS = 100, 1500
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
BITS = {"float16": "e", "bfloat16": "u2", "float32": "f", "float64": "d"}


def made(rng, dim, *, scale=1.0, offsets=(0, 0, 0), value_dim=16, dtype=np.float32):
    """q (ROWS, dim), k (KEYS, dim), v (KEYS, value_dim): normal, of this deviation, about these offsets."""
    shapes = (ROWS, dim), (KEYS, dim), (KEYS, value_dim)
    return [
        (scale * rng.standard_normal(shape) + offset).astype(dtype)
        for shape, offset in zip(shapes, offsets, strict=True)
    ]


def judged(q, k, v, out, lse=None, *, scale=None, dtype="float32"):
    """The report of ``out`` and ``lse`` of single arrays, as verify judges them."""
    reference = rounding_of(q, k, v, scale=scale, arithmetic="float64" if q.dtype == np.float64 else "float32")
    return compare_rows(out[None, None], None if lse is None else lse[None, None], reference, dtype)


def rounding_of(q, k, v, *, scale=None, arithmetic="float32", mask=None, block_tokens=4096):
    scale = q.shape[1] ** -0.5 if scale is None else scale
    sources = (as_source(array, name) for array, name in ((q, "q"), (k, "k"), (v, "v")))
    return reference_rows(
        *sources, np.arange(len(q)), mask=mask or Full(), scale=scale, arithmetic=arithmetic, block_tokens=block_tokens
    )


def monolithic(q, k, v, scale):
    """Attention in one piece by NumPy in float32."""
    q, k, v = (array.astype(np.float32) for array in (q, k, v))
    scores = (q @ k.T) * np.float32(scale)
    largest = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - largest)
    sums = weights.sum(axis=1, keepdims=True)
    return weights / sums @ v, (largest + np.log(sums))[:, 0]


def ours(q, k, v, scale):
    state = cqsa.statistics(q, k, v, scale=scale, layout="nd", device="cpu")
    return np.asarray(state.output()).reshape(len(q), -1), np.asarray(state.lse()).reshape(len(q))


def shared(rng):
    x = made(rng, 64, scale=2)[1]
    return x[:ROWS], x, x


def equal_keys(rng):
    """Ten kinds of keys, each many times, and a value that goes with each kind."""
    q, k, v = made(rng, 64, scale=32)
    kind = rng.integers(0, 10, KEYS)
    return q, k[kind], v[kind] + np.float32(0.1) * rng.standard_normal(v.shape).astype(np.float32)


def cancelling_products(rng):
    """Large products that cancel: scores near 0, of sums of large terms."""
    q, k, v = made(rng, 64)
    signs = np.repeat([1, -1], 32).astype(np.float32)
    return q + 300 * signs, np.float32(0.01) * k + 1, v


CASES = {
    **{f"D {dim}, scale {scale}": (dim, {"scale": scale}) for dim in (1, 8, 64, 256) for scale in (1, 5, 16, 64)},
    **{f"D {dim}, keys at 1e4": (dim, {"offsets": (0, 1e4, 0)}) for dim in (8, 64, 256)},
    **{f"D {dim}, queries and keys at 100": (dim, {"offsets": (100, 100, 0)}) for dim in (8, 64)},
    "queries at 1e4": (64, {"offsets": (1e4, 0, 0)}),
    "queries and keys at 1e4": (64, {"offsets": (1e4, 1e4, 0)}),
    "values at 1e4": (64, {"offsets": (0, 0, 1e4)}),
    "one column": (64, {"scale": 5, "value_dim": 1}),
    "long vectors": (1000, {"scale": 5}),
}
ARRAYS = {"shared": shared, "equal keys": equal_keys, "cancelling products": cancelling_products}


@lru_cache(maxsize=1)
def arrays_and_reference(name):
    rng = np.random.default_rng(3)
    if name in ARRAYS:
        arrays = ARRAYS[name](rng)
    else:
        dim, options = CASES[name]
        arrays = made(rng, dim, **options)
    return arrays, rounding_of(*arrays)


@pytest.mark.parametrize("compute", [monolithic, ours])
@pytest.mark.parametrize("name", [*CASES, *ARRAYS])
def test_no_correct_float32_kernel_fails(name, compute) -> None:
    (q, k, v), reference = arrays_and_reference(name)
    out, lse = compute(q, k, v, q.shape[1] ** -0.5)
    report = compare_rows(out[None, None], lse[None, None], reference, "float32")
    assert report.verdict != "failed", str(report)
    assert report.undetermined < ROWS or name == "queries and keys at 1e4"


@pytest.mark.parametrize("dim", [8, 64, 256])
@pytest.mark.parametrize("scale", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_off_by_one_percent_fails(dtype, scale, dim) -> None:
    q, k, v = made(np.random.default_rng(1), dim, scale=scale, value_dim=64, dtype=DTYPES[dtype])
    wide = np.float64 if dtype == "float64" else np.float32
    reference = rounding_of(q, k, v, arithmetic=np.dtype(wide).name)
    right = reference.out.astype(wide).astype(DTYPES[dtype])
    assert compare_rows(right, None, reference, dtype).passed
    for row in range(0, ROWS, 13):
        wrong = right.copy()
        wrong[0, 0, row] = (wrong[0, 0, row].astype("f8") * 1.01).astype(DTYPES[dtype])
        report = compare_rows(wrong, None, reference, dtype)
        assert report.verdict == "failed"
        assert report.worst_row.index == (0, 0, row)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("value_dim", [1, 4, 64])
def test_weights_of_16_bits_pass(dtype, value_dim) -> None:
    """As on tensor cores: weights, relative to the largest, and the output are rounded to 16 bits."""
    rng, narrow = np.random.default_rng(5), DTYPES[dtype]
    for scale in (1, 3, 16):
        q, k, v = made(rng, 64, scale=scale, value_dim=value_dim, dtype=narrow)
        scores = q.astype("f8") @ k.astype("f8").T / 8
        weights = np.exp(scores - scores.max(axis=1, keepdims=True)).astype("f4")
        sums = weights.sum(axis=1, keepdims=True)
        out = weights.astype(narrow).astype("f4") @ v.astype("f4") / sums
        assert judged(q, k, v, out.astype(narrow), dtype=dtype).passed


def dense_rounding(q, k, v, scale):
    """The definition: sqrt(sum_j (p_j e_j |v_j - o|)^2) and sum_j p_j e_j, for small errors e_j of the scores."""
    q, k, v = (array.astype("f8") for array in (q, k, v))
    scores, dim = scale * (q @ k.T), q.shape[1]
    largest = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - largest)
    weights /= weights.sum(axis=1, keepdims=True)
    quarters = [scale * (q[:, : part * dim // 4] @ k[:, : part * dim // 4].T) for part in range(1, 5)]
    sums = 0.41 * np.sqrt(dim * np.mean(np.square(quarters), axis=0))
    sizes = scale * np.sqrt((q * q) @ (k * k).T) + np.abs(scores) + np.abs(largest) + sums
    errors = SCORE_ERROR["float32"] * sizes
    distances = np.linalg.norm(v[None] - (weights @ v)[:, None], axis=2)
    whole = np.sqrt(np.square(weights * distances).sum(axis=1))
    return np.sqrt(np.square(weights * errors * distances).sum(axis=1)), (weights * errors).sum(axis=1), whole


@pytest.mark.parametrize("block_tokens", [100, 4096])
@pytest.mark.parametrize(("dim", "scale"), [(8, 1), (64, 4), (256, 2)])
def test_rounding_is_its_definition(dim, scale, block_tokens) -> None:
    q, k, v = made(np.random.default_rng(2), dim, scale=scale, offsets=(0, 0, 3))
    found = rounding_of(q, k, v, block_tokens=block_tokens).rounding
    out, lse, spread = dense_rounding(q, k, v, dim**-0.5)
    np.testing.assert_allclose(found.out[0, 0], out, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found.lse[0, 0], lse, rtol=1e-3)
    np.testing.assert_allclose(found.spread[0, 0], spread, rtol=1e-6, atol=1e-5)


def test_equal_keys_err_alike() -> None:
    """Every key twice with the same value: the same as each once, of twice the weight."""
    q, k, v = made(np.random.default_rng(2), 8, scale=3)
    once, twice = rounding_of(q, k, v), rounding_of(q, np.concatenate([k, k]), np.concatenate([v, v]))
    np.testing.assert_allclose(twice.out, once.out, rtol=1e-9)
    ratio = twice.rounding.out / once.rounding.out
    assert 0.75 < np.median(ratio) < 1.25
    assert ratio.min() > 1 / np.sqrt(2) - 1e-3
    many = rounding_of(q, k[np.arange(KEYS) % 3], v[np.arange(KEYS) % 3])
    few = rounding_of(q, k[:3], v[:3])
    np.testing.assert_allclose(many.rounding.out, few.rounding.out, rtol=0.75)


def test_keys_that_rounding_could_make_the_largest_count() -> None:
    """Scores of 1e9 that differ by 100: the first-order change is e^-100, what float32 does is anything."""
    q, v = np.full((1, 2), 2.0**15, np.float32), np.array([[1.0], [-1.0]], np.float32)
    k = np.array([[2.0**15, 2.0**15], [2.0**15, 2.0**15 - 2.0**-8]], np.float32)
    report = judged(q, k, v, np.array([[1.0]]), scale=1.0)
    assert report.undetermined == 1
    assert report.verdict == "undetermined"
    assert judged(q, k, np.abs(v), np.array([[1.0]]), scale=1.0).passed  # equal values: whichever wins


def test_hidden_keys_and_infinities_leave_no_trace() -> None:
    q, k, v = made(np.random.default_rng(4), 8)
    clean = rounding_of(q, k, v, mask=Causal())
    k[ROWS:], v[ROWS:] = np.nan, np.inf
    found = rounding_of(q, k, v, mask=Causal())
    for name in ("out", "lse", "spread", "running"):
        np.testing.assert_allclose(getattr(found.rounding, name), getattr(clean.rounding, name), rtol=1e-9)
    v[50] = np.inf
    found = rounding_of(q, k, v, mask=Causal())
    assert (found.rounding.out[0, 0, 50:] == 0).all()
    np.testing.assert_allclose(found.rounding.out[0, 0, :50], clean.rounding.out[0, 0, :50], rtol=1e-6)
    assert (rounding_of(q, k, v, mask=Causal(-ROWS)).rounding.out == 0).all()


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
def test_values_and_keys_of_any_magnitude(size) -> None:
    q, k, v = (array.astype("f8") for array in made(np.random.default_rng(4), 8))
    plain = rounding_of(q, k, v, arithmetic="float64").rounding
    found = rounding_of(q * size, k / size, v * size, arithmetic="float64").rounding
    for name in ("out", "spread", "running"):
        np.testing.assert_allclose(getattr(found, name) / size, getattr(plain, name), rtol=1e-6)
    np.testing.assert_allclose(found.lse, plain.lse, rtol=1e-6)


# ---- rows that are small because their values cancel


@pytest.mark.parametrize("values", ["sine", "halves", "alternating"])
def test_values_that_cancel(values) -> None:
    token = np.arange(KEYS)
    v = {
        "sine": np.sin(2 * np.pi * token / KEYS), "halves": np.where(token < KEYS // 2, 0.7, -0.7),
        "alternating": np.where(token % 2, 0.7, -0.7),
    }[values]  # fmt: skip
    v = np.repeat(v[:, None], 4, axis=1).astype(np.float32)
    q, k = np.zeros((ROWS, 4), np.float32), np.ones((KEYS, 4), np.float32)
    assert judged(q, k, v, *ours(q, k, v, 0.5)).passed
    wrong = np.zeros((ROWS, 4))
    wrong[3] = 1e-3
    assert judged(q, k, v, wrong).verdict == "failed"


def test_rows_below_what_float16_holds() -> None:
    q, k, v = made(np.random.default_rng(4), 8)
    exact = rounding_of(q, k, v * np.float32(1e-6))
    assert compare_rows(exact.out.astype(np.float16), None, exact, "float16").verdict == "undetermined"
    exact = rounding_of(q, k, v * np.float32(1e-2))
    assert compare_rows(exact.out.astype(np.float16), None, exact, "float16").passed
    nothing = rounding_of(q, k, 0 * v)
    assert compare_rows(nothing.out, nothing.lse, nothing, "float16").passed


# ---- the log-sum-exp


def test_the_log_sum_exp_of_cancelling_products() -> None:
    q, k, v = cancelling_products(np.random.default_rng(0))
    exact = rounding_of(q, k, v)
    out, lse = exact.out[0, 0], exact.lse[0, 0].copy()
    allowed = exact.rounding.lse[0, 0, 7]
    assert allowed > SCORE_ERROR["float32"] * 300 * np.sqrt(64) / 8  # of the products alone
    lse[7] += 0.9 * allowed
    assert 0.9 * allowed > 2 * TOLERANCES["float32"].lse * max(1, abs(lse[7]))
    assert judged(q, k, v, out, lse).passed
    lse[7] += 0.5 * allowed
    report = judged(q, k, v, out, lse)
    assert report.verdict == "failed"
    assert report.lse.index == (0, 0, 7)


# ---- rows that are not determined


def hopeless(rng):
    """Rows of ordinary scores, and every fourth with scores of 1e8 that differ by little."""
    q, k, v = made(rng, 64)
    k[:, 0] = 1e3
    q[:, 0] = 0
    q[::4, 0] = 1e6
    return q, k, v


def test_rows_that_are_not_determined_are_no_pass_and_no_failure() -> None:
    q, k, v = hopeless(np.random.default_rng(0))
    exact = rounding_of(q, k, v)
    out, lse = exact.out.copy(), exact.lse
    determined = np.arange(ROWS) % 4 != 0
    out[0, 0, ~determined] *= -1
    report = compare_rows(out, lse, exact, "float32")
    assert (report.verdict, report.passed, report.undetermined) == ("undetermined", False, ROWS // 4)
    assert report.frobenius == report.worst_row.error == report.worst_element.error == 0
    assert str(report).startswith("NOT DETERMINED: ")
    assert "not determined by float32: 25 of 100 rows" in str(report)
    fields = json.loads(report.to_json())
    assert (fields["passed"], fields["verdict"], fields["undetermined"]) == (False, "undetermined", 25)
    out[0, 0, 5] *= 1.01
    assert compare_rows(out, lse, exact, "float32").verdict == "failed"


def test_nan_in_a_row_that_is_not_determined_fails() -> None:
    q, k, v = hopeless(np.random.default_rng(0))
    exact = rounding_of(q, k, v)
    out = exact.out.copy()
    out[0, 0, 4, 0] = np.nan
    report = compare_rows(out, exact.lse, exact, "float32")
    assert report.verdict == "failed"
    assert report.worst_row.index == (0, 0, 4)


def test_an_own_tolerance_takes_the_place_of_all() -> None:
    q, k, v = hopeless(np.random.default_rng(0))
    exact = rounding_of(q, k, v)
    off = exact.out * (1 + 1e-5)
    assert compare_rows(exact.out, exact.lse, exact, "float32", tolerance=1e-9).passed
    assert compare_rows(off, exact.lse, exact, "float32", tolerance=1e-6).verdict == "failed"
    assert compare_rows(off, exact.lse, exact, "float32", tolerance=1e-4).passed


def test_the_worst_verdict() -> None:
    assert worst_verdict([]) == worst_verdict(["passed"]) == "passed"
    assert worst_verdict(["undetermined", "failed", "passed"]) == "failed"
    assert worst_verdict(["passed", "undetermined"]) == "undetermined"


# ---- which dtype's tolerance


@pytest.mark.parametrize(
    ("output", "inputs", "device", "expected"),
    [
        ("float32", "float16", "cpu", "float32"),
        ("float32", "float16", "cuda:0", "float16"),
        ("float32", "bfloat16", "", "bfloat16"),
        ("float64", "float32", "cuda:0", "float32"),
        ("float64", "float32", "cpu", "float32"),
        ("float16", "float64", "cpu", "float16"),
        ("float64", "float64", "cuda:0", "float64"),
    ],
)
def test_a_result_is_judged_as_what_it_was_computed_in(output, inputs, device, expected) -> None:
    assert judged_dtype(np.dtype(output), np.dtype(inputs), device) == expected


def test_rows_of_few_elements_have_more_room_in_16_bits_only() -> None:
    assert TOLERANCES["bfloat16"].row_of(64) < 1e-2 < TOLERANCES["bfloat16"].row_of(1)
    for name in ("float32", "float64"):
        assert TOLERANCES[name].row_of(1) == TOLERANCES[name].row == 10 * TOLERANCES[name].frobenius


# ---- the commands


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(dtype="float32", scale=1.0, tokens=150):
        argv = f"make in.h5 --tokens {tokens} --head-dim 64 --heads 2 --dtype {dtype} --scale {scale} --overwrite"
        assert main(argv.split()) == 0
        assert main(["attend", "in.h5", "-o", "out.h5", "--device", "cpu", "--quiet", "--overwrite"]) == 0

    return make


def scale_row(row, factor, dtype) -> None:
    with h5py.File("out.h5", "r+") as file:
        found = file["out"][0, 1, row].view(DTYPES[dtype])
        wrong = (found.astype("f8") * factor).astype(DTYPES[dtype])
        file["out"][0, 1, row] = wrong.view(file["out"].dtype)


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float16", 16), ("bfloat16", 1), ("float32", 5), ("float32", 16), ("float64", 16)]
)
def test_verify_passes_large_scores_and_finds_one_percent(files, dtype, scale) -> None:
    files(dtype, scale)
    assert main(["verify", "out.h5", "--rows", "all"]) == 0
    assert main(["compare", "out.h5", "--against", "cpu"]) == 0
    scale_row(123, 1.01, dtype)
    assert main(["verify", "out.h5", "--rows", "all"]) == 1
    assert main(["compare", "out.h5", "--against", "cpu", "--rows", "150"]) == 1


def test_the_commands_say_what_is_not_determined(files, capsys) -> None:
    files()
    with h5py.File("in.h5", "r+") as file:
        file["q"][..., 0] = 0
        file["q"][..., ::3, 0] = 1e6  # scores of 1e8 that differ by little
        file["k"][..., 0] = 1e3
    assert main(["attend", "in.h5", "-o", "out.h5", "--device", "cpu", "--quiet", "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["verify", "out.h5", "--rows", "all"]) == 4
    assert "\n  not determined by float32: 100 of 300 rows" in capsys.readouterr().out
    assert main(["verify", "out.h5", "--rows", "all", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["verdict"], found["undetermined"]) == (False, "undetermined", 100)
    assert main(["compare", "out.h5", "--against", "cpu", "--rows", "150"]) == 4
    assert "not determined by float32: 100 of 300 rows" in capsys.readouterr().out
    assert not compare_with_device("out.h5", "cpu").passed
    scale_row(1, 1.01, "float32")
    assert main(["verify", "out.h5", "--rows", "all"]) == 1
    assert main(["verify", "out.h5", "--rows", "all", "--tolerance", "0.5"]) == 0


def test_a_path_that_errs_more_than_scores_do_fails(files) -> None:
    files(scale=8)
    report = compare_with_device("out.h5", "cpu", rows=150)
    assert report.passed
    stored = replace(report.stored, frobenius=1.01 * (report.stored.tolerance.frobenius + report.stored.inherent))
    assert replace(report, stored=stored).verdict == "failed"
    near = replace(report.stored, frobenius=5.1 * report.again.frobenius + report.stored.inherent)
    assert replace(report, stored=near).verdict == "failed"
