"""The command from its flags to its files and exit codes, against a server that is well."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loadtest.cli import loadtest_command
from loadtest.named import WORKLOADS
from tests.loadtest.conftest import ScriptedServer, document, error_line, free_port

Start = Callable[..., ScriptedServer]


def test_a_run(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    done = loadtest("run", scripted().address, "--rate", "100", "--duration", "0.5", "--cv", "2")
    assert done.exit_code == 0, done.output
    assert "status codes: OK 50" in done.stdout
    written = document(tmp_path)
    assert written["workload"]["cv"] == 2
    assert written["server"]["model"] == "scripted"
    assert {row["name"] for row in written["runs"][0]["adapters"]} == {"a0", "a1", "a2", "a3"}
    assert (tmp_path / "report" / "report.html").exists()


def test_a_sweep_over_given_rates(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    server = scripted()
    done = loadtest("sweep", server.address, "--rates", "100,200", "--num-requests", "30")
    assert done.exit_code == 0, done.output
    assert [run["label"] for run in document(tmp_path)["runs"]] == ["rate-100", "rate-200"]
    salts = [request.cache_salt for request in server.requests]
    assert len(set(salts[:30])) == len(set(salts[30:])) == 1
    assert salts[0] != salts[30]  # or the second run would find its prompts in the prefix cache
    assert "requests keep every limit until" in done.stdout


@pytest.mark.parametrize(
    ("workload", "requests"),
    [
        ("punica-distinct", {"a0": 3, "a1": 3, "a2": 3, "a3": 3}),
        ("punica-identical", {"a0": 12}),
        ("punica-uniform", {"a0": 3, "a1": 3, "a2": 3, "a3": 3}),
    ],
)
def test_punica_takes_the_adapters_that_the_server_has(
    scripted: Start, tmp_path: Path, workload: str, requests: dict[str, int]
) -> None:
    flags = ["--workload", workload, "--num-requests", "12", "--max-tokens", "64", "--output", str(tmp_path / "report")]
    done = CliRunner().invoke(loadtest_command, ["run", "--address", scripted().address, *flags])
    assert done.exit_code == 0, done.output
    assert {row["name"]: row["requests"] for row in document(tmp_path)["runs"][0]["adapters"]} == requests


def test_what_is_cut_off_a_trace_is_said(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2024-05-10 00:00:0{second}.000000,{4000 if second == 1 else 8},8" for second in range(5)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    flags = ["--workload", "replay", "--trace", str(trace), "--rate", "10", "--duration", "0.25"]
    done = loadtest("run", scripted().address, *flags)
    assert done.exit_code == 0, done.output
    said = "items of the trace were left out: 2 after its cut (duration 0.25), 1 too long for the server"
    assert said in " ".join(done.stdout.split())
    assert said in (tmp_path / "report" / "report.html").read_text()
    assert document(tmp_path)["runs"][0]["requests"] == 2


def test_a_sweep_without_a_rate_to_start_from(loadtest: Callable[..., Result], scripted: Start) -> None:
    failed = loadtest("sweep", scripted().address, "--workload", "replay")
    assert failed.exit_code == 1
    assert error_line(failed).endswith("give --rate or --rates")


def test_named_workloads_are_listed() -> None:
    listed = CliRunner().invoke(loadtest_command, ["workloads"]).stdout
    assert all(name in listed.split() for name in WORKLOADS)


def test_nothing_is_left_of_an_earlier_report(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    server, folder = scripted(), tmp_path / "report"
    loadtest("sweep", server.address, "--rates", "100", "--num-requests", "3")
    (folder / "mine.txt").touch()
    assert (folder / "rate-100-first_token.hgrm").exists()
    loadtest("run", f"127.0.0.1:{free_port()}")
    assert (folder / "rate-100-first_token.hgrm").exists()  # nothing was measured that could take its place
    loadtest("run", server.address, "--rate", "100", "--num-requests", "3")
    assert sorted(path.name for path in folder.iterdir()) == [
        "mine.txt",
        "report.html",
        "report.json",
        "run-end_to_end.hgrm",
        "run-first_token.hgrm",
        "run-inter_token.hgrm",
        "run-per_output_token.hgrm",
        "run-per_token.hgrm",
    ]


def test_every_flag_has_an_environment_variable(
    loadtest: Callable[..., Result], scripted: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NUM_REQUESTS": "7", "RATE": "50", "SLO_FIRST_TOKEN": "3", "WORKLOAD": "burst-4"}.items():
        monkeypatch.setenv(f"LORAPLEX_LOADTEST_{name}", value)
    done = loadtest("run", scripted().address, "--rate", "100")
    assert done.exit_code == 0, done.output
    written = document(tmp_path)
    assert written["name"] == "burst-4"
    assert (written["workload"]["num_requests"], written["workload"]["rate"]) == (7, 100)  # the flag goes over it
    assert written["runs"][0]["slo"]["first_token"] == 3
    for command in ("run", "sweep", "null-server"):
        for parameter in loadtest_command.commands[command].params:
            if parameter.name == "config":  # which the command line as a whole adds
                continue
            envvar = {"--address": "LORAPLEX_ADDRESS", "--ca": "LORAPLEX_CA"}.get(
                parameter.opts[0], f"LORAPLEX_LOADTEST_{parameter.opts[0][2:].replace('-', '_').upper()}"
            )
            assert (parameter.envvar, getattr(parameter, "show_envvar", False)) == (envvar, True)


def test_help_names_the_environment_variable_and_the_key() -> None:
    said = " ".join(CliRunner().invoke(loadtest_command, ["sweep", "--help"], terminal_width=200).stdout.split())
    assert "YAML key: num_adapters. [env var: LORAPLEX_LOADTEST_NUM_ADAPTERS" in said
    assert "[env var: LORAPLEX_LOADTEST_BISECTIONS" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "slow"], "no workload 'slow'"),
        (["--workload", "replay"], "cannot read trace trace.csv"),
        (["--num-adapters", "5"], "num_adapters is 5, and the server has 4: lower --num-adapters"),
        (["--workload", "slora", "--prompt-tokens", "900:2000"], "the server takes 1,024"),
        (["--prompt-tokens", "8"], "'8' is not LOW:HIGH"),
        (["--metrics-url", "http://127.0.0.1:1/metrics"], "--metrics-url http://127.0.0.1:1/metrics: "),
        (["--output", "/dev/null/report"], "--output: cannot write to /dev/null/report: Not a directory"),
        (["--output", "/proc"], "--output: cannot write to /proc: "),
    ],
)
def test_wrong_settings(loadtest: Callable[..., Result], scripted: Start, arguments: list[str], message: str) -> None:
    server = scripted()
    failed = loadtest("run", server.address, *arguments)
    assert failed.exit_code == 1
    assert message in error_line(failed)
    assert not server.requests


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: [", "workload.yaml is not YAML: "),
        ("- rate", "a workload is a mapping of keys to values"),
        ("speed: 3", "workload.yaml: unknown key 'speed'; keys: like, rate, "),
        ("like: best", "workload.yaml: like is 'best', which is no named workload; "),
        ("rate: fast", "workload.yaml: rate is 'fast': it takes a number"),
        ("prompt_tokens: [9, 3]", "workload.yaml: prompt_tokens is 9:3: LOW must be at least 1 and less than HIGH"),
        (None, "cannot read workload "),
    ],
)
def test_wrong_workload_files(
    loadtest: Callable[..., Result], scripted: Start, tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "workload.yaml"
    if text is not None:
        file.write_text(text)
    failed = loadtest("run", scripted().address, "--workload", str(file))
    assert failed.exit_code == 1
    assert message in error_line(failed)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        *[(rates, "is not a number of requests per second") for rates in ("fast", "1,,2", "0", "inf", "-3")],
        ("100,2000000", "rate is 2000000.0: it takes 0 to 1,000,000"),
    ],
)
def test_wrong_rates(loadtest: Callable[..., Result], scripted: Start, rates: str, message: str) -> None:
    server = scripted()
    failed = loadtest("sweep", server.address, "--rates", rates)
    assert failed.exit_code == 1
    assert message in error_line(failed)
    assert not server.requests


def test_a_null_server_on_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = CliRunner().invoke(loadtest_command, ["null-server", "--listen", f"127.0.0.1:{port}"])
    assert failed.exit_code == 1
    assert error_line(failed).startswith(f"Error: cannot listen on 127.0.0.1:{port}")
