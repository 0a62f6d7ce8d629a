from __future__ import annotations

import numpy
import pytest
import torch
from marks import needs_gpu

from expert_service.staging import columns_to_device, to_device, to_host

DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_staged_comes_back(device: str) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    there = to_device(tensor, torch.device(device))
    assert there.device.type == device
    assert torch.equal(to_host(there * 2), tensor * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_columns_arrive_apart(device: str) -> None:
    columns = [numpy.arange(count, dtype=numpy.int32) for count in (3, 0, 5)]
    there = columns_to_device(columns, torch.device(device))
    assert [column.tolist() for column in there] == [column.tolist() for column in columns]
