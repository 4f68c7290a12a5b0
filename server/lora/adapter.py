"""An adapter in host memory. Immutable, so it may be seen from any thread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.errors import AdapterFormatError, AdapterIncompatibleError, printable
from adapters.format import AdapterFiles
from server.kernels import LayerWeights
from server.kernels.memory import lazy_zeros
from server.lora.base_weights import BaseWeights, adapted_norms, check_own
from server.lora.tier import AdapterTier


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """An adapter's files that go with the base's weights: what a copy of it holds, still in the files' own memory."""

    files: AdapterFiles
    layers: Mapping[str, LayerWeights]  # by module path
    dtype: torch.dtype | None  # of the factors in a copy; None: the files'
    unmatched_targets: tuple[str, ...]  # names in its `target_modules` that no layer of the base has
    layers_by_target: Mapping[str, int]  # how many layers each of `target_modules` adapts, by name or by pattern

    @classmethod
    def from_files(cls, files: AdapterFiles, base: BaseWeights, dtype: torch.dtype | None = None) -> "CheckedAdapter":
        """
        Raises:
            AdapterFormatError: factors that `dtype` does not reach.
            AdapterIncompatibleError: the files do not go with what this base model's weights are.
        """
        _check_invocation(files)
        if dtype is not None:
            _check_range(files, dtype)
        for module, weight in files.base_weights.items():
            check_own(base, module, weight)
        layers = {
            module: layer
            for module in sorted(files.weights.keys() | files.base_biases.keys())
            if (layer := _layer(files, module, base)) is not None
        }
        unmatched = files.config.unmatched_targets(base.shapes)
        counts = {printable(name): count for name, count in files.config.layers_by_target(base.shapes).items()}
        return cls(files, layers, dtype, tuple(map(printable, unmatched)), counts)

    @property
    def adds_nothing(self) -> bool:
        """Whether it answers as the base does: every B is zero, and it has neither gains nor biases."""
        layers = self.layers.values()
        return not any(of.lora_b.any() or of.gain is not None or of.bias is not None for of in layers)

    @property
    def num_bytes(self) -> int:
        """Of the weights in a copy: the base's own are not in it, gains and biases are float32."""
        return sum(
            _size(factor, self.dtype) + _size(extra)
            for layer in self.layers.values()
            for factor, extra in zip((layer.lora_a, layer.lora_b), (layer.gain, layer.bias), strict=True)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One generation of an adapter's weights. Its identity is the object: a name is only a pointer to it."""

    name: str
    version: str
    generation: int  # counts loads on this server; never reused
    digest: str
    rank: int  # the largest of its layers
    target_modules: tuple[str, ...]  # last parts of the module paths
    weights: Mapping[str, LayerWeights] = field(repr=False)  # by module path
    num_bytes: int  # of the weights
    num_bytes_disk: int
    no_mix: str = ""  # why it takes no factor and no other adapter beside it; empty: it does
    unmatched_targets: tuple[str, ...] = ()  # names in its configuration that no layer of the base has
    layers_by_target: Mapping[str, int] = field(default_factory=dict, repr=False)  # see `CheckedAdapter`
    adds_nothing: bool = False  # see `CheckedAdapter`
    other_base: str = ""  # that it says it was trained on, and nothing shows that it is ours; empty: there is none
    invocation_tokens: tuple[int, ...] = ()  # aLoRA: it works from their last occurrence in a prompt on

    @classmethod
    def from_files(
        cls,
        files: AdapterFiles,
        name: str,
        version: str,
        generation: int,
        base: BaseWeights,
        dtype: torch.dtype | None = None,
    ) -> "Adapter":
        """Raises what `CheckedAdapter.from_files` does."""
        return cls.copied(CheckedAdapter.from_files(files, base, dtype), name, version, generation)

    @classmethod
    def copied(
        cls, checked: CheckedAdapter, name: str, version: str, generation: int, other_base: str = ""
    ) -> "Adapter":
        """Copies the weights into one block of memory, which goes back to the system whole when the adapter goes.

        Raises:
            MemoryError, OSError: the system has none.
        """
        files, num_bytes = checked.files, checked.num_bytes
        weights = _placed(checked, lazy_zeros((num_bytes,), torch.uint8))
        return cls(
            name=name,
            version=version,
            generation=generation,
            digest=files.digest,
            rank=max(layer.lora_a.shape[0] for layer in weights.values()),
            target_modules=tuple(sorted({module.rpartition(".")[2] for module in weights})),
            weights=weights,
            num_bytes=num_bytes,
            num_bytes_disk=files.num_bytes,
            no_mix=_why_no_mix(files, weights),
            invocation_tokens=files.config.invocation_tokens,
            unmatched_targets=checked.unmatched_targets,
            layers_by_target=checked.layers_by_target,
            adds_nothing=checked.adds_nothing,
            other_base=other_base,
        )

    def first_token(self, prompt: Sequence[int]) -> int | None:
        """Where in a prompt the adapter begins to work; None: nowhere, for it is not invoked."""
        wanted = list(self.invocation_tokens)
        if not wanted:
            return 0
        starts = (start for start in range(len(prompt) - len(wanted), -1, -1) if prompt[start] == wanted[0])
        return next((start for start in starts if prompt[start : start + len(wanted)] == wanted), None)


class WeightedAdapter(NamedTuple):
    """One part of what a request runs on: its bypass is taken times `weight`."""

    adapter: Adapter
    weight: float = 1.0
    tier: AdapterTier = AdapterTier.HOST  # where it was found before it needed a slot

    @property
    def identity(self) -> "AdapterIdentity":
        adapter = self.adapter
        return AdapterIdentity(adapter.name, adapter.version, adapter.generation, adapter.digest, self.weight)


class AdapterIdentity(NamedTuple):
    """Tells of a `WeightedAdapter` without keeping its weights in memory."""

    name: str
    version: str
    generation: int
    digest: str
    weight: float


def _check_invocation(files: AdapterFiles) -> None:
    """PEFT masks the bypass of tokens before the invocation, but applies a trained bias to every token.

    So their K and V would not be the base's, as those of an aLoRA are here.
    """
    config = files.config
    if config.invocation_tokens and config.bias != "none" and files.base_biases:
        raise AdapterIncompatibleError(
            f"bias={config.bias!r} trained biases of the base, which work on every token, and alora_invocation_tokens "
            "has the adapter work from its invocation on; train it with bias='none', or with lora_bias",
            "UNSUPPORTED_ADAPTER",
        )


def _layer(files: AdapterFiles, module: str, base: BaseWeights) -> LayerWeights | None:
    """What the files say of one layer, with DoRA's norms and the base's own bias worked in; None if that is nothing.

    PEFT computes `g ⊙ (W x + s · B A x) + b'`, where g is 1 without DoRA and b' the trained bias, or else the base's b.
    Over the layer's own output `y = W x + b` that is `g ⊙ (y + s · B A x) + (b' − g ⊙ b)`.
    """
    lora, trained = files.weights.get(module), files.base_biases.get(module)
    shape = base.shapes[module]
    own = None if shape.kind == "embedding" else base.bias(module)
    if trained is not None and own is None:
        raise AdapterIncompatibleError(f"the bias of {module} was trained, and the base model has none there")
    gain = bias = None
    if lora is not None and lora.magnitude is not None:
        gain = lora.magnitude.float() / adapted_norms(base, module, lora)
        if not gain.isfinite().all():
            raise AdapterIncompatibleError(f"DoRA divides by the norm of {module}'s weights, and some of them are zero")
    if own is not None and (gain is not None or trained is not None):
        bias = (own if trained is None else trained.float()) - (own if gain is None else gain * own)
    if lora is None:
        unchanged = bias is None or not bias.any()
        no_factors = torch.empty(0, shape.in_features), torch.empty(0, shape.out_features)
        return None if unchanged else LayerWeights(*no_factors, 1.0, bias=bias)
    if lora.lora_bias is not None:
        bias = lora.scaling * lora.lora_bias.float() + (0.0 if bias is None else bias)
    return LayerWeights(lora.lora_a, lora.lora_b.T, lora.scaling, gain, bias)


def _check_range(files: AdapterFiles, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    for module, lora in files.weights.items():
        for factor in (lora.lora_a, lora.lora_b):
            if torch.finfo(factor.dtype).max > limits.max and (found := float(factor.abs().max())) > limits.max:
                raise AdapterFormatError(
                    f"{module} has values up to {found:.3g}, and {limits.dtype} ends at {limits.max:.3g}: start with "
                    "another --dtype or --lora-dtype",
                    "NON_FINITE_WEIGHTS",
                )


def _size(tensor: Tensor | None, dtype: torch.dtype | None = None) -> int:
    """Bytes of a tensor once it is of another dtype."""
    return 0 if tensor is None else tensor.numel() * (dtype or tensor.dtype).itemsize


def _placed(checked: CheckedAdapter, memory: Tensor) -> dict[str, LayerWeights]:
    """The layers with their tensors copied into `memory`: the float32 extras before factors of any width."""
    used = 0

    def place(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        nonlocal used
        size, dtype = _size(tensor, dtype), dtype or tensor.dtype
        if not size:
            return tensor.to(dtype)
        placed = memory[used : used + size].view(dtype).view(tensor.shape)
        used += size
        return placed.copy_(tensor)

    extras = {
        module: [None if extra is None else place(extra) for extra in (layer.gain, layer.bias)]
        for module, layer in checked.layers.items()
    }
    return {
        module: LayerWeights(
            place(layer.lora_a, checked.dtype), place(layer.lora_b, checked.dtype), layer.scaling, *extras[module]
        )
        for module, layer in checked.layers.items()
    }


def _why_no_mix(files: AdapterFiles, weights: Mapping[str, LayerWeights]) -> str:
    if files.config.invocation_tokens:
        return "it works on a part of the prompt (aLoRA)"
    if files.config.use_dora:
        return "it rescales outputs (DoRA)"
    if any(layer.bias is not None for layer in weights.values()):
        return "it adds biases"
    return ""
