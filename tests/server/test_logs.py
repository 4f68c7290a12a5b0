"""What the process says: log lines of both kinds, the throughput line, `loraplex env`."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from server.cli import main
from server.logs import formatter
from server.throughput_log import ThroughputLog
from tests.server.engine.conftest import Engine


def test_json_lines() -> None:
    line = formatter("json").format(
        logging.LogRecord("loraplex", logging.INFO, "", 1, '%d "quoted"\nlines', (2,), None)
    )
    assert "\n" not in line
    fields = json.loads(line)
    assert fields["message"] == '2 "quoted"\nlines'
    assert (fields["level"], fields["logger"]) == ("INFO", "loraplex")
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", fields["timestamp"])

    error = ValueError("why")
    failed = logging.LogRecord("loraplex", logging.ERROR, "", 1, "failed", (), (ValueError, error, None))
    assert "ValueError: why" in json.loads(formatter("json").format(failed))["exc_info"]


def test_text_lines() -> None:
    line = formatter("text").format(logging.LogRecord("loraplex", logging.WARNING, "", 1, "careful", (), None))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING careful", line)


def test_the_throughput_line_is_silent_when_idle(model_dir: Path) -> None:
    engine = Engine(model_dir)
    metrics, scheduler = engine.metrics, engine.parts.scheduler
    throughput = ThroughputLog(metrics, scheduler)
    assert throughput.line(10) == ""

    engine.submit(list(range(40)), max_tokens=3)
    metrics.adapters.request("", 40)
    engine.core.step()
    metrics.adapters.tokens({"": 5})
    metrics.query_tokens.inc(40)
    metrics.hit_tokens.inc(10)
    blocks = scheduler.allocator.usage
    assert throughput.line(10) == (
        f"1 running, 0 waiting, prompt 4.0 and generation 0.5 tokens/s, KV cache {blocks:.1%}, prefix cache hits 25.0%"
    )
    assert throughput.line(10).startswith("1 running, 0 waiting, prompt 0.0 and generation 0.0 tokens/s, KV cache")
    engine.run()
    assert throughput.line(10) == ""


def test_env_says_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    done = CliRunner().invoke(main, ["env"])
    assert done.exit_code == 0
    values = dict(re.findall(r"^(.+?)  +(.+)$", done.output, re.MULTILINE))
    assert values["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert values.keys() >= {"loraplex", "torch", "grpcio", "processor", "memory", "native kernels", "threads", "cuda"}
    assert values["LORAPLEX_MAX_NUM_SEQS"] == "7"
    assert values["OTEL_EXPORTER_OTLP_HEADERS"] == "(set)"
    assert "secret" not in done.output
