"""Decode steps captured as CUDA graphs: one launch in place of a few for every layer. Engine thread only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.engine.fixed_shapes import FixedShapes
from server.engine.forward_batch import ForwardBatch
from server.kernels import FixedSegments
from server.lora.layers import LoRALayers

Replay = Callable[[], Tensor]  # computes what was captured once more, from what its tensors hold now
Capture = Callable[[Callable[[], Tensor]], Replay]


@dataclass(frozen=True, slots=True)
class _Graphs:
    """The two graphs of one size: a step without adapters runs the plain layers."""

    plain: Replay
    adapted: Replay
    segments: FixedSegments  # that `adapted` reads


class DecodeGraphs:
    """Owns the graphs of every size of a decode step, captured when it is made."""

    def __init__(
        self, shapes: FixedShapes, lora: LoRALayers, forward: Callable[[ForwardBatch], Tensor], capture: Capture
    ) -> None:
        """
        Args:
            forward: the logits of a step, with whatever adapters are active.
            capture: records what a function computes.
        """
        self._graphs: dict[int, _Graphs] = {}
        for size in reversed(shapes.sizes):  # the largest first: the others find room in its memory
            step, segments = shapes.step(size), lora.fixed_segments(size)

            def run(step: ForwardBatch = step) -> Tensor:
                return forward(step)

            plain = capture(run)
            with lora.activate_fixed(segments):
                adapted = capture(run)
            self._graphs[size] = _Graphs(plain, adapted, segments)

    def replay(self, batch: ForwardBatch) -> Tensor | None:
        """Logits [size, vocab_size] of a step that `FixedShapes.pad` made; they hold until the next step.

        None: it takes more than one pass of bypasses, for which there is no graph.
        """
        graphs = self._graphs[batch.num_tokens]
        if not batch.passes:
            return graphs.plain()
        if len(batch.passes) > 1:
            return None
        assert batch.passes == batch.logits_passes  # every row of a decode step samples
        graphs.segments.write(batch.passes[0])
        return graphs.adapted()


class CudaCapture:
    """Captures CUDA graphs that share their memory: none may run beside another."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # whatever is set up at the first call must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
