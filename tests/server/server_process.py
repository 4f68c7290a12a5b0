"""`loraplex serve` as a process of its own, forked off one that has loaded torch already: a start takes no seconds."""

import multiprocessing
import os
import re
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from server.cli import main

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.server.preloaded"])


class Server:
    """A server that is ready, or has ended since."""

    def __init__(self, model: Path, adapters: Path, *arguments: str) -> None:
        words = ["serve", "--model", str(model), "--adapters-dir", str(adapters), "--device", "cpu"]
        words += ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", *arguments]
        output, theirs = _FORKS.Pipe(duplex=False)
        self._process = _FORKS.Process(target=_run, args=(words, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._output = open(os.dup(output.fileno()), encoding="utf-8")  # noqa: SIM115
        self.banner = ""
        for line in self._output:
            self.banner += line
            if ready := re.search(r"ready: listening on ([^ \n\"]+)", line):
                self.address = ready.group(1)
                return
        raise AssertionError(f"the server ended: {self.banner}")

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def metrics_address(self) -> str:
        found = re.search(r"metrics (\S+),", self.banner)
        assert found
        return found.group(1)

    def signal(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Until it has ended; its exit code, or minus the signal that killed it."""
        with self._output:
            self.banner += self._output.read()
        self._process.join(60)
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(words: list[str], output: "Connection[Any, Any]") -> None:
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    main(words)
