"""The comparison: who runs when, what is kept when somebody fails, and one real run against PEFT."""

import io
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks.compare import Comparison, Results, Run, Settings, schedule
from benchmarks.contenders import CONTENDERS, PEERS, Peer, select
from benchmarks.material import Material
from benchmarks.report import Report
from benchmarks.workload import Workload, parse_workload
from server.cli import main
from server.errors import ConfigError

SETTINGS = Settings(prompt_tokens=5, output_tokens=4, threads=1, timeout=60)
OWN = select(["loraplex-float32"], [])


def test_rounds_alternate() -> None:
    pair = select(["loraplex-float32", "peft-mixed"], ["peft"])
    order = [(number, str(workload), contender.name) for number, workload, contender in schedule(WORK, pair, 2)]
    one = [("4x2", "loraplex-float32"), ("4x2", "peft-mixed"), ("4x2:unused", "loraplex-float32")]
    assert order == [(number, *who) for number in (1, 2) for who in one]


WORK = [parse_workload("4x2"), parse_workload("4x2:unused")]


def test_who_takes_part() -> None:
    assert {contender.program for contender in select([], ["peft"])} == {"loraplex", "peft"}
    assert [contender.name for contender in select(["peft-mixed"], ["peft", "vllm"])] == ["peft-mixed"]
    with pytest.raises(ConfigError, match=r"nobody.*loraplex-float32"):
        select(["nobody"], [])
    with pytest.raises(ConfigError, match="--llama-cpp"):
        select(["llama.cpp-f32"], [])


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_a_peer_is_given_by_its_flag_or_its_variable(peer: Peer, tmp_path: Path) -> None:
    """Who is given gets as far as the model, which is missing."""

    def error(*flags: str, **environment: str) -> str:
        arguments = ["bench", "compare", "--contenders", peer.name, "--model", str(tmp_path / "model"), *flags]
        return CliRunner().invoke(main, arguments, env={peer.variable: None, **environment}).output

    assert f"say where it is with {peer.flag}" in error()
    assert "no such folder" in error(peer.flag, sys.executable)
    assert "no such folder" in error(**{peer.variable: sys.executable})


def test_a_report_with_a_peer_that_failed_and_one_that_is_missing() -> None:
    workloads = [Workload(4, 0), Workload(4, 2)]
    pair = select(["loraplex-float32", "peft-mixed"], ["peft"])
    results = Results(
        runs=[Run("loraplex-float32", "4x0", number, rate, 1.0) for number, rate in enumerate((90.0, 100.0, 300.0))]
        + [Run("loraplex-float32", "4x2", 1, 80.0, 1.0), Run("peft-mixed", "4x0", 1, 40.0, 1.0)],
        failures={("peft-mixed", "4x2"): "OSError: no [such] file"},
        outputs={("loraplex-float32", "4x0"): [[1, 2]], ("peft-mixed", "4x0"): [[1, 3]]},
        versions={"peft-mixed": "peft 1"},
    )
    report = Report(results, workloads, pair)
    console = Console(record=True, width=160, file=io.StringIO())
    report.print(console)
    text = console.export_text()
    assert re.search(r"loraplex-float32 +\| +100\.0 +\| +80\.0", text)
    assert "40.0 (2.50×)" in text
    assert "failed: OSError: no [such] file" in text
    assert "vllm: not given" in text
    assert "--vllm PYTHON" in text
    assert "peft-mixed: peft 1\n" in text
    summary = report.as_dict()
    assert summary["versions"] == {"peft-mixed": "peft 1"}
    assert summary["medians"] == {"loraplex-float32": {"4x0": 100.0, "4x2": 80.0}, "peft-mixed": {"4x0": 40.0}}
    assert summary["own_ratios"] == {"4x2 over 4x0, loraplex-float32": 0.8}
    assert summary["agreements"][0]["share_of_tokens"] == 0.5


def test_loraplex_and_peft_on_the_tiny_model(model_dir: Path, tmp_path: Path) -> None:
    """The real thing: two processes a workload, tokens equal, so each request had the same adapter in both."""
    results = tmp_path / "results.json"
    arguments = ["bench", "compare", "--model", str(model_dir), "--work-dir", str(tmp_path), "--peft", sys.executable]
    arguments += ["--contenders", "loraplex-float32,peft-mixed", "--workloads", "4x2,4x2:skewed", "--rounds", "1"]
    arguments += ["--prompt-tokens", "5", "--output-tokens", "4", "--threads", "1", "--json", str(results)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(results.read_text())
    assert not found["failures"]
    assert set(found["medians"]) == {"loraplex-float32", "peft-mixed"}
    assert [item["equal_requests"] for item in found["agreements"]] == [4, 4]
    versions = {name: version(name) for name in ("loraplex", "peft", "torch", "transformers")}
    told = {
        "loraplex-float32": "loraplex {loraplex}, torch {torch}".format(**versions),
        "peft-mixed": "peft {peft}, transformers {transformers}, torch {torch}".format(**versions),
    }
    assert found["versions"] == told
    assert all(f"{name}: {text}" in done.output for name, text in told.items())


def test_one_that_fails_is_not_asked_again(model_dir: Path, tmp_path: Path) -> None:
    peer = tmp_path / "python"
    peer.write_text("#!/bin/sh\necho 'ImportError: no peer' >&2\nexit 1\n")
    peer.chmod(0o755)
    material = Material(model_dir, tmp_path / "work", lambda text: None)
    comparison = Comparison(material, {"peft": peer}, SETTINGS)
    lines: list[str] = []
    contenders = [contender for contender in CONTENDERS if contender.name == "peft-mixed"]
    for results in comparison.run([Workload(2, 1)], contenders, 3, lines.append):
        assert results.failures == {("peft-mixed", "2x1"): "ImportError: no peer"}
    assert len(lines) == 1
