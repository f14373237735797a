"""How the command line writes what messages name: with the options of its parser."""

from __future__ import annotations

import shlex
from argparse import Action, Namespace
from collections.abc import Callable

from ..errors import ArgumentError, CqsaError, one_line
from ..wording import Call, Choice, Named
from .suggesting import Parser, nearest


def said(error: CqsaError, parser: Parser, arguments: Namespace) -> str:
    """What the command line says of ``error``, on one line: HDF5 may say several."""
    words = one_line(error.phrase.spelled(spelling_of(parser, arguments.command)))
    if not isinstance(error, ArgumentError):
        return words
    typed, usual = getattr(arguments, error.argument, None), parser.commands[arguments.command].words
    near = nearest(typed, usual.get(error.argument, ())) if isinstance(typed, str) else None
    return words if near is None else f"{words} Did you mean {near}?"


def spelling_of(parser: Parser, command: str) -> Callable[[Named], str]:
    """What spells choices and calls for somebody who has typed ``cqsa command``.

    An option that only another subcommand has is named together with that; what no subcommand has stays as in Python.
    """
    commands = parser.commands

    def spell(named: Named) -> str:
        if isinstance(named, Call):
            return _call(commands[named.name], named)
        if action := _action_of(commands[command], named):
            return _option(action, named)
        for other, options in commands.items():
            if action := _action_of(options, named):
                return named.name if named.value is None else f"cqsa {other} {_option(action, named)}"
        return str(named)

    return spell


def _call(parser: Parser, call: Call) -> str:
    words = [parser.prog, *([] if call.path is None else [shlex.quote(call.path)])]
    for choice in call.settings:
        if action := _action_of(parser, choice):
            words.append(_option(action, choice))
    return " ".join(words)


def _action_of(parser: Parser, choice: Choice) -> Action | None:
    return next((action for action in parser.actions if action.dest == choice.name), None)


def _option(action: Action, choice: Choice) -> str:
    if not action.option_strings:
        return choice.name
    name = action.option_strings[-1]  # the long one, where there are two
    if choice.value is None or action.nargs == 0:
        return name
    if choice.value is ...:
        return f"{name} {action.metavar}"
    value = ("off", "on")[choice.value] if isinstance(choice.value, bool) else str(choice.value)
    return f"{name} {shlex.quote(value)}"
