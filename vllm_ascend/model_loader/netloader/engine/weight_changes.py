"""Keeps the weights on an accelerator from being served while they move or change, so that no client gets a mixture.

On an accelerator the parameters themselves are served, so serving is suspended around everything that touches them.
Sleep moves them away and back; afterwards they are served again as they were. If they end up with other contents, what
was served is given up, and only a reload through Netloader serves again.

The platform decides which class a worker is of. On all accelerators it is vLLM's `gpu_worker.Worker` or inherits from
it, so the methods of that class are wrapped, rather than putting another class in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from vllm_ascend.model_loader.netloader.instance import serving

Tell = Callable[..., object]


def watch_workers() -> None:
    """Makes the workers of this process suspend serving before they touch their weights. Idempotent.

    If a client still reads the weights, the worker's method raises TimeoutError, and everything stays as it was.
    """
    from vllm.v1.worker.gpu_worker import Worker

    watch(Worker)


@functools.cache
def watch(worker: type[Any]) -> None:
    """Wraps the methods of `worker`, a class with those of vLLM's worker. Idempotent."""
    for name, tell in _BEFORE.items():
        setattr(worker, name, _preceded(getattr(worker, name), tell))
    worker.wake_up = _followed(worker.wake_up, _after_wake_up)


def _preceded(method: Callable[..., Any], tell: Tell) -> Callable[..., Any]:
    @functools.wraps(method)
    def change(worker: Any, *args: Any, **kwargs: Any) -> Any:
        tell(worker, *args, **kwargs)
        return method(worker, *args, **kwargs)

    return change


def _followed(method: Callable[..., Any], tell: Tell) -> Callable[..., Any]:
    @functools.wraps(method)
    def change(worker: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(worker, *args, **kwargs)
        tell(worker, *args, **kwargs)
        return result

    return change


def _before_sleep(worker: Any, level: int = 1) -> None:
    if level == 1:
        serving.suspend(_engine(worker), "it sleeps")
    else:
        _give_up(worker, f"its weights were dropped when it went to sleep (level {level}), and not reloaded yet")


def _after_wake_up(worker: Any, tags: list[str] | None = None) -> None:
    if tags is None or "weights" in tags:
        serving.resume(_engine(worker))


def _before_discard(worker: Any, tags: tuple[str, ...]) -> None:
    if "weights" in tags:
        _give_up(worker, "its weights were dropped, and not reloaded yet")


def _before_reset(worker: Any) -> None:
    _give_up(worker, "its weights were set to zero, and not reloaded yet")


def _before_update(worker: Any) -> None:
    _give_up(worker, "its weights are updated in place")


def _before_reload(worker: Any, weights_iterator: Any = None, *_: Any, **__: Any) -> None:
    """Does nothing for a reload through Netloader's loader, which suspends serving once it has the new weights."""
    if weights_iterator is not None:
        _give_up(worker, "its weights were replaced in place")


_BEFORE: Final[dict[str, Tell]] = {
    "sleep": _before_sleep,
    "discard": _before_discard,
    "reset_weights": _before_reset,
    "start_weight_update": _before_update,
    "start_draft_weight_update": _before_update,
    "reload_weights": _before_reload,
}


def _give_up(worker: Any, reason: str) -> None:
    serving.give_up(_engine(worker), reason)


def _engine(worker: Any) -> object:
    """The object that all loads of the worker's engine share."""
    return worker.vllm_config.compilation_config
