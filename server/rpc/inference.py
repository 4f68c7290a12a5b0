"""The Inference service: messages to requests and back, nothing else."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import lru_cache

from server.engine.answer import GenerationOutput
from server.engine.async_engine import AsyncEngine
from server.engine.request import FinishReason, SamplingParams
from server.engine.shared_hold import SharedHold
from server.errors import InvalidRequest
from server.lora.adapter import AdapterIdentity
from server.lora.tier import AdapterTier
from server.pb.loraplex.v1 import inference_pb2 as pb
from server.pb.loraplex.v1 import inference_pb2_grpc as pb_grpc
from server.rpc.prompts import PromptReader
from server.rpc.sampling import sampling_params

MAX_MIX = 8  # adapters of one request
MAX_WEIGHT = 10  # of an adapter in a mix, either sign
MAX_LABEL = 256  # characters of request_id and cache_salt
MAX_IDENTITIES = 1024  # messages that tell of an adapter, kept for the next token
_FINISH_REASONS = {None: pb.FINISH_REASON_UNSPECIFIED, FinishReason.STOP: pb.STOP, FinishReason.LENGTH: pb.LENGTH}
_TIERS = {
    AdapterTier.DISK: pb.AdapterIdentity.DISK,
    AdapterTier.HOST: pb.AdapterIdentity.HOST,
    AdapterTier.DEVICE: pb.AdapterIdentity.DEVICE,
}


class InferenceService(pb_grpc.InferenceServicer):
    def __init__(self, engine: AsyncEngine, info: pb.ModelInfo) -> None:
        self._engine = engine
        self._info = info
        self._prompts = PromptReader(engine.tokenizer, engine.base.vocab_size, engine.max_model_len)

    async def Generate(self, request: pb.GenerateRequest, context: object) -> pb.GenerateResponse:
        """Errors: INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, RESOURCE_EXHAUSTED, UNAVAILABLE."""
        if request.sampling.n > 1:
            raise InvalidRequest(
                f"sampling.n is {request.sampling.n}: more than one answer needs GenerateStream", field="sampling.n"
            )
        answer, pieces = pb.GenerateResponse(), []
        async with aclosing(self._answers(request)) as messages:
            async for message in messages:
                pieces.append(message.text)
                answer.ClearField("mix")  # every message has it whole
                answer.MergeFrom(message)
        answer.text = "".join(pieces)
        return answer

    def GenerateStream(self, request: pb.GenerateRequest, context: object) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Errors: those of Generate."""
        return self._answers(request)

    async def Tokenize(self, request: pb.TokenizeRequest, context: object) -> pb.TokenizeResponse:
        """Errors: INVALID_ARGUMENT."""
        return pb.TokenizeResponse(token_ids=await self._prompts.read(request))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: object) -> pb.ModelInfo:
        return self._info

    async def _answers(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        for field, text in (("request_id", request.request_id), ("cache_salt", request.cache_salt)):
            if len(text) > MAX_LABEL or not text.isprintable():
                raise InvalidRequest(
                    f"{field} may have {MAX_LABEL} characters, all printable; it has {len(text)}", field=field
                )
        prompt = await self._prompts.read(request)
        engine = self._engine
        params = sampling_params(request.sampling, len(prompt), engine.max_model_len, engine.base.vocab_size)
        adapters = self._adapters(request)
        num_answers = max(1, request.sampling.n)
        with SharedHold(num_answers) as hold:
            streams = [
                engine.generate(prompt, _nth(params, index), adapters, request.cache_salt, request.request_id, hold)
                for index in range(num_answers)
            ]
            async with aclosing(_merge(streams)) as outputs:
                async for index, output in outputs:
                    yield _response(engine, index, output, len(prompt))

    def _adapters(self, request: pb.GenerateRequest) -> dict[str, float]:
        """Which adapters the request runs on, each with its weight.

        Raises:
            InvalidRequest: contradictory fields, or values beyond their limits.
        """
        if not request.mix:
            scale = request.adapter_scale if request.HasField("adapter_scale") else 1.0
            adapters = {request.adapter: _weight(scale, "adapter_scale")} if request.adapter else {}
            if not adapters and request.HasField("adapter_scale"):
                raise InvalidRequest("adapter_scale is set, but no adapter", field="adapter_scale")
            return adapters
        if request.adapter or request.HasField("adapter_scale"):
            raise InvalidRequest("mix stands instead of adapter and adapter_scale; set one of them", field="mix")
        limit = min(MAX_MIX, self._info.num_adapter_slots)
        if len(request.mix) > limit:
            raise InvalidRequest(
                f"mix has {len(request.mix)} adapters; the limit is {limit} ({MAX_MIX}, or --adapter-slots if less)",
                field="mix",
            )
        adapters = {part.adapter: _weight(part.weight, "mix.weight") for part in request.mix}
        if len(adapters) < len(request.mix):
            raise InvalidRequest("mix names one adapter twice", field="mix.adapter")
        return adapters


def _weight(value: float, field: str) -> float:
    if not abs(value) <= MAX_WEIGHT:  # NaN fails too
        raise InvalidRequest(f"{field} is {value:g}; it must be from {-MAX_WEIGHT} to {MAX_WEIGHT}", field=field)
    return value


def _nth(params: SamplingParams, index: int) -> SamplingParams:
    """The same parameters for the n-th answer: a seed gives n different answers, always the same n."""
    return params if params.seed is None else replace(params, seed=params.seed + index)


async def _merge(
    streams: list[AsyncGenerator[GenerationOutput, None]],
) -> AsyncGenerator[tuple[int, GenerationOutput], None]:
    """The outputs of several requests as they come, with their index; an error of one ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as outputs:
            async for only in outputs:
                yield 0, only
        return
    queue: asyncio.Queue[tuple[int, GenerationOutput | Exception]] = asyncio.Queue()

    async def forward(index: int, stream: AsyncGenerator[GenerationOutput, None]) -> None:
        try:
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    queue.put_nowait((index, output))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(index, stream)) for index, stream in enumerate(streams)]
    try:
        unfinished = len(streams)
        while unfinished:
            index, output = await queue.get()
            if isinstance(output, Exception):
                raise output
            unfinished -= output.finish_reason is not None
            yield index, output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _response(engine: AsyncEngine, index: int, output: GenerationOutput, num_prompt_tokens: int) -> pb.GenerateResponse:
    identities = [
        _identity(identity, engine.merging.is_merged(identity.generation), tier)
        for identity, tier in zip(output.adapters, output.tiers, strict=True)
    ]
    response = pb.GenerateResponse(
        text=output.text,
        token_ids=output.token_ids,
        finish_reason=_FINISH_REASONS[output.finish_reason],
        index=index,
        adapter=identities[0] if len(identities) == 1 else None,
        mix=identities if len(identities) > 1 else (),
    )
    for logprob in output.logprobs:
        top = [pb.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top]
        response.logprobs.add(token_id=logprob.token_id, logprob=logprob.logprob, top=top)
    if output.finish_reason is not None:
        response.usage.prompt_tokens = num_prompt_tokens
        response.usage.completion_tokens = output.num_output_tokens
        response.usage.cached_tokens = output.num_cached_tokens
    return response


@lru_cache(MAX_IDENTITIES)
def _identity(identity: AdapterIdentity, merged: bool, tier: AdapterTier) -> pb.AdapterIdentity:
    """The same for every token of a stream; not to be changed."""
    return pb.AdapterIdentity(**identity._asdict(), merged=merged, tier=_TIERS[tier])
