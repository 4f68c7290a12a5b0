"""Where a measurement was made, in a checkout and outside of one."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from loadtest.environment import client_environment, commit


def test_the_commit_of_a_checkout_and_whether_it_has_changes(
    tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    git = [require_tool("git"), "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    assert commit(tmp_path) == ""
    for arguments in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert commit(tmp_path) == head[:12]
    (tmp_path / "new").touch()
    assert commit(tmp_path) == f"{head[:12]}+"


def test_what_a_report_says_of_its_machine() -> None:
    environment = client_environment()
    assert all(environment[key] for key in ("date", "processor", "memory", "python", "grpcio", "loraplex"))
