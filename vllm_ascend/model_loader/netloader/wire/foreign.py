"""Peers that speak something else: a browser, a scraper, a health check, or an instance that was given a wrong port.

They are known by their first four bytes, which no frame of ours begins with: those would be its length, far above any
limit. Each is told in its own tongue what it has reached, and the log says what it was.
"""

from __future__ import annotations

from typing import Final

from vllm_ascend.model_loader.netloader.errors import ProtocolError

_HTTP_METHODS: Final = {b"GET ", b"POST", b"HEAD", b"PUT ", b"DELE", b"OPTI", b"PATC", b"CONN", b"TRAC", b"PRI "}
_TLS_HANDSHAKE, _TLS_ALERT = b"\x16\x03", b"\x15\x03"
_WHAT_THIS_IS: Final = (
    b"This port is Netloader's: vLLM instances take their weights from it. It does not speak HTTP. "
    b"vLLM answers requests on the port of its option --port.\n"
)
_HTTP_ANSWER: Final = (
    b"HTTP/1.1 400 Bad Request\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: %d\r\n"
    b"Connection: close\r\n"
    b"\r\n" % len(_WHAT_THIS_IS)
)
UNEXPECTED_MESSAGE: Final = 10
_TLS_ANSWER: Final = bytes([21, 3, 3, 0, 2, 2, UNEXPECTED_MESSAGE])
"""A fatal alert: RFC 8446, section 6."""


class ForeignProtocol(ProtocolError):
    """The peer speaks another protocol, in which `answer` tells it so; empty where there is nobody to tell."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        self.answer = answer
        super().__init__(reason)


def of_client(beginning: bytes) -> ForeignProtocol | None:
    """What a peer that has connected to a server speaks, None if that is not known."""
    method = beginning[:4]
    if method in _HTTP_METHODS:
        body = b"" if method == b"HEAD" else _WHAT_THIS_IS
        return ForeignProtocol("it speaks HTTP, and this is Netloader's port, not vLLM's own", _HTTP_ANSWER + body)
    if beginning.startswith(_TLS_HANDSHAKE):
        return ForeignProtocol("it speaks TLS, which is not configured here (TLS_CERT, TLS_KEY, TLS_CA)", _TLS_ANSWER)
    return None


def of_server(beginning: bytes) -> ForeignProtocol | None:
    """What answers at the address of a source."""
    if beginning[:4] == b"HTTP":
        return ForeignProtocol("it speaks HTTP: the address of a source is that of its Netloader, not of its vLLM")
    if beginning.startswith((_TLS_HANDSHAKE, _TLS_ALERT)):
        return ForeignProtocol("it wants TLS: set TLS_CERT, TLS_KEY and TLS_CA")
    return None
