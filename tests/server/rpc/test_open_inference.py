"""The Open Inference Protocol over a real socket: answers, streams, repository, and every way of asking wrongly."""

import json
import shutil
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from adapters.format import AdapterFiles, read_adapter
from server.metrics import Metrics, RequestTimer
from server.pb.inference import grpc_service_pb2 as pb
from server.pb.loraplex.v1 import adapters_pb2, inference_pb2
from server.rpc.model_statistics import ModelStatistics
from tests.conftest import ADAPTERS, VOCAB_SIZE, byte_tokenizer
from tests.server.rpc.conftest import Running
from tests.server.rpc.test_inference import PROMPT, ask, failure, idle

BASE = "tiny"
SAMPLING = {"max_tokens": 10, "ignore_eos": True}
Tensor = pb.ModelInferRequest.InferInputTensor


def text(name: str, value: str | bytes, **head: Any) -> Tensor:
    data = value.encode() if isinstance(value, str) else value
    contents = pb.InferTensorContents(bytes_contents=[data])
    return Tensor(**{"name": name, "datatype": "BYTES", "shape": [1], "contents": contents, **head})


def flag(name: str, value: bool = True, **head: Any) -> Tensor:
    contents = pb.InferTensorContents(bool_contents=[value])
    return Tensor(**{"name": name, "datatype": "BOOL", "shape": [1], "contents": contents, **head})


def infer(
    *more: Tensor, model: str = BASE, prompt: str = PROMPT, sampling: Any = None, **fields: Any
) -> pb.ModelInferRequest:
    parameters = json.dumps({**SAMPLING, **(sampling or {})})
    inputs = [text("text_input", prompt), text("sampling_parameters", parameters), *more]
    return pb.ModelInferRequest(model_name=model, inputs=inputs, **fields)


def raw(request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    """The same request in the other encoding."""
    for tensor in request.inputs:
        if tensor.datatype == "BOOL":
            request.raw_input_contents.append(bytes(tensor.contents.bool_contents))
        else:
            [data] = tensor.contents.bytes_contents
            request.raw_input_contents.append(struct.pack("<I", len(data)) + data)
        tensor.ClearField("contents")
    return request


def values(response: pb.ModelInferResponse) -> dict[str, list[Any]]:
    found = {}
    for tensor in response.outputs:
        [(_, elements)] = tensor.contents.ListFields()
        assert list(tensor.shape) == [len(elements)]
        found[tensor.name] = [item.decode() if isinstance(item, bytes) else item for item in elements]
    return found


async def stream(running: Running, *requests: pb.ModelInferRequest, **settings: Any) -> list[Any]:
    return [response async for response in running.open_inference.ModelStreamInfer(iter(requests), **settings)]


@pytest.mark.parametrize("model", [BASE, "plain", "attention"])
async def test_the_answer_is_that_of_our_own_service(running: Running, model: str) -> None:
    expected = await running.inference.Generate(ask(adapter="" if model == BASE else model))
    flags = [flag(name) for name in ("exclude_input_in_output", "return_finish_reason", "return_num_input_tokens")]
    request = infer(*flags, flag("return_num_output_tokens"), model=model, id="7")
    response = await running.open_inference.ModelInfer(request)
    assert (response.model_name, response.model_version, response.id) == (model, "1", "7")
    assert values(response) == {
        "text_output": [expected.text],
        "finish_reason": ["length"],
        "num_input_tokens": [expected.usage.prompt_tokens],
        "num_output_tokens": [10],
    }


async def test_both_encodings_and_both_shapes_are_one(running: Running) -> None:
    typed = await running.open_inference.ModelInfer(infer(flag("return_num_input_tokens")))
    request = infer(flag("return_num_input_tokens"))
    for tensor in request.inputs:
        tensor.shape[:] = [1, 1]
    packed = await running.open_inference.ModelInfer(raw(request))
    assert [list(tensor.shape) for tensor in packed.outputs] == [[1], [1]]
    output, number = packed.raw_output_contents
    assert output[4:].decode() == values(typed)["text_output"][0]
    assert struct.unpack("<I", output[:4])[0] == len(output) - 4
    assert list(struct.unpack("<I", number)) == values(typed)["num_input_tokens"]


async def test_the_input_comes_before_the_output_unless_excluded(running: Running) -> None:
    whole = values(await running.open_inference.ModelInfer(infer()))["text_output"][0]
    alone = values(await running.open_inference.ModelInfer(infer(flag("exclude_input_in_output"))))["text_output"][0]
    assert whole == PROMPT + alone


async def test_outputs_that_are_named_are_those_that_come(running: Running) -> None:
    names = ["num_output_tokens", "text_output"]
    outputs = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in names]
    response = await running.open_inference.ModelInfer(infer(flag("return_finish_reason"), outputs=outputs))
    assert list(values(response)) == names


