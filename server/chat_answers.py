"""The answers to one prompt of a chat: streamed at once, and shown while they come."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import click
import grpc
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.pb.loraplex.v1.inference_pb2 import GenerateRequest
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come."""

    text: str = ""
    num_tokens: int = 0
    seconds: float = 0.0
    failure: grpc.aio.AioRpcError | None = None


async def stream(
    inference: InferenceStub, requests: Mapping[str, GenerateRequest], answers: Mapping[str, Answer]
) -> None:
    """Fills the answers of all adapters at the same time; a single one is printed as it comes."""
    async with asyncio.TaskGroup() as group:
        for adapter, request in requests.items():
            group.create_task(_stream_one(inference, request, answers[adapter], echo=len(requests) == 1))


async def _stream_one(inference: InferenceStub, request: GenerateRequest, answer: Answer, *, echo: bool) -> None:
    started = time.monotonic()
    try:
        async for message in inference.GenerateStream(request):
            answer.text += message.text
            answer.num_tokens += len(message.token_ids)
            answer.seconds = time.monotonic() - started
            if echo:
                click.echo(message.text, nl=False)
    except grpc.aio.AioRpcError as error:
        answer.failure = error


@contextmanager
def shown(answers: Mapping[str, Answer]) -> Iterator[None]:
    """Shows answers that the block fills: several in columns on a terminal, elsewhere one after the other."""
    console = Console()
    if len(answers) > 1 and console.is_terminal:
        with Live(console=console, get_renderable=lambda: columns(answers), refresh_per_second=12):
            yield
        return
    yield
    for adapter, answer in answers.items():
        if answer.text:
            click.echo(f"[{adapter}] {answer.text}" if len(answers) > 1 else "")  # a single one is there already


def columns(answers: Mapping[str, Answer]) -> Table:
    """Side by side."""
    table = Table(expand=True, show_footer=True)
    for adapter, answer in answers.items():
        figures = f"{answer.num_tokens} tokens in {answer.seconds:.1f} s" if answer.num_tokens else ""
        table.add_column(Text(adapter), footer=figures, ratio=1)
    table.add_row(*[Text(answer.text) for answer in answers.values()])  # no markup, no :names: of emoji
    return table
