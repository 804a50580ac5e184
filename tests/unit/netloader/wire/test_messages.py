"""What is a message and what is none, and the bytes of each, which stay the same within a version."""

from __future__ import annotations

import math
import tracemalloc

import msgspec
import pytest

from support.peers.conversation import WAYS, Pair, listener_for
from support.peers.messages import CLIENT, EXAMPLES, IDENTITY, RANK, SERVER, SESSION, framed, having, other, payload
from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity
from vllm_ascend.model_loader.netloader.wire.conversation import Conversation, Role, State, frame
from vllm_ascend.model_loader.netloader.wire.messages import (
    ATTRIBUTES_LIMIT,
    DIFFERENCES_LIMIT,
    DIGESTS_LIMIT,
    FETCH_LIMIT,
    KEY_LIMIT,
    PUBLISH_LIMIT,
    REFERRALS_LIMIT,
    REPLY_LIMIT,
    Accept,
    Announce,
    AskDigests,
    AskFiles,
    Attach,
    Attached,
    AttributeValue,
    Challenge,
    Confirm,
    Describe,
    Description,
    Digests,
    Done,
    End,
    Fetch,
    FilePart,
    Files,
    Follow,
    Gather,
    Gathered,
    Hello,
    Inquire,
    Join,
    Leave,
    Message,
    News,
    Offer,
    Prove,
    Publish,
    ReadFile,
    Refuse,
    Status,
    Wait,
    Welcome,
)


def test_a_value_or_key_that_no_library_publishes_is_refused() -> None:
    for message in (Publish("0/1", bytes(PUBLISH_LIMIT + 1)), Publish("k" * (KEY_LIMIT + 1), b"")):
        end = Pair().say(*WAYS[State.GATHERING]).ends[SERVER]
        end.feed(frame(message))
        with pytest.raises(ProtocolError, match="is no message"):
            end.next_message()


def test_the_manifest_of_a_large_model_fits_into_a_refusal() -> None:
    pair = Pair().say(Hello, Welcome, Join)
    pair.server(Refuse("the tensors differ", (), bytes(REPLY_LIMIT - 1000)))


def without(message: Message, field: str) -> bytes:
    fields = msgspec.msgpack.decode(payload(message))
    del fields[field]
    return msgspec.msgpack.encode(fields)


def cut_after(message: Message, text: bytes) -> bytes:
    """The payload up to and with `text`."""
    content = payload(message)
    return content[: content.index(text) + len(text)]


