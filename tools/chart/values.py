"""The chart's values as a model: `cluster` is ClusterConfig's own, the rest is Kubernetes' side."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic.alias_generators import to_camel

from expertmesh.config import ClusterConfig, DirectorySection, EngineSection, GroupSection, ModelSection, ScalingSection

NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
ObjectName = Annotated[str, pydantic.Field(pattern=NAME)]
"""Of a Kubernetes object."""
OptionalName = Annotated[str, pydantic.Field(pattern=rf"^$|{NAME}")]
Quantity = Annotated[str, pydantic.Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
_PART = r"\.?[A-Za-z0-9_@%+=~-][A-Za-z0-9._@%+=~-]*"
AbsolutePath = Annotated[str, pydantic.Field(pattern=rf"^(/{_PART})+$")]
"""Without `//`, `/./` and `/../`, by which it would be another path than it looks."""
Count = Annotated[int, pydantic.Field(ge=0, le=10_000)]
Port = Annotated[int, pydantic.Field(ge=1024, le=65535)]
Seconds = Annotated[int, pydantic.Field(ge=1, le=86400)]
LABEL = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = {"type": "string", "maxLength": 63, "pattern": r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"}
Labels = Annotated[
    dict[str, str],
    pydantic.Field(json_schema_extra={"patternProperties": {LABEL: LABEL_VALUE}, "additionalProperties": False}),
]
Annotations = dict[str, str]
Duration = Annotated[str, pydantic.Field(pattern=r"^([0-9]+h([0-9]+m)?([0-9]+s)?|[0-9]+m([0-9]+s)?|[0-9]+s)$")]
"""As both Go and Prometheus read it: Prometheus wants the larger unit first."""
HOST = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_BYTE = "(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
NETWORK = (
    rf"^({_BYTE}\.){{3}}{_BYTE}/(3[0-2]|[12]?[0-9])$|^[0-9a-fA-F:]*:[0-9a-fA-F:.]*/(12[0-8]|1[01][0-9]|[1-9]?[0-9])$"
)
Network = Annotated[str, pydantic.Field(pattern=NETWORK)]


KUBERNETES_TYPE = "kubernetes"
"""Stands for one of Kubernetes' own types until the schema's generator has copied it."""


def _reference(definition: str) -> Any:
    return pydantic.WithJsonSchema({KUBERNETES_TYPE: definition})


Affinity = Annotated[dict[str, Any], _reference("io.k8s.api.core.v1.Affinity")]
Tolerations = list[Annotated[dict[str, Any], _reference("io.k8s.api.core.v1.Toleration")]]
SpreadConstraints = list[Annotated[dict[str, Any], _reference("io.k8s.api.core.v1.TopologySpreadConstraint")]]
Env = list[Annotated[dict[str, Any], _reference("io.k8s.api.core.v1.EnvVar")]]
Peers = list[Annotated[dict[str, Any], _reference("io.k8s.api.networking.v1.NetworkPolicyPeer")]]


class Values(pydantic.BaseModel, extra="forbid", alias_generator=to_camel):
    """Base of all sections; every object is closed."""


class Amounts(Values):
    cpu: Quantity | Annotated[float, pydantic.Field(gt=0, le=4096)] | None = None
    memory: Quantity | None = None
    ephemeral_storage: Annotated[Quantity | None, pydantic.Field(alias="ephemeral-storage")] = None


class Resources(Values):
    requests: Amounts
    limits: Amounts


class ChartServer(Values):
    """ServerSection without the two hosts, which the chart sets."""

    http_port: Annotated[Port, pydantic.Field(alias="http_port")]
    grpc_port: Annotated[Port, pydantic.Field(alias="grpc_port")]
    grpc_tls_port: Annotated[Port, pydantic.Field(alias="grpc_tls_port")]
    replica_ports: Annotated[list[Port], pydantic.Field(alias="replica_ports", min_length=2, max_length=2)]


class ChartModel(ModelSection):
    artifact: AbsolutePath  # type: ignore[assignment]
    name: str = pydantic.Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._/-]{0,126})?$")


class ChartGroup(GroupSection):
    resources: dict[str, Annotated[float, pydantic.Field(gt=0, le=1000)]] = pydantic.Field(min_length=1)


class ChartCluster(Values):
    """ClusterConfig without `name`, which is the release's, and `security`, which follows from `tls` and `apiKeys`."""

    model: ChartModel
    engine: EngineSection
    groups: list[ChartGroup]
    scaling: ScalingSection
    server: ChartServer
    directory: DirectorySection


