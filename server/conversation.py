"""What was said in a chat so far, and the request that asks on. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format

from server.pb.loraplex.v1.inference_pb2 import Chat, ChatMessage, GenerateRequest, SamplingParams

BASE = "base"  # the base model's name in commands; an adapter of that name is base@VERSION


class ChatError(Exception):
    """What was typed cannot be done; the message says what to type instead."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt with its answers by adapter, at least one."""

    prompt: str
    answers: Mapping[str, str]

    def answer(self, adapter: str) -> str:
        """The adapter's own, or the first of those that were asked."""
        return self.answers.get(adapter) or next(iter(self.answers.values()))


@dataclass(slots=True)
class Conversation:
    """Owns the turns. They are one history for all adapters: each finds its own answers in it, where it gave some."""

    adapters: list[str] = field(default_factory=lambda: [BASE])  # who is asked
    system: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    turns: list[Turn] = field(default_factory=list)

    def request(self, adapter: str, prompt: str) -> GenerateRequest:
        messages = [ChatMessage(role="system", content=self.system)] if self.system else []
        for turn in self.turns:
            messages.append(ChatMessage(role="user", content=turn.prompt))
            messages.append(ChatMessage(role="assistant", content=turn.answer(adapter)))
        messages.append(ChatMessage(role="user", content=prompt))
        name = "" if adapter == BASE else adapter
        return GenerateRequest(adapter=name, chat=Chat(messages=messages), sampling=self.sampling)

    def settings(self) -> dict[str, Any]:
        """The sampling parameters that are set."""
        found: dict[str, Any] = json_format.MessageToDict(self.sampling, preserving_proto_field_name=True)
        return found

    def set(self, name: str, value: str) -> None:
        """Sets one sampling parameter to a value in JSON; without a value the server's default holds again.

        Raises:
            ChatError: no such parameter, or not such a value.
        """
        known = [item.name for item in SamplingParams.DESCRIPTOR.fields if item.name != "n"]  # one answer at a time
        if name not in known:
            raise ChatError(f"no sampling parameter {name!r}; there are {', '.join(known)}")
        if not value:
            self.sampling.ClearField(name)
            return
        try:
            changed = json_format.ParseDict({name: json.loads(value)}, SamplingParams())
        except (ValueError, json_format.ParseError) as error:
            raise ChatError(f"{name} cannot be {value!r}: {error}") from error
        self.sampling.ClearField(name)
        self.sampling.MergeFrom(changed)
