"""`loraplex bench throughput`: which adapter each request gets."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from server.cli import main


def run(model_dir: Path, adapters_dir: Path, *arguments: str) -> Result:
    command = ["bench", "throughput", "--model", str(model_dir), "--device", "cpu", "--adapters-dir", str(adapters_dir)]
    shape = ["--num-adapters", "2", "--num-prompts", "3", "--prompt-tokens", "5", "--output-tokens", "6"]
    return CliRunner().invoke(main, [*command, *shape, *arguments])


def test_adapters_in_turn_or_as_chosen(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> None:
    def tokens(*arguments: str) -> list[list[int]]:
        done = run(model_dir, adapters_dir, "--tokens-file", str(tmp_path / "tokens.json"), *arguments)
        assert done.exit_code == 0, done.output
        outputs: list[list[int]] = json.loads((tmp_path / "tokens.json").read_text())
        return outputs

    (tmp_path / "choices.json").write_text("[1, 1, 0]")
    in_turn, chosen = tokens(), tokens("--choices-file", str(tmp_path / "choices.json"))
    assert chosen[0] != in_turn[0]
    assert chosen[1:] == in_turn[1:]


@pytest.mark.parametrize("text", ["[0, 1]", "[0, 1, 2]", "[0, 1, -1]", "nothing"])
def test_choices_that_do_not_fit(model_dir: Path, adapters_dir: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(text)
    done = run(model_dir, adapters_dir, "--choices-file", str(path))
    assert done.exit_code == 2
    assert f"--choices-file {path}: " in done.output
