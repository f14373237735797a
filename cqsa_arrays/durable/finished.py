"""Outputs that are there, or not there yet: what is said of the one, and whether the other is what is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from ..errors import ArgumentError
from ..storage import describe
from ..wording import Call, Choice, Phrase
from .folder import JobFolder
from .inputs import KnownInput, differences, read_inputs
from .setup import Setup
from .status import status


def require_finished(out: str) -> None:
    """Raise ArgumentError, which says how far it is, where the job that writes ``out`` is still to make that file."""
    if os.path.lexists(out) or not JobFolder(out).exists:
        return
    found = status(out)
    share = found.done_pairs / max(1, found.pairs)
    partial = Call("verify", out, (Choice("partial", True),), function="cqsa_arrays.partial.verify_partial")
    remedy = Phrase.of("Check what is done with ", partial, ", or finish it with ", Call("resume", out), ".")
    raise ArgumentError("path", f"{out}, whose job is unfinished: {share:.2%} done", "a finished output", remedy)


def is_result_of(setup: Setup) -> bool:
    """Whether the file ``setup.out`` is what that job makes: of this version, the same problem, and the same inputs.

    An output without its job is all that a process sees which comes late, or again after it was killed in the very last
    moment. Hashes of samples do not tell everything: each input must be a data set in the file that it was in, which
    nobody has touched since.
    """
    try:
        found, written = describe(setup.out, locking=setup.watch.locking), os.stat(setup.out)
        stored = read_inputs(json.loads(str(found.attributes.get("inputs"))))
    except (OSError, ValueError, RecursionError):
        return False
    now = setup.watch.known
    return (
        _facts(found.attributes) == _facts(setup.output.attributes)
        and any(one.name == "/out" and one.dtype == setup.output.dtype.name for one in found.datasets)
        and not any(differences(stored[name], one) for name, one in now.items())
        and not any(one.full is not None and stored[name].full is None for name, one in now.items())
        and all(_is_in_place(stored[name], one, setup.out) for name, one in now.items())
        and all(one.hints is not None and one.hints.ctime_ns < written.st_mtime_ns for one in now.values())
    )


def _is_in_place(stored: KnownInput, now: KnownInput, out: str) -> bool:
    """Whether the file of an input, without any link on the way, is where the output says, and so is the data set."""
    if now.path is None or now.dataset is None or stored.relative is None:
        return False
    folder = os.path.realpath(os.path.dirname(os.path.abspath(out)))
    there = os.path.normpath(os.path.join(folder, stored.relative))
    return (os.path.realpath(now.path), now.dataset) == (there, stored.dataset)


def _facts(attributes: Mapping[str, object]) -> list[object]:
    """What an output says of the problem that it solves, apart from the inputs."""
    mask = attributes.get("mask")
    return [attributes.get("creator"), attributes.get("scale"), mask if isinstance(mask, str) else json.dumps(mask)]
