"""Settings: one definition each, four places to set it, one order of precedence."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from server.config import EngineConfig, ServerConfig, options, take
from server.errors import ConfigError

taken: dict[str, Any] = {}


@click.command()
@options(EngineConfig, ServerConfig)
def command(**values: Any) -> None:
    taken["engine"], taken["server"] = take(EngineConfig, values), take(ServerConfig, values)
    assert not values


def run(*arguments: str, env: dict[str, str] | None = None) -> str:
    result = CliRunner().invoke(command, arguments, env=env)
    assert result.exit_code == 0, result.output
    return result.output


def test_defaults() -> None:
    run()
    assert taken["engine"] == EngineConfig()
    assert taken["server"] == ServerConfig()


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "max-num-seqs: 3\nadapter_slots: 4\nmax-lora-rank: 5\nadapters-dir: /from/file\nreflection: false\n"
    )
    env = {"LORAPLEX_ADAPTER_SLOTS": "40", "LORAPLEX_MAX_LORA_RANK": "50"}
    for arguments in (
        ["--config", str(file), "--max-lora-rank", "500"],
        ["--max-lora-rank", "500", "--config", str(file)],
    ):
        run(*arguments, env=env)
        engine = taken["engine"]
        assert (engine.max_num_seqs, engine.adapter_slots, engine.max_lora_rank) == (3, 40, 500)
        assert taken["server"].adapters_dir == Path("/from/file")
        assert taken["server"].reflection is False


def test_help_names_the_environment_twin_and_the_yaml_key_of_every_flag() -> None:
    text = CliRunner().invoke(command, ["--help"], max_content_width=1000, terminal_width=1000).output
    for item in (*fields(EngineConfig), *fields(ServerConfig)):
        key = item.name.replace("_", "-")
        assert f"--{key}" in text
        assert f"YAML key: {key}." in text
        assert f"LORAPLEX_{item.name.upper()}" in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max-num-sequences: 3", "unknown setting 'max-num-sequences'"),
        ("3: 3", "3 is no name of a setting"),
        ("[1, 2]", "no mapping"),
        ("a: [", "not YAML"),
        ("model: 2024-99-99", "not YAML: month must be in 1..12"),
        (f"model: {'[' * 1000}{']' * 1000}", "not YAML: maximum recursion depth exceeded"),
        ("a: &a [x]\nb: *a", "holds an alias"),
        ("max-num-seqs: many", "'many' is not a valid integer"),
        ("max-num-seqs: 0", "0 is not in the range"),
        ("max-num-seqs:", "max-num-seqs is of type NoneType; it takes text"),
        ("max-num-seqs: [3]", "max-num-seqs is of type list; it takes text"),
        ("listen:", "listen is of type NoneType; it takes text"),
        ("listen: 2024-01-01", "listen is of type date; it takes text"),
    ],
    ids=lambda text: text[:30],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    result = CliRunner().invoke(command, ["--config", str(file)], terminal_width=1000)
    assert result.exit_code == 2
    assert reason in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_a_file_of_aliases_does_not_grow(tmp_path: Path) -> None:
    """Nine of the one before, ten times over: as a key or merged it would be billions of values."""
    bomb = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 11))
    file = tmp_path / "settings.yaml"
    file.write_text(f"a0: &a0 {{x: 1}}\n{bomb}")
    result = CliRunner().invoke(command, ["--config", str(file)])
    assert result.exit_code == 2
    assert "holds an alias" in result.output.replace("\n", " ")


def test_the_file_has_an_environment_twin_too(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("max-num-seqs: 3")
    run(env={"LORAPLEX_CONFIG": str(file)})
    assert taken["engine"].max_num_seqs == 3


def test_values_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="--max-num-batched-tokens 8 is less than --max-num-seqs 64"):
        EngineConfig(max_num_batched_tokens=8)
