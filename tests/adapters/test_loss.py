import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from adapters.data import IGNORED, Example, batches
from adapters.loss import completion_losses, evaluate
from tests.adapters.conftest import letters


def test_the_loss_is_on_the_completion_alone(model: LlamaForCausalLM) -> None:
    examples = [
        Example((1, 2, 3, 4, 5), (IGNORED, IGNORED, 3, 4, 5)),
        Example((6, 7, 8), (IGNORED, 7, 8)),
        Example((9, 10, 11, 12), (IGNORED, IGNORED, IGNORED, 12)),
    ]
    (batch,) = batches(examples, 100, pad_id=0)
    assert batch.num_targets == 6
    with torch.no_grad():
        expected = []
        for row in batch.input_ids:
            (example,) = [example for example in examples if example.input_ids[0] == row[0]]
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
            labels = torch.tensor(example.labels[1:])
            expected.append(functional.cross_entropy(logits, labels, reduction="sum"))
        torch.testing.assert_close(completion_losses(model, batch, [1, 1, 1]), expected)
        torch.testing.assert_close(completion_losses(model, batch, [2, 1]), [expected[0] + expected[1], expected[2]])
        total = torch.stack(expected).sum()
        torch.testing.assert_close(completion_losses(model, batch, [3]), [total])
        assert evaluate(model, [batch]) == pytest.approx(total.item() / 6, rel=1e-5)


def test_a_model_that_cannot_narrow_its_logits(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = batches(letters(4), 100, pad_id=0)
    with torch.no_grad():
        expected = completion_losses(model, batch, [4])
        forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask)
        )
        torch.testing.assert_close(completion_losses(model, batch, [4]), expected)
