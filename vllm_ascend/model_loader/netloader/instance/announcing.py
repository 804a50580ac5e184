"""Tells the source of these weights that they are served here too, so that it can refer other clients to this process.

It happens in a thread, and failures go to the debug log only: whether the source is still there does not matter here.
"""

from __future__ import annotations

import logging
import threading

from vllm_ascend.model_loader.netloader.client.fetched import Fetched
from vllm_ascend.model_loader.netloader.client.inquiry import announce
from vllm_ascend.model_loader.netloader.errors import SourceError, TransportError
from vllm_ascend.model_loader.netloader.wire.access import Access

logger = logging.getLogger(__name__)


def tell_source(fetched: Fetched, port: int, *, timeout: float, access: Access) -> None:
    """Tells the source of `fetched` that the weights are served on `port` now. Returns at once and never raises.

    `timeout` is in seconds, for the connection and for each message.
    """

    def tell() -> None:
        try:
            announce(fetched.address, fetched.session, port, timeout, access)
        except (SourceError, TransportError) as error:
            logger.debug("%s does not hear that its weights are served here too: %s", fetched.address, error)

    try:
        threading.Thread(target=tell, name="netloader-announce", daemon=True).start()
    except RuntimeError as error:
        logger.debug("no thread can be had to tell %s that its weights are served here too: %s", fetched.address, error)
