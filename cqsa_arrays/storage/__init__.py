"""Storage: arrays in memory, in maps and in HDF5 files as sources of blocks, and outputs that are written in place.

Knows nothing of attention. Importing it imports no h5py: that happens when a file is opened.
"""

from .adapters import as_source
from .device import DeviceSource
from .hdf5 import DiskArray, OpenedFile, dataset, dataset_in, open_file, split_reference
from .info import FileInfo, describe
from .layout import LAYOUTS, Layout, Shape4, parse_layout
from .memory import HostSource
from .output import ArraySink, OutputFile, Sink, output_staging_bytes
from .partfile import JOB_SUFFIX, PART_SUFFIX, check_target
from .rawfile import RawFile
from .reserve import reserve
from .source import TokenSource
from .synthetic import InputSpec, make_inputs

__all__ = [
    "JOB_SUFFIX",
    "LAYOUTS",
    "PART_SUFFIX",
    "ArraySink",
    "DeviceSource",
    "DiskArray",
    "FileInfo",
    "HostSource",
    "InputSpec",
    "Layout",
    "OpenedFile",
    "OutputFile",
    "RawFile",
    "Shape4",
    "Sink",
    "TokenSource",
    "as_source",
    "check_target",
    "dataset",
    "dataset_in",
    "describe",
    "make_inputs",
    "open_file",
    "output_staging_bytes",
    "parse_layout",
    "reserve",
    "split_reference",
]
