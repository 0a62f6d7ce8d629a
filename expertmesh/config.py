"""ClusterConfig: one frozen, validated object that describes a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from expertmesh.artifact.manifest import Manifest
from expertmesh.experts import LayerExperts, WrittenExperts, numbers_as_text, resolve_experts
from expertmesh.wire.tls import TlsFiles
from expertmesh.yaml_file import read_model

Name = Annotated[str, pydantic.Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
Experts = Annotated[WrittenExperts, pydantic.BeforeValidator(numbers_as_text)]
Resources = dict[str, Annotated[float, pydantic.Field(gt=0, le=1_000_000)]]
Port = Annotated[int, pydantic.Field(ge=1, le=65535)]


def _check_bounds(where: str, low: int, high: int) -> None:
    if high < low:
        raise ValueError(f"{where}: max_replicas {high} < min_replicas {low}")


class Section(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Every section is frozen and refuses keys it does not know."""


class ModelSection(Section):
    artifact: Path = pydantic.Field(description="Directory made by `expertmesh prepare`; relative to the config file.")
    name: str | None = pydantic.Field(None, description="Name in the OpenAI API; default: the artifact's.")


class ScalingSection(Section):
    """Targets by which a group's replicas follow its load, within its bounds."""

    target_busy: float = pydantic.Field(
        0.6, gt=0, le=0.95, description="Share of its time in which a replica should compute, 0 to 1."
    )
    queue_wait_ms: float = pydantic.Field(
        20,
        gt=0,
        le=3_600_000,
        description="Rows should wait no longer than this in a replica's queue, in 95 of 100 batches; ms.",
    )
    up_after_s: float = pydantic.Field(
        2, ge=0, le=600, description="More replicas once the load asked for them so long."
    )
    down_after_s: float = pydantic.Field(
        60, ge=0, le=86400, description="Fewer replicas once the load asked for no more of them so long."
    )
    max_up_factor: float = pydantic.Field(
        2, gt=1, le=100, description="One step up multiplies replicas by this at most."
    )
    max_up_step: int = pydantic.Field(16, ge=1, le=10_000, description="One step up adds so many replicas at most.")
    max_down_step: int = pydantic.Field(
        1, ge=1, le=10_000, description="One step down removes so many replicas at most."
    )
    idle_after_s: float = pydantic.Field(
        300, gt=0, le=86400, description="A group with min_replicas 0 goes to zero after so long without a row."
    )
    stale_after_s: float = pydantic.Field(
        10,
        ge=3,
        le=600,
        description="What a replica reported longer ago than this says nothing; they report once a second.",
    )


class EmulatedDevice(Section):
    """A modelled accelerator: replicas answer correctly, computed on the CPU, but no sooner than it would."""

    teraflops: float = pydantic.Field(gt=0, le=1e6, description="Of dense products in the model's type, 10^12 FLOP/s.")
    memory_gb_per_s: float = pydantic.Field(gt=0, le=1e6, description="Memory bandwidth, 10^9 bytes/s.")
    overhead_us: float = pydantic.Field(20, ge=0, le=1e7, description="Of each batch, whatever its size; microseconds.")


