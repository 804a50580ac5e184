"""Network addresses as people write them: ``10.0.0.1:19000``, ``node-3:19000``, ``[fd00::1]:19000``."""

from __future__ import annotations

from typing import NamedTuple


class Endpoint(NamedTuple):
    """A host name or IP address and a port; written with brackets around an IPv6 address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Raises ValueError, saying what is wrong with `text`."""
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
        if not (port.isascii() and port.isdecimal()) or not 1 <= int(port) <= 65535:
            raise ValueError(f"{text!r} has port {port!r}: expected a number from 1 to 65535")
        return cls(host, int(port))
