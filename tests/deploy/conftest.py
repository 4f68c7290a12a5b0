"""A served model that a real Prometheus scrapes, with the configuration and the rules of deploy/."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.pb.loraplex.v1 import inference_pb2 as pb
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub
from tests.server.server_process import Server
from tests.server.test_serve import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
REQUESTS = {"plain": 4, "attention": 2, "head": 1, "rslora": 1, "": 2}  # by adapter, of which two get a metric's label
TOKENS = 6


@dataclass(frozen=True)
class Monitored:
    """The metrics endpoint of a server that has answered REQUESTS, and the Prometheus that watches it."""

    metrics_url: str
    prometheus_url: str

    def exposition(self) -> str:
        with urllib.request.urlopen(self.metrics_url) as response:
            return str(response.read().decode())

    def api(self, path: str, **parameters: str) -> Any:
        """The data of an answer of Prometheus' HTTP API."""
        url = f"{self.prometheus_url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """Values of an instant query, by the labels that are not the scrape's own."""
        return {
            tuple(
                value for key, value in sorted(sample["metric"].items()) if key not in ("__name__", "job", "instance")
            ): float(sample["value"][1])
            for sample in self.api("query", query=expression)["result"]
        }

    def wait_for(self, expression: str) -> None:
        """Until the query answers something."""
        deadline = time.monotonic() + 30
        while not self.query(expression):
            assert time.monotonic() < deadline, f"{expression} stays empty"
            time.sleep(0.2)


@pytest.fixture(scope="package")
def monitored(
    model_dir: Path, adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory, require_tool: Callable[[str], str]
) -> Iterator[Monitored]:
    program = require_tool("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    targets = f"127.0.0.1:{free_port()}"
    config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    config = re.sub(r"interval: \d+s", "interval: 500ms", config.replace("server:9090", targets))
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    server = Server(model_dir, adapters_dir, "--metrics-listen", targets, "--metrics-adapters", "2")
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as prometheus:
        try:
            watched = Monitored(f"http://{targets}/metrics", f"http://{address}")
            _wait_until_up(watched)
            _send_requests(server.address)
            watched.wait_for(f'loraplex_requests_total{{finish_reason="length"}} == {sum(REQUESTS.values())}')
            yield watched
        finally:
            prometheus.terminate()
            assert server.stop() == 0


def _wait_until_up(monitored: Monitored) -> None:
    """Until Prometheus answers and has scraped once, so that what happens next counts as an increase."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{monitored.prometheus_url}/-/ready").close()
            if monitored.query("up == 1"):
                return
        assert time.monotonic() < deadline, "Prometheus does not come up"
        time.sleep(0.2)


def _send_requests(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = InferenceStub(channel)
        sampling = pb.SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        prompt = "the same forty characters for every call"
        for adapter, count in REQUESTS.items():
            for _ in range(count):
                stub.Generate(pb.GenerateRequest(prompt=prompt, adapter=adapter, sampling=sampling))
        with pytest.raises(grpc.RpcError):
            stub.Generate(pb.GenerateRequest(prompt=prompt, adapter="nobody"))
