"""Where a measurement was made, in a checkout and outside of one."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtest.environment import client_environment, commit


def test_the_commit_of_a_checkout_and_whether_it_has_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require_tool: Callable[[str], str]
) -> None:
    git = [require_tool("git"), "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    source, installed = tmp_path / "source.py", tmp_path / "installed.py"
    source.touch()
    assert commit(source) == ""
    for arguments in (["init", "--quiet"], ["add", source.name], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert commit(source) == head[:12]
    installed.touch()
    assert commit(source) == f"{head[:12]}+"
    assert commit(installed) == "", "it is not part of the checkout that it lies in"
    monkeypatch.setenv("LORAPLEX_COMMIT", "of an image")
    assert (commit(installed), commit(source)) == ("of an image", f"{head[:12]}+")


def test_what_a_report_says_of_its_machine() -> None:
    environment = client_environment()
    assert all(environment[key] for key in ("date", "processor", "memory", "python", "grpcio", "loraplex"))
