"""The small files of a source's model: which ones it tells, and their contents, verified.

A source is believed to know the model, and to nothing else: it can make no file but those of the fixed list, none
larger than the limit, and none with other contents than it has told before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vllm_ascend.model_loader.netloader.checkpoint.small_files import FILE_LIMIT, NAMES, TOTAL_LIMIT
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import (
    CannotBeWritten,
    Damaged,
    PeerError,
    ProtocolError,
    SourceFailed,
    one_line,
)
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity
from vllm_ascend.model_loader.netloader.wire.access import Access
from vllm_ascend.model_loader.netloader.wire.channel import Channel, Deadline
from vllm_ascend.model_loader.netloader.wire.greeting import greet
from vllm_ascend.model_loader.netloader.wire.messages import (
    AskFiles,
    AttributeValue,
    FilePart,
    Files,
    Message,
    ReadFile,
    Refuse,
    SmallFile,
)
from vllm_ascend.model_loader.netloader.wire.refusal import refused

CONFIGURATION: Final = "config.json"
_DIGEST_BYTES: Final = 32
_GPTQ_LAYERS: Final = "modules_in_block_to_quantize"
_DTYPES: Final = ("float16", "bfloat16", "float32")


class FileSource:
    """The small files at one source, over one connection. For one thread."""

    def __init__(self, channel: Channel, timeout: float, expected: ModelIdentity) -> None:
        """Asks for them. Raises PeerError, or SourceRefused where there are none or they are those of another model."""
        self._channel = channel
        self._timeout = timeout
        told = self._ask(AskFiles())
        assert isinstance(told, Files)
        if differences := expected.mismatch(told.identity):
            raise SourceFailed(f"its files belong to another model: {one_line('; '.join(map(str, differences)))}")
        _require_allowed(told.files)
        self.files = {each.name: each for each in told.files}
        """What there is, by name."""
        self.resolved = told.resolved

    def read(self, name: str) -> bytes:
        """The contents of one of `files`. Raises PeerError, or SourceRefused where it has changed."""
        file = self.files[name]
        contents = bytearray()
        while len(contents) < file.size:
            part = self._ask(ReadFile(name, len(contents)))
            assert isinstance(part, FilePart)
            contents += part.data
            if not part.data or len(contents) > file.size:
                raise ProtocolError(f"{name} has another size than it said: expected {file.size} bytes")
        if hashlib.sha256(contents).digest() != file.digest:
            raise Damaged(f"{name} is not the file of its digest")
        return bytes(contents)

    def _ask(self, question: Message) -> Message:
        self._channel.send(question, self._timeout)
        answer = self._channel.receive(Deadline(self._timeout))
        if isinstance(answer, Refuse):
            raise refused(answer)
        return answer


@contextlib.contextmanager
def files_at(source: Endpoint, expected: ModelIdentity, timeout: float, access: Access) -> Iterator[FileSource]:
    """The small files at `source`, for the model `expected`. Each step of asking may take `timeout` seconds.

    Raises SourceError, or TransportError where this process cannot connect.
    """
    with greet(source, access, timeout) as channel:
        try:
            yield FileSource(channel, timeout, expected)
        except PeerError as error:
            raise SourceFailed(str(error)) from error


def configured(contents: bytes, resolved: Mapping[str, AttributeValue], quantization: str = "") -> bytes:
    """The configuration in `contents` as the source's engine understands it, which has looked into the weight files.

    Raises ProtocolError for what is no configuration, and CannotBeWritten where the engine takes more from those than
    can be told: of GPTQ models by `quantization`, it takes the names of the quantised layers.
    """
    configuration = _parsed(contents)
    of_quantization = configuration.get("quantization_config")
    layers = of_quantization.get(_GPTQ_LAYERS) if isinstance(of_quantization, dict) else None
    if "gptq" in quantization and not layers:
        raise CannotBeWritten(
            f"a GPTQ model whose configuration does not name its quantised layers ({_GPTQ_LAYERS}): vLLM finds them by "
            f"the names in its checkpoint"
        )

    text = configuration.get("text_config")
    parts = [configuration, text] if isinstance(text, dict) else [configuration]
    changes: dict[str, AttributeValue] = {}
    if resolved.get("tie_word_embeddings") is False:
        changes["tie_word_embeddings"] = False
        for part in parts:
            part["tie_word_embeddings"] = False
    if resolved.get("dtype") in _DTYPES and not any(part.get("dtype") or part.get("torch_dtype") for part in parts):
        changes["dtype"] = configuration["dtype"] = resolved["dtype"]
    return (json.dumps(configuration, indent=2) + "\n").encode() if changes else contents


def _parsed(contents: bytes) -> dict[str, Any]:
    """Raises ProtocolError."""
    try:
        configuration = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{CONFIGURATION} is no JSON: {one_line(str(error))}") from error
    if not isinstance(configuration, dict):
        raise ProtocolError(f"{CONFIGURATION} is no object")
    return configuration


def _require_allowed(files: tuple[SmallFile, ...]) -> None:
    """Raises ProtocolError for what no source may tell."""
    if len({each.name for each in files}) != len(files):
        raise ProtocolError("it tells of a file twice")
    for each in files:
        if each.name not in NAMES:
            raise ProtocolError(f"it tells of a file {one_line(each.name, 100)!r}, which is not to be taken")
        if each.size > FILE_LIMIT or len(each.digest) != _DIGEST_BYTES:
            raise ProtocolError(f"it tells of {each.size} bytes of {each.name}: at most {FILE_LIMIT}, with a digest")
    if sum(each.size for each in files) > TOTAL_LIMIT:
        raise ProtocolError(f"its files have more than {TOTAL_LIMIT} bytes")
