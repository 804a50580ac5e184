"""What can go wrong, shaped by what the caller does next.

    NetloaderError
      ConfigError            the user's configuration is wrong: stop the start
      BrokenInstallation     a package that is needed cannot be imported: stop the start
      NoRoom                 the limit on this process's memory is below what the weights need: stop the start
      UnsupportedModel       this model's weights cannot be held in an arena: load from disk, do not serve
      CheckpointChanged      what was read from disk may be a mixture: do not serve it
      ReloadRefused          this model cannot take new weights in place: start the instance anew to change them
      PeerError              the peer failed: end this session, and only this one
        ProtocolError        it sent what it may not send, or nothing that can be understood
        ConnectionLost       the connection ended before what it owed had come
        Stalled              it was silent for too long
        Unauthorized         it does not show that it knows the token, or has no certificate of the authority
        Damaged              it went on delivering bytes that are not those of its digests
        TooSlow              it sends next to nothing
      SourceError            this source cannot be used now: try the next one
        SourceUnreachable    no conversation came about
        SourceRefused        it answered no, and why
        SourceFailed         it went away, stalled, or broke the protocol
        SourceTooSlow        it sends next to nothing: ask it again only if nobody else is left
      TransportError         this transport does not work here: try the source's next transport
      SourcesExhausted       nobody is left to ask: load from disk, or stop when FALLBACK forbids the disk

`OSError` and `msgspec` errors are translated where they occur and chained.
"""

from __future__ import annotations

from collections.abc import Sequence


class NetloaderError(Exception):
    """Base of everything Netloader raises on purpose."""


class ConfigError(NetloaderError, ValueError):
    """A key or value in the configuration is not allowed."""


class BrokenInstallation(NetloaderError, ImportError):
    """Netloader was asked for and cannot be imported."""


class NoRoom(NetloaderError):
    """Loading would end with this process killed, whichever way the weights came."""


class UnsupportedModel(NetloaderError):
    """The model's tensors cannot be described by a manifest, or there is no memory of the kind that is served."""


class CheckpointChanged(NetloaderError):
    """Files were replaced or written to while they were read, or nobody can tell."""


class ReloadRefused(NetloaderError):
    """The model in use cannot take new weights; it and what is served are unchanged."""


class PeerError(NetloaderError):
    """The peer did not do its part: this session with it is over."""


class ProtocolError(PeerError):
    """The peer broke the protocol."""


class ConnectionLost(PeerError):
    """The peer closed or reset the connection."""


class Stalled(PeerError):
    """The peer neither sent nor took a byte for too long."""


class Unauthorized(PeerError):
    """The peer did not show that it may talk to this process."""


class Damaged(PeerError):
    """A source went on delivering bytes that are not those of its digests."""


class TooSlow(PeerError):
    """A source sends bytes, but so few that another one or the disk is the better way."""


class SourceError(NetloaderError):
    """A source could not deliver the weights."""


class SourceUnreachable(SourceError):
    """The source did not take the connection or did not greet in time."""


class SourceRefused(SourceError):
    """The source declined, or what it holds is not what is wanted.

    `referrals` are endpoints, as text, that the source named instead of itself.
    """

    def __init__(self, reason: str, referrals: Sequence[str] = ()) -> None:
        self.referrals = tuple(referrals)
        super().__init__(reason)


class SourceFailed(SourceError):
    """The source failed after the session had begun."""


class SourceTooSlow(SourceError):
    """The source sends less than MIN_BANDWIDTH while there is another way to the weights."""


class TransportError(NetloaderError):
    """A negotiated transport could not move the bytes on this pair of machines, or this process lacks what it takes."""


class SourcesExhausted(NetloaderError):
    """Every source was tried, or there was none.

    `reasons` holds one line per attempt, in order.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(reasons) if reasons else "no SOURCE is configured for this rank")


def one_line(text: str, limit: int = 1000) -> str:
    """`text` from a peer, fit for a log: no line breaks or control characters, and not without end."""
    printable = "".join(character if character.isprintable() else "?" for character in text[:limit])
    return printable if len(text) <= limit else f"{printable}..."
