"""How PEFT's configuration names modules: by the end of their path, or by a regular expression, here RE2's.

Patterns come from untrusted files; RE2 matches them in linear time.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import re2

from adapters.errors import AdapterFormatError

Value = TypeVar("Value")

MAX_PATTERNS = 1024  # of one adapter, each for every layer of the base
_PATTERN_BYTES = 1 << 18  # of a compiled one


def names_module(names: tuple[str, ...] | str, module: str) -> bool:
    """Whether one of the names is the module's path or its end, or the pattern matches the whole path."""
    if isinstance(names, str):
        return _compile(names).fullmatch(module) is not None
    known = _as_set(names)
    return any(end in known for end in _ends(module))


def unmatched_names(names: Iterable[str], modules: Iterable[str]) -> tuple[str, ...]:
    """The names that are neither a module's path nor its end."""
    known = {end for module in modules for end in _ends(module)}
    return tuple(name for name in names if name not in known)


def count_names(names: Iterable[str], modules: Iterable[str]) -> dict[str, int]:
    """How many modules have each name as their path or its end; names that none has are left out."""
    counts = Counter(end for module in modules for end in _ends(module))
    return {name: counts[name] for name in names if name in counts}


def by_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """PEFT's rule: the first pattern that matches a dotted suffix of the module path."""
    for pattern, value in patterns.items():
        if _compile(_of_suffix(pattern)).fullmatch(module):
            return value
    return default


def layer_index(layers_patterns: Iterable[str], module: str) -> int | None:
    """The number of the layer that a module belongs to; the patterns name the list of layers, any list if none."""
    patterns = [_of_layers(pattern) for pattern in layers_patterns]
    for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
        compiled = _compile(pattern)
        match = compiled.match(module)
        number = match.group(compiled.groups) if match else None  # the last group, after those of the pattern itself
        if number is not None:  # None if the pattern offers a choice without it
            return int(number)
    return None


def check_patterns(*, modules: Iterable[str], suffixes: Iterable[str], layers_patterns: Iterable[str]) -> None:
    """Compiles every pattern alone and as it is matched, so that a bad one is refused here and not in a match.

    Args:
        modules, suffixes, layers_patterns: those for `names_module`, `by_pattern` and `layer_index`.

    Raises:
        AdapterFormatError: a pattern is not a plain regular expression.
    """
    suffixes, layers_patterns = list(suffixes), list(layers_patterns)
    if (count := len(suffixes) + len(layers_patterns)) > MAX_PATTERNS:
        raise AdapterFormatError(f"{count:,} patterns for ranks, alphas and layers; at most {MAX_PATTERNS:,} are taken")
    matched = [(pattern, pattern) for pattern in modules]
    matched += [(pattern, _of_suffix(pattern)) for pattern in suffixes]
    matched += [(pattern, _of_layers(pattern)) for pattern in layers_patterns]
    for pattern, wrapped in matched:
        try:
            _compile(pattern)
            _compile(wrapped)
        except (re2.error, UnicodeEncodeError) as error:  # the latter for half a surrogate pair
            raise AdapterFormatError(f"pattern {pattern!r} is not a plain regular expression: {error}") from error


def _ends(module: str) -> Iterator[str]:
    """A path and its ends: `a.b.c`, `b.c` and `c`."""
    end, dot = module, "."
    while dot:
        yield end
        _, dot, end = end.partition(".")


def _of_suffix(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


def _of_layers(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(\d+)\."


@lru_cache(maxsize=8)
def _as_set(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


@lru_cache(maxsize=2 * MAX_PATTERNS)  # at least those of one adapter, which are asked in turn for every layer
def _compile(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _PATTERN_BYTES
    return re2.compile(pattern, options)  # type: ignore[no-untyped-call]
