"""How much of a file is written, for people."""

from __future__ import annotations

from ..engine import ProgressLines


class BytesWritten:
    """A bar on standard error where that is a terminal, else lines; called with bytes so far and in all."""

    def __init__(self, what: str, total_bytes: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=what, total=total_bytes, unit="B", unit_scale=True, disable=None)
        self._lines = ProgressLines(what, total_bytes, 0, "B/s")
        self._written = 0

    def __call__(self, written: int, total: int) -> None:
        more, self._written = written - self._written, written
        self._bar.update(more)
        if self._bar.disable:
            self._lines.advance(more)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
