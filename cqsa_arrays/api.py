"""The public functions: arguments in, a plan chosen, the engine run, the same kind of array out."""

from __future__ import annotations

import os
from numbers import Integral
from typing import Any

from .block_statistics import BlockStatistics
from .errors import ArgumentError
from .job import Request, collect_statistics, prepared
from .masks import UNBOUNDED_DIAGONAL, Causal, Mask
from .options import Options
from .planner import Plan
from .resumable import attend
from .storage import OpenedFile, open_file

DEFAULTS = Options()


def causal(offset: int = 0) -> Causal:
    """The mask in which query i sees the keys ``j <= i + offset``.

    Offset 0 starts at the top left corner; ``offset=Nk - Nq`` ends at the bottom right one. Raises ArgumentError for an
    offset that is not a whole number, or beyond 2**62 either way.

    >>> causal(offset=2).keys_of(row=0, key_tokens=10)
    Range(start=0, stop=3)
    """
    if isinstance(offset, Integral) and not isinstance(offset, bool) and abs(int(offset)) <= UNBOUNDED_DIAGONAL:
        return Causal(int(offset))
    remedy = "0 is top-left, Nk - Nq is bottom-right."
    raise ArgumentError("offset", repr(offset), "a whole number from -2**62 to 2**62", remedy)


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
    layout: str | None = None,
    memory: int | str | None = None,
    device: str = "auto",
    dtype: Any = None,
    out: Any = None,
    options: Options = DEFAULTS,
) -> Any:
    """Exact softmax attention, ``softmax(scale * q k^T + mask) v``, in bounded memory.

    ``q`` is (batch, heads, Nq, D), ``k`` (batch, heads, Nk, D) and ``v`` (batch, heads, Nk, Dv) in ``layout`` "bhnd";
    or "bnhd", "hnd", "nhd" or "nd". All are float16, bfloat16, float32 or float64; the arithmetic is float64 for
    float64 and float32 for the others. Arrays may be NumPy, CuPy, np.memmap, h5py data sets, ``cqsa.open`` arrays,
    those of any library with DLPack (PyTorch, JAX), or the text "file.h5:/q".

    ``scale`` is 1 / sqrt(D) by default. ``causal=True`` lets query i see the keys j <= i, and
    ``mask=cqsa.causal(offset=...)`` moves that diagonal. ``memory`` (bytes, or text such as "512MiB"; by default half
    of the machine's) bounds what the call adds to the resident memory of the process, besides the libraries and kernels
    that the first call loads and an ``out`` array of yours. ``dtype`` is the result's element type, by default q's.

    Returns (batch, heads, Nq, Dv) in q's layout: an array of q's kind, which is one of q's own library for DLPack and a
    NumPy array for a q in a file; or ``out`` itself where that is an array; or the data set /out of a new HDF5 file
    where ``out`` is a path (/lse beside it is the natural log-sum-exp). A row that sees no key is 0 with log-sum-exp
    -inf; a NaN reaches exactly the rows that see it; a +inf score makes its row NaN. Weights below 2^-100 of a row's
    largest (2^-960 in float64) count as 0.

    Raises ArgumentError for arguments that cannot be used (such as a ``dtype`` that q's library does not have),
    BudgetError where ``memory`` is too small for the smallest piece of the work, StorageError for files that cannot be
    read or written; an output file is then not left behind.

    Method: CQS Divide of Stream-CQSA (Bian and Akey, arXiv 2604.20819) or a rectangular tiling; ``plan`` shows which.

    >>> import numpy as np, cqsa_arrays as cqsa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 100, 16)).astype("float32")
    >>> cqsa.attention(q, k, v, causal=True).shape
    (2, 100, 16)
    """
    request = Request(
        q=q, k=k, v=v, causal=causal, mask=mask, scale=scale, layout=layout, memory=memory, device=device, dtype=dtype,
        out=out, options=options,
    )  # fmt: skip
    with prepared(request) as job:
        return attend(job)[0]


def plan(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
    layout: str | None = None,
    memory: int | str | None = None,
    device: str = "auto",
    dtype: Any = None,
    out: Any = None,
    options: Options = DEFAULTS,
) -> Plan:
    """What ``attention`` with the same arguments would do: a dry run that reads no data.

    ``device`` may also be a model that this machine lacks, such as "cuda:h200"; "cuda" on a machine without a GPU plans
    for an H100. Returns a Plan; ``print`` shows it as a table, ``to_json()`` gives it as JSON. Raises as ``attention``
    does.

    >>> import numpy as np, cqsa_arrays as cqsa
    >>> x = np.zeros((2, 1000, 16), "float32")
    >>> cqsa.plan(x, x, x, memory="64MiB").cover_name
    'cqs'
    """
    request = Request(
        q=q, k=k, v=v, causal=causal, mask=mask, scale=scale, layout=layout, memory=memory, device=device, dtype=dtype,
        out=out, options=options, dry_run=True,
    )  # fmt: skip
    with prepared(request) as job:
        return job.plan


def statistics(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    mask: Mask | None = None,
    scale: float | None = None,
    layout: str | None = None,
    memory: int | str | None = None,
    device: str = "auto",
    options: Options = DEFAULTS,
) -> BlockStatistics:
    """The block statistics of ``q`` over the keys ``k``: what remains to be merged with those over other keys.

    Arguments as for ``attention``. Returns ``BlockStatistics`` with acc (batch, heads, Nq, Dv), m and l (batch, heads,
    Nq), without the axes that q's layout leaves out, float64 for float64 inputs and float32 for others; ``merge``
    combines them over disjoint key sets.

    >>> import numpy as np, cqsa_arrays as cqsa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 1, 100, 16))
    >>> parts = [cqsa.statistics(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 30), slice(30, 100))]
    >>> bool(np.allclose(cqsa.merge(*parts).output(), cqsa.attention(q, k, v)))
    True
    """
    request = Request(
        q=q, k=k, v=v, causal=causal, mask=mask, scale=scale, layout=layout, memory=memory, device=device,
        options=options,
    )  # fmt: skip
    with prepared(request, as_statistics=True) as job:
        return collect_statistics(job)


def open(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    locking: bool | str | None = None,
    follow_links: bool = False,
) -> OpenedFile:
    """The data sets of an HDF5 file by their names, ``.q``, ``.k`` and ``.v``: memory-mapped where contiguous.

    ``layout`` overrides the data sets' attribute, and must be given for arrays of MATLAB, whose axes are stored in
    reverse order. ``locking=False`` opens files on disks that have no locks. External links are followed to files in
    the folder of ``path`` or below, with ``follow_links=True`` to any. A name that the file does not have is an
    AttributeError that lists what is there. Warns of filters that are not installed. Raises ArgumentError where /q, /k
    or /v is there and cannot be an input of attention, and for attributes by which netCDF scales values or marks
    missing ones; StorageError for a file that cannot be read.

    >>> cqsa.open("qkv.h5").k.shape                                   # doctest: +SKIP
    (1, 4, 100000, 64)
    >>> cqsa.open("out.h5").lse.shape                                 # doctest: +SKIP
    (1, 4, 100000)
    """
    return open_file(path, layout=layout, locking=locking, follow_links=follow_links)
