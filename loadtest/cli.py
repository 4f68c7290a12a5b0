"""The command `loadtest`: a closed loop of streaming requests against a running server."""

import asyncio
import json
import random
from pathlib import Path

import click
from rich.console import Console

from loadtest.client import volley
from loadtest.report import summarize, table
from server.pb.loraplex.v1.inference_pb2 import GenerateRequest, SamplingParams, TokenIds


@click.command("loadtest")
@click.option("--address", default="127.0.0.1:50051", show_default=True, envvar="LORAPLEX_ADDRESS", show_envvar=True)
@click.option("--adapters", default="", help="Names with commas between; request i uses name i mod n. Empty: the base.")
@click.option("--num-requests", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the summary here."
)
def loadtest_command(
    address: str,
    adapters: str,
    num_requests: int,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
    json_file: Path | None,
) -> None:
    """Load a running server and report its latencies."""
    names = [name.strip() for name in adapters.split(",")]
    chance = random.Random(seed)
    requests = [
        GenerateRequest(
            adapter=names[index % len(names)],
            prompt_token_ids=TokenIds(ids=[chance.randrange(100) for _ in range(prompt_tokens)]),
            sampling=SamplingParams(max_tokens=output_tokens, ignore_eos=True),
        )
        for index in range(num_requests)
    ]
    results, wall = asyncio.run(volley(address, requests, concurrency))
    summary = summarize(results, wall)
    Console().print(table(summary))
    if json_file:
        json_file.write_text(json.dumps(summary, indent=2) + "\n")
    failed = [result for result in results if not result.ok]
    if failed:
        raise click.ClickException(
            f"{len(failed)} requests failed, the first with {failed[0].code}: {failed[0].details}"
        )
