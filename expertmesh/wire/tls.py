"""Mutual TLS between routers and replicas: which files it needs, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydantic

from expertmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsBytes:
    """PEM text of the three files, as gRPC takes it."""

    ca: bytes
    certificate: bytes
    key: bytes


class TlsFiles(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Routers and replicas show the certificate, and refuse a peer whose own is not signed by the authority."""

    ca: Path = pydantic.Field(description="Certificate of the authority that signs all others, PEM.")
    certificate: Path = pydantic.Field(description="What routers and replicas show, with its chain, PEM.")
    key: Path = pydantic.Field(description="Private key of the certificate, PEM.")
    server_name: str | None = pydantic.Field(
        None, description="Name that replicas' certificates bear; default: the address that they announce."
    )

    def relative_to(self, folder: Path) -> TlsFiles:
        """The same files, relative paths starting at `folder`."""
        return TlsFiles(
            ca=(folder / self.ca).resolve(),
            certificate=(folder / self.certificate).resolve(),
            key=(folder / self.key).resolve(),
            server_name=self.server_name,
        )

    def read(self) -> TlsBytes:
        """Raises ConfigError naming a file that cannot be read or holds no PEM."""
        return TlsBytes(_read("ca", self.ca), _read("certificate", self.certificate), _read("key", self.key))


def _read(name: str, path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"security.tls.{name}: {path}: {(error.strerror or str(error)).lower()}") from None
    if b"-----BEGIN " not in content:
        raise ConfigError(f"security.tls.{name}: {path}: is not PEM")
    return content
