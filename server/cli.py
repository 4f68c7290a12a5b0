"""The command `loraplex` and its sub-commands. Heavy imports wait until a command needs them."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click

from adapters.cli import train_command
from benchmarks.cli import compare_command
from benchmarks.own_commands import (
    adapters_command,
    front_command,
    kernels_command,
    merge_command,
    swap_command,
)
from benchmarks.training_command import train_bench_command
from loadtest.cli import loadtest_command
from server.adapter_commands import adapters
from server.base_models import EMBEDDED, resolve
from server.chat import chat
from server.client_commands import generate, health
from server.config import EngineConfig, ServerConfig, config_option, options, take, yaml_key
from server.errors import ConfigError
from server.openmp import bound_spinning

FILE = click.Path(dir_okay=False, path_type=Path)


class _Group(click.Group):
    """Settings that cannot work end in one line and exit code 2, never in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="loraplex")
def main() -> None:
    """Serve many LoRA adapters on one frozen base model, and make them."""
    bound_spinning()


main.add_command(train_command(resolve))
main.add_command(generate)
main.add_command(chat)
main.add_command(health)
main.add_command(adapters)
main.add_command(loadtest_command)


@main.command()
@options(EngineConfig, ServerConfig)
def serve(**values: Any) -> None:
    """Start the gRPC server."""
    engine_config, config = take(EngineConfig, values), take(ServerConfig, values)
    from server.logs import set_up_logging
    from server.rpc.event_loop import GrpcEventLoop
    from server.serve import serve as run

    set_up_logging(config.log_level, config.log_format)
    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        sys.exit(runner.run(run(engine_config, config)))


@main.command()
def env() -> None:
    """Print what a bug report needs: versions, processor, devices, kernels, settings from the environment."""
    from server.environment import environment

    values = list(environment())
    width = max(len(name) for name, _ in values)
    for name, value in values:
        click.echo(f"{name:<{width}}  {value}")


@main.group()
def models() -> None:
    """Base models."""


@models.command()
@click.argument("name", type=click.Choice(list(EMBEDDED)))
def fetch(name: str) -> None:
    """Bring an embedded base model into the cache, once; no hub is needed."""
    from server.base_models import fetch as run

    run(name, progress=lambda text: click.echo(text, err=True))


@main.group()
def bench() -> None:
    """Measure."""


bench.add_command(compare_command)
bench.add_command(adapters_command)
bench.add_command(swap_command)
bench.add_command(merge_command)
bench.add_command(front_command)
bench.add_command(kernels_command)
bench.add_command(train_bench_command)


@bench.command()
@options(EngineConfig)
@click.option("--adapters-dir", type=click.Path(exists=True, file_okay=False), help="Folder of PEFT adapters.")
@click.option(
    "--num-adapters", type=click.IntRange(min=0), default=0, show_default=True, help="0: the base model alone."
)
@click.option("--num-prompts", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--unused-adapters", is_flag=True, help="Load and warm up the adapters, but time the base.")
@click.option("--prompts-file", type=FILE, help="JSON list of prompts, each a list of token ids, to take as they are.")
@click.option("--choices-file", type=FILE, help="JSON list: the adapter of each request, by its place in name order.")
@click.option("--tokens-file", type=FILE, help="Write the tokens of every request here, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of a sentence.")
def throughput(
    adapters_dir: str | None,
    num_adapters: int,
    num_prompts: int,
    prompt_tokens: int,
    output_tokens: int,
    unused_adapters: bool,
    prompts_file: Path | None,
    choices_file: Path | None,
    tokens_file: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Generate with many adapters at once, in process, and time it.

    All prompts are submitted at once; request i uses adapter i mod K of the folder, in name order, unless
    --choices-file says otherwise. Greedy, no early stop, one warm-up.
    """
    from server.bench import measure_throughput

    result = measure_throughput(
        take(EngineConfig, values),
        adapters_dir=adapters_dir,
        num_adapters=num_adapters,
        num_prompts=num_prompts,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        unused_adapters=unused_adapters,
        prompts_file=prompts_file,
        choices_file=choices_file,
        tokens_file=tokens_file,
    )
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(
            f"{result['out_tok_s']:.1f} tokens/s: {result['num_prompts']} requests of {result['prompt_tokens']} + "
            f"{output_tokens} tokens "
            f"over {num_adapters} adapters in {result['wall_s']:.2f} s, "
            f"peak memory {result['peak_rss_bytes'] / 2**20:.0f} MiB"
        )


def _give_twins(command: click.Command, prefix: str) -> None:
    """Every flag gets what the settings of a server have: a variable, by default LORAPLEX_COMMAND_FLAG, and a YAML key.

    Help names both, and errors name the variable where the value is from there.
    """
    if isinstance(command, click.Group):
        for name, subcommand in command.commands.items():
            _give_twins(subcommand, f"{prefix}_{name.replace('-', '_')}")
        return
    flags = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    for flag in flags:
        flag.envvar = flag.envvar or f"{prefix}_{flag.name}".upper()
        flag.show_envvar = True
        if not flag.is_eager and "YAML key:" not in (flag.help or ""):
            flag.help = f"{flag.help or ''} YAML key: {yaml_key(flag)}.".lstrip()
    if flags and not any(flag.is_eager for flag in flags):
        config_option(f"{prefix}_CONFIG".upper())(command)


_give_twins(main, "LORAPLEX")


if __name__ == "__main__":
    main()
