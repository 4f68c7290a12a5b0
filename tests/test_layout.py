"""The house rules that a machine can check: imports point one way, and the generated stubs are current."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["server.kernels", "server.lora", "server.engine", "server.rpc"]  # each may import those before it


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def files(package: str) -> list[Path]:
    return [path for path in (ROOT / package.replace(".", "/")).rglob("*.py") if "pb" not in path.parts]


def test_adapters_import_nothing_of_the_server() -> None:
    for path in files("adapters"):
        assert not {name for name in imports(path) if name.startswith(("server", "loadtest"))}, path


def test_the_load_test_knows_only_the_stubs() -> None:
    for path in files("loadtest"):
        foreign = {name for name in imports(path) if name.startswith(("server", "adapters"))}
        assert all(name.startswith("server.pb") for name in foreign), path


def test_the_server_knows_of_adapters_only_their_format() -> None:
    for package in LAYERS:
        for path in files(package):
            foreign = {name for name in imports(path) if name.startswith("adapters")}
            known = ("base_fingerprint", "config", "errors", "folder", "format", "tensors")
            assert foreign <= {f"adapters.{module}" for module in known}, path


@pytest.mark.parametrize("package", LAYERS)
def test_layers_import_downwards(package: str) -> None:
    above = LAYERS[LAYERS.index(package) + 1 :]
    for path in files(package):
        assert not {name for name in imports(path) if name.startswith(tuple(above))}, path


def test_stubs_are_current(tmp_path: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iserver/pb=protos"]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *protos], cwd=ROOT, check=True)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    assert fresh
    for path, text in fresh.items():
        assert (ROOT / path).read_text() == text, f"run 'make protos': {path} is out of date"
