"""Scripts that complete the command line in a shell, made from the parser: they ask nothing of Python when they run."""

from __future__ import annotations

from collections.abc import Iterator

from .suggesting import Parser

_BASH = """\
# bash completion of cqsa; made by "cqsa completion bash".
_cqsa() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=
    if [[ $COMP_CWORD == 1 ]]; then
        words="{commands} --help --version"
    else
        case "${{COMP_WORDS[1]}} $previous" in
{choices}
        esac
        if [[ -z $words && $current == -* ]]; then
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
        fi
    fi
    if [[ -n $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    else
        compopt -o filenames 2> /dev/null
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -F _cqsa cqsa
"""

# zsh runs bash's functions.
_ZSH = '# zsh completion of cqsa; made by "cqsa completion zsh".\nautoload -U +X bashcompinit && bashcompinit\n'


def script(parser: Parser, shell: str) -> str:
    """The script for ``shell``: bash, zsh or fish."""
    commands = parser.commands
    if shell == "fish":
        return "\n".join(_fish(commands)) + "\n"
    made = _BASH.format(
        commands=" ".join(commands),
        choices="\n".join(_bash_choices(commands)),
        options="\n".join(
            f'                {name}) words="{" ".join(_names(one))}" ;;' for name, one in commands.items()
        ),
    )
    return _ZSH + made.partition("\n")[2] if shell == "zsh" else made


def _names(parser: Parser) -> list[str]:
    return [name for action in parser.actions for name in action.option_strings]


def _bash_choices(commands: dict[str, Parser]) -> Iterator[str]:
    """A case for every option, or argument of a command, that has choices."""
    for command, parser in commands.items():
        for action in parser.actions:
            words = parser.words[action.dest]
            for name in (action.option_strings or [command]) if words else ():
                yield f'            "{command} {name}") words="{" ".join(words)}" ;;'


def _fish(commands: dict[str, Parser]) -> Iterator[str]:
    yield '# fish completion of cqsa; made by "cqsa completion fish".'
    yield f"complete -c cqsa -n __fish_use_subcommand -f -a '{' '.join(commands)}'"
    for command, parser in commands.items():
        here = f"complete -c cqsa -n '__fish_seen_subcommand_from {command}'"
        for action in parser.actions:
            words = parser.words[action.dest]
            choices = f" -f -a '{' '.join(words)}'" if words else ""
            takes = "" if action.nargs == 0 or not action.option_strings else " -r"
            for name in action.option_strings:
                flag = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                yield f"{here} {flag}{takes}{choices} -d {_quoted(action.help or '')}"
            if choices and not action.option_strings:
                yield f"{here}{choices}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
