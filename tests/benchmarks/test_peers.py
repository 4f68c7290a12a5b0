"""The jobs of the peers, and llama.cpp's driver against a stand-in for its server."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.peers.__main__ import Job
from benchmarks.peers.llama_cpp_peer import load

# Answers as `llama-server` does, with what it was told in place of tokens.
SERVER = f"""#!{sys.executable}
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"build_info": json.dumps([sys.argv[1:], os.environ.get("LLAMA_ARG_N_PREDICT")])}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        [lora] = body.get("lora") or [{{"id": -1}}]
        self.answer({{"tokens": [body["id_slot"], lora["id"], body["n_predict"], *body["prompt"]]}})

    def answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def job(server: Path, adapters: list[str], num_prompts: int = 4, prompt_tokens: int = 2) -> Job:
    prompts = [[100 + row] * prompt_tokens for row in range(num_prompts)]
    choices = [row % len(adapters) for row in range(num_prompts) if adapters]
    return Job("model.gguf", adapters, choices, prompts, output_tokens=8, threads=3, options={"server": str(server)})


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_requests_by_adapter() -> None:
    assert job(Path(), ["a", "b", "c"], num_prompts=5).groups() == [(0, [0, 3]), (1, [1, 4]), (2, [2])]
    skewed = replace(job(Path(), ["a", "b", "c"]), choices=[2, 0, 2, 2])
    assert skewed.groups() == [(0, [1]), (2, [0, 2, 3])]
    assert job(Path(), []).groups() == [(None, [0, 1, 2, 3])]


def test_llama_cpp_gets_each_request_with_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one adapter have slots side by side; nothing from the environment changes how the server runs."""
    monkeypatch.setenv("LLAMA_ARG_N_PREDICT", "1")
    server = executable(tmp_path / "llama-server", SERVER)
    with load(job(server, ["a.gguf", "b.gguf"])) as (version, generate):
        assert generate(8) == [[0, 0, 8, 100, 100], [2, 1, 8, 101, 101], [1, 0, 8, 102, 102], [3, 1, 8, 103, 103]]
    command, variable = json.loads(version.removeprefix("llama.cpp "))
    assert variable is None
    flags = dict(pairwise(command))
    assert flags["--model"] == "model.gguf"
    assert flags["--lora"] == "a.gguf,b.gguf"
    assert "--lora-init-without-apply" in command
    assert flags["--threads"] == flags["--threads-batch"] == "3"
    assert (flags["--parallel"], flags["--ctx-size"]) == ("4", str(4 * 256))


def test_llama_cpp_with_skewed_choices(tmp_path: Path) -> None:
    server = executable(tmp_path / "llama-server", SERVER)
    with load(replace(job(server, ["a.gguf", "b.gguf", "c.gguf"]), choices=[2, 0, 2, 2])) as (_, generate):
        assert [tokens[:2] for tokens in generate(8)] == [[1, 2], [0, 0], [2, 2], [3, 2]]


def test_llama_cpp_without_adapters(tmp_path: Path) -> None:
    """Of 241 tokens and 8 more, with room to spare: a slot takes whole steps of 256."""
    server = executable(tmp_path / "llama-server", SERVER)
    with load(job(server, [], num_prompts=1, prompt_tokens=241)) as (version, generate):
        assert generate(3)[0][:3] == [0, -1, 3]
    command, _ = json.loads(version.removeprefix("llama.cpp "))
    assert command[command.index("--ctx-size") + 1] == "512"
    assert not any("lora" in argument for argument in command)


def test_a_llama_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    server = executable(tmp_path / "llama-server", "#!/bin/sh\necho 'error: no such model'\nexit 1\n")
    with pytest.raises(RuntimeError, match="llama-server did not start: error: no such model"), load(job(server, [])):
        pass
