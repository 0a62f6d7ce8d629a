"""The hot path of expertmesh's data plane in C++; router and replica use it where it is installed."""

from expertmesh_native._core import *  # noqa: F403
