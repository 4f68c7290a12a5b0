"""`loraplex chat`: a conversation in the terminal, with one adapter or with several side by side. Main thread."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import grpc

from loadtest.channel import connect
from server.chat_answers import Answer, shown, stream
from server.client_commands import address_option, ca_file
from server.conversation import BASE, ChatError, Conversation, Turn
from server.pb.inference.grpc_service_pb2 import ModelMetadataRequest, RepositoryIndexRequest, RepositoryIndexResponse
from server.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from server.pb.loraplex.v1 import inference_pb2
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub


@click.command()
@address_option
@click.option("--adapter", "adapters", multiple=True, help="NAME or NAME@VERSION; several are asked side by side.")
@click.option("--system", default="", help="The system message.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of an answer.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: greedy.")
def chat(address: str, adapters: tuple[str, ...], system: str, max_tokens: int, temperature: float) -> None:
    """Talk to a server; adapters are switched by commands, /help lists them.

    Ctrl-C stops an answer, Ctrl-D leaves. Lines of a pipe are prompts and commands too; the exit code then is 1 if
    one of them failed.
    """
    sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature)
    conversation = Conversation(adapters=list(adapters) or [BASE], system=system, sampling=sampling)
    with asyncio.Runner() as runner:
        session = ChatSession(runner, address, ca_file(), conversation)
        try:
            failed = session.run()
        finally:
            session.close()
    if failed and not sys.stdin.isatty():
        raise SystemExit(1)


class ChatSession:
    """Owns the connection and the conversation. The event loop runs only while something is asked of the server."""

    def __init__(self, runner: asyncio.Runner, address: str, ca: Path | None, conversation: Conversation) -> None:
        self._runner = runner
        self._address = address
        self._conversation = conversation
        self._num_errors = 0
        self._commands: dict[str, tuple[str, Callable[[str], None], str]] = {
            "/adapter": ("NAME", self._adapter, "talk to an adapter"),
            "/base": ("", self._base, "talk to the base model"),
            "/compare": ("NAME NAME …", self._compare, f"talk to several at once; {BASE} is the base model"),
            "/adapters": ("", self._list, "list the server's adapters"),
            "/system": ("[TEXT]", self._system, "set the system message, or take it away"),
            "/set": (
                "[NAME [JSON]]",
                self._set,
                "show the sampling parameters, or set one, as in /set temperature 0.7",
            ),
            "/reset": ("", self._reset, "forget what was said"),
            "/help": ("", self._help, "list these commands"),
        }
        self._channel = runner.run(_connect(address, ca))
        self._inference = InferenceStub(self._channel)
        self._models = GRPCInferenceServiceStub(self._channel)
        self._base_name = ""  # told when it starts

    def run(self) -> int:
        """Until the input ends; gives the number of errors.

        Raises:
            click.ClickException: there is no server at the start.
        """
        try:
            model = self._runner.run(self._model())
        except grpc.aio.AioRpcError as error:
            raise click.ClickException(self._failure(error)) from error
        self._base_name = model.name
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # read on, and complain of the line
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() a history and keys to edit with
            click.echo(f"{model.name} at {self._address}; /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = input(f"{', '.join(self._conversation.adapters)}> " if interactive else "").strip()
            except EOFError:
                if interactive:
                    click.echo()
                return self._num_errors
            except KeyboardInterrupt:  # nothing is running: the line is given up
                click.echo()
                continue
            with self._one_line_errors():
                self._take(line)

    def close(self) -> None:
        self._runner.run(self._channel.close())

    def _take(self, line: str) -> None:
        """One line: a command or a prompt."""
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise ChatError(f"a line is not UTF-8: {ascii(line)[:80]}") from error
        if not line.startswith("/"):
            if line:
                self._ask(line)
            return
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ChatError(f"no command {name}; /help lists them")
        self._commands[name][1](rest.strip())

    def _ask(self, prompt: str) -> None:
        conversation = self._conversation
        requests = {adapter: conversation.request(adapter, prompt) for adapter in conversation.adapters}
        answers = {adapter: Answer() for adapter in requests}
        stopped = False
        with shown(answers):
            try:
                self._runner.run(stream(self._inference, requests, answers))
            except KeyboardInterrupt:
                stopped = True
        if stopped:
            click.echo("(stopped)")
        for answer in answers.values():
            if answer.failure:
                self._complain(self._failure(answer.failure))
        if said := {adapter: answer.text for adapter, answer in answers.items() if answer.text}:
            conversation.turns.append(Turn(prompt, said))

    async def _model(self) -> inference_pb2.ModelInfo:
        model: inference_pb2.ModelInfo = await self._inference.GetModelInfo(inference_pb2.GetModelInfoRequest())
        return model

    async def _is_adapter(self, name: str) -> bool:
        """The Open Inference Protocol knows: unlike the Adapters service, it is at every address of a server."""
        try:
            await self._models.ModelMetadata(ModelMetadataRequest(name=name))
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                raise
            return False
        return name != self._base_name

    async def _index(self) -> list[RepositoryIndexResponse.ModelIndex]:
        index = await self._models.RepositoryIndex(RepositoryIndexRequest())
        return [model for model in index.models if model.name != self._base_name]

    def _choose(self, names: list[str]) -> None:
        for name in names:
            bare_name = name.partition("@")[0]
            if bare_name != BASE and not self._runner.run(self._is_adapter(bare_name)):
                raise ChatError(f"no adapter {name!r} on this server; /adapters lists them")
        self._conversation.adapters = names

    def _adapter(self, name: str) -> None:
        if not name or " " in name:
            raise ChatError("/adapter takes one NAME or NAME@VERSION; /compare takes several")
        self._choose([name])

    def _base(self, _: str) -> None:
        self._conversation.adapters = [BASE]

    def _compare(self, names: str) -> None:
        chosen = list(dict.fromkeys(names.split()))
        if len(chosen) < 2:
            raise ChatError(f"/compare takes two names or more, as in /compare {BASE} NAME")
        self._choose(chosen)

    def _list(self, _: str) -> None:
        for model in self._runner.run(self._index()):
            click.echo(f"{model.name}@{model.version}  {model.state}{model.reason and ': '}{model.reason}")

    def _system(self, text: str) -> None:
        self._conversation.system = text

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            self._conversation.set(name, value.strip())
        else:
            for key, current in self._conversation.settings().items():
                click.echo(f"{key} {current}")

    def _reset(self, _: str) -> None:
        self._conversation.turns.clear()

    def _help(self, _: str) -> None:
        for name, (arguments, _command, text) in self._commands.items():
            click.echo(f"{f'{name} {arguments}':<24}{text}")

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except ChatError as error:
            self._complain(str(error))
        except grpc.aio.AioRpcError as error:
            self._complain(self._failure(error))
        except KeyboardInterrupt:
            click.echo("(stopped)")

    def _failure(self, error: grpc.aio.AioRpcError) -> str:
        return f"{error.code().name} from {self._address}: {' '.join((error.details() or '').split())}"

    def _complain(self, text: str) -> None:
        self._num_errors += 1
        click.secho(f"Error: {text}", fg="red", err=True)


async def _connect(address: str, ca: Path | None) -> grpc.aio.Channel:
    """On the runner's event loop, which a channel is bound to."""
    return connect(address, ca)
