"""Messages name settings that Python and the command line each write in their own way."""

from __future__ import annotations

import ast
import pickle
import re
from argparse import Namespace
from pathlib import Path

import pytest

import cqsa_arrays as cqsa
from cqsa_arrays.cli.parser import build_parser
from cqsa_arrays.cli.spelling import said, spelling_of
from cqsa_arrays.errors import START_OVER, DeviceMemoryError, JobStopped
from cqsa_arrays.wording import Call, Choice, Phrase

PACKAGE = Path(cqsa.__file__).parent
NAMED = [
    (Choice("memory"), "memory", "--memory"),
    (Choice("memory", "2GiB"), "memory='2GiB'", "--memory 2GiB"),
    (Choice("memory", 4096), "memory=4096", "--memory 4096"),
    (Choice("out", "my file.h5"), "out='my file.h5'", "--out 'my file.h5'"),
    (Choice("overwrite", True, rare=True), "Options(overwrite=True)", "--overwrite"),
    (Choice("scratch", ..., rare=True), "Options(scratch=...)", "--scratch DIR"),
    (Choice("checkpoint_s"), "checkpoint_s", "--checkpoint"),
    (Choice("tolerance", ...), "tolerance=...", "cqsa verify --tolerance X"),
    (Choice("chunks", 1), "chunks=1", "--chunks 1"),
    (Choice("layout", False), "layout=False", "--layout off"),
    (Choice("nothing", 3), "nothing=3", "nothing=3"),
    (Call("verify"), "cqsa.verify", "cqsa verify"),
    (Call("resume", "o.h5", (Choice("device", "cpu"),)),
     "cqsa.resume('o.h5', device='cpu')", "cqsa resume o.h5 --device cpu"),
    (Call("status", "a b.h5"), "cqsa.status('a b.h5')", "cqsa status 'a b.h5'"),
    (Phrase.of("Pass ", Choice("device", "cpu"), "."), "Pass device='cpu'.", "Pass --device cpu."),
    (START_OVER, "Start the job over with Options(restart=True).", "Start the job over with --restart."),
]  # fmt: skip


@pytest.mark.parametrize(("named", "python", "command"), NAMED, ids=[case[1] for case in NAMED])
def test_both_write_it(named, python, command) -> None:
    spell = spelling_of(build_parser(), "attend")
    assert str(named) == python
    assert Phrase.of(named).spelled(spell) == command


def test_an_option_of_another_command_is_named_with_it() -> None:
    spell = spelling_of(build_parser(), "resume")
    assert START_OVER.spelled(spell) == "Start the job over with cqsa attend --restart."


ERRORS = [
    cqsa.ArgumentError("out", "out.h5", "a new file", Phrase.of("Or ", Choice("overwrite", True, rare=True), ".")),
    cqsa.ArgumentError("chunks", 3, Phrase.of("no ", Choice("cover", "cqs")), "Leave it out."),
    cqsa.BudgetError(Choice("memory"), ": too small. Pass ", Choice("memory", 7), " or more."),
    cqsa.StorageError("damaged. ", START_OVER),
    DeviceMemoryError("too much", 3),
    JobStopped("time"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_that_travels_is_still_written_by_both(error) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert said(again, build_parser(), Namespace(command="attend")) == said(
        error, build_parser(), Namespace(command="attend")
    )
    assert getattr(again, "free_bytes", None) == getattr(error, "free_bytes", None)


# Of arguments that the command line does not have, and of an attribute in a file.
PYTHON_ALONE = (
    "For an offset pass mask=cqsa.causal(offset=...).", "both causal=True and mask=", "cqsa.Options(...)", "no out=",
    "Pass out='out.h5', or leave durable out.", "Pass Options(durable=True) and out=.", "the array given as out=",
    "Store floats; bfloat16 bits may be uint16 with the attribute dtype='bfloat16'.", "Options(",
    "Store floats; if the values are bfloat16, say so by the attribute dtype='bfloat16'.",
    "Pass out=numpy.empty(shape, ",
)  # fmt: skip


def messages() -> list[tuple[str, str]]:
    """Every text of the package that is not documentation, with where it is."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
        found += [(f"{path.relative_to(PACKAGE)}:{node.lineno}", node.value) for node in texts if id(node) not in alone]
    return found


def test_no_message_writes_a_setting_itself() -> None:
    """It would be wrong for one of the two; the command's own files may write options."""
    parser = build_parser()
    names = {action.dest for command in parser.commands.values() for action in command.actions}
    assert {"memory", "overwrite", "checkpoint_s", "scratch"} <= names
    python = re.compile(rf"\b({'|'.join(sorted(names | {'follow_links', 'durable'}))})=|\bOptions\(")
    option = re.compile(r"--[a-z]")
    wrong = [
        (place, text)
        for place, text in messages()
        if (python.search(text) or (option.search(text) and not place.startswith("cli/")))
        and text not in PYTHON_ALONE
        and not place.startswith("wording.py")
    ]
    assert wrong == []
