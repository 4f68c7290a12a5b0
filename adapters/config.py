"""What an adapter's `adapter_config.json` means: parsed strictly, since it is untrusted input.

Every key is either understood, known to change nothing, or refused by name and with the reason.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.config_reader import ConfigReader, parse_json
from adapters.errors import AdapterFormatError, AdapterIncompatibleError
from adapters.patterns import by_pattern, check_patterns, count_names, layer_index, names_module, unmatched_names

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RANK = 4096
MIN_ALPHA = 1e-30  # what is smaller is zero in float32, over any rank
MAX_ALPHA = 65536.0

# Keys that say how an adapter was made, or nothing at all: they do not change what it computes.
_IGNORED_KEYS = frozenset({
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "runtime_config",
})  # fmt: skip
# Features that are not served, and why. A key is harmless while its value is false, empty or missing.
_NOT_SERVED = {
    "use_qalora": "its A reads groups of averaged inputs, which goes with a base quantized by GPTQ",
    "use_bdlora": "its factors are block-diagonal",
    "target_parameters": "it adapts bare parameters (of experts), which see no row per token",
    "layer_replication": "it adapts copies of layers, and the base model that is served has each layer once",
    "arrow_config": "it routes tokens among other adapters",
    "kasa_config": "it was trained against a truncated base model",
    "monteclora_config": "it samples its weights",
    "velora_config": "its files hold what only training needs; save it as plain LoRA",
    "trainable_token_indices": "it replaces rows of the embedding; train LoRA on the embedding instead",
}
_SERVED_TASKS = (None, "CAUSAL_LM")
# Initializations that leave the base weights alone, and those that train against a changed base.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    base_model: str = ""  # the name or folder of the model that it was trained on; empty: not recorded
    base_revision: str = ""
    fan_in_fan_out: bool = False
    use_dora: bool = False
    bias: str = "none"  # whose biases were trained: "none", "lora_only" (of the targets) or "all"
    lora_bias: bool = False  # whether every B has a bias of its own
    modules_to_save: tuple[str, ...] = ()  # modules that were trained whole
    ensure_weight_tying: bool = False  # whether a head that is the embedding's weight is adapted as the embedding is
    invocation_tokens: tuple[int, ...] = ()  # aLoRA: the adapter works from their last occurrence in the prompt on

    @property
    def trained_on(self) -> str:
        """The base model and its revision, for people."""
        at = f" at revision {self.base_revision}" if self.base_revision else ""
        return f"{self.base_model or 'a base model that it does not name'}{at}"

    def rank_of(self, module: str) -> int:
        return by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """`alpha / rank`, or `alpha / √rank` for rsLoRA, with both patterns applied."""
        alpha, rank = by_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put LoRA on this module path."""
        if self.exclude_modules and names_module(self.exclude_modules, module):
            return False
        if not names_module(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or not self.layers_to_transform:
            return True
        return layer_index(self.layers_pattern, module) in self.layers_to_transform

    def layers_by_target(self, modules: Iterable[str]) -> dict[str, int]:
        """How many modules each of `target_modules` puts LoRA on: by name, or by the one pattern."""
        targeted = [module for module in modules if self.targets(module)]
        if isinstance(self.target_modules, str):
            return {self.target_modules: len(targeted)}
        return count_names(self.target_modules, targeted)

    def unmatched_targets(self, modules: Iterable[str]) -> tuple[str, ...]:
        """The names in `target_modules` that no module has; a pattern is none of them."""
        return () if isinstance(self.target_modules, str) else unmatched_names(self.target_modules, modules)


def parse_config(data: bytes) -> AdapterConfig:
    """Parses `adapter_config.json`.

    Raises:
        AdapterFormatError: not JSON, a value of the wrong type or out of range, or a key nobody knows.
        AdapterIncompatibleError: a known feature that is not served.
    """
    raw = parse_json(data, CONFIG_FILE)
    _refuse_what_is_not_served(raw)
    reader = ConfigReader(raw)
    config = AdapterConfig(
        rank=reader.integer("r", 1, MAX_RANK),
        alpha=reader.number("lora_alpha", MIN_ALPHA, MAX_ALPHA),
        target_modules=reader.names("target_modules", required=True),
        exclude_modules=reader.names("exclude_modules"),
        layers_to_transform=reader.integers("layers_to_transform"),
        layers_pattern=_as_tuple(reader.names("layers_pattern")),
        use_rslora=reader.boolean("use_rslora"),
        rank_pattern=reader.pattern("rank_pattern", lambda r, key: r.integer(key, 1, MAX_RANK)),
        alpha_pattern=reader.pattern("alpha_pattern", lambda r, key: r.number(key, MIN_ALPHA, MAX_ALPHA)),
        dropout=reader.share("lora_dropout"),
        base_model=reader.text("base_model_name_or_path"),
        base_revision=reader.text("revision"),
        fan_in_fan_out=reader.boolean("fan_in_fan_out"),
        use_dora=reader.boolean("use_dora"),
        bias=reader.choice("bias", ("none", "lora_only", "all")),
        lora_bias=reader.boolean("lora_bias"),
        modules_to_save=_as_tuple(reader.names("modules_to_save")),
        ensure_weight_tying=reader.boolean("ensure_weight_tying"),
        invocation_tokens=reader.integers("alora_invocation_tokens"),
    )
    known = reader.seen | _IGNORED_KEYS | _NOT_SERVED.keys()
    known |= {"peft_type", "task_type", "init_lora_weights"}
    if unknown := sorted(raw.keys() - known):
        raise AdapterFormatError(f"{CONFIG_FILE}: unknown key {unknown[0]!r}")
    if config.use_dora and (config.lora_bias or config.invocation_tokens):
        raise AdapterFormatError("use_dora goes neither with lora_bias nor with alora_invocation_tokens")
    if any(token < 0 for token in config.invocation_tokens):
        raise AdapterFormatError(f"alora_invocation_tokens is {list(config.invocation_tokens)}; token ids are needed")
    check_patterns(
        modules=[text for text in (config.target_modules, config.exclude_modules) if isinstance(text, str)],
        suffixes=[*config.rank_pattern, *config.alpha_pattern],
        layers_patterns=config.layers_pattern,
    )
    return config


def to_peft(config: AdapterConfig) -> dict[str, Any]:
    """The configuration as PEFT writes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model or None,
        "revision": config.base_revision or None,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _as_json(config.target_modules),
        "exclude_modules": _as_json(config.exclude_modules) or None,
        "layers_to_transform": list(config.layers_to_transform) or None,
        "layers_pattern": list(config.layers_pattern) or None,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "fan_in_fan_out": config.fan_in_fan_out,
        "use_dora": config.use_dora,
        "bias": config.bias,
        "lora_bias": config.lora_bias,
        "modules_to_save": list(config.modules_to_save) or None,
        "ensure_weight_tying": config.ensure_weight_tying,
        "alora_invocation_tokens": list(config.invocation_tokens) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _refuse_what_is_not_served(raw: Mapping[str, Any]) -> None:
    def refuse(key: str, why: str) -> None:
        raise AdapterIncompatibleError(f"{key}={raw.get(key)!r} is not served: {why}", "UNSUPPORTED_ADAPTER")

    if raw.get("peft_type") != "LORA":
        refuse("peft_type", "only LORA adapters are")
    if raw.get("task_type") not in _SERVED_TASKS:
        refuse("task_type", "this server generates text (CAUSAL_LM)")
    for key, why in _NOT_SERVED.items():
        if raw.get(key):
            refuse(key, why)
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_MUTATING_INITS):
        refuse(
            "init_lora_weights",
            "the adapter was trained against a changed base model; save it as plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)",
        )
    if init not in _PLAIN_INITS:
        refuse("init_lora_weights", "nobody knows whether it changes the base model")


def _as_tuple(names: tuple[str, ...] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _as_json(names: tuple[str, ...] | str) -> str | list[str]:
    return names if isinstance(names, str) else sorted(names)
