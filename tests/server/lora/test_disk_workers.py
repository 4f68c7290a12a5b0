"""The threads that wait for the disk."""

import asyncio
import threading

import pytest

from server.lora.disk_workers import DiskWorkers


async def test_two_work_at_a_time() -> None:
    workers = DiskWorkers("test")
    both, release = threading.Barrier(3), threading.Event()

    def work() -> str:
        both.wait(5)
        release.wait(5)
        return threading.current_thread().name

    first = [asyncio.create_task(workers.run(work)) for _ in range(2)]
    third = asyncio.create_task(workers.run(lambda: "third"))
    await asyncio.to_thread(both.wait, 5)
    assert not third.done()
    release.set()
    assert {name.rpartition("_")[0] for name in await asyncio.gather(*first)} == {"loraplex-test"}
    assert await third == "third"


async def test_who_is_cancelled_gets_back_when_the_work_is_done() -> None:
    workers = DiskWorkers("test")
    begun, release, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        release.wait(5)
        done.set()

    task = asyncio.create_task(workers.run(work))
    await asyncio.to_thread(begun.wait, 5)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()
