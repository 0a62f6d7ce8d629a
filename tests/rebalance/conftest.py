from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mesh import running_directory, running_dispatcher
from tiny_models import EXPERTS, make_checkpoint

from expertmesh.artifact.prepare import prepare
from router_service.dispatcher import Dispatcher

HIDDEN = 64


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rebalance")
    prepare(make_checkpoint("mixtral", folder / "checkpoint"), folder / "artifact")
    return folder / "artifact"


@pytest.fixture
def directory() -> Iterator[str]:
    with running_directory() as address:
        yield address


class Traffic:
    """A router that sends rows without a pause and compares every answer with the first."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.steps = 0
        self.failures: list[str] = []
        self._dispatcher = dispatcher
        self._ended = threading.Event()
        generator = torch.Generator().manual_seed(0)
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(16)])
        self._routed = torch.randn(16, HIDDEN, generator=generator), ids, torch.rand(16, 2, generator=generator)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def await_steps(self, count: int) -> None:
        """So many more; returns earlier where one has failed."""
        until = self.steps + count
        while self.steps < until and self._thread.is_alive():
            time.sleep(0.01)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        expected: dict[int, torch.Tensor] = {}
        while not self._ended.is_set():
            layer = self.steps % 2
            try:
                answer = self._dispatcher.finish(self._dispatcher.start(layer, *self._routed))
            except Exception as error:  # noqa: BLE001 - whatever fails is what the test is about
                self.failures.append(repr(error))
                return
            if not torch.allclose(answer, expected.setdefault(layer, answer), rtol=0, atol=1e-5):
                self.failures.append(f"step {self.steps}: another answer than the first")
            self.steps += 1
            time.sleep(0.002)


@pytest.fixture
def traffic(tiny_artifact: Path, directory: str) -> Iterator[Traffic]:
    """Waits for experts until some are there; fails the test where a row was lost or an answer differs."""
    with running_dispatcher(tiny_artifact, directory) as dispatcher:
        made = Traffic(dispatcher)
        yield made
        made.await_steps(10)
        made.end()
    assert not made.failures
    assert made.steps
