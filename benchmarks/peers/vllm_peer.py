"""vLLM's CPU build through its offline `LLM` class: continuous batching, adapters mixed in a batch, in this process."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.peers.__main__ import Job, Loaded

STARTED = "LORAPLEX_VLLM_PRELOADED"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be


@contextmanager
def load(job: Job) -> Iterator[Loaded]:
    _preload()
    _set_environment(job.threads)
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    lora = {}
    if job.adapters:
        rank = max(json.loads((Path(folder) / "adapter_config.json").read_text())["r"] for folder in job.adapters)
        slots = len(job.adapters)
        max_rank = min(allowed for allowed in RANKS if allowed >= rank)
        lora = {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "max_lora_rank": max_rank}
    llm = vllm.LLM(
        model=job.model,
        dtype=job.options["dtype"],
        skip_tokenizer_init=True,
        max_model_len=len(job.prompts[0]) + job.output_tokens,
        max_num_seqs=len(job.prompts),
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,  # else the timed run finds the prompts of the warm-up
        enforce_eager=bool(lora),  # with LoRA it never compiles; said here, so that start-up is short
        seed=0,
        **lora,
    )
    adapters = [LoRARequest(f"a{index}", index + 1, folder) for index, folder in enumerate(job.adapters)]
    prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]
    chosen = [adapters[choice] for choice in job.choices] if adapters else None

    def generate(num_tokens: int) -> list[list[int]]:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        results = llm.generate(prompts, params, lora_request=chosen, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    yield f"vllm {vllm.__version__}, torch {torch.__version__}", generate


def _preload() -> None:
    """Starts this process anew under tcmalloc and Intel's OpenMP, as vLLM's CPU guide advises, where they are found."""
    if STARTED in os.environ:
        return
    libraries = [*glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4"), str(Path(sys.prefix, "lib", "libiomp5.so"))]
    found = [path for path in libraries if os.path.exists(path)]
    os.environ.update({STARTED: "1", "LD_PRELOAD": ":".join(found)})
    os.execv(sys.executable, sys.orig_argv)


def _set_environment(threads: int) -> None:
    """What vLLM and its OpenMP read when they are imported."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        VLLM_CPU_OMP_THREADS_BIND=cores,  # "auto" would keep one core for the scheduler
        VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_LOGGING_STREAM="ext://sys.stderr",
        VLLM_NO_USAGE_STATS="1",
    )
    if "libiomp5" in os.environ.get("LD_PRELOAD", ""):  # what vLLM sets for worker processes of its own
        os.environ.update(
            KMP_AFFINITY=f"granularity=fine,explicit,proclist=[{cores}]", KMP_BLOCKTIME="5", KMP_TPAUSE="0"
        )
