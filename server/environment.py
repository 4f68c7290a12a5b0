"""The machine and the installation: what `loraplex env` prints for a bug report, and a server says of itself."""

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from loadtest.environment import commit, processor
from server.kernels import native

_PACKAGES = (
    "loraplex",
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "grpcio",
    "protobuf",
    "prometheus-client",
    "opentelemetry-sdk",
)
_VARIABLES = re.compile(r"(LORAPLEX|OTEL|OMP|MKL|HF|CUDA|PYTORCH|TRITON)_.+")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|HEADERS")


def environment() -> Iterator[tuple[str, str]]:
    """Names and values, in the order to print. Values of variables that may be secret are left out."""
    yield from machine()
    for name, value in sorted(os.environ.items()):
        if _VARIABLES.fullmatch(name):
            yield name, "(set)" if _SECRET.search(name) else value


def machine() -> Iterator[tuple[str, str]]:
    """Hardware and versions: what may be told to anybody."""
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    yield "processor", f"{processor()}, {os.cpu_count()} cores, {platform.machine()}"
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    for package in _PACKAGES:
        yield package, _version(package)
    if built_from := commit(Path(__file__)):
        yield "commit", built_from
    yield "native kernels", f"built, using {native.isa()}" if native.available() else "missing: torch does their work"
    yield "threads", str(torch.get_num_threads())
    yield "cuda", f"{torch.version.cuda or 'torch is built without it'}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"device cuda:{index}",
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, sm_{properties.major}{properties.minor}",
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
