"""`loraplex chat` as its users run it, on a pipe and on a terminal, against a real server."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from server.chat_answers import Answer, columns
from server.pb.loraplex.v1 import inference_pb2 as pb
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub
from tests.conftest import ADAPTERS
from tests.server.server_process import Server
from tests.server.test_serve import LORAPLEX, free_port

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def server(model_dir: Path, adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a model that can answer for longer than a test lasts."""
    model = tmp_path_factory.mktemp("long") / "tiny"
    shutil.copytree(model_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 50_000}))
    running = Server(model, adapters_dir)
    yield running
    assert running.stop() == 0


def chat(server: Server, *lines: str, arguments: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    command = [str(LORAPLEX), "chat", "--address", server.address, "--max-tokens", "12", *arguments]
    return subprocess.run(
        command,
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=120,
        check=False,
    )


def answer(server: Server, adapter: str, *said: str) -> str:
    """The server's own, to a conversation whose roles take turns."""
    roles = ("user", "assistant")
    messages = [pb.ChatMessage(role=roles[index % 2], content=text) for index, text in enumerate(said)]
    request = pb.GenerateRequest(
        adapter=adapter, chat=pb.Chat(messages=messages), sampling=pb.SamplingParams(max_tokens=12)
    )
    with grpc.insecure_channel(server.address) as channel:
        return str(InferenceStub(channel).Generate(request).text)


def test_a_conversation_goes_on_with_another_adapter(server: Server) -> None:
    done = chat(server, "hello", "/adapter plain", "and you?", "/reset", "hello")
    assert (done.returncode, done.stderr) == (0, "")
    first = answer(server, "", "hello")
    second = answer(server, "plain", "hello", first, "and you?")
    assert done.stdout == f"{first}\n{second}\n{answer(server, 'plain', 'hello')}\n"


def test_several_are_asked_at_once(server: Server) -> None:
    done = chat(server, "/compare base plain head@1", "hello", "/base", "again")
    assert (done.returncode, done.stderr) == (0, "")
    answers = {name: answer(server, adapter, "hello") for name, adapter in
               (("base", ""), ("plain", "plain"), ("head@1", "head"))}  # fmt: skip
    assert len(set(answers.values())) == 3
    compared = "".join(f"[{name}] {text}\n" for name, text in answers.items())
    assert done.stdout == f"{compared}{answer(server, '', 'hello', answers['base'], 'again')}\n"


def test_commands(server: Server) -> None:
    done = chat(server, "/set max_tokens 3", "/set seed 7", "/set seed", "/set", "/adapters", "/help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "max_tokens 3\n" in done.stdout
    assert "seed 7" not in done.stdout
    for name in ADAPTERS:
        assert f"\n{name}@1  READY\n" in done.stdout
    assert "tiny@1" not in done.stdout
    for command in ("/adapter NAME", "/compare NAME NAME", "/system [TEXT]", "/reset"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/adapter nobody", "no adapter 'nobody' on this server; /adapters lists them"),
        ("/adapter tiny", "no adapter 'tiny' on this server"),
        ("/adapter ../plain", "no adapter '../plain' on this server"),
        ("caf\udce9", r"a line is not UTF-8: 'caf\udce9'"),
        ("/adapter", "/adapter takes one NAME"),
        ("/compare plain", "/compare takes two names or more"),
        ("/compare plain nobody", "no adapter 'nobody'"),
        ("/sing", "no command /sing; /help lists them"),
        ("/set temperature hot", "temperature cannot be 'hot'"),
    ],
)
def test_an_error_is_one_line_and_the_chat_goes_on(server: Server, line: str, reason: str) -> None:
    done = chat(server, line, "hello")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {reason}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == f"{answer(server, '', 'hello')}\n"


def test_what_the_server_refuses_is_not_part_of_the_conversation(server: Server) -> None:
    done = chat(server, "/set top_p 7", "hello", "/set top_p", "/adapter plain@9", "hello", "/base", "hello")
    assert done.returncode == 1
    assert [line.partition(" from ")[0] for line in done.stderr.splitlines()] == [
        "Error: INVALID_ARGUMENT",
        "Error: NOT_FOUND",
    ]
    assert done.stdout.strip() == answer(server, "", "hello").strip()


def test_where_clients_change_no_adapters(model_dir: Path, adapters_dir: Path) -> None:
    """Also at an address without the Adapters service."""
    server = Server(model_dir, adapters_dir, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
    try:
        server.address = server.address.partition(" and ")[0]
        done = chat(server, "/adapters", "/adapter plain", "hello", "/compare plain base", "hello")
        assert (done.returncode, done.stderr) == (0, "")
        assert "plain@1  READY" in done.stdout
        assert answer(server, "plain", "hello") in done.stdout
    finally:
        assert server.stop() == 0


def test_answers_in_columns_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"[b]one[/b]": Answer(text=":smile: [red]text[/red]")}
    Console(width=80).print(columns(answers))
    shown = capsys.readouterr().out
    assert "[b]one[/b]" in shown
    assert ":smile: [red]text[/red]" in shown


def test_no_server_at_the_start() -> None:
    done = subprocess.run(
        [str(LORAPLEX), "chat", "--address", f"127.0.0.1:{free_port()}"],
        input="hello\n", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(r"Error: UNAVAILABLE from 127.0.0.1:\d+: .*\n", done.stderr)


class Terminal:
    """A chat on a pseudo terminal; what it shows is read without its colours and movements."""

    def __init__(self, address: str, *arguments: str) -> None:
        self._screen, terminal = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        command = [str(LORAPLEX), "chat", "--address", address, *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C typed there is a signal here
        )
        os.close(terminal)
        self._shown = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def wait_for(self, pattern: str, again: str = "") -> str:
        """Until it shows the pattern; gives what it showed until the end of that, and drops it.

        `again` is typed whenever a second has shown nothing.
        """
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self._shown, re.MULTILINE)):
            assert time.monotonic() < deadline, self._shown
            if not select.select([self._screen], [], [], 1)[0]:
                self.type(again)
            else:
                self._shown = ESCAPES.sub("", self._shown + os.read(self._screen, 65_536).decode(errors="replace"))
        shown, self._shown = self._shown[: found.end()], self._shown[found.end() :]
        return shown

    def close(self) -> None:
        os.close(self._screen)
        self.process.kill()
        self.process.wait()


