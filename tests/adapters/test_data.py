import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from adapters.data import IGNORED, DataError, Example, batches, bundles, join, read_examples, split_examples
from tests.adapters.conftest import letters
from tests.conftest import EOS

Write = Callable[..., Path]


def learned(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    return text_of([label for label in example.labels if label != IGNORED], tokenizer)


def text_of(tokens: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(list(tokens)))


@pytest.mark.parametrize(
    "record", [{"prompt": "Date: x\nISO:", "completion": " 2021"}, {"text": "Date: x\nISO:", "label": " 2021"}]
)
def test_the_loss_is_on_the_completion(
    write_lines: Write, tokenizer: PreTrainedTokenizerFast, record: dict[str, str]
) -> None:
    (example,) = read_examples(write_lines(record), tokenizer, 100)
    prompt = tokenizer("Date: x\nISO:")["input_ids"]
    assert list(example.input_ids) == prompt + tokenizer(" 2021", add_special_tokens=False)["input_ids"] + [EOS]
    assert list(example.labels[: len(prompt)]) == [IGNORED] * len(prompt)
    assert learned(example, tokenizer) == " 2021</s>"


def test_the_loss_is_on_every_turn_of_the_assistant(write_lines: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [("system", "be"), ("user", "a"), ("assistant", "B"), ("user", "c"), ("assistant", "D"), ("user", "e")]
    record = {"messages": [{"role": role, "content": content} for role, content in chat]}
    (example,) = read_examples(write_lines(record), tokenizer, 200)
    assert learned(example, tokenizer) == "B</s>D</s>"
    text = "<system>be</s>\n<user>a</s>\n<assistant>B</s>\n<user>c</s>\n<assistant>D</s>"
    assert text_of(example.input_ids, tokenizer) == text


def test_only_the_last_turn_counts_if_the_template_rewrites_the_others(
    write_lines: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>"
        "{{ message.content if loop.last or message.role == 'user' else '...' }}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [("user", "a"), ("assistant", "B"), ("user", "c"), ("assistant", "D")]
    record = {"messages": [{"role": role, "content": content} for role, content in chat]}
    (example,) = read_examples(write_lines(record), tokenizer, 200)
    assert learned(example, tokenizer) == "D|"
    assert text_of(example.input_ids, tokenizer) == "<user>a|<assistant>...|<user>c|<assistant>D|"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes"),
        ("[]", '"messages", "prompt" and "completion", or "text" and "label" are needed, not list'),
        ({"prompt": "a"}, "are needed, not ['prompt']"),
        ({"prompt": "a", "completion": 3}, "the completion is 3, not a text"),
        ({"text": "", "label": "x"}, "the prompt is '', not a text"),
        ({"messages": {}}, '"messages" is a dict, not a list'),
        ({"messages": ["a"]}, "a message is a str, not an object"),
        ({"messages": [{"role": "user"}]}, "a message's content is None, not a text"),
        ({"messages": [{"role": "user", "content": "a"}]}, 'no message has the role "assistant"'),
        ({"prompt": "a" * 40, "completion": "b"}, "42 tokens are over the limit of 32 (--max-tokens)"),
    ],
)
def test_errors_name_file_line_and_reason(
    write_lines: Write, tokenizer: PreTrainedTokenizerFast, line: Any, reason: str
) -> None:
    path = write_lines({"prompt": "a", "completion": "b"}, "", line)
    with pytest.raises(DataError, match=f"^train.jsonl line 3: .*{re.escape(reason)}"):
        read_examples(path, tokenizer, 32)


def test_a_template_that_refuses_is_an_error_of_the_line(
    write_lines: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    path = write_lines({"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(DataError, match="line 1: the chat template refuses the messages: no system role"):
        read_examples(path, tokenizer, 32)


def test_bytes_that_are_not_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "\xff", "completion": "b"}\n')
    with pytest.raises(DataError, match="line 1: 'utf-8' codec"):
        read_examples(tmp_path / "train.jsonl", tokenizer, 32)


def test_an_empty_file(write_lines: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"train.jsonl has no records"):
        read_examples(write_lines(""), tokenizer, 32)


def test_a_tokenizer_without_end(write_lines: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        read_examples(write_lines({"prompt": "a", "completion": "b"}), tokenizer, 32)


def test_split_is_seeded_and_loses_nothing() -> None:
    examples = letters(20)
    train, evaluation = split_examples(examples, 0.1, seed=3)
    assert (len(train), len(evaluation)) == (18, 2)
    assert sorted(train + evaluation, key=hash) == sorted(examples, key=hash)
    assert split_examples(examples, 0.1, seed=3) == (train, evaluation)
    assert split_examples(examples, 0.1, seed=4) != (train, evaluation)
    assert split_examples(examples, 0.0, seed=3)[1] == []
    with pytest.raises(DataError, match="leaves none of the 1 records"):
        split_examples(examples[:1], 0.1, seed=3)


def numbered(lengths: list[int]) -> list[Example]:
    return [Example((index,) * length, (IGNORED,) * (length - 1) + (index,)) for index, length in enumerate(lengths)]


def test_batches_group_by_length_within_the_budget() -> None:
    examples = numbered([3, 9, 4, 30, 8, 3, 4, 9])
    made = batches(examples, 20, pad_id=99, seed=1)
    assert sorted(int(row[0]) for batch in made for row in batch.input_ids) == list(range(8))
    for batch in made:
        assert batch.input_ids.numel() <= 20 or len(batch.input_ids) == 1
        lengths = batch.attention_mask.sum(dim=1)
        assert lengths.max() == batch.input_ids.shape[1]
        assert (batch.input_ids[batch.attention_mask == 0] == 99).all()
        assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()
        assert batch.num_targets == len(batch.input_ids)


def test_batches_follow_the_seed() -> None:
    examples = numbered([5] * 40)

    def order(seed: int | None) -> list[int]:
        made = batches(examples, 20, pad_id=99, seed=seed)
        return torch.cat([batch.input_ids[:, 0] for batch in made]).tolist()

    assert order(None) == list(range(40))
    assert order(1) == order(1) != order(2)


def test_joined_batches_are_padded_to_the_longest() -> None:
    parts = [batches(numbered(lengths), 100, pad_id=99)[0] for lengths in ([2, 3], [5])]
    joined = join(parts, 99)
    assert joined.input_ids.tolist() == [[0, 0, 99, 99, 99], [1, 1, 1, 99, 99], [0, 0, 0, 0, 0]]
    assert joined.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert joined.labels.tolist() == [
        [IGNORED, 0, IGNORED, IGNORED, IGNORED],
        [IGNORED, IGNORED, 1, IGNORED, IGNORED],
        [IGNORED, IGNORED, IGNORED, IGNORED, 0],
    ]
    assert joined.num_targets == 3
    assert join(parts[:1], 99) is parts[0]


def test_batches_of_like_length_are_bundled() -> None:
    def bundled(*shapes: tuple[int, int]) -> list[list[int]]:
        parts = {
            key: batches(numbered([length] * count), 1000, pad_id=99)[0] for key, (count, length) in enumerate(shapes)
        }
        return [list(bundle) for bundle in bundles(parts)]

    assert bundled((3, 10)) == [[0]]
    assert bundled((3, 10), (2, 11), (3, 10)) == [[0, 2, 1]]
    assert bundled((3, 20), (3, 10), (3, 21), (3, 11)) == [[1, 3], [0, 2]]
    assert bundled((1, 4), (40, 6)) == [[0, 1]], "little padding beside many tokens"
    assert bundled((40, 4), (1, 6)) == [[0], [1]]
