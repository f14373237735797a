"""The demonstration: its data, its method against the plain formula, its report and its files."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from command_line import environment

import cqsa_arrays as cqsa
from cqsa_arrays.buffers import allocate
from cqsa_arrays.demo import recording, run_demo
from cqsa_arrays.demo.nonlocal_means import (
    PILOT_WIDTH,
    WINDOW,
    bandwidth,
    centred_windows,
    overlap_average,
    write_windows,
)
from cqsa_arrays.demo.peak import PeakMemory
from cqsa_arrays.errors import ArgumentError, BudgetError
from cqsa_arrays.ranges import Range

SAMPLES = 3000
SHA256 = "45cbec844577d9c7e2117b2011a5d524ab6dd49d93c29f5f5aea690772681b8f"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, samples=SAMPLES, memory="32MiB")


def test_recording_is_the_published_one():
    with recording.data_file(recording.RECORDING).open("rb") as file, np.load(file) as arrays:
        samples = arrays["samples"]
    assert (samples.shape, samples.dtype) == ((108_000,), np.dtype("<u2"))
    assert hashlib.sha256(samples.tobytes()).hexdigest() == SHA256
    millivolts = recording.load_recording()
    # The first values, mean and deviation are those that SciPy's documentation shows.
    assert millivolts[:3].tolist() == [-0.245, -0.215, -0.185]
    assert (millivolts.mean(), millivolts.std()) == pytest.approx((-0.16510875, 0.5992473991177294), rel=1e-12)


def test_recording_is_small_and_described():
    file = recording.data_file(recording.RECORDING)
    assert len(file.read_bytes()) < 5 << 20
    readme = recording.data_file("README.md").read_text(encoding="utf-8")
    assert all(text in readme for text in (recording.RECORDING, SHA256, "ODC-By", "Moody", "Goldberger"))


def test_noise_has_the_strength_asked_for_and_is_found_again():
    clean = recording.load_recording()
    noisy = recording.add_noise(clean, snr_db=10, seed=3)
    assert recording.snr_db(clean, noisy) == pytest.approx(10, abs=0.1)
    assert recording.noise_level(noisy) == pytest.approx((noisy - clean).std(), rel=0.02)
    np.testing.assert_array_equal(noisy, recording.add_noise(clean, snr_db=10, seed=3))


@pytest.mark.parametrize(("signal", "width"), [(np.arange(9.0), 3), (np.arange(20.0) ** 2, 5)])
def test_moving_average(signal, width):
    half = width // 2
    padded = np.pad(signal, half, mode="reflect")
    expected = [padded[i : i + width].mean() for i in range(len(signal))]
    np.testing.assert_allclose(recording.moving_average(signal, width), expected)


def test_attention_over_windows_is_nonlocal_means(tmp_path):
    noisy = recording.add_noise(recording.load_recording()[:300], snr_db=10, seed=0)
    h, path = bandwidth(noisy), tmp_path / "qkv.h5"
    write_windows(path, noisy)
    qkv = cqsa.open(path)
    averaged = cqsa.attention(qkv.q, qkv.k, qkv.v, scale=1 / h**2)
    everything = Range(0, len(noisy))
    compared, _ = centred_windows(recording.moving_average(noisy, PILOT_WIDTH), everything)
    values, _ = centred_windows(noisy, everything)
    distances = np.square(compared[:, None].astype(float) - compared[None]).sum(axis=2)
    kernel = np.exp(-distances / (2 * h**2))
    np.testing.assert_allclose(averaged, kernel @ values / kernel.sum(axis=1, keepdims=True), atol=2e-6)


def test_windows_that_are_left_as_they_are_give_the_signal_back():
    noisy = np.random.default_rng(0).standard_normal(10_000)  # several blocks
    windows, _ = centred_windows(noisy, Range(0, len(noisy)))
    np.testing.assert_allclose(overlap_average(windows, noisy), noisy, atol=1e-6)


def test_signal_improves_more_than_by_smoothing(demo):
    signal = demo[1].signal
    assert (signal.samples, signal.sampling_hz, signal.window) == (SAMPLES, 360.0, WINDOW)
    assert signal.noisy_db == pytest.approx(10, abs=0.5)
    assert signal.denoised_db > signal.noisy_db + 6
    assert signal.denoised_db > signal.smoothed_db > signal.noisy_db


def test_attention_is_exact(demo):
    error = demo[1].error
    assert demo[1].passed
    assert 0 < error.frobenius <= 2e-6
    assert error.rows == 256


def test_memory_is_what_was_planned(demo):
    memory = demo[1].memory
    assert memory.budget_bytes == 32 << 20
    assert memory.score_matrix_bytes == 4 * SAMPLES**2
    assert 0 < memory.planned_bytes <= memory.budget_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
def test_memory_is_measured_and_within_the_plan(demo):
    memory = demo[1].memory
    assert 0 < memory.peak_bytes <= memory.planned_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
def test_peak_ignores_what_was_before():
    size = 32 << 20
    # Pages of their own: the C heap may keep what is freed, and hand it out again without any increase.
    earlier = allocate(2 * size, np.uint8)
    earlier[:] = 1
    del earlier
    peak = PeakMemory()
    held = allocate(size, np.uint8)
    held[:] = 1
    del held
    assert size <= peak.increase_bytes() + (1 << 20) < size + (8 << 20)


def test_report_reads_and_is_json(demo):
    report = demo[1]
    text, fields = str(report), json.loads(report.to_json())
    assert f"{report.signal.denoised_db:.1f} dB denoised" in text
    assert "32 MiB" in text
    assert "passed" in text
    assert report.plot in text
    assert fields["passed"] is True
    assert fields["memory"]["score_matrix_bytes"] == 4 * SAMPLES**2
    assert fields["error"]["rows"] == 256


def test_only_the_picture_is_left(demo):
    folder, report = demo
    assert os.listdir(folder) == ["cqsa_demo.png"]
    assert report.plot == str(folder / "cqsa_demo.png")
    image = pytest.importorskip("matplotlib.image").imread(report.plot)
    assert image.shape[:2] == (1080, 1500)
    assert image[..., :3].std() > 0.1


def test_files_are_kept_where_asked_for_and_replaced(tmp_path):
    for _ in range(2):
        report = run_demo(tmp_path, samples=500, plot=False, keep=True)
    assert sorted(os.listdir(tmp_path)) == ["cqsa_demo_out.h5", "cqsa_demo_qkv.h5"]
    assert (report.plot, report.notice) == (None, None)
    assert cqsa.verify(tmp_path / "cqsa_demo_out.h5", rows=16).passed


def test_equal_seeds_give_equal_signals(tmp_path):
    first, second, other = (run_demo(tmp_path, samples=500, plot=False, seed=seed).signal for seed in (1, 1, 2))
    assert first == second != other


def test_without_matplotlib_the_numbers_remain(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = run_demo(tmp_path, samples=500)
    assert report.plot is None
    assert "pip install matplotlib" in report.notice
    assert report.notice in str(report)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "said"),
    [(ImportError, "numpy.core.multiarray failed to import"), (ValueError, "Key backend"), (OSError, "no place")],
)
def test_with_a_matplotlib_that_does_not_load_the_numbers_remain(kind, said, tmp_path, monkeypatch):
    """A wrong one for this NumPy, settings that it does not take, no place for its own files."""

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "matplotlib.figure":
                raise kind(said)

    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    report = run_demo(tmp_path, samples=500)
    assert report.passed
    assert report.plot is None
    assert report.notice == f"no plot: Matplotlib cannot be loaded: {said}"


def test_a_picture_that_cannot_be_written_costs_no_numbers(tmp_path):
    (tmp_path / "cqsa_demo.png").mkdir()
    report = run_demo(tmp_path, samples=500)
    assert report.passed
    assert report.plot is None
    assert report.notice == f"no plot: {tmp_path}/cqsa_demo.png: Is a directory"


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_the_command_draws_whatever_backend_a_notebook_has_named(backend, tmp_path):
    """Kernels set MPLBACKEND for their children; ``!cqsa demo`` may run in an environment that has no such backend."""
    words = [sys.executable, "-m", "cqsa_arrays", "demo", "--samples", "500", "--directory", str(tmp_path)]
    done = subprocess.run(words, env=environment(MPLBACKEND=backend), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "relative (tolerance" in done.stdout
    assert (tmp_path / "cqsa_demo.png").stat().st_size > 10_000


@pytest.mark.parametrize("samples", [0, WINDOW - 1, 108_001])
def test_samples_out_of_range_are_refused(tmp_path, samples):
    with pytest.raises(ArgumentError, match="samples"):
        run_demo(tmp_path, samples=samples)


def test_missing_directory_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="directory"):
        run_demo(tmp_path / "missing")


def test_too_little_memory_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(BudgetError):
        run_demo(tmp_path, samples=500, memory="100KiB")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("budget_bytes", "says"),
    [
        (1 << 20, "(1 budget)"),
        (1 << 19, "(2 budgets)"),
        (1 << 10, "(1,024 budgets)"),
        (1 << 30, "(less than 1 budget)"),
    ],
)
def test_budgets_are_counted_in_words(demo, budget_bytes, says):
    memory = dataclasses.replace(demo[1].memory, budget_bytes=budget_bytes, score_matrix_bytes=1 << 20)
    assert says in str(dataclasses.replace(demo[1], memory=memory))
