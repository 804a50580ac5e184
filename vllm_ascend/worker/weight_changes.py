"""Keeps Netloader from serving weights while they move or change: whoever took them would get a mixture.

On an NPU the parameters themselves are served. So a worker suspends serving around all that touches them: sleep moves
them away and back, and then they are served again as they were; where they end up with other contents, what was served
is given up, and only a reload through Netloader serves again.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import gpu_worker

from vllm_ascend.model_loader.netloader import serving


class WorkerThatServes(gpu_worker.Worker):
    """vLLM's worker with serving suspended at the right times. Without Netloader there is nothing to suspend.

    What cannot be suspended is not changed either: the call raises TimeoutError, and all is as before.
    """

    def sleep(self, level: int = 1) -> None:
        if level == 1:
            serving.suspend("it sleeps")
        else:
            serving.give_up(f"its weights were dropped when it went to sleep (level {level}), and not reloaded yet")
        super().sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        super().wake_up(tags)
        if tags is None or "weights" in tags:
            serving.resume()

    def discard(self, tags: tuple[str, ...]) -> None:
        if "weights" in tags:
            serving.give_up("its weights were dropped, and not reloaded yet")
        super().discard(tags)

    def reset_weights(self) -> None:
        serving.give_up("its weights were set to zero, and not reloaded yet")
        super().reset_weights()

    def start_weight_update(self) -> None:
        serving.give_up("its weights are updated in place")
        super().start_weight_update()

    def start_draft_weight_update(self) -> None:
        serving.give_up("its weights are updated in place")
        super().start_draft_weight_update()

    def reload_weights(self, weights_iterator: Any = None, *args: Any, **kwargs: Any) -> None:
        """A reload through Netloader's loader suspends by itself, once it has the new weights."""
        if weights_iterator is not None:
            serving.give_up("its weights were replaced in place")
        super().reload_weights(weights_iterator, *args, **kwargs)
