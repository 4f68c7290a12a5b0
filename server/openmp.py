"""OpenMP's threads, which torch and the native kernels share: how long they wait awake, and who has some.

Every thread that opens a parallel region keeps a team of its own. Within a step the engine's team waits for work a
thousand times, some microseconds each: awake, or the step takes a fifth longer. But a team that waits awake for a core
that others use keeps it from them. GNU's runtime, which torch brings on Linux, is told here; where there is another
one, its own ways hold.
"""

import ctypes
import os

SPINS = "GOMP_SPINCOUNT"
_ENOUGH_SPINS = "10000"  # some 0.2 ms: over any wait within a step, far under a turn of the system's scheduler
_PAUSE_HARD = 2  # omp_pause_hard


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


def _runtime() -> ctypes.CDLL | None:
    """None: it is not loaded, by torch or anybody."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
