"""The Inference service through real clients: answers, streams, and every way of asking wrongly."""

import asyncio
import math
import re
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prometheus_client import generate_latest

from server.lora.adapter import Adapter
from server.pb.loraplex.v1 import inference_pb2 as pb
from server.pb.loraplex.v1.adapters_pb2 import ListAdaptersRequest
from tests.conftest import ADAPTERS, EOS, VOCAB_SIZE, byte_tokenizer
from tests.server.rpc.conftest import Running, Serve

PROMPT = "Tell me 👋"


def ask(prompt: str = PROMPT, adapter: str = "", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=prompt, adapter=adapter, sampling=pb.SamplingParams(**{"max_tokens": 10, "ignore_eos": True, **sampling})
    )


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_one_answer(running: Running) -> None:
    answer = await running.inference.Generate(ask())
    assert len(answer.token_ids) == 10
    assert answer.text == byte_tokenizer().decode(answer.token_ids, skip_special_tokens=True)
    assert answer.finish_reason == pb.LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT.encode()), 10)
    assert not answer.HasField("adapter")


async def test_a_stream_is_the_answer_in_pieces(running: Running) -> None:
    answer = await running.inference.Generate(ask(adapter="plain", logprobs=3))
    messages = [message async for message in running.inference.GenerateStream(ask(adapter="plain", logprobs=3))]
    assert "".join(message.text for message in messages) == answer.text
    assert [token for message in messages for token in message.token_ids] == list(answer.token_ids)
    assert [logprob for message in messages for logprob in message.logprobs] == list(answer.logprobs)
    assert [message.finish_reason for message in messages[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(messages) - 1)
    assert messages[-1].usage == answer.usage
    assert answer.adapter.name == "plain"
    assert len(answer.adapter.digest) == 64


async def test_all_kinds_of_input_are_one(running: Running) -> None:
    token_ids = byte_tokenizer()(PROMPT)["input_ids"]
    assert (await running.inference.Tokenize(pb.TokenizeRequest(prompt=PROMPT))).token_ids == token_ids
    by_text = await running.inference.Generate(ask())
    by_ids = ask()
    by_ids.prompt_token_ids.ids[:] = token_ids
    assert (await running.inference.Generate(by_ids)).token_ids == by_text.token_ids

    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hello")])
    rendered = "[user]hello[assistant]"
    tokenized = await running.inference.Tokenize(pb.TokenizeRequest(chat=chat))
    assert bytes(tokenized.token_ids) == bytes(byte_tokenizer()(rendered)["input_ids"])
    request = ask()
    request.chat.CopyFrom(chat)
    assert (await running.inference.Generate(request)).token_ids == (
        await running.inference.Generate(ask(rendered))
    ).token_ids


async def test_a_mixed_volley_answers_as_each_alone(running: Running) -> None:
    names = (["", *ADAPTERS] * 2)[: 16 + 8]  # as many as run and wait
    alone = [list((await running.inference.Generate(ask(f"{PROMPT} {name}", name))).token_ids) for name in names]
    together = await asyncio.gather(*[running.inference.Generate(ask(f"{PROMPT} {name}", name)) for name in names])
    assert [list(answer.token_ids) for answer in together] == alone
    shared = running.metrics.registry.get_sample_value("loraplex_adapter_shared_steps_total", {"adapter": "plain"})
    assert shared
    assert shared > 0


async def test_several_answers_to_one_prompt(running: Running) -> None:
    request = ask(n=3, temperature=1.5, seed=5)
    tokens: dict[int, list[int]] = {}
    async for message in running.inference.GenerateStream(request):
        tokens.setdefault(message.index, []).extend(message.token_ids)
    assert sorted(tokens) == [0, 1, 2]
    assert len({tuple(ids) for ids in tokens.values()}) == 3
    second = await running.inference.Generate(ask(temperature=1.5, seed=6))
    assert tokens[1] == list(second.token_ids)


async def test_stop_strings_and_stop_tokens(running: Running) -> None:
    whole = await running.inference.Generate(ask(max_tokens=40))
    stop = whole.text[5:7]
    answer = await running.inference.Generate(ask(max_tokens=40, stop=[stop]))
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == pb.STOP
    assert answer.usage.completion_tokens < 40

    token_id = whole.token_ids[4]
    first = list(whole.token_ids).index(token_id)
    answer = await running.inference.Generate(ask(max_tokens=40, stop_token_ids=[token_id]))
    assert list(answer.token_ids) == list(whole.token_ids)[: first + 1]
    assert answer.text == byte_tokenizer().decode(whole.token_ids[:first], skip_special_tokens=True)


async def test_the_end_of_sequence_ends_unless_ignored(running: Running) -> None:
    bias = {EOS: 100.0}
    answer = await running.inference.Generate(ask(logit_bias=bias, ignore_eos=False))
    assert (list(answer.token_ids), answer.text, answer.finish_reason) == ([EOS], "", pb.STOP)
    answer = await running.inference.Generate(ask(logit_bias=bias, ignore_eos=False, min_tokens=3))
    assert answer.usage.completion_tokens == 4
    answer = await running.inference.Generate(ask(logit_bias=bias))
    assert list(answer.token_ids) == [EOS] * 10


async def test_model_info(running: Running) -> None:
    info = await running.inference.GetModelInfo(pb.GetModelInfoRequest())
    assert info.architecture == "LlamaForCausalLM"
    assert (info.vocab_size, info.max_model_len, info.dtype, info.device) == (VOCAB_SIZE, 256, "float32", "cpu")
    assert info.base_digest == running.parts.base.digest


async def test_model_info_tells_the_settings_that_shape_speed(serve: Serve) -> None:
    """Those that were given, and what was chosen where the choice was the server's."""
    given = {"max_num_batched_tokens": 96, "prefix_cache": False, "merge_policy": "off", "adapter_slots": 3}
    async with serve(given, adapter_host_bytes=1 << 24) as running:
        info = await running.inference.GetModelInfo(pb.GetModelInfoRequest())
        expected = {
            "max-num-seqs": "16",
            "max-num-batched-tokens": "96",
            "prefix-cache": "off",
            "merge-policy": "off",
            "adapter-slots": "3",
            "adapter-host-bytes": str(1 << 24),
            "kv-cache-bytes": str(running.parts.kv_cache_bytes),
            "kv-cache-dtype": "float32",
            "threads": str(torch.get_num_threads()),
            "kernels": running.parts.runner.lora.kernels_name,
        }
        assert expected.items() <= info.settings.items()
        assert info.settings["lora-dtype"]
        assert "model" not in info.settings, "it may be a path"


async def test_an_answer_tells_where_the_adapter_was_found(serve: Serve) -> None:
    tier = pb.AdapterIdentity.Tier
    async with serve({"adapter_slots": 2}) as running:
        found = []
        for name in ("plain", "plain", "attention", "head", "plain"):
            messages = [message async for message in running.inference.GenerateStream(ask(adapter=name))]
            [only] = {message.adapter.tier for message in messages}  # a stream says the same all along
            found.append(only)
        assert found == [tier.DISK, tier.DEVICE, tier.DISK, tier.DISK, tier.HOST]
        mix = [pb.AdapterWeight(adapter=name, weight=0.5) for name in ("plain", "rslora")]
        answer = await running.inference.Generate(pb.GenerateRequest(prompt=PROMPT, mix=mix))
        assert [part.tier for part in answer.mix] == [tier.DEVICE, tier.DISK]


BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**32 - 1}, "max_tokens"),
    ({"min_tokens": 11}, "min_tokens"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": 1e38}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
    ({"top_k": VOCAB_SIZE + 1}, "top_k"),
    ({"min_p": 2.0}, "min_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"repetition_penalty": math.nan}, "repetition_penalty"),
    ({"presence_penalty": 3.0}, "presence_penalty"),
    ({"frequency_penalty": -3.0}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"logprobs": VOCAB_SIZE}, "logprobs"),
    ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
    ({"logit_bias": {1: math.nan}}, "logit_bias"),
    ({"logit_bias": dict.fromkeys(range(2000), 1.0)}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop": ["x" * 1_000_000]}, "stop"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
]


@pytest.mark.parametrize(("sampling", "field"), BAD_SAMPLING)
async def test_sampling_out_of_range(running: Running, sampling: dict[str, Any], field: str) -> None:
    error = await failure(running.inference.GenerateStream(ask(**sampling)).read())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"sampling.{field}" in str(error.details())
    violation = error_details_pb2.BadRequest()
    assert any(detail.Unpack(violation) for detail in rpc_status.from_call(error).details)
    assert violation.field_violations[0].field == f"sampling.{field}"


def mix(weights: dict[str, float], **fields: Any) -> pb.GenerateRequest:
    parts = [pb.AdapterWeight(adapter=name, weight=weight) for name, weight in weights.items()]
    return pb.GenerateRequest(
        prompt=PROMPT, sampling=pb.SamplingParams(max_tokens=10, ignore_eos=True), mix=parts, **fields
    )


async def test_mixtures_and_scales(running: Running) -> None:
    """A mixture of one is that adapter; a scale and a weight are the same thing; every answer says what made it."""
    generate = running.inference.Generate
    alone = await generate(ask(adapter="plain"))
    assert (await generate(mix({"plain": 1}))).token_ids == alone.token_ids
    assert alone.adapter.weight == 1
    scaled = await generate(mix({}, adapter="plain", adapter_scale=0.5))
    assert scaled.token_ids == (await generate(mix({"plain": 0.5}))).token_ids != alone.token_ids
    assert (scaled.adapter.name, scaled.adapter.weight) == ("plain", 0.5)
    mixed = await generate(mix({"plain": 0.5, "feed-forward": -2}))
    assert [(part.name, part.weight) for part in mixed.mix] == [("plain", 0.5), ("feed-forward", -2)]
    assert not mixed.HasField("adapter")
    assert mixed.token_ids != scaled.token_ids


async def test_a_mixture_is_counted_as_one_and_found_by_its_parts(running: Running) -> None:
    await running.inference.Generate(ask(adapter="plain"))
    await running.inference.Generate(mix({"plain": 0.5, "attention": -2}))
    metrics = generate_latest(running.metrics.registry).decode()
    for line in (
        'loraplex_adapter_requests_total{adapter="mixture"} 1.0',
        'loraplex_generation_tokens_total{adapter="mixture"} 10.0',
        'loraplex_adapter_steps_total{adapter="mixture"} 10.0',
        'loraplex_adapter_requests_total{adapter="plain"} 1.0',
        'loraplex_adapter_hits_total{adapter="plain",tier="device"} 1.0',
    ):
        assert line in metrics
    assert "+" not in "".join(re.findall(r'adapter="[^"]*"', metrics))


BAD_REQUESTS: list[tuple[pb.GenerateRequest, grpc.StatusCode, str]] = [
    (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "no input"),
    (pb.GenerateRequest(prompt=""), grpc.StatusCode.INVALID_ARGUMENT, "prompt is empty"),
    (pb.GenerateRequest(prompt_token_ids=pb.TokenIds()), grpc.StatusCode.INVALID_ARGUMENT, "prompt_token_ids is empty"),
    (pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[1, VOCAB_SIZE])), grpc.StatusCode.INVALID_ARGUMENT, "263"),
    (ask("x" * 256), grpc.StatusCode.INVALID_ARGUMENT, "--max-model-len"),
    (ask("x" * 5_000_000), grpc.StatusCode.INVALID_ARGUMENT, "--max-model-len"),
    (ask("x" * 250), grpc.StatusCode.INVALID_ARGUMENT, "together they may be 256"),
    (ask(adapter="nobody"), grpc.StatusCode.NOT_FOUND, "nobody"),
    (ask(adapter="plain@7"), grpc.StatusCode.NOT_FOUND, "plain@7"),
    (ask(adapter="../plain"), grpc.StatusCode.INVALID_ARGUMENT, "no adapter name"),
    (pb.GenerateRequest(chat=pb.Chat()), grpc.StatusCode.INVALID_ARGUMENT, "no messages"),
    (
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="root", content="x")])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "'root'",
    ),
    (pb.GenerateRequest(prompt="x", request_id="a\x1b[31m"), grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
    (ask(n=2), grpc.StatusCode.INVALID_ARGUMENT, "GenerateStream"),
    (mix({"plain": 0.5, "nobody": 0.5}), grpc.StatusCode.NOT_FOUND, "nobody"),
    (mix({"plain": math.nan}), grpc.StatusCode.INVALID_ARGUMENT, "mix.weight is nan"),
    (mix({"plain": 11}), grpc.StatusCode.INVALID_ARGUMENT, "mix.weight is 11; it must be from -10 to 10"),
    (mix({"plain": 1, "plain@1": 1}), grpc.StatusCode.INVALID_ARGUMENT, "twice"),
    (mix({f"a{index}": 1 for index in range(9)}), grpc.StatusCode.INVALID_ARGUMENT, "9 adapters; the limit is 8"),
    (mix({"plain": 1}, adapter="plain"), grpc.StatusCode.INVALID_ARGUMENT, "instead of adapter"),
    (mix({}, adapter="plain", adapter_scale=-11), grpc.StatusCode.INVALID_ARGUMENT, "adapter_scale is -11"),
    (mix({}, adapter_scale=1), grpc.StatusCode.INVALID_ARGUMENT, "no adapter"),
]


