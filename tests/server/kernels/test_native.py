"""The native library itself."""

import importlib.machinery
import os
import threading
from pathlib import Path

import pytest
import torch

from server.kernels import native


def test_a_library_of_another_machine_is_left_alone_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._load() is None
    assert "cannot be used, build them anew" in caplog.text


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.skipif(torch.get_num_threads() == 1, reason="one core has no team")
def test_a_thread_gives_its_team_back() -> None:
    counts = []

    def work() -> None:
        torch.ones(1 << 20).add_(1)
        counts.append(len(os.listdir("/proc/self/task")))
        native.release_threads()
        counts.append(len(os.listdir("/proc/self/task")))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counts[1] == counts[0] - torch.get_num_threads() + 1
