"""What `helm test` runs, on the session's cluster."""

from __future__ import annotations

import pytest
from session_cluster import Cluster

from expertmesh.cluster.smoke import check_completion, check_groups, check_health, check_refusal
from expertmesh.errors import ClusterError

pytestmark = pytest.mark.cluster


def test_a_cluster_that_answers(cluster: Cluster) -> None:
    assert check_health(cluster.directory) == "gRPC health check: success"
    assert "of 4 groups" in check_groups(cluster.directory, "abcd")
    assert check_completion(cluster.http, cluster.model).startswith("completion: 'The capital of France is' -> ")


def test_what_is_missing_is_named(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"no ready replica of group x, y$"):
        check_groups(cluster.directory, ["a", "y", "x"])
    with pytest.raises(ClusterError, match="HTTP 404"):
        check_completion(cluster.http, "another")
    with pytest.raises(ClusterError, match="UNAVAILABLE"):
        check_health("127.0.0.1:1")
    for check in (check_completion, check_refusal):
        with pytest.raises(ClusterError, match="ConnectError"):
            check("http://127.0.0.1:1", "demo")


def test_an_api_that_should_ask_for_a_key(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="without a key: HTTP 200 instead of 401"):
        check_refusal(cluster.http, cluster.model)
