from __future__ import annotations

from typing import Any

import msgspec
import pytest

from support.sources import IDENTITY, SMALL
from vllm_ascend.model_loader.netloader.cache.contents import Contents, verified
from vllm_ascend.model_loader.netloader.cache.messages import Want
from vllm_ascend.model_loader.netloader.cache.shelf import Item, Shelf
from vllm_ascend.model_loader.netloader.errors import NoRoom
from vllm_ascend.model_loader.netloader.transport.store import Request
from vllm_ascend.model_loader.netloader.weights.arena import Arena
from vllm_ascend.model_loader.netloader.weights.identity import RankCoordinates

SIZE = SMALL.manifest.nbytes


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Watching:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def kept(self, item: Item) -> None:
        self.told.append(f"kept {name(item)}")

    def gone(self, item: Item) -> None:
        self.told.append(f"gone {name(item)}")


def name(item: Item) -> str:
    return item.contents.request.identity.name


def contents(
    model: str = "a", coordinates: RankCoordinates | None = None, guards: tuple[str, ...] = (), **identity: Any
) -> Contents:
    request = Request(
        msgspec.structs.replace(IDENTITY, name=model, **identity), coordinates or RankCoordinates(), SMALL.manifest
    )
    return Contents(request, guards=frozenset(guards))


def want(model: str = "a", **identity: Any) -> Want:
    asked = msgspec.structs.replace(IDENTITY, name=model, **identity)
    return Want(asked, RankCoordinates(), SMALL.manifest.digest)


def pages() -> Arena:
    memory = SMALL.store().memory
    assert isinstance(memory, Arena)
    return memory


def put(shelf: Shelf, what: Contents, *, flag: int = 0) -> Item:
    """Weights that are complete at once; `flag` makes them differ in contents."""
    item = shelf.reserve(what, pages())
    assert item.pages is not None
    sure = verified(Contents(what.request, {"flag": flag}, guards=what.guards), item.pages, lambda _: True)
    assert sure is not None
    shelf.complete(item, sure)
    return item


def names(shelf: Shelf) -> list[str]:
    return [name(item) for item in shelf.items()]


def test_the_least_recently_used_is_given_up_for_what_comes() -> None:
    shelf = Shelf(3 * SIZE, Clock())
    for model in "abc":
        put(shelf, contents(model))
    found = shelf.find(want("a", fingerprint=""))
    assert isinstance(found, Item)
    put(shelf, contents("d"))
    assert names(shelf) == ["c", "a", "d"]
    assert shelf.nbytes == 3 * SIZE


def test_what_does_not_fit_leaves_everything_as_it_is() -> None:
    shelf = Shelf(2 * SIZE - 1, Clock())
    put(shelf, contents("a"))
    filling = shelf.reserve(contents("b"))
    assert names(shelf) == ["b"]
    with pytest.raises(NoRoom, match=rf"have {SIZE} bytes, and the cache may hold {2 * SIZE - 1}, of which {SIZE} are"):
        shelf.reserve(contents("c"))
    assert shelf.items() == [filling]


def test_pages_that_are_still_verified_make_room_too() -> None:
    shelf, ours = Shelf(SIZE), pages()
    first = shelf.reserve(contents("a"), ours)
    second = shelf.reserve(contents("b"), pages())
    assert shelf.items() == [second]
    assert not ours.servable
    assert not shelf.note_progress(first, 1)
    assert not shelf.complete(first, Contents(first.contents.request, digests=()))


def test_pages_that_find_no_room_are_closed() -> None:
    shelf, ours = Shelf(SIZE - 1), pages()
    with pytest.raises(NoRoom):
        shelf.reserve(contents(), ours)
    assert not ours.servable


def test_what_is_not_complete_is_found_and_not_given() -> None:
    shelf = Shelf(SIZE)
    item = shelf.reserve(contents("a"))
    assert shelf.find(want()) is item
    assert (item.is_whole, shelf.descriptor_of(item)) == (False, None)
    assert shelf.note_progress(item, 10)
    assert item.held == 10
    shelf.give_up(item)
    assert not shelf.note_progress(item, 20)
    assert shelf.find(want()) == "the cache holds nothing"


