"""Mutual TLS between all parts of a cluster: which files it needs, and what they hold now."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import pydantic

from expertmesh.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsBytes:
    """PEM text of the three files, as gRPC takes it."""

    ca: bytes
    certificate: bytes
    key: bytes


class TlsFiles(pydantic.BaseModel, frozen=True, extra="forbid"):
    """All parts of a cluster show the certificate, and refuse a peer whose own is not signed by the authority."""

    ca: Path = pydantic.Field(description="Certificate of the authority that signs all others, PEM.")
    certificate: Path = pydantic.Field(description="What all of them show, with its chain, PEM.")
    key: Path = pydantic.Field(description="Private key of the certificate, PEM.")
    server_name: str | None = pydantic.Field(
        None,
        description="Name that the certificates of replicas and directory bear; default: the address at which each is "
        "reached, 127.0.0.1 for a directory.",
    )

    @staticmethod
    def in_folder(folder: Path, server_name: str | None = None) -> TlsFiles:
        """Those of a Kubernetes Secret that is mounted or saved there: `ca.crt`, `tls.crt`, `tls.key`."""
        return TlsFiles(
            ca=folder / "ca.crt", certificate=folder / "tls.crt", key=folder / "tls.key", server_name=server_name
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
        """Raises ConfigError naming a file that cannot be read, holds no PEM or does not fit the others."""
        pem = self.read_unchecked()
        while True:
            self._check()
            again = self.read_unchecked()  # the check reads the files for itself: was it of the same?
            if again == pem:
                return pem
            pem = again

    def read_unchecked(self) -> TlsBytes:
        """Raises ConfigError naming a file that cannot be read or holds no PEM."""
        return TlsBytes(_read("ca", self.ca), _read("certificate", self.certificate), _read("key", self.key))

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_verify_locations(self.ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"security.tls.ca: {self.ca}: {_said(error)}") from None
        try:
            # without a password OpenSSL would ask for one on the terminal
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"security.tls.key: {self.key}: is not the key of {self.certificate}: {_said(error)}"
            ) from None


class CurrentTls:
    """The files as they are now, or while those do not fit together, as they last were when they did.

    Made where a process starts, which raises ConfigError as `TlsFiles.read` does; later looks never raise it. May be
    used from any thread.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._pem = files.read()
        self._problem: str | None = None
        self._lock = threading.Lock()

    def read(self) -> TlsBytes:
        """For the next handshake. What is wrong with the files is logged once, until it is something else."""
        with self._lock:
            try:
                if self.files.read_unchecked() != self._pem:
                    self._pem = self.files.read()
                    log.info("security.tls: new files are in use from now on, %s", self.files.certificate)
                self._problem = None
            except ConfigError as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    log.warning("%s; the files read before stay in use", error)
            return self._pem


def _read(name: str, path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"security.tls.{name}: {path}: {(error.strerror or str(error)).lower()}") from None
    if b"-----BEGIN " not in content:
        raise ConfigError(f"security.tls.{name}: {path}: is not PEM")
    return content


def _said(error: OSError | ValueError) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else getattr(error, "strerror", None)
    return (reason or str(error)).lower().replace("_", " ")
