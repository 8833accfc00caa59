"""Every query of the dashboards and alerts is PromQL over metrics that the code exports."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from ray_jobs.telemetry import Telemetry as Learning
from services.console.watch import Metrics as Console
from services.ingest import gateway
from services.ingest import metrics as worker
from services.recommend.telemetry import Telemetry

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRAPED = {"job", "instance", "le"}  # labels that Prometheus and histograms add
SERIES = {Counter: ["_total"], Gauge: [""], Histogram: ["_bucket", "_sum", "_count"]}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Names of the time series, and the labels each may have."""
    metrics: list[Any] = [
        *vars(gateway.Metrics()).values(),
        *vars(worker.Metrics()).values(),
        *vars(Telemetry()).values(),
        *vars(Learning()).values(),
        *vars(Console()).values(),
    ]
    return {
        metric._name + suffix: set(metric._labelnames)
        for metric in metrics
        if isinstance(metric, MetricWrapperBase)
        for suffix in SERIES[type(metric)]
    }


def test_dashboards(exported: dict[str, set[str]]) -> None:
    panels = [
        panel
        for path in (DEPLOY / "dashboards").glob("*.json")
        for panel in json.loads(path.read_text())["panels"]
        if panel["type"] != "row"
    ]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    datasource = yaml.safe_load(
        (DEPLOY / "compose/grafana/datasources/prometheus.yaml").read_text()
    )["datasources"][0]
    used = set()
    for panel in panels:
        assert panel["datasource"] == {"type": datasource["type"], "uid": datasource["uid"]}
        for target in panel["targets"]:
            used |= _check(target["expr"], exported)
    shown = {name for name in exported if not name.endswith(("_sum", "_count"))}
    assert not shown - used, "exported, and on no dashboard"


def test_alerts(exported: dict[str, set[str]]) -> None:
    groups = yaml.safe_load((DEPLOY / "dashboards/alerts.yaml").read_text())["groups"]
    for rule in groups[0]["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "annotations"}
        assert rule["annotations"]["summary"] and rule["annotations"]["action"]
        assert _check(rule["expr"], exported)


def test_an_alert_tells_of_each_part_that_is_gone() -> None:
    groups = yaml.safe_load((DEPLOY / "dashboards/alerts.yaml").read_text())["groups"]
    trees = [promql_parser.parse(rule["expr"]) for rule in groups[0]["rules"]]
    watched = {
        str(selector.name)
        for tree in trees
        if isinstance(tree, promql_parser.Call) and tree.func.name == "absent"
        for selector in _selectors(tree)
    }
    for part in (gateway.Metrics(), worker.Metrics(), Telemetry(), Learning()):
        at_start = {
            sample.name
            for metric in vars(part).values()
            if isinstance(metric, MetricWrapperBase)
            for family in metric.collect()
            for sample in family.samples
        }
        assert watched & at_start, "no alert, or one on a series that comes with the first event"


def _check(query: str, exported: dict[str, set[str]]) -> set[str]:
    """Parse; every metric and label must exist. The metrics in it."""
    tree = promql_parser.parse(query)
    names = set()
    for selector in _selectors(tree):
        name = str(selector.name)
        labels = exported[name] | SCRAPED  # KeyError: no such metric
        names.add(name)
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels, query
    known = SCRAPED.union(*(exported[name] for name in names))
    for grouping in _groupings(tree):
        assert set(grouping) <= known, query
    return names


def _selectors(node: object) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    for child in _children(node):
        yield from _selectors(child)


def _groupings(node: object) -> Iterator[list[str]]:
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        yield node.modifier.labels
    for child in _children(node):
        yield from _groupings(child)


def _children(node: object) -> list[object]:
    if isinstance(node, promql_parser.BinaryExpr):
        return [node.lhs, node.rhs]
    if isinstance(node, promql_parser.Call):
        return list(node.args)
    if isinstance(node, promql_parser.AggregateExpr | promql_parser.ParenExpr):
        return [node.expr]
    return []
