"""Where a measurement was made: hardware, versions, commit."""

import os
import platform
import re
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
        "processor": f"{processor()}, {os.cpu_count()} CPUs",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
        "loraplex": version("loraplex"),
        "commit": commit(Path(__file__)),
    }


def server_environment(model: ModelInfo) -> dict[str, str]:
    """What the server says of itself."""
    return {
        "model": f"{model.name} ({model.architecture})" if model.architecture else model.name,
        "device": ", ".join(filter(None, (model.device, model.dtype))),
        "max_model_len": f"{model.max_model_len:,}",
        "adapter_slots": f"{model.num_adapter_slots}, rank up to {model.max_lora_rank}",
        "version": model.version,
        **dict(sorted(model.machine.items())),
    }


def processor() -> str:
    """As the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (found := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return found.group(1)
    return platform.processor() or platform.machine()


def commit(source: Path) -> str:
    """The commit that a file belongs to, with a + if its checkout has changes.

    Where git does not know the file, as in an image, what LORAPLEX_COMMIT says; empty: nothing.
    """
    git = ["git", "-C", str(source.parent)]
    try:
        # An installation may lie in a checkout of something else.
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LORAPLEX_COMMIT", "")
    return head.stdout.strip() + ("+" if changes.stdout else "")
