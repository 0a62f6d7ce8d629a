"""Rows that each expert of a running cluster has computed, asked of its replicas through Ray Serve's handles.

Ray is joined by a process of its own: `python -m loadtest.expert_rows` reads a line of groups, answers with a line of
counts, and so on until its stdin ends.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

from expertmesh.args import experts_application
from expertmesh.cluster.record import Record

Rows = dict[tuple[int, int], int]
"""(layer, expert) -> rows."""
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 60.0, 10.0


class ExpertRowsReader:
    """Of a cluster that runs on this machine; other clusters' Ray is not ours to join."""

    def __init__(self, cluster: Record) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._last: Rows = {}
        self._total: Rows = {}
        if cluster.temp_dir is None:
            return
        try:
            address = next(Path(cluster.temp_dir).glob("ray_current_cluster")).read_text().strip()
        except (StopIteration, OSError):
            return
        ours = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
        token = {"RAY_AUTH_TOKEN": cluster.token} if cluster.token else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.expert_rows", address],
            env=os.environ | ours | token,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._timeout_s = START_TIMEOUT_S

    def read(self, groups: list[str]) -> Rows:
        """Totals that never fall, since the first reading's begin; a replica that was restarted counts from 0 again.
        Empty where the replicas cannot be asked."""
        for key, rows in self._ask(groups).items():
            before = self._last.get(key, 0)
            self._total[key] = self._total.get(key, 0) + (rows - before if rows >= before else rows)
            self._last[key] = rows
        return dict(self._total)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, groups: list[str]) -> Rows:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return {}
        try:
            print(json.dumps(groups), file=process.stdin, flush=True)
            ready, _, _ = select.select([process.stdout], [], [], self._timeout_s)
            line = process.stdout.readline() if ready else ""
        except OSError:
            line = ""
        if not line:
            self.close()
            return {}
        self._timeout_s = ANSWER_TIMEOUT_S
        return {(layer, expert): rows for layer, expert, rows in json.loads(line)}


def main(address: str) -> None:
    import ray
    from ray import serve

    ray.init(address=address, _node_ip_address="127.0.0.1", log_to_driver=False, configure_logging=False)
    for line in sys.stdin:
        totals: Rows = {}
        for group in json.loads(line):
            handle = serve.get_app_handle(experts_application(group))
            for answer in handle.broadcast("expert_rows").results(timeout_s=5, return_exceptions=True):
                if isinstance(answer, dict):
                    add(totals, answer)
        print(json.dumps([(layer, expert, rows) for (layer, expert), rows in totals.items()]), flush=True)


def add(totals: Rows, counts: dict[int, list[int]]) -> None:
    for layer, experts in counts.items():
        for expert, rows in enumerate(experts):
            totals[layer, expert] = totals.get((layer, expert), 0) + rows


if __name__ == "__main__":
    main(sys.argv[1])