async def test_several_answers_and_their_logprobs(running: Running) -> None:
    sampling: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 5, "logprobs": 2}
    flags = [flag("return_logprobs"), flag("return_cumulative_logprob")]
    whole = [message async for message in running.inference.GenerateStream(ask(**sampling))]
    [response] = await stream(running, infer(*flags, flag("exclude_input_in_output"), sampling=sampling))
    found = values(response.infer_response)
    for index in range(3):
        messages = [message for message in whole if message.index == index]
        assert found["text_output"][index] == "".join(message.text for message in messages)
        logprobs = [item for message in messages for item in message.logprobs]
        assert found["cumulative_logprob"][index] == pytest.approx(sum(item.logprob for item in logprobs), abs=1e-4)
        written = json.loads(found["logprobs"][index])
        assert len(written) == 10
        for item, entry in zip(logprobs, written, strict=True):
            assert entry[str(item.token_id)]["logprob"] == pytest.approx(item.logprob, abs=1e-6)
            assert [entry[str(top.token_id)]["rank"] for top in item.top] == [1, 2]
            top = item.top[0].token_id
            assert entry[str(top)]["decoded_token"] == byte_tokenizer().decode([top])


async def test_logprobs_of_the_chosen_tokens_need_no_parameter(running: Running) -> None:
    response = await running.open_inference.ModelInfer(infer(flag("return_cumulative_logprob")))
    expected = await running.inference.Generate(ask(logprobs=0))
    assert values(response)["cumulative_logprob"] == [
        pytest.approx(sum(item.logprob for item in expected.logprobs), abs=1e-4)
    ]


async def test_a_stream_gives_pieces_and_says_which_is_the_last(running: Running) -> None:
    expected = await running.inference.Generate(ask(adapter="plain"))
    flags = [flag("return_finish_reason"), flag("return_num_output_tokens")]
    request = infer(flag("stream"), *flags, model="plain", id="a")
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    request.inputs[1].contents.bytes_contents[0] = json.dumps(SAMPLING).encode()
    responses = await stream(running, request)
    assert not any(response.error_message for response in responses)
    pieces = [values(response.infer_response) for response in responses]
    assert "".join(piece["text_output"][0] for piece in pieces) == expected.text
    assert sum(piece["num_output_tokens"][0] for piece in pieces) == 10
    assert [piece["finish_reason"][0] for piece in pieces] == ["None"] * (len(pieces) - 1) + ["length"]
    last = [response.infer_response.parameters["triton_final_response"].bool_param for response in responses]
    assert last == [False] * (len(responses) - 1) + [True]
    assert {response.infer_response.id for response in responses} == {"a"}


async def test_requests_on_one_stream_run_side_by_side(running: Running) -> None:
    """A short request that comes second ends first, and each response carries the id of its request."""
    names = [BASE, *ADAPTERS]
    requests = [infer(flag("stream"), model=names[0], id="0", sampling={"max_tokens": 200})]
    requests += [infer(flag("stream"), model=name, id=str(index)) for index, name in enumerate(names) if index]
    texts = dict.fromkeys(map(str, range(len(names))), "")
    ended = []
    for response in await stream(running, *requests):
        answer = response.infer_response
        texts[answer.id] += values(answer)["text_output"][0]
        if answer.parameters["triton_final_response"].bool_param:
            ended.append(answer.id)
    assert ended[-1] == "0"
    for index, name in enumerate(names[1:], 1):
        assert texts[str(index)] == (await running.inference.Generate(ask(adapter=name))).text