def test_what_was_given_up_while_it_came_is_not_kept() -> None:
    shelf, ours = Shelf(SIZE), pages()
    item = shelf.reserve(contents("a"))
    shelf.give_up(item)
    sure = verified(contents("a"), ours, lambda _: True)
    assert sure is not None
    assert not shelf.complete(item, sure, ours)
    assert not ours.servable
    assert shelf.nbytes == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"fingerprint": "one"}, {"fingerprint": "two"}),
        ({"fingerprint": "one", "flag": 1}, {"fingerprint": "one", "flag": 2}),
        ({"fingerprint": "", "flag": 1}, {"fingerprint": "", "flag": 2}),
    ],
    ids=["other files", "other contents of the same files", "other contents of unknown files"],
)
def test_of_one_rank_only_the_latest_weights_are_held(first: dict[str, Any], second: dict[str, Any]) -> None:
    shelf = Shelf(9 * SIZE)
    old = put(shelf, contents(fingerprint=first["fingerprint"]), flag=first.get("flag", 0))
    new = put(shelf, contents(fingerprint=second["fingerprint"]), flag=second.get("flag", 0))
    assert shelf.items() == [new]
    assert old.is_gone
    assert shelf.find(want(fingerprint="")) is new


def test_weights_of_other_files_are_gone_as_soon_as_it_is_known_that_there_are_others() -> None:
    shelf = Shelf(9 * SIZE)
    put(shelf, contents(fingerprint="one"))
    item = shelf.reserve(contents(fingerprint="two"))
    assert shelf.items() == [item]


def test_weights_that_are_known_to_be_replaced_are_gone_even_if_there_is_no_room_for_the_others() -> None:
    for later, root in ((contents(fingerprint="other"), ""), (contents(), "another root")):
        shelf = Shelf(2 * SIZE)
        earlier = put(shelf, contents())
        shelf.reserve(contents("b"))
        shelf.max_bytes = SIZE
        with pytest.raises(NoRoom):
            shelf.reserve(later, root=root)
        assert earlier.is_gone


def test_ranks_and_roles_and_models_do_not_replace_each_other() -> None:
    shelf = Shelf(9 * SIZE)
    for what in (
        contents(),
        contents("b"),
        contents(role="draft"),
        contents(coordinates=RankCoordinates(tp_rank=0, tp_size=2)),
        contents(coordinates=RankCoordinates(tp_rank=1, tp_size=2)),
        contents(dtype="float16"),
    ):
        put(shelf, what)
    assert len(shelf.items()) == 6


def test_what_is_there_already_is_not_held_twice() -> None:
    shelf = Shelf(9 * SIZE)
    first = put(shelf, contents())
    put(shelf, contents())
    put(shelf, contents(fingerprint=""))
    assert shelf.items() == [first]


def test_what_has_guarded_weights_anywhere_is_asked_for_from_then_on() -> None:
    shelf = Shelf(9 * SIZE)
    put(shelf, contents(guards=("token",)))
    put(shelf, contents(guards=()))
    put(shelf, contents(guards=("tls",)))
    (item,) = shelf.items()
    assert item.contents.guards == {"token", "tls"}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (want(fingerprint="other"), "fingerprint (here f00d, there other)"),
        (want("b", fingerprint=""), "name (here a, there b)"),
        (Want(want().identity, RankCoordinates(tp_size=2), ""), "tp_size (here 1, there 2)"),
        (Want(want().identity, RankCoordinates(), "other"), "the tensors differ"),
    ],
    ids=["other files", "other name", "other part", "other tensors"],
)
def test_nobody_gets_what_is_not_what_was_asked_for(asked: Want, reason: str) -> None:
    shelf = Shelf(SIZE)
    put(shelf, contents())
    found = shelf.find(asked)
    assert isinstance(found, str)
    assert reason in found


def test_watchers_hear_of_all_that_is_kept_and_given_up() -> None:
    shelf, watching, late = Shelf(2 * SIZE, Clock()), Watching(), Watching()
    shelf.watch(watching)
    for model in "abc":
        put(shelf, contents(model))
    shelf.watch(late)
    assert [name(item) for item in shelf.drop("b")] == ["b"]
    shelf.unwatch(late)
    assert len(shelf.drop("")) == 1
    assert watching.told == ["kept a", "kept b", "gone a", "kept c", "gone b", "gone c"]
    assert late.told == ["kept b", "kept c", "gone b"]


def test_weights_are_chosen_by_model_or_root() -> None:
    shelf = Shelf(9 * SIZE)
    first, second = put(shelf, contents("a"), flag=1), put(shelf, contents("b"), flag=2)
    assert shelf.drop("no such model") == []
    assert shelf.drop(first.contents.root[:12]) == [first]
    assert shelf.drop("b") == [second]


def test_a_shelf_that_is_handed_on_takes_nothing_more() -> None:
    shelf = Shelf(9 * SIZE)
    shelf.refuse("another one takes over")
    with pytest.raises(NoRoom, match="another one takes over"):
        shelf.reserve(contents())
    shelf.refuse("")
    shelf.reserve(contents())
