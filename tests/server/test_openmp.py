"""How many threads there are, counted by the system."""

import os
import threading
from collections.abc import Callable

import pytest
import torch

from server import openmp

pytestmark = pytest.mark.skipif(openmp._runtime() is None, reason="torch has another OpenMP runtime than GNU's")


def threads_after(*work: Callable[[], object]) -> list[int]:
    """How many threads the process has after each piece of work, all done in a fresh thread with a team of two."""
    counts: list[int] = []

    def run() -> None:
        torch.get_num_threads()  # torch tells a new thread its own number, once
        runtime = openmp._runtime()
        assert runtime is not None
        runtime.omp_set_num_threads(2)
        for piece in work:
            piece()
            counts.append(len(os.listdir("/proc/self/task")))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return counts


def compute() -> object:
    return torch.ones(1 << 20).add_(1)


def test_a_thread_gives_its_team_back() -> None:
    before, after = threads_after(compute, openmp.release_team)
    assert after == before - 1


def test_a_thread_that_works_alone_has_no_team() -> None:
    before, after = threads_after(openmp.work_alone, compute)
    assert after == before


def test_the_environment_decides_how_long_to_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(openmp.SPINS, "7")
    openmp.bound_spinning()
    assert os.environ[openmp.SPINS] == "7"
    monkeypatch.delenv(openmp.SPINS)
    openmp.bound_spinning()
    assert int(os.environ[openmp.SPINS]) > 1000
    monkeypatch.delenv(openmp.SPINS)
