"""The frozen base model: loaded from transformers, with our attention under it and its own answers kept as proof."""

import hashlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adapters.base_fingerprint import base_fingerprint
from adapters.tensors import LinearShape
from server.engine.attention import ATTENTION_NAME
from server.engine.choices import Choices
from server.engine.kv_cache import KVShape
from server.engine.probe import probe_model
from server.errors import ConfigError

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_UNSTABLE_ROPE_TYPES = {"longrope", "dynamic"}
PROBE_TOKENS = 12


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model ready to be served: frozen, with the paged attention in place."""

    name: str
    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    digest: str  # sha256 of every parameter's name and bytes, hex
    fingerprint: str  # what adapters that were trained on it have recorded; empty: unknown
    kv_shape: KVShape
    linear_layers: dict[str, LinearShape]  # what an adapter may target, by module path; an embedding is linear too
    linear_groups: list[list[str]]  # the same layers but the embedding, those together that read one input
    head: str  # module path of the layer that makes the logits
    vocab_size: int  # width of the logits
    max_model_len: int  # what the position embeddings were made for
    eos_token_ids: frozenset[int]
    reference: "Reference"

    @property
    def architecture(self) -> str:
        return type(self.model).__name__


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model itself answers on a short prompt, taken before anything of it was replaced."""

    token_ids: list[int]
    logits: Tensor  # [num_tokens, vocab_size] float32, on the host
    choices: list[Tensor | None]  # of its routers, see `Choices`


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Raises ConfigError if the folder or hub name has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {path}: no tokenizer: {_first_line(error)}") from error
    return tokenizer


def load_base_model(path: str, name: str, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """Loads and freezes a model and puts the paged attention under it.

    Raises:
        ConfigError: the model cannot be read, or it is of a kind that cannot be served, with the reason.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {path} cannot be loaded: {_first_line(error)}") from error
    return prepare_base_model(model, name, device)


@torch.inference_mode()
def prepare_base_model(model: PreTrainedModel, name: str, device: torch.device) -> BaseModel:
    """Makes a loaded model servable; see `load_base_model`."""
    model.eval().requires_grad_(False).to(device)
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := layer_types - _SERVED_LAYER_TYPES:
        raise ConfigError(f"--model {name}: layers of type {', '.join(sorted(unknown))} are not supported")

    if unstable := _rope_types(config) & _UNSTABLE_ROPE_TYPES:
        raise ConfigError(
            f"--model {name}: rotary embedding of type {unstable.pop()} depends on the longest request of a step, "
            "so one request would change another's answer"
        )

    vocab_size = int(config.vocab_size)
    token_ids = [7 * i % vocab_size for i in range(1, PROBE_TOKENS + 1)]
    input_ids = torch.tensor([token_ids], device=device)
    choices = Choices(PROBE_TOKENS)
    with choices:
        logits = model(input_ids, use_cache=False).logits[0].float().cpu()
    digest, fingerprint = _digest(model), base_fingerprint(model)

    try:
        model.set_attn_implementation(ATTENTION_NAME)
        probe = probe_model(model, input_ids)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise ConfigError(f"--model {name} cannot be served: {_first_line(error)}") from error
    return BaseModel(
        name=name,
        model=model,
        device=device,
        dtype=model.dtype,
        digest=digest,
        fingerprint=fingerprint,
        kv_shape=probe.kv_shape(int(config.num_hidden_layers), name),
        linear_layers=probe.linear_layers,
        linear_groups=probe.linear_groups,
        head=probe.head,
        vocab_size=logits.shape[-1],
        max_model_len=int(getattr(config, "max_position_embeddings", 0) or 4096),
        eos_token_ids=_eos_token_ids(model),
        reference=Reference(token_ids, logits, choices.noted),
    )


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding of a model; some have one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return {str(part["rope_type"]) for part in parts if "rope_type" in part}


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    generation = model.generation_config
    ids = generation.eos_token_id if generation is not None else None
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
