"""Commands that talk to a running server: `generate` and `adapters …`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc
from rich.console import Console
from rich.table import Table

from server.client_channel import endpoint
from server.pb.loraplex.v1 import adapters_pb2, inference_pb2
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub
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
    with grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target) as channel:
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


@click.group()
def adapters() -> None:
    """Adapters of a running server."""


@adapters.command("list")
@address_option
def list_adapters(address: str) -> None:
    """Show every adapter, where its weights are, and why it was refused."""
    with connected(address) as channel:
        found = AdaptersStub(channel).ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters
    table = Table()
    for title in ("name", "version", "state", "tier", "rank", "MiB", "running", "digest", "error"):
        table.add_column(title, justify="right" if title in ("rank", "MiB", "running") else "left")
    for adapter in found:
        loaded = adapter.state == adapters_pb2.READY
        table.add_row(
            adapter.name,
            adapter.version,
            adapters_pb2.AdapterState.Name(adapter.state),
            adapters_pb2.AdapterTier.Name(adapter.tier),
            str(adapter.rank) if loaded else "",
            f"{adapter.bytes_host / 2**20:.1f}" if loaded else "",
            str(adapter.requests_running),
            adapter.digest[:12],
            adapter.error,
        )
    Console().print(table)


@adapters.command()
@address_option
@click.option("--source", default="", help="Folder inside the server's adapters folder; left out: the one called NAME.")
@click.option("--replace", is_flag=True, help="Take the place of what is loaded under that name.")
@click.argument("name")
def load(address: str, source: str, replace: bool, name: str) -> None:
    """Load adapter NAME into the server's memory."""
    with connected(address) as channel:
        request = adapters_pb2.LoadAdapterRequest(name=name, source=source, replace=replace)
        adapter = AdaptersStub(channel).LoadAdapter(request)
    click.echo(
        f"{adapter.name}@{adapter.version}: generation {adapter.generation}, rank {adapter.rank}, "
        f"{adapter.bytes_host:,} bytes, digest {adapter.digest[:12]}"
    )


@adapters.command()
@address_option
@click.argument("name")
def unload(address: str, name: str) -> None:
    """Take adapter NAME away, wait for its requests, and free its memory."""
    with connected(address) as channel:
        freed = AdaptersStub(channel).UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name=name))
    click.echo(
        f"{name}: freed {freed.freed_bytes_host:,} bytes of host and {freed.freed_bytes_device:,} of device memory"
    )


@adapters.command()
@address_option
@click.argument("name")
def merge(address: str, name: str) -> None:
    """Add adapter NAME to the base's weights; everybody else's requests run on."""
    with connected(address) as channel:
        merged = AdaptersStub(channel).MergeAdapter(adapters_pb2.MergeAdapterRequest(name=name))
    click.echo(f"{name}: merged in {1000 * merged.seconds:.0f} ms, {merged.bytes_merged:,} bytes beside the base")


@adapters.command()
@address_option
def unmerge(address: str) -> None:
    """Take the merged adapter out of the base's weights."""
    with connected(address) as channel:
        unmerged = AdaptersStub(channel).UnmergeAdapter(adapters_pb2.UnmergeAdapterRequest())
    click.echo(f"unmerged in {1000 * unmerged.seconds:.1f} ms")
