"""Packaging: metadata, extras, the command and the recording of the demonstration."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "cqsa_arrays" / "version.py").read_text())[1]
PLOT = ["matplotlib>=3.8"]
# The compiler that the tests of CUDA code need; no GPU and no other part of CUDA.
NVRTC = "nvidia-cuda-nvrtc>=13"
# joblib and distributed: what people send between processes must arrive.
TEST = ["pytest>=8", "hypothesis>=6", "joblib>=1.4", "distributed>=2024.8", NVRTC, *PLOT]

setup(
    name="cqsa-arrays",
    version=VERSION,
    description="Exact attention over NumPy, CuPy and HDF5 arrays that fit neither GPU memory nor RAM",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["cqsa_arrays", "cqsa_arrays.*"]), "cqsa_arrays.data"],
    package_dir={"cqsa_arrays.data": "data"},
    package_data={"cqsa_arrays": ["py.typed", "kernels/cuda/*.cu", "kernels/cuda/*.cuh"], "cqsa_arrays.data": ["*"]},
    install_requires=["numpy>=2.0", "h5py>=3.11", "numba>=0.61", "ml_dtypes>=0.5", "tqdm>=4.66"],
    extras_require={
        "cuda12": ["cupy-cuda12x>=14"],
        "cuda13": ["cupy-cuda13x>=14"],
        "plot": PLOT,
        "test": TEST,
        "lint": ["ruff>=0.8", "mypy>=1.13"],
        "bench": ["torch>=2.6", *PLOT],
    },
    entry_points={"console_scripts": ["cqsa = cqsa_arrays.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering",
    ],
)
