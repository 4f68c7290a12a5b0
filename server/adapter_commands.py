"""The commands `loraplex adapters …`: the adapters of a running server, for people."""

import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from adapters.config import CONFIG_FILE, WEIGHTS_FILE
from server.adapter_tables import mib, print_adapters, print_fields, say_loaded, state_of
from server.client_commands import address_option, connected
from server.pb.loraplex.v1 import adapters_pb2 as pb
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub

_CHUNK = 1 << 20  # bytes per message

_expected_generation = click.option(
    "--expected-generation", type=click.IntRange(min=0), help="Replace exactly this generation, or nothing."
)
_pin = click.option("--pin", is_flag=True, help="Keep it in host memory.")


@click.group()
def adapters() -> None:
    """Adapters of a running server."""


@adapters.command("list")
@address_option
def list_adapters(address: str) -> None:
    """Show every adapter, where its weights are, and why it was refused."""
    found: list[pb.Adapter] = []
    with connected(address) as channel:
        request = pb.ListAdaptersRequest()
        while True:
            answer = AdaptersStub(channel).ListAdapters(request)
            found += [*answer.adapters, *answer.draining]
            request.page_token = answer.next_page_token
            if not request.page_token:
                break
    print_adapters(found)
    click.echo(
        f"{len(found) - len(answer.draining)} versions; "
        f"host memory {mib(answer.bytes_host)} of {mib(answer.bytes_host_limit)} MiB, "
        f"{mib(answer.bytes_host_pinned)} pinned; {mib(answer.bytes_merged)} MiB more for the merged one"
    )


@adapters.command()
@address_option
@click.argument("name")
def get(address: str, name: str) -> None:
    """Show all that is known of adapter NAME."""
    with connected(address) as channel:
        adapter = AdaptersStub(channel).GetAdapter(pb.GetAdapterRequest(name=name))
    print_fields(adapter)


@adapters.command()
@address_option
@click.option("--source", default="", help="Folder inside the server's adapters folder; left out: the one called NAME.")
@click.option("--replace", is_flag=True, help="Take the place of what is loaded under that name.")
@_expected_generation
@_pin
@click.argument("name")
def load(address: str, source: str, replace: bool, expected_generation: int | None, pin: bool, name: str) -> None:
    """Load adapter NAME into the server's memory."""
    request = pb.LoadAdapterRequest(
        name=name, source=source, replace=replace, expected_generation=expected_generation, pin=pin
    )
    with connected(address) as channel:
        say_loaded(AdaptersStub(channel).LoadAdapter(request))


