"""What arrives beside the weights: attributes and the fingerprint of their checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from support.sources import (
    IDENTITY,
    IN_PROCESS,
    SMALL,
    client_for,
    fetch,
    publication,
    reasons,
    serving,
)
from support.wait import wait_until
from vllm_ascend.model_loader.netloader.errors import SourceRefused, SourcesExhausted
from vllm_ascend.model_loader.netloader.server.publications import Publication
from vllm_ascend.model_loader.netloader.transport.base import Reception
from vllm_ascend.model_loader.netloader.transport.chunks.delivery import Delivery
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates
from vllm_ascend.model_loader.netloader.wire.messages import (
    AttributeValue,
)

ATTRIBUTES: dict[str, Any] = {
    "has_own_embed_tokens": True,
    "layers.0.rank": -7,
    "ratio": 0.5,
    "window": None,
}


def test_attributes_arrive_with_the_weights() -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        assert fetch(SMALL, IN_PROCESS, source)[1].attributes == {}
        server.publish(publication(**ATTRIBUTES))
        _, fetched = fetch(SMALL, IN_PROCESS, source)
    assert fetched.attributes == ATTRIBUTES
    SMALL.assert_in(fetched.memory)


def test_the_fingerprint_of_the_source_arrives_even_where_the_client_has_none() -> None:
    unknown = msgspec.structs.replace(IDENTITY, fingerprint="")
    with serving(SMALL, IN_PROCESS) as (server, source):
        assert client_for(SMALL.request(unknown), IN_PROCESS).fetch([source]).fingerprint == "f00d"
        server.publish(Publication(unknown, RankCoordinates(), SMALL.store(2)))
        assert fetch(SMALL, IN_PROCESS, source)[1].fingerprint == ""


def test_attributes_are_those_of_the_role_that_is_asked_for() -> None:
    with serving(SMALL, IN_PROCESS) as (server, source):
        server.publish(publication("draft", **ATTRIBUTES))
        assert fetch(SMALL, IN_PROCESS, source)[1].attributes == {}
        draft = client_for(SMALL.request(msgspec.structs.replace(IDENTITY, role="draft")), IN_PROCESS)
        assert draft.fetch([source]).attributes == ATTRIBUTES


class CountingTransport(InProcessTransport):
    """Knows how often a client began to receive."""

    def __init__(self) -> None:
        super().__init__()
        self.receptions = 0

    def receive(self, reception: Reception, delivery: Delivery) -> None:
        self.receptions += 1
        super().receive(reception, delivery)


def test_a_source_whose_attributes_do_not_fit_is_left_before_any_byte_moves() -> None:
    checked: list[Mapping[str, AttributeValue]] = []

    def check(attributes: Mapping[str, AttributeValue]) -> None:
        checked.append(attributes)
        if attributes:
            raise SourceRefused("the source sets 'cache', which is a method in this model")

    transport, moved = CountingTransport(), list[int]()
    with serving(SMALL, IN_PROCESS) as (server, unfit), serving(SMALL, IN_PROCESS) as (_, source):
        server.publish(publication(**ATTRIBUTES))
        client = client_for(SMALL.request(), (transport,), progress=moved.append, check_attributes=check)
        with pytest.raises(SourcesExhausted) as error:
            client.fetch([unfit])
        assert reasons(error) == f"{unfit} by in_process: the source sets 'cache', which is a method in this model"
        assert (transport.receptions, moved) == (0, [])
        assert client.phases.seconds.keys() == {"connect", "join"}

        fetched = client.fetch([unfit, source])
        assert (fetched.source, fetched.attributes) == (source, {})
        assert (transport.receptions, sum(moved)) == (1, SMALL.manifest.nbytes)
        SMALL.assert_in(fetched.memory)

        wait_until(lambda: not server.state().sessions)
        _, again = fetch(SMALL, IN_PROCESS, unfit)
        assert again.attributes == ATTRIBUTES
    assert checked == [ATTRIBUTES, ATTRIBUTES, {}]
    assert [attempt.source for attempt in client.attempts] == [str(unfit)] * 2


def test_a_source_whose_attributes_do_not_fit_is_not_asked_by_another_transport() -> None:
    def check(attributes: Mapping[str, AttributeValue]) -> None:
        raise SourceRefused("not this")

    class Other(InProcessTransport):
        traits = replace(InProcessTransport.traits, name="other")

    kinds = (InProcessTransport(), Other())
    with serving(SMALL, kinds) as (_, source), pytest.raises(SourcesExhausted) as error:
        client_for(SMALL.request(), kinds, check_attributes=check).fetch([source])
    assert error.value.reasons == (f"{source} by in_process: not this",)
