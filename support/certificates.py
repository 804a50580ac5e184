"""Authorities and the certificates that they sign, as files: what TLS_CERT, TLS_KEY and TLS_CA name."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from vllm_ascend.model_loader.netloader.wire.access import Access

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identification:
    """The files with certificate, key and authority of one instance."""

    cert: str
    key: str
    ca: str

    def access(self, token_file: str | None = None) -> Access:
        return Access.load(token_file, self.cert, self.key, self.ca)


class Authority:
    """A certificate authority that keeps its own certificate, and those that it signs, in `directory`."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory / name
        self._directory.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(f"authority {name}")
        certificate = _certificate(self._name, self._key, self._name, self._key, is_authority=True)
        self.file = self._write("ca.pem", certificate.public_bytes(Encoding.PEM))

    def identify(
        self,
        name: str,
        *,
        password: bytes | None = None,
        days_ago: int = 0,
        ca: str | None = None,
    ) -> Identification:
        """Signs a certificate for `name`. Its holder trusts the authority in the file `ca`, by default this one.

        With `days_ago`, the certificate has expired so many days ago. With a `password`, the key is encrypted.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        encryption = BestAvailableEncryption(password) if password is not None else NoEncryption()
        certificate = _certificate(_named(name), key, self._name, self._key, days_ago=days_ago)
        return Identification(
            self._write(f"{name}.pem", certificate.public_bytes(Encoding.PEM)),
            self._write(f"{name}.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)),
            ca or self.file,
        )

    def _write(self, name: str, content: bytes) -> str:
        path = self._directory / name
        path.write_bytes(content)
        path.chmod(0o600)
        return str(path)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _certificate(
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_authority: bool = False,
    days_ago: int = 0,
) -> x509.Certificate:
    end = datetime.datetime.now(datetime.UTC) + (-days_ago * _DAY if days_ago else _DAY)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - 3 * _DAY)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )
