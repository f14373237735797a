"""How much resident memory a piece of work added to the process, by the system's own high-water mark."""

from __future__ import annotations

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from its creation on, on Linux; elsewhere it says None.

    The mark is reset first. ``getrusage`` cannot do that: it would hide an increase below an older peak.
    """

    def __init__(self) -> None:
        try:
            _CLEAR.write_text("5")  # proc(5): resets the mark, VmHWM, to the memory that is resident now
            self._before = _status_bytes("VmRSS")
        except OSError:
            self._before = None

    def increase_bytes(self) -> int | None:
        """The highest resident memory since creation, less that at creation; None where it cannot be measured."""
        if self._before is None or (peak := _status_bytes("VmHWM")) is None:
            return None
        return peak - self._before


def _status_bytes(field: str) -> int | None:
    """A field of the process's status, which has it in KiB; None where this system does not tell."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[field].split()[0]) << 10 if field in fields else None
