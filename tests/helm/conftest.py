from __future__ import annotations

import pytest
from chart_schemas import CHECKED, VERSIONS
from kubernetes_testbed import absent, api_server, namespace

from tools.chart.helm import tool, values_files

__all__ = ["api_server", "namespace"]


@pytest.fixture(scope="session", autouse=True)
def helm_is_here() -> None:
    if tool("helm") is None:
        absent("helm is neither on the PATH nor in the cache; tools/kubernetes-tools fetches it")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CHECKED["renders"]:
        terminalreporter.write_line(
            f"chart: {len(values_files())} values files x {len(VERSIONS)} Kubernetes versions, and "
            f"{CHECKED['combinations']} combinations of switches: {CHECKED['renders']} renders, "
            f"{CHECKED['objects']} objects checked against their schemas"
        )
