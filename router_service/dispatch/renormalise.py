"""Sums over the experts that survive, weighted as if the gate had chosen these alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router_service.dispatch.scatter import Float32, Int64, Pairs


def surviving_scale(tokens: int, every: Sequence[Pairs], missing: Sequence[Pairs]) -> tuple[Float32, Int64]:
    """What each token's sum over its surviving experts is multiplied by, [tokens]; the tokens that none survives for.

    `every` holds all pairs of the layer, `missing` those without their sums. The factor is the sum of all the gate's
    weights over that of the surviving ones, so that the weights sum to what the model expects: to 1 where it
    normalises its top-k, to whatever the gate gave where it does not. 1 where nothing is missing and for the tokens
    that no expert, or none with a weight above 0, survives for.
    """
    whole, gone = _weights(tokens, every), _weights(tokens, missing)
    concerned, left = _pairs(tokens, missing) > 0, _pairs(tokens, every) - _pairs(tokens, missing)
    surviving = whole - gone
    hopeless = concerned & ((left == 0) | (surviving <= 1e-9 * np.abs(whole)))
    scale = np.ones(tokens)
    np.divide(whole, surviving, out=scale, where=concerned & ~hopeless)
    return scale.astype(np.float32), np.flatnonzero(hopeless)


def _weights(tokens: int, parts: Sequence[Pairs]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    total = np.zeros(tokens)
    for pairs in parts:
        np.add.at(total, pairs.tokens, pairs.weights)
    return total


def _pairs(tokens: int, parts: Sequence[Pairs]) -> Int64:
    return sum((np.bincount(pairs.tokens, minlength=tokens) for pairs in parts), start=np.zeros(tokens, np.int64))
