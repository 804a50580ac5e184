"""What sources say of their contents, and for how long that counts."""

from __future__ import annotations

from support.clock import Clock
from vllm_ascend.model_loader.netloader.client.search.vouchers import FRESH_SECONDS, Vouchers
from vllm_ascend.model_loader.netloader.endpoint import Endpoint

A, B = Endpoint("10.0.0.1", 1), Endpoint("10.0.0.2", 1)


def test_the_word_of_a_source_counts_until_it_denies_it() -> None:
    vouchers = Vouchers(Clock())
    assert not vouchers.agree_on("c0ffee")
    vouchers.holds(A, "c0ffee")
    vouchers.denies(B)
    assert vouchers.agree_on("c0ffee")
    vouchers.denies(A)
    assert not vouchers.agree_on("c0ffee")


def test_sources_that_have_different_contents_agree_on_none() -> None:
    vouchers = Vouchers(Clock())
    vouchers.holds(A, "c0ffee")
    vouchers.holds(B, "5eed")
    assert not vouchers.agree_on("c0ffee")
    vouchers.holds(B, "c0ffee")
    assert vouchers.agree_on("c0ffee")


def test_only_what_was_said_just_now_stands_for_a_confirmation() -> None:
    clock = Clock()
    vouchers = Vouchers(clock)
    vouchers.holds(A, "c0ffee")
    assert not vouchers.know_now("c0ffee")
    vouchers.holds_now(A, "c0ffee")
    assert vouchers.know_now("c0ffee")
    clock.passes(FRESH_SECONDS)
    assert not vouchers.know_now("c0ffee")
    assert vouchers.agree_on("c0ffee")
