"""Rows that each expert of a running cluster has computed, asked of its directory."""

from __future__ import annotations

import time

from expertmesh.directory.client import expert_load
from expertmesh.errors import ClusterError
from expertmesh.wire.tls import TlsFiles

Rows = dict[tuple[int, int], int]
"""(layer, expert) -> rows."""
FRESH_WITHIN_S, ASK_EVERY_S = 15.0, 0.25


class ExpertRowsReader:
    def __init__(self, directory: str, tls: TlsFiles | None = None) -> None:
        self._directory = directory
        self._tls = tls
        self._last: Rows = {}
        self._total: Rows = {}

    def read(self) -> Rows:
        """Totals that never fall, since the replicas of the first reading began; what a replica computed between the
        last reading and its end is missing. Empty where the directory does not answer.

        Waits until every replica has reported anew, which each does every few seconds.
        """
        try:
            rows = self._fresh()
        except ClusterError:
            return {}
        for key, count in rows.items():
            self._total[key] = self._total.get(key, 0) + max(0, count - self._last.get(key, 0))
        self._last = rows
        return dict(self._total)

    def _fresh(self) -> Rows:
        began = time.monotonic()
        while True:
            waited_s = time.monotonic() - began
            reply = expert_load(self._directory, 0, tls=self._tls)
            if reply.oldest_report_s <= waited_s or waited_s > FRESH_WITHIN_S:
                return {
                    (layer.layer, expert): rows
                    for layer in reply.layers
                    for expert, rows in zip(layer.experts, layer.rows, strict=True)
                }
            time.sleep(ASK_EVERY_S)
