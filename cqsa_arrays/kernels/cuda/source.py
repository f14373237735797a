"""The text of a CUDA kernel with its headers in it, as it is given to NVRTC.

NVRTC then needs no include path, and a cache that is keyed by the text notices a change of any header.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
_INCLUDE = re.compile(r'\s*#include "([^"]+)"\s*')
_ONCE = re.compile(r"\s*#pragma once\s*")


def flattened(name: str) -> str:
    """The text of ``name``, a file beside this one, with each header in the place of its first ``#include``.

    ``#line`` directives keep the files' own names and line numbers in what the compiler says.
    """
    return "\n".join(_lines(name, {name})) + "\n"


def _lines(name: str, included: set[str]) -> list[str]:
    """The lines of ``name``; the headers that it brings in join ``included``."""
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((HERE / name).read_text(encoding="utf-8").splitlines(), start=1):
        include = _INCLUDE.fullmatch(line)
        if include and include[1] not in included:
            included.add(include[1])
            lines += [*_lines(include[1], included), f'#line {number + 1} "{name}"']
        else:
            lines.append("" if include or _ONCE.fullmatch(line) else line)
    return lines
