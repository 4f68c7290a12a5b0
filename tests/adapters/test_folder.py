"""An adapter's folder, written whole or not at all."""

import errno
import fcntl
import math
import os
from pathlib import Path

import pytest
import torch

import adapters.folder
from adapters.config import AdapterConfig
from adapters.folder import SCRATCH_PREFIX, remove_abandoned, scratch_folder, write_adapter
from adapters.format import AdapterFiles, LoRAWeights, read_adapter
from adapters.tensors import LinearShape
from tests.killed import roots_of_killed

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
LAYERS = {Q: LinearShape(16, 16), V: LinearShape(16, 8)}
CONFIG = AdapterConfig(rank=4, alpha=8, target_modules=("q_proj", "v_proj"), use_rslora=True, base_model="tiny")


def write(folder: Path, value: float) -> None:
    """An adapter of one number."""
    shapes = LAYERS.items()
    weights = {
        module: LoRAWeights(torch.full((4, at.in_features), value), torch.full((at.out_features, 4), value), 4.0)
        for module, at in shapes
    }
    write_adapter(folder, CONFIG, weights)


def read(folder: Path) -> AdapterFiles:
    return read_adapter(folder, LAYERS, max_rank=4)


def value_of(folder: Path) -> float:
    return float(read(folder).weights[Q].lora_b[0, 0])


def test_written_and_read_again(tmp_path: Path) -> None:
    for value in (1.0, 2.0):  # the second replaces the first
        write(tmp_path / "out", value)
        files = read(tmp_path / "out")
        assert files.config == CONFIG
        assert files.weights[Q].scaling == 8 / math.sqrt(4)
        assert value_of(tmp_path / "out") == value
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def replace(root: Path) -> None:
    write(root / "out", 2.0)


def test_killed_at_every_step(tmp_path: Path) -> None:
    """The old adapter or the new one is there, whole; the next to write there removes what is left."""
    write(tmp_path / "template" / "out", 1.0)
    roots = roots_of_killed(f"{__name__}:replace", tmp_path / "template", tmp_path / "killed")
    values = {root.name: value_of(root / "out") for root in roots}
    steps = [value for name, value in values.items() if name.startswith("step")]
    assert len(steps) > 15
    assert steps == sorted(steps)
    assert set(steps) == {1.0, 2.0}
    assert values["write-1000"] == 1.0, "killed in the middle of the weights"
    assert any(len(list(root.iterdir())) > 1 for root in roots)
    for root in roots:
        replace(root)
        assert [path.name for path in root.iterdir()] == ["out"]
        assert value_of(root / "out") == 2.0


def test_a_file_system_that_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters.folder, "_RENAME_EXCHANGE", 1 << 20)  # a flag that none has
    for value in (1.0, 2.0):
        write(tmp_path / "out", value)
    assert value_of(tmp_path / "out") == 2.0
    rename = Path.rename

    def fail_for_new(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", 3.0)
    assert value_of(tmp_path / "out") == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exchange_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        adapters.folder._exchange(tmp_path / "none", tmp_path / "neither")
    assert caught.value.errno == errno.ENOENT


def test_scratch_of_the_living_stays(tmp_path: Path) -> None:
    (tmp_path / f"{SCRATCH_PREFIX}dead").mkdir()
    with scratch_folder(tmp_path, SCRATCH_PREFIX) as living:
        remove_abandoned(tmp_path.iterdir())
        assert list(tmp_path.iterdir()) == [living]
    assert list(tmp_path.iterdir()) == []


def test_scratch_that_was_taken_for_abandoned_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock

    def remove_first(handle: int, operation: int) -> None:
        monkeypatch.undo()
        remove_abandoned(tmp_path.iterdir())
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with scratch_folder(tmp_path) as scratch:
        assert scratch.is_dir()


@pytest.mark.parametrize("stranger", ["thesis.txt", "1/adapter_config.json"])
def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path, stranger: str) -> None:
    """Nor is one that holds versions beside the adapter."""
    if os.sep in stranger:
        write(tmp_path / "out", 1.0)
    path = tmp_path / "out" / stranger
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    with pytest.raises(FileExistsError, match="choose another folder"):
        write(tmp_path / "out", 2.0)
    assert path.read_text() == "years of work"
