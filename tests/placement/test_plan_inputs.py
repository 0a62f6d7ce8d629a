"""What `plan` takes from a real directory."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import numpy
import pytest
from mesh import running_directory
from placement_values import loads_of, manifest
from typer.testing import CliRunner

from expertmesh.artifact.manifest import read_manifest
from expertmesh.cli import app
from expertmesh.commands.plan_inputs import DeviceChoice, Subject, find_capacity
from expertmesh.directory.client import METADATA
from expertmesh.errors import ConfigError
from expertmesh.placement.planner import NO_COACTIVATION
from expertmesh.placement.shapes import shape_of
from expertmesh.placement.sizing import size_of_shape
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.v1 import directory_pb2_grpc, expert_pb2


def announce(directory: str, rows: int, fingerprint: str) -> None:
    """One replica, busy for half of its time."""
    load = expert_pb2.Load(busy=0.5, rows_total=rows)
    layers = [expert_pb2.LayerExperts(layer=0, experts=[0])]
    replica = pb.Replica(replica_id="a", group="g", address="127.0.0.1:1", fingerprint=fingerprint, layers=layers)
    replica.state = expert_pb2.REPLICA_STATE_READY
    replica.load.CopyFrom(load)
    told = [pb.LayerRows(layer=0, experts=[0], rows=[rows])]
    with grpc.insecure_channel(directory) as channel:
        directory_pb2_grpc.DirectoryServiceStub(channel).Announce(
            pb.AnnounceRequest(replica=replica, lease_ms=60_000, expert_rows=told), metadata=METADATA
        )


def test_a_running_cluster_does_not_tell_which_experts_fire_together(demo_artifact: Path) -> None:
    with running_directory() as directory:
        for rows in (0, 5000):
            announce(directory, rows, read_manifest(demo_artifact).fingerprint)
            time.sleep(0.2)
        asked = ["plan", "--artifact", str(demo_artifact), "--directory", directory, "--objective"]
        spread = CliRunner().invoke(app, [*asked, "spread"], catch_exceptions=False)
        assert f"! objective spread: {NO_COACTIVATION}\n" in spread.stdout
        with pytest.raises(ConfigError, match="objective gather: these loads do not tell"):
            CliRunner().invoke(app, [*asked, "gather"], catch_exceptions=False)


@pytest.mark.parametrize(("fingerprint", "source"), [("f" * 64, "observed: "), ("e" * 64, "assumed: ")])
def test_capacity_is_observed_of_the_model_that_is_planned_for(fingerprint: str, source: str) -> None:
    _, shape = shape_of("mixtral-8x7b")
    model = manifest({0: 8})
    with running_directory() as directory:
        subject = Subject(model, size_of_shape(model, shape), None, directory)
        for rows in (0, 5000):
            announce(directory, rows, fingerprint)
            time.sleep(0.2)
        found = find_capacity(subject, loads_of(numpy.ones((1, 8))), 0.6, DeviceChoice(None, None, None, 256), 60)
    assert found.source.startswith(source)
