"""Attributes by which other programs say that a data set means something else than the elements and axes stored.

HDF5 knows nothing of them. netCDF and HDF-EOS decode values and mark missing ones; MATLAB and Octave show the axes in
reverse order. Ignoring that would give wrong results without a word, so such data sets are refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError
from ..wording import Choice, Phrase
from .layout import usual_layout

if TYPE_CHECKING:
    import h5py

_VALUE_ATTRIBUTES = {
    "scalefactor", "addoffset", "fillvalue", "missingvalue", "validmin", "validmax", "validrange", "unsigned",
}  # fmt: skip
"""netCDF's scale_factor, _FillValue, ... and HDF-EOS's ScaleFactor, MissingValue, ...: lower case, no underscores."""

SHOWN_CHARACTERS = 40


def refuse_decoded_values(dataset: h5py.Dataset, place: str, argument: str) -> None:
    """Raise ArgumentError where attributes say that the values are not those stored, or that some are missing.

    Attributes that change nothing pass: scale_factor 1, add_offset 0, a _FillValue of NaN, an infinite valid_range.
    """
    said = []
    for name in dataset.attrs:
        plain_name = str(name).lower().replace("_", "")
        if plain_name in _VALUE_ATTRIBUTES and not _changes_nothing(plain_name, value := dataset.attrs[name], dataset):
            said.append(f"{name} = {shown(value)}")
    if said:
        remedy = (
            "Write the decoded values to a data set of their own (with xarray or netCDF4), or delete the attribute if"
            " it does not apply: no value is missing, or they are decoded already."
        )
        found = f"{place} with the attribute {' and '.join(said)}, not applied here"
        raise ArgumentError(argument, found, "values as they are stored, none of them missing", remedy)
    if "MATLAB_empty" in dataset.attrs and np.any(dataset.attrs["MATLAB_empty"]):
        found = f"{place} with the attribute MATLAB_empty: an empty array of MATLAB, of which only the shape is stored"
        raise ArgumentError(argument, found, "an array with elements", "Save the array that you mean.")


def refuse_reversed_axes(dataset: h5py.Dataset, place: str, argument: str) -> None:
    """Raise ArgumentError where the program that wrote ``dataset`` shows its axes in reverse order.

    To be called where the caller has not said what the stored axes are.
    """
    mark, shape = _reversed_by(dataset), dataset.shape or ()
    usual = usual_layout(len(shape))
    if mark is None or usual is None:  # that no layout fits is said elsewhere
        return
    program, attribute = mark
    stored, seen = (" x ".join(map(str, axes)) for axes in (shape, shape[::-1]))
    found = f"{place} with the attribute {attribute}: stored as {stored}, shown by {program} as {seen}"
    expected = "a layout that names the axes in the order in which they are stored"
    remedy = Phrase.of(
        f"If {stored} are {usual.axes}, pass ", Choice("layout", usual.name), "; if not, save the array with its axes"
        f" reversed: permute(x, ndims(x):-1:1) in {program}.",
    )  # fmt: skip
    raise ArgumentError(argument, found, expected, remedy)


def refuse_group(group: h5py.Group, place: str, argument: str) -> None:
    """Raise ArgumentError for a group that stands for an array of another program: sparse, or a variable of Octave."""
    if "MATLAB_sparse" in group.attrs:
        found = f"{place}, a sparse matrix of MATLAB (attribute MATLAB_sparse)"
        raise ArgumentError(argument, found, "a full array", "Save full(x) instead.")
    if "OCTAVE_NEW_FORMAT" in group.attrs:
        found = f"{place}, a group with a variable of Octave (attribute OCTAVE_NEW_FORMAT)"
        raise ArgumentError(argument, found, "a data set", f"Name its values: {place}/value.")


def shown(value: Any) -> str:
    """The value of an attribute, short enough for a message."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, np.ndarray) and value.size == 1:
        return shown(value.reshape(())[()])
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _changes_nothing(name: str, value: Any, dataset: h5py.Dataset) -> bool:
    """Whether values are the same with and without the attribute ``name`` (as in _VALUE_ATTRIBUTES)."""
    if name == "unsigned":
        return shown(value).strip("'").lower() == "false"
    try:
        numbers = np.atleast_1d(np.asarray(value)).astype(np.float64)
    except (TypeError, ValueError):  # no number
        return False
    if name in ("scalefactor", "addoffset"):
        return bool((numbers == (1 if name == "scalefactor" else 0)).all())
    if name in ("fillvalue", "missingvalue"):
        return bool(np.isnan(numbers).all())
    low, high = (numbers[0], numbers[-1]) if name == "validrange" and numbers.size else (-np.inf, np.inf)
    low = numbers.max(initial=-np.inf) if name == "validmin" else low
    high = numbers.min(initial=np.inf) if name == "validmax" else high
    largest = float(np.finfo(dataset.dtype).max) if dataset.dtype.kind == "f" else np.inf
    return not (low > -largest or high < largest)


def _reversed_by(dataset: h5py.Dataset) -> tuple[str, str] | None:
    """The program that shows the axes of ``dataset`` in reverse order, and the attribute that tells; or None."""
    if "MATLAB_class" in dataset.attrs:
        return "MATLAB", "MATLAB_class"
    if dataset.name is not None and "OCTAVE_NEW_FORMAT" in dataset.parent.attrs:
        return "Octave", "OCTAVE_NEW_FORMAT"
    return None
