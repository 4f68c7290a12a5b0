"""The event loop's side of the engine: tokens in, text out, one stream per request. Event loop only."""

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from server.engine.core import Abort, EngineCore, Evict, Revoke, Stop, Submit
from server.engine.detokenizer import TextStream
from server.engine.model import BaseModel
from server.engine.request import FinishReason, Request, SamplingParams, TokenLogprob, TokenOutput
from server.errors import AdapterUnloaded, Overloaded, Unavailable
from server.lora.adapter import Adapter
from server.lora.cache import AdapterCache
from server.metrics import Metrics, RequestTimer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """What is new of one request; the last one has a finish reason."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    num_output_tokens: int  # so far
    num_cached_tokens: int  # of the prompt
    adapter: Adapter | None


class AsyncEngine:
    """Owns the client streams and the engine thread."""

    def __init__(
        self,
        core: EngineCore,
        base: BaseModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: AdapterCache,
        metrics: Metrics,
        *,
        max_model_len: int,
        max_requests: int,
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.max_model_len = max_model_len
        self.died = asyncio.Event()
        self._core = core
        self._metrics = metrics
        self._max_requests = max_requests
        self._num_requests = 0
        self._draining = False
        self._drained = asyncio.Event()
        self._drained.set()
        self._request_ids = itertools.count(1)
        self._streams: dict[int, asyncio.Queue[TokenOutput]] = {}
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run_core, name="loraplex-engine", daemon=True)
        core.connect(self._emit)
        adapters.connect(self._evict, self._revoke)

    def start(self) -> None:
        self._thread.start()

    async def drain(self, grace: float) -> bool:
        """Refuses new requests and waits for those that run; says whether all ended within `grace` seconds."""
        self._draining = True
        try:
            async with asyncio.timeout(grace):
                await self._drained.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Ends the engine thread after its current step."""
        self._core.put(Stop())
        await asyncio.to_thread(self._thread.join)

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, adapter: str, cache_salt: str = "", label: str = ""
    ) -> AsyncGenerator[GenerationOutput, None]:
        """Runs one request and yields what is new as it comes; whatever ends the iteration also ends the request.

        `label` decides which share of the adapter's traffic the request is part of. A reader that is slow gets several
        tokens at once; it never holds up the engine.

        Raises:
            ServingError: see `AdapterCache.acquire`; Overloaded when the queue is full; Unavailable.
        """
        self._enter()
        try:
            timer = RequestTimer(self._metrics)
            async with self.adapters.acquire(adapter, label) as acquired:
                request = self._new_request(prompt_token_ids, params, acquired, cache_salt)
                label = self._metrics.adapter_label(acquired.name if acquired else "")
                self._metrics.prompt_tokens.labels(adapter=label).inc(len(prompt_token_ids))
                generated = self._metrics.generation_tokens.labels(adapter=label)
                async with aclosing(self._run(request)) as outputs:
                    async for output in outputs:
                        generated.inc(len(output.token_ids))
                        timer.tokens()
                        if output.finish_reason is not None:
                            timer.finished(output.finish_reason)
                            self._metrics.cached_tokens.inc(output.num_cached_tokens)
                        yield output
        finally:
            self._leave()

    def is_on_device(self, adapter: Adapter) -> bool:
        return adapter in self._core.resident

    def _new_request(
        self, prompt_token_ids: list[int], params: SamplingParams, adapter: Adapter | None, cache_salt: str
    ) -> Request:
        stop = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self.base.eos_token_ids
        return Request(next(self._request_ids), prompt_token_ids, params, adapter, stop, cache_salt)

    async def _run(self, request: Request) -> AsyncGenerator[GenerationOutput, None]:
        queue: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self._streams[request.request_id] = queue
        text = TextStream(self.tokenizer, request.token_ids, request.params.stop)
        num_output_tokens = 0
        finish_reason = None
        try:
            if self.died.is_set():  # while the adapter was loading
                raise Unavailable("the engine is down", reason="ENGINE_DOWN")
            self._core.put(Submit(request))
            while finish_reason is None:
                outputs = [await queue.get()]
                while not queue.empty():
                    outputs.append(queue.get_nowait())
                if outputs[-1].error is not None:
                    raise outputs[-1].error
                token_ids, logprobs, piece = [], [], ""
                for output in outputs:
                    assert output.token_id is not None
                    num_output_tokens += 1
                    token_ids.append(output.token_id)
                    logprobs += [output.logprob] if output.logprob else []
                    finish_reason = output.finish_reason
                    ends_by_token = finish_reason is FinishReason.STOP
                    piece += text.push([] if ends_by_token else [output.token_id], last=finish_reason is not None)
                    if text.stopped:
                        finish_reason = FinishReason.STOP
                        break
                yield GenerationOutput(
                    piece,
                    token_ids,
                    logprobs,
                    finish_reason,
                    num_output_tokens,
                    outputs[-1].num_cached_tokens,
                    request.adapter,
                )
        finally:
            del self._streams[request.request_id]
            self._core.put(Abort(request.request_id))

    def _enter(self) -> None:
        if self.died.is_set():
            raise Unavailable("the engine is down", reason="ENGINE_DOWN")
        if self._draining:
            raise Unavailable("the server is draining", reason="DRAINING")
        if self._num_requests >= self._max_requests:
            raise Overloaded(
                f"{self._num_requests} requests are running or waiting; the limit is --max-num-seqs plus --max-waiting",
                reason="QUEUE_FULL",
            )
        self._num_requests += 1
        self._drained.clear()

    def _leave(self) -> None:
        self._num_requests -= 1
        if not self._num_requests:
            self._drained.set()

    async def _evict(self, adapter: Adapter) -> int:
        freed: Future[int] = Future()
        self._core.put(Evict(adapter, freed))
        return await asyncio.wrap_future(freed)

    def _revoke(self, adapter: Adapter) -> None:
        text = f"adapter {adapter.name}@{adapter.version} was unloaded by force"
        self._core.put(Revoke(adapter, AdapterUnloaded(text)))

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """Hands a step's outputs to their streams; one whose client has gone is dropped."""
        for output in outputs:
            queue = self._streams.get(output.request_id)
            if queue is not None:
                queue.put_nowait(output)

    def _die(self) -> None:
        self.died.set()
        for request_id, queue in self._streams.items():
            queue.put_nowait(
                TokenOutput(request_id, None, error=Unavailable("the engine is down", reason="ENGINE_DOWN"))
            )

    # Engine thread only, below.

    def _emit(self, outputs: list[TokenOutput]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _run_core(self) -> None:
        try:
            self._core.run()
        except BaseException:
            log.exception("the engine thread died")
            self._loop.call_soon_threadsafe(self._die)