HUGE_ARRAY, HUGE_MAP, HUGE_BYTES = b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"
JOIN, ACCEPT, REFUSE, STATUS = EXAMPLES[Join], EXAMPLES[Accept], EXAMPLES[Refuse], EXAMPLES[Status]
WAIT, DIGESTS = EXAMPLES[Wait], EXAMPLES[Digests]
NO_MESSAGE: dict[str, tuple[Role, bytes]] = {
    "nothing": (CLIENT, b""),
    "no map": (CLIENT, b"\x93\x01\x02\x03"),
    "an unknown tag": (CLIENT, having(Hello(), type="Greetings")),
    "no tag": (CLIENT, without(Hello(), "type")),
    "a tag that is no text": (CLIENT, payload(Hello()).replace(b"Hello", b"H\xffllo")),
    "a server's message from a client": (CLIENT, payload(Welcome())),
    "a client's message from a server": (SERVER, payload(Hello())),
    "a message cut short": (CLIENT, payload(JOIN)[:-1]),
    "a message and more": (CLIENT, payload(JOIN) + b"\xc0"),
    "a field of another type": (CLIENT, having(Hello(), protocol="1")),
    "a missing field": (CLIENT, without(JOIN, "identity")),
    "an identity with an unknown field": (CLIENT, having(JOIN, identity=msgspec.to_builtins(IDENTITY) | {"x": 1})),
    "coordinates with an unknown field": (CLIENT, having(JOIN, coordinates={"dp_rank": 1})),
    "a negative number": (CLIENT, having(Hello(), protocol=-1)),
    "a number beyond all files": (CLIENT, having(Fetch(0, 1), offset=1 << 62)),
    "a fetch of nothing": (CLIENT, having(Fetch(0, 1), length=0)),
    "a fetch of too much": (CLIENT, having(Fetch(0, 1), length=FETCH_LIMIT + 1)),
    "a session too short": (CLIENT, having(EXAMPLES[Attach], session=bytes(15))),
    "a session too long": (CLIENT, having(EXAMPLES[Attach], session=bytes(17))),
    "a reason too long": (CLIENT, having(EXAMPLES[Leave], reason="x" * 4097)),
    "a challenge to the server too long": (CLIENT, having(Hello(), challenge=bytes(65))),
    "a challenge to the client too long": (SERVER, having(EXAMPLES[Challenge], challenge=bytes(65))),
    "a challenge that is text": (SERVER, having(EXAMPLES[Challenge], challenge="who are you")),
    "a proof too long": (CLIENT, having(EXAMPLES[Prove], proof=bytes(65))),
    "no proof": (CLIENT, without(EXAMPLES[Prove], "proof")),
    "a server's proof too long": (SERVER, having(Welcome(), proof=bytes(65))),
    "as many ahead as below none": (SERVER, having(WAIT, ahead=-1)),
    "another source too long": (SERVER, having(WAIT, referrals=["x" * 4097])),
    "too many other sources": (SERVER, having(WAIT, referrals=["a:1"] * (REFERRALS_LIMIT + 1))),
    "too many other ranks": (SERVER, having(REFUSE, referrals=["a:1"] * (REFERRALS_LIMIT + 1))),
    "digests before the first": (CLIENT, having(EXAMPLES[AskDigests], first=-1)),
    "no digests asked for": (CLIENT, having(EXAMPLES[AskDigests], count=0)),
    "too many digests told": (SERVER, having(DIGESTS, digests=[bytes(32)] * (DIGESTS_LIMIT + 1))),
    "too many differences": (SERVER, having(REFUSE, differences=[["dtype", "", ""]] * (DIFFERENCES_LIMIT + 1))),
    "too many attributes": (
        SERVER,
        having(ACCEPT, attributes={str(number): None for number in range(ATTRIBUTES_LIMIT + 1)}),
    ),
    "too many digests asked for": (CLIENT, having(EXAMPLES[AskDigests], count=DIGESTS_LIMIT + 1)),
    "digests that are text": (SERVER, having(DIGESTS, digests=["d1835"])),
    "a digest too long": (SERVER, having(DIGESTS, digests=[bytes(65)])),
    "a root too long": (SERVER, having(EXAMPLES[Confirm], root="x" * 4097)),
    "a root of bytes": (SERVER, having(EXAMPLES[Confirm], root=bytes(32))),
    "a promised root too long": (SERVER, having(WAIT, root="x" * 4097)),
    "a promised fingerprint too long": (SERVER, having(WAIT, fingerprint="x" * 4097)),
    "a kind of digest too long": (SERVER, having(ACCEPT, digest="x" * 4097)),
    "a kind of digest that is a number": (SERVER, having(ACCEPT, digest=3)),
    "an end without a reason": (SERVER, without(EXAMPLES[End], "reason")),
    "a reason to end too long": (SERVER, having(EXAMPLES[End], reason="x" * 4097)),
    "an announced session too short": (CLIENT, having(EXAMPLES[Announce], session=bytes(15))),
    "an announced port of none": (CLIENT, having(EXAMPLES[Announce], port=0)),
    "an announced port too high": (CLIENT, having(EXAMPLES[Announce], port=65536)),
    "an announced port that is text": (CLIENT, having(EXAMPLES[Announce], port="19001")),
    "waiting clients by name": (SERVER, having(STATUS, waiting=["node-4"])),
    "parameters that are lists": (SERVER, having(ACCEPT, parameters={"port": [1]})),
    "attributes that are lists": (SERVER, having(ACCEPT, attributes={"shapes": [1]})),
    "attributes that are maps": (SERVER, having(ACCEPT, attributes={"options": {"a": 1}})),
    "attributes that are bytes": (SERVER, having(ACCEPT, attributes={"note": b"draft"})),
    "attributes by number": (SERVER, having(ACCEPT, attributes={1: True})),
    "attributes without names": (SERVER, having(ACCEPT, attributes=[True])),
    "no attributes": (SERVER, having(ACCEPT, attributes=None)),
    "an attribute's text too long": (SERVER, having(ACCEPT, attributes={"note": "x" * 4097})),
    "an attribute's name too long": (SERVER, having(ACCEPT, attributes={"x" * 4097: True})),
    "an attribute's text that is no text": (SERVER, payload(ACCEPT).replace(b"draft", b"dr\xffft")),
    "an attribute's name that is no text": (SERVER, payload(ACCEPT).replace(b"note", b"n\xffte")),
    "a fingerprint that is a number": (SERVER, having(ACCEPT, fingerprint=1)),
    "a fingerprint that is nothing": (SERVER, having(ACCEPT, fingerprint=None)),
    "a fingerprint too long": (SERVER, having(ACCEPT, fingerprint="f" * 4097)),
    "reasons to decline that are numbers": (SERVER, having(STATUS, declined={"draft": 1})),
    "reasons to decline that are nothing": (SERVER, having(STATUS, declined={"draft": None})),
    "reasons to decline by number": (SERVER, having(STATUS, declined={1: "draft"})),
    "declined roles without reasons": (SERVER, having(STATUS, declined=["draft"])),
    "no declined roles": (SERVER, having(STATUS, declined=None)),
    "a difference of two fields": (SERVER, having(REFUSE, differences=[["dtype", "int8"]])),
    "offers without end": (CLIENT, cut_after(JOIN, b"offers") + HUGE_ARRAY),
    "versions without end": (CLIENT, cut_after(JOIN, b"versions") + HUGE_MAP),
    "differences without end": (SERVER, cut_after(REFUSE, b"differences") + HUGE_ARRAY),
    "a manifest without end": (SERVER, cut_after(REFUSE, b"manifest") + HUGE_BYTES),
    "digests without end": (SERVER, cut_after(DIGESTS, b"\xa7digests") + HUGE_ARRAY),
    "a root without end": (SERVER, cut_after(EXAMPLES[Confirm], b"root") + HUGE_BYTES),
    "a proof without end": (CLIENT, cut_after(EXAMPLES[Prove], b"proof") + HUGE_BYTES),
    "referrals without end": (SERVER, cut_after(WAIT, b"referrals") + HUGE_ARRAY),
    "parameters without end": (SERVER, cut_after(ACCEPT, b"parameters") + HUGE_MAP),
    "attributes without end": (SERVER, cut_after(ACCEPT, b"attributes") + HUGE_MAP),
    "declined roles without end": (SERVER, cut_after(STATUS, b"declined") + HUGE_MAP),
    "nested beyond measure": (CLIENT, b"\x83" + payload(Hello())[1:] + b"\xa1x" + b"\x91" * 50_000 + b"\xc0"),
}


