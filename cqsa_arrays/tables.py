"""What notebooks show: tables in HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

# What is between two cells of a table for the terminal.
_GAP = re.compile(r" {2,}")


def html_table(caption: str, rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """An HTML table of ``rows`` under ``caption``, all text escaped: names of files may hold markup.

    >>> html_table("a < b", [("rows", 3)])
    '<table><caption>a &lt; b</caption><tr><td>rows</td><td>3</td></tr></table>'
    """
    lines = [_row("th", head)] if head else []
    lines += [_row("td", row) for row in rows]
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table>"


def html_of_text(text: str) -> str:
    """A table for the terminal as an HTML table: its first line is the caption, two spaces or more part cells.

    >>> html_of_text("plan\\n  cover  cqs: 7 tasks")
    '<table><caption>plan</caption><tr><td>cover</td><td>cqs: 7 tasks</td></tr></table>'
    """
    caption, *lines = text.splitlines()
    return html_table(caption, [_GAP.split(line.strip()) for line in lines if line.strip()])


def _row(tag: str, cells: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
