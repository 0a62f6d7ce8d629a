"""Alerts, dashboards and the scrape config, looked at by Prometheus' own promtool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_testbed import tool

from tools.chart.helm import CHART, objects, template

pytestmark = pytest.mark.kubernetes

CPU = CHART / "ci" / "cpu-values.yaml"


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The rules of release demo, as Prometheus reads them."""
    rendered = objects(template(CPU, settings={"monitoring.rules.enabled": "true"}))
    (rule,) = (one for one in rendered if one["kind"] == "PrometheusRule")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rule["spec"]))
    return file


def test_rules_are_well_formed(rules: Path) -> None:
    assert "8 rules found" in promtool("check", "rules", "--lint=all", "--lint-fatal", rules)


def test_alerts_fire_when_they_should(rules: Path) -> None:
    shutil.copy(Path(__file__).with_name("alerts.yaml"), rules.parent)
    tests: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("alerts.yaml").read_text())
    tried = {one["alertname"] for test in tests["tests"] for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert tried == {rule["alert"] for group in yaml.safe_load(rules.read_text())["groups"] for rule in group["rules"]}
    assert "SUCCESS" in promtool("test", "rules", rules.parent / "alerts.yaml")


def test_the_scrape_config(tmp_path: Path) -> None:
    """Debian's promtool is built without Kubernetes' discovery: targets stand in for it."""
    config = yaml.safe_load((CHART / "prometheus-scrape.yaml").read_text())
    (discovery,) = config["scrape_configs"][0].pop("kubernetes_sd_configs")
    assert discovery["role"] == "pod"
    config["scrape_configs"][0]["static_configs"] = [{"targets": ["127.0.0.1:8080"]}]
    file = tmp_path / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    assert "SUCCESS" in promtool("check", "config", "--lint=all", "--lint-fatal", file)


def test_the_scrape_config_names_ports_that_pods_have() -> None:
    config = yaml.safe_load((CHART / "prometheus-scrape.yaml").read_text())
    (keep,) = (one for one in config["scrape_configs"][0]["relabel_configs"] if one.get("action") == "keep")
    rendered = objects(template(CPU, settings={"monitoring.podMonitor.enabled": "true"}))
    (service,) = (one for one in rendered if one["kind"] == "RayService")
    (monitor,) = (one for one in rendered if one["kind"] == "PodMonitor")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"] for port in head["ports"]}
    monitored = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert set(keep["regex"].split("|")) == monitored <= ports


@pytest.mark.parametrize("file", sorted(CHART.glob("dashboards/*.json")), ids=lambda file: file.stem)
def test_every_panel_s_query_is_one(file: Path, tmp_path: Path) -> None:
    panels = json.loads(file.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(expressions) == len(panels) > 5
    recorded = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$(namespace|release)", "x", expression)}
        for number, expression in enumerate(expressions)
    ]
    rules = tmp_path / "panels.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    promtool("check", "rules", rules)