LEFT_OUT = set(ClusterConfig.model_fields) - set(ChartCluster.model_fields)
"""Of ClusterConfig's keys: what the chart sets by itself."""


class Image(Values):
    repository: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9._/:-]*$")
    tag: str = pydantic.Field(pattern=r"^$|^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")
    digest: str = pydantic.Field(pattern=r"^$|^sha256:[0-9a-f]{64}$")
    pull_policy: Literal["IfNotPresent", "Always", "Never"]
    pull_secrets: list[ObjectName]


class Autoscaler(Values):
    idle_timeout_seconds: Seconds
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"]
    resources: Resources


class GcsFaultTolerance(Values):
    redis_address: str = pydantic.Field(pattern=r"^$|^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?:[0-9]{1,5}$")
    password_secret: OptionalName


class Ray(Values):
    version: str = pydantic.Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")
    auth_secret: OptionalName
    upgrade_strategy: Literal["None", "NewCluster"]
    require_kube_ray: bool
    gcs_fault_tolerance: GcsFaultTolerance
    autoscaler: Autoscaler


class Head(Values):
    resources: Resources
    node_selector: Labels
    tolerations: Tolerations
    affinity: Affinity
    priority_class_name: OptionalName
    env: Env


class Gpu(Values):
    count: Annotated[int, pydantic.Field(ge=0, le=64)] = 0
    resource: str = pydantic.Field("nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[a-z0-9.-]+$")


class Pool(Values):
    min_replicas: Count
    max_replicas: Annotated[int, pydantic.Field(ge=1, le=10_000)]
    resources: Resources
    gpu: Gpu = Gpu()
    node_selector: Labels = {}
    tolerations: Tolerations = []
    affinity: Affinity = {}
    topology_spread_constraints: SpreadConstraints = []
    priority_class_name: OptionalName = ""
    runtime_class_name: OptionalName = ""
    idle_timeout_seconds: Seconds | None = None
    min_available: Count | None = None
    env: Env = []


class ExpertPool(Pool):
    name: str = pydantic.Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")


class Pods(Values):
    termination_grace_period_seconds: Seconds
    pre_stop_seconds: Annotated[int, pydantic.Field(ge=0, le=600)]
    drain_seconds: Annotated[int, pydantic.Field(ge=0, le=3600)]
    run_as_user: Annotated[int, pydantic.Field(ge=1, le=2**31)]
    scratch_size: Quantity
    labels: Labels
    annotations: Annotations


class Prepare(Values):
    enabled: bool
    source: str = pydantic.Field(pattern=r"^$|^/[^\s]*[^/\s]$|^(s3|gs)://[^\s]+$")
    download: AbsolutePath
    credentials_secret: OptionalName
    env: Env
    backoff_limit: Annotated[int, pydantic.Field(ge=0, le=100)]
    resources: Resources
    node_selector: Labels
    tolerations: Tolerations


class Model(Values):
    existing_claim: OptionalName
    mount_path: AbsolutePath
    size: Quantity
    storage_class_name: OptionalName
    access_modes: list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"]] = pydantic.Field(
        min_length=1
    )
    prepare: Prepare


class ApiKeys(Values):
    enabled: bool
    existing_secret: OptionalName
    test_secret: OptionalName


