"""Commands that talk to a running server, and how they reach it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc

from loadtest.channel import channel_options, endpoint
from server.pb.loraplex.v1 import inference_pb2
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub

Command = TypeVar("Command", bound=Callable[..., Any])

_CA = "loraplex.ca"  # key of the command's context


def address_option(command: Command) -> Command:
    """`--address`, and `--ca`, which `ca_file` gives."""
    command = click.option(
        "--ca",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        envvar="LORAPLEX_CA",
        show_envvar=True,
        expose_value=False,
        callback=lambda context, _, path: context.meta.__setitem__(_CA, path),
        help="PEM file of the authorities that sign the server's certificate; left out: those that gRPC comes with.",
    )(command)
    return click.option(
        "--address",
        default="127.0.0.1:50051",
        envvar="LORAPLEX_ADDRESS",
        show_default=True,
        show_envvar=True,
        help="Address of the server; https://HOST:PORT speaks TLS.",
    )(command)


def ca_file() -> Path | None:
    """What `--ca` of the running command names."""
    path: Path | None = click.get_current_context().meta[_CA]
    return path


@contextmanager
def connected(address: str) -> Iterator[grpc.Channel]:
    """A channel whose failures end the command in one line: the status and what the server says."""
    target, credentials = endpoint(address, ca_file())
    options = channel_options()
    opened = (
        grpc.secure_channel(target, credentials, options) if credentials else grpc.insecure_channel(target, options)
    )
    with opened as channel:
        try:
            yield channel
        except grpc.RpcError as error:  # of a channel it is a grpc.Call as well
            raise click.ClickException(f"{error.code().name} from {address}: {error.details()}") from error


@click.command()
@address_option
@click.option("--adapter", default="", help="NAME or NAME@VERSION; left out: the base model.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: greedy.")
@click.option("--stop", multiple=True, help="Text to end before; may be given several times.")
@click.option("--seed", type=click.IntRange(min=0))
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message, through the chat template.")
@click.argument("prompt")
def generate(
    address: str,
    adapter: str,
    max_tokens: int,
    temperature: float,
    stop: tuple[str, ...],
    seed: int | None,
    chat: bool,
    prompt: str,
) -> None:
    """Send PROMPT to a server and print the answer as it comes."""
    request = inference_pb2.GenerateRequest(
        adapter=adapter,
        sampling=inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=stop, seed=seed),
    )
    if chat:
        request.chat.messages.add(role="user", content=prompt)
    else:
        request.prompt = prompt
    with connected(address) as channel:
        for message in InferenceStub(channel).GenerateStream(request):
            click.echo(message.text, nl=False)
        click.echo()


@click.command()
@address_option
@click.option("--service", default="", help="Left out: the server as a whole.")
def health(address: str, service: str) -> None:
    """Ask the health service; exit code 0 when it is serving. Made for container health checks."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with connected(address.replace("0.0.0.0:", "127.0.0.1:")) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    click.echo(name)
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise click.ClickException(f"{address} answers {name}")
