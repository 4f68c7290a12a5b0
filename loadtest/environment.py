"""Where a measurement was made: hardware, versions, commit."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from server.pb.loraplex.v1.inference_pb2 import ModelInfo


def client_environment() -> dict[str, str]:
    """The client's machine and software, and the command that ran."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["loraplex", *sys.argv[1:]]),
        "processor": f"{_processor()}, {os.cpu_count()} CPUs",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
        "loraplex": version("loraplex"),
        "commit": _commit(),
    }


def server_environment(model: ModelInfo) -> dict[str, str]:
    """What the server says of itself."""
    return {
        "model": f"{model.name} ({model.architecture})" if model.architecture else model.name,
        "device": f"{model.device}, {model.dtype}",
        "max_model_len": f"{model.max_model_len:,}",
        "adapter_slots": f"{model.num_adapter_slots}, rank up to {model.max_lora_rank}",
        "version": model.version,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit of the source tree that runs, with a + if it has changes; empty outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changes.stdout else "")
