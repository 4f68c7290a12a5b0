"""Kills children at every step of what they do: `python -m tests.killed MODULE:FUNCTION TEMPLATE ROOTS`.

Each child calls the function with a copy of the template, a folder of its own in ROOTS. The first is killed at its
first call that the interpreter audits (files and folders that are opened, made, renamed, removed) or that syncs, the
second at its second, and so on until one comes to its end. Then some are killed in the middle of a write, where a file
grows over a size: by the kernel, so that no write escapes.
"""

import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

_SIZES = (0, 1, 20, 100, 1000, 2000)  # bytes of a file at which a child is killed
_EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.")


def roots_of_killed(work: str, template: Path, roots: Path) -> list[Path]:
    """What `work`, a `MODULE:FUNCTION`, left in copies of the template: by the step at which it was killed, of which
    the last came to its end; and then those that were killed in a write.
    """
    roots.mkdir()
    command = [sys.executable, "-m", "tests.killed", work, str(template), str(roots)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
    return sorted(roots.iterdir())


def _kill_at_every_step(work: Callable[[Path], object], template: Path, roots: Path) -> None:
    for step in count(1):
        root = roots / f"step-{step:03}"
        if not _is_killed(work, shutil.copytree(template, root), partial(_die_at_call, step)):
            break
    for size in _SIZES:
        root = roots / f"write-{size:04}"
        _is_killed(work, shutil.copytree(template, root), partial(_die_at_size, size))


def _is_killed(work: Callable[[Path], object], root: Path, prepare: Callable[[], None]) -> bool:
    child = os.fork()
    if not child:
        prepare()
        work(root)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL, signal.SIGXFSZ), status
    return status != 0


def _die_at_call(step: int) -> None:
    calls_left = step
    sync = os.fsync

    def call() -> None:
        nonlocal calls_left
        calls_left -= 1
        if not calls_left:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_EVENTS):
            call()

    def fsync(handle: int) -> None:
        call()
        sync(handle)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(audit)


def _die_at_size(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    _kill_at_every_step(getattr(importlib.import_module(module), function), Path(sys.argv[2]), Path(sys.argv[3]))
