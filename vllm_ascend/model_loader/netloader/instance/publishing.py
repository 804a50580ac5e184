"""What becomes of the weights of a load: they are served, declined with the reason, or withdrawn.

Inference does not depend on it, so nothing that fails here is raised; it is logged, and becomes the reason in
`Published.not_served`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import UnsupportedModel
from vllm_ascend.model_loader.netloader.instance import serving
from vllm_ascend.model_loader.netloader.instance.announcing import tell_source
from vllm_ascend.model_loader.netloader.instance.caching import HostCache
from vllm_ascend.model_loader.netloader.instance.filling import Kept, Loaded
from vllm_ascend.model_loader.netloader.instance.output import OutputFiles
from vllm_ascend.model_loader.netloader.instance.rank import Rank
from vllm_ascend.model_loader.netloader.server.server import WeightServer
from vllm_ascend.model_loader.netloader.transport.base import Transport
from vllm_ascend.model_loader.netloader.wire.access import Access

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What clients get of the weights of a load.

    `server` answers them, None if there is none. `listening` is its address as text if it serves the weights; otherwise
    `not_served` may say why not. `changed` are the names of the weights that post-processing has changed, None if
    nobody wants to know.
    """

    server: WeightServer | None = None
    listening: str | None = None
    not_served: str = ""
    changed: list[str] | None = None


class Publisher:
    """Serves the weights of one load in place of those that its engine has served in the same role.

    `not_served` says why nothing can be served, whatever is loaded; it is empty otherwise.
    """

    def __init__(
        self,
        config: NetLoaderConfig,
        rank: Rank,
        access: Access,
        transports: tuple[Transport, ...],
        output: OutputFiles,
    ) -> None:
        """Opens the listener, so that clients that come early are told to wait.

        Raises ConfigError if it cannot be had as it is configured. That another process has its port is only logged.
        """
        self._config = config
        self._rank = rank
        self._access = access
        self._output = output
        self.options = serving.ServeOptions(config, access, transports, rank.number, rank.engine)
        self.not_served = self._open()

    @property
    def host(self) -> str:
        """The host by which clients reach the listener, as other hosts know it."""
        if self._config.listen_host in (None, "0.0.0.0", "::"):
            return self._rank.own_address()
        return str(self._config.listen_host)

    def publish(self, model: nn.Module, loaded: Loaded) -> Published:
        """Serves what was `loaded` for as long as `model` lives, or declines it, or withdraws what was served before.

        `model` is post-processed. It may be another one than was filled.
        """
        try:
            published = self._publish(model, loaded)
        except OSError as error:
            reason = self._drop(loaded, str(error))
            serving.decline_all(self._rank.role, self._rank.engine, reason)  # the engine has other weights by now
            return Published(not_served=reason)
        serving.resume(self._rank.engine)  # what this load has not replaced, such as the weights of another role
        return published

    def give_up(self, reason: str) -> None:
        """Serves nothing in this role any more, whatever is served or suspended."""
        self._rank.log_not_served(reason)
        serving.decline_all(self._rank.role, self._rank.engine, reason)

    def abandon(self) -> None:
        """Closes the listener after a load that failed, unless something else still uses it. Idempotent."""
        serving.abandon(self.options)

    def _open(self) -> str:
        if not self._config.serve:
            return "SERVE is false"
        try:
            serving.open_listener(self._rank.role, self.options)
        except OSError as error:
            reason = error.strerror or str(error)
            self._rank.log_not_served(reason)
            return reason
        return ""

    def _publish(self, model: nn.Module, loaded: Loaded) -> Published:
        if self.not_served:
            serving.withdraw(self._rank.role, self._rank.engine)
            return Published(not_served=self.not_served)
        if loaded.kept is None:
            return self._decline(model, loaded.not_served)

        # Before anything is served: on an accelerator, what post-processing has changed decides whether and from where.
        try:
            changed = self._find_changes(model, loaded.kept)
        except UnsupportedModel as error:
            return self._decline(model, self._drop(loaded, str(error)))
        return self._serve(model, loaded.kept, loaded, changed)

    def _serve(self, model: nn.Module, kept: Kept, loaded: Loaded, changed: list[str] | None) -> Published:
        host = self.host
        server = serving.serve(model, kept.contents, self.options)
        if self._rank.role == "target":
            server.tell_files(self._rank.small_files())
        address = str(Endpoint(host, server.port))
        self._output.write_address(address)
        fetched = loaded.fetched
        # What was not verified is not passed on as a replica. Who relays is known already, and a source believes only
        # those who took everything from it.
        if fetched is not None and self._config.verify and not fetched.port and not loaded.came_from_several:
            tell_source(fetched, server.port, timeout=self._config.connect_timeout, access=self._access)
        if loaded.cached is None:
            HostCache.of(self._config, self._rank.number, self._access).hand(kept.contents)
        return Published(server, address, changed=changed)

    def _decline(self, model: nn.Module, reason: str) -> Published:
        return Published(serving.decline(model, self._rank.role, reason, self.options), not_served=reason)

    def _drop(self, loaded: Loaded, reason: str) -> str:
        """Gives up what cannot be served after all. Returns the `reason`."""
        if loaded.kept is not None:
            loaded.kept.release()
        self._rank.log_not_served(reason)
        return reason

    def _find_changes(self, model: nn.Module, kept: Kept) -> list[str] | None:
        """Raises UnsupportedModel if an original cannot be had."""
        changed = kept.weights.find_changes(model, kept.contents.memory)
        if changed is not None and kept.weights.keeps_originals:
            logger.info(
                "post-processing changed %d tensors of the %s weights; in host memory the originals of all are kept, "
                "so INT8_CACHE %r keeps nothing beside them",
                len(changed),
                self._rank.role,
                kept.weights.cache.place,
            )
        return changed
