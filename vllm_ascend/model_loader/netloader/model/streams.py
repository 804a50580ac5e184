"""Work on an accelerator beside inference: each thread that moves weights has a stream of its own for each device.

So neither inference nor a transfer waits for the other. On the CPU, which has no streams, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

import torch


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Makes `device` the current one of this thread, and a stream that only this thread uses its current stream.

    What is put into the stream within is finished at the end.
    """
    if device.type == "cpu":
        yield
        return

    module: Any = torch.get_device_module(device)
    module.set_device(device)  # new threads begin with device 0
    streams = _streams_of_thread.__dict__
    stream = streams.get(str(device))
    if stream is None:
        stream = streams[str(device)] = module.Stream(device)

    with module.stream(stream):
        yield
    stream.synchronize()


def finish_work(device: torch.device) -> None:
    """Waits for everything that any stream, such as the model's own, still does on `device`."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


_streams_of_thread: Final = threading.local()
"""By the name of their device."""
