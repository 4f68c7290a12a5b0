"""PEFT on transformers' `generate`, one static batch. Option `mode`: all adapters in one batch, or one after the other.

`mixed` names the adapter of every row (`adapter_names`); `sequential` calls `set_adapter` and runs its requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers

if TYPE_CHECKING:
    from benchmarks.peers.__main__ import Job, Loaded


@contextmanager
def load(job: Job) -> Iterator[Loaded]:
    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, job.options["dtype"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()
    # No stop token at all: to forbid it for a while would change which token is the most likely.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    names = [f"a{index}" for index in range(len(job.adapters))]
    if names:
        model = peft.PeftModel.from_pretrained(model, job.adapters[0], adapter_name=names[0])
        for name, folder in zip(names[1:], job.adapters[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        model.eval()
    prompts = torch.tensor(job.prompts)

    def batch(rows: list[int], num_tokens: int, **adapters: Any) -> list[list[int]]:
        ids = prompts[rows]
        tokens = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **adapters
        )
        return tokens[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    def generate(num_tokens: int) -> list[list[int]]:
        everything = list(range(len(job.prompts)))
        if not names:
            return batch(everything, num_tokens)
        if job.options["mode"] == "mixed":
            return batch(everything, num_tokens, adapter_names=[names[choice] for choice in job.choices])
        outputs: list[list[int]] = [[] for _ in everything]
        for index, rows in job.groups():
            assert index is not None
            model.set_adapter(names[index])
            for row, tokens in zip(rows, batch(rows, num_tokens), strict=True):
                outputs[row] = tokens
        return outputs

    yield f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}", generate
