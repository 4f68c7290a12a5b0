"""What becomes of a request's input, and that none of any size holds up the event loop."""

import asyncio

import pytest

from server.errors import InvalidRequest
from server.pb.loraplex.v1 import inference_pb2 as pb
from server.rpc.prompts import LONG, PromptReader
from tests.conftest import VOCAB_SIZE, byte_tokenizer

CONTEXT = 10_000  # tokens
LONGEST_TOKEN = 4  # characters: </s>


def chat(*contents: str, role: str = "user") -> pb.TokenizeRequest:
    return pb.TokenizeRequest(chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=text) for text in contents]))


def reader(template: str | None = None) -> PromptReader:
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return PromptReader(tokenizer, VOCAB_SIZE, CONTEXT)


@pytest.mark.parametrize(
    ("request_", "leaves_the_loop"),
    [
        (pb.TokenizeRequest(prompt="x" * (LONG - 1)), False),
        (pb.TokenizeRequest(prompt="x" * LONG), True),
        (chat("x" * (LONG // 2)), False),
        (chat("x" * (LONG // 2), "x" * (LONG // 2)), True),
        (chat(*[""] * LONG), True),
    ],
)
async def test_only_short_inputs_are_read_on_the_loop(request_: pb.TokenizeRequest, leaves_the_loop: bool) -> None:
    reading = asyncio.create_task(reader("{{ messages[0].content }}!").read(request_))
    await asyncio.sleep(0)
    assert reading.done() is not leaves_the_loop
    assert await reading


NEVER_RENDERED = "{{ raise_exception('it was rendered') }}"


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (pb.TokenizeRequest(prompt="x" * 1_000_000), "prompt has 1,000,000 characters; no more than 40,000"),
        (chat("x" * 1_000_000), "chat has 1,000,004 characters; no more than 40,000 can fit in 10,000 tokens"),
        (chat(*["x" * 100] * 1000), "chat has 104,000 characters"),
        (chat(*[""] * CONTEXT), "chat has 10,000 messages; of one token each, 9,999 fit"),
        (chat("x", role="y" * 1_000_000), f"chat role '{'y' * 40}' is not one of"),
        (
            pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[1] * CONTEXT)),
            "prompt_token_ids has 10,000 tokens; with at least one to generate, 10,000 fit",
        ),
    ],
)
async def test_what_can_not_fit_is_refused_unread(request_: pb.TokenizeRequest | pb.GenerateRequest, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await reader(NEVER_RENDERED).read(request_)
    assert str(caught.value).startswith(text)
    if "role" not in text:
        assert "--max-model-len" in str(caught.value)


async def test_templates_have_their_say_and_no_more_room() -> None:
    with pytest.raises(InvalidRequest, match="the chat template refuses these messages: it was rendered"):
        await reader(NEVER_RENDERED).read(chat("x"))
    with pytest.raises(InvalidRequest, match="chat has 50,000 characters"):
        await reader("{{ 'x' * 50000 }}").read(chat("x"))
