"""The public functions: one body for NumPy arrays, which the CPU computes, and CuPy arrays, which the GPU computes."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_cases import DTYPES, assert_close, assert_lse_close, by_dtype, coarser, exact, host, normal, qkv

import cqsa_arrays as cqsa
from cqsa_arrays import Options
from cqsa_arrays.block_statistics import BlockStatistics
from cqsa_arrays.storage import LAYOUTS, Layout


def on(xp, arrays):
    return tuple(xp.asarray(array) for array in arrays)


def attention(xp, *operands, **options):
    """NumPy's arrays on the CPU, CuPy's on the GPU."""
    return cqsa.attention(*operands, device="cpu" if xp is np else "auto", **options)


def statistics(xp, *operands, **options):
    """Likewise."""
    return cqsa.statistics(*operands, device="cpu" if xp is np else "auto", **options)


def to_layout(array, layout: str):
    """(batch, heads, tokens, dim) as ``layout`` has it, in memory too."""
    return np.ascontiguousarray(Layout(layout).physical(array))


# ---- exactness


@by_dtype
@pytest.mark.parametrize("offset", [None, 0, 77, -90, -5000], ids=lambda offset: f"offset {offset}")
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (210, 500), (500, 210)], ids=str)
def test_equals_the_formula(xp, dtype, offset, queries, keys):
    arrays = qkv(2, 3, queries, 64, keys=keys, value_dim=48, dtype=dtype)
    mask = None if offset is None else cqsa.causal(offset)
    out = attention(xp, *on(xp, arrays), mask=mask)
    assert (type(out), out.dtype, out.shape) == (xp.ndarray, dtype, (2, 3, queries, 48))
    assert_close(out, exact(*arrays, offset=offset)[0])


@by_dtype
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(1, 1), (3, 3), (40, 40), (100, 100), (3, 100), (100, 1), (192, 64), (300, 40)], ids=str
)
def test_dimensions_that_are_no_powers_of_two(xp, dtype, dim, value_dim):
    arrays = qkv(1, 2, 260, dim, keys=333, value_dim=value_dim, dtype=dtype)
    out = attention(xp, *on(xp, arrays), causal=True)
    assert_close(out, exact(*arrays, offset=0)[0])


@by_dtype
def test_one_token(xp, dtype):
    arrays = qkv(2, 1, 1, 5, dtype=dtype)
    # One key: its value, of which pairs of parts keep 22 bits.
    tolerance = {"rtol": 2.0**-21 if dtype == "f4" else 0, "atol": 0}
    assert np.allclose(host(attention(xp, *on(xp, arrays), causal=True)), arrays[2], **tolerance)
    q, k, v = qkv(1, 2, 1, 64, keys=1000, dtype=dtype)
    assert_close(attention(xp, *on(xp, (q, k, v))), exact(q, k, v)[0])
    only = host(attention(xp, *on(xp, (k, q, v[:, :, :1]))))
    assert np.allclose(only, np.broadcast_to(v[:, :, :1], v.shape), **tolerance)


@pytest.mark.parametrize("dtype", [np.dtype("f2"), np.dtype("f4")], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(xp, layout, dtype):
    arrays = qkv(2 if "b" in layout else 1, 3 if "h" in layout else 1, 200, 40, value_dim=24, dtype=dtype)
    out = attention(xp, *on(xp, (to_layout(array, layout) for array in arrays)), causal=True, layout=layout)
    assert_close(out, to_layout(exact(*arrays, offset=0)[0], layout))


@pytest.mark.parametrize("scale", [0, -0.3, 1.5], ids=str)
def test_scales(xp, scale):
    arrays = qkv(1, 2, 200, 32)
    out = attention(xp, *on(xp, arrays), scale=scale, causal=True)
    assert_close(out, exact(*arrays, offset=0, scale=scale)[0], "f4")


@by_dtype
def test_rows_that_see_no_key_are_zero_and_nan_reaches_the_rows_that_see_it(xp, dtype):
    q, k, v = qkv(1, 2, 300, 64, dtype=dtype)
    v[:, 1, 200, 7] = np.nan
    k[:, 0, 100, 3] = np.nan
    out = host(attention(xp, *on(xp, (q, k, v)), mask=cqsa.causal(-50)))
    assert (out[:, :, :50] == 0).all()
    nan = np.zeros(out.shape, bool)
    nan[:, 0, 150:], nan[:, 1, 250:, 7] = True, True
    assert np.array_equal(np.isnan(out.astype("f4")), nan)


# ---- kinds of arrays


@pytest.mark.parametrize("way", ["every other token", "heads inside tokens", "one head for all", "offset by one"])
def test_views_are_used_as_they_are(xp, way):
    q, k, v = on(xp, qkv(2, 4, 400, 33, dtype="f2"))
    views = {
        "every other token": lambda a: a[:, :, ::2],
        "heads inside tokens": lambda a: xp.ascontiguousarray(a.swapaxes(1, 2)).swapaxes(1, 2),
        "one head for all": lambda a: xp.broadcast_to(a[:, :1], a.shape),
        "offset by one": lambda a: a[..., 1:],
    }
    q, k, v = (views[way](array) for array in (q, k, v))
    assert_close(attention(xp, q, k, v, causal=True), exact(q, k, v, offset=0)[0])


def test_inputs_are_never_changed(xp):
    arrays = qkv(1, 2, 700, 64, dtype="f2")
    given = on(xp, arrays)
    attention(xp, *given, options=Options(cover="cqs", chunks=3))
    assert all(np.array_equal(host(one), array) for one, array in zip(given, arrays, strict=True))


def test_a_gpu_takes_arrays_of_both_kinds(gpu):
    import cupy

    q, k, v = qkv(1, 2, 700, 64, dtype="f2")
    expected = exact(q, k, v, offset=0)[0]
    for kinds in ((cupy, np, np), (np, cupy, cupy), (cupy, np, cupy)):
        out = cqsa.attention(*(xp.asarray(a) for xp, a in zip(kinds, (q, k, v), strict=True)), causal=True)
        assert type(out) is kinds[0].ndarray
        assert_close(out, expected)


def test_scattered_vectors_on_a_gpu_are_refused_with_a_remedy(gpu):
    import cupy

    q, k, v = (cupy.asarray(array) for array in qkv(1, 1, 50, 8))
    with pytest.raises(cqsa.ArgumentError, match=r"k: found .*scattered.*cupy\.ascontiguousarray\(k\)"):
        cqsa.attention(q, cupy.asfortranarray(k), v)


def test_arrays_on_a_gpu_are_not_computed_on_the_cpu_in_silence(gpu):
    import cupy

    q, k, v = (cupy.asarray(array) for array in qkv(1, 1, 50, 8))
    with pytest.raises(cqsa.ArgumentError, match="device: found 'cpu' with arrays on cuda:0"):
        cqsa.attention(q, k, v, device="cpu")


def test_torch_tensors_come_back_as_tensors(gpu):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    tensors = [torch.from_numpy(array).cuda() for array in qkv(1, 2, 300, 64)]
    out = cqsa.attention(*tensors, causal=True)
    assert isinstance(out, torch.Tensor)
    assert out.is_cuda
    assert_close(out.cpu().numpy(), exact(*(tensor.cpu().numpy() for tensor in tensors), offset=0)[0])


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@by_dtype
def test_torch_tensors_of_any_type_give_tensors_of_any_type(gpu, dtype, wanted):
    import cupy

    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    tensors = [torch.from_numpy(array).cuda().to(getattr(torch, dtype.name)) for array in qkv(1, 2, 300, 64)]
    out = cqsa.attention(*tensors, dtype=wanted)
    assert (type(out), out.dtype, out.is_cuda) == (torch.Tensor, getattr(torch, wanted.name), True)
    arrays = [cupy.asarray(tensor.double().cpu().numpy().astype(dtype)) for tensor in tensors]
    expected = cqsa.attention(*arrays, dtype=wanted)
    assert np.array_equal(out.double().cpu().numpy(), host(expected).astype("f8"))


def test_torch_tensors_that_require_a_gradient_are_refused_with_a_remedy(gpu):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    q, k, v = (torch.from_numpy(array).cuda() for array in qkv(1, 1, 50, 8))
    with pytest.raises(cqsa.ArgumentError, match=r"k: found torch.*requires grad.*k\.detach\(\)"):
        cqsa.attention(q, k.requires_grad_(), v)


# ---- where the result goes


@pytest.mark.parametrize("kind", ["same type", "float16", "float64", "every other row", "tokens outside heads"])
def test_out_array_is_filled_and_handed_back(xp, kind):
    q, k, v = qkv(2, 3, 301, 40)
    full = xp.full((2, 3, 602, 40), 7, {"float16": "f2", "float64": "f8"}.get(kind, "f4"))
    out = full[:, :, ::2] if kind == "every other row" else full[:, :, :301].copy()
    if kind == "tokens outside heads":
        out = xp.full((2, 301, 3, 40), 7, "f4").swapaxes(1, 2)
    assert attention(xp, *on(xp, (q, k, v)), mask=cqsa.causal(-9), out=out) is out
    assert_close(out, exact(q, k, v, offset=-9)[0], coarser(out.dtype, q.dtype))
    assert kind != "every other row" or (host(full)[:, :, 1::2] == 7).all()


@pytest.mark.parametrize("wanted", DTYPES, ids=lambda dtype: dtype.name)
@by_dtype
def test_dtype_of_the_output(xp, dtype, wanted):
    arrays = qkv(1, 1, 333, 33, dtype=dtype)
    out = attention(xp, *on(xp, arrays), dtype=wanted)
    assert out.dtype == wanted
    assert_close(out, exact(*arrays)[0], coarser(dtype, wanted))


@pytest.mark.parametrize("wanted", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("rows", "value_dim"), [(333, 33), (1, 1), (129, 3)], ids=str)
def test_any_dtype_and_any_number_of_rows_come_back_to_the_host(gpu, wanted, rows, value_dim):
    """Output and log-sum-exp leave the device side by side, whatever borders they then have."""
    arrays = qkv(1, 1, rows, 33, value_dim=value_dim)
    out = cqsa.attention(*arrays, dtype=wanted, device="cuda")
    assert (type(out), out.dtype) == (np.ndarray, wanted)
    assert_close(
        out,
        exact(*arrays)[0],
        coarser(np.dtype("f4"), wanted),
    )


def test_host_arrays_go_into_an_array_on_the_gpu_and_back(gpu):
    import cupy

    arrays = qkv(1, 3, 500, 64, dtype="f2")
    expected = exact(*arrays, offset=0)[0]
    out = cupy.empty(arrays[0].shape, "f2")
    assert cqsa.attention(*arrays, causal=True, out=out) is out
    assert_close(out, expected)
    back = np.empty(arrays[0].shape, "f2")
    assert cqsa.attention(*(cupy.asarray(array) for array in arrays), causal=True, out=back) is back
    assert_close(back, expected)


def test_out_on_the_gpu_that_is_an_input_is_refused(gpu):
    import cupy

    q, k, v = (cupy.asarray(array) for array in qkv(1, 2, 100, 8))
    with pytest.raises(cqsa.ArgumentError, match="out: found memory of an input"):
        cqsa.attention(q, k, v, out=q)
    with pytest.raises(cqsa.ArgumentError, match="out: found shape"):
        cqsa.attention(q, k, v, out=cupy.empty((1, 2, 100, 9), "f4"))


# ---- statistics


@by_dtype
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_merged_statistics_are_attention(xp, dtype, layout):
    q, k, v = qkv(2, 3, 150, 24, keys=400, dtype=dtype)
    parts = []
    for part in (slice(0, 1), slice(1, 300), slice(300, 400)):
        given = on(xp, (to_layout(array, layout) for array in (q, k[:, :, part], v[:, :, part])))
        parts.append(statistics(xp, *given, layout=layout))
    merged = cqsa.merge(cqsa.merge(parts[2], parts[0]), parts[1])
    assert type(merged.acc) is xp.ndarray
    expected, lse = exact(q, k, v)
    # What the GPU rounds, its weights, is rounded to 16-bit inputs' own type.
    assert_close(merged.output(), expected, None if xp is np else dtype)
    assert_lse_close(merged.lse(), lse)


def test_statistics_take_masks_and_rows_without_keys(xp):
    q, k, v = qkv(1, 2, 500, 24)
    found = statistics(xp, *on(xp, (q, k, v)), mask=cqsa.causal(-10), options=Options(cover="cqs", chunks=3))
    expected, lse = exact(q, k, v, offset=-10)
    assert_close(found.output(), expected)
    assert_lse_close(found.lse(), lse)
    assert (host(found.acc)[:, :, :10] == 0).all()
    assert (host(found.l)[:, :, :10] == 0).all()


@by_dtype
def test_statistics_of_the_gpu_merge_with_those_of_the_cpu(gpu, dtype):
    q, k, v = qkv(1, 2, 300, 64, keys=700, dtype=dtype)
    halves = (k[:, :, :311], v[:, :, :311]), (k[:, :, 311:], v[:, :, 311:])
    there, here = cqsa.statistics(q, *halves[0], device="cuda"), cqsa.statistics(q, *halves[1], device="cpu")
    assert type(there.acc) is np.ndarray
    expected, lse = exact(q, k, v)
    for merged in (cqsa.merge(there, here), cqsa.merge(here, there)):
        # The CPU widens 16-bit elements; what the GPU rounds, its weights, is rounded to them.
        assert_close(merged.output(), expected, dtype)
        assert_lse_close(merged.lse(), lse)


def test_statistics_on_the_gpu_are_those_on_the_host(gpu):
    import cupy

    q, k, v = qkv(1, 2, 300, 64, dtype="f2")
    there = cqsa.statistics(*(cupy.asarray(array) for array in (q, k, v)), causal=True)
    copied = BlockStatistics(*(host(part) for part in (there.acc, there.m, there.l)))
    assert_close(copied.output(), exact(q, k, v, offset=0)[0], "f2")
    assert np.array_equal(copied.output().astype("f2"), host(there.output("f2")))


# ---- who computes


def test_auto_takes_the_gpu_that_holds_the_arrays_and_the_bits_do_not_depend_on_the_call(gpu):
    import cupy

    arrays = [cupy.asarray(normal(1, 2, 900, 64, dtype="f2", seed=seed)) for seed in range(3)]
    assert cqsa.plan(*arrays).device == gpu.name
    runs = [host(cqsa.attention(*arrays, causal=True, device=device)) for device in ("auto", "cuda", "cuda:0")]
    assert all(np.array_equal(runs[0], run) for run in runs[1:])
