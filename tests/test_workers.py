"""Threads that take items in order, stop at the first error, and end when they are interrupted."""

import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cqsa_arrays
from cqsa_arrays import workers as workers_module
from cqsa_arrays.workers import Pool, Workers, kept_workers

LONG_S = 30  # only ever waited for by a test that fails


def alive(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"cqsa-{name}")]


@given(st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_every_item_is_done_once(threads, count) -> None:
    done = []
    with closing(Workers(threads, "once")) as workers:
        workers.run(range(count), done.append)
    assert sorted(done) == list(range(count))
    assert not alive("once")


def test_one_thread_takes_them_in_order() -> None:
    done = []
    with closing(Workers(1, "order")) as workers:
        workers.run(iter(range(100)), done.append)
    assert done == list(range(100))


def test_several_threads_begin_them_in_order() -> None:
    begun, lock, turns = [], threading.Lock(), threading.Barrier(3)

    def work(item: int) -> None:
        turns.wait(LONG_S)  # three at a time
        with lock:
            begun.append(item)

    with closing(Workers(3, "order")) as workers:
        workers.run(range(30), work)
    assert [sorted(begun[i : i + 3]) for i in range(0, 30, 3)] == [[i, i + 1, i + 2] for i in range(0, 30, 3)]


def test_as_many_threads_work_at_the_same_time() -> None:
    together = threading.Barrier(4)
    with closing(Workers(4, "together")) as workers:
        workers.run(range(4), lambda item: together.wait(LONG_S))


def test_work_is_done_in_threads_of_the_pool() -> None:
    names = []
    with closing(Workers(2, "named")) as workers:
        workers.run(range(4), lambda item: names.append(threading.current_thread().name))
    assert all(name.startswith("cqsa-named") for name in names)


@pytest.mark.parametrize("error", [ValueError("bad item"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_is_raised_and_no_further_item_is_begun(error, threads) -> None:
    begun, lock, failed = [], threading.Lock(), threading.Event()

    def work(item: int) -> None:
        with lock:
            begun.append(item)
        if item == 0:
            failed.set()
            raise error
        failed.wait(LONG_S)

    with closing(Workers(threads, "error")) as workers:
        with pytest.raises(type(error)) as raised:
            workers.run(range(10_000), work)
        assert raised.value is error
        # Those that the other threads had in hand, and what they took before the list was emptied.
        assert len(begun) < 10_000
        assert threads > 1 or begun == [0]
        done = []
        workers.run(range(20), done.append)
        assert sorted(done) == list(range(20))
    assert not alive("error")


def test_the_others_have_stopped_when_the_error_is_raised() -> None:
    running, both = set(), threading.Barrier(2)

    def work(item: int) -> None:
        running.add(item)
        both.wait(LONG_S)
        if item == 0:
            running.discard(item)
            raise ValueError
        for _ in range(1000):
            threading.Event().wait(0.0001)
        running.discard(item)

    with closing(Workers(2, "stopped")) as workers:
        with pytest.raises(ValueError):  # noqa: PT011
            workers.run(range(2), work)
        assert running == set()


def test_one_of_several_errors_is_raised() -> None:
    errors, both = [ValueError("first"), ValueError("second")], threading.Barrier(2)

    def work(item: int) -> None:
        both.wait(LONG_S)
        raise errors[item]

    with closing(Workers(2, "several")) as workers, pytest.raises(ValueError, match=r"first|second") as raised:
        workers.run(range(2), work)
    assert raised.value in errors


@pytest.mark.parametrize("fails", [False, True])
def test_a_batch_that_is_dropped_begins_nothing_more_and_raises_nothing(fails) -> None:
    begun, go_on = [], threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        go_on.wait(LONG_S)
        if fails:
            raise ValueError

    with closing(Workers(1, "dropped")) as workers:
        batch = workers.start(range(100), work)
        while not begun:
            pass
        threading.Timer(0.05, go_on.set).start()
        batch.drop()
    assert begun == [0]


def test_an_interruption_while_a_batch_is_dropped_leaves_no_thread_at_work(monkeypatch) -> None:
    begun, ended, go_on = [], [], threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        go_on.wait(LONG_S)
        ended.append(item)

    def interrupted(futures):
        monkeypatch.undo()
        threading.Timer(0.05, go_on.set).start()
        raise KeyboardInterrupt

    with closing(Workers(1, "dropped")) as workers:
        batch = workers.start(range(100), work)
        while not begun:
            pass
        monkeypatch.setattr("cqsa_arrays.workers.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.drop()
        assert ended == begun == [0]


def test_threads_are_not_kept_after_an_error() -> None:
    ended = []

    def fail() -> None:
        with kept_workers(1, "failed") as workers:
            workers.submit(lambda: (threading.Event().wait(0.05), ended.append(True)))
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert ended
    assert not alive("failed")


@pytest.mark.parametrize("threads", [1, 3])
def test_what_follows_a_batch_is_called_once_when_all_is_done(threads) -> None:
    done, found = [], []
    with closing(Workers(threads, "then")) as workers:
        batch = workers.start(range(50), done.append, lambda: found.append(len(done)))
        batch.wait()
    assert found == [50]
    assert batch.over


def test_nothing_follows_a_batch_that_fails() -> None:
    found = []

    def work(item: int) -> None:
        if item == 7:
            raise ValueError

    with closing(Workers(2, "then")) as workers, pytest.raises(ValueError):  # noqa: PT011
        workers.start(range(50), work, lambda: found.append("then")).wait()
    assert found == []


def test_batches_are_begun_in_the_order_of_their_calls() -> None:
    begun, go_on = [], threading.Event()
    with closing(Workers(2, "order")) as workers:
        batches = [
            workers.start([(batch, item) for item in range(20)], lambda item: (begun.append(item), go_on.wait(LONG_S)))
            for batch in range(3)
        ]
        assert not any(batch.over for batch in batches)
        go_on.set()
        for batch in batches:
            batch.wait()
    firsts = [begun.index((batch, 0)) for batch in range(3)]
    assert firsts == sorted(firsts)
    assert firsts[1] >= 18
    assert firsts[2] >= 38


@pytest.fixture
def _nothing_kept():
    """Afterwards as before."""
    before = dict(workers_module._KEPT)
    yield
    for key in workers_module._KEPT.keys() - before.keys():
        workers_module._KEPT.pop(key).close()


@pytest.mark.usefixtures("_nothing_kept")
def test_kept_threads_work_for_the_next_who_asks() -> None:
    def names() -> set[str]:
        found = set()
        with kept_workers(1, "kept") as workers:
            workers.run(range(3), lambda item: found.add(threading.get_ident()))
        return found

    assert names() == names()
    with kept_workers(1, "kept") as one, kept_workers(1, "kept") as other:
        assert one is not other
        other.run(range(3), lambda item: None)
    assert len(alive("kept")) == 1
    other.submit(lambda: None).result(LONG_S)  # the first to be given back is kept
    with pytest.raises(RuntimeError):
        one.submit(lambda: None)
    with kept_workers(1, "kept") as workers:
        assert workers is other


FORKED = """
import os, time
from cqsa_arrays.workers import kept_workers

def run():
    with kept_workers(2, "kept") as workers:
        workers.run(range(4), lambda item: time.sleep(0.02))

run()
time.sleep(0.1)
if (child := os.fork()) == 0:
    run()
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_a_copy_of_the_process_begins_threads_of_its_own() -> None:
    call = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    assert subprocess.run(call, capture_output=True, text=True, timeout=LONG_S, check=True).stdout == "0\n"


def test_two_pools_work_at_the_same_time() -> None:
    both = threading.Barrier(2)
    with closing(Workers(1, "inner")) as inner, closing(Workers(1, "outer")) as outer:

        def work(item: int) -> None:
            inner.run([item], lambda _: both.wait(LONG_S))

        other = threading.Thread(target=both.wait, args=(LONG_S,))
        other.start()
        outer.run([1], work)
        other.join()


INTERRUPTED = """
import signal, sys, threading, time
from contextlib import closing
from cqsa_arrays.workers import Workers

begun, ended, lock = [], [], threading.Lock()
main = threading.main_thread().ident

def main_waits():
    frame = sys._current_frames()[main]
    while frame is not None:
        if frame.f_code.co_name == "wait" and "futures" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False

def work(item):
    with lock:
        begun.append(item)
    if item == 0:
        while not main_waits():
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)
    time.sleep(0.02)
    ended.append(item)

with closing(Workers({threads}, "interrupted")) as workers:
    try:
        workers.run(range(1000), work)
    except KeyboardInterrupt:
        print("interrupted", len(begun) == len(ended), len(begun) < 500)
    done = []
    workers.run(range(10), done.append)
    print(sorted(done) == list(range(10)))
print([thread.name for thread in threading.enumerate()])
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interruption_of_the_main_thread_lets_items_in_hand_end_and_begins_no_other(threads) -> None:
    code = INTERRUPTED.replace("{threads}", str(threads))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.stderr == ""
    assert found.stdout.splitlines() == ["interrupted True True", "True", "['MainThread']"]


def test_so_does_one_that_comes_while_the_threads_are_begun() -> None:
    workers, begun = Workers(2, "begun"), []
    submit = workers._pool.submit

    def interrupted(*call) -> None:
        submit(*call)
        raise KeyboardInterrupt

    def work(item: int) -> None:
        begun.append(item)
        threading.Event().wait(0.005)

    workers._pool.submit = interrupted
    with closing(workers), pytest.raises(KeyboardInterrupt):
        workers.run(range(200), work)
    assert len(begun) < 200


RUN_INTERRUPTED = """
import os, sys, threading, time, _thread
import numpy as np
import cqsa_arrays as cqsa
from cqsa_arrays.engine import progress
from cqsa_arrays import job

class Interrupting:
    def __init__(self, *sizes): self.told = False
    def advance(self, pairs):
        if not self.told:
            self.told = True
            _thread.interrupt_main()
    def close(self): pass

job.ProgressBar = Interrupting
x = np.ones((1, 4, 3000, 16), "float32")
folder = sys.argv[1]
try:
    cqsa.attention(x, x, x, out=os.path.join(folder, "out.h5"), options=cqsa.Options(progress=True, threads=2))
except KeyboardInterrupt:
    print("interrupted")
until = time.monotonic() + 30  # a thread that was being begun ends on its own
while (left := [t.name for t in threading.enumerate() if t.name.startswith("cqsa")]) and time.monotonic() < until:
    time.sleep(0.01)
print(left, os.listdir(folder))
"""


def test_an_interrupted_call_leaves_no_thread_and_no_file(tmp_path) -> None:
    command = [sys.executable, "-c", RUN_INTERRUPTED, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.stderr == ""
    assert found.stdout.splitlines() == ["interrupted", "[] []"]


AT_THE_END = """
import atexit, sys, threading
import h5py  # before the handler: h5py has one, after which it writes no attributes
import numpy as np
import cqsa_arrays as cqsa

x = np.random.default_rng(0).standard_normal((2, 2000, 16)).astype("f4")
y = x.astype("f8")
expected = cqsa.attention(x, x, x)

def calls(where):
    right = np.array_equal(cqsa.attention(x, x, x), expected)  # of a kernel that is loaded
    right &= np.allclose(cqsa.attention(y, y, y), expected, atol=1e-5)
    durable = cqsa.Options(durable=True, checkpoint_s=0)
    right &= np.array_equal(cqsa.attention(x, x, x, out=f"{where}.h5", options=durable)[...], expected)
    file = [f"{where}.h5:/out"] * 3
    right &= np.array_equal(cqsa.attention(*file), cqsa.attention(expected, expected, expected))
    print(where, right, flush=True)

@atexit.register
def at_exit():
    calls("at exit")

def outlive():
    threading.main_thread().join()
    calls("behind")

if "thread" in sys.argv:
    threading.Thread(target=outlive).start()
"""


@pytest.mark.parametrize("thread", [[], ["thread"]], ids=["exit handler", "thread"])
def test_calls_are_answered_when_the_main_thread_has_ended(thread, tmp_path) -> None:
    """An executor of the standard library takes nothing any more; Python 3.12 begins no thread in an exit handler."""
    command = [sys.executable, "-c", AT_THE_END, *thread]
    environment = {**os.environ, "PYTHONPATH": str(Path(cqsa_arrays.__file__).parents[1])}
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert found.stderr == ""
    assert found.stdout.splitlines() == [*(["behind True"] if thread else []), "at exit True"]


def test_what_an_executor_refuses_a_thread_of_its_own_does_or_the_caller(monkeypatch) -> None:
    def refuse(*call) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    done, errors = [], []
    with closing(Workers(2, "refused")) as workers:
        monkeypatch.setattr(workers._pool._executor, "submit", refuse)
        workers.run(range(20), lambda item: done.append((item, threading.current_thread().name)))
        assert sorted(item for item, _ in done) == list(range(20))
        assert {name for _, name in done} == {"cqsa-refused"}

        def no_threads(self) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

        monkeypatch.setattr(threading.Thread, "start", no_threads)
        done.clear()
        workers.run(range(20), lambda item: done.append(threading.current_thread()))
        assert done == [threading.main_thread()] * 20
        with pytest.raises(ZeroDivisionError):
            workers.run(range(3), lambda item: 1 // (item - 1))
        with pytest.raises(RuntimeError, match="new thread"):  # of work beside the caller nobody can do it
            workers.submit(errors.append, 1)
    assert errors == []


def test_a_pool_that_was_closed_takes_nothing() -> None:
    pool = Pool(1, "closed")
    pool.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(print)
