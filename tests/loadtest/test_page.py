"""The page: well-formed, complete, and on its own."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadtest.churn_review import ChurnReview
from loadtest.output import Report
from loadtest.run import Target
from loadtest.workload import Workload
from tests.loadtest.conftest import BAD, GOOD, make_measurement

_VOID = {"meta", "br", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Holds every end tag against its start tag; collects texts, tags and references."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self._open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def write(folder: Path, *runs: Any, attainment: float | None = None) -> tuple[Checker, dict[str, Any]]:
    report = Report(folder, "slora-short", Workload(), Target(address="localhost:1"), attainment)
    for run in runs:
        report.add(run)
    report.write()
    page = report.page.read_text()
    checker = Checker(page)
    assert not checker.references
    assert not {"script", "link", "img", "iframe"} & set(checker.tags)
    assert not any(word in page for word in ("http:", "https:", "url(", "@import"))
    return checker, json.loads((folder / "report.json").read_text())


def results(scale: float = 1.0) -> list[Any]:
    return [
        replace(
            GOOD,
            adapter=f"a{index % 3}",
            due=100.0 + index / 10,
            first_token=scale * (0.1 + index / 100),
            tier="device" if index >= 3 else "disk",
        )
        for index in range(30)
    ]


def test_a_single_run(tmp_path: Path) -> None:
    run = make_measurement(
        [*results(), replace(BAD, adapter="<b>&")],
        server={"model": "tiny <model>", "device": "cpu, float32", "version": "0.1.0", "commit": "0123456789ab+"},
        settings={"kv-cache-bytes": "2147483648", "prefix-cache": "on"},
        memory=[(100.0, 2.0**30), (101.0, 1.5 * 2.0**30)],
        mean_queue_seconds=0.0123,
    )
    page, document = write(tmp_path, run)
    text = "\n".join(page.texts)
    for shown in ("tiny <model>", "Time to first token", "a1", "<b>&", "NOT_FOUND", "12.3 ms", "Jain's index over 4"):
        assert shown in text
    for shown in ("cold: on disk", "host: in memory", "hot: in a slot", "Resident memory", "processor"):
        assert shown in text
    for shown in ("0123456789ab+", "kv-cache-bytes", "2,147,483,648", "prefix-cache"):
        assert shown in text
    for shown in ("strip throughput (S-LoRA)", "first token in 6 s", "End to end per token, the prompt's too"):
        assert shown in text
    for shown in ("1 of them had no success", "The worst 99th percentile of first tokens is 390 ms, of a2."):
        assert shown in text
    assert page.tags.count("svg") == 9  # five distributions, failures, adapters, tiers, memory
    assert document["server"]["commit"] == "0123456789ab+"
    assert document["settings"]["kv-cache-bytes"] == "2147483648"
    assert document["runs"][0]["codes"] == {"OK": 30, "NOT_FOUND": 1}
    assert (tmp_path / "run-first_token.hgrm").read_text().count("\n") > 10


def test_a_sweep(tmp_path: Path) -> None:
    runs = [
        make_measurement(results(scale), label=f"rate-{rate}", workload=Workload(rate=rate))
        for rate, scale in ((1.0, 1.0), (2.0, 2.0), (4.0, 90.0))
    ]
    page, document = write(tmp_path, *runs, attainment=0.9)
    assert document["sweep"]["goodput"] == 2.0
    assert document["sweep"]["rates"] == [1.0, 2.0, 4.0]
    text = "\n".join(page.texts)
    assert "2 /s" in text
    assert "Time to first token against offered rate" in text
    assert page.tags.count("polyline") >= 3 * 4 + 2 + 3 * 3
    assert page.texts.count("goodput") == page.texts.count("knee") == 4


def test_what_a_sweep_found_at_one_rate_has_one_mark(tmp_path: Path) -> None:
    failed = [replace(BAD, due=result.due) for result in results()]
    runs = [
        make_measurement([*results(), *more], label=f"rate-{rate}", workload=Workload(rate=rate))
        for rate, more in ((1.0, []), (2.0, failed))
    ]
    page, _ = write(tmp_path, *runs, attainment=0.9)
    assert page.texts.count("knee and goodput") == 5  # with the plot of failed requests
    assert "Failed requests by status code, against offered rate" in page.texts


@pytest.mark.parametrize(
    ("metrics_url", "values", "note"),
    [
        ("", {}, "not watched: give its Prometheus endpoint with --metrics-url."),
        ("localhost:9", {}, "localhost:9 does not tell the memory of its process."),
        ("localhost:9", {"memory": [(100.0, 2.0**30)], "metrics_missed": "3 samples are missing"}, "3 samples"),
    ],
)
def test_memory_that_was_not_watched_is_said(tmp_path: Path, metrics_url: str, values: Any, note: str) -> None:
    report = Report(tmp_path, "w", Workload(), Target(address="localhost:1", metrics_url=metrics_url), None)
    report.add(make_measurement(results(), **values))
    report.write()
    report.write()
    after = report.page.read_text().partition("<h2>Memory</h2>")[2]
    assert note in after.partition("<h2>")[0]


def test_faults_are_said_at_the_top(tmp_path: Path) -> None:
    run = make_measurement([replace(GOOD, lateness=0.2)], interrupted=True)
    gone = replace(run.outcomes[0], server_lost="the server was lost 3 s into the run: gone")
    run = replace(run, outcomes=[gone, replace(gone, process_lost=True)])
    page, _ = write(tmp_path, run)
    before_figures = "\n".join(page.texts).partition("Distributions")[0]
    assert "1 of 2 load processes ended early" in before_figures
    for shown in ("the server was lost 3 s", "Measured until then: 1 requests", "interrupted", "sent more than 200 ms"):
        assert shown in before_figures


def test_what_a_churn_checked_and_could_not_check(tmp_path: Path) -> None:
    review = ChurnReview(2, frozenset(), (), (), bystanders=7, warning="stale weights cannot be seen <here>")
    page, _ = write(tmp_path, make_measurement(results(), churn=review))
    text = "\n".join(page.texts)
    for shown in ("2 requests to adapters that came and went: 0 faults", "7 answers of other adapters", "<here>"):
        assert shown in text


def test_a_server_that_tells_little_of_itself(tmp_path: Path) -> None:
    page, document = write(tmp_path, make_measurement(results(), server={"model": "null", "device": ""}))
    assert f"null · {document['client']['date']}" in page.texts


def test_a_run_without_results_has_a_page(tmp_path: Path) -> None:
    page, document = write(tmp_path, make_measurement([], interrupted=True))
    assert document["runs"][0]["requests"] == 0
    assert "interrupted" in "\n".join(page.texts)
