"""Typed access to the native CPU kernels (native.c); any one thread at a time calls them, the engine's.

Tensors are float32 and row-major; an output row has the same bits whatever other rows share its call. Objects made once
(weights, slots, caches, a step's segments and block tables) check shapes when built and keep their tensors alive, so
that a call is little more than its pointers. The library needs torch imported first, whose OpenMP threads it shares.
"""

import ctypes
import importlib.machinery
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from server.kernels import Segment, Storage
from server.kernels.memory import Arena, lazy_zeros

PANEL = 16  # output features of a packed panel
BLOCK_SIZE = 16  # positions of a KV block
MAX_HEAD_DIM = 256

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_LINEAR_KINDS = {torch.float32: 0, torch.bfloat16: 4, torch.int8: 3}
_STORAGE: dict[Storage, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

_SIGNATURES: dict[str, tuple[object, ...]] = {
    "linear": (_POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER),
    "add_lora": (_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER),
    "attention": (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT),
    "write_kv": (_POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT),
    "rms_norm": (_POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _INT, _INT),
    "layer_norm": (_POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _INT, _INT),
    "rotary": (_POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _INT),
    "silu_mul": (_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT),
    "gelu_tanh_mul": (_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT),
}
_CAN_FAIL = {"linear", "add_lora", "attention"}  # they need scratch memory


def _load() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_native" + suffix)
        if not path.exists():
            continue
        library = ctypes.CDLL(str(path))
        for name, argtypes in _SIGNATURES.items():
            function = getattr(library, f"loraplex_{name}")
            function.argtypes = argtypes
            function.restype = ctypes.c_int if name in _CAN_FAIL else None
        library.loraplex_isa.restype = ctypes.c_char_p
        library.loraplex_set_isa.argtypes = (ctypes.c_char_p,)
        return library
    return None


_library = _load()


def available() -> bool:
    return _library is not None


def serves_head_dim(head_dim: int) -> bool:
    """Whether the attention kernel is made for heads of this size."""
    return head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM


def isa() -> str:
    """The instruction set in use: "avx512_bf16", "avx512", "avx2" or "generic"."""
    name: bytes = _loaded().loraplex_isa()
    return name.decode()


def set_isa(name: str | None) -> None:
    """Uses a given instruction set (for tests); None: the widest that this processor has."""
    if _loaded().loraplex_set_isa(name.encode() if name else None):
        raise ValueError(f"this processor or build has no {name} kernels")


def _loaded() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError("the native kernels are not built")
    return _library


if _library is not None:
    _linear = _library.loraplex_linear
    _add_lora = _library.loraplex_add_lora
    _attention = _library.loraplex_attention
    _write_kv = _library.loraplex_write_kv
    _rms_norm = _library.loraplex_rms_norm
    _layer_norm = _library.loraplex_layer_norm
    _rotary = _library.loraplex_rotary
    _silu_mul = _library.loraplex_silu_mul
    _gelu_tanh_mul = _library.loraplex_gelu_tanh_mul


# ---------------------------------------------------------------------------------------------------- packed linear


class _LinearStruct(ctypes.Structure):
    _fields_ = (
        ("data", _POINTER),
        ("scale", _POINTER),
        ("bias", _POINTER),
        ("in_features", _INT),
        ("out_features", _INT),
        ("kind", _INT),
    )


class PackedLinear:
    """A frozen weight [out, in] (and bias [out]) as panels [ceil(out / 16), in, 16]; int8 with one scale per output.

    bfloat16 lies in pairs of input features, [ceil(out / 16), ceil(in / 2), 16, 2].
    """

    def __init__(
        self, data: Tensor, scale: Tensor | None, bias: Tensor | None, in_features: int, out_features: int
    ) -> None:
        assert data.is_contiguous()
        self.data, self.scale, self.bias = data, scale, bias
        self.in_features, self.out_features = in_features, out_features
        self.struct = _LinearStruct(
            data.data_ptr(), _pointer(scale), _pointer(bias), in_features, out_features, _LINEAR_KINDS[data.dtype]
        )
        self.group = LinearGroup([self])

    def _panels(self) -> Tensor:
        """[ceil(out / 16), in, 16]: a view of the data, or a copy of what lies in pairs."""
        if self.data.dtype != torch.bfloat16:
            return self.data
        return self.data.transpose(2, 3).flatten(1, 2)[:, : self.in_features]

    def merged(self, lora_a: Tensor, lora_b: Tensor, scaling: float, out: Tensor | None = None) -> "PackedLinear":
        """The layer with weight + scaling * (lora_a.T @ lora_b).T, summed in float32, in the memory of `out` if given.

        lora_a is [rank, in], lora_b [rank, out].
        """
        assert self.scale is None, "8-bit weights cannot take a sum"
        panels, rank = len(self.data), len(lora_b)
        weight = self._panels()
        b = torch.zeros(rank, panels * PANEL)
        b[:, : self.out_features] = lora_b
        b = b.view(rank, panels, PANEL).transpose(0, 1)
        data = torch.empty_like(self.data) if out is None else out
        total = data if data.dtype == torch.float32 else None
        total = torch.baddbmm(weight.float(), lora_a.float().T.expand(panels, -1, -1), b, alpha=scaling, out=total)
        if total is not data:
            data.copy_(_pairs(total))
        return PackedLinear(data, None, self.bias, self.in_features, self.out_features)

    def unpack(self) -> Tensor:
        """The weight [out, in] in float32 (int8: as rounded)."""
        weight = self._panels().transpose(1, 2).reshape(-1, self.in_features)[: self.out_features].float()
        return weight if self.scale is None else weight * self.scale[: self.out_features, None]

    def rows(self, outputs: Tensor) -> Tensor:
        """The weights [..., in] of some outputs [...], in float32."""
        rows: Tensor = (
            self.data[outputs // PANEL, :, outputs % PANEL].flatten(outputs.dim())[..., : self.in_features].float()
        )
        return rows if self.scale is None else rows * self.scale[outputs][..., None]


class LinearGroup:
    """Packed layers that read the same x, applied in one call."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.layers = tuple(layers)
        self.in_features = self.layers[0].in_features
        self.outs = [layer.out_features for layer in self.layers]
        if any(layer.in_features != self.in_features for layer in self.layers):
            raise ValueError(f"layers of a group read the same x: in_features {[a.in_features for a in self.layers]}")
        if any(layer.data.dtype != self.layers[0].data.dtype for layer in self.layers):
            raise ValueError(f"layers of a group are stored alike: {[layer.data.dtype for layer in self.layers]}")
        self._structs = (_POINTER * len(self.outs))(*(ctypes.addressof(layer.struct) for layer in self.layers))
        self._strides = (_INT * len(self.outs))(*self.outs)
        self.pointers = ctypes.addressof(self._structs)
        self.strides = ctypes.addressof(self._strides)
        self.outputs_type = _POINTER * len(self.outs)


def pack_linear(
    weight: Tensor, bias: Tensor | None = None, storage: Storage = "float32", arena: Arena | None = None
) -> PackedLinear:
    """Packs weight [out, in] and bias [out], in memory of `arena` if there is one.

    int8 rounds symmetrically with scale = absmax / 127 of each output row.
    """
    weight = weight.detach()
    out_features, in_features = weight.shape
    padded = -(-out_features // PANEL) * PANEL
    scale = None
    if storage == "int8":
        weight = weight.float()
        scale = weight.abs().amax(dim=1) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        weight = (weight / scale[:, None]).round()
        scale = _padded(scale, padded)
    data = torch.zeros(padded // PANEL, in_features, PANEL, dtype=_STORAGE[storage])
    whole = out_features // PANEL
    data[:whole] = weight[: whole * PANEL].unflatten(0, (whole, PANEL)).transpose(1, 2)
    if padded > out_features:
        data[whole, :, : out_features - whole * PANEL] = weight[whole * PANEL :].t()
    if storage == "bfloat16":
        data = _pairs(data)
    data = data.contiguous() if arena is None else arena.zeros(data.shape, data.dtype).copy_(data)
    return PackedLinear(
        data, scale, None if bias is None else _padded(bias.detach(), padded), in_features, out_features
    )


def _pairs(panels: Tensor) -> Tensor:
    """[panels, in, 16] → [panels, ceil(in / 2), 16, 2]"""
    even: Tensor = functional.pad(panels, (0, 0, 0, panels.shape[1] % 2))
    return even.view(len(even), -1, 2, PANEL).transpose(2, 3)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """y [..., out] = x [..., in] @ weight.T + bias"""
    return linear_many(x, packed.group)[0]


def linear_many(x: Tensor, group: LinearGroup) -> list[Tensor]:
    """[y [..., out] = x [..., in] @ weight.T + bias for each layer of the group]"""
    assert x.shape[-1] == group.in_features
    shape = x.shape[:-1]
    x = _contiguous(x)
    ys = [torch.empty((*shape, out)) for out in group.outs]
    outputs = group.outputs_type(*[y.data_ptr() for y in ys])
    rows = x.numel() // group.in_features
    if _linear(x.data_ptr(), rows, len(ys), group.pointers, outputs, group.strides):
        raise MemoryError(f"no scratch memory for {rows} rows")
    return ys


# ---------------------------------------------------------------------------------------------------- LoRA


class _SlotsStruct(ctypes.Structure):
    _fields_ = (
        ("a", _POINTER),
        ("b", _POINTER),
        ("ranks", _POINTER),
        ("kinds", _POINTER),
        ("scalings", _POINTER),
        ("in_features", _INT),
        ("out_features", _INT),
    )


class LoRASlots:
    """The adapter weights of one linear layer by slot: the tensors themselves, no copies; empty slots add nothing."""

    def __init__(self, in_features: int, out_features: int, num_slots: int) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.weights: list[tuple[Tensor, Tensor] | None] = [None] * num_slots
        self._a, self._b = (_POINTER * num_slots)(), (_POINTER * num_slots)()
        self._ranks, self._kinds = (_INT * num_slots)(), (_INT * num_slots)()
        self._scalings = (_FLOAT * num_slots)()
        tables = (self._a, self._b, self._ranks, self._kinds, self._scalings)
        self.struct = _SlotsStruct(*(ctypes.addressof(table) for table in tables), in_features, out_features)

    def set(self, slot: int, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        """lora_a [rank, in] and lora_b [rank, out] (the transpose of PEFT's), both float32, bfloat16 or float16."""
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, self.in_features) or lora_b.shape != (rank, self.out_features):
            raise ValueError(f"lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} do not fit the layer")
        if lora_a.dtype != lora_b.dtype or lora_a.dtype not in _KINDS or lora_a.dtype == torch.int8:
            raise ValueError(f"lora_a is {lora_a.dtype}, lora_b is {lora_b.dtype}")
        if not (lora_a.is_contiguous() and lora_b.is_contiguous()):
            raise ValueError("adapter weights must be contiguous")
        self.weights[slot] = (lora_a, lora_b)
        self._a[slot], self._b[slot] = lora_a.data_ptr(), lora_b.data_ptr()
        self._ranks[slot], self._kinds[slot], self._scalings[slot] = rank, _KINDS[lora_a.dtype], scaling

    def clear(self, slot: int) -> None:
        self._ranks[slot] = 0
        self.weights[slot] = None


class LoRAGroup:
    """The slots of layers that read the same x, applied in one call."""

    def __init__(self, layers: Sequence[LoRASlots]) -> None:
        self.layers = tuple(layers)
        self.in_features = self.layers[0].in_features
        if any(layer.in_features != self.in_features for layer in self.layers):
            raise ValueError(f"layers of a group read the same x: in_features {[a.in_features for a in self.layers]}")
        self._structs = (_POINTER * len(self.layers))(*(ctypes.addressof(layer.struct) for layer in self.layers))
        self._strides = (_INT * len(self.layers))(*(layer.out_features for layer in self.layers))
        self.pointers = ctypes.addressof(self._structs)
        self.strides = ctypes.addressof(self._strides)
        self.outputs_type = _POINTER * len(self.layers)


class _SegmentStruct(ctypes.Structure):
    _fields_ = (("slot", _INT), ("start", _INT), ("end", _INT), ("scale", _FLOAT))


class Segments:
    """Which rows of a pass use which slot: disjoint (slot, start, end, scale) with rows start .. end - 1."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.count = len(segments)
        self._table = (_SegmentStruct * self.count)(*(_SegmentStruct(*segment) for segment in segments))
        self.pointer = ctypes.addressof(self._table)


def add_lora(ys: Sequence[Tensor], x: Tensor, group: LoRAGroup, segments: Segments) -> None:
    """y[t] += scale * scaling[s] * (x[t] @ lora_a[s].T) @ lora_b[s] for each layer's y [..., out], row t of a segment.

    x is [..., in]; ys are contiguous and belong to the group's layers in order. A row outside every segment, or in one
    whose slot is empty, stays as it is.
    """
    assert x.shape[-1] == group.in_features
    x = _contiguous(x)
    outputs = group.outputs_type(*[y.data_ptr() for y in ys])
    if _add_lora(x.data_ptr(), len(ys), group.pointers, outputs, group.strides, segments.count, segments.pointer):
        raise MemoryError("no scratch memory for the LoRA activations")


# ---------------------------------------------------------------------------------------------------- attention


class _CacheStruct(ctypes.Structure):
    _fields_ = (("keys", _POINTER), ("values", _POINTER), ("kind", _INT), ("kv_heads", _INT), ("head_dim", _INT))


class _OptionsStruct(ctypes.Structure):
    _fields_ = (
        ("heads", _INT),
        ("sliding_window", _INT),
        ("sinks", _POINTER),
        ("scaling", _FLOAT),
        ("softcap", _FLOAT),
    )


class _BatchStruct(ctypes.Structure):
    _fields_ = (
        ("num_seqs", _INT),
        ("max_blocks", _INT),
        ("block_tables", _POINTER),
        ("query_start_loc", _POINTER),
        ("positions", _POINTER),
    )


class KVCacheLayer:
    """A layer's keys [num_blocks, kv_heads, head_dim, 16] and values [num_blocks, kv_heads, 16, head_dim up to 16s]."""

    def __init__(self, num_blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
        if not serves_head_dim(head_dim):
            raise ValueError(f"head_dim {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the KV cache is float32 or bfloat16, not {dtype}")
        self.kv_heads, self.head_dim = kv_heads, head_dim
        value_dim = -(-head_dim // PANEL) * PANEL
        self.keys = lazy_zeros((num_blocks, kv_heads, head_dim, BLOCK_SIZE), dtype)
        self.values = lazy_zeros((num_blocks, kv_heads, BLOCK_SIZE, value_dim), dtype)
        self._struct = _CacheStruct(self.keys.data_ptr(), self.values.data_ptr(), _KINDS[dtype], kv_heads, head_dim)
        self.pointer = ctypes.addressof(self._struct)


class AttentionOptions:
    """How a layer attends: scores scaling * q @ k.T, over the last `sliding_window` positions.

    Scores are capped as softcap * tanh(score / softcap); a logit per head in `sinks` [heads] joins the denominator.
    """

    def __init__(
        self,
        heads: int,
        scaling: float,
        *,
        softcap: float | None = None,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.heads = heads
        self._sinks = None if sinks is None else sinks.detach().float().contiguous()
        self._struct = _OptionsStruct(heads, sliding_window or 0, _pointer(self._sinks), scaling, softcap or 0.0)
        self.pointer = ctypes.addressof(self._struct)


class AttentionBatch:
    """A step's tokens: those of sequence s are rows query_start_loc[s] .. query_start_loc[s + 1] - 1.

    block_tables [num_seqs, max_blocks] and query_start_loc [num_seqs + 1] are int32, positions [num_tokens] int64.
    """

    def __init__(self, block_tables: Tensor, query_start_loc: Tensor, positions: Tensor) -> None:
        if block_tables.dtype != torch.int32 or query_start_loc.dtype != torch.int32 or positions.dtype != torch.int64:
            raise ValueError("block_tables and query_start_loc are int32, positions int64")
        if query_start_loc.numel() != block_tables.shape[0] + 1:
            raise ValueError(f"{query_start_loc.numel()} query starts for {block_tables.shape[0]} sequences")
        self._tensors = (block_tables.contiguous(), query_start_loc.contiguous(), positions.contiguous())
        pointers = (tensor.data_ptr() for tensor in self._tensors)
        self._struct = _BatchStruct(block_tables.shape[0], block_tables.shape[1], *pointers)
        self.pointer = ctypes.addressof(self._struct)


def write_kv(cache: KVCacheLayer, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Caches k and v [num_tokens, kv_heads, head_dim] at slot_mapping [num_tokens] (int64, block * 16 + offset).

    A negative position is skipped. Heads lie side by side; tokens may be any stride apart.
    """
    _write_kv(
        cache.pointer,
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        slot_mapping.data_ptr(),
        slot_mapping.numel(),
    )


def paged_attention(q: Tensor, cache: KVCacheLayer, options: AttentionOptions, batch: AttentionBatch) -> Tensor:
    """out [num_tokens, heads, head_dim] = softmax(scaling * q @ k.T) @ v over the cached positions up to a token's own.

    write_kv has stored them, the token's own included. Heads of q lie side by side; tokens may be any stride apart.
    """
    out = torch.empty(q.shape)
    failed = _attention(
        cache.pointer, options.pointer, batch.pointer, q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0)
    )
    if failed:
        raise MemoryError(f"no scratch memory for the attention of {q.shape[0]} tokens")
    return out


# ---------------------------------------------------------------------------------------------------- small operations


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """weight * r / sqrt(mean(r^2) + eps) with r = x [..., n], or r = residual += x in place if there is a residual."""
    x = _contiguous(x)
    out = torch.empty(x.shape)
    n = weight.numel()
    _rms_norm(x.data_ptr(), _pointer(residual), weight.data_ptr(), eps, out.data_ptr(), x.numel() // n, n)
    return out


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    """weight * (r - mean(r)) / sqrt(var(r) + eps) + bias, r as in rms_norm."""
    x = _contiguous(x)
    out = torch.empty(x.shape)
    n = x.shape[-1]
    _layer_norm(
        x.data_ptr(), _pointer(residual), _pointer(weight), _pointer(bias), eps, out.data_ptr(), x.numel() // n, n
    )
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x = x * cos + rotate_half(x) * sin in place for q [num_tokens, heads, head_dim], k [num_tokens, kv_heads, ...].

    Heads lie side by side; cos and sin [num_tokens, rotary_dim] are contiguous; elements past rotary_dim stay as is.
    """
    num_tokens, heads, head_dim = q.shape
    _rotary(
        q.data_ptr(), q.stride(0), heads, k.data_ptr(), k.stride(0), k.shape[1],
        cos.data_ptr(), sin.data_ptr(), cos.shape[-1], head_dim, num_tokens,
    )  # fmt: skip


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [num_tokens, n] with rows any stride apart."""
    rows, n = gate.shape
    out = torch.empty(rows, n)
    _silu_mul(gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), out.data_ptr(), rows, n)
    return out


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate, approximate="tanh") * up, both [num_tokens, n] with rows any stride apart."""
    rows, n = gate.shape
    out = torch.empty(rows, n)
    _gelu_tanh_mul(gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), out.data_ptr(), rows, n)
    return out


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(x: Tensor) -> Tensor:
    assert x.dtype is torch.float32
    return x if x.is_contiguous() else x.contiguous()


def _padded(vector: Tensor, size: int) -> Tensor:
    padded = torch.zeros(size)
    padded[: vector.numel()] = vector
    return padded
