"""OpenVINO GenAI's continuous batching on the CPU, for a model that `optimum-cli export openvino` made.

A call of `generate` takes the adapters of its first request for all of them, so adapters run one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import openvino
import openvino_genai as genai

if TYPE_CHECKING:
    from benchmarks.peers.__main__ import Job, Loaded


@contextmanager
def load(job: Job) -> Iterator[Loaded]:
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": job.threads}
    if job.options["dtype"] == "float32":  # else it computes in whatever is fastest here, and keeps an 8-bit KV cache
        properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    adapters = [_adapter(Path(folder)) for folder in job.adapters]
    if adapters:
        properties["adapters"] = genai.AdapterConfig(adapters)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GiB
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = len(job.prompts)
    scheduler.enable_prefix_caching = False  # else the timed run finds the prompts of the warm-up
    pipeline = genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", properties)
    prompts = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in job.prompts]

    def generate(num_tokens: int) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in prompts]
        for index, rows in job.groups():
            config = genai.GenerationConfig()
            config.max_new_tokens = num_tokens
            config.ignore_eos = True
            config.do_sample = False
            if index is not None:
                config.adapters = genai.AdapterConfig(*adapters[index])
            results = pipeline.generate([prompts[row] for row in rows], [config] * len(rows))
            for row, result in zip(rows, results, strict=True):
                outputs[row] = list(result.m_generation_ids[0])
        return outputs

    yield f"openvino-genai {genai.__version__}, openvino {openvino.__version__}", generate


def _adapter(folder: Path) -> tuple[Any, float]:
    """The adapter and the number that its B·A is multiplied by."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return genai.Adapter(str(folder / "adapter_model.safetensors")), config["lora_alpha"] / config["r"]
