"""Network addresses as people write them: ``10.0.0.1:19000``, ``node-3:19000``, ``[fd00::1]:19000``."""

from __future__ import annotations

from typing import Final, NamedTuple

_NAME_LIMIT: Final = 253
"""Characters of a host name, dots included; RFC 1035 has 255 bytes with the lengths of the first and last label."""


class Endpoint(NamedTuple):
    """A host name or IP address and a port; written with brackets around an IPv6 address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """The endpoint that `text` names. Raises ValueError, saying what is wrong with it."""
        host, separator, port = text.strip().rpartition(":")
        if not separator or not host:
            raise ValueError(f"{text!r} has no port: write host:port, or [address]:port for IPv6")
        bracketed = host.startswith("[") and host.endswith("]")
        if ":" in host and not bracketed:
            raise ValueError(f"{text!r} is ambiguous: write an IPv6 address as [address]:port")
        if bracketed:
            host = host[1:-1]
        if not host or any(character in " []/" or not character.isprintable() for character in host):
            raise ValueError(f"{text!r} has no valid host before the port")
        try:
            require_host(host)
        except ValueError as error:
            raise ValueError(f"{text!r} has no valid host before the port: {error}") from error
        if not (port.isascii() and port.isdecimal()) or not 1 <= int(port) <= 65535:
            raise ValueError(f"{text!r} has port {port!r}: expected a number from 1 to 65535")
        return cls(host, int(port))


def require_host(host: str) -> None:
    """Raises ValueError for what can be neither an address nor a host name, such as "a..b" or ".svc.cluster.local"."""
    if ":" in host:
        return  # an IPv6 address, which the system judges when it is used

    try:
        encoded = host.encode("idna")  # as the socket module does it
    except UnicodeError as error:
        reason = str(error.__cause__ or error)
        raise ValueError(f"{host!r} cannot be a host name: {reason}") from error
    if len(encoded) > _NAME_LIMIT:
        raise ValueError(f"{host!r} cannot be a host name: it is {len(encoded)} characters long, of {_NAME_LIMIT}")


def unmapped(address: str) -> str:
    """`address` without the prefix that it has for an IPv4 peer of a dual-stack socket, as in ::ffff:10.0.0.1."""
    return address.removeprefix("::ffff:")
