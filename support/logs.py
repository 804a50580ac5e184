"""What a log may hold after peers have done their worst."""

from __future__ import annotations

import logging

import pytest

LINE_LIMIT = 12_000
"""Characters in a line of the log. A refusal names up to eight tensors."""


def assert_no_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing was logged with a traceback, or as worse than a warning."""
    assert not [record.getMessage() for record in caplog.records if record.exc_info or record.levelno > logging.WARNING]


def assert_orderly(caplog: pytest.LogCaptureFixture) -> None:
    """All that went wrong was put down to the peer, in lines that can be read."""
    assert_no_error_of_the_server(caplog)
    messages = [record.getMessage() for record in caplog.records]
    assert not [message for message in messages if "an error of this server" in message]
    assert not [message[:200] for message in messages if len(message) > LINE_LIMIT or not message.isprintable()]
