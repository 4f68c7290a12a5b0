"""One forward of the model for one scheduled batch. Owns every tensor of the engine; engine thread only."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from server.engine.attention import AttentionStep, PagedCache
from server.engine.choices import SameChoices
from server.engine.decode_graphs import Capture, DecodeGraphs
from server.engine.experts import pack_experts
from server.engine.fixed_shapes import FixedShapes
from server.engine.forward_batch import ForwardBatch, MergedAdapter, build_forward_batch
from server.engine.fusion import fuse
from server.engine.kv_cache import TorchKVCache
from server.engine.model import PROBE_TOKENS, BaseModel
from server.engine.replay import replay
from server.engine.request import Request, SamplingParams
from server.engine.routers import pack_routers
from server.engine.sampler import Sampled, sample
from server.engine.scheduler import ScheduledBatch, ScheduledRequest
from server.errors import ConfigError
from server.kernels import Kernels, Segment
from server.kernels.cpu import cpu_kernels
from server.lora.adapter import Adapter
from server.lora.layers import LoRALayers

# Largest difference from the model's own logits that is rounding, as a share of the largest logit, by weight storage.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2, "int8": 0.2}


def blocks_to_verify(block_size: int) -> int:
    """KV blocks that the self-check needs: two copies of its prompt."""
    return 2 * -(-PROBE_TOKENS // block_size)


class ModelRunner:
    """Holds the model, the KV cache and the adapters' device slots, and runs steps on them."""

    def __init__(
        self,
        base: BaseModel,
        kernels: Kernels,
        cache: PagedCache,
        num_adapter_slots: int,
        fixed_shapes: FixedShapes | None = None,
    ) -> None:
        """`fixed_shapes`: what decode steps are padded in; None: they run as they are."""
        self.base = base
        self.cache = cache
        self._fixed_shapes = fixed_shapes
        self._graphs: DecodeGraphs | None = None
        self._linear_group = kernels.linear_group
        self._computing: Callable[[], None] | None = None  # what the running step calls once
        self.lora = LoRALayers(
            base.model, base.linear_layers, base.linear_groups, base.head, num_adapter_slots, kernels
        )

    @torch.inference_mode()
    def fuse(self) -> Counter[str]:
        """Speeds up what is not linear layers or attention, and says how many parts of each kind.

        With the native kernels only; see `experts`, `fusion` and `replay`.
        """
        reference = self.base.reference
        request = self._reference_request(0)
        scheduled = [ScheduledRequest(request, len(reference.token_ids))]
        batch = build_forward_batch(scheduled, self.cache.block_size, self.base.device)
        # A cache of 16 bits would make more of a last bit of K than fusing may change.
        num_blocks, block_size = blocks_to_verify(self.cache.block_size), self.cache.block_size
        cache = TorchKVCache(self.base.kv_shape, num_blocks, block_size, torch.float32, self.base.device)

        def run(step: AttentionStep) -> Tensor:
            return self._forward(batch, step)

        experts = pack_experts(self.base.model, self._linear_group)
        unrounded = cpu_kernels("float32").linear_group
        weights = pack_routers(self.base.model, lambda: run(cache.step(batch)), unrounded)
        done = fuse(self.base.model, run, cache.step(batch))
        done.update({"experts": experts, "other weight": weights})
        done["replay"] = replay(
            self.base.model, run, self.cache.step(batch), lambda: self.lora.passes, self._call_computing
        )
        return +done  # without kinds of which there are none

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Computes a step without adapters and one over an empty slot: some kernels are compiled at their first use."""
        request = self._reference_request(0)
        scheduled = [ScheduledRequest(request, len(request.token_ids))]
        batch = build_forward_batch(scheduled, self.cache.block_size, self.base.device)
        self.forward(batch)
        passes, logits_passes = ((Segment(0, 0, num_rows),) for num_rows in (batch.num_tokens, 1))
        self.forward(replace(batch, passes=(passes,), logits_passes=(logits_passes,)))

    @property
    def replays_graphs(self) -> bool:
        """Whether decode steps are replayed CUDA graphs; with an adapter merged they are not."""
        return self._graphs is not None

    @torch.inference_mode()
    def capture_graphs(self, capture: Capture) -> None:
        """Captures the decode steps, which are replayed from then on."""
        assert self._fixed_shapes is not None
        self._graphs = DecodeGraphs(
            self._fixed_shapes, self.lora, lambda batch: self._logits(batch, self.cache.step(batch)), capture
        )

    @torch.inference_mode()
    def write_slot(self, slot: int, adapter: Adapter) -> float:
        """Puts an adapter's weights into a device slot; returns the seconds it took."""
        started = time.perf_counter()
        self.lora.write(slot, adapter)
        return time.perf_counter() - started

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, computing: Callable[[], None] = lambda: None) -> list[tuple[Request, Sampled]]:
        """Computes a batch whose slots are written, and samples for the requests that reached their end.

        `computing` is called when the long native calls begin, which leave the interpreter to other threads.
        """
        if not batch.requests:
            return []
        merged = MergedAdapter(self.lora.merged, self.lora.merged_slot) if self.lora.merged else None
        tensors = build_forward_batch(batch.requests, self.cache.block_size, self.base.device, merged=merged)
        self._computing = computing
        logits = self.forward(tensors)
        self._call_computing()  # nothing was replayed
        sampling = [scheduled.request for scheduled in batch.requests if scheduled.samples]
        return list(zip(sampling, sample(logits, sampling), strict=True)) if sampling else []

    def _call_computing(self) -> None:
        computing, self._computing = self._computing, None
        if computing is not None:
            computing()

    @torch.inference_mode()
    def merge(self, adapter: Adapter | None) -> float:
        """Merges an adapter into the base's weights, or takes the merged one out; returns the seconds it took.

        Raises:
            MergeRefused: see `LoRALayers.merge`.
        """
        started = time.perf_counter()
        self.lora.merge(adapter)
        return time.perf_counter() - started

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [num_sampled, vocab_size] of the rows that the batch names."""
        padded = self._fixed_shapes.pad(batch) if self._fixed_shapes is not None else None
        if padded is None:
            return self._forward(batch, self.cache.step(batch))
        logits = None
        if self._graphs is not None and self.lora.merged is None:  # graphs compute with the base's own weights
            logits = self._graphs.replay(padded)
        if logits is None:
            logits = self._forward(padded, self.cache.step(padded))
        return logits[: batch.num_tokens]

    def _forward(self, batch: ForwardBatch, attention_step: AttentionStep) -> Tensor:
        with self.lora.activate(batch.passes, batch.logits_passes):
            return self._logits(batch, attention_step)

    def _logits(self, batch: ForwardBatch, attention_step: AttentionStep) -> Tensor:
        """One call of the model, with whatever adapters are active."""
        logits: Tensor = self.base.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.logits_indices,
            attention_step=attention_step,
        ).logits[0]
        return logits

    def verify(self, *formats: str) -> float:
        """Holds flat steps against the model's own forward; returns the largest difference of the logits.

        Two copies of a prompt are packed in one row and computed in two chunks and a last single token, so packing,
        chunking and decoding are all in it. Where experts nearly tie, they are the ones that the model chose.

        Args:
            formats: number formats in which weights or K and V are kept; the coarsest says what rounding is.

        Raises:
            ConfigError: they differ by more than rounding.
        """
        reference = self.base.reference
        num_tokens = len(reference.token_ids)
        copies = [self._reference_request(row) for row in range(2)]
        tolerance = max(_TOLERANCE[name] for name in formats)
        difference = 0.0
        for chunk in (num_tokens // 2, num_tokens - 1 - num_tokens // 2, 1):
            scheduled = [ScheduledRequest(request, chunk) for request in copies]
            batch = build_forward_batch(scheduled, self.cache.block_size, self.base.device, all_logits=True)
            for request in copies:
                request.num_computed_tokens += chunk
            with SameChoices(reference.choices, batch.position_ids[0], tolerance):
                logits = self.forward(batch).float().cpu()
            expected = reference.logits[copies[0].num_computed_tokens - 1]
            difference = max(difference, float((logits - expected).abs().max()))
        limit = tolerance * max(1.0, float(reference.logits.abs().max()))
        if not difference <= limit:
            raise ConfigError(
                f"--model {self.base.name} cannot be served: packed and chunked, its logits differ by {difference:.2g} "
                f"from the model's own forward (at most {limit:.2g} is rounding)"
            )
        return difference

    def _reference_request(self, row: int) -> Request:
        """The n-th copy of the reference prompt, in KV blocks of its own."""
        token_ids = self.base.reference.token_ids
        request = Request(row, token_ids, SamplingParams(), adapters=(), stop_token_ids=frozenset())
        num_blocks = -(-len(token_ids) // self.cache.block_size)
        request.block_table = list(range(row * num_blocks, (row + 1) * num_blocks))
        return request
