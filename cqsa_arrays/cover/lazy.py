"""Attributes that are computed when they are first asked for, without a lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class lazy_attribute(Generic[T]):
    """``functools.cached_property`` as Python 3.12 has it.

    In 3.11 that has a lock for all instances, which is locked for ever in the child of a process that forks while
    another thread holds it. Here two threads may both compute the value, and one of the two is kept.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute, self._name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value: T = self._compute(instance)
        return instance.__dict__.setdefault(self._name, value)  # where Python looks first from now on
