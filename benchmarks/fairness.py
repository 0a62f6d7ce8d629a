"""What a modest router gets of a replica that others flood: one emulated device, 50 us per row, with room for 512 rows.

Each router is a process. The others keep 32 dispatches of 64 rows under way each, more than the queue takes; the modest
one sends as much as half of its fair share (the device's rows/s over the number of routers) at times fixed beforehand.
Everybody sends again what was refused, as routers do. `share_of_fair`: its rows/s over what it asks for;
`p95_ratio`: the 95th percentile of its latency, from when a dispatch was due, to that without the flood;
`refused`: how often the replica refused rows of it, per dispatch; `flood_rows_per_s`: of all the others. Alone and
flooded take turns; figures are medians over the rounds, ratios are within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import measure, wire
from benchmarks.echo import line_of

US_PER_ROW, MAX_QUEUED_ROWS = 50.0, 512
ROWS, UNDER_WAY = 64, 32
ROUTERS = (2, 4)
ROUND_S, BEFORE_S = 3.0, 0.5
THREADS = 64
"""Of the modest router: no dispatch waits for another one before it is sent."""

Figures = dict[str, float]


def run(cluster: str | None) -> dict[str, object]:
    """Needs no cluster. Keys name the transport of routers and replica and the number of routers."""
    found: dict[str, object] = {"device_rows_per_s": 1e6 / US_PER_ROW, "rows_per_dispatch": ROWS}
    for transport in wire.TRANSPORTS:
        with _routers(transport) as routers:
            for count in ROUTERS:
                found[f"{transport}, {count} routers"] = _measure(routers[:count])
    return found


def _measure(routers: Sequence[subprocess.Popen[str]]) -> Figures:
    modest, *others = routers
    asked = 1e6 / US_PER_ROW / len(routers) / 2
    rounds = measure.alternate(
        {"alone": lambda: _round(modest, [], asked), "flooded": lambda: _round(modest, others, asked)}
    )
    alone, flooded = rounds["alone"], rounds["flooded"]

    def both(name: str) -> tuple[list[float], list[float]]:
        return [one[name] for one in flooded], [one[name] for one in alone]

    return {
        "asked_rows_per_s": asked,
        "share_of_fair": round(measure.median([one["rows_per_s"] / asked for one in flooded]), 3),
        "share_alone": round(measure.median([one["rows_per_s"] / asked for one in alone]), 3),
        "p95_ratio": round(measure.median_ratio(*both("p95_ms")), 2),
        "p95_ms": round(measure.median(both("p95_ms")[0]), 1),
        "p95_alone_ms": round(measure.median(both("p95_ms")[1]), 1),
        "refused": round(measure.median(both("refused")[0]), 2),
        "flood_rows_per_s": round(measure.median([one["flood_rows_per_s"] for one in flooded])),
    }


def _round(modest: subprocess.Popen[str], others: Sequence[subprocess.Popen[str]], asked: float) -> Figures:
    for other in others:
        _tell(other, {"for_s": ROUND_S + 2 * BEFORE_S})
    time.sleep(BEFORE_S)
    _tell(modest, {"for_s": ROUND_S, "rows_per_s": asked})
    figures: Figures = json.loads(line_of(modest))
    flood = [json.loads(line_of(other))["rows_per_s"] for other in others]
    return figures | {"flood_rows_per_s": sum(flood)}


def _tell(router: subprocess.Popen[str], task: Figures) -> None:
    assert router.stdin is not None
    print(json.dumps(task), file=router.stdin, flush=True)


@contextlib.contextmanager
def _routers(transport: str) -> Iterator[list[subprocess.Popen[str]]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        manifest = wire.make_artifact(folder)
        directory = stack.enter_context(wire.directory())
        device = (f"--us-per-row={US_PER_ROW}", f"--max-queued-rows={MAX_QUEUED_ROWS}")
        stack.enter_context(wire.replicas(folder, directory, 1, transport, *device))
        command = [sys.executable, "-m", "benchmarks.fairness", directory, manifest.fingerprint, transport]
        routers = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    cwd=Path(__file__).parents[1],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(max(ROUTERS))
        ]
        try:
            for router in routers:
                line_of(router)
            yield routers
        finally:
            for router in routers:
                router.terminate()


class Router:
    """A router's process without a model: floods or keeps a pace."""

    def __init__(self, directory: str, fingerprint: str, transport: str) -> None:
        self._pool = ThreadPoolExecutor(THREADS)
        self._stack = contextlib.ExitStack()
        self._dispatcher = self._stack.enter_context(wire.dispatcher(directory, fingerprint, 1, transport))
        self._routed = wire.routed(ROWS)

    def _step(self) -> None:
        wire.step(self._dispatcher, 1, self._routed)

    def flood(self, for_s: float) -> Figures:
        until = time.monotonic() + for_s
        lock, done = threading.Lock(), 0

        def keep_sending() -> None:
            nonlocal done
            while time.monotonic() < until:
                self._step()
                with lock:
                    done += 1

        for sender in [self._pool.submit(keep_sending) for _ in range(UNDER_WAY)]:
            sender.result()
        return {"rows_per_s": ROWS * done / for_s}

    def keep_pace(self, for_s: float, rows_per_s: float) -> Figures:
        refused = self._dispatcher.counters.resent_rows
        began, pause_s = time.monotonic(), ROWS / rows_per_s
        ended: list[tuple[float, float]] = []

        def send(due: float) -> None:
            self._step()
            ended.append((time.monotonic(), due))

        senders = []
        for number in range(int(for_s / pause_s)):
            due = began + number * pause_s
            time.sleep(max(0.0, due - time.monotonic()))
            senders.append(self._pool.submit(send, due))
        last = time.monotonic()
        in_time = sum(at <= last + pause_s for at, _ in list(ended))
        for sender in senders:
            sender.result()
        return {
            "rows_per_s": ROWS * in_time / for_s,
            "p95_ms": 1e3 * measure.percentile([at - due for at, due in ended], 0.95),
            "refused": (self._dispatcher.counters.resent_rows - refused) / ROWS / len(senders),
        }

    def close(self) -> None:
        self._pool.shutdown()
        self._stack.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness")
    for name in ("directory", "fingerprint", "transport"):
        parser.add_argument(name)
    router = Router(**vars(parser.parse_args()))
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        done = router.keep_pace(**task) if "rows_per_s" in task else router.flood(**task)
        print(json.dumps(done), flush=True)
    router.close()


if __name__ == "__main__":
    main()
