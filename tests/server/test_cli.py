"""The command line as a whole: every flag of every command has an environment twin, and its help tells it."""

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from server.cli import main


def commands(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        for name, subcommand in command.commands.items():
            yield from commands(subcommand, (*words, name))


COMMANDS = {" ".join(words): command for words, command in commands(main) if not isinstance(command, click.Group)}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_the_environment_twin_of_every_flag(name: str) -> None:
    text = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=1000, max_content_width=1000).output
    own = f"LORAPLEX_{name}".upper().replace(" ", "_")
    for option in COMMANDS[name].params:
        if isinstance(option, click.Option):
            assert option.name is not None
            assert f"env var: {option.envvar or f'{own}_{option.name.upper()}'}" in text


@pytest.mark.parametrize(
    ("words", "variables", "error"),
    [
        (["generate", "x"], {"LORAPLEX_GENERATE_MAX_TOKENS": "0"}, "'--max-tokens' (env var: 'LORAPLEX_GENERATE_MAX_"),
        (
            ["chat"],
            {"LORAPLEX_CHAT_TEMPERATURE": "hot"},
            "'--temperature' (env var: 'LORAPLEX_CHAT_TEMPERATURE'): 'hot'",
        ),
        (["loadtest", "run"], {"LORAPLEX_LOADTEST_RATE": "x"}, "'--rate' (env var: 'LORAPLEX_LOADTEST_RATE')"),
        (
            ["train", "--model", "x"],
            {"LORAPLEX_TRAIN_DATA": "/nowhere"},
            "'--data' (env var: 'LORAPLEX_TRAIN_DATA'): File",
        ),
        (["serve"], {"LORAPLEX_CONFIG": "/nowhere"}, "'--config' (env var: 'LORAPLEX_CONFIG'): File '/nowhere'"),
        (["serve"], {"LORAPLEX_SERVE_THREADS": "x", "LORAPLEX_THREADS": "y"}, "(env var: 'LORAPLEX_THREADS'): 'y'"),
    ],
    ids=str,
)
def test_the_twin_is_read(words: list[str], variables: dict[str, str], error: str) -> None:
    done = CliRunner().invoke(main, words, env=variables, terminal_width=1000)
    assert done.exit_code == 2
    assert error in done.output
