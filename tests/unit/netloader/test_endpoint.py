from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.endpoint import Endpoint

names = st.from_regex(r"[a-zA-Z0-9_-]{1,20}(\.[a-zA-Z0-9_-]{1,20}){0,3}\.?", fullmatch=True)
hosts = names | st.ip_addresses().map(str)
ports = st.integers(1, 65535)


@given(host=hosts, port=ports)
@example(host="fe80::1%eth0", port=1)
@example(host="::", port=65535)
def test_what_is_written_reads_back(host: str, port: int) -> None:
    endpoint = Endpoint(host, port)
    assert Endpoint.parse(str(endpoint)) == endpoint


@given(text=st.text() | st.text(alphabet="[]:./ 0123456789abf%", max_size=20))
def test_every_text_is_refused_or_reads_back_from_what_it_is_written_as(text: str) -> None:
    with contextlib.suppress(ValueError):
        endpoint = Endpoint.parse(text)
        assert endpoint.host
        assert 1 <= endpoint.port <= 65535
        assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:19000", "10.0.0.1", 19000),
        ("node-3:1", "node-3", 1),
        ("node-3.cluster.local:65535", "node-3.cluster.local", 65535),
        ("[fd00::1]:19000", "fd00::1", 19000),
        ("[::]:19000", "::", 19000),
        ("[fe80::1%eth0]:19000", "fe80::1%eth0", 19000),
        ("node-3.example.:19000", "node-3.example.", 19000),
        ("netz-ä.example:19000", "netz-ä.example", 19000),
        ("  node-3:19000\n", "node-3", 19000),
    ],
)
def test_people_write_endpoints_like_this(text: str, host: str, port: int) -> None:
    assert Endpoint.parse(text) == Endpoint(host, port)


def test_only_an_ipv6_address_is_written_with_brackets() -> None:
    assert str(Endpoint("fd00::1", 19000)) == "[fd00::1]:19000"
    assert str(Endpoint("10.0.0.1", 19000)) == "10.0.0.1:19000"
    assert str(Endpoint("node-3", 19000)) == "node-3:19000"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no port: write host:port"),
        ("node-3", "has no port: write host:port"),
        (":19000", "has no port: write host:port"),
        (":", "has no port"),
        ("fd00::1", r"is ambiguous: write an IPv6 address as \[address\]:port"),
        ("fd00::1:19000", "is ambiguous"),
        ("[fd00::1]", "is ambiguous"),
        ("node:3:19000", "is ambiguous"),
        ("[]:19000", "has no valid host"),
        ("[fd00::1:19000", "is ambiguous"),
        ("node-3]:19000", "has no valid host"),
        ("[[::1]]:19000", "has no valid host"),
        ("node 3:19000", "has no valid host"),
        ("node/3:19000", "has no valid host"),
        ("a..b:19000", "'a..b' cannot be a host name: label empty or too long"),
        (".svc.cluster.local:19000", "'.svc.cluster.local' cannot be a host name"),
        ("." * 3 + ":19000", "cannot be a host name"),
        ("x" * 64 + ":19000", "cannot be a host name: label"),
        (".".join(["x" * 60] * 5) + ":19000", "cannot be a host name: it is 304 characters long, of 253"),
        ("\ud800:19000", "has no valid host"),
        ("node-3:", "has port '': expected a number from 1 to 65535"),
        ("node-3:0", "has port '0': expected a number from 1 to 65535"),
        ("node-3:65536", "has port '65536'"),
        ("node-3:-1", "has port '-1'"),
        ("node-3:+1", r"has port '\+1'"),
        ("node-3:1.5", "has port '1.5'"),
        ("node-3: 1", "has port ' 1'"),
        ("node-3:1_0", "has port '1_0'"),
        ("node-3:http", "has port 'http'"),
        ("node-3:\N{ARABIC-INDIC DIGIT ONE}", "expected a number from 1 to 65535"),
        ("node-3:²", "has port '²'"),
    ],
)
def test_what_is_no_endpoint_is_refused_with_the_text_and_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        Endpoint.parse(text)
    assert repr(text) in str(caught.value)


def test_an_endpoint_is_what_the_socket_module_takes() -> None:
    host, port = Endpoint.parse("10.0.0.1:19000")
    assert (host, port) == ("10.0.0.1", 19000)
