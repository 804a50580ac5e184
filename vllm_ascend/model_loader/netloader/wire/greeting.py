"""How every connection begins: TLS where there are certificates, Hello, proofs where there is a token, and Welcome.

`greet` is the client's side and `welcome` the server's. Either ends with a channel that the other messages may use, or
with an error that says what to compare on both sides: here the mistakes of a deployment show.
"""

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
)
from vllm_ascend.model_loader.netloader.weights.identity import Difference
from vllm_ascend.model_loader.netloader.wire.access import Access, Proofs, challenge
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline, connect
from vllm_ascend.model_loader.netloader.wire.failures import is_our_own
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
from vllm_ascend.model_loader.netloader.wire.refusal import refused

_LAST_WORD_SECONDS: Final = 1.0
"""How long a peer that speaks another protocol may take to read that it does."""


def greet(source: Endpoint, access: Access, timeout: float) -> Channel:
    """A connection to `source` that has been greeted; the caller closes it.

    `timeout` is how many seconds each of its steps may take: to connect, to agree on TLS, and to answer. Raises
    SourceUnreachable or SourceRefused, and TransportError where this process cannot connect to anybody.
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
    """What a server may mean by it that breaks off without saying why."""
    reason = getattr(error.__cause__, "reason", None)
    if isinstance(reason, str) and "UNEXPECTED_MESSAGE" in reason:  # as `foreign` answers TLS
        return "; it has no TLS: TLS_CERT, TLS_KEY and TLS_CA belong on all instances or on none"
    if not _just_closed(error):
        return ""

    tls = "want TLS (TLS_CERT, TLS_KEY, TLS_CA)" if access.client_tls is None else "have no TLS"
    return f"; it may {tls} or have blocked this address for up to a minute after failed attempts"


def _just_closed(error: PeerError) -> bool:
    """Whether the peer went away without a word. What it objects to in TLS comes as an error of TLS."""
    of_tls = isinstance(error.__cause__, ssl.SSLError) and not isinstance(error.__cause__, ssl.SSLEOFError)
    return isinstance(error, ConnectionLost) and not of_tls


def _introduce(channel: Channel, access: Access, timeout: float) -> None:
    """The messages of the client. Raises SourceRefused, or PeerError for a peer that breaks off or does not greet."""
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
        raise refused(answer)
    assert isinstance(answer, Welcome)
    if answer.protocol != PROTOCOL_VERSION:
        raise SourceRefused(f"it speaks protocol {answer.protocol}: expected {PROTOCOL_VERSION}")


def welcome(channel: Channel, access: Access, timeout: float) -> None:
    """The server's side of `greet`. The channel stays the caller's, whatever happens.

    Raises Unauthorized for a peer that does not prove that it may talk to this process, and another PeerError for one
    that breaks off or does not greet within `timeout` seconds.
    """
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
    else:
        _require_proof(channel, access.token, hello, deadline, timeout)


def _require_proof(channel: Channel, token: bytes, hello: Hello, deadline: Deadline, timeout: float) -> None:
    """Goes on with authenticated frames. Raises Unauthorized."""
    ours = challenge()
    proofs = Proofs(token, hello.challenge, ours)
    channel.send(Challenge(ours), timeout)
    try:
        prove = channel.receive(deadline)
    except ConnectionLost as error:
        raise Unauthorized("it does not show that it knows the token") from error

    assert isinstance(prove, Prove)
    if not hmac.compare_digest(prove.proof, proofs.client):
        channel.send(Refuse("the token is not the one of this server"), timeout)
        raise Unauthorized("it has another token")

    # The Welcome still travels without a tag; the client checks the proof in it before it trusts any.
    channel.send(Welcome(proof=proofs.server), timeout)
    channel.authenticate(proofs.frame_key)


def _first_message(channel: Channel, deadline: Deadline) -> Message:
    """What the peer says first. One that speaks another protocol is told so in that one."""
    try:
        return channel.receive(deadline)
    except ForeignProtocol as error:
        channel.say_last(error.answer, min(deadline.remaining(), _LAST_WORD_SECONDS))
        raise