async def test_a_request_that_fails_leaves_the_stream_alive(running: Running) -> None:
    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        yield infer(model="nobody", id="bad")
        yield infer(text("image", "x"), id="worse")
        yield infer(id="good")

    found = {}
    async for response in running.open_inference.ModelStreamInfer(requests()):
        found[response.infer_response.id] = response
    assert "nobody" in found["bad"].error_message
    assert found["bad"].infer_response.model_name == "nobody"
    assert found["bad"].infer_response.parameters["triton_final_response"].bool_param
    assert "'image'" in found["worse"].error_message
    assert values(found["good"].infer_response)["text_output"]


async def test_an_error_ends_the_stream_for_clients_that_ask_for_it(running: Running) -> None:
    metadata = (("triton_grpc_error", "true"),)
    requests = [infer(flag("stream"), sampling={"max_tokens": 200}), infer(model="nobody")]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(running, *requests, metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    await idle(running)


async def test_a_bug_of_ours_shows_only_an_incident_on_a_stream(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.engine, "generate", lambda *_: 1 / 0)
    [response] = await stream(running, infer())
    assert response.error_message.startswith("internal error, incident ")


async def test_many_more_requests_than_fit_are_all_answered(running: Running) -> None:
    """Those beyond the queue fail by themselves; nothing is lost, and the server is idle afterwards."""
    responses = await stream(running, *[infer(id=str(index)) for index in range(600)])
    assert sorted(int(response.infer_response.id) for response in responses) == list(range(600))
    errors = {response.error_message for response in responses if response.error_message}
    assert all("--max-waiting" in error for error in errors)
    assert len(responses) > len([response for response in responses if response.error_message])
    await idle(running)


async def test_a_client_that_leaves_its_stream_frees_its_requests(running: Running) -> None:
    request = infer(flag("stream"), sampling={"max_tokens": 200})
    call = running.open_inference.ModelStreamInfer(iter([request] * 4))
    await call.read()
    assert running.parts.scheduler.has_work
    call.cancel()
    await idle(running)


async def test_an_unreadable_message_ends_the_stream(running: Running) -> None:
    call: Any = running.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    error = await failure(call(iter([b"\xff\xff\xff"])).read())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


BAD_INPUTS: list[tuple[pb.ModelInferRequest, str]] = [
    (pb.ModelInferRequest(model_name=BASE), "'text_input' is missing"),
    (infer(text("image", "x")), "'image' is not known"),
    (infer(flag("stream", datatype="INT32")), "'stream' has datatype 'INT32'"),
    (infer(flag("stream", shape=[2])), "'stream' has shape [2]"),
    (infer(flag("stream", shape=[])), "'stream' has shape []"),
    (infer(flag("stream", shape=[1, 1, 1])), "'stream' has shape"),
    (infer(flag("stream", contents=None)), "'stream' has no value"),
    (infer(flag("stream", contents=pb.InferTensorContents(int_contents=[1]))), "'stream' has int_contents"),
    (infer(flag("stream", contents=pb.InferTensorContents(bool_contents=[True] * 2))), "has 2 elements"),
    (infer(flag("stream"), flag("stream")), "'stream' is given twice"),
    (infer(flag("stream", parameters={"shared_memory_region": pb.InferParameter()})), "'shared_memory_region'"),
    (infer(flag("stream")), "needs ModelStreamInfer"),
    (infer(text("text_input", b"\xff")), "'text_input' is given twice"),
    (pb.ModelInferRequest(model_name=BASE, inputs=[text("text_input", b"\xff")]), "'text_input' is not UTF-8"),
    (infer(prompt=""), "prompt is empty"),
    (infer(prompt="x" * 256), "--max-model-len"),
    (infer(model=""), "no model name"),
    (infer(model="../plain"), "no adapter name"),
    (infer(id="a\x1b[31m"), "request_id"),
    (infer(raw_input_contents=[b"\0"]), "raw_input_contents has 1 entries for 2 inputs"),
    (infer(raw_input_contents=[b"\0"] * 2), "both contents and raw_input_contents"),
    (infer(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="embedding")]), "'embedding' is not known"),
    (
        infer(
            outputs=[
                pb.ModelInferRequest.InferRequestedOutputTensor(
                    name="text_output", parameters={"classification": pb.InferParameter(int64_param=1)}
                )
            ]
        ),
        "'classification'",
    ),
    (infer(parameters={"max_tokens": pb.InferParameter(int64_param=1)}), "'max_tokens' is given beside"),
]


