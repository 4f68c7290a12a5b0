"""What an adapter's `adapter_config.json` means: parsed strictly, since it is untrusted input.

Every key is either understood, known to change nothing, or refused by name. Patterns are matched by RE2 in linear time.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import re2

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RANK = 4096
MAX_ALPHA = 65536.0

Value = TypeVar("Value")

# Keys that say how an adapter was made, or nothing at all: they do not change what it computes.
_IGNORED_KEYS = frozenset({
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type", "runtime_config",
})  # fmt: skip
# Keys that change what the adapter computes in ways that are not served; harmless only at these values.
_UNSUPPORTED_KEYS: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# Initializations that leave the base weights alone. The others (PiSSA, OLoRA, LoftQ …) train against a changed base.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


class AdapterFormatError(ValueError):
    """The adapter's files are wrong in themselves.

    Attributes:
        reason: machine-readable word for the kind of fault, e.g. `NON_FINITE_WEIGHTS`.
    """

    def __init__(self, message: str, reason: str = "INVALID_ADAPTER") -> None:
        super().__init__(message)
        self.reason = reason


class AdapterIncompatibleError(AdapterFormatError):
    """The files are sound, but this base model or this server cannot serve them."""

    def __init__(self, message: str, reason: str = "INCOMPATIBLE_ADAPTER") -> None:
        super().__init__(message, reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What `adapter_config.json` says, in our words (PEFT's `r` is `rank`, `lora_alpha` is `alpha`)."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    base_model: str = ""
    fan_in_fan_out: bool = False

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """`alpha / rank`, or `alpha / √rank` for rsLoRA, with both patterns applied."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put LoRA on this module path."""
        if self.exclude_modules and _names(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return _full_match(self.target_modules, module)
        if not _names(self.target_modules, module):
            return False
        return not self.layers_to_transform or self._layer_index(module) in self.layers_to_transform

    def _layer_index(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){p}\.(?P<layer>\d+)\." for p in self.layers_pattern] or [
            r".*?\.[^.]*\.(?P<layer>\d+)\."
        ]
        for pattern in patterns:
            if match := _compile(pattern).match(module):
                return int(match.group("layer"))
        return None


def parse_config(data: bytes) -> AdapterConfig:
    """Parses `adapter_config.json`.

    Raises:
        AdapterFormatError: not JSON, a value of the wrong type or out of range, or a key nobody knows.
        AdapterIncompatibleError: a known feature that is not served.
    """
    raw = parse_json(data)
    if raw.get("peft_type") != "LORA":
        raise AdapterIncompatibleError(
            f"peft_type is {raw.get('peft_type')!r}: only LORA adapters are served", "UNSUPPORTED_ADAPTER"
        )
    for key, harmless in _UNSUPPORTED_KEYS.items():
        if key in raw and raw[key] not in harmless:
            raise AdapterIncompatibleError(f"{key}={raw[key]!r} is not supported", "UNSUPPORTED_ADAPTER")
    if raw.get("init_lora_weights") not in _PLAIN_INITS:
        raise AdapterIncompatibleError(
            f"init_lora_weights={raw['init_lora_weights']!r} trains against a changed base model: "
            "convert the adapter to plain LoRA first",
            "UNSUPPORTED_ADAPTER",
        )
    reader = _ConfigReader(raw)
    config = AdapterConfig(
        rank=reader.integer("r", 1, MAX_RANK),
        alpha=reader.number("lora_alpha", MAX_ALPHA),
        target_modules=reader.names("target_modules", required=True),
        exclude_modules=reader.names("exclude_modules"),
        layers_to_transform=reader.integers("layers_to_transform"),
        layers_pattern=_as_tuple(reader.names("layers_pattern")),
        use_rslora=reader.boolean("use_rslora"),
        rank_pattern=reader.pattern("rank_pattern", lambda r, key: r.integer(key, 1, MAX_RANK)),
        alpha_pattern=reader.pattern("alpha_pattern", lambda r, key: r.number(key, MAX_ALPHA)),
        dropout=reader.share("lora_dropout"),
        base_model=str(raw.get("base_model_name_or_path") or ""),
        fan_in_fan_out=reader.boolean("fan_in_fan_out"),
    )
    known = reader.seen | _IGNORED_KEYS | _UNSUPPORTED_KEYS.keys()
    known |= {"peft_type", "init_lora_weights", "base_model_name_or_path"}
    if unknown := sorted(raw.keys() - known):
        raise AdapterFormatError(f"{CONFIG_FILE}: unknown key {unknown[0]!r}")
    _check_patterns(config)
    return config


