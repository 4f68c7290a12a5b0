"""The named workloads of the literature, and workloads from YAML files, flags over both."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from loadtest.workload import Numbers, Range, Workload, WorkloadError

_SHORT: dict[str, Any] = {"prompt_tokens": (8, 64), "output_tokens": (8, 64)}
_PUNICA: dict[str, Any] = {
    "num_requests": 1024,
    "concurrency": 32,
    "num_adapters": -1,
    "lengths": "punica",
    "seed": 0xABCDABCD987,
}

# S-LoRA's synthetic workload and what is varied in it. Each also has a short variant for a CPU.
_SYNTHETIC: dict[str, tuple[str, Workload]] = {
    "slora": ("S-LoRA synthetic: power law, Gamma gaps, lengths 8 to 511", Workload()),
    **{
        f"uniform-{count}": (f"S-LoRA synthetic with num_adapters {count}, equal shares", Workload(num_adapters=count))
        for count in (1, 5, 20, 100, 200, 1000, 2000)
    },
    **{
        f"skew-{alpha:g}": (f"S-LoRA synthetic with alpha {alpha:g}", Workload(alpha=alpha))
        for alpha in (0.1, 0.3, 0.6, 1.0)
    },
    **{f"burst-{cv}": (f"S-LoRA synthetic with cv {cv}", Workload(cv=cv)) for cv in (1, 2, 4, 6, 8)},
    **{
        f"ranks-{'-'.join(map(str, ranks))}": (
            f"S-LoRA synthetic with adapters of rank {', '.join(map(str, ranks))} in turn",
            Workload(ranks=ranks),
        )
        for ranks in ((8,), (16,), (8, 16, 32, 64))
    },
    "switch": (
        "as many requests for as many adapters as dLoRA's, whose favourite changes 8 times",
        Workload(num_adapters=8, rate=4, num_requests=400, alpha=0.3, drift_seconds=12.5),
    ),
}

WORKLOADS: dict[str, tuple[str, Workload]] = {
    **_SYNTHETIC,
    **{
        f"{name}-short": (f"{name} with lengths 8 to 63", replace(workload, **_SHORT))
        for name, (_, workload) in _SYNTHETIC.items()
    },
    "punica-distinct": (
        "Punica, closed loop: every request another adapter, all that the server has in turn",
        Workload(popularity="distinct", **_PUNICA),
    ),
    "punica-identical": ("Punica, closed loop: one adapter", Workload(popularity="identical", **_PUNICA)),
    "punica-uniform": (
        "Punica, closed loop: equal shares for √n adapters, or those that the server has",
        Workload(popularity="uniform", **_PUNICA),
    ),
    "punica-skewed": (
        "Punica, closed loop: shares grow by 1.5 from adapter to adapter",
        Workload(popularity="skewed", **_PUNICA),
    ),
    "churn": (
        "adapters are loaded, replaced and unloaded under load, every token checked",
        Workload(num_adapters=8, alpha=0.3, duration=60, churn_seconds=0.5, **_SHORT),
    ),
    "replay": ("arrivals and lengths of a CSV trace (--trace)", Workload(rate=0, duration=0, trace="trace.csv")),
}
_LISTED = "`loraplex loadtest workloads` lists them"


def load_workload(name_or_file: str, overrides: Mapping[str, Any]) -> tuple[str, Workload]:
    """The name and the parameters of a named workload or of a YAML file, flags over them.

    A file may say `like: NAME` to start from a named one; otherwise it starts from `slora`.

    Raises:
        WorkloadError: unknown name, unreadable file, unknown key or wrong value.
    """
    path = Path(name_or_file)
    if name_or_file in WORKLOADS:
        name, (_, base), values = name_or_file, WORKLOADS[name_or_file], {}
    elif path.suffix in (".yaml", ".yml"):
        name, values = path.stem, _read(path)
        like = values.pop("like", "slora")
        if not isinstance(like, str) or like not in WORKLOADS:
            raise WorkloadError(f"{path}: like is {like!r}, which is no named workload; {_LISTED}")
        base = WORKLOADS[like][1]
    else:
        raise WorkloadError(f"no workload {name_or_file!r}: give a .yaml file or a named workload; {_LISTED}")
    known = {item.name: item for item in fields(Workload)}
    for key in values:
        if key not in known:
            raise WorkloadError(f"{path}: unknown key {key!r}; keys: like, {', '.join(known)}")
    try:
        typed = {key: _typed(known[key], value) for key, value in {**values, **overrides}.items()}
        return name, replace(base, **typed)
    except WorkloadError as error:
        raise WorkloadError(f"{path}: {error}" if values else str(error)) from error


def parse_range(text: str) -> Range:
    """LOW:HIGH.

    Raises:
        ValueError: anything else.
    """
    low, colon, high = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} is not LOW:HIGH")
    return int(low), int(high)


def parse_numbers(text: str) -> Numbers:
    """Whole numbers with commas between.

    Raises:
        ValueError: anything else.
    """
    return tuple(int(part) for part in text.split(",")) if text else ()


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot read workload {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise WorkloadError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise WorkloadError(f"{path}: a workload is a mapping of keys to values")
    return values


def _typed(item: Field[Any], value: Any) -> Any:
    """A value from YAML as its field's type; what cannot be is left for `_check` to refuse."""
    wanted = get_type_hints(Workload)[item.name]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if wanted in _PARSERS and isinstance(value, list):
        return tuple(value)
    if wanted in _PARSERS and isinstance(value, str):
        try:
            return _PARSERS[wanted](value)
        except ValueError as error:
            raise WorkloadError(f"{item.name}: {error}") from error
    return value


_PARSERS: dict[Any, Callable[[str], Any]] = {Range: parse_range, Numbers: parse_numbers}