@pytest.mark.parametrize(("request_", "message"), BAD_INPUTS)
async def test_wrong_inputs_are_named(running: Running, request_: pb.ModelInferRequest, message: str) -> None:
    error = await failure(running.open_inference.ModelInfer(request_))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message in str(error.details())


@pytest.mark.parametrize("data", [b"", b"\1\0\0", b"\5\0\0\0abc", b"\1\0\0\0abc"])
async def test_raw_bytes_that_are_no_tensor(running: Running, data: bytes) -> None:
    tensors = [
        Tensor(name="text_input", datatype="BYTES", shape=[1]),
        Tensor(name="stream", datatype="BOOL", shape=[1]),
    ]
    for contents, name in ([data, b"\0"], "text_input"), ([b"\1\0\0\0x", data], "stream"):
        request = pb.ModelInferRequest(model_name=BASE, inputs=tensors, raw_input_contents=contents)
        error = await failure(running.open_inference.ModelInfer(request))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert f"input '{name}' has {len(data)} raw bytes" in str(error.details())


BAD_PARAMETERS: list[tuple[str, str]] = [
    ("{", "is not JSON"),
    ("[" * 100_000, "nested too deeply"),
    ("[]", "is no JSON object"),
    ('{"best_of": 2}', "'best_of' is not known"),
    ('{"maxTokens": 2}', "'maxTokens' is not known"),
    ('{"max_tokens": 1.5}', "sampling.max_tokens is 1.5"),
    ('{"max_tokens": 0}', "sampling.max_tokens is 0"),
    ('{"max_tokens": -1}', "sampling.max_tokens is -1"),
    ('{"max_tokens": 1000}', "--max-model-len"),
    ('{"temperature": -1}', "sampling.temperature is -1"),
    ('{"temperature": NaN}', "sampling.temperature is nan"),
    ('{"temperature": "Infinity"}', "sampling.temperature is inf"),
    ('{"temperature": 1' + "0" * 400 + "}", "sampling.temperature is 1000"),
    ('{"n": 200000000}', "sampling.n is 200000000"),
    ('{"n": 0}', "sampling.n is 0"),
    ('{"ignore_eos": 1}', "sampling.ignore_eos is 1"),
    ('{"stop": [1]}', "sampling.stop is [1]"),
    ('{"logit_bias": {"x": 1}}', "sampling.logit_bias"),
    (f'{{"logit_bias": {{"{VOCAB_SIZE}": 1}}}}', "sampling.logit_bias"),
    ('{"lora_name": 3}', "lora_name is 3"),
]


