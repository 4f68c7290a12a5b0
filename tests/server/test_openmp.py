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


def processors_of_a_team(num_threads: int, device_type: str = "cpu") -> tuple[list[set[int]], bool]:
    """On which processors each of a fresh thread's bound team may run, and whether that thread got its own back."""
    found: dict[int, set[int]] = {}
    given_back: list[bool] = []

    def run() -> None:
        torch.get_num_threads()
        runtime = openmp._runtime()
        assert runtime is not None
        runtime.omp_set_num_threads(num_threads)
        before = os.sched_getaffinity(0)

        def look(_: int | None) -> None:
            found[runtime.omp_get_thread_num()] = os.sched_getaffinity(0)

        with openmp.bound_team(device_type):
            runtime.GOMP_parallel(openmp._REGION(look), None, num_threads, 0)
        given_back.append(os.sched_getaffinity(0) == before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == num_threads
    return [found[number] for number in range(num_threads)], given_back[0]


def test_a_team_of_as_many_threads_as_cores_has_one_for_each() -> None:
    processors = os.sched_getaffinity(0)
    found, given_back = processors_of_a_team(len(processors))
    assert found == [{processor} for processor in sorted(processors)]
    assert given_back


def test_a_team_of_another_size_goes_where_the_system_has_room() -> None:
    processors = os.sched_getaffinity(0)
    found, given_back = processors_of_a_team(len(processors) + 1)
    assert found == [processors] * (len(processors) + 1)
    assert given_back


def test_a_thread_that_feeds_another_device_is_free() -> None:
    processors = os.sched_getaffinity(0)
    found, _ = processors_of_a_team(len(processors), "cuda")
    assert found == [processors] * len(processors)


def test_the_environment_decides_about_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    processors = os.sched_getaffinity(0)
    found, _ = processors_of_a_team(len(processors))
    assert found == [processors] * len(processors)


def test_a_thread_for_each_core_may_use_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5, 6})
    monkeypatch.setattr(openmp, "_siblings", lambda processor: {processor % 4, processor % 4 + 4})
    assert openmp._places(3) == [{0, 4}, {1, 5}, {2, 6}]
    assert openmp._places(6) == [{0}, {1}, {2}, {4}, {5}, {6}]
    assert openmp._places(2) == []


def test_the_environment_decides_how_long_to_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(openmp.SPINS, "7")
    openmp.bound_spinning()
    assert os.environ[openmp.SPINS] == "7"
    monkeypatch.delenv(openmp.SPINS)
    openmp.bound_spinning()
    assert int(os.environ[openmp.SPINS]) > 1000
    monkeypatch.delenv(openmp.SPINS)
