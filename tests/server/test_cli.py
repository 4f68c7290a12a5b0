"""The command line as a whole: every flag of every command has an environment twin and a YAML key, and says so."""

from collections.abc import Iterator
from pathlib import Path

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
def test_help_tells_the_environment_twin_and_the_yaml_key_of_every_flag(name: str) -> None:
    text = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=1000, max_content_width=1000).output
    for option in COMMANDS[name].params:
        if isinstance(option, click.Option):
            assert isinstance(option.envvar, str)
            assert option.envvar.replace("_", "").isalnum(), "or no shell could set it"
            assert f"env var: {option.envvar}" in text
            key = option.opts[0].removeprefix("--")
            told = f"YAML key: {key}." in text or f"YAML key: {key.replace('-', '_')}." in text
            assert told or option.name == "config"


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


@pytest.mark.parametrize(
    ("words", "text", "error"),
    [
        (["generate", "x"], "max-tokens: 0", "0 is not in the range x>=1"),
        (["generate", "x"], "prompt: y", "unknown setting 'prompt'"),
        (["generate", "x"], "config: other.yaml", "unknown setting 'config'"),
        (["generate", "x"], "stop: [[y]]", "stop is of type list; it takes text"),
        (["adapters", "list"], "address: [a, b]", "address is of type list; it takes text"),
        (["loadtest", "run"], "slo-first-token: soon", "'soon' is not a valid float"),
        (["loadtest", "run"], "num_adapters: many", "'many' is not a valid integer"),
        (["train"], "model: x\ndata: /nowhere", "File '/nowhere' does not exist"),
    ],
    ids=str,
)
def test_every_command_takes_a_file(tmp_path: Path, words: list[str], text: str, error: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    done = CliRunner().invoke(main, [*words, "--config", str(file)], terminal_width=1000)
    assert done.exit_code == 2
    assert error in done.output


@pytest.mark.parametrize("text", ["adapter: [one, two@1]", "adapter: one"])
def test_a_flag_that_may_be_given_several_times_is_a_list(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    context = COMMANDS["chat"].make_context("chat", ["--config", str(file)])
    assert context.params["adapters"] == (("one", "two@1") if "[" in text else ("one",))
