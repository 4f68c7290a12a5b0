"""What Prometheus makes of the server: its lint of the metrics, its answers, its rules."""

import re
import subprocess
from collections.abc import Callable

import pytest

from tests.deploy.conftest import DEPLOY, REQUESTS, TOKENS, Monitored

NUM_REQUESTS = sum(REQUESTS.values())
PROMPT_TOKENS = 40


def test_metrics_pass_the_lint(monitored: Monitored, require_tool: Callable[[str], str]) -> None:
    """All but the colon in the names that gateways read: they are what others call them."""
    done = subprocess.run(
        [require_tool("promtool"), "check", "metrics"],
        input=monitored.exposition(),
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = (done.stdout + done.stderr).splitlines()
    assert [line for line in complaints if not line.startswith("vllm:")] == []
    assert all(line.endswith("metric names should not contain ':'") for line in complaints)


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["check", "config"], "prometheus.yml"),
        (["check", "rules"], "alerts.yml"),
        (["test", "rules"], "alerts_test.yml"),
    ],
)
def test_promtool(require_tool: Callable[[str], str], command: list[str], file: str) -> None:
    done = subprocess.run(
        [require_tool("promtool"), *command, file],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test() -> None:
    alerts = {
        line.split(":")[1].strip()
        for line in (DEPLOY / "prometheus" / "alerts.yml").read_text().splitlines()
        if line.strip().startswith("- alert:")
    }
    tested = (DEPLOY / "prometheus" / "alerts_test.yml").read_text()
    assert alerts
    assert {name for name in alerts if f"alertname: {name}\n" not in tested} == set()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("loraplex_adapter_requests_total", {("plain",): 4, ("attention",): 2, ("other",): 2, ("base",): 2}),
        ("sum(loraplex_prompt_tokens_total)", {(): NUM_REQUESTS * PROMPT_TOKENS}),
        ("sum(loraplex_generation_tokens_total)", {(): NUM_REQUESTS * TOKENS}),
        ("sum(loraplex_adapter_steps_total)", {(): NUM_REQUESTS * TOKENS}),
        ("loraplex_iteration_tokens_count", {(): NUM_REQUESTS * TOKENS}),
        ("loraplex_step_seconds_count", {(): NUM_REQUESTS * TOKENS}),
        ("loraplex_requests_total > 0", {("length",): NUM_REQUESTS, ("refused",): 1}),
        ("loraplex_failed_requests_total", {("STEP_FAILED",): 0, ("NON_FINITE_LOGITS",): 0}),
        ("loraplex_time_to_first_token_seconds_count", {(): NUM_REQUESTS}),
        ("loraplex_inter_token_latency_seconds_count", {(): NUM_REQUESTS * (TOKENS - 1)}),
        ("loraplex_e2e_request_latency_seconds_count", {(): NUM_REQUESTS}),
        ("loraplex_request_queue_time_seconds_count", {(): NUM_REQUESTS}),
        ("loraplex_request_prefill_time_seconds_count", {(): NUM_REQUESTS}),
        ("loraplex_request_decode_time_seconds_count", {(): NUM_REQUESTS}),
        ("loraplex_num_requests_running + loraplex_num_requests_waiting", {(): 0}),
        ("loraplex_kv_cache_usage_ratio", {(): 0}),
        ("loraplex_num_preemptions_total", {(): 0}),
        ("loraplex_prefix_cache_query_tokens_total", {(): NUM_REQUESTS * PROMPT_TOKENS}),
        # Two whole blocks of 16, for all but the first request of each identity.
        ("loraplex_prefix_cache_hit_tokens_total", {(): (NUM_REQUESTS - len(REQUESTS)) * 32}),
        ("loraplex_adapters_resident", {("device",): 4, ("host",): 4}),
        ("sum by (adapter) (loraplex_adapter_resident)", {("plain",): 2, ("attention",): 2}),
        ("loraplex_adapter_host_bytes > 0 and loraplex_adapter_host_bytes < 1e6", 1),
        ("sum by (tier) (loraplex_adapter_loads_total)", {("device",): 4, ("host",): 4}),
        ("sum by (tier) (loraplex_adapter_hits_total)", {("device",): 4, ("host",): 4}),
        ("count by (tier) (loraplex_adapter_load_time_seconds_total > 0)", {("device",): 3, ("host",): 3}),
        ("loraplex_adapter_load_seconds_count", {(): 4}),
        ("loraplex_adapter_load_failures_total", {(): 0}),
        ("loraplex_adapter_merges_total or loraplex_adapter_unmerges_total", {}),
        ("loraplex_adapter_merged_bytes", {(): 0}),
        ("sum by (grpc_code) (grpc_server_handled_total)", {("OK",): NUM_REQUESTS, ("NOT_FOUND",): 1}),
        ("sum(grpc_server_started_total)", {(): NUM_REQUESTS + 1}),
        ("sum(grpc_server_msg_received_total)", {(): NUM_REQUESTS + 1}),
        ("sum(grpc_server_msg_sent_total)", {(): NUM_REQUESTS}),
        ("grpc_server_handling_seconds_count", {("Generate", "loraplex.v1.Inference", "unary"): NUM_REQUESTS + 1}),
        ("loraplex_build_info", 1),
        ("process_resident_memory_bytes > 1e7", 1),
        ('{__name__=~"vllm:.*"}', {}),
        ('{__name__=~".*_created"}', {}),
    ],
)  # fmt: skip
def test_what_it_answers(monitored: Monitored, query: str, expected: dict[tuple[str, ...], float] | int) -> None:
    """`expected`: the values by label, or only how many there are."""
    answer = monitored.query(query)
    assert (answer if isinstance(expected, dict) else len(answer)) == expected


def test_the_metrics_that_the_documents_name_exist(monitored: Monitored) -> None:
    named = re.findall(r"`((?:loraplex|grpc_server)_\w+)`", (DEPLOY.parent / "docs" / "operations.md").read_text())
    declared = re.findall(r"^# TYPE (\S+)", monitored.exposition(), re.MULTILINE)
    assert len(named) > 20
    assert set(named) <= set(declared)


def test_no_alert_of_a_healthy_server_fires(monitored: Monitored) -> None:
    rules = [rule for group in monitored.api("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule.get("state", "inactive") != "inactive"] == []


def test_gateways_find_their_gauges(monitored: Monitored) -> None:
    """Names and labels as the Gateway API inference extension reads them by default."""
    text = monitored.exposition()
    for gauge in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        assert f"\nvllm:{gauge} 0.0\n" in text
    labels = 'max_lora="32",running_lora_adapters="attention,head,plain,rslora",waiting_lora_adapters=""'
    assert f"\nvllm:lora_requests_info{{{labels}}} 1." in text
