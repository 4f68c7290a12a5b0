"""The native library itself."""

import ctypes
import importlib.machinery
from pathlib import Path

import pytest

from server.kernels import native


def test_a_library_of_another_machine_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    library, missing_because = native._load()
    assert library is None
    assert missing_because.startswith("cannot be loaded, build them anew (")


def test_where_nothing_was_built_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._load() == (None, "are not built (no C compiler at install)")


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
def test_a_library_built_from_another_source_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions have the same names, and would read memory as it is not laid out any more."""
    assert native._load()[0] is not None
    monkeypatch.setattr(native, "_ABI", native._ABI + 1)
    library, missing_because = native._load()
    assert library is None
    assert f"has layout {native._ABI - 1}, this server needs {native._ABI}" in missing_because


def test_a_library_without_a_layout_is_left_alone() -> None:
    with pytest.raises(ValueError, match="loraplex_abi"):
        native._typed(ctypes.CDLL(None))
