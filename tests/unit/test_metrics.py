"""Metrics: what is exported is what the docs and the dashboard name, in the manner of Prometheus."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from actors.pager_stand_in import PagerStandIn, SessionStandIn, some_stats
from latepage import Pager
from latepage.events import Event
from latepage.observe.metrics import COUNTERS, EVENTS, registry

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "packaging" / "grafana" / "latepage.json"

SUFFIXES = {"counter": ("_total",), "info": ("_info",), "histogram": ("_bucket", "_count", "_sum")}


def families(pager: PagerStandIn, *, per_vm: bool = False) -> list[Metric]:
    return list(registry(pager.as_pager(), per_vm=per_vm).collect())


def parsed(made: CollectorRegistry) -> list[Metric]:
    """What a reader of OpenMetrics gets."""
    text = generate_openmetrics(made).decode()  # type: ignore[no-untyped-call]
    return list(read_openmetrics(text))  # type: ignore[no-untyped-call]


@pytest.fixture
def pager() -> PagerStandIn:
    return PagerStandIn([SessionStandIn("vm-7"), SessionStandIn("vm-8", present=8)])


def test_every_counter_of_the_engine_is_a_metric() -> None:
    with Pager() as pager:
        assert set(COUNTERS) == set(pager.stats.counters)


def test_every_event_that_is_counted_is_one_of_the_engine() -> None:
    assert set(EVENTS) <= {kind.event for kind in Event.__subclasses__()}


@pytest.mark.parametrize("per_vm", [False, True])
def test_names_are_as_prometheus_wants_them(pager: PagerStandIn, per_vm: bool) -> None:
    for family in families(pager, per_vm=per_vm):
        assert family.name.startswith("latepage_")
        assert family.documentation
        assert not re.search(r"_(ms|us|ns|kib|mib|percent)(_|$)", family.name), "base units"
        for suffix in ("_total", "_info", "_count", "_sum", "_bucket"):
            assert not family.name.endswith(suffix), "the type says it"
        if "duration" in family.name:
            assert family.name.endswith("_seconds")


def test_both_formats_say_the_same(pager: PagerStandIn) -> None:
    pager.stats = some_stats(faults=7, populated_pages=5)
    made = registry(pager.as_pager(), per_vm=True)

    def samples(read: list[Metric]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in read
            for sample in family.samples
            if not sample.name.startswith("latepage_process_")
        }

    openmetrics = samples(parsed(made))
    assert openmetrics == samples(list(read_text(generate_latest(made).decode())))
    assert openmetrics["latepage_faults_total", ()] == 7
    assert openmetrics["latepage_population_pages_total", ()] == 5
    assert openmetrics["latepage_memory_bytes", (("state", "lacking"),)] == 6 * 4096
    assert openmetrics["latepage_vms", (("memory", "complete"),)] == 1


def test_a_histogram_only_grows_from_bound_to_bound_and_ends_with_all(pager: PagerStandIn) -> None:
    family = next(family for family in families(pager) if family.type == "histogram")
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            labels = sample.labels
            series.setdefault((labels["page_class"], labels["result"]), []).append((float(labels["le"]), sample.value))
    assert set(series) == {("source", "installed"), ("unknown", "failed")}
    for points in series.values():
        assert points == sorted(points)
        assert points[0][0] == 1.024e-06
        assert points[-1][0] == float("inf")
    assert [count for bound, count in series["source", "installed"] if bound < 10e-6] == [0] * 4


def test_no_number_of_vms_makes_more_series(pager: PagerStandIn) -> None:
    def labels(pager: PagerStandIn) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
        return [(sample.name, tuple(sample.labels.items())) for family in families(pager) for sample in family.samples]

    many = PagerStandIn([SessionStandIn(f"vm-{number}") for number in range(100)])
    assert labels(PagerStandIn()) == labels(pager) == labels(many)


def test_each_vm_has_its_own_where_that_was_asked_for(pager: PagerStandIn) -> None:
    shared = {family.name for family in families(pager)}
    own = [family for family in families(pager, per_vm=True) if family.name not in shared]
    assert own
    for family in own:
        assert {sample.labels["vm"] for sample in family.samples} == {"vm-7", "vm-8"}


def test_a_name_that_only_a_hostile_vm_has_breaks_no_line() -> None:
    name = 'a"b\\c\nlatepage_faults_total 99'
    made = registry(PagerStandIn([SessionStandIn(name)]).as_pager(), per_vm=True)
    read = {family.name: family for family in parsed(made)}
    assert read["latepage_vm_faults"].samples[0].labels == {"vm": name}
    assert read["latepage_faults"].samples[0].value == 0


def test_the_docs_have_the_table_of_what_is_exported(pager: PagerStandIn) -> None:
    exported = {}
    for family in families(pager, per_vm=True):
        labels = {label for sample in family.samples for label in sample.labels} - {"le", "quantile"}
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        exported[name] = (family.type, labels, family.documentation)
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(latepage_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"\w+", labels)), says) for name, kind, labels, says in rows}
    assert documented == exported
    assert len(rows) == len(documented), "each once"
    shared, own = page.split("### For each VM")
    for name in exported:
        assert (f"`{name}`" in own) == name.startswith("latepage_vm_"), "in its table"
        assert (f"| `{name}` |" in shared) != name.startswith("latepage_vm_")


def expressions() -> list[tuple[str, str]]:
    """Each panel's title with one of its expressions, and the queries of the dashboard's variables."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]
    variables = [(each["name"], each["query"]["query"]) for each in dashboard["templating"]["list"] if each["type"] == "query"]
    return found + variables