@adapters.command()
@address_option
@click.option("--replace", is_flag=True, help="NAME may have versions already.")
@_expected_generation
@_pin
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def upload(address: str, replace: bool, expected_generation: int | None, pin: bool, name: str, folder: Path) -> None:
    """Send the PEFT adapter in FOLDER to the server's store, as the next version of NAME."""
    paths = [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
    for path in paths:
        if not path.is_file():
            raise click.ClickException(f"{path} is missing: {folder} holds no adapter in PEFT's format")
    header = pb.UploadHeader(name=name, replace=replace, expected_generation=expected_generation, pin=pin)
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        header.files.add(name=path.name, size=path.stat().st_size, sha256=digest)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with progress, connected(address) as channel:
        adapter = AdaptersStub(channel).UploadAdapter(_messages(header, paths, progress))
    say_loaded(adapter)


@adapters.command()
@address_option
@click.option(
    "--mode",
    type=click.Choice(["drain", "force", "if-idle"]),
    default="drain",
    show_default=True,
    help="Let running requests finish, end them, or unload only if there are none.",
)
@click.argument("name")
def unload(address: str, mode: str, name: str) -> None:
    """Take adapter NAME away, and free its memory."""
    request = pb.UnloadAdapterRequest(name=name, mode=mode.replace("-", "_").upper())
    with connected(address) as channel:
        freed = AdaptersStub(channel).UnloadAdapter(request)
    click.echo(
        f"{name}: freed {freed.freed_bytes_host:,} bytes of host and {freed.freed_bytes_device:,} of device memory"
    )


@adapters.command()
@address_option
@click.argument("name")
def pin(address: str, name: str) -> None:
    """Load adapter NAME and keep it in host memory."""
    with connected(address) as channel:
        say_loaded(AdaptersStub(channel).PinAdapter(pb.PinAdapterRequest(name=name)))


@adapters.command()
@address_option
@click.argument("name")
def unpin(address: str, name: str) -> None:
    """Let adapter NAME leave host memory when room is needed."""
    with connected(address) as channel:
        adapter = AdaptersStub(channel).UnpinAdapter(pb.UnpinAdapterRequest(name=name))
    click.echo(f"{adapter.name}@{adapter.version}: not pinned")


@adapters.command()
@address_option
@click.argument("name")
@click.argument("version", default="")
def promote(address: str, name: str, version: str) -> None:
    """Make VERSION what NAME means; the old one rolls back, none at all means the newest."""
    with connected(address) as channel:
        adapter = AdaptersStub(channel).PromoteVersion(pb.PromoteVersionRequest(name=name, version=version))
    click.echo(f"{adapter.name} means {adapter.name}@{adapter.version}")


@adapters.command()
@address_option
@click.argument("name")
@click.argument("shares", nargs=-1, metavar="[VERSION=PERCENT]...")
def traffic(address: str, name: str, shares: Sequence[str]) -> None:
    """Send shares of NAME's requests to some of its versions; without shares, all go to one again."""
    request = pb.SetTrafficRequest(name=name)
    for share in shares:
        version, _, percent = share.partition("=")
        if not percent.isdecimal():
            raise click.BadParameter(f"{share!r} is not VERSION=PERCENT", param_hint="shares")
        request.percent_by_version[version] = int(percent)
    with connected(address) as channel:
        print_adapters(AdaptersStub(channel).SetTraffic(request).adapters)


@adapters.command()
@address_option
@click.argument("name")
def merge(address: str, name: str) -> None:
    """Add adapter NAME to the base's weights; everybody else's requests run on."""
    with connected(address) as channel:
        merged = AdaptersStub(channel).MergeAdapter(pb.MergeAdapterRequest(name=name))
    click.echo(f"{name}: merged in {1000 * merged.seconds:.0f} ms, {merged.bytes_merged:,} bytes beside the base")


@adapters.command()
@address_option
def unmerge(address: str) -> None:
    """Take the merged adapter out of the base's weights."""
    with connected(address) as channel:
        unmerged = AdaptersStub(channel).UnmergeAdapter(pb.UnmergeAdapterRequest())
    click.echo(f"unmerged in {1000 * unmerged.seconds:.1f} ms, {unmerged.freed_bytes:,} bytes freed")


@adapters.command()
@address_option
def watch(address: str) -> None:
    """Print what happens to adapters, until interrupted."""
    with connected(address) as channel:
        for event in AdaptersStub(channel).WatchAdapters(pb.WatchAdaptersRequest()):
            adapter = event.adapter
            line = f"{datetime.now():%H:%M:%S} {pb.AdapterEvent.Type.Name(event.type):<8}"
            if event.HasField("adapter"):
                line += f" {adapter.name}@{adapter.version} {state_of(adapter)} generation {adapter.generation}"
                line += f": {adapter.error}" if adapter.error else ""
            click.echo(line)


def _messages(header: pb.UploadHeader, paths: Sequence[Path], progress: Progress) -> Iterator[pb.UploadAdapterRequest]:
    yield pb.UploadAdapterRequest(header=header)
    for path in paths:
        task = progress.add_task(path.name, total=path.stat().st_size)
        offset = 0
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                yield pb.UploadAdapterRequest(chunk=pb.UploadChunk(file=path.name, offset=offset, data=data))
                offset += len(data)
                progress.update(task, completed=offset)
