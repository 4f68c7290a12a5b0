"""The loss of a model on completions. Its output head, often the largest layer, only runs where there is a token to
learn."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from adapters.data import IGNORED, Batch


def completion_losses(model: PreTrainedModel, batch: Batch, counts: Sequence[int]) -> list[Tensor]:
    """Cross entropy in nats, summed over the tokens with loss: of the first `counts[0]` examples, of the next, and on.

    The output head runs at the positions that some example of the batch predicts a target from, and at no other.
    """
    kept = (batch.labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)  # [num_kept]
    narrow = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **narrow)
    logits = output.logits if narrow else output.logits[:, kept]  # [num_examples, num_kept, vocabulary]
    targets = batch.labels[:, kept + 1]
    return [
        functional.cross_entropy(part.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        for part, labels in zip(logits.split(list(counts)), targets.split(list(counts)), strict=True)
    ]


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean loss per token with loss, without dropout; the model comes back in the mode it was in."""
    was_training = model.training
    model.eval()
    total = sum(loss.item() for batch in batches for loss in completion_losses(model, batch, [len(batch.input_ids)]))
    model.train(was_training)
    return total / sum(batch.num_targets for batch in batches)
