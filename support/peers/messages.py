"""An example of every message, and frames that are made here once more from their description.

Tests of the protocol compare with these, and peers that keep to no rules send them.
"""

from __future__ import annotations

import hmac
import zlib

import msgspec

from vllm_ascend.model_loader.netloader.weights.identity import Difference, ModelIdentity, RankCoordinates
from vllm_ascend.model_loader.netloader.wire.conversation import Role
from vllm_ascend.model_loader.netloader.wire.messages import (
    DIGESTS_LIMIT,
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
    Holding,
    Inquire,
    Join,
    Leave,
    Message,
    News,
    Offer,
    Prove,
    Publish,
    RankPlace,
    ReadFile,
    Refuse,
    SmallFile,
    Status,
    Wait,
    Welcome,
)

CLIENT, SERVER = Role.CLIENT, Role.SERVER
IDENTITY = ModelIdentity(
    name="org/model",
    architecture="LlamaForCausalLM",
    config_digest="c0ffee",
    dtype="bfloat16",
    revision="main",
    quantization="fp8",
    fingerprint="f00d",
    versions={"vllm": "0.32.0"},
)
RANK = RankCoordinates(tp_rank=1, tp_size=2)
SESSION = bytes(range(16))
CHALLENGE = bytes(range(32, 64))
PROOF = bytes(range(64, 96))
DIGEST = bytes(range(96, 112))
ROOT = "5eed" * 16
ATTRIBUTES: dict[str, AttributeValue] = {
    "has_own_lm_head": True,
    "layers.0.rank": -7,
    "ratio": 0.5,
    "note": "draft",
    "window": None,
}
SAID_BY: dict[Role, tuple[Message, ...]] = {
    CLIENT: (
        Hello(challenge=CHALLENGE),
        Prove(PROOF),
        Join(IDENTITY, RANK, "d1835", (Offer("shared_memory", "boot/4/7"), Offer("tcp"))),
        AskDigests(300, DIGESTS_LIMIT),
        Gather(),
        Publish("group/0:1", bytes(range(256)) * 16),
        Gathered(),
        Follow(19001),
        Done(),
        Leave("the transport failed"),
        Announce(SESSION, 19001),
        Attach(SESSION),
        Fetch(1 << 33, 4096),
        Inquire(),
        Describe(ROOT),
        AskFiles(),
        ReadFile("tokenizer.json", 1 << 20),
    ),
    SERVER: (
        Challenge(CHALLENGE),
        Welcome(proof=PROOF),
        Wait(5, (":19001", "node-4:19001"), ROOT, "f00d"),
        Attached(),
        Accept(
            SESSION,
            3,
            "process_group",
            {"host": "10.0.0.1", "port": 40000},
            ATTRIBUTES,
            "f00d",
            "blake3",
            ROOT,
        ),
        Digests((DIGEST, bytes(16))),
        Publish("0/1", DIGEST),
        Gathered(),
        Refuse(
            "the tensors differ",
            (Difference("tensor w", "int8 [2]", ""),),
            b"\x92\x90\x90",
            (":19001", "node-3:19001"),
        ),
        News((0, 3, 300), (7,), (":19001", "node-4:19001"), whole=True),
        Confirm(3, ROOT),
        End("its weights were replaced by new ones"),
        Status(
            (Holding("target", IDENTITY, RANK, 291, 1 << 34, 3, ROOT, 1 << 34, "d1835"),),
            2,
            ("shared_memory", "tcp"),
            {"draft": "loading set table, which cannot be told to another process"},
            7,
            (RankPlace(RANK, ":19001"),),
        ),
        Description(b"\x92\x90\x90"),
        Files((SmallFile("config.json", 704, DIGEST),), IDENTITY, {"tie_word_embeddings": False}),
        FilePart(b"{}"),
    ),
}
EXAMPLES: dict[type[Message], Message] = {type(each): each for each in SAID_BY[CLIENT] + SAID_BY[SERVER]}
"""One of each kind."""
CHECKSUM_BYTES = 4
TAG_BYTES = 16


def other(role: Role) -> Role:
    """The role at the other end."""
    return SERVER if role is CLIENT else CLIENT


def speaker(kind: type[Message]) -> Role:
    """Who says messages of that kind; of those that both say, the client."""
    return CLIENT if kind in map(type, SAID_BY[CLIENT]) else SERVER


def payload(message: Message) -> bytes:
    """The content of the frame of `message`, without its ending."""
    return msgspec.msgpack.encode(message)


def with_length(content: bytes) -> bytes:
    """A frame, whose ending `content` has already."""
    return len(content).to_bytes(4, "big") + content


def tag(key: bytes | None, role: Role, number: int, content: bytes) -> bytes:
    """The ending of frame number `number` of `role`: a checksum, or with a key a tag that only its holders can make."""
    if key is None:
        return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big")
    return hmac.digest(key, role.value.encode() + number.to_bytes(8, "big") + content, "sha256")[:TAG_BYTES]


def framed(content: bytes) -> bytes:
    """`content` as a peer without a token sends it."""
    return with_length(content + tag(None, Role.CLIENT, 0, content))


def tagged(key: bytes, role: Role, number: int, content: bytes) -> bytes:
    """`content` as the frame number `number` of `role` under `key`."""
    return with_length(content + tag(key, role, number, content))


def having(message: Message, **fields: object) -> bytes:
    """The payload of `message` with some of its fields replaced, or others added."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(payload(message)) | fields)
