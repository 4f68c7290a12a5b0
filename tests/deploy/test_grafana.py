"""The dashboard asks for what the server has."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.deploy.conftest import DEPLOY, Monitored

ROOT = DEPLOY.parent
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "loraplex.json").read_text())


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def test_every_expression_is_valid_and_its_metrics_exist(monitored: Monitored) -> None:
    scraped = set(monitored.api("label/__name__/values"))
    declared = set(re.findall(r"^# TYPE (\S+)", monitored.exposition(), re.MULTILINE))
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    assert len(expressions) > 40
    for expression in expressions:
        monitored.query(expression.replace("$__rate_interval", "1m").replace("$instance", ".*"))
        names = re.findall(r"\b(?:loraplex|grpc_server|process|vllm)[_:][\w:]+", expression)
        assert names or "up{" in expression, expression
        missing = {name for name in names if name not in scraped | declared and ":" not in name}
        assert not missing, expression


def test_recorded_series_exist_by_name() -> None:
    recorded = re.findall(r"record: (\S+)", (DEPLOY / "prometheus" / "alerts.yml").read_text())
    for panel in panels():
        for target in panel["targets"]:
            assert set(re.findall(r"loraplex:[\w:]+", target["expr"])) <= set(recorded)


def test_panels_do_not_overlap_and_share_the_provisioned_data_source() -> None:
    sources = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text())
    uid = sources["datasources"][0]["uid"]
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in panels():
        assert {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])} == {uid}


def test_compose_mounts_what_is_there_and_scrapes_its_own_server() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    mounts = [
        mount.split(":")
        for service in compose["services"].values()
        for mount in service["volumes"]
        if mount.startswith("./")
    ]
    assert {target for _, target, *_ in mounts} >= {"/etc/prometheus", "/etc/grafana/provisioning"}
    assert all((ROOT / source).is_dir() for source, *_ in mounts)
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    service, port = scraped["static_configs"][0]["targets"][0].split(":")
    assert service in compose["services"]
    assert f"LORAPLEX_METRICS_LISTEN=0.0.0.0:{port}" in (ROOT / "Dockerfile").read_text()
    provider = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "dashboards" / "loraplex.yml").read_text())
    assert provider["providers"][0]["options"]["path"] in {target for _, target, *_ in mounts}
