"""The scrape config for a Prometheus without the operator, applied to the pods that the chart renders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.kubernetes.pods import COMPONENT, NODE_TYPE, POOL
from tools.chart.helm import CHART, objects, template, values_files

CONFIG = yaml.safe_load((CHART / "prometheus-scrape.yaml").read_text())
(JOB,) = CONFIG["scrape_configs"]
META = "__meta_kubernetes_"
Labels = dict[str, str]


def as_label(name: str) -> str:
    """As Prometheus' discovery writes a label of a pod."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)


def ray_pods(rendered: list[dict[str, Any]]) -> Iterator[tuple[Labels, dict[str, Any]]]:
    """(labels, spec), with the labels that KubeRay puts there."""
    (service,) = (one for one in rendered if one["kind"] == "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    groups = [("head", "headgroup", cluster["headGroupSpec"])]
    groups += [("worker", one["groupName"], one) for one in cluster["workerGroupSpecs"]]
    for node_type, group, one in groups:
        template = one["template"]
        yield template["metadata"]["labels"] | {NODE_TYPE: node_type, POOL: group}, template["spec"]


def other_pods(rendered: list[dict[str, Any]]) -> Iterator[tuple[Labels, dict[str, Any]]]:
    for one in rendered:
        if one["kind"] == "Pod":
            yield one["metadata"].get("labels", {}), one["spec"]
        elif one["kind"] in ("Job", "Deployment"):
            made = one["spec"]["template"]
            yield made["metadata"]["labels"], made["spec"]


def selected(labels: Labels) -> bool:
    (discovery,) = JOB["kubernetes_sd_configs"]
    assert discovery["role"] == "pod"
    (selector,) = discovery["selectors"]
    assert selector["role"] == "pod"
    wanted = [part.partition("=") for part in selector["label"].split(",")]
    return all(key in labels and (not equals or labels[key] == value) for key, equals, value in wanted)


def discovered(labels: Labels, spec: dict[str, Any]) -> Iterator[Labels]:
    """One target for each port of each container, as `role: pod` finds them."""
    of_pod = {f"{META}pod_label_{as_label(key)}": value for key, value in labels.items()}
    for container in spec["containers"]:
        for port in container.get("ports", ()):
            number = str(port["containerPort"])
            yield of_pod | {
                f"{META}namespace": "default",
                f"{META}pod_name": "pod",
                f"{META}pod_container_port_name": port["name"],
                f"{META}pod_container_port_number": number,
                "__address__": f"10.0.0.1:{number}",
            }


def relabelled(target: Labels) -> Labels | None:
    """None where it is dropped; every label that is read must be there."""
    labels = dict(target)
    for step in JOB["relabel_configs"]:
        value = ";".join(labels[name] for name in step["source_labels"])
        if step.get("action") == "keep":
            if not re.fullmatch(step["regex"], value):
                return None
        else:
            assert step.keys() == {"source_labels", "target_label"}, "it replaces, and reads all of the value"
            labels[step["target_label"]] = value
    return {key: value for key, value in labels.items() if key == "__address__" or not key.startswith("__")}


@pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)
def test_what_is_read_of_the_pods(file: Path) -> None:
    rendered = objects(template(file, settings={"rebalancer.enabled": "true"}))
    found = set()
    for labels, spec in ray_pods(rendered):
        assert selected(labels)
        for target in filter(None, map(relabelled, discovered(labels, spec))):
            assert target.pop("namespace") == "default" and target.pop("pod") == "pod"
            assert target.pop("app_kubernetes_io_instance") == "demo"
            assert target.pop("app_kubernetes_io_component") == labels[COMPONENT]
            found.add((target.pop("ray_io_group"), int(target.pop("__address__").rpartition(":")[2])))
            assert target == {}
    pools = {labels[POOL] for labels, _ in ray_pods(rendered)}
    assert len(pools) > 2
    assert found == {(pool, 8080) for pool in pools} | {("headgroup", 44217), ("headgroup", 44227)}
    assert not any(selected(labels) for labels, _ in other_pods(rendered)), "they have no metrics"
    assert len(list(other_pods(rendered))) >= 2


def test_ray_exports_there() -> None:
    """At `/metrics`, which is Prometheus' default: by `ray start`'s argument, and by defaults of Ray."""
    from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
    from ray.dashboard.consts import DASHBOARD_METRIC_PORT

    assert JOB.keys().isdisjoint({"metrics_path", "scheme", "params"})
    rendered = objects(template(CHART / "ci" / "cpu-values.yaml"))
    (service,) = (one for one in rendered if one["kind"] == "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    told = [one["rayStartParams"] for one in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert {one["metrics-export-port"] for one in told} == {"8080"}
    assert (AUTOSCALER_METRIC_PORT, DASHBOARD_METRIC_PORT) == (44217, 44227)


def test_it_says_what_the_podmonitor_says() -> None:
    rendered = objects(template(CHART / "ci" / "cpu-values.yaml", settings={"monitoring.podMonitor.enabled": "true"}))
    (monitor,) = (one["spec"] for one in rendered if one["kind"] == "PodMonitor")
    steps = JOB["relabel_configs"]
    (keep,) = (one["regex"] for one in steps if one.get("action") == "keep")
    assert keep.split("|") == [one["port"] for one in monitor["podMetricsEndpoints"]]
    assert {JOB["scrape_interval"]} == {one["interval"] for one in monitor["podMetricsEndpoints"]}
    targets = {one["target_label"] for one in steps if "target_label" in one}
    # the operator adds these two by itself
    assert targets == {as_label(one) for one in monitor["podTargetLabels"]} | {"namespace", "pod"}


def test_alerts_and_dashboards_ask_for_labels_that_come() -> None:
    rendered = objects(template(CHART / "ci" / "cpu-values.yaml", settings={"monitoring.rules.enabled": "true"}))
    (rules,) = (one["spec"] for one in rendered if one["kind"] == "PrometheusRule")
    asked = set(re.findall(r"\b(?:app_kubernetes_io|ray_io)_\w+", json.dumps(rules)))
    for file in CHART.glob("dashboards/*.json"):
        asked |= set(re.findall(r"\b(?:app_kubernetes_io|ray_io)_\w+", file.read_text()))
    assert asked and asked <= {one.get("target_label") for one in JOB["relabel_configs"]}
