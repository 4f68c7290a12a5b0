"""Which tensors an adapter's weights file must hold on a given base model, and which it may."""

import math
import struct
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch

from adapters.config import WEIGHTS_FILE, AdapterConfig
from adapters.config_reader import parse_json
from adapters.errors import AdapterFormatError, AdapterIncompatibleError, WrongBaseError

PREFIX = "base_model.model."
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

LayerKind = Literal["linear", "embedding", "head", "tied head"]
Part = Literal["lora_a", "lora_b", "lora_bias", "magnitude", "weight", "bias"]

_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_embedding_A", ".lora_embedding_B",
             ".lora_magnitude_vector")  # fmt: skip
_HEADER_BYTES = 1 << 20  # of any header, so that an adapter of a larger base can say so
_ENTRY_BYTES = 256  # of a tensor in a header, beside its name: dtype, shape, offsets, blanks
_NAMED = 3  # tensors that a message names


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Sizes of a linear layer of the base model. An embedding is one too: its input is a token, as a one-hot row."""

    in_features: int
    out_features: int
    kind: LayerKind = "linear"  # the head makes the logits; a tied one has the embedding's weight

    @property
    def is_head(self) -> bool:
        return self.kind in ("head", "tied head")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a weights file may hold: whose, which part of it, and its shape."""

    module: str
    part: Part  # "weight" and "bias" are the base layer's own, as they were when the adapter was saved
    shape: tuple[int, ...]
    required: bool = True

    @property
    def is_factor(self) -> bool:
        return self.part in ("lora_a", "lora_b")


def known_tensors(config: AdapterConfig, layers: Mapping[str, LinearShape], max_rank: int) -> dict[str, TensorSpec]:
    """By name, every tensor that the configuration calls for or allows on a base model with these layers.

    Raises:
        AdapterIncompatibleError: a rank over `max_rank`, or a layer that cannot be adapted so.
        WrongBaseError: no layer matches.
    """
    _check_saved_modules(config, layers)
    embeds = any(shape.kind == "embedding" and config.targets(module) for module, shape in layers.items())
    known: dict[str, TensorSpec] = {}
    for module, shape in layers.items():
        tied = config.ensure_weight_tying and embeds and shape.kind == "tied head"
        targeted = tied or config.targets(module)
        if targeted:
            known |= _of_target(config, module, shape, max_rank)
        known |= _of_base_layer(config, module, shape, targeted)
    if not any(spec.required for spec in known.values()):
        targets = config.target_modules
        raise WrongBaseError(
            f"target_modules {targets if isinstance(targets, str) else sorted(targets)} match no linear layer of the "
            f"base model, whose layers end in {sorted({module.rpartition('.')[2] for module in layers})}",
            "NO_MATCHING_MODULE",
        )
    return known


def read_header(
    data: bytes, known: Mapping[str, TensorSpec], layers: Collection[str]
) -> tuple[dict[str, TensorSpec], dict[str, Any]]:
    """Holds the safetensors header against the known tensors, before the library parses it.

    Returns those that are there, and the header's metadata.

    Raises:
        AdapterFormatError: malformed, of wrong shapes, with a required tensor missing or an unknown one in it.
        WrongBaseError: the shapes or layers are another base's.
    """
    if len(data) < 8:
        raise AdapterFormatError(f"{WEIGHTS_FILE}: truncated: {len(data)} bytes", "MALFORMED_WEIGHTS")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(largest_header(known), len(data) - 8):
        raise AdapterFormatError(f"{WEIGHTS_FILE}: header of {length} bytes does not fit", "MALFORMED_WEIGHTS")
    header = parse_json(data[8 : 8 + length], WEIGHTS_FILE)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise AdapterFormatError(f"{WEIGHTS_FILE}: __metadata__ is not an object", "MALFORMED_WEIGHTS")
    _check_names(header.keys(), known, layers)
    dtypes = set()
    for name, entry in header.items():
        spec = known[name]
        if not isinstance(entry, dict):
            raise AdapterFormatError(f"{WEIGHTS_FILE}: {name} is not an object", "MALFORMED_WEIGHTS")
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise AdapterFormatError(f"{WEIGHTS_FILE}: {name} has dtype {dtype}; one of {', '.join(DTYPES)} is needed")
        if entry.get("shape") != list(spec.shape):
            raise _wrong_shape(name, spec, entry.get("shape"))
        if spec.is_factor:
            dtypes.add(dtype)
    if len(dtypes) > 1:
        raise AdapterFormatError(f"{WEIGHTS_FILE}: tensors of different dtypes: {', '.join(sorted(dtypes))}")
    return {name: known[name] for name in header}, metadata


def largest_header(known: Mapping[str, TensorSpec]) -> int:
    """Bytes of a header that names every known tensor."""
    return _HEADER_BYTES + sum(len(name) + _ENTRY_BYTES for name in known)


def largest_file(known: Mapping[str, TensorSpec]) -> int:
    """Bytes of a weights file that holds every known tensor in float32."""
    return 8 + largest_header(known) + sum(4 * math.prod(spec.shape) for spec in known.values())


