"""Typed access to JSON that nobody vouches for."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from adapters.errors import AdapterFormatError, printable

Value = TypeVar("Value")

MAX_ITEMS = 4096  # of a list
MAX_TEXT = 1024  # characters


def parse_json(data: bytes, file: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinities.

    Raises:
        AdapterFormatError: it is something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("duplicate keys")
        return result

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{file} is not valid JSON: {error}", "MALFORMED_JSON") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{file} is not a JSON object", "MALFORMED_JSON")
    return value


class ConfigReader:
    """Typed access to a configuration, remembering which keys were looked at.

    Every method raises AdapterFormatError, naming the key, for a value of another type or out of range.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.seen: set[str] = set()

    def get(self, key: str) -> Any:
        self.seen.add(key)
        return self.raw.get(key)

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.get(key)
        if type(value) is not int or not low <= value <= high:
            raise AdapterFormatError(f"{key} is {value!r}; an integer from {low} to {high} is needed")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not low <= value <= high:
            raise AdapterFormatError(f"{key} is {value!r}; a number from {low:g} to {high:g} is needed")
        return float(value)

    def share(self, key: str) -> float:
        """A number from 0 to 1; 0 if it is not there."""
        value = self.get(key)
        if value is None:
            return 0.0
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise AdapterFormatError(f"{key} is {value!r}; a number from 0 to 1 is needed")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise AdapterFormatError(f"{key} is {value!r}; true or false is needed")
        return bool(value)

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of `choices`; the first if it is not there."""
        value = self.get(key)
        if value is None:
            return choices[0]
        if value not in choices:
            raise AdapterFormatError(f"{key} is {value!r}; one of {', '.join(choices)} is needed")
        return str(value)

    def text(self, key: str) -> str:
        """A name or path; empty if it is not there."""
        value = self.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise AdapterFormatError(f"{key} is {value!r}; a text is needed")
        if len(value) > MAX_TEXT:
            raise AdapterFormatError(f"{key} has {len(value):,} characters; at most {MAX_TEXT:,} are taken")
        return printable(value)

    def names(self, key: str, required: bool = False) -> tuple[str, ...] | str:
        """A pattern, or names; the empty tuple if it is not there."""
        value = self.get(key)
        if isinstance(value, str) and value:
            return value
        if value in (None, [], "") and not required:
            return ()
        if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
            raise AdapterFormatError(f"{key} is {value!r}; a name pattern or a list of names is needed")
        return tuple(self._short(key, value))

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is int for item in items):
            raise AdapterFormatError(f"{key} is {value!r}; integers are needed")
        return tuple(self._short(key, items))

    def pattern(self, key: str, read: Callable[["ConfigReader", str], Value]) -> dict[str, Value]:
        """An object from patterns to values that `read` accepts."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise AdapterFormatError(f"{key} is {value!r}; an object is needed")
        inner = ConfigReader(value)
        return {name: read(inner, name) for name in value}

    @staticmethod
    def _short(key: str, items: list[Any]) -> list[Any]:
        if len(items) > MAX_ITEMS:
            raise AdapterFormatError(f"{key} lists {len(items):,} items; at most {MAX_ITEMS:,} are taken")
        return items
