"""What systemd does for a service that asks for it: it hears when the service is ready, and keeps its descriptors.

Descriptors in its store outlive the process, a crash too, and come back when the service starts again
(sd_notify(3), sd_listen_fds(3), FileDescriptorStoreMax= in systemd.service(5)). Pages come back that way with the
notes that belong to them, which lie in memory files of their own. Where there is no systemd, nothing here does a thing.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from vllm_ascend.model_loader.netloader.cache.messages import FRAME_LIMIT, Note
from vllm_ascend.model_loader.netloader.cache.shelf import Item

logger = logging.getLogger(__name__)

_FIRST_DESCRIPTOR: Final = 3
"""The number of the first descriptor that systemd passes: SD_LISTEN_FDS_START."""
_SEND_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Notifier:
    """Tells systemd what is new, on the socket that the environment names. Never raises."""

    address: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Notifier | None:
        """The one that `environment` tells of, None if this process is no service that may notify."""
        address = environment.get("NOTIFY_SOCKET", "")
        return cls(address) if address.startswith(("/", "@")) else None

    def tell(self, *assignments: str, descriptors: tuple[int, ...] = ()) -> bool:
        """Sends `assignments`, such as ``READY=1``. Returns whether that worked."""
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_SECONDS)
                sock.connect(address)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
                sock.sendmsg(["\n".join(assignments).encode()], rights)
        except OSError as error:
            logger.warning("systemd cannot be told %s: %s", assignments[0], error)
            return False
        return True


@dataclass
class DescriptorStore:
    """A watcher of a shelf that has systemd keep the pages of what is kept there, and what is known of them."""

    notifier: Notifier
    stored: dict[int, str] = field(default_factory=dict)
    """The names under which the descriptors of items are kept, by the number of the item."""

    def kept(self, item: Item) -> None:
        """Stores the pages of `item`, and a note, unless they come from the store."""
        if item.number in self.stored:
            return
        assert item.pages is not None
        name = f"netloader-{item.contents.root[:32]}-{os.getpid()}-{item.number}"
        try:
            note = _file_with(msgspec.msgpack.encode(item.contents.note))
        except OSError as error:
            logger.warning("%s is not stored by systemd: %s", name, error)
            return
        try:
            for kind, descriptor in (("pages", item.pages.descriptor), ("note", note)):
                assignments = ("FDSTORE=1", "FDPOLL=0", f"FDNAME={name}-{kind}")
                if not self.notifier.tell(*assignments, descriptors=(descriptor,)):
                    return
        finally:
            os.close(note)
        self.stored[item.number] = name

    def gone(self, item: Item) -> None:
        """Has systemd forget the pages of `item`."""
        name = self.stored.pop(item.number, None)
        if name is not None:
            self.forget(name)

    def came_back(self, name: str, item: Item) -> None:
        """Notes that `item` is what is stored under `name`."""
        self.stored[item.number] = name

    def forget(self, name: str) -> None:
        """Has systemd close what it keeps under `name`."""
        for kind in ("pages", "note"):
            self.notifier.tell("FDSTOREREMOVE=1", f"FDNAME={name}-{kind}")


def stored(environment: MutableMapping[str, str]) -> Iterator[tuple[str, Note, int]]:
    """What systemd has kept for this service: the names, notes and descriptors of pages.

    The caller closes the descriptors. What is not whole is left out with a warning. The variables are taken out of
    `environment`, so that no child process believes that they are for it.
    """
    found: dict[str, dict[str, int]] = {}
    for name, descriptor in _passed(environment):
        os.set_inheritable(descriptor, False)
        base, _, kind = name.rpartition("-")
        if kind in ("pages", "note") and kind not in found.setdefault(base, {}):
            found[base][kind] = descriptor
        else:
            logger.warning("systemd has passed a descriptor that is not known here: %r", name)
            os.close(descriptor)

    for base, parts in found.items():
        pages, note_file = parts.get("pages", -1), parts.get("note", -1)
        note: Note | None = None
        with contextlib.suppress(OSError):
            note = _read_note(note_file)
        if note_file >= 0:
            os.close(note_file)
        if note is not None and pages >= 0:
            yield base, note, pages
            continue
        logger.warning("what systemd has kept as %r is not whole, and is left", base)
        if pages >= 0:
            os.close(pages)


def _passed(environment: MutableMapping[str, str]) -> list[tuple[str, int]]:
    """The names and numbers of the descriptors that are for this process; sd_listen_fds(3) explains the variables."""
    count, pid = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_PID", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    numbers = range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count))
    names += ["unknown"] * (len(numbers) - len(names))
    return list(zip(names, numbers, strict=False))


def _file_with(data: bytes) -> int:
    descriptor = os.memfd_create("netloader-note", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read_note(descriptor: int) -> Note | None:
    size = os.fstat(descriptor).st_size
    if size > FRAME_LIMIT:
        return None
    try:
        return msgspec.msgpack.decode(os.pread(descriptor, size, 0), type=Note)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