def _wrong_shape(name: str, spec: TensorSpec, shape: Any) -> AdapterFormatError:
    """A factor that goes with the base, but for its rank or its orientation, contradicts its own configuration."""
    is_matrix = isinstance(shape, list) and len(shape) == 2
    if spec.is_factor and (not is_matrix or spec.shape[1 if spec.part == "lora_a" else 0] in shape):
        return AdapterFormatError(
            f"{WEIGHTS_FILE}: {name} has shape {shape}; the configuration's rank calls for {list(spec.shape)}",
            "WRONG_SHAPE",
        )
    resized = "; the vocabulary was resized" if spec.part == "weight" else ""
    return WrongBaseError(
        f"{WEIGHTS_FILE}: {name} has shape {shape}; the configuration and the base model need "
        f"{list(spec.shape)}{resized}",
        "WRONG_SHAPE",
    )


def _of_target(config: AdapterConfig, module: str, shape: LinearShape, max_rank: int) -> dict[str, TensorSpec]:
    """The tensors of one adapted layer."""
    rank = config.rank_of(module)
    if rank > max_rank:
        raise AdapterIncompatibleError(
            f"rank {rank} of {module} is over the limit of {max_rank}: start with --max-lora-rank {rank}",
            "RANK_TOO_LARGE",
        )
    path = f"{PREFIX}{module}"
    a, b = (rank, shape.in_features), (shape.out_features, rank)
    if shape.kind == "embedding":
        for key, is_set in (("lora_bias", config.lora_bias), ("alora_invocation_tokens", config.invocation_tokens)):
            if is_set:
                raise AdapterFormatError(f"{module} is an embedding, which {key} does not go with")
        names = {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
    else:
        names = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    parts: tuple[Part, Part] = ("lora_a", "lora_b")
    tensors = {name: TensorSpec(module, part, names[name]) for name, part in zip(names, parts, strict=True)}
    if config.lora_bias:
        tensors[f"{path}.lora_B.bias"] = TensorSpec(module, "lora_bias", (shape.out_features,))
    if config.use_dora:
        tensors[f"{path}.lora_magnitude_vector"] = TensorSpec(module, "magnitude", (shape.out_features,))
    return tensors


def _of_base_layer(config: AdapterConfig, module: str, shape: LinearShape, targeted: bool) -> dict[str, TensorSpec]:
    """The base layer's own tensors, which PEFT may have saved: of embedding and head, and biases that it trained."""
    path = f"{PREFIX}{module}.base_layer" if targeted else f"{PREFIX}{module}"
    tensors = {}
    if shape.kind == "embedding":
        tensors[f"{path}.weight"] = TensorSpec(module, "weight", (shape.in_features, shape.out_features), False)
    if shape.is_head:
        tensors[f"{path}.weight"] = TensorSpec(module, "weight", (shape.out_features, shape.in_features), False)
    is_trained = shape.kind != "embedding" and (config.bias == "all" or (config.bias == "lora_only" and targeted))
    if shape.is_head or is_trained:
        tensors[f"{path}.bias"] = TensorSpec(module, "bias", (shape.out_features,), False)
    return tensors


def _check_saved_modules(config: AdapterConfig, layers: Mapping[str, LinearShape]) -> None:
    """Of the modules that were trained whole only head and embedding are read on: their copies may be the base's."""
    whole = [module for module, shape in layers.items() if shape.kind == "embedding" or shape.is_head]
    for name in config.modules_to_save:
        if not any(module == name or module.endswith(f".{name}") for module in whole):
            raise AdapterIncompatibleError(
                f"modules_to_save={list(config.modules_to_save)!r} is not served: {name} was trained whole, and all "
                "adapters run on the base model's own",
                "UNSUPPORTED_ADAPTER",
            )


def _check_names(names: Set[str], known: Mapping[str, TensorSpec], layers: Collection[str]) -> None:
    if unknown := sorted(names - known.keys()):
        message = f"{WEIGHTS_FILE}: unexpected tensor {_some(unknown)}"
        module = _module(unknown[0])
        if module is not None and module not in layers:
            raise WrongBaseError(
                f"{message}: it belongs to a layer that the base model does not have", "NO_MATCHING_MODULE"
            )
        if unknown[0].endswith(".bias"):
            raise AdapterIncompatibleError(f"{message}: it is the bias of no linear layer", "UNSUPPORTED_ADAPTER")
        raise AdapterFormatError(message, "UNEXPECTED_TENSOR")
    required = [name for name, spec in known.items() if spec.required]
    if missing := [name for name in required if name not in names]:
        message = f"{WEIGHTS_FILE}: {len(missing)} of {len(required)} tensors are missing: {_some(missing)}"
        begun = {known[name].module for name in names if known[name].is_factor}
        if begun and begun.isdisjoint(known[name].module for name in missing):
            raise WrongBaseError(f"{message}: it has nothing for layers of this base model", "MISSING_TENSOR")
        raise AdapterFormatError(message, "MISSING_TENSOR")


def _module(name: str) -> str | None:
    """The module path in the name of one of LoRA's own tensors."""
    for suffix in _SUFFIXES:
        if name.startswith(PREFIX) and name.endswith(suffix):
            return name.removeprefix(PREFIX).removesuffix(suffix)
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
