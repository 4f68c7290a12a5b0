"""Clients that know nothing of our protocols learn them by reflection: `buf curl` as one of them."""

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from server.pb.inference import grpc_service_pb2 as pb
from server.rpc.server import SERVICES
from tests.server.rpc.conftest import Running
from tests.server.rpc.test_inference import ask
from tests.server.rpc.test_open_inference import flag, infer

BUF = Path(sys.executable).with_name("buf")


async def curl(running: Running, path: str, *options: str) -> list[Any]:
    """What `buf curl` prints, one JSON message or one word after the other."""
    command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *options]
    process = await asyncio.create_subprocess_exec(
        *command, f"http://{running.address}{path}", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    text, found, decoder = output.decode().strip(), [], json.JSONDecoder()
    while text.startswith("{"):
        message, end = decoder.raw_decode(text)
        found.append(message)
        text = text[end:].strip()
    return found or text.split()


def text_output(response: dict[str, Any]) -> str:
    [output] = response["outputs"]
    return base64.b64decode(output["contents"]["bytesContents"][0]).decode()


async def test_every_service_is_listed_and_healthy(running: Running) -> None:
    assert set(SERVICES) < set(await curl(running, "", "--list-services"))
    for service in SERVICES:
        data = json.dumps({"service": service})
        assert await curl(running, "/grpc.health.v1.Health/Check", "--data", data) == [{"status": "SERVING"}]


async def test_an_inference(running: Running) -> None:
    request = json_format.MessageToJson(infer(flag("exclude_input_in_output"), model="plain"))
    [answer] = await curl(running, "/inference.GRPCInferenceService/ModelInfer", "--data", request)
    assert (answer["modelName"], answer["modelVersion"]) == ("plain", "1")
    assert text_output(answer) == (await running.inference.Generate(ask(adapter="plain"))).text


async def test_a_stream_of_inferences(running: Running) -> None:
    requests: list[pb.ModelInferRequest] = [infer(flag("stream"), model=name, id=name) for name in ("plain", "head")]
    data = "\n".join(json_format.MessageToJson(request) for request in requests)
    answers = await curl(running, "/inference.GRPCInferenceService/ModelStreamInfer", "--data", data)
    for name in "plain", "head":
        pieces = [answer["inferResponse"] for answer in answers if answer["inferResponse"]["id"] == name]
        assert pieces[-1]["parameters"]["triton_final_response"] == {"boolParam": True}
        expected = await running.inference.Generate(ask(adapter=name))
        assert "".join(text_output(piece) for piece in pieces) == expected.text
