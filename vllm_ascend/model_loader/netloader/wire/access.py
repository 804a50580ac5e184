"""Who may talk to whom: those with the same token, those with a certificate of the same authority, or everybody.

A token is a secret that all instances of a deployment share. It is never sent. Each side sends a random challenge, and
proves by an HMAC over both challenges that it knows the token (`Proofs`). A key for the frames of the connection is
derived from the same secret. Frames carry the digests of the weights too, so nothing can be altered on the way.

A token hides nothing from whoever listens in. TLS does: there, both sides show a certificate that the configured
authority has signed.
"""

from __future__ import annotations

import hmac
import secrets
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.errors import ConfigError, ProtocolError
from vllm_ascend.model_loader.netloader.files import warn_of_others

MIN_TOKEN_BYTES: Final = 16
"""Bytes that a token must have, not counting the white space around it."""
CHALLENGE_BYTES: Final = 32


@dataclass(frozen=True)
class Access:
    """What this process shows to its peers, and what it wants to see from them. By default, nothing of either.

    `tls_files` are the paths of certificate, key and authority: two accesses are equal if token and paths are.
    """

    token: bytes | None = field(default=None, repr=False)
    tls_files: tuple[str, str, str] | None = None
    server_tls: ssl.SSLContext | None = field(default=None, compare=False)
    client_tls: ssl.SSLContext | None = field(default=None, compare=False)

    @classmethod
    def load(
        cls,
        token_file: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
    ) -> Access:
        """Reads the files at these paths. Raises ConfigError, naming the key whose file is at fault."""
        token = _read_token(token_file) if token_file is not None else None

        if tls_cert is None or tls_key is None or tls_ca is None:
            if any((tls_cert, tls_key, tls_ca)):
                raise ConfigError("a part of TLS is missing: it needs TLS_CERT, TLS_KEY and TLS_CA")
            return cls(token)

        files = (tls_cert, tls_key, tls_ca)
        contexts = _context(ssl.PROTOCOL_TLS_SERVER, *files), _context(ssl.PROTOCOL_TLS_CLIENT, *files)
        warn_of_others("TLS_KEY", tls_key, secret=True)
        warn_of_others("TLS_CERT", tls_cert, secret=False)
        warn_of_others("TLS_CA", tls_ca, secret=False)
        return cls(token, files, *contexts)

    @classmethod
    def configured(cls, config: NetLoaderConfig) -> Access:
        """Reads the files that `config` names. Raises ConfigError, naming the key whose file is at fault."""
        return cls.load(config.token_file, config.tls_cert, config.tls_key, config.tls_ca)

    @property
    def restricted(self) -> bool:
        """Whether peers have to prove anything, so that strangers are kept out."""
        return self.token is not None or self.server_tls is not None


class Proofs:
    """What both sides of a connection derive from the token and their two challenges, each for itself."""

    def __init__(self, token: bytes, client_challenge: bytes, server_challenge: bytes) -> None:
        """Raises ProtocolError where a challenge is not as long as those that `challenge` makes."""
        if not len(client_challenge) == len(server_challenge) == CHALLENGE_BYTES:
            raise ProtocolError(f"the peer's challenge is not {CHALLENGE_BYTES} bytes long")
        self._token = token
        self._challenges = client_challenge + server_challenge

    @property
    def client(self) -> bytes:
        """Shows that the client knows the token."""
        return self._derive(b"netloader client proof")

    @property
    def server(self) -> bytes:
        """Shows that the server knows the token."""
        return self._derive(b"netloader server proof")

    @property
    def frame_key(self) -> bytes:
        """The key under which frames of this connection, and of no other, are tagged."""
        return self._derive(b"netloader frame key")

    def _derive(self, purpose: bytes) -> bytes:
        return derive_key(self._token, purpose, self._challenges)


def challenge() -> bytes:
    """New random bytes, to be used once."""
    return secrets.token_bytes(CHALLENGE_BYTES)


def derive_key(token: bytes, purpose: bytes, context: bytes) -> bytes:
    """32 bytes that only those who know `token` can compute, others for each `purpose` and each `context`."""
    return hmac.digest(token, len(purpose).to_bytes(4, "big") + purpose + context, "sha256")


def _read_token(path: str) -> bytes:
    try:
        token = Path(path).read_bytes().strip()
    except (OSError, ValueError) as error:  # the latter for what cannot be a path
        raise ConfigError(f"TOKEN_FILE {path!r} cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(token) < MIN_TOKEN_BYTES:
        raise ConfigError(
            f"TOKEN_FILE {path!r} holds {len(token)} bytes: expected at least {MIN_TOKEN_BYTES}, as of "
            "`openssl rand -hex 32`"
        )
    warn_of_others("TOKEN_FILE", path, secret=True)
    return token


def _context(protocol: int, cert: str, key: str, ca: str) -> ssl.SSLContext:
    """Connections that show `cert` and want to see a certificate signed by `ca`.

    Names are not compared. Instances come and go and are addressed by IP; whoever `ca` has signed is of the deployment.
    """
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(ca)
    except OSError as error:  # of which ssl.SSLError is a kind
        raise ConfigError(f"TLS_CA {ca!r} is no readable PEM file of certificates: {error}") from error
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except OSError as error:
        raise ConfigError(
            f"TLS_CERT {cert!r} and TLS_KEY {key!r} are no readable PEM pair of certificate and key: {error}"
        ) from error
    return context


def _no_password() -> str:
    raise PermissionError("the key is encrypted, and nobody is there to type its password")
