"""The one attention function that every base model uses, over the paged KV cache. Engine thread only.

transformers hands the keyword arguments of `model(...)` down to its attention function, so the step travels with the
call: no global state, and no code for any one architecture.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from server.engine.forward_batch import ForwardBatch

ATTENTION_NAME = "loraplex_paged"


class AttentionOptions(NamedTuple):
    """How a layer attends; see `torch_ops.attention`."""

    scaling: float
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None  # [num_heads]


class AttentionStep(Protocol):
    """Whoever answers a layer's attention during one forward."""

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of what native kernels read for it in every layer of the step; none where others do it."""

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Query [num_tokens, num_heads, head_dim] → output of its shape; K and V with num_kv_heads."""


class PagedCache(Protocol):
    """K and V of all layers, in blocks; which block belongs to whom is the scheduler's business."""

    block_size: int  # tokens

    def step(self, batch: ForwardBatch) -> AttentionStep:
        """The attention of one forward."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    attention_step: AttentionStep | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: tensors are [1, num_heads, num_tokens, head_dim]."""
    if attention_step is None:
        raise TypeError("the model does not pass its keyword arguments on to the attention function")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    output = attention_step.attend(getattr(module, "layer_idx", None), query, key, value, options)
    return output[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
