"""The history of a chat: what each adapter is told that was said."""

import pytest

from server.conversation import BASE, ChatError, Conversation, Turn
from server.pb.loraplex.v1.inference_pb2 import SamplingParams


def told(conversation: Conversation, adapter: str) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.request(adapter, "next").chat.messages]


def test_an_adapter_sees_its_own_answers_and_else_the_first() -> None:
    turns = [Turn("one", {"a": "from a", "b": "from b"}), Turn("two", {"b": "only b"})]
    conversation = Conversation(system="be kind", turns=turns)
    start, end = ("system", "be kind"), ("user", "next")
    for adapter, first in (("a", "from a"), ("b", "from b"), (BASE, "from a")):
        said = [("user", "one"), ("assistant", first), ("user", "two"), ("assistant", "only b")]
        assert told(conversation, adapter) == [start, *said, end]


def test_the_base_has_no_adapter() -> None:
    assert Conversation().request(BASE, "x").adapter == ""
    assert Conversation().request("a@2", "x").adapter == "a@2"


def test_sampling_parameters_are_set_and_cleared() -> None:
    conversation = Conversation(sampling=SamplingParams(max_tokens=9))
    conversation.set("temperature", "0.5")
    conversation.set("stop", '["a", "b"]')
    conversation.set("stop", '["c"]')
    assert conversation.settings() == {"max_tokens": 9, "temperature": 0.5, "stop": ["c"]}
    conversation.set("max_tokens", "")
    assert conversation.request(BASE, "x").sampling == SamplingParams(temperature=0.5, stop=["c"])


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("warmth", "1", "no sampling parameter 'warmth'; there are max_tokens, temperature"),
        ("n", "2", "no sampling parameter 'n'"),
        ("temperature", "hot", "temperature cannot be 'hot'"),
        ("max_tokens", "-1", "max_tokens cannot be '-1'"),
    ],
)
def test_wrong_parameters_change_nothing(name: str, value: str, reason: str) -> None:
    conversation = Conversation(sampling=SamplingParams(max_tokens=9))
    with pytest.raises(ChatError, match=reason):
        conversation.set(name, value)
    assert conversation.sampling == SamplingParams(max_tokens=9)
