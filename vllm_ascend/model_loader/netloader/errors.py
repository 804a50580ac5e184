"""What can go wrong, one class for each thing that the caller can do next.

    NetloaderError
      ConfigError            the user's configuration is wrong: stop the start
      BrokenInstallation     a package that is needed cannot be imported: stop the start
      NoRoom                 this process may not have the memory that the weights need: stop the start
      UnsupportedModel       the weights of this model cannot be described or held: load from disk, do not serve
      CannotBeWritten        vLLM's sharded format cannot hold this: say what it is, and write nothing
      DirectoryFailed        the directory that is to be written cannot be: make room there, or name another
      FileRefused            a small file of the model cannot be told to a peer: tell it why
      CheckpointChanged      what was read from disk may be a mixture: do not serve it
      ReloadRefused          this model cannot take new weights in place: restart the instance to change them
      PeerError              the peer did not do its part: end this session, and no other
        ProtocolError        it said what it may not say, or what cannot be understood
        ConnectionLost       the connection ended; the peer may have said why on another one
        SessionEnded         it ended the session, and said why
        Stalled              it neither sent nor took a byte for too long
        Unauthorized         it did not prove that it may talk to this process: note it against its address
        Damaged              it delivered bytes that are not those of its digests
        Replaced             it has other weights now than those that it has begun to deliver
      SourceError            this source cannot be used now: try the next one
        SourceUnreachable    no conversation came about
        SourceRefused        it declined, or it holds something else: do not ask it again
        SourceFailed         it failed within a session: it may be asked again in a later round
          OtherContents      it holds other weights than those that other sources deliver at this moment
        SourceTooSlow        it sends next to nothing: ask it again only if nobody else is left
      TransportError         this transport does not work here: try the next one with the same source
      SourcesExhausted       nobody is left to ask: load from disk, or stop where FALLBACK forbids it

Errors of the operating system and of msgspec are translated where they occur, and chained. A PeerError belongs to a
session, on either side of it; the client makes a SourceError of it once it knows what that means for its search. An
exception that never leaves its module is private to it, and not in this tree.
"""

from __future__ import annotations

from collections.abc import Sequence


class NetloaderError(Exception):
    """The base of all that Netloader raises on purpose."""


class ConfigError(NetloaderError, ValueError):
    """A key or value in the configuration is not allowed."""


class BrokenInstallation(NetloaderError, ImportError):
    """Netloader was asked for, but a package that it needs cannot be imported."""


class NoRoom(NetloaderError):
    """To load would get this process killed, in whichever way the weights came: its memory limit is too low."""


class UnsupportedModel(NetloaderError):
    """No manifest can describe the tensors of the model, or no memory that can be served can hold them."""


class CannotBeWritten(NetloaderError):
    """vLLM's sharded format cannot hold what a source has. The message names it."""


class DirectoryFailed(NetloaderError):
    """The directory that a command is to write cannot be written, or must not."""


class FileRefused(NetloaderError):
    """A small file of the model is not there, may not be told to anybody, or is another one by now."""


class CheckpointChanged(NetloaderError):
    """Files of the checkpoint were replaced or written to while they were read, or nobody can tell."""


class ReloadRefused(NetloaderError):
    """The model in use cannot take new weights. It is unchanged, and so is what is served of it."""


class PeerError(NetloaderError):
    """The peer did not do its part, so this session with it is over. Raised as such where no kind of it says more."""


class ProtocolError(PeerError):
    """The peer said what it may not say, or what cannot be understood."""


class ConnectionLost(PeerError):
    """The peer closed or reset the connection, or took no further one for the session."""


class SessionEnded(PeerError):
    """The server ended the session. `denies` says whether it may have other weights by now, or none."""

    def __init__(self, reason: str, *, denies: bool) -> None:
        self.denies = denies
        super().__init__(f"it ended the session: {reason}")


class Stalled(PeerError):
    """The peer neither sent nor took a byte for too long."""


class Unauthorized(PeerError):
    """The peer showed neither that it knows the token nor a certificate that the authority has signed."""


class Damaged(PeerError):
    """The bytes that the source delivered, or shares, are not those of its digests."""


class Replaced(PeerError):
    """The source has other weights now than those that it accepted to deliver."""


class SourceError(NetloaderError):
    """A source did not deliver the weights."""


class SourceUnreachable(SourceError):
    """The source did not take the connection, or did not greet in time."""


class SourceRefused(SourceError):
    """The source declined, or what it holds is not what is wanted.

    `referrals` are the endpoints that it named instead of itself, as text.
    """

    def __init__(self, reason: str, referrals: Sequence[str] = ()) -> None:
        self.referrals = tuple(referrals)
        super().__init__(reason)


class SourceFailed(SourceError):
    """The source failed after the session had begun."""


class OtherContents(SourceFailed):
    """The source holds other contents than those that are being loaded, which others deliver at this moment."""


class SourceTooSlow(SourceError):
    """The source sends less than MIN_BANDWIDTH, while there is another way to the weights."""


class TransportError(NetloaderError):
    """A transport cannot move bytes between these two machines, or this process lacks what it takes to use it."""


class SourcesExhausted(NetloaderError):
    """Every source was tried, or there was none. `reasons` has a line for each attempt, in order."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(reasons) if reasons else "no SOURCE is configured for this rank")


def one_line(text: str, limit: int = 1000) -> str:
    """`text` as it may be shown: at most `limit` characters, with "?" for line breaks and control characters.

    For all that a peer has said, before it goes to a log or a terminal.
    """
    printable = "".join(character if character.isprintable() else "?" for character in text[:limit])
    return printable if len(text) <= limit else f"{printable}..."
