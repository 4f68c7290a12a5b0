"""From a request's input to token ids. Short inputs are read on the event loop, long ones on a thread of their own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jinja2
from transformers import PreTrainedTokenizerBase

from server.errors import InvalidRequest
from server.pb.loraplex.v1 import inference_pb2 as pb

LONG = 4096  # characters from which an input leaves the event loop
ROLES = ("system", "user", "assistant")


class PromptReader:
    """Owns the limits of inputs, and the thread that reads long ones: one, so that a burst leaves the engine its cores.

    What can never fit in the context is refused by its size, before it is rendered or tokenized.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._max_characters = max_model_len * max(map(len, tokenizer.get_vocab()))
        self._thread = ThreadPoolExecutor(1, "loraplex-prompts")

    async def read(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
        """The prompt's tokens, whichever way it came.

        Raises:
            InvalidRequest: missing, empty, too long, or with ids outside the vocabulary.
        """
        kind = request.WhichOneof("input")
        if kind == "prompt_token_ids":
            assert isinstance(request, pb.GenerateRequest)
            self._check_length(kind, len(request.prompt_token_ids.ids))
            token_ids = list(request.prompt_token_ids.ids)
        elif kind == "prompt":
            self._check_size(kind, len(request.prompt))
            encode = partial(self._encode, request.prompt, add_special_tokens=True)
            token_ids = await self._run(encode, len(request.prompt))
        elif kind == "chat":
            size = self._check_chat(request.chat)
            token_ids = await self._run(partial(self._render_and_encode, request.chat), size)
        else:
            raise InvalidRequest("no input: set prompt, prompt_token_ids or chat", field="input")
        if not token_ids:
            raise InvalidRequest(f"{kind} is empty", field=kind)
        if max(token_ids) >= self._vocab_size:
            raise InvalidRequest(
                f"{kind} holds token {max(token_ids)}; the vocabulary ends at {self._vocab_size - 1}", field=kind
            )
        self._check_length(kind, len(token_ids))
        return token_ids

    async def _run(self, encode: Callable[[], list[int]], num_characters: int) -> list[int]:
        if num_characters < LONG:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _render_and_encode(self, chat: pb.Chat) -> list[int]:
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (jinja2.TemplateError, ValueError) as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", field="chat.messages") from error
        self._check_size("chat", len(text))  # with what the template added
        return self._encode(text, add_special_tokens=False)

    def _check_chat(self, chat: pb.Chat) -> int:
        """The characters of a chat whose messages can be rendered."""
        if not chat.messages:
            raise InvalidRequest("chat has no messages", field="chat.messages")
        if len(chat.messages) >= self._max_model_len:
            raise InvalidRequest(
                f"chat has {len(chat.messages):,} messages; of one token each, {self._max_model_len - 1:,} fit "
                "(--max-model-len)",
                field="chat.messages",
            )
        for message in chat.messages:
            if message.role not in ROLES:
                raise InvalidRequest(
                    f"chat role {message.role[:40]!r} is not one of {', '.join(ROLES)}", field="chat.messages.role"
                )
        size = sum(len(message.role) + len(message.content) for message in chat.messages)
        self._check_size("chat", size)
        return size

    def _check_size(self, field: str, num_characters: int) -> None:
        """A token has no more characters than the longest of the vocabulary."""
        if num_characters > self._max_characters:
            raise InvalidRequest(
                f"{field} has {num_characters:,} characters; no more than {self._max_characters:,} can fit in "
                f"{self._max_model_len:,} tokens (--max-model-len)",
                field=field,
            )

    def _check_length(self, field: str, num_tokens: int) -> None:
        if num_tokens >= self._max_model_len:
            raise InvalidRequest(
                f"{field} has {num_tokens:,} tokens; with at least one to generate, {self._max_model_len:,} fit "
                "(--max-model-len)",
                field=field,
            )
