"""Loads and placements as arrays. Shape letters: L layers, E experts, S slots, D devices, K slots per device."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

Floats = NDArray[numpy.float64]
Indices = NDArray[numpy.int64]


def device_loads(loads: Floats, placed: Indices, devices: int) -> Floats:
    """loads [L, E], placed [L, S] -> [L, D], where an expert's load is split equally between its copies."""
    layers, experts = loads.shape
    keys = placed + numpy.arange(layers)[:, None] * experts
    counts = numpy.bincount(keys.ravel(), minlength=layers * experts).reshape(layers, experts)
    per_copy = numpy.take_along_axis(loads / numpy.maximum(counts, 1), placed, axis=1)
    summed: Floats = per_copy.reshape(layers, devices, -1).sum(axis=2)
    return summed


def balancedness(loads: Floats) -> Floats:
    """loads [L, D] -> [L]: mean over maximum, 0 to 1; 1 where there is none."""
    largest = loads.max(axis=1)
    mean = loads.mean(axis=1)
    ratio: Floats = numpy.divide(mean, largest, out=numpy.ones_like(mean), where=largest > 0)
    return ratio
