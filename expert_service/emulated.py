"""An executor that answers no sooner than a modelled accelerator would."""

from __future__ import annotations

import time

import numpy
import torch

from expert_service.executor import Executor, Pairs
from expertmesh.config import EmulatedDevice
from expertmesh.scaling.emulation import ExpertCost, batch_s


class EmulatedExecutor:
    """Computes with another executor, then sleeps until the modelled time has passed since the batch began.

    The thread that computes is the device: it runs one batch after another. A CPU that needs longer than the modelled
    time makes the device slower than modelled, never faster.
    """

    def __init__(self, inner: Executor, device: EmulatedDevice, cost: ExpertCost) -> None:
        self._inner = inner
        self._device = device
        self._cost = cost

    def run(self, layer: int, hidden_states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        began = time.monotonic()
        output = self._inner.run(layer, hidden_states, pairs)
        experts = len(numpy.unique(pairs.experts))
        until = began + batch_s(self._device, self._cost, len(pairs.experts), experts)
        while (left_s := until - time.monotonic()) > 0:
            time.sleep(left_s)
        return output
