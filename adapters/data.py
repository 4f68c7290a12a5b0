"""Training examples: from JSON lines to token batches, with the loss on what the model is to say.

A line is a JSON object of one of three shapes:

    {"prompt": "…", "completion": "…"}
    {"text": "…", "label": "…"}                                  the label is the completion
    {"messages": [{"role": "user", "content": "…"}, …]}          the assistant's turns are the completions

A prompt becomes the tokens that the server makes of it, since prompt and completion are tokenized apart. The
end-of-sequence token belongs to the completion, so that the model learns to stop.
"""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token without loss, as torch's cross entropy has it
MAX_PADDING = 0.1  # what joined batches gain in one pass is no more than that


class DataError(ValueError):
    """A data file is not usable; the message names file, line and reason."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized record; `labels[i]` is `input_ids[i]` or `IGNORED`."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded on the right to the longest of them; every tensor is [num_examples, num_tokens]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    num_targets: int  # tokens with loss


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Example]:
    """Reads a file of JSON lines; blank lines are skipped.

    Raises:
        DataError: a line is not one of the three shapes or has over `max_tokens` tokens, or there is no record.
        OSError: the file cannot be read.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token: the model could not learn to stop")
    examples = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    examples.append(_example(json.loads(line), tokenizer, max_tokens))
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path.name} line {number}: not JSON: {error.msg}, column {error.colno}"
                    ) from error
                except ValueError as error:
                    raise DataError(f"{path.name} line {number}: {error}") from error
    if not examples:
        raise DataError(f"{path.name} has no records")
    return examples


def split_examples(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Takes a random `share` of the examples away for evaluation, at least one unless it is 0: (training, evaluation).

    Raises:
        DataError: nothing would be left to train on.
    """
    shuffled = random.Random(seed).sample(examples, len(examples))
    num_eval = math.ceil(share * len(examples))
    if num_eval == len(examples):
        raise DataError(f"a share of {share:g} for evaluation leaves none of the {num_eval} records to train on")
    return shuffled[num_eval:], shuffled[:num_eval]


def batches(
    examples: Sequence[Example],
    batch_tokens: int,
    *,
    pad_id: int,
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> list[Batch]:
    """One pass over the examples, in batches of like length of at most `batch_tokens` tokens with the padding.

    Args:
        batch_tokens: a longer example is a batch of its own.
        seed: of the order of batches and of examples of one length; None leaves both as they come.
    """
    shuffle = random.Random(seed)
    order = list(examples) if seed is None else shuffle.sample(examples, len(examples))
    groups: list[list[Example]] = []
    for example in sorted(order, key=lambda example: len(example.input_ids)):
        if not groups or (len(groups[-1]) + 1) * len(example.input_ids) > batch_tokens:
            groups.append([])
        groups[-1].append(example)
    if seed is not None:
        shuffle.shuffle(groups)
    return [_pad(group, pad_id, device) for group in groups]


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with; any will do, since none is looked at."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(token, int)
    return token


def bundles(parts: Mapping[int, Batch]) -> list[dict[int, Batch]]:
    """Puts batches of like length together, to be joined: padding may add a share of `MAX_PADDING` and no more."""
    found: list[dict[int, Batch]] = []
    num_examples = num_tokens = 0  # of the last bundle, as they are
    for key, batch in sorted(parts.items(), key=lambda item: item[1].input_ids.shape[1]):
        examples, longest = batch.input_ids.shape
        if not found or (num_examples + examples) * longest > (1 + MAX_PADDING) * (num_tokens + examples * longest):
            found.append({})
            num_examples = num_tokens = 0
        found[-1][key] = batch
        num_examples += examples
        num_tokens += examples * longest
    return found


def join(parts: Sequence[Batch], pad_id: int) -> Batch:
    """One batch of several, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.input_ids.shape[1] for part in parts)

    def rows(tensors: Iterable[Tensor], padding: int) -> Tensor:
        return torch.cat([functional.pad(tensor, (0, longest - tensor.shape[1]), value=padding) for tensor in tensors])

    return Batch(
        input_ids=rows((part.input_ids for part in parts), pad_id),
        attention_mask=rows((part.attention_mask for part in parts), 0),
        labels=rows((part.labels for part in parts), IGNORED),
        num_targets=sum(part.num_targets for part in parts),
    )


def _pad(examples: Sequence[Example], pad_id: int, device: torch.device | str) -> Batch:
    longest = max(len(example.input_ids) for example in examples)

    def rows(values: Iterable[tuple[int, ...]], padding: int) -> Tensor:
        return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in values], device=device)

    labels = rows([example.labels for example in examples], IGNORED)
    return Batch(
        input_ids=rows([example.input_ids for example in examples], pad_id),
        attention_mask=rows([(1,) * len(example.input_ids) for example in examples], 0),
        labels=labels,
        num_targets=int((labels[:, 1:] != IGNORED).sum()),
    )


def _example(record: Any, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Example:
    match record:
        case {"messages": messages}:
            pieces = _chat_pieces(messages, tokenizer)
            tokens = [(tokenizer.encode(text, add_special_tokens=False), learned) for text, learned in pieces]
        case {"prompt": prompt, "completion": completion} | {"text": prompt, "label": completion}:
            _check_text(prompt, "the prompt")
            _check_text(completion, "the completion")
            learned_ids = [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
            tokens = [(tokenizer.encode(prompt), False), (learned_ids, True)]
        case _:
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f'"messages", "prompt" and "completion", or "text" and "label" are needed, not {keys}')
    input_ids = [token for ids, _ in tokens for token in ids]
    if len(input_ids) > max_tokens:
        raise ValueError(f"{len(input_ids)} tokens are over the limit of {max_tokens} (--max-tokens)")
    labels = [token if learned else IGNORED for ids, learned in tokens for token in ids]
    return Example(tuple(input_ids), tuple(labels))


def _chat_pieces(messages: Any, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Cuts a rendered chat into (text, is it the assistant's to say)."""
    if not isinstance(messages, list):
        raise ValueError(f'"messages" is a {type(messages).__name__}, not a list')
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"a message is a {type(message).__name__}, not an object")
        _check_text(message.get("role"), "a message's role")
        _check_text(message.get("content"), "a message's content")
    pieces: list[tuple[str, bool]] = []
    seen = ""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _render(messages[:index], tokenizer, add_generation_prompt=True)
            turn = _render(messages[: index + 1], tokenizer, add_generation_prompt=False).rstrip("\n")
            if not turn.startswith(prompt):
                raise ValueError("the chat template does not begin the assistant's turn with its generation prompt")
            if not prompt.startswith(seen):  # some templates shorten earlier turns: those are only read then
                pieces, seen = [], ""
            pieces += [(prompt[len(seen) :], False), (turn[len(prompt) :], True)]
            seen = turn
    if not pieces:
        raise ValueError('no message has the role "assistant"')
    return pieces


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # templates are programs: they raise what they like
        raise ValueError(f"the chat template refuses the messages: {error}") from error


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}, not a text")
