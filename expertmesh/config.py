"""ClusterConfig: one frozen, validated object that describes a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from expertmesh.artifact.manifest import Manifest
from expertmesh.errors import ConfigError
from expertmesh.experts import LayerExperts, format_indices, parse_indices
from expertmesh.wire.tls import TlsFiles
from expertmesh.yaml_file import read_model

Name = Annotated[str, pydantic.Field(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
Port = Annotated[int, pydantic.Field(ge=1, le=65535)]


def _check_bounds(where: str, low: int, high: int) -> None:
    if high < low:
        raise ValueError(f"{where}: max_replicas {high} < min_replicas {low}")


def _text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Section(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Every section is frozen and refuses keys it does not know."""


class ModelSection(Section):
    artifact: Path = pydantic.Field(description="Directory made by `expertmesh prepare`; relative to the config file.")
    name: str | None = pydantic.Field(None, description="Name in the OpenAI API; default: the artifact's.")


class EngineSection(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = pydantic.Field(
        "auto", description="auto: the artifact's."
    )
    max_model_len: int | None = pydantic.Field(None, ge=16, description="Longest prompt plus output, tokens.")
    kv_cache_gib: float = pydantic.Field(0.5, gt=0, description="KV cache on a CPU, GiB.")
    num_cpus: float = pydantic.Field(1, gt=0, description="CPUs of one router; also its thread count on a CPU.")
    num_gpus: float = pydantic.Field(0, ge=0, description="GPUs of one router; 0 runs it on the CPU.")
    enforce_eager: bool | None = pydantic.Field(
        None,
        description="Do not compile the trunk: faster start, slower steps. Default: compiled on CPUs that have g++.",
    )
    min_replicas: int = pydantic.Field(1, ge=1)
    max_replicas: int = pydantic.Field(1, ge=1)
    wait_for_experts_s: float = pydantic.Field(60, gt=0, description="How long a step waits for a missing expert.")
    kwargs: dict[str, Any] = pydantic.Field({}, description="More of vLLM's engine arguments.")

    @pydantic.model_validator(mode="after")
    def bounds_ascend(self) -> EngineSection:
        _check_bounds("engine", self.min_replicas, self.max_replicas)
        return self


class GroupSection(Section):
    name: Name
    experts: str | dict[str, str] = pydantic.Field(
        description='Experts in every MoE layer ("0-7,12"), or per layers: {"0-3": "0-7", "4": "0"}.'
    )
    num_cpus: float = pydantic.Field(1, gt=0, description="CPUs of one replica; also its thread count on a CPU.")
    num_gpus: float = pydantic.Field(0, ge=0, description="GPUs of one replica; 0 computes on the CPU.")
    memory_gib: float | None = pydantic.Field(None, gt=0, description="What one replica may hold, GiB.")
    min_replicas: int = pydantic.Field(1, ge=1)
    max_replicas: int = pydantic.Field(1, ge=1)
    max_queued_rows: int = pydantic.Field(65536, ge=1, description="Rows that may wait; more are pushed back.")

    @pydantic.field_validator("experts", mode="before")
    @classmethod
    def numbers_are_indices(cls, value: object) -> object:
        """YAML reads `experts: 3` and the key in `{4: 0-3}` as numbers."""
        if isinstance(value, dict):
            return {_text(layers): _text(experts) for layers, experts in value.items()}
        return _text(value)

    @pydantic.model_validator(mode="after")
    def bounds_ascend(self) -> GroupSection:
        _check_bounds(f"group {self.name}", self.min_replicas, self.max_replicas)
        return self

    def expert_sets(self, manifest: Manifest) -> LayerExperts:
        """The group's experts per MoE layer; raises ConfigError naming one that does not exist."""
        where = f"group {self.name}: experts"
        if isinstance(self.experts, str):
            per_layer = dict.fromkeys(manifest.layers, parse_indices(self.experts, where))
        else:
            per_layer = {}
            for layers, experts in self.experts.items():
                for layer in sorted(parse_indices(layers, where)):
                    per_layer[layer] = per_layer.get(layer, frozenset()) | parse_indices(experts, where)
        for layer, experts_of_layer in per_layer.items():
            if layer not in manifest.layers:
                known = format_indices(set(manifest.layers))
                raise ConfigError(f"{where}: layer {layer} has no routed experts (MoE layers: {known})")
            beyond = {index for index in experts_of_layer if index >= manifest.layers[layer]}
            if beyond:
                raise ConfigError(
                    f"{where}: layer {layer} has experts 0-{manifest.layers[layer] - 1}, not {format_indices(beyond)}"
                )
        return per_layer


class ServerSection(Section):
    host: str = pydantic.Field("127.0.0.1", description="Where the OpenAI API listens.")
    http_port: Port = pydantic.Field(8000, description="The OpenAI API.")
    grpc_port: Port = pydantic.Field(9000, description="Ray Serve's gRPC proxy, behind which the directory answers.")
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
    lease_ms: int = pydantic.Field(3000, ge=300, description="A replica silent for this long is forgotten.")


class SecuritySection(Section):
    tls: TlsFiles | None = pydantic.Field(
        None,
        description="Mutual TLS between routers and replicas; paths are relative to the config file. Default: off.",
    )


class ClusterConfig(Section):
    name: Name = "expertmesh"
    model: ModelSection
    engine: EngineSection = EngineSection()
    groups: tuple[GroupSection, ...] = pydantic.Field(min_length=1)
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


def load_config(path: Path) -> ClusterConfig:
    """Reads a config file; relative paths of the artifact and of TLS files start at the file's folder.

    Raises ConfigError with one line: the file, the key and what is wrong with it.
    """
    config = read_model(path, ClusterConfig, "a config begins with `model:` and `groups:`")
    folder = path.parent
    model = config.model.model_copy(update={"artifact": (folder / config.model.artifact).resolve()})
    tls = config.security.tls and config.security.tls.relative_to(folder)
    return config.model_copy(update={"model": model, "security": SecuritySection(tls=tls)})
