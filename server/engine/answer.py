"""The answer to one request, from the engine's tokens to what its client reads. Event loop only.

It grows at the engine's pace and is read at the client's: text, stop strings and metrics wait for no reader.
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from server.engine.detokenizer import TextStream
from server.engine.request import FinishReason, Request, TokenLogprob, TokenOutput
from server.lora.adapter import AdapterIdentity
from server.lora.tier import AdapterTier
from server.metrics import RequestTimer


class GenerationOutput(NamedTuple):
    """What is new of one request; the last one has a finish reason."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    num_output_tokens: int  # so far
    num_cached_tokens: int  # of the prompt
    adapters: Sequence[AdapterIdentity]  # that answer
    tiers: Sequence[AdapterTier]  # where each of them was found


class Answer:
    """Owns what is not read yet, and what the request holds until the engine is done with it, read or not."""

    def __init__(
        self,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        timer: RequestTimer,
        held: ExitStack,
    ) -> None:
        self.ended = False  # nothing more is taken
        self._identities = request.identities
        self._text = TextStream(tokenizer, request.token_ids, request.params.stop)
        self._timer = timer
        self.metrics_name = request.metrics_name
        self._held = held
        self._reader: asyncio.Future[None] | None = None  # who waits for news
        self._has_news = False
        self._piece = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._last: TokenOutput | None = None  # that was taken
        self._finish_reason: FinishReason | None = None
        self._error: Exception | None = None

    def put(self, output: TokenOutput) -> None:
        """Takes what a step made. If that fails it is the reader who hears of it, and nobody else."""
        self._error = output.error
        if output.error is None:
            try:
                self._take(output)
            except Exception as error:
                self._error = error
        if self._error is not None:
            self._timer.outcome = "error"
        elif self._finish_reason is not None:
            self._timer.outcome = self._finish_reason.value
        self.ended = self._error is not None or self._finish_reason is not None
        self._has_news = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def let_go(self) -> None:
        """Gives back what the request holds; the engine is done with it, or has been told to be."""
        self._held.close()

    async def read(self) -> GenerationOutput:
        """All that is new, as soon as there is something. One reader at a time.

        Raises:
            Exception: what ended the request.
        """
        if not self._has_news:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        self._has_news = False
        if self._error is not None:
            raise self._error
        assert self._last is not None
        output = GenerationOutput(
            self._piece,
            self._token_ids,
            self._logprobs,
            self._finish_reason,
            self._timer.num_tokens,
            self._last.num_cached_tokens,
            self._identities,
            self._last.tiers,
        )
        self._piece, self._token_ids, self._logprobs = "", [], []
        return output

    def _take(self, output: TokenOutput) -> None:
        assert output.token_id is not None
        self._last = output
        self._token_ids.append(output.token_id)
        if output.logprob is not None:
            self._logprobs.append(output.logprob)
        self._finish_reason = output.finish_reason
        ends_by_token = output.finish_reason is FinishReason.STOP
        new = [] if ends_by_token else [output.token_id]
        self._piece += self._text.push(new, last=output.finish_reason is not None)
        if self._text.stopped:
            self._finish_reason = FinishReason.STOP
        self._timer.token(output)
