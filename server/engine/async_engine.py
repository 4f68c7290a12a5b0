"""The event loop's side of the engine: tokens in, text out, one stream per request. Event loop only."""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from server.engine.admission import Admission
from server.engine.answer import Answer, GenerationOutput
from server.engine.commands import Abort, Evict, Revoke, Submit
from server.engine.core import EngineCore
from server.engine.engine_thread import EngineThread, engine_down
from server.engine.merging import AdapterMerging
from server.engine.model import BaseModel
from server.engine.request import Request, SamplingParams, TokenOutput
from server.engine.shared_hold import SharedHold
from server.errors import AdapterUnloaded, InvalidRequest
from server.lora.adapter import Adapter, WeightedAdapter
from server.lora.cache import AdapterCache, Found
from server.lora.host_copy import FreedBytes
from server.metrics import Metrics, RequestTimer

if TYPE_CHECKING:
    from server.tracing import RequestTracer


class AsyncEngine:
    """Owns the client streams, and the engine's thread with what is asked of it."""

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
        merge_policy: str,
        tracer: "RequestTracer | None" = None,
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.max_model_len = max_model_len
        self.metrics = metrics
        self.tracer = tracer
        self._core = core
        self._thread = EngineThread(core, self._end_answers)
        self.died = self._thread.died
        self.merging = AdapterMerging(core, self._thread, adapters, merge_policy)
        self.admission = Admission(max_requests)
        self._request_ids = itertools.count(1)
        self._answers: dict[int, Answer] = {}
        self._loop = asyncio.get_running_loop()
        core.connect(self._emit)
        adapters.connect(self._evict, self._revoke)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Ends the engine's thread after its current step."""
        await self._thread.stop()

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        adapters: Mapping[str, float],
        cache_salt: str = "",
        label: str = "",
        shared: SharedHold | None = None,
    ) -> AsyncGenerator[GenerationOutput, None]:
        """Runs one request and yields what is new as it comes; whatever ends the iteration also ends the request.

        A reader that is slow gets several tokens at once; it never holds up the engine, nor its adapters and its place
        in the server once the engine is done with it.

        Args:
            adapters: references with their weights, whose bypasses are summed; none: the base model.
            label: decides which share of each adapter's traffic the request is part of.
            shared: by which other answers run on the same adapters.

        Raises:
            ServingError: see `AdapterCache.hold`; `Admission.admit`; Unavailable.
        """
        timer = RequestTimer(self.metrics, len(prompt_token_ids))
        with ExitStack() as held:
            held.enter_context(timer.booked())
            held.enter_context(self.admission.admit())
            request = self._new_request(
                prompt_token_ids, params, await self._hold(adapters, held, label, shared), cache_salt
            )
            self._book(request)
            answer = Answer(request, self.tokenizer, timer, held)
            self._answers[request.request_id] = answer
            try:
                if self.died.is_set():  # perhaps while the adapter was loading
                    raise engine_down()
                self._core.put(Submit(request))
                finish_reason = None
                while finish_reason is None:
                    output = await answer.read()
                    finish_reason = output.finish_reason
                    yield output
            finally:
                self._forget(request.request_id)
                if self.tracer is not None:
                    self.tracer.record(request, timer)

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return not self.died.is_set() and not self.admission.draining

    def is_on_device(self, adapter: Adapter) -> bool:
        return adapter in self._core.resident

    async def _hold(
        self, adapters: Mapping[str, float], held: ExitStack, label: str, shared: SharedHold | None
    ) -> list[WeightedAdapter]:
        if not adapters:
            return []

        async def hold(held: ExitStack) -> Found:
            return await self.adapters.hold(list(adapters), held, label)

        with self.metrics.awaiting(adapters):
            found = await (hold(held) if shared is None else shared.adapters(held, hold))
        return [
            WeightedAdapter(adapter, weight, tier)
            for (adapter, tier), weight in zip(found, adapters.values(), strict=True)
        ]

    def _book(self, request: Request) -> None:
        self.metrics.adapters.request(request.metrics_name, request.num_prompt_tokens)
        for part in request.adapters:
            if self.is_on_device(part.adapter):
                self.metrics.adapters.found(part.adapter.name, "device")

    def _new_request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        adapters: Sequence[WeightedAdapter],
        cache_salt: str,
    ) -> Request:
        if len({part.adapter for part in adapters}) < len(adapters):
            raise InvalidRequest("mix names one adapter twice", field="mix")
        stop = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self.base.eos_token_ids
        return Request(next(self._request_ids), prompt_token_ids, params, adapters, stop, cache_salt)

    async def _evict(self, adapter: Adapter, makes_room: bool) -> FreedBytes:
        return await self._thread.ask(partial(Evict, adapter, makes_room=makes_room))

    def _revoke(self, adapter: Adapter) -> None:
        text = f"adapter {adapter.name}@{adapter.version} was unloaded by force"
        self._core.put(Revoke(adapter, AdapterUnloaded(text)))

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """Hands a step's outputs to their answers; one whose client has gone is dropped."""
        num_tokens: dict[str, int] = defaultdict(int)
        for output in outputs:
            answer = self._answers.get(output.request_id)
            if answer is None:
                continue
            answer.put(output)
            num_tokens[answer.metrics_name] += output.token_id is not None
            if answer.ended:
                self._forget(output.request_id)
                answer.let_go()
        self.metrics.adapters.tokens(num_tokens)

    def _forget(self, request_id: int) -> None:
        """Takes no more of a request, and has the engine end it if that has not."""
        if self._answers.pop(request_id, None) is not None:
            self._core.put(Abort(request_id))

    def _end_answers(self) -> None:
        self._deliver([TokenOutput(request_id, None, error=engine_down()) for request_id in self._answers])

    def _emit(self, outputs: list[TokenOutput]) -> None:
        """Engine thread."""
        self._loop.call_soon_threadsafe(self._deliver, outputs)
