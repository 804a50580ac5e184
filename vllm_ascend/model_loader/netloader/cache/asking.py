"""How an engine asks the cache of its host for weights, and hands over its own.

A cache is a help and never a need. Whatever is wrong with it is logged, and the engine goes on without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllm_ascend.model_loader.netloader.cache.contents import Contents
from vllm_ascend.model_loader.netloader.cache.line import Line, connect
from vllm_ascend.model_loader.netloader.cache.messages import Coming, Give, Hand, Lack, Taken, Want
from vllm_ascend.model_loader.netloader.client.verification import Evidence
from vllm_ascend.model_loader.netloader.errors import (
    ConfigError,
    ConnectionLost,
    PeerError,
    ProtocolError,
    Stalled,
    TransportError,
    one_line,
)
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.wire.channel import Deadline

logger = logging.getLogger(__name__)

_ASK_TRIES: Final = 2
"""A cache process that is replaced by a new one ends its connections, and the new one answers at once."""
_HAND_TRIES: Final = 6
HAND_PAUSE: Final = 0.5
"""Seconds between two tries to hand over. While a cache process is replaced by a new one, it takes nothing."""


@dataclass(frozen=True)
class Given:
    """Weights that a cache has given. The caller closes `pages`, which are sealed.

    Every byte of them was verified by `evidence` in the cache. `fingerprint` is that of the checkpoint that they are
    from, empty where it is unknown; `path` is that of the cache's socket.
    """

    pages: Arena
    evidence: Evidence
    fingerprint: str
    path: Path


def find(paths: Sequence[Path], seconds: float) -> Path | str:
    """The first of `paths` at which a cache of this user takes a connection within `seconds`, or why there is none."""
    reasons = []
    for path in paths:
        try:
            connect(path, seconds).close()
        except (OSError, PeerError, ConfigError) as error:
            reasons.append(f"{path}: {getattr(error, 'strerror', None) or error}")
        else:
            return path
    return "; ".join(reasons)


def ask(path: Path, request: Request, timeouts: Timeouts) -> Given | None:
    """What the cache at `path` has of what is requested, None if it has nothing or fails, which is logged.

    Waits as long as the cache is getting more of it, at most `timeouts.stall` seconds for each step.
    """
    for left in reversed(range(_ASK_TRIES)):
        try:
            with connect(path, timeouts.connect) as line:
                return _ask(line, path, request, timeouts)
        except ConnectionLost as error:
            if not left:
                logger.warning("the cache at %s is not used: %s", path, error)
        except (PeerError, TransportError, ConfigError, OSError) as error:
            logger.warning("the cache at %s is not used: %s", path, error)
            return None
    return None


def hand(path: Path, contents: Contents, descriptor: int, timeouts: Timeouts) -> bool:
    """Hands sealed pages to the cache at `path`, where they stay the same for good. Whether it has taken them.

    `descriptor` stays the caller's.
    """
    for left in reversed(range(_HAND_TRIES)):
        try:
            with connect(path, timeouts.connect) as line:
                line.send(Hand(contents.note), timeouts.connect, descriptor)
                with line.receive(timeouts.stall) as received:
                    return _is_taken(path, received.message)
        except (ConnectionLost, ConnectionRefusedError, FileNotFoundError) as error:
            if not left:
                logger.warning("the cache at %s does not take these weights: %s", path, error)
            else:
                time.sleep(HAND_PAUSE)
        except (PeerError, ConfigError, OSError) as error:
            logger.warning("the cache at %s does not take these weights: %s", path, error)
            return False
    return False


def _is_taken(path: Path, message: object) -> bool:
    match message:
        case Taken():
            logger.info("the cache at %s holds these weights too from now on", path)
            return True
        case Lack(reason=reason):
            logger.warning("the cache at %s does not take these weights: %s", path, one_line(reason))
            return False
        case _:
            raise ProtocolError(f"the cache answered with {type(message).__name__}")


def _ask(line: Line, path: Path, request: Request, timeouts: Timeouts) -> Given | None:
    line.send(Want(request.identity, request.coordinates, request.manifest.digest), timeouts.connect)
    held, deadline = -1, Deadline(timeouts.stall)
    while True:
        with line.receive(timeouts.stall) as received:
            match received.message:
                case Give(note=note):
                    return _given(Contents.told_by(note), received.take(), path, request)
                case Lack(reason=reason):
                    logger.info("the cache at %s does not have these weights: %s", path, one_line(reason))
                    return None
                case Coming(held=now):
                    if now > held:
                        held, deadline = now, Deadline(timeouts.stall)
                    elif not deadline.remaining():
                        raise Stalled(f"it has got no more of these weights for {timeouts.stall:g} s")
                case message:
                    raise ProtocolError(f"the cache answered with {type(message).__name__}")


def _given(contents: Contents, descriptor: int, path: Path, request: Request) -> Given:
    pages = Arena.adopt(descriptor, request.manifest.nbytes)
    want = Want(request.identity, request.coordinates, request.manifest.digest)
    reason = contents.why_not(want) or ("" if contents.digests is not None else "it tells no digests")
    if reason:
        pages.close()
        raise ProtocolError(f"the cache gave other weights than were asked for: {reason}")
    assert contents.digests is not None
    evidence = Evidence(contents.digests, contents.root, contents.attributes)
    return Given(pages, evidence, contents.request.identity.fingerprint, path)