def to_peft(config: AdapterConfig) -> dict[str, Any]:
    plain = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model or None,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": plain,
        "exclude_modules": config.exclude_modules if isinstance(config.exclude_modules, str) else
                           sorted(config.exclude_modules) or None,
        "layers_to_transform": list(config.layers_to_transform) or None,
        "layers_pattern": list(config.layers_pattern) or None,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }  # fmt: skip


def parse_json(data: bytes, file: str = CONFIG_FILE) -> dict[str, Any]:
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


class _ConfigReader:
    """Typed access to the raw configuration, remembering which keys were looked at."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.seen: set[str] = set()

    def _get(self, key: str) -> Any:
        self.seen.add(key)
        return self.raw.get(key)

    def integer(self, key: str, low: int, high: int) -> int:
        value = self._get(key)
        if type(value) is not int or not low <= value <= high:
            raise AdapterFormatError(f"{key} is {value!r}; an integer from {low} to {high} is needed")
        return value

    def number(self, key: str, high: float) -> float:
        """A finite number over zero: an adapter scaled by zero would silently answer as the base."""
        value = self._get(key)
        if type(value) not in (int, float) or not 0 < value <= high:
            raise AdapterFormatError(f"{key} is {value!r}; a number over 0 and up to {high:g} is needed")
        return float(value)

    def share(self, key: str) -> float:
        """A number from 0 to 1; 0 if it is not there."""
        value = self._get(key)
        if value is None:
            return 0.0
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise AdapterFormatError(f"{key} is {value!r}; a number from 0 to 1 is needed")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self._get(key)
        if value not in (True, False, None):
            raise AdapterFormatError(f"{key} is {value!r}; true or false is needed")
        return bool(value)

    def names(self, key: str, required: bool = False) -> tuple[str, ...] | str:
        value = self._get(key)
        if isinstance(value, str) and value:
            return value
        if value in (None, [], "") and not required:
            return ()
        if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
            raise AdapterFormatError(f"{key} is {value!r}; a name pattern or a list of names is needed")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self._get(key)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is int for item in items):
            raise AdapterFormatError(f"{key} is {value!r}; integers are needed")
        return tuple(items)

    def pattern(self, key: str, read: Callable[["_ConfigReader", str], Value]) -> dict[str, Value]:
        value = self._get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise AdapterFormatError(f"{key} is {value!r}; an object is needed")
        inner = _ConfigReader(value)
        return {name: read(inner, name) for name in value}


def _check_patterns(config: AdapterConfig) -> None:
    """Compiles every pattern once, so that a bad one is refused here and not in the middle of a match."""
    patterns: Iterable[str] = (
        *config.rank_pattern,
        *config.alpha_pattern,
        *config.layers_pattern,
        *(text for text in (config.target_modules, config.exclude_modules) if isinstance(text, str)),
    )
    for pattern in patterns:
        try:
            _compile(pattern)
        except re2.error as error:
            raise AdapterFormatError(f"pattern {pattern!r} is not a plain regular expression: {error}") from error


def _names(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return _full_match(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """PEFT's rule: the first pattern that matches a dotted suffix of the module path."""
    for pattern, value in patterns.items():
        if _full_match(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _as_tuple(names: tuple[str, ...] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _full_match(pattern: str, text: str) -> bool:
    return _compile(pattern).fullmatch(text) is not None


@lru_cache(maxsize=256)
def _compile(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)  # type: ignore[no-untyped-call]
