"""The progress bar of a transfer, like the one that vLLM shows of a checkpoint."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress_bar(nbytes: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Shows a bar if the transfer of `nbytes` takes more than a second.

    Gives a function that any thread may tell how many more bytes have arrived.
    """
    lock = threading.Lock()
    with tqdm(
        total=nbytes,
        desc="Loading weights from a running instance",
        unit="B",
        unit_scale=True,
        disable=not enabled,
        delay=1,
        bar_format="{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n",
    ) as bar:

        def advance(moved: int) -> None:
            with lock:
                bar.update(moved)

        yield advance
