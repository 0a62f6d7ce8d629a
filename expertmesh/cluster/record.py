"""What the command line remembers of a cluster that it started or attached to, one file per cluster."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pydantic

from expertmesh.config import ClusterConfig, load_config
from expertmesh.errors import ClusterError
from expertmesh.wire.tls import TlsFiles

RECORD_FILE = "cluster.json"
DEPLOYED_FILE = "deployed.json"
RAY_LOG = "ray.log"


class Record(pydantic.BaseModel, frozen=True):
    name: str
    config: str
    """Path of the config file."""
    dashboard: str
    """URL of Ray's dashboard, where Serve's REST API is."""
    http: str
    """URL of the OpenAI API, without /v1."""
    directory: str
    """host:port of Serve's gRPC proxy."""
    tls: TlsFiles | None = None
    """Where the directory asks for a certificate."""
    model: str
    marker: str | None = None
    """Value of the environment variable that all of its processes carry; None where it was not started here."""
    temp_dir: str | None = None
    """Ray's folder; removed with the cluster."""
    token: str | None = None
    """Which Ray asks of its clients."""


class Deployed(pydantic.BaseModel, frozen=True):
    """What a cluster was given last: its config file, until a rebalance changes the groups."""

    source: str
    """Path of the config file or of the plan."""
    config: ClusterConfig


def state_home() -> Path:
    """$XDG_STATE_HOME/expertmesh, by default in ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "expertmesh"


def state_dir(name: str) -> Path:
    return state_home() / name


def save(record: Record) -> None:
    folder = state_dir(record.name)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / RECORD_FILE, record.model_dump_json(indent=2))


def save_deployed(name: str, deployed: Deployed) -> None:
    """Raises ClusterError where the cluster has been forgotten."""
    try:
        _replace(state_dir(name) / DEPLOYED_FILE, deployed.model_dump_json(indent=2))
    except FileNotFoundError:
        raise ClusterError(f"cluster {name} has been stopped") from None


def load_deployed(record: Record) -> Deployed:
    """Raises ClusterError or ConfigError where neither it nor the config file can be read."""
    path = state_dir(record.name) / DEPLOYED_FILE
    try:
        return Deployed.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Deployed(source=record.config, config=load_config(Path(record.config)))
    except (OSError, pydantic.ValidationError) as error:
        raise ClusterError(f"{path}: not what was deployed: {str(error).splitlines()[0]}") from None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.touch(mode=0o600)
    partial.write_text(text + "\n")
    partial.replace(path)


def load(name: str) -> Record | None:
    """The record of `name`, if there is one; raises ClusterError naming a file that cannot be read."""
    path = state_dir(name) / RECORD_FILE
    try:
        return Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, pydantic.ValidationError) as error:
        raise ClusterError(f"{path}: not a cluster's record: {str(error).splitlines()[0]}") from None


def forget(record: Record) -> None:
    if record.temp_dir is not None:
        shutil.rmtree(record.temp_dir, ignore_errors=True)
    shutil.rmtree(state_dir(record.name), ignore_errors=True)


def find(name: str | None) -> Record | None:
    """The cluster called `name`, or the only one there is; raises ClusterError where several are and none is named."""
    if name is not None:
        return load(name)
    names = sorted(path.parent.name for path in state_home().glob(f"*/{RECORD_FILE}"))
    if len(names) > 1:
        raise ClusterError(f"several clusters are known, name one: {', '.join(names)}")
    return load(names[0]) if names else None


def require(name: str | None) -> Record:
    """As `find`; raises ClusterError where there is none."""
    record = find(name)
    if record is None:
        raise ClusterError(
            f"no cluster{f' {name!r}' if name else ''} is known here; start one with `expertmesh up CONFIG`"
        )
    return record
