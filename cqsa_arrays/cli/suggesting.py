"""A parser that helps with what is mistyped."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from ..errors import one_line


class Parser(argparse.ArgumentParser):
    """An argparse parser that suggests what may have been meant, and keeps the lines of texts as they are.

    ``words`` are the usual values of arguments by ``dest``. They are suggested and completed; which values can be used
    is for the library to say.
    """

    def __init__(self, **settings: Any) -> None:
        self.words: dict[str, tuple[str, ...]] = {}
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    @property
    def actions(self) -> tuple[argparse.Action, ...]:
        """The arguments and options, in the order of the help."""
        return tuple(self._actions)

    @property
    def commands(self) -> dict[str, Parser]:
        """The parsers of the subcommands by name."""
        found = (action.choices for action in self.actions if isinstance(action, argparse._SubParsersAction))
        return dict(next(found, {}))

    def add_argument(self, *names: Any, words: Sequence[str] = (), **settings: Any) -> argparse.Action:
        """As argparse does; with the usual ``words`` of its value, or all of them as ``choices``."""
        action = super().add_argument(*names, **settings)
        self.words[action.dest] = tuple(action.choices or words)
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; an option that there is none of is the first that is complained of."""
        if args is not None and not self.commands:
            self._check_options(args)
        return super().parse_known_args(args, namespace)

    def _check_options(self, words: Sequence[str]) -> None:
        known = [name for action in self.actions for name in action.option_strings]
        for word in words:
            if word == "--":
                return
            typed = word.partition("=")[0]
            if typed.startswith("--") and not any(name.startswith(typed) for name in known):
                self.error(f"unknown option {typed}{_question(typed, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            expected = f"expected one of {', '.join(choices)}{_question(str(value), choices)}"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {expected}")

    def error(self, message: str) -> NoReturn:
        """Usage and ``message`` to standard error; exit code 2."""
        super().error(one_line(f"{message} (try '{self.prog} --help')"))  # it may repeat what was typed


def nearest(typed: str, known: Sequence[str]) -> str | None:
    """The known word that may have been meant by ``typed``; None where it is known, or like none.

    >>> nearest("atend", ["attend", "plan"]), nearest("plan", ["attend", "plan"]), nearest("xyz", ["attend", "plan"])
    ('attend', None, None)
    """
    near = get_close_matches(typed.lower(), known, n=1) if typed not in known else ()
    return near[0] if near else None


def _question(typed: str, known: Sequence[str]) -> str:
    near = nearest(typed, known)
    return "" if near is None else f"; did you mean {near}?"
