"""Progress of a run, counted in visible (query, key) pairs."""

from __future__ import annotations

import threading
from typing import Protocol


class Progress(Protocol):
    """Told of work done, from several threads."""

    def advance(self, pairs: int) -> None:
        """``pairs`` more visible (query, key) pairs are done."""

    def close(self) -> None:
        """The run is over, or has failed."""


class Silent:
    """Says nothing."""

    def advance(self, pairs: int) -> None:
        pass

    def close(self) -> None:
        pass


class ProgressBar:
    """A bar on standard error with rate and time left; silent where that is not a terminal."""

    def __init__(self, pairs: int, flops: int, done_pairs: int = 0) -> None:
        from tqdm import tqdm

        self._lock = threading.Lock()
        self._flops_per_pair = flops / max(1, pairs)
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt}FLOP [{elapsed}<{remaining}, {rate_fmt}]"
        self._bar = tqdm(
            total=flops, initial=int(done_pairs * self._flops_per_pair), desc="attend", unit="FLOP", unit_scale=True,
            disable=None, bar_format=form, smoothing=0.1,
        )  # fmt: skip

    def advance(self, pairs: int) -> None:
        with self._lock:
            self._bar.update(pairs * self._flops_per_pair)

    def close(self) -> None:
        self._bar.close()
