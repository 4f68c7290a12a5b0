"""Files, configurations, names and sources that LoadAdapter refuses: each with its code, and nobody else harmed."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from server.pb.loraplex.v1 import adapters_pb2 as pb
from tests.adapters.test_format import BROKEN_FILES
from tests.server.rpc.conftest import Running
from tests.server.rpc.test_inference import ask, failure

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
# Files that go with another base: they have layers that ours has not, or none that ours has.
OF_ANOTHER_BASE = {"many empty tensors", "another layer index", "entry is no object"}


class Good:
    """A server, and what a good request is answered."""

    def __init__(self, running: Running, expected: list[int]) -> None:
        self.running = running
        self.expected = expected

    @classmethod
    async def of(cls, running: Running) -> "Good":
        return cls(running, await cls._answer(running))

    async def refuses(self, code: grpc.StatusCode, what: str, **load: Any) -> None:
        """And the next good request on the same connection is answered as ever."""
        error = await failure(self.running.adapters.LoadAdapter(pb.LoadAdapterRequest(**load)))
        assert error.code() == code, (what, error.details())
        assert await self._answer(self.running) == self.expected, what

    async def refuses_files(self, code: grpc.StatusCode, what: str, damage: Callable[[Path], object]) -> None:
        folder = self.running.adapters_dir / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.running.adapters_dir / "attention", folder)
        damage(folder)
        await self.refuses(code, what, name="x", source="broken")

    @staticmethod
    async def _answer(running: Running) -> list[int]:
        return list((await running.inference.Generate(ask(adapter="plain", max_tokens=2))).token_ids)


async def test_broken_files(running: Running) -> None:
    good = await Good.of(running)
    for fault, (damage, _) in BROKEN_FILES.items():
        await good.refuses_files(PRECONDITION if fault in OF_ANOTHER_BASE else INVALID, fault, damage)


async def test_configurations(running: Running) -> None:
    good = await Good.of(running)
    bad: list[tuple[dict[str, Any], grpc.StatusCode]] = [
        ({"r": 0}, INVALID),
        ({"r": "8"}, INVALID),
        ({"r": 10**6}, INVALID),
        ({"r": 8}, INVALID),  # than which the tensors have less
        ({"r": 65}, PRECONDITION),
        ({"lora_alpha": 0}, INVALID),
        ({"lora_alpha": 1e30}, INVALID),
        ({"lora_alpha": 1e-300}, INVALID),
        ({"peft_type": "LOHA"}, PRECONDITION),
        ({"modules_to_save": ["norm"]}, PRECONDITION),
        ({"trust_remote_code": True}, INVALID),
        ({"target_modules": "("}, INVALID),
        ({"target_modules": "(a+)+b"}, PRECONDITION),  # in linear time, and no layer of ours matches
        ({"target_modules": ["nothing"]}, PRECONDITION),
    ]
    for changes, code in bad:
        await good.refuses_files(code, str(changes), partial(_configure, changes))


def _configure(changes: dict[str, Any], folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


async def test_names_and_sources(running: Running, tmp_path: Path) -> None:
    good = await Good.of(running)
    for name in ("", " ", "..", "a/../b", "/etc/passwd", "a/", "%2e%2e", "CON", "a" * 300, "\u0430", "a@x", "a\nb"):
        await good.refuses(INVALID, repr(name), name=name)
    await good.refuses(grpc.StatusCode.NOT_FOUND, "nobody", name="nobody")
    await good.refuses(grpc.StatusCode.ALREADY_EXISTS, "the base's", name="tiny")
    (tmp_path / "outside").mkdir()
    (running.adapters_dir / "link").symlink_to(tmp_path / "outside")
    (running.adapters_dir / "loop").symlink_to(running.adapters_dir / "loop")
    os.mkfifo(running.adapters_dir / "pipe")
    for source in ("/etc", "../outside", "link", "loop", "pipe", "/dev/zero", "file:///etc", "http://169.254.169.254"):
        await good.refuses(INVALID, source, name="x", source=source)


async def test_files_that_are_too_large_for_this_base(running: Running) -> None:
    good = await Good.of(running)
    await good.refuses_files(
        INVALID, "ten gigabytes", lambda folder: os.truncate(folder / "adapter_model.safetensors", 10 << 30)
    )
