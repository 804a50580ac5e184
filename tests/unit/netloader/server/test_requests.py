"""What a server answers to a client that joins, over real sockets."""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec
import pytest
import torch

from support.sources import IDENTITY, IN_PROCESS, SHORT, SMALL, Tensors, client_for, fetch, reasons, serving
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.errors import SourcesExhausted, TransportError
from vllm_ascend.model_loader.netloader.server.answers import Peer
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.transport.base import Reception
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates


class UnusableTransport(InProcessTransport):
    traits = replace(InProcessTransport.traits, name="unusable")

    def receive(self, reception: Reception, delivery: Delivery) -> None:
        raise TransportError("not between these machines")


def test_no_common_transport_is_a_refusal() -> None:
    with serving(SMALL, IN_PROCESS) as (_, source), pytest.raises(SourcesExhausted, match="no common transport"):
        fetch(SMALL, (UnusableTransport(),), source)


def test_a_refusal_names_the_differing_fields_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    theirs = msgspec.structs.replace(IDENTITY, dtype="float16", config_digest="other")
    with caplog.at_level(logging.WARNING), serving(SMALL, IN_PROCESS, identity=theirs) as (_, source):
        with pytest.raises(SourcesExhausted) as error:
            fetch(SMALL, IN_PROCESS, source)
    assert "dtype (here bfloat16, there float16)" in reasons(error)
    assert "config_digest (here c0ffee, there other)" in reasons(error)
    refusals = [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused")]
    assert len(refusals) == 1
    assert "dtype (here float16, there bfloat16)" in refusals[0]


def test_another_rank_is_refused() -> None:
    place = RankCoordinates(tp_rank=1, tp_size=2)
    with serving(SMALL, IN_PROCESS, coordinates=place) as (_, source), pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, IN_PROCESS, source)
    assert "tp_rank (here 0, there 1)" in reasons(error)
    assert "tp_size (here 1, there 2)" in reasons(error)


def test_differing_tensors_are_named() -> None:
    theirs = Tensors({**SMALL.by_name, "w1": torch.zeros(6), "surplus": torch.zeros(2)})
    with serving(theirs, IN_PROCESS) as (_, source), pytest.raises(SourcesExhausted) as error:
        fetch(SMALL, IN_PROCESS, source)
    assert "tensor w1 (here float32 [5]" in reasons(error)
    assert "tensor surplus (here none, there float32 [2]" in reasons(error)


def test_a_server_without_the_role_says_what_it_holds() -> None:
    draft = msgspec.structs.replace(IDENTITY, role="draft")
    with serving(SMALL, IN_PROCESS, identity=draft) as (_, source):
        with pytest.raises(SourcesExhausted, match="does not hold target weights: it holds draft"):
            fetch(SMALL, IN_PROCESS, source)


def test_a_client_is_referred_to_the_rank_that_holds_its_part(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (RankCoordinates(tp_rank=rank, tp_size=2) for rank in (0, 1))
    with (
        serving(SMALL, IN_PROCESS, coordinates=first) as (server, source),
        serving(SMALL, IN_PROCESS, coordinates=second) as (
            _,
            other,
        ),
    ):
        server.refer_to([Peer(first, "", source.port), Peer(second, "", other.port)])
        client = client_for(SMALL.request(coordinates=second), IN_PROCESS)
        assert client.fetch([source]).source == other
        assert client.attempts == []


def test_a_referral_is_followed_only_once() -> None:
    first, second = (RankCoordinates(tp_rank=rank, tp_size=2) for rank in (0, 1))
    with (
        serving(SMALL, IN_PROCESS, coordinates=first) as (one, source),
        serving(SMALL, IN_PROCESS, coordinates=first) as (
            two,
            other,
        ),
    ):
        one.refer_to([Peer(second, "127.0.0.1", other.port), Peer(second, "not a host", 1)])
        two.refer_to([Peer(second, "", source.port), Peer(second, "", 9)])
        client = client_for(SMALL.request(coordinates=second), IN_PROCESS)
        with pytest.raises(SourcesExhausted, match=f"{other}: it refused: another rank"):
            client.fetch([source])
    assert len(client.attempts) == 1


def test_a_server_that_is_configured_anew_serves_by_the_new_transports() -> None:
    class Other(InProcessTransport):
        traits = replace(InProcessTransport.traits, name="other")

    with serving(SMALL, IN_PROCESS) as (server, source):
        server.configure(Settings((Other(),), SHORT))
        assert inquire(source, 5).transports == ("other",)
        with pytest.raises(SourcesExhausted, match="no common transport: this server has other"):
            fetch(SMALL, IN_PROCESS, source)
        assert fetch(SMALL, (InProcessTransport(), Other()), source)[1].transport == "other"
