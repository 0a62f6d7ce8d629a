"""Only processes that carry a cluster's marker are ended, orphans and those that ignore SIGTERM included."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid

from expertmesh.cluster.processes import MARKER, end, running

ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('set', flush=True); time.sleep(600)"
)


def test_end(tmp_path: object) -> None:
    marker = uuid.uuid4().hex
    environment = os.environ | {MARKER: marker}
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=os.environ | {MARKER: "other"})
    stubborn = subprocess.Popen([sys.executable, "-c", STUBBORN], env=environment, stdout=subprocess.PIPE)
    try:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        subprocess.run([sys.executable, "-c", ORPHAN], env=environment, check=True)
        deadline = time.monotonic() + 60
        while len(running(marker)) != 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(running(marker)) == 2
        end(marker, grace_s=0.5)
        assert running(marker) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        stubborn.kill()
        stubborn.wait()
