"""Certificate authorities for tests, made on the spot."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from expertmesh.wire.tls import TlsFiles

VALID = datetime.timedelta(days=1)


class Authority:
    """Signs certificates; all files lie under `folder`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder / name
        self._folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        basic = x509.BasicConstraints(ca=True, path_length=None)
        made = self._builder(self._name, self._key).add_extension(basic, critical=True).sign(self._key, hashes.SHA256())
        self.ca = self._write("ca.pem", made.public_bytes(serialization.Encoding.PEM))

    def issue(
        self, address: str | None = "127.0.0.1", name: str | None = None, left: datetime.timedelta = VALID
    ) -> TlsFiles:
        """Files of a peer whose certificate bears an address, or else a name that the others are told; it ends in
        `left`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name or "peer")])
        bears: x509.GeneralName = x509.DNSName(name) if name else x509.IPAddress(ipaddress.ip_address(address))
        builder = self._builder(subject, key, left)
        builder = builder.add_extension(x509.SubjectAlternativeName([bears]), critical=False)
        made = builder.sign(self._key, hashes.SHA256())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return TlsFiles(
            ca=self.ca,
            certificate=self._write("certificate.pem", made.public_bytes(serialization.Encoding.PEM)),
            key=self._write("key.pem", private),
            server_name=name,
        )

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, left: datetime.timedelta = VALID
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - VALID)
            .not_valid_after(now + left)
        )

    def _write(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(content)
        return path


def install(source: TlsFiles, target: TlsFiles, *names: str, authorities: tuple[Authority, ...] = ()) -> None:
    """Renames copies of the named files over the target's, as who rotates certificates does; with `authorities`, the
    target trusts exactly these."""
    for name in names:
        _replace(getattr(target, name), getattr(source, name).read_bytes())
    if authorities:
        _replace(target.ca, b"".join(one.ca.read_bytes() for one in authorities))


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)
