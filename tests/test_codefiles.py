"""Machine code on disk: it is there whole, or it is compiled anew; nothing that happens to it stops anything."""

import os
import resource
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cqsa_arrays import codefiles
from cqsa_arrays.codefiles import CodeFile, home_folder

CODE = bytes(range(256)) * 20


@pytest.fixture
def file(tmp_path) -> CodeFile:
    codefiles._warn.cache_clear()
    return CodeFile([tmp_path / "first" / "cache", tmp_path / "second"], "kernel.code", b"source 1", "SOME_DIR")


def place(file: CodeFile, folder: int = 0) -> Path:
    return file.folders[folder] / file.name


@contextmanager
def no_file_longer_than(size_bytes: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_code_is_found_where_it_was_kept(file) -> None:
    assert file.load() is None
    file.save(CODE)
    assert file.load() == CODE
    assert os.listdir(file.folders[0]) == [file.name]
    assert not file.folders[1].exists()


DAMAGE = {
    "empty": lambda content: b"",
    "shorter than its digest": lambda content: content[:10],
    "only its digest": lambda content: content[:32],
    "cut short": lambda content: content[: len(content) // 2],
    "a byte missing": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "a byte changed": lambda content: content[:1000] + b"\xff" + content[1001:],
    "digest changed": lambda content: b"\xff" + content[1:],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"garbage\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_taken_for_missing_and_replaced(damage, file, caplog) -> None:
    file.save(CODE)
    content = place(file).read_bytes()
    place(file).write_bytes(damage(content))
    assert file.load() is None
    file.save(CODE)
    assert file.load() == CODE
    assert place(file).read_bytes() == content
    assert not caplog.messages


def test_code_made_from_something_else_is_not_taken(file) -> None:
    file.save(CODE)
    newer = replace(file, made_from=b"source 2")
    assert newer.load() is None
    newer.save(b"newer")
    assert (newer.load(), file.load()) == (b"newer", None)
    assert replace(file, made_from=b"source 2" + b"newer"[:1]).load() is None


def below_a_file(file: CodeFile) -> None:
    file.folders[0].parent.write_text("a file, no folder")


def folder_in_its_place(file: CodeFile) -> None:
    place(file).mkdir(parents=True)
    (place(file) / "content").touch()


def file_in_its_folders_place(file: CodeFile) -> None:
    file.folders[0].parent.mkdir()
    file.folders[0].touch()


def link_to_nowhere(file: CodeFile) -> None:
    file.folders[0].parent.symlink_to("/nowhere")


@pytest.mark.parametrize("hinder", [below_a_file, folder_in_its_place, file_in_its_folders_place, link_to_nowhere])
def test_where_the_first_folder_does_not_take_it_another_one_does(hinder, file, caplog) -> None:
    hinder(file)
    assert file.load() is None
    file.save(CODE)
    assert file.load() == CODE
    assert place(file, 1).exists()
    assert not caplog.messages


def test_code_is_read_where_nothing_can_be_written(file) -> None:
    """As in an image that was made with a full cache."""
    file.save(CODE)
    assert replace(file, folders=[Path("/proc/none"), file.folders[0]]).load() == CODE


def test_where_nothing_takes_it_a_warning_says_so_once(file, caplog) -> None:
    """Whatever the code is of."""
    below_a_file(file)
    for name in ("one", "another"):
        nowhere = replace(file, folders=file.folders[:1], name=name)
        nowhere.save(CODE)
        assert nowhere.load() is None
    assert caplog.messages == [
        f"compiled code cannot be kept on disk ({file.folders[0]}: Not a directory): each process compiles it anew."
        " Set SOME_DIR to a directory that can be written."
    ]


def test_without_any_folder_nothing_is_kept(file, caplog) -> None:
    nowhere = replace(file, folders=[])
    nowhere.save(CODE)
    assert nowhere.load() is None
    assert "there is no directory for it" in caplog.text


@pytest.mark.parametrize("room_bytes", [0, 100, len(CODE)])
def test_a_full_disk_leaves_nothing_behind(room_bytes, file, caplog) -> None:
    """Nor the code that was there."""
    file.save(b"older")
    older = place(file).read_bytes()
    with no_file_longer_than(room_bytes):
        file.save(CODE)
    assert os.listdir(file.folders[0]) == [file.name]
    assert place(file).read_bytes() == older
    assert os.listdir(file.folders[1]) == []
    assert "File too large" in caplog.text


def test_others_may_read_what_one_user_keeps(file) -> None:
    before = os.umask(0o022)
    try:
        file.save(CODE)
    finally:
        os.umask(before)
    assert place(file).stat().st_mode & 0o777 == 0o644


def test_processes_that_save_at_the_same_time_leave_one_whole_file(file) -> None:
    children = []
    for _ in range(8):
        children.append(os.fork())
        if children[-1] == 0:
            found = set()
            try:
                for _ in range(50):
                    file.save(CODE)
                    found.add(file.load())
            finally:
                os._exit(found != {CODE})
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert os.listdir(file.folders[0]) == [file.name]


def test_no_folder_is_made_of_a_home_that_nobody_knows(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert home_folder("~/.cache") == [Path("/home/someone/.cache")]
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry and without HOME
    assert home_folder("~/.cache") == []
