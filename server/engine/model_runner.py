"""One forward of the model for one scheduled batch. Owns every tensor of the engine; engine thread only."""

import torch
from torch import Tensor

from server.engine.attention import PagedAttention
from server.engine.forward_batch import ForwardBatch, build_forward_batch
from server.engine.kv_cache import KVCache
from server.engine.model import BaseModel
from server.engine.request import Request, SamplingParams
from server.engine.sampler import Sampled, sample
from server.engine.scheduler import ScheduledBatch, ScheduledRequest
from server.errors import ConfigError
from server.kernels import Kernels
from server.lora.layers import LoRALayers

# Largest difference from the model's own logits that is rounding, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class ModelRunner:
    """Holds the model, the KV cache and the adapters' device slots, and runs steps on them."""

    def __init__(
        self, base: BaseModel, kernels: Kernels, *, num_blocks: int, block_size: int, num_adapter_slots: int
    ) -> None:
        self.base = base
        self.cache = KVCache(base.kv_shape, num_blocks, block_size, base.dtype, base.device)
        self.lora = LoRALayers(base.model, base.linear_layers, base.head, num_adapter_slots, kernels)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> list[tuple[Request, Sampled]]:
        """Writes the slots that the batch needs, computes it, and samples for the requests that reached their end."""
        for slot, adapter in batch.slot_writes:
            self.lora.write(slot, adapter)
        if not batch.requests:
            return []
        logits = self.forward(build_forward_batch(batch.requests, self.cache.block_size, self.base.device))
        sampling = [scheduled.request for scheduled in batch.requests if scheduled.samples]
        return list(zip(sampling, sample(logits, sampling), strict=True)) if sampling else []

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [num_sampled, vocab_size] of the rows that the batch names."""
        with self.lora.activate(batch.segments, batch.logits_segments):
            logits: Tensor = self.base.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.logits_indices,
                attention_step=PagedAttention(batch, self.cache),
            ).logits[0]
        return logits

    def verify(self) -> float:
        """Holds flat steps against the model's own forward; returns the largest difference of the logits.

        Two copies of a prompt are packed in one row and computed in two chunks and a last single token, so packing,
        chunking and decoding are all in it.

        Raises:
            ConfigError: they differ by more than rounding.
        """
        reference = self.base.reference
        num_tokens = len(reference.token_ids)
        copies = [
            Request(row, reference.token_ids, SamplingParams(), adapter=None, stop_token_ids=frozenset())
            for row in range(2)
        ]
        per_copy = -(-num_tokens // self.cache.block_size)
        for row, request in enumerate(copies):
            request.block_table = list(range(row * per_copy, (row + 1) * per_copy))
        difference = 0.0
        for chunk in (num_tokens // 2, num_tokens - 1 - num_tokens // 2, 1):
            scheduled = [ScheduledRequest(request, chunk) for request in copies]
            batch = build_forward_batch(scheduled, self.cache.block_size, self.base.device, all_logits=True)
            for request in copies:
                request.num_computed_tokens += chunk
            logits = self.forward(batch).float().cpu()
            expected = reference.logits[copies[0].num_computed_tokens - 1]
            difference = max(difference, float((logits - expected).abs().max()))
        limit = _TOLERANCE[self.base.dtype] * max(1.0, float(reference.logits.abs().max()))
        if not difference <= limit:
            raise ConfigError(
                f"--model {self.base.name} cannot be served: packed and chunked, its logits differ by {difference:.2g} "
                f"from the model's own forward (at most {limit:.2g} is rounding)"
            )
        return difference
