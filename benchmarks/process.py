"""One run of a contender: a process of its own, which says what it found in its last line."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from server.openmp import SPINS


class RunFailed(Exception):
    """One run did not come to its end; the text is one line."""


def run_process(command: Sequence[str], *, threads: int, timeout: int) -> dict[str, Any]:
    """Runs a command in a process group of its own, for at most `timeout` seconds; its last line, which is JSON.

    Raises:
        RunFailed: it cannot be started, exits otherwise than with 0, takes too long, or says something else.
    """
    ours = ("LORAPLEX_", SPINS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
    except OSError as error:
        raise RunFailed(f"{command[0]} cannot be run: {error.strerror}") from error
    with process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"took longer than --timeout {timeout} seconds") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        raise RunFailed(last_error(errors) or f"ended with exit code {process.returncode}")
    try:
        result: dict[str, Any] = json.loads(output.strip().rpartition("\n")[2])
    except ValueError as error:
        raise RunFailed(f"gave no result, but: {output.strip()[-200:]!r}") from error
    return result


def last_error(text: str) -> str:
    """The line of a program's standard error that says what went wrong: the last exception, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt|Failed)\b", line)]
    return (exceptions or lines or [""])[-1][:300]