OWN_ISSUERS = {
    "if": {"properties": {"group": {"const": "cert-manager.io"}}},
    "then": {"properties": {"kind": {"enum": ["Issuer", "ClusterIssuer"]}}},
}


class IssuerRef(Values, json_schema_extra=OWN_ISSUERS):
    """Issuers of others have other groups, and kinds of their own."""

    name: OptionalName
    kind: str = pydantic.Field(pattern=r"^[A-Z][A-Za-z0-9]*$")
    group: str = pydantic.Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")


class CertManager(Values):
    issuer_ref: IssuerRef
    duration: Duration
    renew_before: Duration


class Tls(Values):
    mode: Literal["off", "existing", "generated", "certManager"]
    existing_secret: OptionalName
    server_name: str = pydantic.Field(pattern=r"^$|^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
    days: Annotated[int, pydantic.Field(ge=1, le=36500)]
    cert_manager: CertManager


class ServiceAccount(Values):
    create: bool
    head_name: OptionalName
    worker_name: OptionalName
    head_annotations: Annotations
    worker_annotations: Annotations


class Operator(Values):
    namespace_labels: Labels
    pod_labels: Labels


class NetworkPolicy(Values):
    enabled: bool
    clients: Peers
    operator: Operator
    monitoring_namespace_labels: Labels
    api_server_ports: list[Annotated[int, pydantic.Field(ge=1, le=65535)]] = pydantic.Field(min_length=1)
    api_server_networks: list[Network] = pydantic.Field(min_length=1)
    dns_namespace_labels: Labels | None = None
    redis_networks: list[Network] = pydantic.Field(min_length=1)
    object_store_networks: list[Network] = pydantic.Field(min_length=1)


class Enabled(Values):
    enabled: bool


class Ingress(Enabled):
    class_name: OptionalName
    annotations: Annotations
    host: str = pydantic.Field(pattern=r"^$|^(\*\.)?[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
    tls_secret: OptionalName


class ParentRef(Values):
    name: ObjectName
    namespace: Annotated[str, pydantic.Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")] | None = None
    section_name: Annotated[str, pydantic.Field(pattern=rf"^{HOST}$", max_length=253)] | None = None
    port: Annotated[int, pydantic.Field(ge=1, le=65535)] | None = None


class HttpRoute(Enabled):
    parent_refs: list[ParentRef] = pydantic.Field(max_length=32)
    hostnames: list[Annotated[str, pydantic.Field(pattern=rf"^(\*\.)?{HOST}$", max_length=253)]] = pydantic.Field(
        max_length=16
    )


class PodMonitor(Enabled):
    interval: Duration
    labels: Labels


class Rules(Enabled):
    labels: Labels
    no_replica_seconds: Seconds
    queue_wait_seconds: Annotated[float, pydantic.Field(gt=0, le=3600)]


class Dashboards(Enabled):
    labels: Labels


class Monitoring(Values):
    pod_monitor: PodMonitor
    rules: Rules
    dashboards: Dashboards


class Rebalancer(Enabled):
    replicas: Annotated[int, pydantic.Field(ge=1, le=10)]
    args: list[str]
    resources: Resources
    node_selector: Labels
    tolerations: Tolerations


class Test(Values):
    timeout_seconds: Seconds


class ChartValues(Values):
    fullname_override: str = pydantic.Field(pattern=r"^([a-z]([-a-z0-9]{0,45}[a-z0-9])?)?$")
    cluster: ChartCluster
    image: Image
    ray: Ray
    head: Head
    router: Pool
    expert_pools: list[ExpertPool]
    pods: Pods
    model: Model
    api_keys: ApiKeys
    tls: Tls
    service_account: ServiceAccount
    network_policy: NetworkPolicy
    pod_disruption_budget: Enabled
    ingress: Ingress
    http_route: HttpRoute
    monitoring: Monitoring
    rebalancer: Rebalancer
    test: Test
