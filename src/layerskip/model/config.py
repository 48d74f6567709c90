"""Typed reads from a config.json.

Knows how a wrong value is reported; knows no key of any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerskip.errors import CheckpointError

_REQUIRED = object()


@dataclass(frozen=True)
class Reader:
    """Typed reads from a mapping; every error names the file, the key and what is allowed."""

    values: Mapping[str, Any]
    source: str
    prefix: str = ""

    def error(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.source}: {message}")

    def get(self, key: str, default: object = _REQUIRED) -> Any:
        """The value of a key. Raises CheckpointError where it is missing and there is no default."""
        value = self.values.get(key, default)
        if value is _REQUIRED:
            raise self.error(f"required key {self.prefix + key!r} is missing")
        return value

    def wrong(self, key: str, value: object, allowed: str) -> CheckpointError:
        """An error that names the key, what it holds and what it must be."""
        return self.error(f"{self.prefix}{key} is {value!r}; it must be {allowed}")

    def integer(self, key: str, default: object = _REQUIRED) -> int:
        """A positive whole number."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, value, "a positive whole number")
        return value

    def optional_integer(self, key: str, default: int | None) -> int | None:
        """A positive whole number, or null."""
        return None if self.get(key, default) is None else self.integer(key, default)

    def number(self, key: str, default: object = _REQUIRED) -> float:
        """A positive finite number."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive finite number; null or missing is None."""
        return None if self.get(key, None) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: object = _REQUIRED) -> str:
        """A string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value
