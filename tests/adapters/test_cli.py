from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from adapters.cli import train_command
from adapters.config import parse_config
from adapters.train_config import TrainConfig

Write = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture
def data(write_lines: Write) -> Path:
    return write_lines(*({"prompt": f"{number}:", "completion": " yes"} for number in range(20)))


@pytest.fixture
def train(model_dir: Path, tmp_path: Path, data: Path) -> Run:
    """Runs the command with the tiny model; `tiny` is resolved to its folder."""

    def run(*arguments: str, out: Path = tmp_path / "adapter", path: Path = data) -> Result:
        command = train_command({"tiny": str(model_dir), "absent": str(tmp_path / "absent")}.__getitem__)
        return CliRunner().invoke(command, ["--data", str(path), "--out", str(out), "--model", "tiny", *arguments])

    return run


def test_writes_an_adapter_and_says_what_it_did(train: Run, tmp_path: Path) -> None:
    result = train("--rank", "4", "--max-steps", "4", "--eval-every", "2", "--targets", "q_proj,v_proj", "--rslora")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "trainable 1,792 of 97,344 parameters (1.84 %)" in lines
    assert any(line.startswith("step 2: loss ") and "eval loss" in line for line in lines)
    assert lines[-1].startswith(f"{tmp_path / 'adapter'}: 4 steps, best at 4, ")
    config = parse_config((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert (config.rank, config.alpha, config.use_rslora, config.base_model) == (4, 16, True, "tiny")
    assert config.target_modules == ("q_proj", "v_proj")


def test_several_at_once(train: Run, write_lines: Write, tmp_path: Path) -> None:
    """Each adapter as it is alone."""
    other = write_lines(*({"prompt": f"is it {number}?", "completion": " no"} for number in range(30)), name="no.jsonl")
    settings = ("--max-steps", "3", "--dropout", "0", "--eval-share", "0.2")
    assert train(*settings, out=tmp_path / "yes").exit_code == 0
    assert train(*settings, out=tmp_path / "no", path=other).exit_code == 0
    result = train(*settings, "--data", str(other), "--out", str(tmp_path / "second"))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    for alone, together in (("yes", "adapter"), ("no", "second")):
        found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in (together, alone))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert any(line.startswith(f"{tmp_path / together}: step 3: loss ") for line in lines)
        assert any(line.startswith(f"{tmp_path / together}: 3 steps, best at ") for line in lines)
    assert sum(line.startswith("trainable ") for line in lines) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "DATA"], "--data is given 2 times: as many --out are needed, all different"),
        (["--data", "DATA", "--out", "OUT"], "--data is given 2 times: as many --out are needed, all different"),
        (
            ["--data", "DATA", "--out", "other", "--eval-data", "DATA"],
            "--data is given 2 times, and --eval-data 1 times",
        ),
    ],
)
def test_flags_that_do_not_pair(train: Run, tmp_path: Path, data: Path, arguments: list[str], message: str) -> None:
    names = {"DATA": str(data), "OUT": str(tmp_path / "adapter")}
    result = train(*(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output


def test_evaluation_data_of_its_own(train: Run, write_lines: Write) -> None:
    other = write_lines({"prompt": "a", "completion": 1}, name="eval.jsonl")
    result = train("--eval-data", str(other))
    assert result.output == "Error: eval.jsonl line 1: the completion is 1, not a text\n"


def test_an_adapter_in_the_way_is_replaced_and_nothing_else(train: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert train("--max-steps", "1", "--eval-share", "0").exit_code == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    result = train(out=tmp_path / "notes")
    assert result.exit_code == 1
    assert (
        result.output == f"Error: {tmp_path / 'notes'} holds something that is not an adapter: choose another folder\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "rank is 0; more than 0 is needed"),
        (["--targets", "q_proj,nothing"], "target 'nothing' matches no linear layer"),
        (["--max-tokens", "3"], "train.jsonl line 1: 7 tokens are over the limit of 3 (--max-tokens)"),
        (["--model", "absent"], "absent"),
    ],
)
def test_errors_are_one_line(train: Run, arguments: list[str], message: str) -> None:
    result = train(*arguments)
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_every_setting_is_a_flag_with_help() -> None:
    options = {option.name: option for option in train_command().params if isinstance(option, click.Option)}
    for name in TrainConfig.__dataclass_fields__:
        assert options[name].help
