"""The command ``cqsa``."""

from .main import main

__all__ = ["main"]
