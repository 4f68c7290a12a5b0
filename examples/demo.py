"""The whole path in one go: train an adapter per task, serve them on one base model, and ask all of them at once.

Run by `make demo`. Leaves data, adapters and the server's log in build/demo, and exits with 1 if an adapter does not do
what it was trained for or the base model could do it anyway.
"""

import argparse
import asyncio
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adapters.tasks import TASKS, write_task
from loadtest.client import CallResult, volley
from server.pb.loraplex.v1.inference_pb2 import GenerateRequest, SamplingParams

LORAPLEX = Path(sys.executable).with_name("loraplex")
MODEL = "smollm2-135m"
BASE_FAILS_BELOW, ADAPTER_PASSES_FROM = 0.30, 0.90  # exact match on the test split
console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/demo"))
    folder: Path = parser.parse_args().folder
    started = time.monotonic()
    for name in TASKS:
        write_task(name, folder / "data" / name)
        train(name, folder)
    with serving(folder) as (address, metrics_url):
        console.rule("one concurrent batch: every test item, to its adapter and to the base")
        results, wall = asyncio.run(volley(address, requests(folder), concurrency=64))
        with urllib.request.urlopen(metrics_url) as response:
            metrics = response.read().decode()
    passed = show(folder, results, wall, metrics)
    console.print(f"done in {time.monotonic() - started:.0f} s; try: make serve, then")
    console.print(
        f"  .venv/bin/loraplex generate --adapter dates --stop '\\n' $'{first_prompt(folder)}'", soft_wrap=True
    )
    return 0 if passed else 1


def train(name: str, folder: Path) -> None:
    console.rule(f"training {name}")
    data = folder / "data" / name
    command = [str(LORAPLEX), "train", "--model", MODEL, "--out", str(folder / "adapters" / name)]
    command += ["--data", str(data / "train.jsonl"), "--eval-data", str(data / "validation.jsonl")]
    for key, value in asdict(TASKS[name].config).items():
        command += flag(key, value)
    subprocess.run(command, check=True)


def flag(key: str, value: object) -> list[str]:
    text = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{text}" if value else f"--no-{text}"]
    return [f"--{text}", ",".join(value) if isinstance(value, tuple) else str(value)]


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, str]]:
    """A server on the trained adapters; its addresses once it is ready."""
    address, metrics = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    command = [str(LORAPLEX), "serve", "--model", MODEL, "--adapters-dir", str(folder / "adapters")]
    command += ["--listen", address, "--metrics-listen", metrics, "--max-model-len", "512"]
    console.rule("starting the server")
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while "ready:" not in log.read_text():
                if server.poll() is not None:
                    sys.exit(f"the server ended:\n{log.read_text()}")
                time.sleep(0.2)
            console.print(log.read_text().strip(), soft_wrap=True)
            yield address, f"http://{metrics}/metrics"
        finally:
            server.terminate()
            server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_items(folder: Path, name: str) -> list[dict[str, str]]:
    lines = (folder / "data" / name / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def first_prompt(folder: Path) -> str:
    return test_items(folder, "dates")[0]["prompt"].replace("\n", "\\n")


def requests(folder: Path) -> list[GenerateRequest]:
    """Every test item twice, for the adapter and for the base, tasks taking turns."""
    sampling = SamplingParams(max_tokens=48, stop=["\n"])
    made: list[GenerateRequest] = []
    for items in zip(*[test_items(folder, name) for name in TASKS], strict=True):
        for name, item in zip(TASKS, items, strict=True):
            made += [
                GenerateRequest(adapter=adapter, prompt=item["prompt"], sampling=sampling, request_id=name)
                for adapter in (name, "")
            ]
    return made


def show(folder: Path, results: list[CallResult], wall: float, metrics: str) -> bool:
    """Prints the table; says whether every adapter passes what the base fails."""
    failed = [result for result in results if not result.ok]
    if failed:
        console.print(f"{len(failed)} requests failed, the first with {failed[0].code}: {failed[0].details}")
        return False
    table = Table(title=f"{len(results)} requests in {wall:.1f} s")
    for title in ("task", "base", "adapter", "tokens/s", "forward steps", "shared with others"):
        table.add_column(title, justify="left" if title == "task" else "right")
    passed = True
    for index, name in enumerate(TASKS):
        expected = [item["completion"].strip() for item in test_items(folder, name)]
        of_adapter = results[2 * index :: 2 * len(TASKS)]
        of_base = results[2 * index + 1 :: 2 * len(TASKS)]
        adapter, base = accuracy(of_adapter, expected), accuracy(of_base, expected)
        passed = passed and adapter >= ADAPTER_PASSES_FROM and base < BASE_FAILS_BELOW
        speed = sum(result.num_tokens for result in of_adapter) / wall
        steps, shared = steps_of(metrics, name)
        table.add_row(
            name, f"{base:.0%}", f"{adapter:.0%}", f"{speed:.1f}", f"{steps}", f"{shared} ({shared / steps:.0%})"
        )
    speed = sum(result.num_tokens for result in results if not result.adapter) / wall
    steps, shared = steps_of(metrics, "base")
    table.add_row("(base model)", "", "", f"{speed:.1f}", f"{steps}", f"{shared} ({shared / steps:.0%})")
    total = sum(result.num_tokens for result in results) / wall
    table.add_row("all", "", "", f"{total:.1f}", "", "")
    console.print(table)
    if not passed:
        console.print(f"not as it should be: the base must stay below {BASE_FAILS_BELOW:.0%}, "
                      f"the adapters must reach {ADAPTER_PASSES_FROM:.0%}")  # fmt: skip
    return passed


def accuracy(results: list[CallResult], expected: list[str]) -> float:
    """Share of answers that are exactly right, white space around them aside."""
    return sum(result.text.strip() == answer for result, answer in zip(results, expected, strict=True)) / len(expected)


def steps_of(metrics: str, adapter: str) -> tuple[int, int]:
    """Forward steps that held tokens of an adapter, and those that held tokens of others too."""
    counts = []
    for name in ("adapter_steps", "adapter_shared_steps"):
        found = re.search(rf'^loraplex_{name}_total\{{adapter="{adapter}"\}} (\S+)$', metrics, re.MULTILINE)
        counts.append(int(float(found.group(1))) if found else 0)
    return counts[0], counts[1]


if __name__ == "__main__":
    sys.exit(main())
