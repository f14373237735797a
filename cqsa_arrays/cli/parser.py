"""The command line: the parser of ``cqsa``, and what is checked before a subcommand begins."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from ..errors import ArgumentError
from ..version import __version__
from . import options, texts
from .suggesting import Parser


def build_parser() -> Parser:
    """The parser of ``cqsa``."""
    parser = Parser(prog="cqsa", description=texts.DESCRIPTION, epilog=texts.EPILOG)
    parser.add_argument("--version", action="version", version=f"cqsa_arrays {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, add_options in options.COMMANDS.items():
        text = texts.COMMANDS[name]
        command = commands.add_parser(
            name, prog=f"cqsa {name}", usage=f"cqsa {name} {text.usage}", help=text.summary,
            description=text.description, epilog=text.epilog,
        )  # fmt: skip
        add_options(command)
    return parser


def parsed(parser: Parser, argv: Sequence[str] | None) -> Namespace:
    """The arguments; exits with the usage where they do not parse, or name no inputs."""
    arguments = parser.parse_args(argv)
    missing = [f"--{name}" for name in "qkv" if getattr(arguments, name, None) is None]
    if getattr(arguments, "input", "") is None and missing:
        message = f"the following arguments are required: QKV.h5, or {' and '.join(missing)}"
        parser.commands[arguments.command].error(message)
    return arguments


def check_not_empty(parser: Parser, arguments: Namespace) -> None:
    """Raise ArgumentError for a value without a letter: a variable of the shell that is not set."""
    for action in parser.commands[arguments.command].actions:
        if getattr(arguments, action.dest, None) == "":
            expected = f"{action.metavar}, which is not empty"
            raise ArgumentError(action.dest, "''", expected, "Look at the variable that it comes from.")


def input_references(arguments: Namespace) -> dict[str, str]:
    """The data sets that the command line names for q, k and v, "file.h5:/q"."""
    return {name: getattr(arguments, name) or f"{arguments.input}:/{name}" for name in "qkv"}