@pytest.mark.parametrize(("parameters", "message"), BAD_PARAMETERS)
async def test_wrong_sampling_parameters_are_named(running: Running, parameters: str, message: str) -> None:
    inputs = [text("text_input", PROMPT), text("sampling_parameters", parameters)]
    error = await failure(running.open_inference.ModelInfer(pb.ModelInferRequest(model_name=BASE, inputs=inputs)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message in str(error.details())


async def test_sampling_parameters_mean_what_they_mean_in_our_own_service(running: Running) -> None:
    own: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3, "min_tokens": 2}
    own |= {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {65: 2.0}}
    own |= {"stop_token_ids": [70], "stop": ["zz"]}
    expected = await running.inference.Generate(ask(**own))
    written = {**own, "temperature": "1.5", "stop": "zz", "logit_bias": {"65": 2.0}, "logprobs": None}
    response = await running.open_inference.ModelInfer(infer(flag("exclude_input_in_output"), sampling=written))
    assert values(response)["text_output"] == [expected.text]
    off = await running.open_inference.ModelInfer(infer(sampling={"top_k": -1, "temperature": 1.0, "seed": 1}))
    everything = await running.open_inference.ModelInfer(infer(sampling={"temperature": 1.0, "seed": 1}))
    assert values(off) == values(everything)


async def test_sampling_parameters_as_parameters_of_the_request(running: Running) -> None:
    inputs = [text("text_input", PROMPT), flag("exclude_input_in_output")]
    parameters = {
        "max_tokens": pb.InferParameter(int64_param=10),
        "ignore_eos": pb.InferParameter(bool_param=True),
        "temperature": pb.InferParameter(double_param=0.0),
        "lora_name": pb.InferParameter(string_param="plain"),
    }
    response = await running.open_inference.ModelInfer(
        pb.ModelInferRequest(model_name=BASE, inputs=inputs, parameters=parameters)
    )
    assert values(response)["text_output"] == [(await running.inference.Generate(ask(adapter="plain"))).text]
    for name, parameter in ("priority", pb.InferParameter(uint64_param=1)), ("timeout", pb.InferParameter()):
        request = pb.ModelInferRequest(model_name=BASE, inputs=inputs, parameters={name: parameter})
        error = await failure(running.open_inference.ModelInfer(request))
        assert (error.code(), f"'{name}'" in str(error.details())) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_a_lora_name_goes_with_the_base_model_only(running: Running) -> None:
    named = await running.open_inference.ModelInfer(infer(model="plain"))
    beside = await running.open_inference.ModelInfer(infer(sampling={"lora_name": "plain"}))
    assert values(beside) == values(named)
    error = await failure(running.open_inference.ModelInfer(infer(model="head", sampling={"lora_name": "plain"})))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_unknown_models_and_versions(running: Running) -> None:
    for request in infer(model="nobody"), infer(model="plain", model_version="7"), infer(model_version="2"):
        error = await failure(running.open_inference.ModelInfer(request))
        assert error.code() == grpc.StatusCode.NOT_FOUND
    assert (await running.open_inference.ModelInfer(infer(model="plain", model_version="1"))).model_version == "1"


async def test_what_the_server_says_of_itself(running: Running) -> None:
    client = running.open_inference
    assert (await client.ServerLive(pb.ServerLiveRequest())).live
    assert (await client.ServerReady(pb.ServerReadyRequest())).ready
    assert (await client.ServerMetadata(pb.ServerMetadataRequest())).name == "loraplex"
    for name in BASE, "plain":
        metadata = await client.ModelMetadata(pb.ModelMetadataRequest(name=name))
        assert (metadata.name, list(metadata.versions)) == (name, ["1"])
        assert metadata.inputs[0] == pb.ModelMetadataResponse.TensorMetadata(
            name="text_input", datatype="BYTES", shape=[1]
        )
        config = (await client.ModelConfig(pb.ModelConfigRequest(name=name))).config
        assert config.model_transaction_policy.decoupled
        assert [tensor.name for tensor in config.input] == [tensor.name for tensor in metadata.inputs]
        assert config.parameters["base_model"].string_value == BASE
    assert (await failure(client.ModelConfig(pb.ModelConfigRequest(name="nobody")))).code() == grpc.StatusCode.NOT_FOUND


async def test_metadata_and_index_tell_every_version(running: Running) -> None:
    client = running.open_inference
    for version in "23":
        shutil.copytree(running.adapters_dir / "head", running.adapters_dir / "plain" / version)
    await running.engine.adapters.look("plain")
    for version, told in (("", ["1", "2", "3"]), ("2", ["2"])):
        request = pb.ModelMetadataRequest(name="plain", version=version)
        assert list((await client.ModelMetadata(request)).versions) == told
    index = await client.RepositoryIndex(pb.RepositoryIndexRequest())
    assert [model.version for model in index.models if model.name == "plain"] == ["1", "2", "3"]


async def ready(running: Running, name: str, version: str = "") -> bool:
    request = pb.ModelReadyRequest(name=name, version=version)
    return bool((await running.open_inference.ModelReady(request)).ready)


async def index(running: Running, *, only_ready: bool = False) -> dict[str, pb.RepositoryIndexResponse.ModelIndex]:
    request = pb.RepositoryIndexRequest(ready=only_ready)
    return {model.name: model for model in (await running.open_inference.RepositoryIndex(request)).models}


async def test_the_repository_is_the_adapters_folder(running: Running) -> None:
    client = running.open_inference
    before = await index(running)
    assert set(before) == {BASE, *ADAPTERS}
    assert (before["plain"].state, before["plain"].reason) == ("READY", "")
    await client.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="plain"))
    await client.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="plain"))  # anew
    assert await ready(running, "plain")

    dependents = {"unload_dependents": pb.ModelRepositoryParameter(bool_param=False)}
    unload = pb.RepositoryModelUnloadRequest(model_name="plain", parameters=dependents)
    await client.RepositoryModelUnload(unload)
    assert "plain" not in await index(running)
    assert not await ready(running, "plain")
    assert (await failure(client.ModelInfer(infer(model="plain")))).code() == grpc.StatusCode.NOT_FOUND
    assert (await failure(client.RepositoryModelUnload(unload))).code() == grpc.StatusCode.NOT_FOUND


