"""OpenMP's threads, which torch and the native kernels share: how they wait, on which cores, and who has some.

Every thread that opens a parallel region keeps a team of its own. Within a step the engine's team waits for work a
thousand times, some microseconds each: awake, or the step takes a fifth longer. But a team that waits awake for a core
that others use keeps it from them. GNU's runtime, which torch brings on Linux, is told here; where there is another
one, its own ways hold.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

SPINS = "GOMP_SPINCOUNT"
_ENOUGH_SPINS = "10000"  # some 0.2 ms: over any wait within a step, far under a turn of the system's scheduler
_BINDING = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY")  # whoever sets one of them has decided about cores
_PAUSE_HARD = 2  # omp_pause_hard
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # what each thread of a parallel region calls


def bound_spinning() -> None:
    """Bounds how long a thread waits awake, unless the environment says it. Only before torch is loaded."""
    os.environ.setdefault(SPINS, _ENOUGH_SPINS)


def release_team() -> None:
    """Ends the calling thread's team; it gets a new one when it next needs one.

    Once there are more of such threads than cores, GNU's runtime lets all of them wait asleep.
    """
    if runtime := _runtime():
        runtime.omp_pause_resource_all(_PAUSE_HARD)


def work_alone() -> None:
    """The calling thread opens its parallel regions for itself alone from now on."""
    if runtime := _runtime():
        runtime.omp_set_num_threads(1)


@contextlib.contextmanager
def bound_team(device_type: str) -> Iterator[None]:
    """Within, each thread of the calling thread's team keeps to a core of its own, unless the environment says it.

    Only if the team has as many threads as there are cores: fewer would choose the same ones in every process. When
    another thread needs a core for a moment, the system else moves both of a team's threads to one, and there they take
    turns: for the time of a turn one waits awake for what the other could compute. What the caller had is given back.

    Args:
        device_type: where the steps are computed; but for "cpu" the caller is left free, and has no use for a team.
    """
    runtime = _runtime() if device_type == "cpu" else None
    places = _places(runtime.omp_get_max_threads()) if runtime and not any(map(os.environ.get, _BINDING)) else []
    if runtime is None or not places:
        yield
        return
    before = os.sched_getaffinity(0)

    def bind(_: int | None) -> None:
        with contextlib.suppress(OSError):  # the cores were taken from the process meanwhile
            os.sched_setaffinity(0, places[runtime.omp_get_thread_num()])

    runtime.GOMP_parallel(_REGION(bind), None, len(places), 0)
    try:
        yield
    finally:
        release_team()
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)


def _places(num_threads: int) -> list[set[int]]:
    """The processors of each thread: one of its own, or all those of one core; empty: there are fewer or more."""
    processors = os.sched_getaffinity(0)
    cores = {frozenset(_siblings(processor) & processors) for processor in processors}
    for places in ([{processor} for processor in processors], [set(core) for core in cores]):
        if len(places) == num_threads:
            return sorted(places, key=min)
    return []


def _siblings(processor: int) -> set[int]:
    """The processors that share a core with one, itself among them."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text()
    except OSError:
        return {processor}
    spans = [[int(end) for end in span.split("-")] for span in text.split(",")]
    return {sibling for span in spans for sibling in range(span[0], span[-1] + 1)}


def _runtime() -> ctypes.CDLL | None:
    """None: it is not loaded, by torch or anybody."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
