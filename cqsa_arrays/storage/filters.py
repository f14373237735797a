"""HDF5's filters (compression and the like): which ones the chunks of a data set need, and whether they are here.

Imported only when an HDF5 file is at hand: this module imports h5py.
"""

from __future__ import annotations

import importlib
import importlib.util

import h5py
from h5py import h5z

_NAMES = {
    1: "deflate (gzip)", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 305: "lzo",
    307: "bzip2", 32000: "lzf", 32001: "blosc", 32002: "mafisc", 32003: "snappy", 32004: "lz4", 32007: "jpeg-xr",
    32008: "bitshuffle", 32009: "spdp", 32012: "jpeg-ls", 32013: "zfp", 32014: "fpzip", 32015: "zstd", 32017: "sz",
    32018: "fcidecomp", 32019: "jpeg", 32020: "vbz", 32022: "bitgroom", 32023: "bitround", 32024: "sz3",
    32025: "delta-rice", 32026: "blosc2", 32027: "flac", 32028: "sperr", 32033: "htj2k",
}  # fmt: skip
"""The HDF Group's registry, as far as scientific files use it."""

_IN_HDF5PLUGIN = {307, 32001, 32004, 32008, 32013, 32015, 32017, 32018, 32024, 32026, 32028, 32033}


def missing_filters(dataset: h5py.Dataset) -> str | None:
    """What to say of the filters that ``dataset`` needs and HDF5 has not; None if it can be read.

    The package hdf5plugin is imported where it is installed and a filter is wanting. Raises as h5py does for a damaged
    file.
    """
    properties = dataset.id.get_create_plist()
    wanting: dict[int, str] = {}
    for place in range(properties.get_nfilters()):
        code, flags, _, said = properties.get_filter(place)
        if not _available(code) and not (flags & h5z.FLAG_OPTIONAL and _left_out(dataset, place)):
            wanting[code] = _NAMES.get(code) or said.decode("utf-8", "backslashreplace") or "of an unknown name"
    trouble = _import_hdf5plugin() if wanting else None
    wanting = {code: name for code, name in wanting.items() if not _available(code)}
    if not wanting:
        return None
    named = " and ".join(f"{name} ({code})" for code, name in wanting.items())
    what = f"the filter {named} is" if len(wanting) == 1 else f"the filters {named} are"
    plugin = "set the variable HDF5_PLUGIN_PATH to the folder of its plugin"
    if wanting.keys() <= _IN_HDF5PLUGIN:
        plugin = f"install hdf5plugin (pip install hdf5plugin; it is imported when it is needed), or {plugin}"
    return f"{what} not installed: {plugin}{trouble or ''}"


def _available(code: int) -> bool:
    """Whether HDF5 can undo the filter, by itself or by a plugin that it finds."""
    return bool(h5z.filter_avail(code)) and bool(h5z.get_filter_info(code) & h5z.FILTER_CONFIG_DECODE_ENABLED)


def _left_out(dataset: h5py.Dataset, place: int) -> bool:
    """Whether every chunk was written without the filter at ``place``, as HDF5 does with optional ones that fail."""
    if not hasattr(dataset.id, "chunk_iter"):  # before HDF5 1.12.3
        return False
    return dataset.id.chunk_iter(lambda chunk: None if chunk.filter_mask >> place & 1 else True) is None


def _import_hdf5plugin() -> str | None:
    """Import hdf5plugin, which registers its filters, if it is installed; what to add to the message if it fails."""
    if importlib.util.find_spec("hdf5plugin") is None:
        return None
    try:
        importlib.import_module("hdf5plugin")
    except ImportError as error:
        return f" (hdf5plugin is installed, but its import fails: {error})"
    return None