@pytest.mark.parametrize(("request_", "code", "text"), BAD_REQUESTS)
async def test_bad_requests(running: Running, request_: pb.GenerateRequest, code: grpc.StatusCode, text: str) -> None:
    error = await failure(running.inference.Generate(request_))
    assert error.code() == code
    assert text in str(error.details())


async def test_the_longest_prompt_that_fits(running: Running) -> None:
    answer = await running.inference.Generate(ask("x" * 255, max_tokens=1))
    assert answer.usage.prompt_tokens == 255


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x12\x02\xff\xfe", b"\x0a"])
async def test_unreadable_messages(running: Running, data: bytes) -> None:
    """Garbage, bad UTF-8 and a truncated message are the client's fault, and the connection lives on."""
    for method in ("Generate", "GenerateStream"):
        raw: Any = running.channel.unary_unary(f"/loraplex.v1.Inference/{method}")
        error = await failure(raw(data))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (await running.inference.Generate(ask())).token_ids


async def test_a_bug_of_ours_shows_only_an_incident(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.engine, "generate", lambda *_: 1 / 0)
    error = await failure(running.inference.Generate(ask()))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert str(error.details()).startswith("internal error, incident ")
    assert "division" not in str(error.details())


async def test_a_step_that_crashes_fails_its_requests_and_no_others(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (await running.inference.Generate(ask())).token_ids
    forward = running.parts.runner.forward

    def crash(batch: Any) -> Any:
        monkeypatch.setattr(running.parts.runner, "forward", forward)
        raise MemoryError("secret")

    monkeypatch.setattr(running.parts.runner, "forward", crash)
    error = await failure(running.inference.Generate(ask(adapter="plain")))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    assert (await running.inference.Generate(ask())).token_ids == expected
    assert (await running.inference.Generate(ask(adapter="plain"))).token_ids
    assert running.parts.scheduler.allocator.usage == 0


async def test_a_step_that_crashes_leaves_no_weights_in_slots(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = running.parts.runner.lora
    write, slots = lora.write, dict[int, Adapter | None]()

    def written(slot: int, adapter: Adapter | None) -> None:
        slots[slot] = adapter
        write(slot, adapter)

    monkeypatch.setattr(lora, "write", written)
    monkeypatch.setattr(running.parts.runner, "forward", lambda batch: 1 / 0)
    await failure(running.inference.Generate(ask(adapter="plain")))
    assert list(slots.values()) == [None]


async def test_a_row_that_is_not_finite_fails_alone(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (await running.inference.Generate(ask(adapter="attention"))).token_ids
    sick = await running.engine.adapters.load("plain", "", replace=True)
    next(iter(sick.weights.values())).lora_b.fill_(math.nan)
    bad, good = await asyncio.gather(
        failure(running.inference.Generate(ask(adapter="plain"))),
        running.inference.Generate(ask(adapter="attention")),
    )
    assert bad.code() == grpc.StatusCode.INTERNAL
    assert good.token_ids == expected


async def idle(running: Running) -> None:
    """Waits until the engine has let go of everything, which takes it a step or two."""
    async with asyncio.timeout(5):
        while running.parts.scheduler.has_work or running.parts.scheduler.allocator.usage:
            await asyncio.sleep(0.005)


async def test_a_client_that_goes_away_frees_its_blocks(running: Running) -> None:
    call = running.inference.GenerateStream(ask(max_tokens=240))
    await call.read()
    assert running.parts.scheduler.allocator.usage > 0
    call.cancel()
    await idle(running)
    assert (await running.adapters.ListAdapters(ListAdaptersRequest())).adapters


async def test_a_deadline_ends_running_and_waiting_requests(running: Running) -> None:
    calls = [running.inference.Generate(ask(max_tokens=240, adapter="plain"), timeout=0.05) for _ in range(20)]
    for call in calls:
        assert (await failure(call)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await idle(running)


async def test_a_full_queue_refuses(running: Running) -> None:
    calls = [asyncio.create_task(failure_or_answer(running, ask(max_tokens=240))) for _ in range(40)]
    results = await asyncio.gather(*calls)
    codes = [result.code() for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 16  # 16 run, 8 wait
    error = next(result for result in results if isinstance(result, grpc.aio.AioRpcError))
    assert "--max-waiting" in str(error.details())
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)


async def failure_or_answer(running: Running, request: pb.GenerateRequest) -> Any:
    try:
        return await running.inference.Generate(request)
    except grpc.aio.AioRpcError as error:
        return error


async def test_draining_refuses_new_requests_and_finishes_the_running(running: Running) -> None:
    health = health_pb2_grpc.HealthStub(running.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    call = running.inference.Generate(ask(max_tokens=100))
    async with asyncio.timeout(5):
        while not running.parts.scheduler.has_work:
            await asyncio.sleep(0.001)
    draining = asyncio.create_task(running.engine.admission.drain(grace=10))
    await asyncio.sleep(0)
    assert (await failure(running.inference.Generate(ask()))).code() == grpc.StatusCode.UNAVAILABLE
    assert len((await call).token_ids) == 100
    assert await draining


async def test_a_dead_engine_says_so(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> Any:
        raise SystemExit("the scheduler is broken")

    monkeypatch.setattr(running.parts.scheduler, "schedule", die)
    error = await failure(running.inference.Generate(ask()))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert running.engine.died.is_set()
    assert (await failure(running.inference.Generate(ask()))).code() == grpc.StatusCode.UNAVAILABLE
