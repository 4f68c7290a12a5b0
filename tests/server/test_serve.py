"""The command `serve` as its users run it: a process, its banner, its clients, its end."""

import asyncio
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from loadtest.environment import commit
from server import throughput_log
from server.cli import main
from server.config import EngineConfig, ServerConfig
from server.pb.loraplex.v1 import adapters_pb2
from server.pb.loraplex.v1 import inference_pb2 as pb
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub
from server.serve import serve
from tests.conftest import ADAPTERS
from tests.server.server_process import Server

LORAPLEX = Path(sys.executable).with_name("loraplex")
BUF = Path(sys.executable).with_name("buf")


def loraplex(*arguments: str, **settings: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(LORAPLEX), *arguments], capture_output=True, text=True, timeout=120, check=False, **settings
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(model_dir: Path, adapters_dir: Path) -> Iterator[Server]:
    running = Server(model_dir, adapters_dir)
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.banner


def test_the_start_says_how_far_it_is_and_then_what_runs(server: Server, model_dir: Path, adapters_dir: Path) -> None:
    """Every line of it, in order; addresses are those that were bound, not those that were asked for."""
    lines = [re.sub(r"^\S+ \S+ INFO +", "", line) for line in server.banner.splitlines()]
    patterns = [
        rf"loading {model_dir} on cpu",
        r"loaded in \d+\.\d s; packing the weights for 32 adapter slots",
        r"fused: .+",
        r"checking steps against the model's own answers",
        rf"Loraplex {version('loraplex')}, torch {re.escape(version('torch'))}, Python \d+\.\d+\.\d+",
        r"model     tiny: LlamaForCausalLM, float32 on cpu, digest [0-9a-f]{12}",
        r"check     packed and chunked steps answer as the model itself, logits within \d\.\de-\d\d",
        r"KV cache  [\d,]+ blocks of 16 tokens, [\d,]+ MiB of float32; requests up to 256 tokens",
        rf"adapters  {len(ADAPTERS)} in {adapters_dir}; 32 device slots, rank up to 64, kernels: \w.*",
        rf"listening gRPC {server.address}, metrics 127\.0\.0\.1:[1-9]\d*, reflection on, no TLS, no authentication",
        rf"ready: listening on {server.address}",
    ]
    assert len(lines) == len(patterns), server.banner
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}"
    assert not server.address.endswith(":0")


def test_client_commands(server: Server) -> None:
    """The first as a process of its own, which is what leaves a shell with an exit code and two streams."""
    address = ["--address", server.address]

    def said(*words: str) -> str:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(main, [*words[:2], *address, *words[2:]])
        assert done.exit_code == 0, done.output
        return done.stdout

    answer = loraplex("generate", *address, "--adapter", "plain", "--max-tokens", "5", "hello")
    assert answer.returncode == 0, answer.stderr
    assert said("generate", "--chat", "--max-tokens", "5", "hello")
    assert "SERVING" in said("health")
    listed = said("adapters", "list")
    assert all(name in listed for name in ADAPTERS)
    assert "rank 8" in said("adapters", "load", "--replace", "plain")
    assert "freed" in said("adapters", "unload", "plain")
    gone = loraplex("generate", *address, "--adapter", "plain", "hello")
    assert gone.returncode == 1
    assert re.fullmatch(r"Error: NOT_FOUND from .*'plain' is not known here.*\n", gone.stderr)
    assert said("adapters", "load", "plain")


def test_load_test(server: Server, tmp_path: Path) -> None:
    arguments = ["--num-requests", "12", "--concurrency", "4", "--prompt-tokens", "8:16", "--output", str(tmp_path)]
    done = loraplex("loadtest", "run", "--address", server.address, *arguments, "--adapters", "plain,attention")
    assert done.returncode == 0, done.stderr
    assert "12 requests" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["codes"] == {"OK": 12}
    failed = loraplex("loadtest", "run", "--address", server.address, *arguments, "--adapters", "nobody")
    assert failed.returncode == 1
    assert "12 requests failed, the first with NOT_FOUND" in failed.stderr


