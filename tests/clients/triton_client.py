"""NVIDIA's client of the Open Inference Protocol against a running server: `triton_client.py ADDRESS [CA [KEY CHAIN]]`.

With files, which are PEM, over TLS, with a certificate of its own or without.

A process of its own: the client and the server's stubs both register `inference.ModelInferRequest`.
"""

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.grpc import InferInput, KeepAliveOptions
from tritonclient.utils import InferenceServerException

BASE, ADAPTER = "tiny", "plain"
PROMPT = "Once upon a time"


def inputs(prompt: str = PROMPT, *, stream: bool = False, max_tokens: int = 10) -> list[InferInput]:
    values = {
        "text_input": np.array([prompt.encode()], dtype=object),
        "stream": np.array([stream]),
        "exclude_input_in_output": np.array([True]),
        "sampling_parameters": np.array([json.dumps({"max_tokens": max_tokens, "ignore_eos": True})], dtype=object),
    }
    tensors = []
    for name, value in values.items():
        tensors.append(InferInput(name, [1], "BOOL" if value.dtype == bool else "BYTES"))
        tensors[-1].set_data_from_numpy(value)
    return tensors


def text(result: tritonclient.grpc.InferResult) -> str:
    return b"".join(result.as_numpy("text_output")).decode()


def check_what_it_says_of_itself(client: tritonclient.grpc.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(BASE)
    assert client.is_model_ready(ADAPTER)
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata().name == "loraplex"
    assert client.get_model_metadata(ADAPTER).inputs[0].name == "text_input"
    assert client.get_model_config(ADAPTER).config.model_transaction_policy.decoupled
    assert {model.name for model in client.get_model_repository_index().models} >= {BASE, ADAPTER}
    client.unload_model("head")
    assert not client.is_model_ready("head")
    client.load_model("head")
    assert client.is_model_ready("head")


def check_answers(client: tritonclient.grpc.InferenceServerClient) -> str:
    plain = text(client.infer(ADAPTER, inputs()))
    assert plain
    assert plain != text(client.infer(BASE, inputs()))
    assert plain == text(client.infer(ADAPTER, inputs(), compression_algorithm="gzip"))
    counts = client.get_inference_statistics(ADAPTER).model_stats[0]
    assert (counts.inference_count, counts.inference_stats.compute_infer.count) == (2, 2)
    assert 0 < counts.inference_stats.queue.ns < counts.inference_stats.success.ns
    with pytest.raises(InferenceServerException, match="NOT_FOUND"):
        client.infer("nobody", inputs())
    with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        client.infer(ADAPTER, inputs(max_tokens=200), client_timeout=0.01)
    return plain


def check_stream(client: tritonclient.grpc.InferenceServerClient, expected: str) -> None:
    """Two streams side by side and one that fails: each piece carries its request's id."""
    responses: queue.Queue[tuple[tritonclient.grpc.InferResult | None, Exception | None]] = queue.Queue()
    client.start_stream(callback=lambda result, error: responses.put((result, error)))
    for request_id in ("one", "two"):
        client.async_stream_infer(ADAPTER, inputs(stream=True), request_id=request_id)
    client.async_stream_infer("nobody", inputs(stream=True), request_id="three")
    pieces: dict[str, str] = {"one": "", "two": ""}
    errors, finished = 0, 0
    while finished < 2 or not errors:
        result, error = responses.get(timeout=30)
        if error is not None:
            errors += 1
            continue
        assert result is not None
        response = result.get_response()
        pieces[response.id] += text(result)
        finished += response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    assert pieces == {"one": expected, "two": expected}
    client.start_stream(callback=lambda result, error: responses.put((result, error)))
    client.async_stream_infer(ADAPTER, inputs(stream=True, max_tokens=200))
    responses.get(timeout=30)
    client.stop_stream(cancel_requests=True)


def check_cancel(client: tritonclient.grpc.InferenceServerClient) -> None:
    """A call that is given up ends at once, and the connection goes on."""
    ended: queue.Queue[tuple[tritonclient.grpc.InferResult | None, Exception | None]] = queue.Queue()
    call = client.async_infer(
        ADAPTER, inputs(max_tokens=200), callback=lambda result, error: ended.put((result, error))
    )
    call.cancel()
    result, error = ended.get(timeout=30)
    assert result is None
    assert error is not None
    assert "CANCELLED" in str(error)
    assert client.is_server_live()


async def check_asyncio(address: str, expected: str, **settings: Any) -> None:
    async with tritonclient.grpc.aio.InferenceServerClient(address, **settings) as client:  # type: ignore[attr-defined]
        answers = await asyncio.gather(*[client.infer(ADAPTER, inputs()) for _ in range(4)])
        assert [text(answer) for answer in answers] == [expected] * 4

        async def requests(max_tokens: int = 10) -> AsyncIterator[dict[str, Any]]:
            for model in ADAPTER, "nobody":
                yield {"model_name": model, "inputs": inputs(stream=True, max_tokens=max_tokens)}

        pieces, errors = [], []
        async for result, error in client.stream_infer(requests(), compression_algorithm="gzip"):
            if error is None:
                pieces.append(text(result))
            else:
                errors.append(error.message())
        assert "".join(pieces) == expected
        assert len(errors) == 1
        assert "nobody" in errors[0]

        responses = client.stream_infer(requests(max_tokens=200))
        await anext(aiter(responses))
        assert responses.cancel()
        with pytest.raises(asyncio.CancelledError):
            async for _ in responses:
                pass


def main(address: str, *files: str) -> None:
    names = ("root_certificates", "private_key", "certificate_chain")
    tls: dict[str, Any] = {"ssl": True, **dict(zip(names, files, strict=False))} if files else {}
    keepalive = KeepAliveOptions(keepalive_time_ms=10_000, keepalive_timeout_ms=5_000)
    client = tritonclient.grpc.InferenceServerClient(address, keepalive_options=keepalive, **tls)
    if files:
        expected = text(client.infer(ADAPTER, inputs()))
    else:
        check_what_it_says_of_itself(client)
        expected = check_answers(client)
    check_stream(client, expected)
    check_cancel(client)
    asyncio.run(check_asyncio(address, expected, **tls))


if __name__ == "__main__":
    main(*sys.argv[1:])