async def test_an_adapter_that_was_refused_is_not_ready(running: Running) -> None:
    (running.adapters_dir / "head" / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    load = pb.RepositoryModelLoadRequest(model_name="head")
    error = await failure(running.open_inference.RepositoryModelLoad(load))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    refused = (await index(running))["head"]
    assert (refused.state, bool(refused.reason)) == ("UNAVAILABLE", True)
    assert "head" not in await index(running, only_ready=True)
    assert not await ready(running, "head")


async def test_names_that_are_not_ready(running: Running) -> None:
    assert [await ready(running, name) for name in (BASE, "nobody", "", "../x")] == [True, False, False, False]
    assert [await ready(running, "plain", version) for version in ("1", "7", "x")] == [True, False, False]
    shutil.copytree(running.adapters_dir / "plain", running.adapters_dir / "new")
    (running.adapters_dir / "new" / "routing.json").write_text("{")
    await running.engine.adapters.look("new")
    assert [await ready(running, "new", version) for version in ("", "1")] == [
        False,
        True,
    ]  # nobody knows which it means
    await running.engine.admission.drain(grace=1)
    assert not (await running.open_inference.ServerReady(pb.ServerReadyRequest())).ready
    assert not await ready(running, BASE)


async def test_wrong_questions_to_the_repository(running: Running) -> None:
    client = running.open_inference
    config = {"config": pb.ModelRepositoryParameter(string_param="{}")}
    for call in (
        client.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="other")),
        client.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=BASE)),
        client.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=BASE)),
        client.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="plain", parameters=config)),
        client.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="plain", parameters=config)),
    ):
        assert (await failure(call)).code() == grpc.StatusCode.INVALID_ARGUMENT
    load = pb.RepositoryModelLoadRequest(model_name="nobody")
    assert (await failure(client.RepositoryModelLoad(load))).code() == grpc.StatusCode.NOT_FOUND


