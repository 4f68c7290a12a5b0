"""llama.cpp's server over HTTP on the loopback address: option `server` is the path of `llama-server`.

It batches only requests of the same adapter. With one KV buffer a slot (`--no-kv-unified`) it attends to less, but then
batches only slots that lie side by side: requests of one adapter get neighbouring slots. It is fastest like that.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.peers.__main__ import Job, Loaded

SLOT_STEP = 256  # a slot's context is rounded up to this
LOAD_SECONDS = 300


@contextmanager
def load(job: Job) -> Iterator[Loaded]:
    port = _free_port()
    # LLAMA_ARG_… variables are settings of the server: it is to run with those below alone.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            _command(job, port), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _wait_until_ready(server, port, log)
            slots = {row: slot for slot, row in enumerate(row for _, rows in job.groups() for row in rows)}

            def generate(num_tokens: int) -> list[list[int]]:
                with ThreadPoolExecutor(len(job.prompts)) as pool:
                    return list(
                        pool.map(lambda row: _complete(port, job, row, slots[row], num_tokens), range(len(job.prompts)))
                    )

            yield f"llama.cpp {_call(port, 'GET', '/props')['build_info']}", generate
        finally:
            server.terminate()
            server.wait()


def _command(job: Job, port: int) -> list[str]:
    slot_tokens = -(-(len(job.prompts[0]) + job.output_tokens + 8) // SLOT_STEP) * SLOT_STEP
    command = [job.options["server"], "--model", job.model, "--host", "127.0.0.1", "--port", str(port), "--offline"]
    command += ["--threads", str(job.threads), "--threads-batch", str(job.threads)]
    command += ["--parallel", str(len(job.prompts)), "--ctx-size", str(len(job.prompts) * slot_tokens)]
    command += ["--cont-batching", "--no-kv-unified", "--batch-size", "2048", "--ubatch-size", "512"]
    # Nothing of the warm-up may be found again.
    command += ["--no-cache-prompt", "--cache-ram", "0", "--slot-prompt-similarity", "0", "--fit", "off"]
    if job.adapters:
        command += ["--lora", ",".join(job.adapters), "--lora-init-without-apply"]
    return command


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + LOAD_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            _call(port, "GET", "/health")
        except (OSError, RuntimeError):
            time.sleep(0.05)
        else:
            return
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    raise RuntimeError(f"llama-server did not start: {lines[-1] if lines else 'it said nothing'}")


def _complete(port: int, job: Job, row: int, slot: int, num_tokens: int) -> list[int]:
    request: dict[str, Any] = {
        "prompt": job.prompts[row],
        "n_predict": num_tokens,
        "samplers": ["top_k"],
        "top_k": 1,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
        "id_slot": slot,
    }
    if job.adapters:
        request["lora"] = [{"id": job.choices[row], "scale": 1.0}]
    return _call(port, "POST", "/completion", request)["tokens"]  # type: ignore[no-any-return]


def _call(port: int, method: str, path: str, body: Any = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise RuntimeError(f"llama-server answers {method} {path} with {response.status}: {text[:300]}")
    return json.loads(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