@pytest.mark.parametrize(("role", "content"), NO_MESSAGE.values(), ids=NO_MESSAGE.keys())
def test_a_frame_that_is_no_message_is_a_protocol_error_and_costs_no_memory(role: Role, content: bytes) -> None:
    end = Conversation(other(role))
    end.feed(framed(content))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=f"the {role.value} sent a frame that is no message: "):
            end.next_message()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_a_field_that_a_later_release_adds_to_a_message_is_ignored(kind: type[Message]) -> None:
    end = listener_for(kind)
    end.feed(framed(having(EXAMPLES[kind], added_later=[1, {"a": None}])))
    assert end.next_message() == EXAMPLES[kind]


GOLDEN: dict[type[Message], str] = {
    Hello: (
        "83a474797065a548656c6c6fa870726f746f636f6c02a96368616c6c656e6765c420202122232425262728292a2b2c2d2e2f"
        "303132333435363738393a3b3c3d3e3f"
    ),
    Prove: ("82a474797065a550726f7665a570726f6f66c420404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f"),
    Join: (
        "85a474797065a44a6f696ea86964656e746974798ba46e616d65a96f72672f6d6f64656cac617263686974656374757265b0"
        "4c6c616d61466f7243617573616c4c4dad636f6e6669675f646967657374a6633066666565a56474797065a862666c6f6174"
        "3136ac6e616d655f69735f70617468c2a87265766973696f6ea46d61696eac7175616e74697a6174696f6ea3667038ab6669"
        "6e6765727072696e74a466303064a4726f6c65a6746172676574ac6c6f61645f6f7074696f6e73a0a876657273696f6e7381"
        "a4766c6c6da6302e33322e30ab636f6f7264696e6174657389a774705f72616e6b01a774705f73697a6502a770705f72616e"
        "6b00a770705f73697a6501a87063705f72616e6b00a87063705f73697a6501a765705f72616e6b00a765705f73697a6501b0"
        "6578706572745f706c6163656d656e74a0af6d616e69666573745f646967657374a56431383335a66f66666572739283a974"
        "72616e73706f7274ad7368617265645f6d656d6f7279a573636f7065a8626f6f742f342f37a57761697473c283a97472616e"
        "73706f7274a3746370a573636f7065a0a57761697473c2"
    ),
    AskDigests: "83a474797065aa41736b44696765737473a56669727374cd012ca5636f756e74cd0100",
    Gather: "81a474797065a6476174686572",
    Publish: "83a474797065a75075626c697368a36b6579a3302f31a576616c7565c410606162636465666768696a6b6c6d6e6f",
    Gathered: "81a474797065a84761746865726564",
    Follow: "82a474797065a6466f6c6c6f77a4706f7274cd4a39",
    Done: "81a474797065a4446f6e65",
    Leave: "82a474797065a54c65617665a6726561736f6eb4746865207472616e73706f7274206661696c6564",
    Announce: "83a474797065a8416e6e6f756e6365a773657373696f6ec410000102030405060708090a0b0c0d0e0fa4706f7274cd4a39",
    Attach: "82a474797065a6417474616368a773657373696f6ec410000102030405060708090a0b0c0d0e0f",
    Fetch: "83a474797065a54665746368a66f6666736574cf0000000200000000a66c656e677468cd1000",
    Inquire: "81a474797065a7496e7175697265",
    Challenge: (
        "83a474797065a94368616c6c656e6765a96368616c6c656e6765c420202122232425262728292a2b2c2d2e2f303132333435"
        "363738393a3b3c3d3e3fa870726f746f636f6c02"
    ),
    Welcome: (
        "83a474797065a757656c636f6d65a870726f746f636f6c02a570726f6f66c420404142434445464748494a4b4c4d4e4f5051"
        "52535455565758595a5b5c5d5e5f"
    ),
    Wait: (
        "87a474797065a457616974a5616865616405a9726566657272616c7392a63a3139303031ac6e6f64652d343a3139303031a4"
        "726f6f74d9403565656435656564356565643565656435656564356565643565656435656564356565643565656435656564"
        "3565656435656564356565643565656435656564ab66696e6765727072696e74a466303064a673657276656400a766696c6c"
        "696e67c2"
    ),
    Attached: "81a474797065a84174746163686564",
    Accept: (
        "8aa474797065a6416363657074a773657373696f6ec410000102030405060708090a0b0c0d0e0faa67656e65726174696f6e"
        "03a97472616e73706f7274ad70726f636573735f67726f7570aa706172616d657465727382a4686f7374a831302e302e302e"
        "31a4706f7274cd9c40aa6174747269627574657385af6861735f6f776e5f6c6d5f68656164c3ad6c61796572732e302e7261"
        "6e6bf9a5726174696fcb3fe0000000000000a46e6f7465a56472616674a677696e646f77c0ab66696e6765727072696e74a4"
        "66303064a6646967657374a6626c616b6533a4726f6f74d94035656564356565643565656435656564356565643565656435"
        "656564356565643565656435656564356565643565656435656564356565643565656435656564a766696c6c696e67c2"
    ),
    Digests: (
        "82a474797065a744696765737473a76469676573747392c410606162636465666768696a6b6c6d6e6fc41000000000000000"
        "000000000000000000"
    ),
    Refuse: (
        "85a474797065a6526566757365a6726561736f6eb27468652074656e736f727320646966666572ab646966666572656e6365"
        "739193a874656e736f722077a8696e7438205b325da0a86d616e6966657374c403929090a9726566657272616c7392a63a31"
        "39303031ac6e6f64652d333a3139303031"
    ),
    News: (
        "85a474797065a44e657773a66368756e6b73930003cd012ca473656e749107a5706565727392a63a3139303031ac6e6f6465"
        "2d343a3139303031a577686f6c65c3"
    ),
    Confirm: (
        "84a474797065a7436f6e6669726daa67656e65726174696f6e03a4726f6f74d9403565656435656564356565643565656435"
        "6565643565656435656564356565643565656435656564356565643565656435656564356565643565656435656564a76669"
        "6c6c696e67c2"
    ),
    End: (
        "83a474797065a3456e64a6726561736f6ed92569747320776569676874732077657265207265706c61636564206279206e65"
        "77206f6e6573a664656e696573c3"
    ),
    Status: (
        "87a474797065a6537461747573a8686f6c64696e67739189a4726f6c65a6746172676574a86964656e746974798ba46e616d"
        "65a96f72672f6d6f64656cac617263686974656374757265b04c6c616d61466f7243617573616c4c4dad636f6e6669675f64"
        "6967657374a6633066666565a56474797065a862666c6f61743136ac6e616d655f69735f70617468c2a87265766973696f6e"
        "a46d61696eac7175616e74697a6174696f6ea3667038ab66696e6765727072696e74a466303064a4726f6c65a67461726765"
        "74ac6c6f61645f6f7074696f6e73a0a876657273696f6e7381a4766c6c6da6302e33322e30ab636f6f7264696e6174657389"
        "a774705f72616e6b01a774705f73697a6502a770705f72616e6b00a770705f73697a6501a87063705f72616e6b00a8706370"
        "5f73697a6501a765705f72616e6b00a765705f73697a6501b06578706572745f706c6163656d656e74a0a774656e736f7273"
        "cd0123a66e6279746573cf0000000400000000aa67656e65726174696f6e03a4726f6f74d940356565643565656435656564"
        "3565656435656564356565643565656435656564356565643565656435656564356565643565656435656564356565643565"
        "6564a468656c64cf0000000400000000a86d616e6966657374a56431383335a873657373696f6e7302aa7472616e73706f72"
        "747392ad7368617265645f6d656d6f7279a3746370a86465636c696e656481a56472616674d93a6c6f6164696e6720736574"
        "207461626c652c2077686963682063616e6e6f7420626520746f6c6420746f20616e6f746865722070726f63657373a77761"
        "6974696e6707a572616e6b739182ab636f6f7264696e6174657389a774705f72616e6b01a774705f73697a6502a770705f72"
        "616e6b00a770705f73697a6501a87063705f72616e6b00a87063705f73697a6501a765705f72616e6b00a765705f73697a65"
        "01b06578706572745f706c6163656d656e74a0a8656e64706f696e74a63a3139303031"
    ),
    Describe: (
        "82a474797065a84465736372696265a6646967657374d9403565656435656564356565643565656435656564356565643565"
        "6564356565643565656435656564356565643565656435656564356565643565656435656564"
    ),
    Description: "82a474797065ab4465736372697074696f6ea86d616e6966657374c403929090",
    AskFiles: "81a474797065a841736b46696c6573",
    ReadFile: ("83a474797065a85265616446696c65a46e616d65ae746f6b656e697a65722e6a736f6ea66f6666736574ce00100000"),
    Files: (
        "84a474797065a546696c6573a566696c65739183a46e616d65ab636f6e6669672e6a736f6ea473697a65cd02c0a664696765"
        "7374c410606162636465666768696a6b6c6d6e6fa86964656e746974798ba46e616d65a96f72672f6d6f64656cac61726368"
        "6974656374757265b04c6c616d61466f7243617573616c4c4dad636f6e6669675f646967657374a6633066666565a5647479"
        "7065a862666c6f61743136ac6e616d655f69735f70617468c2a87265766973696f6ea46d61696eac7175616e74697a617469"
        "6f6ea3667038ab66696e6765727072696e74a466303064a4726f6c65a6746172676574ac6c6f61645f6f7074696f6e73a0a8"
        "76657273696f6e7381a4766c6c6da6302e33322e30a87265736f6c76656481b37469655f776f72645f656d62656464696e67"
        "73c2"
    ),
    FilePart: "82a474797065a846696c6550617274a464617461c4027b7d",
}


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_the_bytes_of_a_message_stay_the_same_within_a_version(kind: type[Message]) -> None:
    assert payload(EXAMPLES[kind]) == bytes.fromhex(GOLDEN[kind])
    end = listener_for(kind)
    end.feed(framed(bytes.fromhex(GOLDEN[kind])))
    assert end.next_message() == EXAMPLES[kind]


