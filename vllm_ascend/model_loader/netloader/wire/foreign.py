"""Peers that speak another protocol: a browser, a scraper, a health check, or an instance that was given a wrong port.

Their first four bytes tell them from our peers. At the beginning of a frame these would be its length, and far above
any limit. Each of them is answered in its own protocol what it has reached, and the log says what it was.
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
"""A fatal alert, after RFC 8446, section 6."""


class ForeignProtocol(ProtocolError):
    """The peer speaks another protocol. `answer` tells it so in that one; it is empty where nobody would read it."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        self.answer = answer
        super().__init__(reason)


def of_client(beginning: bytes) -> ForeignProtocol | None:
    """What a peer speaks that has connected to a server, by its first bytes. None where they tell nothing."""
    method = beginning[:4]
    if method in _HTTP_METHODS:
        body = b"" if method == b"HEAD" else _WHAT_THIS_IS
        return ForeignProtocol("it speaks HTTP, and this is Netloader's port, not vLLM's own", _HTTP_ANSWER + body)
    if beginning.startswith(_TLS_HANDSHAKE):
        return ForeignProtocol("it speaks TLS, which is not configured here (TLS_CERT, TLS_KEY, TLS_CA)", _TLS_ANSWER)
    return None


def of_server(beginning: bytes) -> ForeignProtocol | None:
    """What speaks at the address of a source, by its first bytes. None where they tell nothing."""
    if beginning[:4] == b"HTTP":
        return ForeignProtocol("it speaks HTTP: the address of a source is that of its Netloader, not of its vLLM")
    if beginning.startswith((_TLS_HANDSHAKE, _TLS_ALERT)):
        return ForeignProtocol("it wants TLS: set TLS_CERT, TLS_KEY and TLS_CA")
    return None
