"""The commands `loraplex adapters …` against a running server."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from click.testing import CliRunner, Result

from server.cli import main
from tests.conftest import ADAPTERS
from tests.server.rpc.conftest import Running, edit_config
from tests.server.rpc.conftest import running as running  # fixtures
from tests.server.rpc.conftest import serve as serve
from tests.server.rpc.test_inference import ask


async def command(running: Running, name: str, *arguments: str, columns: int = 200) -> Result:
    """Runs it in a thread, since the server lives in this one."""
    words = ["adapters", name, "--address", running.address, *arguments]
    return await asyncio.to_thread(CliRunner(env={"COLUMNS": str(columns)}).invoke, main, words)


async def said(running: Running, name: str, *arguments: str) -> str:
    result = await command(running, name, *arguments)
    assert result.exit_code == 0, result.output
    return result.output


async def test_the_life_of_an_adapter(running: Running) -> None:
    folder = str(running.adapters_dir / "plain")
    assert re.search(
        r"mail@1: generation 1, rank 8 on 14 layers, .*, pinned\n",
        await said(running, "upload", "--pin", "mail", folder),
    )
    assert "mail@2" in await said(running, "upload", "--replace", "mail", str(running.adapters_dir / "attention"))
    listed = await said(running, "list")
    assert re.search(r"mail +1 .*READY \(host, pinned\)", listed)
    assert re.search(r"mail +2 \* ", listed)
    found = len(ADAPTERS) + 2
    assert re.search(rf"{found} versions; host memory 0\.\d of 4,096\.0 MiB, 0\.\d pinned; 0\.0 MiB more", listed)
    assert "mail means mail@1" in await said(running, "promote", "mail", "1")
    assert re.search(r"mail +2 +25 %", await said(running, "traffic", "mail", "2=25"))
    assert "%" not in await said(running, "traffic", "mail")
    assert "not pinned" in await said(running, "unpin", "mail@1")
    assert re.search(r"mail: merged in \d+ ms, [\d,]+ bytes beside the base", await said(running, "merge", "mail"))
    assert re.search(r"unmerged in \d.* ms, [1-9][\d,]+ bytes freed", await said(running, "unmerge"))
    assert "pinned" in await said(running, "pin", "mail@1")
    assert re.search(r"generation +│ 1 ", await said(running, "get", "mail"))
    assert "generation 3" in await said(running, "load", "--replace", "mail")
    assert "generation 4" in await said(running, "load", "--expected-generation", "3", "mail")
    assert re.search(r"mail: freed [\d,]+ bytes of host", await said(running, "unload", "--mode", "if-idle", "mail"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["load", "nobody"], "Error: NOT_FOUND from .*'nobody' is not known here.*"),
        (["load", "--expected-generation", "7", "plain"], "Error: ABORTED from .*somebody else changed it"),
        (["upload", "plain", "{plain}"], "Error: ALREADY_EXISTS from .*set replace.*"),
        (["upload", "new", "{empty}"], "Error: .*adapter_config.json is missing.*"),
        (["traffic", "plain", "1=x"], "Error: Invalid value for shares: '1=x' is not VERSION=PERCENT"),
        (["promote", "plain", "3"], "Error: NOT_FOUND from .*"),
    ],
)
async def test_errors_are_one_line(running: Running, tmp_path: Path, words: list[str], line: str) -> None:
    (tmp_path / "empty").mkdir()
    names = {"plain": str(running.adapters_dir / "plain"), "empty": str(tmp_path / "empty")}
    result = await command(running, words[0], *[word.format(**names) for word in words[1:]])
    assert result.exit_code != 0
    assert re.fullmatch(line, result.output.splitlines()[-1]), result.output
    assert "Traceback" not in result.output


async def test_what_files_say_is_shown_as_it_is(running: Running) -> None:
    edit_config(running.adapters_dir / "attention", '"r": 4', '"r": 4, "[/x][bold]": 1')
    assert (await command(running, "load", "attention")).exit_code == 1
    for words in (["list"], ["get", "attention"]):
        assert "'[/x][bold]'" in await said(running, *words)


async def test_another_base_and_targets_without_a_layer_are_warned_of(running: Running) -> None:
    path = running.adapters_dir / "attention" / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": "someone/large", "target_modules": ["q_proj", "v_proj", "nonsense"]}
    path.write_text(json.dumps(config))
    loaded = await said(running, "load", "attention")
    assert "warning: trained on someone/large, which is not how the served base is called" in loaded
    assert "warning: target_modules that match no layer: nonsense" in loaded
    assert re.search(r"other_base +│ someone/large ", await said(running, "get", "attention"))


async def test_the_table_has_the_bytes_of_every_tier(running: Running) -> None:
    await running.inference.Generate(ask(adapter="head"))
    listed = await said(running, "list")
    assert re.search(r"name +version +state +rank +disk MiB +host MiB +digest", listed), "nothing is on a GPU, or waits"
    assert re.search(r"head +1 \* +READY \(device\) +6 +0\.0 +0\.0 +[0-9a-f]{12}", listed)
    assert re.search(
        r"layers_by_target +│ (lm_head: 1, k_proj: 2|k_proj: 2, lm_head: 1) ", await said(running, "get", "head")
    )


async def test_a_narrow_terminal_cuts_nothing_off(running: Running) -> None:
    name = "long-" * 12
    shutil.copytree(running.adapters_dir / "plain", running.adapters_dir / f"{name}x")
    await running.engine.adapters.look(f"{name}x")
    loaded = await said(running, "load", f"{name}x")
    listed = (await command(running, "list", columns=80)).output
    told = (await command(running, "get", f"{name}x", columns=80)).output
    assert "…" not in listed + told
    assert re.search(rf"READY \(host\) .* {loaded.split()[-1]}", listed)


async def test_an_adapter_without_an_effect_is_warned_of(running: Running) -> None:
    path = running.adapters_dir / "attention" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: 0 * tensor for name, tensor in tensors.items()}, path)
    assert "warning: every B is zero" in await said(running, "load", "attention")


async def test_watch_prints_until_the_server_stops(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("server.adapter_commands.click.echo", lines.append)
    watching = asyncio.create_task(command(running, "watch"))

    async def printed(pattern: str) -> None:
        async with asyncio.timeout(10):
            while not any(re.search(pattern, line) for line in lines):
                await asyncio.sleep(0.01)

    await printed("SYNCED")
    assert any("SNAPSHOT plain@1 AVAILABLE" in line for line in lines)
    await running.engine.adapters.load("plain")
    await printed(r"LOADED   plain@1 READY \(host\) generation 1$")
    await running.server.drain(grace=5)
    result = await watching
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
