from __future__ import annotations

import pytest
from kuberay_stand_in import RayServiceObject, admin
from kubernetes_testbed import ApiServer, api_server, namespace

from expertmesh.kubernetes.ray_services import RayServices

__all__ = ["api_server", "namespace"]


@pytest.fixture
def ray_service(api_server: ApiServer, namespace: str) -> RayServiceObject:
    """One that has just been created: no operator has seen it."""
    made = RayServiceObject(admin(api_server, namespace))
    made.create()
    return made


@pytest.fixture
def services(ray_service: RayServiceObject) -> RayServices:
    return RayServices(ray_service.connection)
