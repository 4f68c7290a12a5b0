"""The operations of a step in plain torch: the reference for every kernel, and what runs where there is none."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.kernels import Kernels, LayerWeights, Segment


class MergeableLayers:
    """Frozen layers as they are, whose weights may be swapped for their sums with an adapter: all but the slots."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers: Sequence[Any] = layers
        self._base = [cast(nn.Parameter, layer.weight) for layer in layers]
        self._biases = [cast(nn.Parameter | None, layer.bias) for layer in layers]

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The layers' own, without bypasses."""
        return [layer(x) for layer in self._layers]

    def merge(self, weights: Sequence[LayerWeights | None]) -> int:
        """See `LinearGroup.merge`; the sums are taken in float32."""
        self.unmerge()
        num_bytes = 0
        for index, (layer, base, lora) in enumerate(zip(self._layers, self._base, weights, strict=True)):
            if lora is None:
                continue
            if lora.changes_weight:
                merged = _sum(base, lora, is_transposed=isinstance(layer, Conv1D))
                layer.weight = nn.Parameter(merged.to(base.dtype), requires_grad=False)
                num_bytes += layer.weight.nbytes
            bias = lora.merged_bias(self.base_bias(index))
            layer.bias = None if bias is None else nn.Parameter(bias.to(base.dtype), requires_grad=False)
        return num_bytes

    def unmerge(self) -> None:
        for layer, base, bias in zip(self._layers, self._base, self._biases, strict=True):
            layer.weight, layer.bias = base, bias

    def base_rows(self, layer: int, start: int, end: int) -> Tensor:
        weight = self._base[layer].detach()
        if weight.is_mkldnn:
            weight = weight.to_dense()
        return (weight.T if isinstance(self._layers[layer], Conv1D) else weight)[start:end].float()

    def base_bias(self, layer: int) -> Tensor | None:
        bias = self._biases[layer]
        return None if bias is None else bias.detach().float()


class TorchLinearGroup(MergeableLayers):
    """The reference of `LinearGroup`; its layers stay as they are."""

    def __init__(self, layers: Sequence[nn.Module], num_slots: int) -> None:
        super().__init__(layers)
        self._slots: list[list[LayerWeights | None]] = [[None] * num_slots for _ in layers]

    def set_slot(self, layer: int, slot: int, weights: LayerWeights | None) -> None:
        self._slots[layer][slot] = weights

    def __call__(self, x: Tensor, passes: Sequence[Sequence[Segment]]) -> list[Tensor]:
        outputs = self.outputs(x)
        rows = x.reshape(-1, x.shape[-1])
        for segments in passes:
            for y, slots in zip(outputs, self._slots, strict=True):
                add_lora(y.view(-1, y.shape[-1]), rows, slots, segments)
        return outputs


class TorchEmbeddingBypass:
    """The reference of `EmbeddingBypass`."""

    def __init__(self, vocab_size: int, hidden_size: int, num_slots: int) -> None:
        self._slots: list[LayerWeights | None] = [None] * num_slots

    def set_slot(self, slot: int, weights: LayerWeights | None) -> None:
        self._slots[slot] = weights

    def __call__(self, y: Tensor, token_ids: Tensor, segments: Sequence[Segment]) -> None:
        for slot, start, end, scale in segments:
            weights = self._slots[slot]
            if weights is not None:
                columns = weights.lora_a[:, token_ids[start:end]].T.to(y.dtype) * (weights.scaling * scale)
                y[start:end] += columns @ weights.lora_b.to(y.dtype)
                finish(y[start:end], weights)


def torch_kernels() -> Kernels:
    return Kernels("torch", TorchLinearGroup, tuple, TorchEmbeddingBypass, groups_layers=False)


