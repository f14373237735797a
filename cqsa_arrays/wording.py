"""What messages name that Python and the command line write differently: settings, and calls that help.

A message is text with such things in it. ``str`` spells them for Python; the command line spells them with its own
options, which it takes from its parser (``cli.spelling``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting: only named where ``value`` is None, with a value of the reader's own where it is ``...``.

    ``rare``: in Python it is a field of ``Options``.

    >>> str(Choice("memory")), str(Choice("memory", "2GiB")), str(Choice("scratch", ..., rare=True))
    ('memory', "memory='2GiB'", 'Options(scratch=...)')
    """

    name: str
    value: object = None
    rare: bool = False

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        text = f"{self.name}={'...' if self.value is ... else repr(self.value)}"
        return f"Options({text})" if self.rare else text


@dataclass(frozen=True, slots=True)
class Call:
    """A public function, which is a subcommand of the same name, for the output file ``path``; only named without one.

    ``function`` is its name in Python where that is another, which then needs no ``settings``.

    >>> str(Call("verify")), str(Call("resume", "out.h5", (Choice("device", "cpu"),)))
    ('cqsa.verify', "cqsa.resume('out.h5', device='cpu')")
    """

    name: str
    path: str | None = None
    settings: tuple[Choice, ...] = ()
    function: str = ""

    def __str__(self) -> str:
        if self.path is None:
            return f"cqsa.{self.name}"
        if self.function:
            return f"{self.function}({self.path!r})"
        return f"cqsa.{self.name}({', '.join([repr(self.path), *map(str, self.settings)])})"


@dataclass(frozen=True, slots=True)
class Phrase:
    """Text that may have choices and calls in it.

    >>> str(Phrase.of("Pass ", Choice("device", "cpu"), "."))
    "Pass device='cpu'."
    """

    parts: tuple[object, ...]

    @classmethod
    def of(cls, *parts: object) -> Phrase:
        """A phrase of these ``parts``: text, choices, calls, phrases; other values by their ``str``."""
        return cls(tuple(part if isinstance(part, (str, Choice, Call, Phrase)) else str(part) for part in parts))

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[Named], str]) -> str:
        """The text, with ``spell(part)`` for its choices and calls."""
        return "".join(_spelled(part, spell) for part in self.parts)


Named: TypeAlias = Choice | Call


def _spelled(part: object, spell: Callable[[Named], str]) -> str:
    if isinstance(part, Phrase):
        return part.spelled(spell)
    return spell(part) if isinstance(part, (Choice, Call)) else str(part)
