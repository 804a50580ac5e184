"""Keeps Netloader from serving weights while they move or change: whoever took them would get a mixture.

On an NPU the parameters themselves are served. So a worker suspends serving around all that touches them: sleep moves
them away and back, and then they are served again as they were; where they end up with other contents, what was served
is given up, and only a reload through Netloader serves again.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from vllm.v1.worker import gpu_worker


class WorkerThatServes(gpu_worker.Worker):
    """vLLM's worker with serving suspended at the right times. Without Netloader there is nothing to suspend.

    What cannot be suspended is not changed either: the call raises TimeoutError, and all is as before.
    """

    def sleep(self, level: int = 1) -> None:
        if level == 1:
            self._suspend_serving("it sleeps")
        else:
            self._give_up_serving(
                f"its weights were dropped when it went to sleep (level {level}), and not reloaded yet"
            )
        super().sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        super().wake_up(tags)
        if tags is None or "weights" in tags:
            self._resume_serving()

    def discard(self, tags: tuple[str, ...]) -> None:
        if "weights" in tags:
            self._give_up_serving("its weights were dropped, and not reloaded yet")
        super().discard(tags)

    def reset_weights(self) -> None:
        self._give_up_serving("its weights were set to zero, and not reloaded yet")
        super().reset_weights()

    def start_weight_update(self) -> None:
        self._give_up_serving("its weights are updated in place")
        super().start_weight_update()

    def start_draft_weight_update(self) -> None:
        self._give_up_serving("its weights are updated in place")
        super().start_draft_weight_update()

    def reload_weights(self, weights_iterator: Any = None, *args: Any, **kwargs: Any) -> None:
        """A reload through Netloader's loader suspends by itself, once it has the new weights."""
        if weights_iterator is not None:
            self._give_up_serving("its weights were replaced in place")
        super().reload_weights(weights_iterator, *args, **kwargs)

    def _suspend_serving(self, reason: str) -> None:
        if (serving := _serving()) is not None:
            serving.suspend(self.vllm_config.compilation_config, reason)

    def _resume_serving(self) -> None:
        if (serving := _serving()) is not None:
            serving.resume(self.vllm_config.compilation_config)

    def _give_up_serving(self, reason: str) -> None:
        if (serving := _serving()) is not None:
            serving.give_up(self.vllm_config.compilation_config, reason)


def _serving() -> ModuleType | None:
    """Of Netloader, where this process has used it. It is not imported: a worker needs none of what Netloader needs."""
    return sys.modules.get("vllm_ascend.model_loader.netloader.serving")
