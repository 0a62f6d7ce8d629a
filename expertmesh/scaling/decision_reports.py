"""Decisions on their way to the directory, from a thread of their own: whoever decides never waits."""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque

from expertmesh.directory.client import report_decision
from expertmesh.errors import ClusterError, ConfigError
from expertmesh.v1 import directory_pb2 as pb
from expertmesh.wire.tls import TlsFiles

logger = logging.getLogger("ray.serve.expertmesh.scaling")

MAX_WAITING = 1024
PAUSE_S = 1.0


class DecisionReports:
    """To one directory. Where it is away, the newest decisions wait; what no longer fits is dropped, oldest first."""

    def __init__(self, address: str, tls: TlsFiles | None = None) -> None:
        self._address = address
        self._tls = tls
        self._waiting: deque[pb.ScalingDecision] = deque(maxlen=MAX_WAITING)
        self._came = threading.Event()
        self._reached = True
        threading.Thread(target=self._send_forever, name="scaling-reports", daemon=True).start()

    def put(self, decision: pb.ScalingDecision) -> None:
        self._waiting.append(decision)
        self._came.set()

    def _send_forever(self) -> None:
        pause = threading.Event()
        while True:
            self._came.wait()
            self._came.clear()
            while self._waiting:
                decision = self._waiting.popleft()
                if not self._send(decision):
                    pause.wait(PAUSE_S)

    def _send(self, decision: pb.ScalingDecision) -> bool:
        """Whether it arrived; one that did not is not sent again, since newer ones come all the time."""
        try:
            report_decision(self._address, decision, tls=self._tls)
        except (ClusterError, ConfigError) as error:
            if self._reached:
                logger.warning("%s; scaling goes on", error)
            self._reached = False
            return False
        if not self._reached:
            logger.info("directory at %s: takes decisions again", self._address)
        self._reached = True
        return True


@functools.cache
def reports_to(address: str, tls: TlsFiles | None = None) -> DecisionReports:
    """The process's one for a directory."""
    return DecisionReports(address, tls)