def test_a_frame_is_its_length_its_message_and_a_checksum() -> None:
    assert frame(Done()).hex() == "0000000f" + GOLDEN[Done] + "c3a60e67"


def test_a_message_may_lack_what_has_a_default() -> None:
    """Releases of one version of the protocol may differ in that."""
    for message in EXAMPLES.values():
        for field in msgspec.structs.fields(message):
            if not field.required:
                end = listener_for(type(message))
                end.feed(framed(without(message, field.name)))
                assert end.next_message() is not None


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        0,
        1,
        -1,
        (1 << 63) - 1,
        -(1 << 63),
        0.0,
        -0.0,
        1.0,
        0.1,
        5e-324,
        math.inf,
        math.nan,
        "",
        "draft",
        "\x1b[2J\n",
        "x" * 4096,
        None,
    ],
    ids=lambda value: repr(value)[:24],
)
def test_an_attribute_arrives_with_its_value_and_type(value: AttributeValue) -> None:
    pair = Pair().say(Hello, Welcome, Join)
    client = pair.ends[CLIENT]
    client.feed(pair.ends[SERVER].send(Accept(SESSION, 1, "tcp", {}, {"layers.0.rank": value})))
    accept = client.next_message()
    assert isinstance(accept, Accept)
    assert list(accept.attributes) == ["layers.0.rank"]
    assert repr(accept.attributes["layers.0.rank"]) == repr(value)


def test_messages_do_not_share_their_defaults() -> None:
    accepts = [Accept(SESSION, 1, "tcp", {}) for _ in range(2)]
    statuses = [Status((), 0, ()) for _ in range(2)]
    assert [each.attributes for each in accepts] == [each.declined for each in statuses] == [{}, {}]
    assert accepts[0].attributes is not accepts[1].attributes
    assert statuses[0].declined is not statuses[1].declined


def test_fields_left_at_their_defaults_travel_too() -> None:
    assert payload(Hello()) == b"\x83\xa4type\xa5Hello\xa8protocol\x02\xa9challenge\xc4\x00"
    assert set(msgspec.msgpack.decode(payload(Refuse("no")))) == {"type", *Refuse.__struct_fields__}


def test_the_largest_request_is_far_below_its_limit() -> None:
    long = ModelIdentity(
        "/" + "d" * 255 * 4, "A" * 200, "f" * 64, "bfloat16", True, "r" * 64, "q" * 64, "f" * 64, "target", "o" * 200
    )
    offers = tuple(Offer(name, "s" * 80) for name in ("shared_memory", "tcp", "process_group"))
    assert len(frame(Join(long, RANK, "f" * 64, offers))) < 4096
