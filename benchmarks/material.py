"""What the contenders read: adapters, prompts, and the model in other formats. Made once, then found in the folder."""

import hashlib
import random
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.config import CONFIG_FILE, AdapterConfig
from adapters.folder import write_adapter
from adapters.format import LoRAWeights
from benchmarks import gguf_export
from server.errors import ConfigError

WEIGHT_STD = 0.02
OPENVINO_FORMATS = {"float32": "fp32", "bfloat16": "fp32", "int8": "int8"}  # of the weights, by what is computed in

Progress = Callable[[str], None]


class Material:
    """The folder of one base model below the work folder. Making something twice gives the same."""

    def __init__(self, model: Path, work_dir: Path, progress: Progress) -> None:
        files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model.iterdir())
        digest = hashlib.sha256(repr((str(model.resolve()), files)).encode()).hexdigest()
        self.model = model
        self.folder = work_dir / f"{model.name}-{digest[:8]}"
        self._progress = progress

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random token ids; the first n of any count are the same."""
        vocab_size: int = AutoConfig.from_pretrained(self.model).vocab_size
        chance = random.Random(0)
        return [[chance.randrange(vocab_size) for _ in range(length)] for _ in range(count)]

    def adapters_dir(self, ranks: tuple[int, ...], count: int) -> Path:
        """Folder of at least `count` adapters with these ranks in turn, alpha twice the rank, on every linear layer."""
        folder = self.folder / "adapters" / "-".join(map(str, ranks))
        missing = [index for index in range(count) if not (folder / f"{index:03}" / CONFIG_FILE).is_file()]
        if missing:
            self._progress(f"making {len(missing)} adapters in {folder}")
            shapes = _linear_shapes(self.model)
            for index in missing:
                _write_random_adapter(folder / f"{index:03}", shapes, ranks[index % len(ranks)], seed=index)
        return folder

    def adapters(self, ranks: tuple[int, ...], count: int) -> list[Path]:
        folder = self.adapters_dir(ranks, count)
        return [folder / f"{index:03}" for index in range(count)]

    def gguf_model(self, quantization: str) -> Path:
        return self._once(
            self.folder / "gguf" / f"{quantization}.gguf",
            lambda target: gguf_export.export_model(self.model, target, quantization),
        )

    def gguf_adapters(self, ranks: tuple[int, ...], count: int) -> list[Path]:
        return [
            self._once(
                self.folder / "gguf" / folder.parent.name / f"{folder.name}.gguf",
                partial(gguf_export.export_adapter, folder, self.model),
            )
            for folder in self.adapters(ranks, count)
        ]

    def openvino_model(self, python: Path, dtype: str) -> Path:
        """The model as OpenVINO's own exporter writes it, run in the peer's environment."""
        weight_format = OPENVINO_FORMATS[dtype]
        return self._once(
            self.folder / "openvino" / weight_format,
            lambda target: _export_openvino(python, self.model, target, weight_format),
        )

    def _once(self, target: Path, make: Callable[[Path], None]) -> Path:
        """Makes `target`, a file or folder, whole or not at all."""
        if not target.exists():
            self._progress(f"making {target}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
                fresh = Path(scratch) / target.name
                make(fresh)
                fresh.rename(target)
        return target


def _linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Path → (out, in) of the linear layers that PEFT calls "all-linear": all but the output head."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = built.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in built.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _write_random_adapter(folder: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    config = AdapterConfig(
        rank=rank, alpha=2 * rank, target_modules=tuple(sorted({name.rpartition(".")[2] for name in shapes}))
    )

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(std=WEIGHT_STD, generator=chance)

    weights = {
        name: LoRAWeights(normal(rank, columns), normal(rows, rank), config.scaling_of(name))
        for name, (rows, columns) in shapes.items()
    }
    write_adapter(folder, config, weights)


def _export_openvino(python: Path, model: Path, target: Path, weight_format: str) -> None:
    command = [str(python.with_name("optimum-cli")), "export", "openvino", "--model", str(model)]
    command += ["--task", "text-generation-with-past", "--weight-format", weight_format, str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(
            f"{command[0]} cannot be run: {error.strerror} (pip install 'optimum-intel[openvino]')"
        ) from error
    if done.returncode != 0:
        raise ConfigError(f"the export to OpenVINO failed: {done.stderr.strip().splitlines()[-1]}")
