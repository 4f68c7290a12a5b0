"""The Open Inference Protocol, for clients of KServe and Triton: an adapter is a model, the base goes by its own name.

A façade: generation goes through the Inference service and its checks, adapters through the adapter cache.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext

from server.engine.async_engine import AsyncEngine
from server.errors import AdminOnly, InvalidRequest, ServingError
from server.metrics import RequestTimer, request_timers
from server.pb.inference import grpc_service_pb2 as pb
from server.pb.inference import grpc_service_pb2_grpc as pb_grpc
from server.pb.loraplex.v1 import inference_pb2
from server.rpc.infer_stream import answer_concurrently
from server.rpc.inference import InferenceService
from server.rpc.interceptors import Context, public_error
from server.rpc.model_statistics import ModelStatistics
from server.rpc.models import Model, Models
from server.rpc.tensors import INPUTS, OUTPUTS, TensorSpec
from server.rpc.text_inference import TextOutputs, TextRequest, read_text_request

PLATFORM = "loraplex"
EXTENSIONS = ("model_repository", "model_configuration", "parameters", "statistics")
_DATA_TYPES = {"BYTES": pb.TYPE_STRING, "BOOL": pb.TYPE_BOOL, "UINT32": pb.TYPE_UINT32, "FP32": pb.TYPE_FP32}


class OpenInferenceService(pb_grpc.GRPCInferenceServiceServicer):
    """Owns nothing."""

    def __init__(
        self,
        engine: AsyncEngine,
        info: inference_pb2.ModelInfo,
        inference: InferenceService,
        models: Models,
        statistics: ModelStatistics,
        *,
        changes_adapters: bool,
    ) -> None:
        """`changes_adapters`: whether clients may load and unload them here."""
        self._engine = engine
        self._info = info
        self._inference = inference
        self._changes_adapters = changes_adapters
        self._models = models
        self._statistics = statistics

    async def ServerLive(self, request: pb.ServerLiveRequest, context: object) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: object) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._engine.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: object) -> pb.ModelReadyResponse:
        try:
            model = await self._models.find(request.name, request.version)
        except ServingError:  # unknown, or nobody knows which version is meant
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._engine.ready and model.answers)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: object) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=PLATFORM, version=self._info.version, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: object) -> pb.ModelMetadataResponse:
        """Of all versions, unless the request names one. Errors: INVALID_ARGUMENT, NOT_FOUND."""
        model = await self._models.find(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[model.version] if request.version else self._models.versions(model),
            platform=PLATFORM,
            inputs=[_metadata(spec) for spec in INPUTS.values()],
            outputs=[_metadata(spec) for spec in OUTPUTS.values()],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: object) -> pb.ModelConfigResponse:
        """Errors: INVALID_ARGUMENT, NOT_FOUND."""
        model = await self._models.find(request.name, request.version)
        config = pb.ModelConfig(name=model.name, platform=PLATFORM, backend=PLATFORM)
        for spec in INPUTS.values():
            config.input.add(
                name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=[spec.dims], optional=spec.optional
            )
        for spec in OUTPUTS.values():
            config.output.add(name=spec.name, data_type=_DATA_TYPES[spec.datatype], dims=[spec.dims])
        on_cpu = self._engine.base.device.type == "cpu"
        kind = pb.ModelInstanceGroup.KIND_CPU if on_cpu else pb.ModelInstanceGroup.KIND_GPU
        config.instance_group.add(name=model.name, count=1, kind=kind)
        config.model_transaction_policy.decoupled = True
        config.parameters["base_model"].string_value = self._info.name
        config.parameters["max_model_len"].string_value = str(self._info.max_model_len)
        return pb.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: object) -> pb.ModelInferResponse:
        """Errors: those of Inference/Generate."""
        asked = read_text_request(request)
        if asked.stream:
            raise InvalidRequest("stream is true: an answer in pieces needs ModelStreamInfer", field="inputs.stream")
        async with aclosing(self._responses(request, asked)) as responses:
            [response] = [response async for response in responses]
        return response

    async def ModelStreamInfer(
        self, requests: AsyncGenerator[pb.ModelInferRequest, None], context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """Errors: none of a single request, unless the call asks for them."""
        end_on_error = ("triton_grpc_error", "true") in (context.invocation_metadata() or ())
        async with aclosing(answer_concurrently(requests, self._streamed)) as answers:
            async for request, answer in answers:
                if not isinstance(answer, Exception):
                    yield pb.ModelStreamInferResponse(infer_response=answer)
                    continue
                if end_on_error:
                    raise answer
                failed = pb.ModelInferResponse(
                    id=request.id, model_name=request.model_name, model_version=request.model_version
                )
                failed.parameters["triton_final_response"].bool_param = True
                yield pb.ModelStreamInferResponse(error_message=public_error(answer).message, infer_response=failed)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: object) -> pb.ModelStatisticsResponse:
        """Errors: INVALID_ARGUMENT, NOT_FOUND."""
        models = [await self._models.find(request.name, request.version)] if request.name else self._models.all()
        return pb.ModelStatisticsResponse(
            model_stats=[self._statistics.of(model.name, model.version) for model in models]
        )

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: object) -> pb.RepositoryIndexResponse:
        """Errors: INVALID_ARGUMENT."""
        _refuse_repository(request.repository_name)
        response = pb.RepositoryIndexResponse()
        for model in self._models.all():
            if model.answers or not request.ready:
                response.models.add(name=model.name, version=model.version, state=model.state, reason=model.reason)
        return response

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: object
    ) -> pb.RepositoryModelLoadResponse:
        """Errors: those of Adapters/LoadAdapter, PERMISSION_DENIED."""
        self._check_change(request.repository_name)
        self._models.refuse_base(request.model_name)
        for name in request.parameters:
            raise InvalidRequest(
                f"parameter {name[:80]!r} is not taken: adapters come from the adapters folder as they are",
                field="parameters",
            )
        await self._engine.adapters.load(request.model_name, "", replace=True)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: object
    ) -> pb.RepositoryModelUnloadResponse:
        """Errors: those of Adapters/UnloadAdapter, PERMISSION_DENIED."""
        self._check_change(request.repository_name)
        self._models.refuse_base(request.model_name)
        for name in request.parameters.keys() - {"unload_dependents"}:  # which adapters do not have
            raise InvalidRequest(f"parameter {name[:80]!r} is not known", field="parameters")
        await self._engine.adapters.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _check_change(self, repository: str) -> None:
        if not self._changes_adapters:
            raise AdminOnly
        _refuse_repository(repository)

    async def _streamed(self, request: pb.ModelInferRequest) -> AsyncGenerator[pb.ModelInferResponse, None]:
        tracer = self._engine.tracer
        with tracer.refusals() if tracer else nullcontext():
            async with aclosing(self._responses(request, read_text_request(request))) as responses:
                async for response in responses:
                    yield response

    async def _responses(
        self, request: pb.ModelInferRequest, asked: TextRequest
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """One response with the whole answer, or one for each piece of it."""
        if asked.lora_name:
            model = await self._models.find_lora(request.model_name, asked.lora_name)
        else:
            model = await self._models.find(request.model_name, request.model_version)
        started, version = time.monotonic(), model.version
        timers: list[RequestTimer] = []
        request_timers.set(timers)
        try:
            async with aclosing(self._generate(request, asked, model)) as responses:
                async for response in responses:
                    version = response.model_version  # the one that shares of the traffic gave
                    yield response
        except Exception:
            self._statistics.failed(model.name, version, started)
            raise
        self._statistics.succeeded(model.name, version, started, timers)

    async def _generate(
        self, request: pb.ModelInferRequest, asked: TextRequest, model: Model
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        tokenized = await self._inference.Tokenize(inference_pb2.TokenizeRequest(prompt=asked.text), None)
        generate = inference_pb2.GenerateRequest(
            adapter=model.reference,
            prompt_token_ids=inference_pb2.TokenIds(ids=tokenized.token_ids),
            sampling=asked.sampling,
            request_id=request.id,
        )
        outputs = TextOutputs(asked, len(tokenized.token_ids), self._engine.tokenizer)
        async with aclosing(self._inference.GenerateStream(generate, None)) as messages:
            async for message in messages:
                outputs.add(message)
                if not asked.stream and not outputs.finished:
                    continue
                version = message.adapter.version or model.version
                response = pb.ModelInferResponse(model_name=request.model_name, model_version=version, id=request.id)
                outputs.write(response)
                response.parameters["triton_final_response"].bool_param = outputs.finished
                yield response


def _refuse_repository(name: str) -> None:
    if name:
        raise InvalidRequest(
            f"repository_name is {name[:80]!r}; there is one repository, which needs no name", field="repository_name"
        )


def _metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=[spec.dims])