async def test_statistics_count_what_was_answered(running: Running) -> None:
    client = running.open_inference
    await client.ModelInfer(infer(model="plain"))
    await stream(running, infer(flag("stream"), model="plain"))
    await failure(client.ModelInfer(infer(model="plain", prompt="")))
    answer = await client.ModelStatistics(pb.ModelStatisticsRequest(name="plain"))
    [counts] = answer.model_stats
    assert (counts.name, counts.version, counts.inference_count) == ("plain", "1", 2)
    assert (counts.inference_stats.success.count, counts.inference_stats.fail.count) == (2, 1)
    assert counts.execution_count == 2
    assert counts.inference_stats.success.ns > 0
    assert counts.last_inference > 0
    everything = (await client.ModelStatistics(pb.ModelStatisticsRequest())).model_stats
    assert {counts.name: counts.inference_count for counts in everything} == {
        **dict.fromkeys([BASE, *ADAPTERS], 0),
        "plain": 2,
    }


async def test_statistics_tell_where_the_time_of_answers_went(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_slowly(*args: Any) -> AdapterFiles:
        time.sleep(0.05)
        return read_adapter(*args)

    monkeypatch.setattr("server.lora.loader.read_adapter", read_slowly)
    client = running.open_inference
    await client.ModelInfer(infer(model="plain", sampling={"n": 2, "temperature": 1, "seed": 1}))
    await stream(running, infer(flag("stream"), model="plain"))
    await failure(client.ModelInfer(infer(model="plain", prompt="")))
    [counts] = (await client.ModelStatistics(pb.ModelStatisticsRequest(name="plain"))).model_stats
    stats = counts.inference_stats
    parts = [stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output]
    assert all(part.count == 2 and part.ns > 0 for part in parts)
    assert sum(part.ns for part in parts) == pytest.approx(stats.success.ns, abs=10)
    assert stats.queue.ns > 0.05e9


async def test_statistics_count_the_version_that_answered(running: Running) -> None:
    """Not the one that the name means, where shares of the traffic go elsewhere."""
    shutil.copytree(running.adapters_dir / "head", running.adapters_dir / "plain" / "2")
    await running.engine.adapters.look("plain")
    await running.adapters.PromoteVersion(adapters_pb2.PromoteVersionRequest(name="plain", version="1"))
    await running.adapters.SetTraffic(adapters_pb2.SetTrafficRequest(name="plain", percent_by_version={"2": 100}))
    client = running.open_inference
    assert (await client.ModelInfer(infer(model="plain"))).model_version == "2"
    await stream(running, infer(flag("stream"), model="plain"))
    answer = await client.ModelStatistics(pb.ModelStatisticsRequest())
    asked = {(one.name, one.version): one.inference_count for one in answer.model_stats if one.inference_count}
    assert asked == {("plain", "2"): 2}


def test_statistics_of_models_that_went_are_dropped() -> None:
    statistics = ModelStatistics(lambda name, _: name == "stays")
    timer = RequestTimer(Metrics(CollectorRegistry()), 1)
    timer.first_step = timer.last_token = timer.arrival
    statistics.succeeded("stays", "1", timer.arrival, [timer])
    for number in range(1000):
        statistics.succeeded(f"adapter-{number}", "1", timer.arrival, [timer])
    counts = [statistics.of(f"adapter-{number}", "1").inference_count for number in range(1000)]
    assert sum(counts) < 200
    assert counts[-1] == statistics.of("stays", "1").inference_count == 1


async def test_a_model_takes_few_bytes_of_an_index_that_cannot_be_paged(running: Running) -> None:
    """Clients take 4 MiB by default: here some hundred thousand adapters."""
    index = await running.open_inference.RepositoryIndex(pb.RepositoryIndexRequest())
    statistics = await running.open_inference.ModelStatistics(pb.ModelStatisticsRequest())
    for models in index.models, statistics.model_stats:
        assert len(models) == 1 + len(ADAPTERS)
        assert all(model.ByteSize() - len(model.name) <= 16 for model in models)


async def test_sampling_is_greedy_unless_asked(running: Running) -> None:
    inputs = [text("text_input", PROMPT), flag("exclude_input_in_output")]
    response = await running.open_inference.ModelInfer(pb.ModelInferRequest(model_name=BASE, inputs=inputs))
    expected = await running.inference.Generate(inference_pb2.GenerateRequest(prompt=PROMPT))
    assert values(response)["text_output"] == [expected.text]
