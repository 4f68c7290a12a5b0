"""Every command of README.md and docs/ does what it should, against a server with the tiny model.

Blocks are fenced and say what they are: `sh` is run; a language with a file name is a file, which a later command uses;
`text` is neither. A block with `not-run: REASON` is left alone. Commands are rewritten as little as needed: addresses,
`make` to its dry run, durations. Names of models and folders are made true instead.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_go

from tests.conftest import save_adapter, tiny_llama
from tests.server.server_process import Server
from tests.server.test_serve import free_port

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent
NODE_PACKAGES = ROOT / "tests" / "clients" / "node"
ADAPTERS = ("contacts", "dates", "tickets")  # those that the documents name: the demo's
TOOLS = ("curl", "node", "openssl")  # that commands use and that do not come with us

_FENCE = re.compile(r"^```(\S+)(?: (\S+\.\w+))?(?: not-run: (.+))?$")


@dataclass(frozen=True)
class Block:
    language: str
    file: str  # to write it to; empty: none
    why_not_run: str
    line: int
    text: str


def blocks(document: Path) -> Iterator[Block]:
    lines = document.read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(starts) % 2 == 0, document
    for start, end in zip(starts[::2], starts[1::2], strict=True):
        head = _FENCE.match(lines[start])
        assert head, f"{document.name}:{start + 1}: {lines[start]}"
        text = "".join(f"{line}\n" for line in lines[start + 1 : end])
        yield Block(head[1], head[2] or "", head[3] or "", start + 1, text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_says_what_it_is(document: Path) -> None:
    found = list(blocks(document))
    assert found
    for block in found:
        where = f"{document.name}:{block.line}"
        assert block.language in ("sh", "text") or block.file, f"{where}: a block of code needs a file name"
        if block.file and not block.why_not_run:
            later = [other.text for other in found if other.language == "sh" and not other.why_not_run]
            assert any(block.file in text for text in later), f"{where}: no command uses {block.file}"
    outside = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^\n {4}\S", outside, re.MULTILINE), f"{document.name}: a block without a fence"


def test_examples_in_go_are_go() -> None:
    """Parsed only: Debian's compiler is too old for gRPC."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_go.language()))
    found = [block for document in DOCUMENTS for block in blocks(document) if block.language == "go"]
    assert found
    assert not [block for block in found if parser.parse(block.text.encode()).root_node.has_error]


@dataclass(frozen=True)
class Workplace:
    """A folder in which the names that documents use mean something, and the server over it."""

    folder: Path
    server: Server


@contextmanager
def new_workplace(model_dir: Path, folder: Path) -> Iterator[Workplace]:
    for name in ADAPTERS:
        save_adapter(tiny_llama(), folder / "adapters-store" / name, seed=len(name), r=4, target_modules="all-linear")
    (folder / "cache" / "models").mkdir(parents=True)
    (folder / "cache" / "models" / "smollm2-135m").symlink_to(model_dir)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "protos").symlink_to(ROOT / "protos")
    server = Server(model_dir, folder / "adapters-store", "--max-num-seqs", "16")
    yield Workplace(folder, server)
    assert server.stop() == 0


@pytest.fixture(scope="module")
def shared_workplace(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with new_workplace(model_dir, tmp_path_factory.mktemp("documents")) as place:
        yield place


@pytest.fixture
def workplace(document: Path, model_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Workplace]:
    """One of its own for a document that changes adapters."""
    if re.search(r"adapters (upload|promote)", document.read_text(encoding="utf-8")):
        with new_workplace(model_dir, tmp_path) as place:
            yield place
    else:
        yield request.getfixturevalue("shared_workplace")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_does_what_it_should(
    document: Path, workplace: Workplace, require_tool: Callable[[str], str]
) -> None:
    folder, server = workplace.folder, workplace.server
    addresses = {
        "127.0.0.1:50051": server.address,
        "127.0.0.1:9090": server.metrics_address,
        "127.0.0.1:50052": f"127.0.0.1:{free_port()}",
    }
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "LORAPLEX_CACHE": str(folder / "cache"),
        "LORAPLEX_ADDRESS": server.address,
        "LORAPLEX_LISTEN": "127.0.0.1:0",
        "LORAPLEX_METRICS_LISTEN": "",
        "LORAPLEX_DEVICE": "cpu",
    }
    for block in blocks(document):
        if block.why_not_run or block.language == "text":
            continue
        text = block.text
        for written, real in addresses.items():
            text = text.replace(written, real)
        if block.file:
            (folder / block.file).write_text(text, encoding="utf-8")
            continue
        for tool in TOOLS:
            if re.search(rf"\b{tool} ", text):
                require_tool(tool)
        if "node " in text:
            install_node_packages(folder, require_tool("npm"))
        run(document, block, rewritten(text), folder, environment)


def rewritten(text: str) -> str:
    text = re.sub(r"^make (\w+)", rf"make --dry-run --directory={ROOT} \1", text, flags=re.MULTILINE)
    text = re.sub(r"--duration \d+", "--duration 1", text)
    text = re.sub(r"loraplex bench (\w+)", short_bench, text)
    text = text.replace("bench adapters", "bench adapters --registered 40 --requests 40")
    # Not a fixed time: this machine may be busy.
    text = re.sub(
        r"--listen 127.0.0.1:(\d+) &\nsleep \d+",
        r"--listen 127.0.0.1:\1 &\nuntil (: < /dev/tcp/127.0.0.1/\1) 2>/dev/null; do sleep 0.2; done",
        text,
    )
    return re.sub(r"(\S*loraplex serve) (?!--help)", r"exec \1 ", text)  # it gets the signal that ends it


def short_bench(command: re.Match[str]) -> str:
    """Streams of `swap` last as long as the tiny model lets them, so that there is time to load beside them."""
    output_tokens = 240 if command[1] == "swap" else 8
    return f"{command[0]} --rounds 1 --prompt-tokens 8 --output-tokens {output_tokens}"


def run(document: Path, block: Block, text: str, folder: Path, environment: dict[str, str]) -> None:
    """To its end, which must be 0; a server until it is ready, then until it has drained."""
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output = ""
    if "exec " in text:
        for line in process.stdout:
            output += line
            if "ready: listening on" in line:
                process.terminate()
    output += process.communicate(timeout=120)[0]
    assert process.returncode == 0, f"{document.name}:{block.line}:\n{block.text}\n{output}"


def install_node_packages(folder: Path, npm: str) -> None:
    """What the documents install by name, in the versions of the tests' lock file."""
    for file in ("package.json", "package-lock.json"):
        shutil.copy(NODE_PACKAGES / file, folder)
    subprocess.run([npm, "ci", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True)
