"""Other protocols at our port, and ours at theirs."""

from __future__ import annotations

import http.client
import logging
import socket
import ssl
import threading

import pytest

from support.certificates import Authority
from support.sources import SMALL, fetch, serving
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.wire.access import Access

pytestmark = pytest.mark.timeout(60)

MEMORY = (InProcessTransport(),)
TOKEN = Access(b"0123456789abcdef")


@pytest.mark.parametrize("access", [Access(), TOKEN], ids=["open", "token"])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_a_client_that_speaks_http_is_told_so_and_logged_as_that(
    caplog: pytest.LogCaptureFixture, method: str, access: Access
) -> None:
    with serving(SMALL, MEMORY, access=access) as (_, source):
        connection = http.client.HTTPConnection(source.host, source.port, timeout=10)
        connection.request(method, "/v1/models")
        response = connection.getresponse()
        assert (response.status, response.reason) == (400, "Bad Request")
        body = response.read().decode()
        assert body.startswith("This port is Netloader's") != (method == "HEAD")
        connection.close()
    [message] = [record.getMessage() for record in caplog.records if "ended the connection" in record.message]
    assert message.endswith(": it speaks HTTP, and this is Netloader's port, not vLLM's own")


def test_a_large_request_does_not_keep_the_answer_away() -> None:
    with serving(SMALL, MEMORY) as (_, source):
        connection = http.client.HTTPConnection(source.host, source.port, timeout=10)
        connection.request("POST", "/v1/completions", body=b"x" * (2 << 20))
        assert connection.getresponse().status == 400
        connection.close()


def test_http_2_is_answered_too() -> None:
    with serving(SMALL, MEMORY) as (_, source), socket.create_connection(source, timeout=10) as client:
        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_a_request_in_pieces_is_known_by_its_first_bytes() -> None:
    with serving(SMALL, MEMORY) as (_, source), socket.create_connection(source, timeout=10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET ":
            client.sendall(bytes([byte]))
        assert client.recv(1000).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_a_client_that_speaks_tls_is_told_so_and_logged_as_that(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SMALL, MEMORY) as (_, source), socket.create_connection(source, timeout=10) as client:
        context = ssl.create_default_context()
        with pytest.raises(ssl.SSLError, match=r"(?i)unexpected.message"):
            context.wrap_socket(client, server_hostname="localhost")
    assert "it speaks TLS, which is not configured here" in caplog.text


def test_after_a_stranger_the_server_serves_the_next() -> None:
    with serving(SMALL, MEMORY) as (server, source):
        with socket.create_connection(source, timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while client.recv(1000):
                pass
        SMALL.assert_in(fetch(SMALL, MEMORY, source)[1].memory)
        assert server.port == source.port


def answering(listener: socket.socket, answer: bytes) -> threading.Thread:
    """Says `answer` to whoever connects first, whatever that one has said."""

    def answer_once() -> None:
        with listener.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(answer)

    thread = threading.Thread(target=answer_once)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\nInvalid HTTP request received.",
            "it speaks HTTP: the address of a source is that of its Netloader, not of its vLLM",
        ),
        (bytes([21, 3, 3, 0, 2, 2, 70]), "it wants TLS: set TLS_CERT, TLS_KEY and TLS_CA"),
    ],
    ids=["vLLM's own port", "TLS"],
)
def test_a_source_that_speaks_something_else_is_left_and_named(answer: bytes, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, serving(SMALL, MEMORY) as (_, source):
        thread = answering(listener, answer)
        client, fetched = fetch(SMALL, MEMORY, Endpoint("127.0.0.1", listener.getsockname()[1]), source)
        thread.join()
    assert fetched.source == source
    assert [attempt.reason for attempt in client.attempts] == [f"it did not greet: {reason}"]


def test_http_at_a_port_with_tls_is_logged_as_that(
    caplog: pytest.LogCaptureFixture, tmp_path_factory: pytest.TempPathFactory
) -> None:
    access = Authority(tmp_path_factory.mktemp("certificates"), "ours").identify("instance").access()
    with caplog.at_level(logging.WARNING), serving(SMALL, MEMORY, access=access) as (_, source):
        with socket.create_connection(source, timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while client.recv(1000):
                pass
    assert "http request" in caplog.text
