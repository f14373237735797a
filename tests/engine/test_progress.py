"""Progress adds up to the work, and the bar is for terminals."""

import io
import re
import sys
import threading

import pytest
from engine_cases import TILE, Counter, case
from hypothesis import given, settings
from hypothesis import strategies as st

from cqsa_arrays.engine import ProgressBar, Silent, progress
from cqsa_arrays.masks import Causal, Full


@pytest.mark.parametrize(
    "mask",
    [Full(), Causal(), Causal(1), Causal(95), Causal(96), Causal(-1), Causal(-333), Causal(400), Causal(-9999)],
    ids=str,
)
@pytest.mark.parametrize("cover", ["cqs 1", "cqs 7", "cqs 13", "rectangular 3", "rectangular 1"])
def test_pairs_add_up_to_those_of_the_problem(cover, mask, tmp_path) -> None:
    name, count = cover.split()
    one = case(queries=700, keys=610, batch=2, heads=2, mask=mask)
    counter = Counter()
    if name == "cqs":
        plan = one.cqs(int(count), (1, 2), on_disk=count == "7", scratch=tmp_path)
    else:
        plan = one.rectangular(int(count), 2 * TILE, (1, 1))
    one.run(plan, counter)
    assert counter.pairs == plan.problem.pairs
    assert counter.calls > 0 or plan.problem.pairs == 0


@given(st.integers(1, 300), st.integers(1, 300), st.one_of(st.none(), st.integers(-310, 310)), st.integers(1, 5))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_so_they_do_for_any_lengths_and_offsets(queries, keys, offset, count) -> None:
    one = case(queries=queries, keys=keys, heads=1, mask=Full() if offset is None else Causal(offset), threads=1)
    for plan in (one.cqs(count), one.rectangular(count, TILE)):
        counter = Counter()
        one.run(plan, counter)
        assert counter.pairs == plan.problem.pairs


def test_silence_says_nothing(capsys) -> None:
    silent = Silent()
    silent.advance(5)
    silent.close()
    assert capsys.readouterr() == ("", "")


# The bar.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    def isatty(self) -> bool:
        return False


def run_bar(monkeypatch, stream, pairs=1000, flops=256_000) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar(pairs, flops)
    for _ in range(pairs // 10):
        bar.advance(10)
    bar.close()
    return stream.getvalue()


def test_the_bar_is_silent_where_there_is_no_terminal(monkeypatch, capfd) -> None:
    assert run_bar(monkeypatch, Pipe()) == ""
    assert capfd.readouterr() == ("", "")


def test_the_bar_shows_rate_and_time_left_on_a_terminal(monkeypatch) -> None:
    text = run_bar(monkeypatch, Terminal())
    first, last = text.split("\r")[1], text.split("\r")[-1].rstrip("\n")
    assert re.match(r"attend:   0%\|.*\| 0\.00/256kFLOP \[00:00<\?, \? ?FLOP/s\]", first)
    assert re.match(r"attend: 100%\|.*\| 256k/256kFLOP \[\d\d:\d\d<00:00, +\d[\d.]*[kMGT]?FLOP/s\]", last)


def test_half_way_the_time_left_is_known(monkeypatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar(100, 12_800)
    bar.advance(25)
    bar._bar.refresh()
    shown = stream.getvalue().split("\r")[-1]
    bar.close()
    assert "attend:  25%" in shown
    assert "3.20k/12.8kFLOP" in shown
    assert re.search(r"<\d\d:\d\d, ", shown)


def test_a_bar_of_no_work_can_be_closed(monkeypatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar(0, 0)
    bar.advance(0)
    bar.close()
    assert "nan" not in stream.getvalue()


def test_several_threads_may_tell_it_of_work(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = ProgressBar(4000, 8000)
    threads = [threading.Thread(target=lambda: [bar.advance(1) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar._bar.n == 8000
    bar.close()


def test_a_log_gets_a_line_now_and_then(monkeypatch) -> None:
    """As often as ``LINE_S`` says, each with the share done, the rate and the time left."""
    stream, now = Pipe(), [100.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = ProgressBar(1000, int(128e12), done_pairs=200)
    for _ in range(8):  # 100 pairs in 25 seconds each: lines after 75, 150 and so on
        now[0] += 25
        bar.advance(100)
    bar.close()
    lines = stream.getvalue().splitlines()
    assert lines == ["attend: 50.0% done, 512 GFLOP/s, 2 min 5 s left", "attend: 80.0% done, 512 GFLOP/s, 50 s left"]


def test_a_run_of_less_than_a_minute_writes_nothing_to_a_log(monkeypatch) -> None:
    stream, now = Pipe(), [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = ProgressBar(10, 100)
    now[0] = 59.0
    bar.advance(10)
    bar.close()
    assert stream.getvalue() == ""


class Closed(Pipe):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [None, Closed()], ids=["none", "closed"])
def test_a_log_that_nobody_reads_does_not_end_the_run(stream, monkeypatch, capfd) -> None:
    bar = ProgressBar(10, 100)
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    monkeypatch.setattr(sys, "stderr", stream)
    bar.advance(5)
    bar.close()
    assert capfd.readouterr().out == ""
