"""Text as it streams: no broken characters, nothing of a stop string, and all pieces together are the whole."""

import random

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from server.engine.detokenizer import REPLACEMENT, TextStream
from tests.conftest import EOS, byte_tokenizer

TEXT = "naïve 👋🏽 日本語\n  plain ASCII, e\u0301 and 𝄞"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def stream(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    text = TextStream(tokenizer, tokenizer("prompt")["input_ids"], stop)
    pieces = []
    for index, token_id in enumerate(token_ids):
        pieces.append(text.push([token_id], last=index == len(token_ids) - 1))
        if text.stopped:
            break
    return pieces


def test_pieces_are_whole_characters(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = stream(tokenizer, tokenizer(TEXT)["input_ids"])
    assert "".join(pieces) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "👋" in pieces


def test_a_tokenizer_in_plain_python_streams_the_same() -> None:
    plain = ByT5Tokenizer()
    pieces = stream(plain, plain(TEXT, add_special_tokens=False)["input_ids"])
    assert "".join(pieces) == TEXT
    assert "👋" in pieces


def test_a_character_cut_off_by_the_end_is_not_lost_silently(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = stream(tokenizer, tokenizer("a👋")["input_ids"][:-1])
    assert "".join(pieces) == "a" + REPLACEMENT


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "".join(stream(tokenizer, [*tokenizer("ab")["input_ids"], EOS])) == "ab"


def test_a_stop_string_and_what_follows_never_shows(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = stream(tokenizer, tokenizer("one END two")["input_ids"], stop=("END", "never"))
    assert "".join(pieces) == "one "
    assert len(pieces) == len("one END")


def test_what_could_become_a_stop_string_waits(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = stream(tokenizer, tokenizer("xENx")["input_ids"], stop=("END",))
    assert pieces == ["x", "", "", "ENx"]


def test_the_earliest_stop_string_wins(tokenizer: PreTrainedTokenizerBase) -> None:
    text = TextStream(tokenizer, [], stop=("cd", "b"))
    assert text.push(tokenizer("abcd")["input_ids"], last=False) == "a"
    assert text.stopped


def test_any_grouping_gives_the_same_text(tokenizer: PreTrainedTokenizerBase) -> None:
    chance = random.Random(0)
    token_ids = tokenizer(TEXT * 3)["input_ids"]
    for _ in range(50):
        text, pieces, start = TextStream(tokenizer, [], ("\n  plainer",)), [], 0
        while start < len(token_ids):
            end = start + chance.randint(1, 7)
            pieces.append(text.push(token_ids[start:end], last=end >= len(token_ids)))
            start = end
        assert "".join(pieces) == TEXT * 3
