"""The Job that makes the artifact, its script run here: before the checkpoint is on the volume, and once it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from session_cluster import DEMO_CHECKPOINT

from tools.chart.helm import CHART, objects, template

CPU = CHART / "ci" / "cpu-values.yaml"


def script(volume: Path) -> list[str]:
    settings = {
        "model.mountPath": str(volume),
        "model.prepare.source": str(volume / "checkpoint"),
        "cluster.model.artifact": str(volume / "artifact"),
    }
    (job,) = (one for one in objects(template(CPU, settings=settings)) if one["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return [*container["command"], *container["args"]]


def test_it_waits_for_a_checkpoint_that_is_copied_to_the_volume(tmp_path: Path) -> None:
    """The claim is made with the release: nothing can be on it before."""
    command = script(tmp_path)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as job:
        until = time.monotonic() + 60
        while "waiting for" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.1)
        # as docs/kubernetes.md has it: under another name until it is complete
        shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint.part")
        (tmp_path / "checkpoint.part").rename(tmp_path / "checkpoint")
        assert job.wait(300) == 0, log.read_text()
    assert log.read_text().startswith(f"waiting for {tmp_path}/checkpoint, which is not on the volume yet\n")
    assert (tmp_path / "artifact" / "manifest.json").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert again.stdout == f"{tmp_path}/artifact is complete\n"
