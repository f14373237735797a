"""Storage: arrays in memory, in maps and in HDF5 files as sources of blocks, and outputs that are written in place.

Knows nothing of attention. Importing it imports no h5py: that happens when a file is opened.
"""

from .adapters import as_array, as_source, check_comparable, check_open, refuse_mask
from .content import Check, full_hash, sampled_hash, unhindered
from .device import DeviceSource
from .dtypes import SUPPORTED, copy_elements
from .handover import check_like, like, taker
from .hdf5 import DiskArray, Locking, check_locking, dataset, dataset_in, split_reference
from .info import FileInfo, describe
from .layout import LAYOUTS, Layout, Shape4, parse_layout
from .memory import HostSource
from .opened import OpenedFile, open_file
from .output import ArraySink, OutputFile, Sink, output_staging_bytes
from .overlap import overlaps_itself
from .partfile import JOB_SUFFIX, PART_SUFFIX, check_name, check_target, remove_leftover, target_of
from .rawfile import RawFile
from .reserve import reserve
from .rows import Rows
from .source import TokenSource
from .synthetic import InputSpec, make_inputs

__all__ = [
    "JOB_SUFFIX",
    "LAYOUTS",
    "PART_SUFFIX",
    "SUPPORTED",
    "ArraySink",
    "Check",
    "DeviceSource",
    "DiskArray",
    "FileInfo",
    "HostSource",
    "InputSpec",
    "Layout",
    "Locking",
    "OpenedFile",
    "OutputFile",
    "RawFile",
    "Rows",
    "Shape4",
    "Sink",
    "TokenSource",
    "as_array",
    "as_source",
    "check_comparable",
    "check_like",
    "check_locking",
    "check_name",
    "check_open",
    "check_target",
    "copy_elements",
    "dataset",
    "dataset_in",
    "describe",
    "full_hash",
    "like",
    "make_inputs",
    "open_file",
    "output_staging_bytes",
    "overlaps_itself",
    "parse_layout",
    "refuse_mask",
    "remove_leftover",
    "reserve",
    "sampled_hash",
    "split_reference",
    "taker",
    "target_of",
    "unhindered",
]
