"""One forward of a model that is about to be served, to learn how it is made. Engine thread, once at start."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.tensors import LayerKind, LinearShape
from server.engine.attention import AttentionOptions
from server.engine.kv_cache import KVShape
from server.errors import ConfigError


@dataclass(slots=True)
class Probe:
    """Stands in for the attention of one forward and writes down how the model is made."""

    kv_shapes: dict[int | None, tuple[int, int]] = field(default_factory=dict)  # layer → heads, head size
    value_sizes: set[tuple[int, int]] = field(default_factory=set)
    plain_attention: bool = True
    linear_layers: dict[str, LinearShape] = field(default_factory=dict)
    linear_groups: list[list[str]] = field(default_factory=list)
    head: str = ""
    addresses: tuple[int, ...] = ()

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self.kv_shapes[layer] = (key.shape[1], key.shape[2])
        self.value_sizes.add((key.shape[2], value.shape[2]))
        self.plain_attention &= options.softcap is None and options.sinks is None
        return query.new_zeros(*query.shape[:2], value.shape[2])

    def kv_shape(self, num_layers: int, name: str) -> KVShape:
        refused = f"--model {name} cannot be served: "
        if any(key_size != value_size for key_size, value_size in self.value_sizes):
            raise ConfigError(refused + "keys and values have different head sizes")
        if set(self.kv_shapes) != set(range(num_layers)):
            raise ConfigError(
                refused
                + f"{len(self.kv_shapes)} of its {num_layers} layers use the attention interface of transformers, "
                "so part of its state is kept elsewhere"
            )
        shapes = set(self.kv_shapes.values())
        if len(shapes) > 1:
            raise ConfigError(refused + f"its layers differ in KV heads and head size: {sorted(shapes)}")
        num_kv_heads, head_dim = shapes.pop()
        return KVShape(num_layers, num_kv_heads, head_dim, self.plain_attention)


def probe_model(model: PreTrainedModel, input_ids: Tensor) -> Probe:
    """Runs one forward to learn the attention's shapes and which linear layers see one row per token.

    Only those can take part in a batch of many adapters: a layer that sees its rows regrouped (an expert) cannot.
    """
    probe = Probe()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    num_tokens = input_ids.shape[1]
    inputs: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()
    handles = []
    for path, module in model.named_modules():
        if type(module).forward in (nn.Linear.forward, Conv1D.forward) or module is embedding:
            if module is head:
                probe.head = path

            def record(module: nn.Module, args: tuple[Tensor, ...], *, path: str = path) -> None:
                calls[path] += 1
                inputs[path] = args[0]

            handles.append(module.register_forward_pre_hook(record))
    try:
        kept = torch.tensor([0, num_tokens - 1], device=input_ids.device)
        logits = model(
            input_ids,
            position_ids=torch.arange(num_tokens, device=input_ids.device)[None],
            use_cache=False,
            logits_to_keep=kept,
            attention_step=probe,
        ).logits
    finally:
        for handle in handles:
            handle.remove()
    if logits.shape[:2] != (1, 2):
        raise ValueError("the model does not honour logits_to_keep")
    previous: Tensor | None = None
    for path, x in inputs.items():  # in the order of the calls
        layer = model.get_submodule(path)
        if calls[path] == 1 and layer is embedding and x.shape == (1, num_tokens) and isinstance(layer, nn.Embedding):
            probe.linear_layers[path] = LinearShape(layer.num_embeddings, layer.embedding_dim, "embedding")
        elif calls[path] == 1 and x.shape[:-1] in _row_shapes(path, path == probe.head, num_tokens):
            probe.linear_layers[path] = _linear_shape(layer, model)
            if x is previous:
                probe.linear_groups[-1].append(path)
            else:
                probe.linear_groups.append([path])
            previous = x
    return probe


def _row_shapes(path: str, is_head: bool, num_tokens: int) -> list[tuple[int, ...]]:
    """Shapes of x, but for the features, that have a row for every token.

    Without the first dimension only for the own layers of a decoder layer, as OPT has them: an expert may have had all
    tokens by chance.
    """
    if is_head:
        return [(1, 2)]
    numbers = [place for place, part in enumerate(path.split(".")) if part.isdigit()]
    is_own = numbers == [path.count(".") - 1]
    return [(1, num_tokens), (num_tokens,)] if is_own else [(1, num_tokens)]


def _linear_shape(layer: nn.Module, model: PreTrainedModel) -> LinearShape:
    if isinstance(layer, Conv1D):
        return LinearShape(int(layer.nx), int(layer.nf))
    assert isinstance(layer, nn.Linear)
    kind: LayerKind = "linear"
    if layer is model.get_output_embeddings():
        kind = "tied head" if layer.weight is model.get_input_embeddings().weight else "head"
    return LinearShape(layer.in_features, layer.out_features, kind)