def test_the_page_of_a_load_test_shows_the_server(server: Server, tmp_path: Path) -> None:
    """Its memory over time, and its machine and versions beside the client's."""
    arguments = ["--address", server.address, "--metrics-url", f"http://{server.metrics_address}/metrics"]
    arguments += [
        "--rate",
        "8",
        "--duration",
        "2",
        "--num-adapters",
        "2",
        "--prompt-tokens",
        "8:16",
        "--output-tokens",
        "2:8",
    ]
    done = loraplex("loadtest", "run", *arguments, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    times, sizes = zip(*report["runs"][0]["memory"], strict=True)
    assert list(times) == sorted(times)
    assert times[-1] > 1
    assert min(sizes) > 50 << 20  # bytes: an interpreter with torch
    told = report["server"]
    assert told["torch"] == version("torch")
    assert told["native kernels"]
    assert told.get("commit", "") == commit(Path(__file__)), "none where this is no checkout"
    assert report["settings"]["max-num-batched-tokens"] == "2048"
    assert f"version {told['version']}" in done.stdout
    assert "max-num-batched-tokens 2048" in " ".join(done.stdout.split())
    page = (tmp_path / "report.html").read_text()
    assert "Resident memory of the server" in page
    facts = page[page.index("<b>Server</b>") :]
    assert all(escape(told[key]) in facts for key in ("processor", "memory", "torch", "transformers", "grpcio"))
    assert all(name in facts for name in report["settings"])
    assert told.get("commit", "") in facts
    assert "cold: on disk" in page


def test_a_load_test_whose_server_is_killed(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> None:
    """Also where adapters come and go; what was measured until then is kept."""
    server = Server(model_dir, adapters_dir)
    lengths = ["--prompt-tokens", "2:8", "--output-tokens", "2:8", "--output", str(tmp_path)]
    command = [str(LORAPLEX), "loadtest", "run", "--address", server.address, "--workload", "churn", *lengths]
    with (
        subprocess.Popen(
            [*command, "--num-adapters", "4", "--rate", "40"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as load,
        grpc.insecure_channel(server.address) as channel,
    ):
        request = adapters_pb2.ListAdaptersRequest()
        while not any(
            one.name.startswith("loadtest-churn") for one in AdaptersStub(channel).ListAdapters(request).adapters
        ):
            time.sleep(0.05)
        time.sleep(2)
        server.signal(signal.SIGKILL)
        _, error = load.communicate(timeout=60)
    server.wait()
    assert load.returncode == 1
    assert re.fullmatch(r"Error: the server was lost \S+ s into the run: .*\n", error)
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["codes"]["OK"] > 0


def test_metrics(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        request = pb.GenerateRequest(prompt="x", adapter="head", sampling=pb.SamplingParams(max_tokens=3))
        InferenceStub(channel).Generate(request)
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as response:
        text = response.read().decode()
    assert re.search(r'loraplex_generation_tokens_total\{adapter="head"\} [1-9]', text)
    assert "loraplex_time_to_first_token_seconds_bucket" in text


def test_a_reflection_client_that_is_not_ours(server: Server) -> None:
    buf = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    url = f"http://{server.address}"
    listed = subprocess.run([*buf, "--list-services", url], capture_output=True, text=True, check=True).stdout
    assert "loraplex.v1.Inference" in listed
    data = '{"prompt": "hello", "adapter": "attention", "sampling": {"maxTokens": 4, "ignoreEos": true}}'
    command = [*buf, "--data", data, f"{url}/loraplex.v1.Inference/Generate"]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert answer["usage"]["completionTokens"] == 4
    assert answer["adapter"]["name"] == "attention"
    health = subprocess.run(
        [*buf, "--data", "{}", f"{url}/grpc.health.v1.Health/Check"], capture_output=True, text=True, check=True
    )
    assert "SERVING" in health.stdout


def test_sigterm_drains(model_dir: Path, adapters_dir: Path) -> None:
    server = Server(model_dir, adapters_dir, "--log-format", "json")
    with grpc.insecure_channel(server.address) as channel:
        stub = InferenceStub(channel)
        sampling = pb.SamplingParams(max_tokens=200, ignore_eos=True)
        call = stub.GenerateStream(pb.GenerateRequest(prompt="x", adapter="plain", sampling=sampling))
        num_tokens = len(next(call).token_ids)
        server.signal(signal.SIGTERM)
        assert num_tokens + sum(len(message.token_ids) for message in call) == 200
    assert server.wait() == 0
    messages = [json.loads(line)["message"] for line in server.banner.splitlines()]
    assert any(message.startswith("draining") for message in messages)


def test_the_banner_names_adapters_that_cannot_be_served(model_dir: Path, make_adapter: Callable[..., Path]) -> None:
    """The first ten of them; a name counts once, however many versions it has."""
    good = make_adapter("good")
    make_adapter("good/2")
    make_adapter("wide", r=16)
    (make_adapter("broken") / "adapter_config.json").write_text("{")
    for number in range(3, 14):
        shutil.copytree(good.parent / "broken", good.parent / "broken" / str(number))
    server = Server(model_dir, good.parent, "--max-lora-rank", "8", "--admin-listen", "127.0.0.1:0")
    assert server.stop() == 0
    assert f"adapters  3 of 15 versions in {good.parent}" in server.banner
    refused = dict(re.findall(r"refused   (\S+@\d+): (.*)", server.banner))
    assert list(refused) == ["broken@1", *[f"broken@{number}" for number in range(3, 12)]]
    assert "not valid JSON" in refused["broken@1"]
    assert "refused   3 more: see 'loraplex adapters list'" in server.banner
    ports = re.findall(r"127\.0\.0\.1:([1-9]\d*)", server.banner)
    assert f"listening gRPC 127.0.0.1:{ports[0]}, for operators 127.0.0.1:{ports[1]}, metrics" in server.banner
    assert f"ready: listening on 127.0.0.1:{ports[0]} and 127.0.0.1:{ports[1]}" in server.banner


async def test_a_line_tells_what_was_done_and_none_that_nothing_was(
    model_dir: Path, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(throughput_log, "INTERVAL", 0.1)
    caplog.set_level("INFO")
    engine_config = EngineConfig(model=str(model_dir), device="cpu")
    config = ServerConfig(adapters_dir=adapters_dir, listen="127.0.0.1:0", metrics_listen="")
    serving = asyncio.create_task(serve(engine_config, config))

    async def lines(pattern: str) -> list[str]:
        async with asyncio.timeout(60):
            while not (found := [text for text in caplog.messages if re.match(pattern, text)]):
                assert not serving.done()
                await asyncio.sleep(0.01)
        return found

    [ready] = await lines("ready: listening on ")
    assert gc.get_freeze_count() > 0  # no collection looks at the model and the libraries any more
    async with grpc.aio.insecure_channel(ready.rpartition(" ")[2]) as channel:
        await asyncio.sleep(0.3)
        assert not [text for text in caplog.messages if "tokens/s" in text]
        sampling = pb.SamplingParams(max_tokens=10, ignore_eos=True)
        await InferenceStub(channel).Generate(pb.GenerateRequest(prompt="x", sampling=sampling))
    await lines(r"\d running, ")
    await asyncio.sleep(0.3)  # for what there may be in a second line, but no more
    rates = re.findall(r"prompt ([\d.]+) and generation ([\d.]+) tokens/s, KV cache \d", "\n".join(caplog.messages))
    assert sum(float(prompt) for prompt, _ in rates) == 10  # one token in 0.1 s
    assert sum(float(generation) for _, generation in rates) == 100
    os.kill(os.getpid(), signal.SIGTERM)
    assert await serving == 0
    assert gc.get_freeze_count() == 0


def test_a_second_signal_stops_at_once(model_dir: Path, adapters_dir: Path) -> None:
    server = Server(model_dir, adapters_dir)
    with grpc.insecure_channel(server.address) as channel:
        sampling = pb.SamplingParams(max_tokens=240, ignore_eos=True)
        calls = [
            InferenceStub(channel).GenerateStream(pb.GenerateRequest(prompt="x", sampling=sampling)) for _ in range(64)
        ]
        next(calls[0])
        started = time.monotonic()
        for _ in range(2):
            server.signal(signal.SIGTERM)
            time.sleep(0.1)
        assert server.wait() == 0
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "/nowhere"], "--model /nowhere: no such folder"),
        (["--model", "{empty}"], "has no config.json"),
        (["--max-model-len", "100000"], "the model was made for 256 tokens"),
        (["--kv-cache-bytes", "1000"], "raise --kv-cache-bytes or lower --max-model-len"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--max-num-seqs", "5000"], "--max-num-batched-tokens"),
        (
            ["--listen", "127.0.0.1:{taken}", "--model", "/nowhere"],
            "--listen 127.0.0.1:{taken}: [Errno",
        ),
        (["--listen", "nonsense"], "--listen nonsense: "),
        (["--listen", "127.0.0.1:99999"], "--listen 127.0.0.1:99999: "),
        (["--metrics-listen", "127.0.0.1:{taken}"], "--metrics-listen 127.0.0.1:{taken}"),
        (["--metrics-listen", "nonsense"], "--metrics-listen nonsense"),
        (["--metrics-listen", ":{taken}"], "--metrics-listen :{taken}: [Errno"),
        (["--config", "/nowhere.yaml"], "--config"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    model_dir: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"empty": str(tmp_path), "taken": str(taken.getsockname()[1])}
        defaults = ["--model", str(model_dir), "--listen", "127.0.0.1:0", "--metrics-listen", "", "--device", "cpu"]
        done = CliRunner().invoke(main, ["serve", *defaults, *[argument.format(**names) for argument in arguments]])
    assert done.exit_code == 2, done.output
    error = done.output.splitlines()[-1]
    assert error.startswith("Error: ")
    assert reason.format(**names) in error
