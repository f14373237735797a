"""Compiled kernels of this checkout's sources alone, whatever the caches of other versions hold."""

import hashlib
import os
import tempfile
from pathlib import Path

import cqsa_arrays

# Numba looks at the time stamp of one file; the kernels are written by several. Set before anything imports Numba.
_SOURCES = sorted((Path(cqsa_arrays.__file__).parent / "kernels" / "cpu").glob("*.py"))
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"cqsa-kernels-{os.getuid()}-{_DIGEST}"))
