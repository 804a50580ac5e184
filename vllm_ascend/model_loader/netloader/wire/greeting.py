"""How every connection begins: TLS where there are certificates, then Hello and Welcome, with a token in between."""

from __future__ import annotations

import contextlib
import hmac
import ssl
from typing import Final

from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    ConnectionLost,
    PeerError,
    ProtocolError,
    SourceRefused,
    SourceUnreachable,
    TransportError,
    Unauthorized,
    one_line,
)
from vllm_ascend.model_loader.netloader.weights.identity import Difference
from vllm_ascend.model_loader.netloader.wire.access import Access, Proofs, challenge
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline, connect, is_our_own
from vllm_ascend.model_loader.netloader.wire.foreign import ForeignProtocol
from vllm_ascend.model_loader.netloader.wire.messages import (
    PROTOCOL_VERSION,
    Challenge,
    Hello,
    Message,
    Prove,
    Refuse,
    Welcome,
)

_LAST_WORD_SECONDS: Final = 1.0
"""For a peer that speaks another protocol to hear so."""


def greet(source: Endpoint, access: Access, timeout: float) -> Channel:
    """A greeted connection, which the caller closes.

    Raises SourceUnreachable or SourceRefused, and TransportError where this process cannot connect to anybody.
    """
    try:
        channel = connect(source, timeout)
    except OSError as error:
        if is_our_own(error):
            raise TransportError(f"this process cannot connect: {error.strerror or error}") from error
        raise SourceUnreachable(f"no connection: {getattr(error, 'strerror', None) or error}") from error
    try:
        if access.client_tls is not None:
            channel.secure(access.client_tls, timeout)
        _introduce(channel, access, timeout)
    except PeerError as error:
        channel.close()
        raise SourceUnreachable(f"it did not greet{_under(access)}: {error}{_hint(error, access)}") from error
    except BaseException:
        channel.close()
        raise
    return channel


def _under(access: Access) -> str:
    return " under TLS" if access.client_tls is not None else ""


def _hint(error: PeerError, access: Access) -> str:
    """What a server may mean that closes the connection without a word of its own."""
    reason = getattr(error.__cause__, "reason", None)
    if isinstance(reason, str) and "UNEXPECTED_MESSAGE" in reason:  # as `foreign` answers TLS
        return "; it has no TLS: TLS_CERT, TLS_KEY and TLS_CA belong on all instances or on none"
    if not _just_closed(error):
        return ""
    tls = "want TLS (TLS_CERT, TLS_KEY, TLS_CA)" if access.client_tls is None else "have no TLS"
    return f"; it may {tls} or have blocked this address for up to a minute after failed attempts"


def _just_closed(error: PeerError) -> bool:
    """Whether the peer went away without a word: what it minds about TLS comes as an error of TLS."""
    of_tls = isinstance(error.__cause__, ssl.SSLError) and not isinstance(error.__cause__, ssl.SSLEOFError)
    return isinstance(error, ConnectionLost) and not of_tls


def _introduce(channel: Channel, access: Access, timeout: float) -> None:
    ours = challenge()
    with contextlib.suppress(ConnectionLost):  # a server that has closed it already may have said why
        channel.send(Hello(challenge=ours), timeout)
    answer = channel.receive(Deadline(timeout))
    if isinstance(answer, Challenge):
        if access.token is None:
            raise SourceRefused("it wants a token: set TOKEN_FILE")
        proofs = Proofs(access.token, ours, answer.challenge)
        channel.send(Prove(proofs.client), timeout)
        answer = channel.receive(Deadline(timeout))
        if isinstance(answer, Welcome) and not hmac.compare_digest(answer.proof, proofs.server):
            raise SourceRefused("it does not know the token: compare TOKEN_FILE on both sides")
        channel.authenticate(proofs.frame_key)
    elif isinstance(answer, Welcome) and access.token is not None:
        raise SourceRefused("it has no token, and weights are not taken from just anybody: set TOKEN_FILE there too")
    _require_welcome(answer)


def _require_welcome(answer: Message) -> None:
    if isinstance(answer, Refuse):
        differences = "; ".join(str(difference.flipped()) for difference in answer.differences)
        raise SourceRefused(one_line(f"it refused: {answer.reason}{': ' if differences else ''}{differences}"))
    assert isinstance(answer, Welcome)
    if answer.protocol != PROTOCOL_VERSION:
        raise SourceRefused(f"it speaks protocol {answer.protocol}: expected {PROTOCOL_VERSION}")


def welcome(channel: Channel, access: Access, timeout: float) -> None:
    """The server's side. Raises Unauthorized, or another PeerError for a peer that breaks off or does not greet."""
    if access.server_tls is not None:
        try:
            channel.secure(access.server_tls, timeout)
        except ConnectionLost as error:
            if _just_closed(error):
                raise  # it went away, as health checks do
            raise Unauthorized(f"no TLS with a certificate of our authority: {error}") from error
    deadline = Deadline(timeout)
    hello = _first_message(channel, deadline)
    assert isinstance(hello, Hello)
    if hello.protocol != PROTOCOL_VERSION:
        difference = Difference("protocol", str(PROTOCOL_VERSION), str(hello.protocol))
        channel.send(Refuse("the protocol versions differ", (difference,)), timeout)
        raise ProtocolError(f"the protocol versions differ: {difference}")
    if access.token is None:
        channel.send(Welcome(), timeout)
        return
    ours = challenge()
    proofs = Proofs(access.token, hello.challenge, ours)
    channel.send(Challenge(ours), timeout)
    try:
        prove = channel.receive(deadline)
    except ConnectionLost as error:
        raise Unauthorized("it does not show that it knows the token") from error
    assert isinstance(prove, Prove)
    if not hmac.compare_digest(prove.proof, proofs.client):
        channel.send(Refuse("the token is not the one of this server"), timeout)
        raise Unauthorized("it has another token")
    channel.send(Welcome(proof=proofs.server), timeout)
    channel.authenticate(proofs.frame_key)


def _first_message(channel: Channel, deadline: Deadline) -> Message:
    try:
        return channel.receive(deadline)
    except ForeignProtocol as error:
        channel.say_last(error.answer, min(deadline.remaining(), _LAST_WORD_SECONDS))
        raise