def add_lora(y: Tensor, x: Tensor, slots: Sequence[LayerWeights | None], segments: Sequence[Segment]) -> None:
    """Applies each token's adapter to the output of a frozen layer, in place.

    Semantics: for every segment `(s, start, end, scale)` whose slot holds weights, with rank r of its own,

        y = gain_s ⊙ (y + scale · scaling_s · (x @ lora_a_sᵀ) @ lora_b_s) + bias_s        for rows start to end

    Args:
        y: [num_tokens, out_features], changed in place.
        x: [num_tokens, in_features].
        slots: per slot `lora_a` [r, in_features] and `lora_b` [r, out_features], and `gain` and `bias`
            [out_features] where it has them; None: the adapter skips this layer.
        segments: runs of tokens of one slot, without overlap. Tokens in no segment are left untouched.
    """
    for slot, start, end, scale in segments:
        weights = slots[slot]
        if weights is not None:
            shrunk = F.linear(x[start:end], weights.lora_a.to(x.dtype)) * (weights.scaling * scale)
            y[start:end] += shrunk @ weights.lora_b.to(x.dtype)
            finish(y[start:end], weights)


def finish(y: Tensor, weights: LayerWeights) -> None:
    """y = gain ⊙ y + bias, in place."""
    if weights.gain is not None:
        y *= weights.gain.to(y.dtype)
    if weights.bias is not None:
        y += weights.bias.to(y.dtype)


def _sum(base: Tensor, lora: LayerWeights, *, is_transposed: bool) -> Tensor:
    """gain ⊙ (W + scaling · B A) in float32, for W [out_features, in_features] or transposed."""
    lora_a, lora_b = lora.lora_a.float(), lora.lora_b.float()
    factors = (lora_a.T, lora_b) if is_transposed else (lora_b.T, lora_a)
    total = torch.addmm(base.float(), *factors, alpha=lora.scaling)
    if lora.gain is not None:
        total *= lora.gain if is_transposed else lora.gain[:, None]
    return total


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of a sequence's last tokens over all of its tokens.

    Args:
        query: [num_heads, q, head_dim], the last q of k tokens.
        key, value: [num_kv_heads, k, head_dim]; num_heads is a multiple of num_kv_heads.
        scaling: factor on the scores.
        sliding_window: how many tokens a token sees, itself included.
        softcap: scores become `softcap · tanh(score / softcap)`.
        sinks: [num_heads], a score that takes part in each softmax but has no value.

    Returns:
        [num_heads, q, head_dim].
    """
    num_queries, num_keys = query.shape[1], key.shape[1]
    if softcap is None and sinks is None:
        causal = num_queries == num_keys and (sliding_window is None or num_keys <= sliding_window)
        mask = None if causal or (num_queries == 1 and sliding_window is None) else _visible(query, key, sliding_window)
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, is_causal=causal and num_queries > 1, scale=scaling,
            enable_gqa=query.shape[0] != key.shape[0],
        )[0]  # fmt: skip
    groups = query.shape[0] // key.shape[0]
    scores = query.float() @ key.float().repeat_interleave(groups, 0).transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(query, key, sliding_window), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, num_queries, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :num_keys]
    return (weights @ value.float().repeat_interleave(groups, 0)).to(query.dtype)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, scaling: float) -> Tensor:
    """Attention of one token of each of many sequences.

    Args:
        query: [num_seqs, num_heads, head_dim].
        key, value: [num_seqs, max_len, num_kv_heads, head_dim], of finite numbers: what is not seen has a weight of 0.
        visible: [num_seqs, max_len], which keys each query sees.

    Returns:
        [num_seqs, num_heads, head_dim].
    """
    return F.scaled_dot_product_attention(
        query[:, :, None], key.transpose(1, 2), value.transpose(1, 2), attn_mask=visible[:, None, None], scale=scaling,
        enable_gqa=query.shape[1] != key.shape[2],
    )[:, :, 0]  # fmt: skip


def _visible(query: Tensor, key: Tensor, sliding_window: int | None) -> Tensor:
    """[q, k] mask of the keys that each query sees."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    positions = torch.arange(num_keys, device=key.device)
    distance = positions[num_keys - num_queries :, None] - positions[None]
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)