@contextmanager
def terminal(server: Server, *arguments: str) -> Iterator[Terminal]:
    opened = Terminal(server.address, *arguments)
    try:
        yield opened
    finally:
        opened.close()


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(server: Server) -> None:
    with terminal(server, "--max-tokens", "40000") as chat:
        chat.wait_for("^base> ")
        chat.type("/set ignore_eos true\n")
        chat.wait_for("^base> ")
        chat.type("\x03")  # nothing runs: only the line is given up
        # Again, since readline misses one that comes between its prompt and its wait for keys.
        chat.wait_for("^base> ", again="\x03")
        chat.type("hello\n")
        chat.wait_for(r"hello\r\n.{20}")
        chat.type("\x03")
        chat.wait_for(r"\(stopped\)")
        chat.wait_for("^base> ")
        chat.type("/adapter plain\n")
        chat.wait_for("^plain> ")
        chat.type("\x04")
        assert chat.process.wait(timeout=30) == 0
    with grpc.insecure_channel(server.address) as channel:  # the server has nobody left to answer
        InferenceStub(channel).Generate(pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(max_tokens=1)))


def test_columns_on_a_terminal(server: Server) -> None:
    with terminal(server, "--adapter", "plain", "--adapter", "head", "--max-tokens", "5") as chat:
        chat.wait_for("^plain, head> ")
        chat.type("hello\n")
        shown = chat.wait_for("^plain, head> ")
        assert re.search(r"┃ plain +┃ head +┃", shown)
        assert re.search(r"│ \d tokens in \d+\.\d s +│ \d tokens in", shown)


def test_the_chat_outlives_its_server(model_dir: Path, adapters_dir: Path) -> None:
    server = Server(model_dir, adapters_dir)
    with terminal(server, "--max-tokens", "5") as chat:
        chat.wait_for("^base> ")
        chat.type("hello\n")
        chat.wait_for("^base> ")
        assert server.stop() == 0
        for line in ("hello\n", "/adapters\n"):
            chat.type(line)
            chat.wait_for(r"Error: UNAVAILABLE from \S+: ")
            chat.wait_for("^base> ")
        chat.type("\x04")
        assert chat.process.wait(timeout=30) == 0
