"""The native library itself."""

import importlib.machinery
from pathlib import Path

import pytest

from server.kernels import native


def test_a_library_of_another_machine_is_left_alone_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._load() is None
    assert "cannot be used, build them anew" in caplog.text