def test_the_dashboard_and_the_docs_ask_only_for_what_is_exported(pager: PagerStandIn) -> None:
    exported: dict[str, set[str]] = {}
    for family in families(pager):
        for suffix in SUFFIXES.get(family.type, ("",)):
            labels = {label for sample in family.samples for label in sample.labels} | {"job", "instance"}
            exported[family.name + suffix] = labels
    questions = re.findall(r"^\|.*\| `(.*latepage_.*)` \|$", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert questions
    for where, expression in [*expressions(), *(("docs", question) for question in questions)]:
        names = re.findall(r"\blatepage_\w+", expression)
        assert names, f"{where}: {expression}"
        for name in names:
            assert name in exported, f"{where}: {expression}"
        known = set().union(*(exported[name] for name in names))
        asked = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression))
        asked |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in re.findall(r"\w+", group)}
        assert asked <= known, f"{where}: {expression}"
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), f"{where}: {expression}"


def test_a_pager_that_is_gone_is_asked_for_of_what_outlives_it() -> None:
    """What it counts in its last moment is never scraped: `up`, and what was scraped before, are."""
    assert "left" not in EVENTS
    questions = re.findall(r"^\|.*\| `(.*latepage_.*)` \|$", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    for asked in ([expression for _, expression in expressions()], questions):
        gone = [expression for expression in asked if re.search(r"\bup\{", expression)]
        assert len(gone) == 1
        assert "== 0" in gone[0]
        assert "last_over_time(latepage_vms" in gone[0]


def test_counters_are_asked_for_as_rates() -> None:
    for where, expression in expressions():
        for counter in re.finditer(r"latepage_\w+(_total|_bucket|_count)\b", expression):
            before = expression[: counter.start()]
            assert re.search(r"(rate|increase)\($", before), f"{where}: {expression}"


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"] == "latepage"
    assert dashboard["schemaVersion"] >= 36
    assert {"title", "panels", "templating", "time", "refresh", "timezone"} <= set(dashboard)
    assert "id" not in dashboard, "Grafana gives it"
    assert "__inputs" not in dashboard
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another"
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["type"] in {"timeseries", "stat", "heatmap"}
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert {"defaults", "overrides"} == set(panel["fieldConfig"])
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)
        unit = panel["options"]["yAxis"] if panel["type"] == "heatmap" else panel["fieldConfig"]["defaults"]
        assert unit["unit"] in {"short", "s", "cps", "bytes", "Bps", "percentunit"}
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert variables == ["datasource", "job", "instance"]
    used = set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text()))
    assert used - {"__rate_interval", "__all"} == set(variables)