class EngineSection(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = pydantic.Field(
        "auto", description="auto: the artifact's."
    )
    max_model_len: int | None = pydantic.Field(None, ge=16, le=2**27, description="Longest prompt plus output, tokens.")
    kv_cache_gib: float = pydantic.Field(0.5, gt=0, le=65536, description="KV cache on a CPU, GiB.")
    num_cpus: float = pydantic.Field(
        1, gt=0, le=4096, description="CPUs of one router; also its thread count on a CPU."
    )
    num_gpus: float = pydantic.Field(0, ge=0, le=64, description="GPUs of one router; 0 runs it on the CPU.")
    resources: Resources = pydantic.Field({}, description="Custom Ray resources of one router, which name its nodes.")
    enforce_eager: bool | None = pydantic.Field(
        None,
        description="Do not compile the trunk: faster start, slower steps. Default: compiled on CPUs that have g++.",
    )
    attention_threads: int | None = pydantic.Field(
        None,
        ge=1,
        le=1024,
        description="Threads for attention, on CPUs, in steps of 12 tokens or more. More than num_cpus are for routers "
        "whose replicas have the same cores: these have nothing to do meanwhile. null: as many as num_cpus.",
    )
    dbo_token_threshold: int | None = pydantic.Field(
        256,
        ge=2,
        le=2**27,
        description="Dual-batch overlap, on CPUs: a step of so many tokens or more runs as two halves, one in the "
        "trunk while the other's rows are with experts. null: never.",
    )
    min_replicas: int = pydantic.Field(1, ge=1, le=10_000)
    max_replicas: int = pydantic.Field(1, ge=1, le=10_000)
    wait_for_experts_s: float = pydantic.Field(
        60, gt=0, le=86400, description="How long a step waits for a missing expert."
    )
    degrade_after_s: float | None = pydantic.Field(
        None,
        gt=0,
        le=86400,
        description="Go on without an expert that has been missing for so long, and mark the answers. Default: never.",
    )
    checksums: bool = pydantic.Field(
        False,
        description="Send a checksum with what goes to experts and what comes back: bytes that changed on the way are "
        "asked for again. Every replica must know of it.",
    )
    max_requests: int = pydantic.Field(
        1024,
        ge=1,
        le=10_000_000,
        description="Requests that may be under way at once, over all routers; more get a 429.",
    )
    max_body_mib: float = pydantic.Field(8, gt=0, le=1024, description="Largest body of a request; more gets a 413.")
    kwargs: dict[str, Any] = pydantic.Field({}, description="More of vLLM's engine arguments.")

    @pydantic.model_validator(mode="after")
    def bounds_ascend(self) -> EngineSection:
        _check_bounds("engine", self.min_replicas, self.max_replicas)
        if self.degrade_after_s is not None and self.degrade_after_s > self.wait_for_experts_s:
            raise ValueError(
                f"engine: degrade_after_s {self.degrade_after_s:g} > wait_for_experts_s {self.wait_for_experts_s:g}"
            )
        return self


class GroupSection(Section):
    name: Name
    experts: Experts = pydantic.Field(
        description='Experts in every MoE layer ("0-7,12"), or per layers: {"0-3": "0-7", "4": "0"}.'
    )
    num_cpus: float = pydantic.Field(
        1, gt=0, le=4096, description="CPUs of one replica; also its thread count on a CPU."
    )
    num_gpus: float = pydantic.Field(0, ge=0, le=64, description="GPUs of one replica; 0 computes on the CPU.")
    resources: Resources = pydantic.Field({}, description="Custom Ray resources of one replica, which name its nodes.")
    memory_gib: float | None = pydantic.Field(None, gt=0, le=65536, description="What one replica may hold, GiB.")
    min_replicas: int = pydantic.Field(
        1, ge=0, le=10_000, description="0: the group sleeps while idle and wakes at its first row."
    )
    max_replicas: int = pydantic.Field(1, ge=1, le=10_000)
    scaling: ScalingSection | None = pydantic.Field(None, description="Targets of this group; default: the cluster's.")
    emulated: EmulatedDevice | None = pydantic.Field(
        None, description="Answer no sooner than this modelled accelerator would. For tests of scaling without GPUs."
    )
    max_queued_rows: int = pydantic.Field(
        65536, ge=1, le=2**31 - 1, description="Rows that may wait; more are pushed back."
    )

    @pydantic.model_validator(mode="after")
    def bounds_ascend(self) -> GroupSection:
        _check_bounds(f"group {self.name}", self.min_replicas, self.max_replicas)
        if self.emulated is not None and self.num_gpus:
            raise ValueError(f"group {self.name}: emulated is for CPUs, num_gpus is {self.num_gpus:g}")
        return self

    def expert_sets(self, manifest: Manifest) -> LayerExperts:
        """The group's experts per MoE layer; raises ConfigError naming one that does not exist."""
        return resolve_experts(self.experts, manifest.layers, f"group {self.name}: experts")


class ServerSection(Section):
    host: str = pydantic.Field("127.0.0.1", description="Where the OpenAI API listens.")
    http_port: Port = pydantic.Field(8000, description="The OpenAI API.")
    grpc_port: Port = pydantic.Field(
        9000, description="Ray Serve's gRPC proxy, behind which the directory answers where security.tls is not set."
    )
    grpc_tls_port: Port = pydantic.Field(
        9001, description="The same proxy with mutual TLS: where security.tls is set, the directory answers here alone."
    )
    replica_host: str = pydantic.Field("127.0.0.1", description="Where replicas listen; `auto`: the node's address.")
    replica_ports: tuple[int, int] | None = pydantic.Field(
        None, description="First and last port of replicas; default: any."
    )

    @pydantic.model_validator(mode="after")
    def ports_differ(self) -> ServerSection:
        if self.http_port == self.grpc_port:
            raise ValueError(f"http_port and grpc_port are both {self.http_port}")
        return self


class DirectorySection(Section):
    lease_ms: int = pydantic.Field(
        3000, ge=300, le=3_600_000, description="A replica silent for this long is forgotten."
    )
    resources: Resources = pydantic.Field(
        {}, description="Custom Ray resources of the directory, which name its nodes."
    )


class SecuritySection(Section):
    tls: TlsFiles | None = pydantic.Field(
        None,
        description="Mutual TLS between routers, replicas and the directory; paths are relative to the config file. "
        "Default: off.",
    )
    api_keys: Path | None = pydantic.Field(
        None,
        description="File of `expertmesh api-key`, relative to the config file: requests to the OpenAI API need one of "
        "its keys. Default: they need none.",
    )


class ClusterConfig(Section):
    name: Name = "expertmesh"
    model: ModelSection
    engine: EngineSection = EngineSection()
    groups: tuple[GroupSection, ...] = pydantic.Field(min_length=1)
    scaling: ScalingSection = ScalingSection()
    server: ServerSection = ServerSection()
    directory: DirectorySection = DirectorySection()
    security: SecuritySection = SecuritySection()

    @pydantic.model_validator(mode="after")
    def group_names_differ(self) -> ClusterConfig:
        names = [group.name for group in self.groups]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"groups: {min(twice)!r} stands twice")
        return self

    @pydantic.model_validator(mode="after")
    def grpc_tls_port_is_free(self) -> ClusterConfig:
        server, port = self.server, self.server.grpc_tls_port
        if self.security.tls is None:
            return self
        for key in ("http_port", "grpc_port"):
            if getattr(server, key) == port:
                raise ValueError(f"server: {key} and grpc_tls_port are both {port}")
        if server.replica_ports and server.replica_ports[0] <= port <= server.replica_ports[1]:
            raise ValueError(f"server: grpc_tls_port {port} lies within replica_ports")
        return self


def load_config(path: Path) -> ClusterConfig:
    """Reads a config file; relative paths of the artifact, of TLS files and of API keys start at the file's folder.

    Raises ConfigError with one line: the file, the key and what is wrong with it.
    """
    config = read_model(path, ClusterConfig, "a config begins with `model:` and `groups:`")
    folder = path.parent
    model = config.model.model_copy(update={"artifact": (folder / config.model.artifact).resolve()})
    tls = config.security.tls and config.security.tls.relative_to(folder)
    api_keys = config.security.api_keys and (folder / config.security.api_keys).absolute()
    return config.model_copy(update={"model": model, "security": SecuritySection(tls=tls, api_keys=api_keys)})
